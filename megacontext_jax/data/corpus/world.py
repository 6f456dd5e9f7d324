"""What every kind of generated text shares: items, random streams, and the rule that keeps splits apart."""

import random
import zlib
from dataclasses import dataclass

SPLITS = ("train", "val", "eval")


@dataclass(frozen=True)
class Question:
    """One question about a statement; `chance` is the accuracy of guessing among the values in the text."""

    ask: str
    answer: str
    chance: float


@dataclass(frozen=True)
class Item:
    """A statement and questions whose answers follow from it; the statement may be empty."""

    kind: str
    statement: str
    questions: tuple[Question, ...]


def stream(*names: object) -> random.Random:
    """An independent random stream for a path of names, such as `("train", seed, "ledger")`."""
    return random.Random("/".join(map(str, names)))


def split_of(text: str, buckets: int = 16) -> str:
    """The split a statement belongs to: one in `buckets` to `eval`, one to `val`, the rest to `train`.

    The rule looks at the text alone, so a statement of one split can never appear in another, whatever the
    seeds were.
    """
    bucket = zlib.crc32(text.encode()) % buckets
    return "eval" if bucket == 0 else "val" if bucket == 1 else "train"


def document(item: Item) -> str:
    """The item as running text: statement, then every question with its answer."""
    parts = [item.statement] if item.statement else []
    for question in item.questions:
        parts += (question.ask, question.answer)
    return " ".join(parts)


def conversation(item: Item) -> list[dict[str, str]]:
    """The item as chat messages: the first user turn carries the statement, each question is one exchange."""
    messages = []
    lead = item.statement + " " if item.statement else ""
    for question in item.questions:
        messages.append({"role": "user", "content": lead + question.ask})
        messages.append({"role": "assistant", "content": question.answer})
        lead = ""
    return messages


def distinct(values: list[str]) -> float:
    """Chance of guessing right among the different values named in a text."""
    return 1.0 / len(set(values))
