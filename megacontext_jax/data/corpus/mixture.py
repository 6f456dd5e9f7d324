"""Which kinds of text appear when: the curriculum of the pretraining documents and the chat mixtures."""

import random
from collections.abc import Iterator
from itertools import pairwise

from megacontext_jax.data.corpus import arithmetic, ledgers, python_english, spelling, stories
from megacontext_jax.data.corpus.longdoc import long_document
from megacontext_jax.data.corpus.world import Item, conversation, document, split_of

# Shares of characters at points of the run (0 = first document, 1 = last), linear in between: dense recall
# first, then the kinds that ride on it, then long documents.
CURRICULUM: tuple[tuple[float, dict[str, float]], ...] = (
    (0.0, {"recall": 65, "ledger": 10, "retell": 5, "english": 15, "arithmetic": 2, "spelling": 3}),
    (
        0.25,
        {"recall": 35, "ledger": 20, "retell": 12, "facts": 8, "english": 16, "arithmetic": 4, "spelling": 3}
        | {"two_hop": 2},
    ),
    (
        0.5,
        {"recall": 8, "ledger": 15, "retell": 20, "facts": 24, "english": 18, "arithmetic": 4, "spelling": 3}
        | {"two_hop": 4, "moves": 1, "counting": 1, "passkey": 1, "long": 1},
    ),
    (
        1.0,
        {"recall": 3, "ledger": 10, "retell": 12, "facts": 35, "english": 20, "arithmetic": 4, "spelling": 3}
        | {"two_hop": 4, "moves": 2, "counting": 1, "passkey": 1, "long": 5},
    ),
)

# Shares of conversations.
MID = {"recall": 14, "ledger": 16, "retell": 20, "facts": 30, "two_hop": 6, "arithmetic": 5, "spelling": 3}
MID |= {"moves": 3, "passkey": 1, "counting": 2}
SFT = {"recall": 4, "ledger": 22, "retell": 12, "facts": 40, "two_hop": 7, "arithmetic": 5, "spelling": 3}
SFT |= {"moves": 4, "passkey": 1, "counting": 2}


def shares_at(position: float) -> dict[str, float]:
    """Share of characters of each kind at `position` in [0, 1]; sums to 1."""
    for (p0, a), (p1, b) in pairwise(CURRICULUM):
        if position <= p1:
            t = (position - p0) / (p1 - p0)
            mixed = {k: (1 - t) * a.get(k, 0.0) + t * b.get(k, 0.0) for k in dict.fromkeys((*a, *b))}
            total = sum(mixed.values())
            return {k: v / total for k, v in mixed.items()}
    raise ValueError(f"a position in the curriculum lies in [0, 1], got {position}")


def _between(rng: random.Random, low: float, high: float) -> int:
    """A whole number in [low, high]."""
    return int(low + rng.random() * (high - low + 1))


def _variety(level: float) -> float:
    """Share of varied sentences: none at first, all of them from 60 % of the curriculum on."""
    return min(1.0, level / 0.6)


def make_item(
    rng: random.Random, kind: str, split: str, level: float, row_tokens: int = 256, turn_tokens: int = 0
) -> Item:
    """One item of a kind that belongs to `split`; `level` in [0, 1] is how far the curriculum has come.

    Sizes are chosen so that statement and questions fill `row_tokens` tokens at most, where every question
    costs `turn_tokens` more than its own text (the marks of a chat turn).
    """
    while True:
        item = _draw(rng, kind, split, level, row_tokens, turn_tokens)
        if not item.statement or split_of(item.statement) == split:
            return item


