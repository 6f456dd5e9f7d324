"""A tree of gists that grows by appending: what its stores share, and the store in RAM.

A store holds one history. Level 0 are token ids, a node of level l >= 1 is the gist [D] of K nodes below it, so
that node i covers the tokens [i K^l, (i + 1) K^l). Only full blocks have a node, and a block is encoded once,
when it completes: an append costs amortised O(1) per token.

The store knows nothing of networks. `embed(ids_n [n]) -> [n, D]` gives the rows of tokens and
`encode(blocks_NKD) -> gists_ND` turns blocks into gists, NumPy or JAX arrays in and out; blocks of gists are
float32, blocks of tokens what `embed` returned. Both see a number of blocks that is a power of two (the last
block is repeated, the surplus dropped), so that a jitted function compiles a handful of times. Appends of any
size make the same nodes, bit for bit if `encode` computes a block alike in every batch.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np

from megacontext_jax.errors import UserError

DTYPES = {"uint32": 0, "float16": 1, "bfloat16": 2, "float32": 3}  # the codes of the file format
REBUILD_TOKENS = 1 << 16  # how many tokens a rebuild embeds and encodes at a time
COMPLETE_TOKENS = 1 << 12  # the same for gists that were put off
_U16 = (1 << 16) - 1
_U32 = (1 << 32) - 1

Encode = Callable  # blocks_NKD -> gists_ND
Embed = Callable  # ids_n -> rows_nD


@dataclass(frozen=True)
class TreeSpec:
    """What a tree is. `gistnet` identifies the network that makes its gists; `chunk` = entries per checksum.

    Raises UserError for values that the file format cannot hold.
    """

    block: int
    width: int
    gistnet: str
    dtype: str = "float32"
    model_name: str = ""
    max_levels: int = 4
    chunk: int = 4096

    def __post_init__(self):
        with contextlib.suppress(TypeError):  # told below
            object.__setattr__(self, "dtype", np.dtype(self.dtype).name)
        if self.dtype not in DTYPES or self.dtype == "uint32":
            raise UserError(f"Gists cannot be stored as {self.dtype!r}; use float32, bfloat16 or float16.")
        # without levels the tree keeps tokens alone
        for name, low in {"block": 2, "width": 1, "max_levels": 0, "chunk": 1}.items():
            value = getattr(self, name)
            if not low <= value <= _U16:
                raise UserError(f"A tree cannot have {name} {value}; give a number from {low} to {_U16}.")
        if len(self.model_name.encode()) > 32:
            raise UserError(f"The model name {self.model_name!r} is longer than 32 bytes; shorten it.")

    def row(self, level: int) -> tuple[np.dtype, tuple[int, ...]]:
        """dtype and shape of one entry of a level."""
        if level == 0:
            return np.dtype("<u4"), ()
        return np.dtype(self.dtype), (self.width,)


class Rows(Protocol):
    """The entries of one level: an array that grows at its end."""

    def __len__(self) -> int: ...

    def append(self, rows) -> None: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop), a read-only view."""

    def load(self, start: int, stop: int) -> np.ndarray:
        """The same for a caller who will not keep them."""

    def cut(self, count: int) -> None:
        """Forget the entries from `count` on."""


class RamRows:
    """Entries in an array whose capacity doubles. Views handed out stay valid when it moves."""

    def __init__(self, dtype: np.dtype, shape: tuple[int, ...]):
        self._array = np.empty((64, *shape), dtype)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, rows) -> None:
        count = self._count + len(rows)
        if count > len(self._array):
            capacity = 1 << math.ceil(math.log2(count))
            grown = np.empty((capacity, *self._array.shape[1:]), self._array.dtype)
            grown[: self._count] = self._array[: self._count]
            self._array = grown
        self._array[self._count : count] = rows
        self._count = count

    def read(self, start: int, stop: int) -> np.ndarray:
        view = self._array[start:stop]
        view.flags.writeable = False
        return view

    load = read

    def cut(self, count: int) -> None:
        self._count = min(self._count, count)


