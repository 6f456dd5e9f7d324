"""Small sums and counting. No spaces inside a sum: a number of up to two digits is then exactly one token."""

import random

from megacontext_jax.data.corpus.words import COLOURS
from megacontext_jax.data.corpus.world import Item, Question, split_of

LARGEST = 20


def sums(rng: random.Random, n: int, split: str) -> Item:
    """`What is 7+12? 7+12=19.`; each operand pair belongs to one split, so held-out sums are really new."""
    questions: list[Question] = []
    while len(questions) < n:
        a, b = int(rng.random() * (LARGEST + 1)), int(rng.random() * (LARGEST + 1))
        plus = rng.random() < 0.7 or a < b
        task = f"{a}+{b}" if plus else f"{a}-{b}"
        if split_of(task) == split:
            total = a + b if plus else a - b
            questions.append(Question(f"What is {task}?", f"{task}={total}.", 1 / (2 * LARGEST + 1)))
    return Item("arithmetic", "", tuple(questions))


def counting(rng: random.Random, n_beads: int, n_questions: int) -> Item:
    """`Beads: red blue red. How many are red? red 2.`"""
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
