"""Generated tasks: something is stated early, much else follows, and the last tokens ask for it.

A batch has `inputs` and `targets` [B, T] (-1 where nothing is asked; answers never stand in the inputs) and
`facts` [B, T], the tokens that an answer needs. Every sequence asks in many different ways at once: a model that
always meets the same question learns no retrieval.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

KEYS, VALUES = 32, 32  # of recall; value tokens follow the key tokens


@dataclass(frozen=True)
class Task:
    """One row of the table. Tasks of one `family` are tested on the same models, trained on `train_tokens`."""

    name: str
    family: str
    tokens: int
    train_tokens: int
    asked: int  # tokens at the end that ask: always raw
    block: int
    levels: int
    expand: int  # blocks that the budget allows to be raw beside the gists
    vocab: int
    chance: float
    plateau: float  # with the right block, but what stood beside what forgotten
    make: Callable[[np.random.Generator, int, int, bool], dict]  # rng, rows, tokens, focused -> batch
    about: str


def recall(pairs: int, asked: int, block: int) -> Callable:
    """Key-value pairs, then keys. `focused`: all keys asked are of one block."""

    def make(rng: np.random.Generator, rows: int, tokens: int, focused: bool) -> dict:
        del tokens
        per_block = block // 2
        keys = np.argsort(rng.random((rows, KEYS)), axis=1)[:, :pairs]
        values = rng.integers(0, VALUES, (rows, pairs))
        head = np.stack([keys, KEYS + values], axis=-1).reshape(rows, 2 * pairs)
        start = rng.integers(0, pairs // per_block, (rows, 1)) * per_block
        near = start + rng.integers(0, per_block, (rows, asked))
        anywhere = rng.integers(0, pairs, (rows, asked))
        which = np.where(focused | (rng.random((rows, 1)) < 0.5), near, anywhere)
        questions = np.take_along_axis(keys, which, axis=1)
        answers = KEYS + np.take_along_axis(values, which, axis=1)
        used = np.zeros((rows, pairs), bool)
        np.put_along_axis(used, which, True, axis=1)
        return _batch(head, questions, answers, np.repeat(used, 2, axis=1))

    return make


HOP_NAMES = 24


def two_hop(chains: int, asked: int, block: int) -> Callable:
    """a points to b, b to c, the links in any order; asked for a, the answer is c."""

    def make(rng: np.random.Generator, rows: int, tokens: int, focused: bool) -> dict:
        del tokens, focused
        names = np.argsort(rng.random((rows, HOP_NAMES)), axis=1)
        a, b = names[:, :chains], names[:, chains : 2 * chains]
        c = HOP_NAMES + rng.integers(0, HOP_NAMES, (rows, chains))
        links = np.concatenate([np.stack([a, b], -1), np.stack([b, c], -1)], axis=1)
        order = np.argsort(rng.random((rows, 2 * chains)), axis=1)
        head = np.take_along_axis(links, order[..., None], axis=1).reshape(rows, 4 * chains)
        first = rng.integers(0, chains, (rows, 1))
        which = np.where(np.arange(asked) % 2 == 0, first, rng.integers(0, chains, (rows, asked)))
        used = np.zeros((rows, 2 * chains), bool)
        np.put_along_axis(used, first, True, axis=1)
        np.put_along_axis(used, first + chains, True, axis=1)
        used = np.take_along_axis(used, order, axis=1)
        questions = np.take_along_axis(a, which, axis=1)
        answers = np.take_along_axis(c, which, axis=1)
        return _batch(head, questions, answers, np.repeat(used, 2, axis=1))

    return make


MARKS, DIGITS, FILLER = 8, 32, 24


def passkey(asked: int, keys: int = 4) -> Callable:
    """A few marked numbers in a long stretch of filler; the marks are asked.

    Mark tokens come first in the vocabulary, then the numbers, then the filler.
    """

    def make(rng: np.random.Generator, rows: int, tokens: int, focused: bool) -> dict:
        length = tokens - asked
        head = MARKS + DIGITS + rng.integers(0, FILLER, (rows, length))
        marks = np.argsort(rng.random((rows, MARKS)), axis=1)[:, :keys]
        numbers = MARKS + rng.integers(0, DIGITS, (rows, keys))
        places = 2 * np.argsort(rng.random((rows, length // 2)), axis=1)[:, :keys]
        np.put_along_axis(head, places, marks, axis=1)
        np.put_along_axis(head, places + 1, numbers, axis=1)
        one = rng.integers(0, keys, (rows, 1))
        which = np.where(focused, one, rng.integers(0, keys, (rows, asked)))
        which = np.broadcast_to(which, (rows, asked))
        facts = np.zeros((rows, length), bool)
        for offset in (0, 1):
            np.put_along_axis(facts, np.take_along_axis(places, which, axis=1) + offset, True, axis=1)
        questions = np.take_along_axis(marks, which, axis=1)
        return _batch(head, questions, np.take_along_axis(numbers, which, axis=1), facts)

    return make


def _batch(head, questions, answers, facts) -> dict:
    rows, asked = questions.shape
    return {
        "inputs": np.concatenate([head, questions], axis=1).astype(np.int32),
        "targets": np.concatenate([np.full(head.shape, -1), answers], axis=1).astype(np.int32),
        "facts": np.concatenate([facts, np.zeros((rows, asked), bool)], axis=1),
    }


def _recall_task(ratio: int, pairs: int, asked: int = 8) -> Task:
    return Task(
        name=f"mqar_{ratio}x",
        family=f"mqar_{ratio}x",
        tokens=2 * pairs + asked,
        train_tokens=2 * pairs + asked,
        asked=asked,
        block=ratio,
        levels=1,
        expand=1,
        vocab=KEYS + VALUES,
        chance=1 / VALUES,
        plateau=2 / ratio,
        make=recall(pairs, asked, ratio),
        about=f"associative recall, {pairs} pairs, {ratio} tokens per gist",
    )


def _passkey_task(times: int, base: int = 128, asked: int = 8, block: int = 8) -> Task:
    return Task(
        name=f"passkey_{times}x",
        family="passkey",
        tokens=times * base,
        train_tokens=base,
        asked=asked,
        block=block,
        levels=2 if times == 1 else 3,
        expand=2,
        vocab=MARKS + DIGITS + FILLER,
        chance=1 / DIGITS,
        plateau=1 / 4,
        make=passkey(asked),
        about=f"marked numbers in filler, {times} x the training length of {base} tokens",
    )


TASKS = {
    task.name: task
    for task in (
        _recall_task(4, 8),
        _recall_task(8, 16),
        _recall_task(16, 24),
        _passkey_task(1),
        _passkey_task(4),
        _passkey_task(16),
        Task(
            name="two_hop",
            family="two_hop",
            tokens=32,
            train_tokens=32,
            asked=8,
            block=4,
            levels=1,
            expand=2,
            vocab=64,
            chance=1 / HOP_NAMES,
            plateau=1 / 2,
            make=two_hop(6, 8, 4),
            about="a to b to c, 6 chains, 4 tokens per gist",
        ),
    )
}
