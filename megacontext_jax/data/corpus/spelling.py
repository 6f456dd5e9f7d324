"""Spelling: one letter per token, two words at a time."""

import random

from megacontext_jax.data.corpus.words import SPELLED
from megacontext_jax.data.corpus.world import Item, Question, split_of


def spelling(rng: random.Random, n: int, split: str) -> Item:
    """`Spell lantern and key. The letters are l a n t e r n and k e y.`

    Every word is spelled somewhere in training (a token does not show its letters); word *pairs* belong to
    one split each.
    """
    questions: list[Question] = []
    while len(questions) < n:
        first, second = rng.sample(SPELLED, 2)
        if split_of(f"{first} {second}") == split:
            answer = f"The letters are {' '.join(first)} and {' '.join(second)}."
            questions.append(
                Question(f"Spell {first} and {second}.", answer, 1 / 26 ** (len(first) + len(second)))
            )
    return Item("spelling", "", tuple(questions))