class TreeStore:
    """The interface of both stores. One writer at a time, one thread.

    An append that raises, for whatever reason, leaves the store as it was before.
    """

    def __init__(self, spec: TreeSpec, rows: list[Rows], encode: Encode, embed: Embed):
        self.spec = spec
        self._rows = rows  # by level
        self._encode, self._embed = encode, embed
        self._unusable = ""

    def __enter__(self) -> "TreeStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __len__(self) -> int:
        """Tokens in the history."""
        return len(self._rows[0])

    @property
    def levels(self) -> int:
        """The highest level that has a node, 0 if there are only tokens."""
        return sum(len(rows) > 0 for rows in self._rows[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the entries."""
        sizes = [
            np.dtype(d).itemsize * math.prod(shape) for d, shape in map(self.spec.row, range(len(self._rows)))
        ]
        return sum(len(rows) * size for rows, size in zip(self._rows, sizes, strict=True))

    def count(self, level: int) -> int:
        """Entries of a level; 0 for a level that the tree does not keep."""
        return len(self._rows[level]) if 0 <= level < len(self._rows) else 0

    def tokens(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Token ids [start, stop) as uint32, a read-only view. IndexError outside the history."""
        return self._read(0, start, stop)

    def gists(self, level: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Gists [stop - start, D] of a level >= 1, a read-only view. IndexError outside the level."""
        if level < 1:
            raise IndexError(f"level {level} has no gists")
        return self._read(level, start, stop)

    def append(self, tokens, *, sync: bool = False, gists: bool = True) -> None:
        """Add token ids (one, or [n] of any integer type) and the gists of every block that completes.

        Calls `encode` once per level that gains nodes; without `gists` they are left to `complete`, or to the next
        append. With `sync`, see `sync`. Raises UserError for what is no token id and, on disk, when the disk takes no
        more.
        """
        ids_n = token_ids(tokens)
        self._check_usable()
        before = [len(rows) for rows in self._rows]
        try:
            self._rows[0].append(ids_n)
            if gists:
                self._fill()
            if sync:
                self.sync()
        except BaseException:
            self._unusable = "could not be put right after a failed append"
            for rows, count in zip(self._rows, before, strict=True):
                rows.cut(count)
            self._unusable = ""
            raise

    def complete(self) -> Iterator[None]:
        """Encode the blocks that appends without `gists` have left, in pieces that take a moment each."""
        self._check_usable()
        return self._filling(max(1, COMPLETE_TOKENS // self.spec.block))

    def refresh(self, *, gistnet: str, encode: Encode, embed: Embed) -> None:
        """Rebuild all gists from the tokens with another GistNet. If it raises, the tree is as before."""
        raise NotImplementedError

    def sync(self) -> None:
        """Force everything appended to the disk, so that it outlives a power cut (RAM: nothing to do)."""

    def verify(self) -> None:
        """Check all that is stored; UserError names what is damaged (RAM: nothing to do)."""

    def close(self) -> None:
        """Let go of files and lock; writes nothing."""

    def _check_usable(self) -> None:
        if self._unusable:
            raise UserError(f"The tree {self._unusable}; open it again.")

    def _read(self, level: int, start: int, stop: int | None) -> np.ndarray:
        count = self.count(level)
        stop = count if stop is None else stop
        if level >= len(self._rows) or not 0 <= start <= stop <= count:
            raise IndexError(f"level {level} has {count} entries, not [{start}, {stop})")
        return self._rows[level].read(start, stop)

    def _fill(self, limit: int | None = None) -> None:
        """Encode every block that is complete and has no node, at most `limit` blocks per call of `encode`."""
        for _ in self._filling(limit):
            pass

    def _filling(self, limit: int | None) -> Iterator[None]:
        K = self.spec.block
        for level in range(1, len(self._rows)):
            below, rows = self._rows[level - 1], self._rows[level]
            while missing := len(below) // K - len(rows):
                blocks = missing if limit is None else min(missing, limit)
                first = len(rows) * K
                rows.append(self._gists_of(level, below.load(first, first + blocks * K)))
                yield

    def _gists_of(self, level: int, children):
        """Gists [N, D] of the nodes of `level` over `children` ([N K] ids or [N K, D] gists)."""
        K, D = self.spec.block, self.spec.width
        blocks = len(children) // K
        padded = pad_blocks(children, K)
        rows_nD = self._embed(padded) if level == 1 else padded.astype(np.float32)
        if rows_nD.shape != (len(padded), D):
            raise ValueError(f"embed gave {rows_nD.shape} for {len(padded)} tokens, not {(len(padded), D)}")
        gists_ND = self._encode(rows_nD.reshape(-1, K, D))
        if gists_ND.shape != (len(padded) // K, D):
            raise ValueError(f"encode gave {gists_ND.shape}, not {(len(padded) // K, D)}")
        return np.asarray(gists_ND)[:blocks].astype(self.spec.row(level)[0])


class RamTree(TreeStore):
    """A tree in memory."""

    def __init__(self, spec: TreeSpec, encode: Encode, embed: Embed):
        rows = [RamRows(*spec.row(level)) for level in range(spec.max_levels + 1)]
        super().__init__(spec, rows, encode, embed)

    def refresh(self, *, gistnet: str, encode: Encode, embed: Embed) -> None:
        new = RamTree(replace(self.spec, gistnet=gistnet), encode, embed)
        copy_tokens(self._rows[0], new)
        self.__dict__.update(new.__dict__)


def copy_tokens(tokens: Rows, tree: TreeStore) -> None:
    """Append a whole history to another tree, a piece at a time so that memory stays bounded."""
    for start in range(0, len(tokens), REBUILD_TOKENS):
        tree.append(tokens.read(start, min(start + REBUILD_TOKENS, len(tokens))))


def pad_blocks(children, block: int):
    """`children` with the last block repeated until the number of blocks is a power of two."""
    blocks = len(children) // block
    surplus = (1 << (blocks - 1).bit_length()) - blocks
    if not surplus:
        return children
    return np.concatenate([children, *[children[-block:]] * surplus])


def token_ids(tokens) -> np.ndarray:
    """Token ids as uint32 [n]; UserError names the first that is none."""
    ids = np.atleast_1d(np.asarray(tokens))
    if ids.size == 0:
        return np.empty(0, np.uint32)
    if ids.ndim != 1:
        raise UserError(f"A tree holds one history, not an array {ids.shape}; append one sequence [n].")
    bad = [0] if ids.dtype.kind not in "iu" else np.flatnonzero((ids < 0) | (ids > _U32))
    if len(bad):
        raise UserError(
            f"Token {bad[0]} of this append is {ids[bad[0]]}, which is no token id; ids are whole numbers from 0 "
            f"to {_U32}."
        )
    return ids.astype(np.uint32)
