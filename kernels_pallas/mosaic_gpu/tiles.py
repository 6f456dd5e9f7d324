"""Which tile of queries meets which tile of keys: tables of small integers, made from the `GistSpec` with numpy.

Queries of all levels lie in one stream ordered by the end of their spans, so that a tile of them looks back over one
stretch of time. Keys lie level by level, each level in whole tiles, so that tiles are full. What a query row sees of a
level is one range of rows; a tile of keys is visited if some row of the query tile sees some of it, and needs no mask
if every row sees all of it. Documents packed into one sequence only raise the starts of those ranges.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from kernels_pallas.spec import GistSpec

LEVEL_SHIFT = 24  # a key tile is named by level << 24 | its number inside the level
NOBODY = 2**30  # start of an empty range


@dataclass(frozen=True)
class Stream:
    """The rows of all levels by the end of their spans, padded to a multiple of `unit` rows."""

    spec: GistSpec
    tokens: int
    unit: int

    @property
    def rows(self) -> tuple[int, ...]:
        return self.spec.rows(self.tokens)

    @property
    def length(self) -> int:
        return -(-sum(self.rows) // self.unit) * self.unit

    def order(self) -> np.ndarray:
        """[length]: place of every row of the stream in the levels laid end to end; their sum for padding."""
        level = np.repeat(np.arange(len(self.rows)), self.rows)
        index = np.concatenate([np.arange(n) for n in self.rows])
        end = (index + 1) * self.spec.block**level
        order = np.lexsort((level, end))
        return np.pad(order, (0, self.length - len(order)), constant_values=len(order)).astype(np.int32)

    def places(self) -> list[np.ndarray]:
        """For every level, where its rows lie in the stream."""
        back = np.argsort(self.order()[: sum(self.rows)]).astype(np.int32)
        return np.split(back, np.cumsum(self.rows)[:-1])

    def ranges(self) -> np.ndarray:
        """[levels, 2, length]: first and stop of the rows of each level that a row of the stream sees."""
        parts = [self.spec.key_ranges(level, np.arange(n)) for level, n in enumerate(self.rows)]
        ends = np.array(
            [[np.concatenate([part[m][i] for part in parts]) for i in (0, 1)] for m in self._levels()]
        )
        return np.pad(ends, ((0, 0), (0, 0), (0, 1)))[:, :, self.order()].astype(np.int32)

    def last_tokens(self) -> np.ndarray:
        """[length]: last token of each row's span, whose document is the row's; 0 for padding."""
        last = [(np.arange(n) + 1) * self.spec.block**level - 1 for level, n in enumerate(self.rows)]
        return np.concatenate([*last, [0]])[self.order()].astype(np.int32)

    def _levels(self):
        return range(len(self.rows))


@dataclass(frozen=True)
class Keys:
    """The rows of every level in whole tiles; levels above the tokens lie end to end in one array."""

    rows: tuple[int, ...]
    tile: int

    def tiles(self, level: int) -> int:
        return -(-self.rows[level] // self.tile)

    @property
    def starts(self) -> tuple[int, ...]:
        """Row at which each level starts in its array: tokens in one, all other levels in another."""
        above = np.cumsum([self.tiles(m) * self.tile for m in range(1, len(self.rows))])
        return (0, 0, *above[:-1].tolist())


class Bounds(NamedTuple):
    """Over the rows of each query tile, [..., tiles, levels]: what some row sees, and what every row sees."""

    first_any: object
    stop_any: object
    first_all: object
    stop_all: object


def bounds(ranges, tile: int, xp=np) -> Bounds:
    """`ranges` is [..., levels, 2, rows]; the rows of a tile follow each other."""
    tiles = ranges.reshape(*ranges.shape[:-1], -1, tile)
    first, stop = (xp.moveaxis(tiles[..., i, :, :], -3, -2) for i in (0, 1))  # [..., tiles, levels, rows]
    some = first < stop
    return Bounds(
        xp.where(some, first, NOBODY).min(-1), xp.where(some, stop, 0).max(-1), first.max(-1), stop.min(-1)
    )


class Visits(NamedTuple):
    """For every work item a list of visits: those without a mask first, then those with one, then padding."""

    visit: object  # [..., items, most]: key tiles (query-major), query tiles (key-major)
    full: object  # [..., items]: how many need no mask
    count: object  # [..., items]: how many there are


def by_kind(visit, query_tile, level, start, limits: Bounds, key_tile: int, xp=np) -> Visits:
    """Orders lists by what `limits` says about each pair. The first four are [items, most]; query tile -1 pads."""
    pick = [x[..., xp.maximum(query_tile, 0), level] for x in limits]
    stop = start + key_tile
    some = (pick[0] < stop) & (pick[1] > start) & (query_tile >= 0)
    every = some & (pick[2] <= start) & (pick[3] >= stop)
    kind = xp.where(every, 0, xp.where(some, 1, 2))
    if xp is np:
        order = np.argsort(kind, axis=-1, kind="stable")
    else:
        order = xp.argsort(kind, axis=-1, stable=True)
    listed = xp.take_along_axis(xp.broadcast_to(visit, kind.shape), order, axis=-1)
    return Visits(listed.astype(np.int32), every.sum(-1).astype(np.int32), some.sum(-1).astype(np.int32))


class Pairs(NamedTuple):
    """All pairs of tiles that may meet, one entry each."""

    query: np.ndarray
    level: np.ndarray
    key: np.ndarray  # tile inside the level


def pairs(stream: Stream, query_tile: int, key_tile: int) -> Pairs:
    limits = bounds(stream.ranges(), query_tile)
    first = np.minimum(limits.first_any, limits.stop_any) // key_tile
    count = np.maximum(0, -(-limits.stop_any // key_tile) - first)  # [tiles, levels]
    query, level = (np.repeat(x.ravel(), count.ravel()) for x in np.indices(count.shape))
    inside = np.arange(len(query)) - np.repeat(np.cumsum(count) - count.ravel(), count.ravel())
    return Pairs(query, level, np.repeat(first.ravel(), count.ravel()) + inside)


def table(item: np.ndarray, values: tuple[np.ndarray, ...], items: int) -> list[np.ndarray]:
    """[items, most] per array of values, which are sorted by item; -1 pads."""
    count = np.bincount(item, minlength=items)
    most = max(1, int(count.max(initial=0)))
    place = np.arange(len(item)) - np.repeat(np.cumsum(count) - count, count)
    out = []
    for x in values:
        rows = np.full((items, most), -1, np.int32)
        rows[item, place] = x
        out.append(rows)
    return out


class QueryLists(NamedTuple):
    """Query-major: which key tiles each query tile visits; arrays [query tiles, most]."""

    visit: np.ndarray
    query: np.ndarray
    level: np.ndarray
    start: np.ndarray

    def visits(self, limits: Bounds, key_tile: int, xp=np) -> Visits:
        return by_kind(self.visit, self.query, self.level, self.start, limits, key_tile, xp)


@lru_cache(maxsize=64)
def query_lists(stream: Stream, query_tile: int, key_tile: int) -> QueryLists:
    found = pairs(stream, query_tile, key_tile)
    values = (found.level << LEVEL_SHIFT | found.key, found.query, found.level, found.key * key_tile)
    visit, query, level, start = table(found.query, values, stream.length // query_tile)
    return QueryLists(np.maximum(visit, 0), query, np.maximum(level, 0), start)


class KeyLists(NamedTuple):
    """Key-major: the query tiles that each item visits. An item is a key tile, or a part of one that is long."""

    name: np.ndarray  # [items, 3]: first row in its array, level, first row in its level
    query: np.ndarray  # [items, most], -1 pads
    parts: np.ndarray | None  # [key tiles of the array, most parts]: items of each tile, `items` pads

    def visits(self, limits: Bounds, key_tile: int, xp=np) -> Visits:
        level, start = self.name[:, 1:2], self.name[:, 2:]
        return by_kind(np.maximum(self.query, 0), self.query, level, start, limits, key_tile, xp)


@lru_cache(maxsize=64)
def key_lists(stream: Stream, query_tile: int, key_tile: int, above: bool, longest: int) -> KeyLists:
    """Of the tokens (`above` false: an item per tile), or of all levels above (at most `longest` visits an item)."""
    keys = Keys(stream.rows, key_tile)
    found = pairs(stream, query_tile, key_tile)
    chosen = (found.level > 0) == above
    query, level, key = (x[chosen] for x in found)
    tile = key + np.asarray(keys.starts)[level] // key_tile
    order = np.lexsort((query, tile))
    query, tile = query[order], tile[order]
    levels = range(1, len(stream.rows)) if above else (0,)
    names = [(keys.starts[m] + i * key_tile, m, i * key_tile) for m in levels for i in range(keys.tiles(m))]
    names = np.array(names, np.int32).reshape(-1, 3)
    if not above:
        return KeyLists(names, table(tile, (query,), len(names))[0], None)
    count = np.bincount(tile, minlength=len(names))
    place = np.arange(len(tile)) - np.repeat(np.cumsum(count) - count, count)
    pieces = -(-count // longest)
    item = (np.cumsum(pieces) - pieces)[tile] + place // longest
    owner = np.repeat(np.arange(len(names)), pieces)
    (listed,) = table(item, (query,), len(owner))
    # the longest start first, so that the last ones to finish are short
    order = np.argsort(-(listed >= 0).sum(1), kind="stable")
    (parts,) = table(owner, (np.argsort(order),), len(names))
    return KeyLists(
        names[owner][order], listed[order], np.where(parts < 0, len(owner), parts).astype(np.int32)
    )


def density(stream: Stream, query_tile: int = 128, key_tile: int = 128) -> float:
    """Pairs of tiles that are visited, over those of dense causal attention of the same tokens."""
    n = -(-stream.tokens // query_tile)
    dense = sum(-(-min((i + 1) * query_tile, stream.tokens) // key_tile) for i in range(n))
    return len(pairs(stream, query_tile, key_tile).query) / dense
