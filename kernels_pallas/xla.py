"""Gist attention in plain XLA, tile by tile: memory O(T), work proportional to the keys that are seen.

A tile holds a run of tokens and the level-1 rows that end in it. Its keys are the tokens of its window, a run of
rows of each middle level, and all rows of the last level so far. Windows are laid out beforehand, so that the
loop over tiles only slices and its transpose only adds. Queries of level 2 and above are few: each is a tile of
its own. Shape suffixes: B batch, K key heads, G queries per key head, N tiles, Q queries of a tile, S rows of a
level, W rows of a window, D head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.reference import NEG
from kernels_pallas.spec import GistSpec

TILE = 128  # tokens of a tile, about
SEGMENT = 64  # rows of the last level by which the part that tiles look at grows, at least
SEGMENTS = 8  # and into how many parts it is cut at most
ALONE = 32  # queries of upper levels at a time


def gist_attention_xla(q, k, v, spec: GistSpec, segment_ids, scale: float) -> tuple:
    """Per-level outputs. Scores, softmax and sums are float32; the backward pass recomputes them tile by tile."""
    B, T, H, D = q[0].shape
    K, tile = k[0].shape[2], tile_tokens(spec)
    # what is behind the last token is seen by no query before it
    padded = spec.rows(-(-T // tile) * tile)
    queries = [
        _pad(x, n).transpose(0, 2, 1, 3).reshape(B, K, H // K, n, D) for x, n in zip(q, padded, strict=True)
    ]
    keys = [
        Rows(*(_pad(x, n).transpose(0, 2, 1, 3) for x in (k[m], v[m])), _documents(segment_ids, spec, m, n))
        for m, n in enumerate(padded)
    ]
    out = _tiles(queries, keys, spec, scale, tile)
    for level in range(2, spec.levels + 1):
        out.append(_alone(queries[level], keys, spec, scale, level))
    return tuple(
        x.reshape(B, H, -1, D)[:, :, :n].transpose(0, 2, 1, 3) for x, n in zip(out, spec.rows(T), strict=True)
    )


def tile_tokens(spec: GistSpec) -> int:
    return spec.block * max(1, round(TILE / spec.block))


class Rows(NamedTuple):
    """Keys of a level or of windows of one; the rows are on the axis before the last."""

    k: jax.Array  # [..., B, K, S, D]
    v: jax.Array
    document: jax.Array | None  # [..., B, 1, S, 1]


class Window(NamedTuple):
    """Rows with their numbers, and which of them each query of the tile sees."""

    rows: Rows
    row: jax.Array  # [..., W]
    first: jax.Array  # [..., Q]
    stop: jax.Array


def _attend(q_BKGQD, document_BQ, windows: list[Window], scale: float):
    """Attention of one tile: one softmax over all its windows."""
    scores, seen = [], []
    for rows, row_W, first_Q, stop_Q in windows:
        s = jnp.einsum("bkgqd,bkwd->bkgqw", q_BKGQD, rows.k, preferred_element_type=jnp.float32)
        seen_QW = (row_W >= first_Q[:, None]) & (row_W < stop_Q[:, None])
        if document_BQ is not None:
            same_BQW = document_BQ[:, :, None] == rows.document[:, 0, None, :, 0]
            seen_QW = (seen_QW & same_BQW)[:, None, None]
        scores.append(jnp.where(seen_QW, s * scale, NEG))
        seen.append(seen_QW)
    top = jnp.max(jnp.stack([s.max(-1, initial=NEG) for s in scores]), axis=0)[..., None]
    p = [jnp.where(mask, jnp.exp(s - top), 0.0) for s, mask in zip(scores, seen, strict=True)]
    total = sum(x.sum(-1, keepdims=True) for x in p)
    o = sum(
        jnp.einsum("bkgqw,bkwd->bkgqd", x.astype(q_BKGQD.dtype), w.rows.v, preferred_element_type=jnp.float32)
        for x, w in zip(p, windows, strict=True)
    )
    return (o / jnp.maximum(total, 1e-30)).astype(q_BKGQD.dtype)


# --- Tokens and level-1 rows, by tiles ------------------------------------------------------------------


def _tiles(queries, keys: list[Rows], spec: GistSpec, scale: float, tile: int) -> list:
    """Outputs of levels 0 and 1, [B, K, G, S, D] each."""
    r, L = spec.block, spec.levels
    B, K, G, T, D = queries[0].shape
    N, per_tile = T // tile, (tile, tile // r)
    parts = [x.reshape(B, K, G, N, n, D) for x, n in zip(queries, per_tile, strict=False)]
    q_NBKGQD = jnp.moveaxis(jnp.concatenate(parts, axis=4), 3, 0)
    ranges = _ranges(spec, {level: np.arange(N * n).reshape(N, n) for level, n in enumerate(per_tile)})
    document_NBQ = _asking(
        keys[0].document,
        spec,
        {0: np.arange(N * tile).reshape(N, tile), 1: np.arange(N * tile // r).reshape(N, -1)},
    )

    # tokens: the tile and whole tiles before it; middle levels: from the first row that one of the tile sees
    back = -(-spec.window // tile)
    token_NW = (np.arange(N)[:, None] - back) * tile + np.arange((back + 1) * tile)
    windows = [Window(_map(lambda x: _shifted(x, N, back), keys[0]), token_NW, *ranges[0])]
    for m in range(1, L):
        row_NW = _run(*ranges[m])
        windows.append(Window(_gather(keys[m], row_NW), row_NW, *ranges[m]))

    @jax.checkpoint
    def one(xs, far: Rows):
        q_BKGQD, document_BQ, windows, first_Q, stop_Q = xs
        last = Window(far, jnp.arange(far.k.shape[2]), first_Q, stop_Q)
        return _attend(q_BKGQD, document_BQ, [*windows, last], scale)

    out = []
    segments = min(SEGMENTS, -(-keys[L].k.shape[2] // SEGMENT), N)
    for tiles in np.array_split(np.arange(N), max(1, segments)):
        some = slice(tiles[0], tiles[-1] + 1)
        rows_so_far = max(1, int(ranges[L][1][some].max()))
        far = _map(lambda x, n=rows_so_far: x[:, :, :n], keys[L])
        xs = jax.tree.map(
            lambda x, some=some: jnp.asarray(x[some]), (q_NBKGQD, document_NBQ, windows, *ranges[L])
        )
        out.append(jax.lax.map(lambda x, far=far: one(x, far), xs))
    o_BKGNQD = jnp.moveaxis(jnp.concatenate(out), 0, 3)
    return [x.reshape(B, K, G, -1, D) for x in jnp.split(o_BKGNQD, [tile], axis=4)]


# --- Rows of level 2 and above, one by one --------------------------------------------------------------


def _alone(q_BKGSD, keys: list[Rows], spec: GistSpec, scale: float, level: int):
    """Outputs [B, K, G, S, D] of the rows of one level."""
    S = q_BKGSD.shape[3]
    if S == 0:
        return q_BKGSD
    index_N1 = np.arange(S)[:, None]
    ranges = _ranges(spec, {level: index_N1})
    rows = [_run(*ranges[m]) for m in range(spec.levels)]
    document_NBQ = _asking(keys[0].document, spec, {level: index_N1})
    far = keys[spec.levels]

    @jax.checkpoint
    def one(xs):
        q_BKGD, document_BQ, rows, ranges = xs
        windows = [Window(_take(keys[m], row_W), row_W, *ranges[m]) for m, row_W in enumerate(rows)]
        windows.append(Window(far, jnp.arange(far.k.shape[2]), *ranges[-1]))
        return _attend(q_BKGD[:, :, :, None], document_BQ, windows, scale)[:, :, :, 0]

    xs = jax.tree.map(jnp.asarray, (jnp.moveaxis(q_BKGSD, 3, 0), document_NBQ, rows, ranges))
    return jnp.moveaxis(jax.lax.map(one, xs, batch_size=min(ALONE, S)), 0, 3)


# --- Windows --------------------------------------------------------------------------------------------


def _ranges(spec: GistSpec, index: dict[int, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(first, stop) [N, Q] on every key level for queries {level: row numbers [N, n]}, side by side."""
    found = [spec.key_ranges(level, rows) for level, rows in index.items()]
    return [
        tuple(np.concatenate([ranges[m][end] for ranges in found], axis=1).astype(np.int32) for end in (0, 1))
        for m in range(spec.levels + 1)
    ]


