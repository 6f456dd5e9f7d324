"""Reads and speaks without end in a session on disk, and says what it has acknowledged: for tests that kill it.

python -m tests.infer.session_kill KIND FOLDER SEED
"""

import sys

import numpy as np

from tests.infer.session_models import focus_chat, rows_chat

CHATS = {"focus": lambda: focus_chat(lens="learned"), "rows": rows_chat}
LIMIT = 900  # tokens, then it is done


def main(kind: str, folder: str, seed: str) -> None:
    rng = np.random.default_rng(int(seed))
    with CHATS[kind]().session(folder) as session:
        session.read()
        tell(session.tree.tokens())
        print("ready", flush=True)
        while len(session) < LIMIT:
            ids = rng.integers(0, 250, int(rng.integers(1, 70)), np.uint32)
            session.append(ids)
            tell(ids)
            for event in session.answer(max_tokens=int(rng.integers(1, 30)), seed=int(rng.integers(1000))):
                tell([event.token])
            if rng.random() < 0.2:
                session.save()
    print("done", flush=True)


def tell(ids) -> None:
    """Tokens that are in the history for good."""
    print("ack", *map(int, ids), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
