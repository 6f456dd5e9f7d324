"""Chat with a trained model in the terminal, over a history of any length.

    python -m scripts.chat_cli                       a conversation with the SFT model
    python -m scripts.chat_cli -p "Why?"             one prompt, one answer
    cat book.txt | python -m scripts.chat_cli -p "Who is it about?"
    python -m scripts.chat_cli --mc --session talk   kept in the folder talk: leave, come back, go on
    python -m scripts.chat_cli -i mid -g d12 -t 0    another stage and tag, greedy

With --mc, or a model with gist attention, a conversation has no end: what is old is seen in gists. A plain model says where
its window ends. In a conversation /load FILE puts a long text into memory, /focus shows what the model looks at, /help
lists the rest; Ctrl-C stops an answer.
"""

import os
import stat
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

from megacontext_jax import runtime
from megacontext_jax.cli import parse, run_main
from megacontext_jax.context.store import check_place
from megacontext_jax.errors import UserError
from megacontext_jax.infer.chat import ChatLoop
from megacontext_jax.infer.load import load_chat


def main(argv: list[str]) -> int | None:
    config = parse(argv, doc=__doc__, show=("chat", "eval", "run"))
    check_place(config.mc.mc_tree, config.chat.session, "--session")
    prompt = config.chat.prompt or (config.chat.demo and config.chat.demo_prompt)
    document = piped_text() if prompt and not config.chat.demo else ""
    runtime.start(config.run)
    folder = Path(config.chat.session) if config.chat.session else None
    with load_chat(config).watched() as chat:
        session = chat.session(folder, say=lambda text: print(text, file=sys.stderr))
        again = partial(chat.start_over, folder)
        with closing(ChatLoop(session, config.chat, start_over=again, seed=config.run.seed)) as loop:
            if prompt:
                return loop.answer_once(prompt, document)
            known = f" {len(session):,} tokens of history." if len(session) else ""
            print(f"{chat.name}.{known} /help for what you can do, quit leaves, Ctrl-C stops an answer.")
            return loop.run()


def piped_text() -> str:
    """What comes in through a pipe or from a file; nothing from a terminal."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or not a file at all
        return ""
    if not (stat.S_ISFIFO(kind) or stat.S_ISREG(kind)):
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"The piped text is not UTF-8 (byte {error.start:,}); convert it first.") from None


if __name__ == "__main__":
    run_main(main)
