"""What conversations do, in steps: answer, take in a text, tell what was said. Run by the scheduler."""

import math
import re
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

import numpy as np

from megacontext_jax.infer.chat_model import ChatModel
from megacontext_jax.infer.memory import check_fits
from megacontext_jax.infer.server.book import Book, Document, Talk
from megacontext_jax.infer.server.scheduler import Steps
from megacontext_jax.infer.session import APPEND, Session
from megacontext_jax.infer.text import TextStream

STRIP_SECONDS = 0.25  # between two strips of one stream
PIECE = 1 << 16  # characters that are encoded in a step
SCAN = 1 << 18  # tokens that are looked through in a step
WARM_TOKENS = 40  # more than a working context waits before it is refocused
MESSAGES = 200  # newest messages of a transcript
SHOWN = 20_000  # tokens of a message that a transcript shows, half from its beginning and half from its end
_CUT = re.compile(r"\n(?=\S)|(?<=[^\W\d_])(?= [^\W\d_])")


@dataclass(frozen=True)
class Ask:
    """How an answer is drawn; see `Session.answer`."""

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    seed: int


# --- answers ---


def say(book: Book, name: str, text: str, ask: Ask) -> Steps:
    """A message and its answer: `start`, `reading`, `token` and `strip` as they come, `done` with what it took."""
    with book.use(name) as talk:
        session = talk.session
        before = len(session)
        book.reserve(talk, len(text.encode()) + ask.max_tokens)
        session.add_message(text)
        yield [{"start": True, "tokens": len(session)}]
        stream, watch, said, stop = TextStream(session.tokenizer), _StripWatch(talk), 0, None
        begun = read = first = time.monotonic()
        asked = len(session)
        with closing(session.stretches(**asdict(ask))) as stretches:
            for events in stretches:
                if not events:
                    read = time.monotonic()
                    yield [{"reading": session.memory.tokens, "of": asked}, *watch.due()]
                    continue
                if not said:
                    first = time.monotonic()
                said, stop = said + len(events), events[-1].stop
                text = "".join(stream.push(e.token) for e in events if e.stop != "end")
                yield [*([{"token": text, "said": said}] if text else []), *watch.due()]
        rest, now = stream.flush(), time.monotonic()
        done = {
            "done": True,
            "stop": stop or "window",
            "tokens": said,
            "prompt_tokens": asked - before,
            "history": len(session),
            "first_token_seconds": round(first - begun, 4),
            "seconds": round(now - begun, 4),
            "ms_per_token": round(1000 * (now - read) / max(1, said), 2),
        }
        yield [*([{"token": rest, "said": said}] if rest else []), {"strip": strip(talk)}, done]


def complete(chat: ChatModel, ids: Sequence[int], ask: Ask) -> Steps:
    """An answer to a conversation that is not kept: `start`, `token` per token with text, `done`."""
    with chat.new_session() as session:
        session.append(ids)
        yield [{"start": True, "prompt_tokens": len(ids)}]
        stream, said, stop = TextStream(session.tokenizer), 0, None
        with closing(session.stretches(**asdict(ask))) as stretches:
            for events in stretches:
                messages = []
                for event in events:
                    said, stop = said + 1, event.stop
                    if stop != "end" and (text := stream.push(event.token)):
                        messages.append({"token": text})
                yield messages
        rest = stream.flush()
        done = {"done": True, "stop": stop or "window", "tokens": said, "prompt_tokens": len(ids)}
        yield [*([{"token": rest}] if rest else []), done]


