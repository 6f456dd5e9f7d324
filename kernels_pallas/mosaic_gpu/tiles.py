"""Which tiles of keys a tile of queries visits, from the pattern alone, before anything runs.

Queries stand in stream order: rows of all levels by the end of their span, so that a tile sees a short run of every
level. Keys are segregated by level, so that tiles of them are full. Every visible pair lies in exactly one visited
tile; tiles in which every query sees every key come first and need no mask.
"""

import itertools
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from kernels_pallas.mosaic_gpu.config import Q_TILE, WARPGROUP_ROWS, Config
from kernels_pallas.spec import GistSpec


class Visits(NamedTuple):
    """Per tile of one side the tiles of the other that it visits."""

    step_NS: np.ndarray  # int32: tiles, the full ones first; 0 behind the last
    full_N: np.ndarray  # int32: how many are full
    all_N: np.ndarray  # int32: how many there are
    order_N: np.ndarray  # int32: tiles by falling number of visits: the longest begin first


class Tiles(NamedTuple):
    """R rows of queries and S rows of keys after padding."""

    query_R: np.ndarray  # row of the levels side by side that stands here, -1 for padding
    place: np.ndarray  # where each row of the levels side by side stands
    first_LR: np.ndarray  # int32: what each query sees of each level
    stop_LR: np.ndarray
    offsets: tuple[int, ...]  # where the keys of each level begin, and where the last ends
    level_J: np.ndarray  # int32 per key tile of `config.block_k`: its level
    base_J: np.ndarray  # int32 per key tile: its first row within the level
    keys_of_queries: Visits  # of tiles of Q_TILE queries
    level_C: np.ndarray  # the same for key tiles of Q_TILE, which dkv takes
    base_C: np.ndarray
    queries_of_keys: Visits  # tiles of WARPGROUP_ROWS queries


@lru_cache(maxsize=64)
def plan(spec: GistSpec, T: int, config: Config) -> Tiles:
    sizes = spec.rows(T)
    level_r = np.concatenate([np.full(n, level) for level, n in enumerate(sizes)])
    row_r = np.concatenate([np.arange(n) for n in sizes])
    stream = np.lexsort((level_r, (row_r + 1) * spec.block**level_r))
    R = -(-len(stream) // Q_TILE) * Q_TILE
    query_R = np.full(R, -1)
    query_R[: len(stream)] = stream
    place = np.empty(len(stream), np.int64)
    place[stream] = np.arange(len(stream))
    first_LR, stop_LR = np.zeros((2, spec.levels + 1, R), np.int32)
    for level, rows in enumerate(sizes):
        here = place[level_r == level]
        for m, (first, stop) in enumerate(spec.key_ranges(level, np.arange(rows))):
            first_LR[m, here], stop_LR[m, here] = first, np.maximum(first, stop)
    offsets = [0]
    for n in sizes:
        offsets.append(offsets[-1] + -(-max(n, 1) // config.key_tile) * config.key_tile)

    def of_size(size: int):
        level_J = np.concatenate(
            [np.full((b - a) // size, m) for m, (a, b) in enumerate(itertools.pairwise(offsets))]
        )
        base_J = np.arange(len(level_J)) * size - np.asarray(offsets)[level_J]
        return level_J.astype(np.int32), base_J.astype(np.int32)

    level_J, base_J = of_size(config.block_k)
    level_C, base_C = of_size(Q_TILE)
    real_R = query_R >= 0
    forward = _visits(*_touch(first_LR, stop_LR, real_R, Q_TILE, level_J, base_J, config.block_k))
    any_QC, full_QC = _touch(first_LR, stop_LR, real_R, WARPGROUP_ROWS, level_C, base_C, Q_TILE)
    return Tiles(
        query_R,
        place,
        first_LR,
        stop_LR,
        tuple(offsets),
        level_J,
        base_J,
        forward,
        level_C,
        base_C,
        _visits(any_QC.T, full_QC.T),
    )


def _touch(first_LR, stop_LR, real_R, rows: int, level_J, base_J, size: int):
    """(any, full) [query tiles, key tiles]: whether some query sees some key, and whether all see all."""

    def over(x_LR, empty, reduce):
        return reduce(np.where(sees_LR, x_LR, empty).reshape(len(x_LR), -1, rows), axis=-1)[level_J].T

    sees_LR = real_R & (stop_LR > first_LR)
    far = np.iinfo(np.int32).max
    begin_J, end_J = base_J, base_J + size
    # the rows that a tile of queries sees of a level are one run
    any_QJ = (over(first_LR, far, np.min) < end_J) & (over(stop_LR, -1, np.max) > begin_J)
    blind_LQ = (real_R & ~sees_LR).reshape(len(first_LR), -1, rows).any(-1)
    full_QJ = (over(first_LR, -1, np.max) <= begin_J) & (over(stop_LR, far, np.min) >= end_J)
    return any_QJ, any_QJ & full_QJ & ~blind_LQ[level_J].T


def _visits(any_NM, full_NM) -> Visits:
    all_N = any_NM.sum(1)
    kind_NM = np.where(full_NM, 0, np.where(any_NM, 1, 2))
    order_NM = np.argsort(kind_NM, axis=1, kind="stable")[:, : max(1, all_N.max())]
    step_NS = np.where(np.arange(order_NM.shape[1]) < all_N[:, None], order_NM, 0)
    return Visits(
        step_NS.astype(np.int32),
        full_NM.sum(1).astype(np.int32),
        all_N.astype(np.int32),
        np.argsort(-all_N, kind="stable").astype(np.int32),
    )


def density(spec: GistSpec, T: int, config: Config) -> float:
    """Visited tiles of 128 x `block_k` over those of dense causal attention of T tokens."""
    dense = sum(-(-min(T, start + Q_TILE) // config.block_k) for start in range(0, T, Q_TILE))
    return int(plan(spec, T, config).keys_of_queries.all_N.sum()) / dense