def _run(first_NQ: np.ndarray, stop_NQ: np.ndarray) -> np.ndarray:
    """Numbers [N, W] of a run of rows per tile that holds all that its queries see."""
    width = max(1, int((stop_NQ.max(1) - first_NQ.min(1)).max()))
    return (first_NQ.min(1)[:, None] + np.arange(width)).astype(np.int32)


def _shifted(x_BKSD, N: int, back: int):
    """[N, B, K, (back + 1) S / N, D]: every tile behind the `back` tiles before it; zeros before the first."""
    B, K, S, D = x_BKSD.shape
    x = jnp.pad(x_BKSD, ((0, 0), (0, 0), (back * (S // N), 0), (0, 0))).reshape(B, K, N + back, S // N, D)
    return jnp.moveaxis(jnp.concatenate([x[:, :, i : i + N] for i in range(back + 1)], axis=3), 2, 0)


def _gather(rows: Rows, row_NW: np.ndarray) -> Rows:
    """The rows of every tile, tiles first; numbers behind the last row are masked later."""
    return _map(lambda x: jnp.moveaxis(jnp.take(x, row_NW, axis=2, mode="clip"), 2, 0), rows)


def _take(rows: Rows, row_W) -> Rows:
    return _map(lambda x: jnp.take(x, row_W, axis=2, mode="clip"), rows)


def _documents(segment_ids, spec: GistSpec, level: int, rows: int):
    """[B, 1, S, 1]: the document of every row of a level, -1 behind the last."""
    if segment_ids is None:
        return None
    first = segment_ids[:, :: spec.block**level][:, : segment_ids.shape[1] // spec.block**level]
    padded = jnp.pad(first, ((0, 0), (0, rows - first.shape[1])), constant_values=-1)
    return padded[:, None, :, None]


def _asking(document_B1S1, spec: GistSpec, index: dict[int, np.ndarray]):
    """[N, B, Q]: the document of every query, that of the last token of its span."""
    if document_B1S1 is None:
        return None
    last_NQ = np.concatenate([(rows + 1) * spec.block**level - 1 for level, rows in index.items()], axis=1)
    return jnp.moveaxis(document_B1S1[:, 0, last_NQ, 0], 0, 1)


def _map(fn, rows: Rows) -> Rows:
    return Rows(*(None if x is None else fn(x) for x in rows))


def _pad(x_BSHD, rows: int):
    return jnp.pad(x_BSHD, ((0, 0), (0, rows - x_BSHD.shape[1]), (0, 0), (0, 0)))