def warm_up(chat: ChatModel, ask: Ask) -> None:
    """Compiles what answers with these settings need, after a short message and after a long text."""
    budget = chat.focus.budget if chat.focus else 0
    chat.memory().warm_up()
    for tokens in (1, max(300, 2 * budget)):
        with chat.new_session() as session:
            text = " a" * min(tokens, session.memory.capacity // 4)
            session.add_document(text)
            session.add_message("Hi")
            for _ in session.stretches(**asdict(ask) | {"max_tokens": WARM_TOKENS}):
                pass


# --- long texts ---


def ingest(book: Book, name: str, title: str, text: str) -> Steps:
    """Takes a text into the history and lets the model read it: `encoded`, `kept`, `reading`, `strip`, then `done`."""
    with book.use(name) as talk:
        session = talk.session
        begun, watch = time.monotonic(), _StripWatch(talk)
        parts, total = [], 0
        for ids in _encoded(session, text):
            parts.append(ids)
            total += len(ids)
            yield [{"encoded": total}]
        book.reserve(talk, total)
        check_fits(session.memory, len(session), total + 2)
        session.open_turn()
        start = len(session)
        for ids in parts:
            for first in range(0, len(ids), APPEND):
                session.append(ids[first : first + APPEND])
                yield [{"kept": len(session) - start, "of": total}]
        session.append(session.tokenizer.encode("\n"))
        talk.add_document(Document(title, start, len(session)))
        goal = len(session)
        for tokens in session.reading():
            yield [{"reading": tokens, "of": goal}, *watch.due()]
        seconds = round(time.monotonic() - begun, 3)
        done = {"done": True, "tokens": total, "history": len(session), "seconds": seconds}
        yield [{"strip": strip(talk)}, done]


def _encoded(session: Session, text: str) -> Iterator[np.ndarray]:
    for piece in pieces(text):
        yield np.array(session.tokenizer.encode(piece), np.uint32)


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """The text in pieces of about `size` characters that encode to the same tokens as the whole.

    It is cut where the tokenizer's words end whatever stands around: behind a line break, or between a letter and a
    space with a letter behind it. A text without such places comes in one piece.
    """
    start = 0
    while start < len(text):
        place = _CUT.search(text, start + size) if len(text) - start > size else None
        stop = place.end() if place else len(text)
        yield text[start:stop]
        start = stop


# --- looking ---


class _StripWatch:
    """The strip, as often as it is worth it."""

    def __init__(self, talk: Talk):
        self._talk = talk
        self._told = 0.0

    def due(self) -> list[dict]:
        now = time.monotonic()
        if now - self._told < STRIP_SECONDS:
            return []
        self._told = now
        return [{"strip": strip(self._talk)}]


def strip(talk: Talk) -> dict:
    """How the history is shown to the model: regions [level, start, stop, entries, score], oldest first."""
    memory = talk.session.memory
    found = memory.statistics()
    return {
        "tokens": len(talk.session),
        "read": memory.tokens,
        "capacity": memory.capacity,
        "entries": found["entries"],
        "budget": found.get("budget"),
        "edits": {name: found.get(name, 0) for name in ("expands", "collapses", "relayouts")},
        "regions": [[r.level, r.start, r.stop, r.entries, _finite(r.score)] for r in talk.session.regions()],
    }


def _finite(score: float | None) -> float | None:
    return round(score, 3) if score is not None and math.isfinite(score) else None


def summary(talk: Talk) -> dict:
    """What a list of conversations would show of one."""
    return {
        "name": talk.name,
        "tokens": len(talk.session),
        "read": talk.session.memory.tokens,
        "documents": len(talk.documents),
        "busy": talk.busy,
        "on_disk": talk.session.folder is not None,
    }


def transcript(book: Book, name: str) -> Steps:
    """One message {"messages": [...]}, oldest first: role and text, or the name and length of a document."""
    with book.look(name) as talk:
        turns = yield from _turns(talk.session)
        yield [{"messages": [part for turn in turns for part in _shown(talk, *turn)]}]


def _turns(session: Session) -> Generator[list, None, list[tuple[str, int, int]]]:
    """Gives the newest turns as (role, start, stop) of their tokens, oldest first; looks for them in steps."""
    marks = {
        session.tokenizer.special(f"<|{name}|>"): name
        for name in ("user_start", "user_end", "assistant_start", "assistant_end")
    }
    turns: list[tuple[str, int, int]] = []
    stop = end = len(session)
    while stop > 0 and len(turns) < MESSAGES:
        start = max(0, stop - SCAN)
        ids = session.tree.tokens(start, stop)
        for place in np.flatnonzero(np.isin(ids, list(marks)))[::-1].tolist():
            role, _, side = marks[int(ids[place])].partition("_")
            if side == "start":
                turns.append((role, start + place + 1, end))
            end = start + place
        stop = start
        yield []
    return turns[::-1]


def _shown(talk: Talk, role: str, start: int, stop: int) -> Iterator[dict]:
    for document in talk.documents:
        if start <= document.start and document.stop <= stop:
            tokens = document.stop - document.start
            yield {"role": "document", "name": document.name, "tokens": tokens}
            start = document.stop
    if stop <= start:
        return
    ids, session = talk.session.tree.tokens, talk.session
    if stop - start <= SHOWN:
        text = _text(session, ids(start, stop))
    else:
        half = SHOWN // 2
        left = _text(session, ids(start, start + half)), _text(session, ids(stop - half, stop))
        text = f"{left[0]}\n[... {stop - start - 2 * half:,} tokens ...]\n{left[1]}"
    if text.strip():
        yield {"role": role, "text": text, "tokens": stop - start}


def _text(session: Session, ids: np.ndarray) -> str:
    stream = TextStream(session.tokenizer)
    return "".join(map(stream.push, ids.tolist())) + stream.flush()
