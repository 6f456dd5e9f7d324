"""Small sums and counting. No spaces inside a sum: a number of up to two digits is then exactly one token."""

import random

from megacontext_jax.data.corpus.words import COLOURS
from megacontext_jax.data.corpus.world import Item, Question, split_of

LARGEST = 99


def sums(rng: random.Random, n: int, split: str) -> Item:
    """`What is 57+6? 57+6=63.` A number up to 99 and a digit, added or subtracted, results in [0, 99].

    Each task belongs to one split (1 in 8 to `eval`), so held-out sums are really new.
    """
    questions: list[Question] = []
    while len(questions) < n:
        a, b = int(rng.random() * (LARGEST + 1)), int(rng.random() * 10)
        plus = rng.random() < 0.5
        total = a + b if plus else a - b
        task = f"{a}+{b}" if plus else f"{a}-{b}"
        if 0 <= total <= LARGEST and split_of(task, 8) == split:
            questions.append(Question(f"What is {task}?", f"{task}={total}.", 1 / (LARGEST + 1)))
    return Item("arithmetic", "", tuple(questions))


def counting(rng: random.Random, n_beads: int, n_questions: int) -> Item:
    """`Beads: red blue red. How many are red? There are 2 that are red.`"""
    kinds = rng.sample(COLOURS, 2 + int(rng.random() * 2))
    beads = rng.choices(kinds, k=n_beads)
    asked = rng.sample(kinds, min(n_questions, len(kinds)))
    questions = tuple(
        [
            Question(f"How many are {c}?", f"There are {beads.count(c)} that are {c}.", 1 / n_beads)
            for c in asked
        ]
    )
    return Item("counting", f"Beads: {' '.join(beads)}.", questions)
