"""Which kinds of text appear when: the curriculum of the pretraining documents and the chat mixtures."""

import random
from collections.abc import Iterator
from itertools import pairwise

from megacontext_jax.data.corpus import arithmetic, ledgers, python_english, spelling, stories
from megacontext_jax.data.corpus.longdoc import long_document
from megacontext_jax.data.corpus.world import Item, conversation, document, split_of

# A plan: shares at points of a stage (0 = its beginning, 1 = its end), linear in between. Of characters for the
# documents: dense recall first, then the kinds that ride on it, then long documents.
Plan = tuple[tuple[float, dict[str, float]], ...]
PRETRAIN: Plan = (
    (0.0, {"recall": 60, "ledger": 10, "extract": 10, "english": 15, "arithmetic": 2, "spelling": 3}),
    (
        0.4,
        {"recall": 33, "ledger": 18, "extract": 16, "retell": 3, "facts": 6, "english": 16, "arithmetic": 4}
        | {"spelling": 3, "two_hop": 2},
    ),
    (
        0.6,
        {"recall": 10, "ledger": 14, "extract": 18, "retell": 6, "facts": 21, "english": 18, "arithmetic": 4}
        | {"spelling": 3, "two_hop": 3, "moves": 1, "counting": 1, "passkey": 1, "long": 1},
    ),
    (
        1.0,
        {"recall": 5, "ledger": 10, "extract": 12, "retell": 8, "facts": 30, "english": 20, "arithmetic": 4}
        | {"spelling": 3, "two_hop": 3, "moves": 2, "counting": 1, "passkey": 1, "long": 5},
    ),
)

# Shares of conversations. Trained on the answers alone, "recall" and "extract" are nearly pure lookup.
MID: Plan = (
    (0.0, {"recall": 40, "ledger": 22, "extract": 22, "facts": 10, "arithmetic": 3, "spelling": 3}),
    (
        0.3,
        {"recall": 18, "ledger": 14, "extract": 32, "retell": 4, "facts": 20, "two_hop": 4, "arithmetic": 4}
        | {"spelling": 2, "moves": 1, "passkey": 0.5, "counting": 0.5},
    ),
    (
        1.0,
        {"recall": 4, "ledger": 11, "extract": 25, "retell": 10, "facts": 36, "two_hop": 4, "arithmetic": 4}
        | {"spelling": 2, "moves": 2, "passkey": 1, "counting": 1},
    ),
)
SFT: Plan = (
    (
        0.0,
        {"recall": 3, "ledger": 14, "extract": 10, "retell": 10, "facts": 46, "two_hop": 5, "arithmetic": 4}
        | {"spelling": 2, "moves": 4, "passkey": 1, "counting": 1},
    ),
)
CHATS = {"mid": MID, "sft": SFT}
KINDS = tuple(kind for kind in SFT[0][1])


def shares_at(plan: Plan, position: float) -> dict[str, float]:
    """Share of each kind at `position` in [0, 1], linear between the points of the plan; sums to 1."""
    if not 0 <= position <= 1:
        raise ValueError(f"a position in the curriculum lies in [0, 1], got {position}")
    (p0, a), (p1, b) = next((x for x in pairwise(plan) if position <= x[1][0]), (plan[-1], plan[-1]))
    t = (position - p0) / (p1 - p0) if p1 > p0 else 0.0
    mixed = {k: (1 - t) * a.get(k, 0.0) + t * b.get(k, 0.0) for k in dict.fromkeys((*a, *b))}
    total = sum(mixed.values())
    return {k: v / total for k, v in mixed.items()}


def _between(rng: random.Random, low: float, high: float) -> int:
    """A whole number in [low, high]."""
    return int(low + rng.random() * (high - low + 1))


def _variety(level: float) -> float:
    """Share of varied sentences: none at first, all of them from 60 % of the curriculum on."""
    return min(1.0, level / 0.6)


def make_item(
    rng: random.Random,
    kind: str,
    split: str,
    level: float,
    row_tokens: int = 256,
    turn_tokens: int = 0,
    words: float = 1.0,
) -> Item:
    """One item of a kind that belongs to `split`; `level` in [0, 1] is how far the curriculum has come.

    Sizes are chosen so that statement and questions fill `row_tokens` tokens at most, where every question
    costs `turn_tokens` more than its own text (the marks of a chat turn). Ledgers use a share `words` of the words.
    """
    while True:
        item = _draw(rng, kind, split, level, row_tokens, turn_tokens, words)
        if not item.statement or split_of(item.statement) == split:
            return item


def _draw(rng: random.Random, kind: str, split: str, level: float, row: int, turn: int, words: float) -> Item:
    budget = _between(rng, 0.35 * row, (0.45 + 0.5 * level) * row)
    if kind == "ledger":
        n = _between(rng, 3, 8 + 16 * level)
        return ledgers.ledger(rng, n, max(3, (budget - 3 * n) // (9 + turn)), words)
    if kind == "recall":
        n = _between(rng, 3, 8 + 12 * level)
        return ledgers.recall(rng, n, max(1, (budget - 3 * n) // (5 * n + 4 + turn)), words)
    if kind == "facts":
        n = _between(rng, 3, 4 + 4 * level)
        questions = max(3, (budget - 9 * n) // (13 + turn))
        return stories.facts(rng, n, questions, variety=_variety(level), n_relations=_between(rng, 1, 2))
    if kind == "extract":
        n = _between(rng, 3, 5 + 5 * level)
        questions = max(1, (budget - 9 * n) // (5 * n + 4 + turn))
        return stories.extract(rng, n, questions, variety=_variety(level), n_relations=_between(rng, 1, 2))
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
    """One pretraining document of a kind.

    In training the ledgers begin with eight words of a class, and the others join until the middle of the curriculum: lookup
    forms on few words, where it is easy, and new ones find it there. Of all words at once it forms late or never.
    """
    words = min(1.0, level / 0.5) if split == "train" else 1.0
    if kind == "english":
        return english.next()
    if kind == "long":
        return long_document(rng, split, level, english, max_tokens, make_item)
    if kind == "recall":  # without the questions the same row holds more copies
        return ledgers.recall_document(make_item(rng, kind, split, level, row_tokens=400, words=words))
    if kind == "extract":
        return stories.extract_document(make_item(rng, kind, split, level, row_tokens=320))
    if kind == "retell":
        return stories.retell_document(make_item(rng, kind, split, level, row_tokens=320))
    return document(make_item(rng, kind, split, level, words=words))


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
        for kind in (shares := shares_at(PRETRAIN, position)):
            credit.setdefault(kind, rng.random() * 500 * shares[kind])
        kind = max(shares, key=lambda k: credit[k] if shares[k] > 0 else -1e9)
        text = make_document(rng, kind, split, position, english, max_tokens)
        for other, share in shares.items():
            credit[other] += share * len(text)
        credit[kind] -= len(text)
        done += len(text)
        yield kind, text


def chats(rng: random.Random, split: str, stage: str, n: int) -> Iterator[tuple[str, list[dict]]]:
    """n conversations (kind, messages) of a stage, "mid" or "sft", along its plan.

    Every size and variety up to the level of the place occurs: mid-training rises to the full level by its
    middle, SFT is at it throughout.
    """
    for i in range(n):
        position = i / n
        shares = shares_at(CHATS[stage], position)
        (kind,) = rng.choices(list(shares), weights=list(shares.values()))
        level = rng.random() ** 0.5 * (min(1.0, 0.3 + 1.4 * position) if stage == "mid" else 1.0)
        yield kind, conversation(make_item(rng, kind, split, level, row_tokens=250, turn_tokens=4))
