"""Ledgers: many key-value pairs, then questions whose answer repeats the key directly before its value.

Key next to value in the statement and in the answer makes recall a single step ("what followed this word
before?"), the easiest form of in-context lookup; the other kinds of text lean on the circuit that forms here.
Every key and value is written with a space before it, in documents and in chat turns alike (hence `A: ` in
front of the answer), so that it is always the same token.
"""

import random

from megacontext_jax.data.corpus.words import (
    ANIMALS,
    CLASSES,
    COLOURS,
    FOODS,
    JOBS,
    NAMES,
    OBJECTS,
    PLACES,
    TOWNS,
)
from megacontext_jax.data.corpus.world import Item, Question, distinct

_VALUES = COLOURS + JOBS + TOWNS + PLACES
_SCHEMAS = (
    (NAMES, _VALUES),
    (NAMES, JOBS),
    (NAMES, TOWNS),
    (NAMES, ANIMALS),
    (NAMES, FOODS),
    (OBJECTS, PLACES),
    (OBJECTS, COLOURS),
)


def _pairs(rng: random.Random, n: int, words: float) -> tuple[list[str], list[str]]:
    keys, values = (_in_use(a_class, words) for a_class in _SCHEMAS[int(rng.random() * len(_SCHEMAS))])
    return rng.sample(keys, min(n, len(keys))), rng.choices(values, k=min(n, len(keys)))


def _in_use(words: tuple[str, ...], share: float) -> tuple[str, ...]:
    return words[: max(8, int(share * len(words)))]


def _listing(keys: list[str], values: list[str]) -> str:
    return "; ".join([f"{key} {value}" for key, value in zip(keys, values, strict=True)])


def ledger(rng: random.Random, n_pairs: int, n_questions: int, words: float = 1.0) -> Item:
    """`Ledger: Amos smith; Ida station. Q: Ida? A: Ida station.` with a share `words` of each class of words."""
    keys, values = _pairs(rng, n_pairs, words)
    chance = distinct(values)
    pairs = list(zip(keys, values, strict=True))
    asked = _order(rng, pairs, n_questions)
    questions = tuple([Question(f"Q: {k}?", f"A: {k} {v}.", chance) for k, v in asked])
    return Item("ledger", f"Ledger: {_listing(keys, values)}.", questions)


def recall(rng: random.Random, n_pairs: int, n_questions: int, words: float = 1.0) -> Item:
    """`Ledger: ... Q: Ida, Amos? A: Ida station; Amos smith.`: every key asked at once, in another order.

    One recall per three tokens of the answer: the densest text of all.
    """
    keys, values = _pairs(rng, n_pairs, words)
    pairs = list(zip(keys, values, strict=True))
    questions = []
    for _ in range(n_questions):
        pairs = rng.sample(pairs, len(pairs)) if rng.random() < 0.5 else _turned(rng, pairs)
        answer = "; ".join([f"{k} {v}" for k, v in pairs])
        questions.append(Question(f"Q: {', '.join([k for k, _ in pairs])}?", f"A: {answer}.", 0.0))
    return Item("recall", f"Ledger: {_listing(keys, values)}.", tuple(questions))


def recall_document(item: Item) -> str:
    """The ledger written again in other orders, without the questions."""
    return " ".join([item.statement, *("Again" + q.answer.removeprefix("A") for q in item.questions)])


def two_hop(rng: random.Random, n_pairs: int, n_questions: int) -> Item:
    """`Chain: key Ida; Ida mill. Q: key? A: key Ida mill.` with objects held by people who are somewhere."""
    n = max(2, n_pairs)
    names = rng.sample(NAMES, n)
    objects = rng.sample(OBJECTS, n)
    places = rng.choices(CLASSES["places"], k=n)
    links = [f"{a} {b}" for a, b in zip(objects, names, strict=True)]
    links += [f"{a} {b}" for a, b in zip(names, places, strict=True)]
    rng.shuffle(links)
    asked = _order(rng, list(zip(objects, names, places, strict=True)), n_questions)
    chance = distinct(places)
    questions = tuple([Question(f"Q: {a}?", f"A: {a} {b} {c}.", chance) for a, b, c in asked])
    return Item("two_hop", f"Chain: {'; '.join(links)}.", questions)


def _turned(rng: random.Random, things: list) -> list:
    """The same order from another start: nothing in the copy is a surprise."""
    cut = int(rng.random() * len(things))
    return things[cut:] + things[:cut]


def _order(rng: random.Random, things: list, n: int) -> list:
    """n of the things in random order, going round again when there are fewer."""
    order: list = []
    while len(order) < n:
        order += rng.sample(things, len(things))
    return order[:n]
