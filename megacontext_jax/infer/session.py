"""A conversation over a history of any length, in memory or in a folder.

    chat = load_chat(config)
    with chat.new_session() as session:           # or chat.open_session(folder)
        session.add_file("book.txt")              # any length
        session.add_message("Who lives in Riga?")
        for event in session.answer(max_tokens=100, temperature=0.0): ...

The history are tokens in a tree (`context.store`); what was appended there is acknowledged and outlives a kill of the
process if the session has a folder. What the model remembers of it is a `Memory`, which catches up with the tree.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megacontext_jax.context.store import TreeStore
from megacontext_jax.errors import UserError
from megacontext_jax.files import atomic_path, write_bytes
from megacontext_jax.infer.engine import NO_TOKEN, Draw, Engine, Event, State, new_state
from megacontext_jax.infer.memory import Memory, Tick, check_fits
from megacontext_jax.infer.model import Region
from megacontext_jax.infer.text import read_text

APPEND = 4096  # tokens of a long text that are acknowledged at a time
SMALL = 1 << 20  # bytes of a memory that are written after every answer
SNAPSHOT_EVERY = 65_536  # tokens read between two snapshots of a memory, while a long text is read
ABOUT, TREE, SNAPSHOT = "session.json", "tree", "memory.npz"


@dataclass(frozen=True)
class About:
    """What a session's folder says of itself."""

    model: str  # run, step and pattern: whose memory it is
    weights: str  # digest of a sample of them: a run of the same name may have been trained again
    tokenizer: str  # digest

    def write(self, folder: Path) -> None:
        fields = {"format": "megacontext-session", "version": 1, **asdict(self)}
        write_bytes(folder / ABOUT, (json.dumps(fields, indent=1) + "\n").encode())

    @staticmethod
    def read(folder: Path) -> "About":
        path = folder / ABOUT
        try:
            fields = json.loads(path.read_bytes())
            if fields["format"] != "megacontext-session" or fields["version"] > 1:
                raise ValueError
            return About(*(str(fields[name]) for name in ("model", "weights", "tokenizer")))
        except OSError:
            raise UserError(f"{folder} is no session (it has no {ABOUT}); name another folder.") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged or of a newer version; restore it from a copy.") from None