def _draw(rng: random.Random, kind: str, split: str, level: float, row: int, turn: int) -> Item:
    budget = _between(rng, 0.35 * row, (0.45 + 0.5 * level) * row)
    if kind == "ledger":
        n = _between(rng, 3, 8 + 16 * level)
        return ledgers.ledger(rng, n, max(3, (budget - 3 * n) // (9 + turn)))
    if kind == "recall":
        n = _between(rng, 3, 8 + 12 * level)
        return ledgers.recall(rng, n, max(1, (budget - 3 * n) // (5 * n + 4 + turn)))
    if kind == "facts":
        n = _between(rng, 3, 4 + 4 * level)
        questions = max(3, (budget - 9 * n) // (13 + turn))
        return stories.facts(rng, n, questions, variety=_variety(level), n_relations=_between(rng, 1, 2))
    if kind == "retell":
        n = _between(rng, 3, 5 + 5 * level)
        questions = max(1, (budget - 9 * n) // (8 * n + 3 + turn))
        return stories.retell(rng, n, questions, variety=_variety(level), n_relations=_between(rng, 1, 2))
    if kind == "two_hop":
        n = _between(rng, 2, 3 + 5 * level)
        return ledgers.two_hop(rng, n, max(2, (budget - 6 * n) // (10 + turn)))
    if kind == "arithmetic":
        return arithmetic.sums(rng, budget // (12 + turn), split)
    if kind == "spelling":
        return spelling.spelling(rng, max(1, budget // (26 + turn)), split)
    if kind == "counting":
        return arithmetic.counting(rng, _between(rng, 3, 9), 3)
    if kind == "moves":
        n = _between(rng, 2, 4)
        return stories.moves(rng, n, _between(rng, 1, 4), max(2, budget // (26 + turn)))
    if kind == "passkey":
        return stories.passkey(rng, _between(rng, 0, 5 + 10 * level), _between(rng, 1, 5 + 10 * level))
    raise ValueError(f"unknown kind of text: {kind}")


def make_document(
    rng: random.Random, kind: str, split: str, level: float, english: "English", max_tokens: int
) -> str:
    """One pretraining document of a kind."""
    if kind == "english":
        return english.next()
    if kind == "long":
        return long_document(rng, split, level, english, max_tokens, make_item)
    if kind == "recall":  # without the questions the same row holds more copies
        return ledgers.recall_document(make_item(rng, kind, split, level, row_tokens=400))
    if kind == "retell":
        return stories.retell_document(make_item(rng, kind, split, level, row_tokens=320))
    return document(make_item(rng, kind, split, level))


class English:
    """Real passages in a shuffled order that starts at a given offset and goes round."""

    def __init__(self, split: str, seed: int, offset: int = 0):
        train, held_out = python_english.passages()
        self._passages = list(held_out if split == "val" else train)
        random.Random(f"english/{seed}").shuffle(self._passages)
        self._at = offset

    def __len__(self) -> int:
        return len(self._passages)

    def next(self) -> str:
        text = self._passages[self._at % len(self._passages)]
        self._at += 1
        return text


def documents(
    rng: random.Random, split: str, start: float, stop: float, chars: int, english: English, max_tokens: int
) -> Iterator[tuple[str, str]]:
    """(kind, text) of about `chars` characters that run through the curriculum from `start` to `stop`.

    Kinds take turns by credit: every document earns each kind its share of its length, and the kind with the
    most credit comes next. Shares of characters are then met closely, whatever the lengths of the kinds.
    """
    credit: dict[str, float] = {}
    done = 0
    while done < chars:
        position = start + (stop - start) * done / chars
        for kind in (shares := shares_at(position)):
            credit.setdefault(kind, rng.random() * 500 * shares[kind])
        kind = max(shares, key=lambda k: credit[k] if shares[k] > 0 else -1e9)
        text = make_document(rng, kind, split, position, english, max_tokens)
        for other, share in shares.items():
            credit[other] += share * len(text)
        credit[kind] -= len(text)
        done += len(text)
        yield kind, text


def chats(
    rng: random.Random, split: str, shares: dict[str, float], n: int
) -> Iterator[tuple[str, list[dict]]]:
    """n conversations (kind, messages) in random order of kinds."""
    kinds = list(shares)
    for kind in rng.choices(kinds, weights=[shares[k] for k in kinds], k=n):
        yield (
            kind,
            conversation(make_item(rng, kind, split, rng.random() ** 0.5, row_tokens=250, turn_tokens=4)),
        )
