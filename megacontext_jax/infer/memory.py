"""What a model remembers of one history, and how it catches up with the tree that holds the tokens.

The tree is the truth: a memory has seen its first `tokens` tokens and can be made anew from it at any time. This module
has what memories share and the one that reads every token through the model: a plain cache up to its window, or the
rings of gist attention over a history of any length. `focus_memory` has the flat working context.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.context.store import TreeStore
from megacontext_jax.errors import UserError
from megacontext_jax.infer.gist_model import GistDecoder
from megacontext_jax.infer.model import Model, Region

PIECES = (16, 64, 256)  # tokens that are read at a time, compiled once each

Tick = Callable[[int], None]  # told how many tokens have been read


class Memory(Protocol):
    """What a session asks of its memory."""

    model: Model
    tokens: int  # of the history that have been read
    capacity: int  # most tokens of a history
    cache: NamedTuple
    logits_1V: jax.Array  # for the token after them

    def reset(self) -> None:
        """Forgets everything; the tree can be read again."""

    def warm_up(self) -> None:
        """Compiles what reading needs, before somebody waits for it; of a memory that has read nothing."""

    def catch_up(self, tree: TreeStore) -> Iterator[int]:
        """Reads what the tree has more than has been read, and refocuses, in pieces that take a moment each.

        Yields the tokens read so far. May be left between two pieces and begun anew; it is done when it ends.
        """

    def room(self) -> int:
        """Tokens that decoding may append to the cache before `took` must be told."""

    def took(self, cache, logits_1V, count: int, tree: TreeStore) -> None:
        """Decoding has appended `count` tokens, which the tree has too; may refocus."""

    def regions(self) -> list[Region]: ...

    def statistics(self) -> dict: ...

    def snapshot(self, most: int | None = None) -> dict[str, np.ndarray]:
        """What must be kept beside the tree to go on without reading it all again; nothing if it has more than `most` bytes."""

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Goes back to a snapshot. Raises ValueError if it is none of this memory."""


@partial(jax.jit, static_argnames="decoder", donate_argnames="cache")
def _extend(params, ids_BT, count_B, cache, *, decoder):
    return decoder.extend(params, ids_BT, count_B, cache)


def padded_to(count: int, sizes: tuple[int, ...]) -> int:
    """The smallest of the sizes, which are compiled once each, that holds `count`; the largest if none does."""
    return next((size for size in sizes if size >= count), sizes[-1])


def is_alive(cache) -> bool:
    """Whether a cache is still there: an interrupted step may have consumed it."""
    return not any(x.is_deleted() for x in jax.tree.leaves(cache) if isinstance(x, jax.Array))


class TokenMemory:
    """Every token goes through the model: dense attention up to the window, gist attention without end.

    With gist attention the rings have a fixed size, so that time and memory per token do not grow.
    """

    def __init__(self, model: Model):
        self.model = model
        self._rows = isinstance(model.decoder, GistDecoder)
        self.capacity = model.decoder.window
        self.reset()

    def reset(self) -> None:
        self.cache = self.model.decoder.init_cache(1, self.capacity)
        self.logits_1V = jnp.zeros((1, self.model.decoder.vocab_size), jnp.float32)
        self.tokens = 0

    def warm_up(self) -> None:
        for size in PIECES:
            self._read(np.zeros(1, np.int32), size)
        self.reset()

    def catch_up(self, tree: TreeStore) -> Iterator[int]:
        if not is_alive((self.cache, self.logits_1V)):
            self.reset()
        while self.tokens < len(tree):
            ids_n = tree.tokens(self.tokens, min(len(tree), self.tokens + PIECES[-1]))
            self._read(ids_n, padded_to(len(ids_n), PIECES))
            yield self.tokens

    def _read(self, ids_n: np.ndarray, size: int) -> None:
        ids_1T = np.zeros((1, size), np.int32)
        ids_1T[0, : len(ids_n)] = ids_n
        count_1 = np.array([len(ids_n)], np.int32)
        self.logits_1V, self.cache = _extend(
            self.model.params, ids_1T, count_1, self.cache, decoder=self.model.decoder
        )
        self.tokens += len(ids_n)

    def room(self) -> int:
        return max(1, self.capacity - self.tokens)

    def took(self, cache, logits_1V, count: int, tree: TreeStore) -> None:
        self.cache, self.logits_1V = cache, logits_1V
        self.tokens += count

    def regions(self) -> list[Region]:
        return self.model.decoder.regions(self.tokens) if self.tokens else []

    def statistics(self) -> dict:
        return {"entries": sum(region.entries for region in self.regions()), "recomputed": {}, "kept": 0}

    def snapshot(self, most: int | None = None) -> dict[str, np.ndarray]:
        leaves = jax.tree.leaves((self.cache, self.logits_1V))
        if not self._rows or not is_alive(leaves):
            return {}
        if most is not None and sum(x.nbytes for x in leaves) > most:
            return {}
        leaves = jax.device_get(leaves)
        return {
            f"leaf_{i}": np.asarray(x, np.float32 if x.dtype.kind == "V" else x.dtype)
            for i, x in enumerate(leaves)
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        if not self._rows:
            return
        old, tree = jax.tree.flatten((self.cache, self.logits_1V))
        new = [arrays.get(f"leaf_{i}") for i in range(len(old))]
        if len(arrays) != len(old) or any(
            x is None or x.shape != y.shape for x, y in zip(new, old, strict=True)
        ):
            raise ValueError("rings of another model")
        self.cache, self.logits_1V = jax.tree.unflatten(
            tree, [jnp.asarray(x, y.dtype) for x, y in zip(new, old, strict=True)]
        )
        self.tokens = int(self.cache.length_B[0])


def check_fits(memory: Memory, tokens: int, more: int) -> None:
    """Raises UserError if a history of `tokens` tokens cannot take `more`."""
    if tokens + more < memory.capacity:
        return
    raise UserError(
        f"With this the conversation takes {tokens + more:,} tokens, and the model's window holds {memory.capacity:,} with "
        "the answer; start over (clear), shorten the message, or use a model trained with --mc or --attention gist, "
        "which have no such end."
    )