class Session:
    """One history and what the model remembers of it. Not for several threads at once."""

    def __init__(self, engine: Engine, memory: Memory, tree: TreeStore, folder: Path | None = None):
        self.engine = engine
        self.memory = memory
        self.tree = tree
        self.folder = folder
        self._saved = 0  # tokens of the history when the memory was last written
        self.turns = 0  # answers given
        tokenizer = engine.tokenizer
        self.tokenizer = tokenizer
        names = ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
        self._bos, self._user, self._user_end, self._assistant, self._assistant_end = (
            tokenizer.special(f"<|{name}|>") for name in names
        )

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __len__(self) -> int:
        """Tokens of the history."""
        return len(self.tree)

    # --- reading ---

    def append(self, ids: Sequence[int] | np.ndarray) -> None:
        """Acknowledges tokens; the model reads them when it next speaks. UserError if there is no room for them."""
        check_fits(self.memory, len(self.tree), len(ids))
        for start in range(0, len(ids), APPEND):
            self.tree.append(ids[start : start + APPEND], gists=False)

    def open_turn(self) -> None:
        """Begins the user's turn where none is open; what is appended then is the user's."""
        self.append(self._opening())

    def add_document(self, text: str) -> int:
        """Puts a text at the beginning of the next message; its tokens."""
        ids = [*self._opening(), *self.tokenizer.encode(text), *self.tokenizer.encode("\n")]
        self.append(ids)
        return len(ids)

    def add_file(self, path: Path | str) -> int:
        """As `add_document`, with the text of a file. UserError if it cannot be read or is not UTF-8."""
        return self.add_document(read_text(Path(path)))

    def add_message(self, text: str) -> None:
        """The user's message, up to where the assistant speaks. Text is never taken for markup."""
        self.append([*self._opening(), *self.tokenizer.encode(text), self._user_end, self._assistant])

    def read(self, tick: Tick = lambda tokens: None) -> None:
        """Lets the model read what it has not, and look at all again with that in sight; `tick` is told how far it is.

        May be interrupted and called again.
        """
        for tokens in self.reading():
            tick(tokens)

    def reading(self) -> Iterator[int]:
        """`read` in pieces that take a moment each, with the tokens read so far; may be left between two of them."""
        last = self._saved
        for tokens in self.memory.catch_up(self.tree):
            yield tokens
            if self.folder and tokens - last >= SNAPSHOT_EVERY:
                self._write_snapshot()
                last = tokens

    def _opening(self) -> list[int]:
        """What must stand before more text of the user."""
        open_mark = self._open_turn()
        if open_mark == self._user:
            return []
        closing = [self._assistant_end] if open_mark == self._assistant else []
        return [*([] if len(self.tree) else [self._bos]), *closing, self._user]

    def _open_turn(self) -> int | None:
        """The mark of the turn that is not closed yet: a kill may have cut an answer, a document awaits its question."""
        marks = (self._user, self._user_end, self._assistant, self._assistant_end)
        for stop in range(len(self.tree), 0, -APPEND):
            ids = self.tree.tokens(max(0, stop - APPEND), stop)
            places = np.flatnonzero(np.isin(ids, marks))
            if len(places):
                mark = int(ids[places[-1]])
                return mark if mark in (self._user, self._assistant) else None
        return None

    # --- speaking ---

    def answer(self, *, tick: Tick = lambda tokens: None, **options) -> Iterator[Event]:
        """Reads what is new and streams what the model says next, token by token, until it stops.

        Options are those of `Engine.draw`; `tick` is told how far the reading is. Every token is in the history before
        it is yielded. Raises UserError for settings out of range at once.
        """
        return _one_by_one(self.stretches(tick=tick, **options))

    def stretches(self, *, tick: Tick = lambda tokens: None, **options) -> Iterator[list[Event]]:
        """`answer` in steps that take the device for a moment each, so that many sessions can share it.

        A step says up to `tokens_per_sync` tokens, or reads and says none. Closing the iterator ends the answer.
        """
        draw = self.engine.draw(**options)
        if not len(self.tree):
            raise UserError("There is nothing to answer yet; add a message first.")
        return self._answer(draw._replace(seed=draw.seed + self.turns), tick)

    def _answer(self, draw: Draw, tick: Tick) -> Iterator[list[Event]]:
        for tokens in self.reading():
            tick(tokens)
            yield []
        limit = self.limit(draw.max_tokens)
        try:
            limit_1 = np.array([limit], np.int32)
            yield from self.engine.stretches(self.state(limit), limit_1, draw, between=self)
        finally:
            self.end_turn()

    def end_turn(self) -> None:
        """After an answer: the next one draws otherwise, and what is small is kept at once."""
        self.turns += 1
        if self.folder:
            self._write_snapshot(small=True)

    def limit(self, max_tokens: int | None) -> int:
        """Tokens that an answer may have here."""
        room = self.memory.capacity - self.memory.tokens
        return min(room, max_tokens or room)

    def state(self, limit: int) -> State:
        """What the engine goes on from, for at most `limit` tokens; everything has been read."""
        return new_state(self.memory.cache, self.memory.logits_1V, np.array([limit], np.int32))

    def room(self) -> int:
        return self.memory.room()

    def settle(self, state: State, token_NB: np.ndarray) -> State:
        self.keep(state.cache, state.logits_BV, token_NB[:, 0])
        return state._replace(cache=self.memory.cache, logits_BV=self.memory.logits_1V)

    def keep(self, cache, logits_1V, token_N: np.ndarray) -> None:
        """Acknowledges what was said (NO_TOKEN: nothing) and has been read into `cache`; may refocus."""
        said = token_N[token_N != NO_TOKEN]
        self.tree.append(said, gists=False)  # the memory completes them when it looks
        self.memory.took(cache, logits_1V, len(said), self.tree)

    # --- looking and keeping ---

    def regions(self) -> list[Region]:
        """How the history is shown to the model, oldest first; what it has not read is not in it."""
        return self.memory.regions()

    def save(self) -> None:
        """Forces everything to the disk, so that it outlives a power cut too."""
        if self.folder is None:
            raise UserError(
                "This conversation lives in memory alone; start it with --session FOLDER to keep it."
            )
        self.tree.sync()
        self._write_snapshot()

    def _write_snapshot(self, small: bool = False) -> None:
        """What the memory needs to go on. Without it, it reads again from the last one."""
        arrays = self.memory.snapshot(most=SMALL if small else None)
        if not arrays:
            return
        with atomic_path(self.folder / SNAPSHOT) as scratch, open(scratch, "wb") as file:
            np.savez(file, **arrays)
        self._saved = self.memory.tokens

    def restore(self, say: Callable[[str], None]) -> None:
        """Takes up the snapshot in the folder, if there is one of this history."""
        path = self.folder / SNAPSHOT
        try:
            with np.load(path, allow_pickle=False) as arrays:
                self.memory.restore(dict(arrays))
        except FileNotFoundError:
            return
        except (ValueError, KeyError, OSError, EOFError, TypeError):
            say(f"{path} cannot be used; the history is read anew.")
            self.memory.reset()
            return
        if self.memory.tokens > len(
            self.tree
        ):  # the disk lost tokens that the snapshot had, and others will follow
            self.memory.reset()
            path.unlink()
        self._saved = self.memory.tokens

    def close(self) -> None:
        """Lets go of the folder; what is in it outlives a power cut from here on."""
        if self.folder:
            self.tree.sync()
            if self._saved < self.memory.tokens:
                self._write_snapshot()
        self.tree.close()


def _one_by_one(stretches: Iterator[list[Event]]) -> Iterator[Event]:
    with closing(stretches):
        for events in stretches:
            yield from events
