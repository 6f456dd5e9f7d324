"""Where a row of the built-in corpus asks for what it has said: a word of the generated world, and again what followed it.

A ledger is pairs (`Ida station; Amos smith`), and its answers repeat them. What a model then says shows what it can
read off its past; under gist attention it matters whether a block's end parts a pair, and whether a block holds two.
"""

from typing import NamedTuple

import numpy as np

from megacontext_jax.data.corpus import words as world
from megacontext_jax.data.tokenizer import Tokenizer

CLASSES = (
    world.NAMES,
    world.OBJECTS,
    world.PLACES,
    world.JOBS,
    world.TOWNS,
    world.ANIMALS,
    world.FOODS,
    world.COLOURS,
)


class Lookups(NamedTuple):
    """One entry per target that a pair before it in the row gives away; arrays [N]."""

    at: np.ndarray  # index of the target
    distance: np.ndarray  # tokens back to the newest such pair
    parted: np.ndarray  # bool: a block ends between its two words
    shared: np.ndarray  # bool: the block of its second word holds another pair's


def world_tokens(tokenizer: Tokenizer) -> set[int]:
    """Tokens that are a word of the generated world."""
    ids = [tokenizer.encode(f" {word}") for one_class in CLASSES for word in one_class]
    return {one[0] for one in ids if len(one) == 1}


def lookups(inputs_T, targets_T, words: set[int], block: int) -> Lookups:
    """Lookups of one row; `targets_T` follow `inputs_T` by one token."""
    inputs, targets = np.asarray(inputs_T).tolist(), np.asarray(targets_T).tolist()
    seconds = [
        t + 1 for t, (a, b) in enumerate(zip(inputs, targets, strict=True)) if a in words and b in words
    ]
    in_block = np.bincount(np.asarray(seconds, int) // block, minlength=len(inputs) // block + 1)
    newest, found = {}, []
    for second in seconds:
        word, value = inputs[second - 1], targets[second - 1]
        if (stood := newest.get(word)) is not None and inputs[stood] == value:
            found.append((second - 1, second - stood, stood % block == 0, in_block[stood // block] > 1))
        if second < len(inputs):
            newest[word] = second
    columns = np.asarray(found, int).reshape(-1, 4).T
    return Lookups(columns[0], columns[1], columns[2].astype(bool), columns[3].astype(bool))
