"""Long documents: facts stated early, much other text, the facts asked late."""

import random
from collections.abc import Callable
from typing import Protocol

from megacontext_jax.data.corpus import stories
from megacontext_jax.data.corpus.words import FILLER
from megacontext_jax.data.corpus.world import Item, document, split_of

_CHARS_PER_TOKEN = 4.0
_SHORTEST = 400  # tokens


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
    """
    tokens = min(
        max_tokens, int(_SHORTEST * (max(max_tokens, _SHORTEST) / _SHORTEST) ** (rng.random() * level))
    )
    while True:
        story = stories.facts(rng, 4 + int(rng.random() * 5), 8, variety=level, n_relations=2)
        if split_of(story.statement) == split:
            break
    parts = [story.statement]
    size = len(story.statement)
    while size < tokens * _CHARS_PER_TOKEN:
        draw = rng.random()
        if draw < 0.3:
            part = english.next()
        elif draw < 0.45:
            part = " ".join(rng.choices(FILLER, k=3 + int(rng.random() * 12)))
        else:
            part = document(make_item(rng, "facts" if draw < 0.75 else "ledger", split, level))
        parts.append(part)
        size += len(part) + 2
    late = " ".join(f"{q.ask} {q.answer}" for q in story.questions)
    return "\n\n".join([*parts, late])
