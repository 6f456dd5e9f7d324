"""Long documents: facts stated early, much other text, the facts asked late."""

import random
import re
from collections.abc import Callable
from typing import Protocol

from megacontext_jax.data.corpus import stories
from megacontext_jax.data.corpus.words import FILLER, NAMES, OBJECTS
from megacontext_jax.data.corpus.world import Item, document, split_of

_CHARS_PER_TOKEN = 4.0
_SHORTEST = 400  # tokens
_SUBJECTS = frozenset(NAMES + OBJECTS)


class _Source(Protocol):
    def next(self) -> str: ...


def long_document(
    rng: random.Random,
    split: str,
    level: float,
    english: _Source,
    max_tokens: int,
    make_item: Callable[[random.Random, str, str, float], Item],
) -> str:
    """A document of 400 to `max_tokens` tokens (short ones are more frequent).

    It opens with a story whose questions come at the very end; in between stand real English, filler of the
    world, and small items with questions of their own, so that every stretch of it has something to recall.
    Nothing in between speaks of the subjects of that first story: the late answers stay true.
    """
    tokens = min(
        max_tokens, int(_SHORTEST * (max(max_tokens, _SHORTEST) / _SHORTEST) ** (rng.random() * level))
    )
    while True:
        n = 4 + int(rng.random() * 3)
        story = stories.facts(rng, n, n, variety=level, n_relations=2)
        if split_of(story.statement) == split:
            break
    subjects = {word for q in story.questions for word in re.findall(r"\w+", q.ask) if word in _SUBJECTS}
    parts = [story.statement]
    size = len(story.statement)
    while size < tokens * _CHARS_PER_TOKEN:
        draw = rng.random()
        if draw < 0.3:
            part = english.next()
        elif draw < 0.45:
            part = " ".join(rng.choices(FILLER, k=3 + int(rng.random() * 12)))
        else:
            part = _apart(rng, "facts" if draw < 0.75 else "ledger", split, level, subjects, make_item)
        parts.append(part)
        size += len(part) + 2
    late = " ".join(f"{q.ask} {q.answer}" for q in story.questions)
    return "\n\n".join([*parts, late])


def _apart(rng, kind: str, split: str, level: float, subjects: set[str], make_item) -> str:
    """A small item that does not mention the subjects; filler where ten draws all did."""
    for _ in range(10):
        item = make_item(rng, kind, split, level * rng.random())
        if subjects.isdisjoint(re.findall(r"\w+", item.statement)):
            return document(item)
    return " ".join(rng.choices(FILLER, k=8))
