"""Gist attention in plain XLA, tile by tile: memory O(T), work proportional to the keys that are seen.

A tile holds a run of tokens and the gist rows whose spans end among them. Its keys are a run of rows of every
level: the tokens of its window, the middle of each middle level, all rows of the last level so far. Both passes are
loops over tiles that slice these runs; the backward one recomputes the probabilities from the saved log-sum-exp and
adds to the gradients of the runs in place.

Shape suffixes: B batch, K key heads, G queries per key head, R rows of all levels side by side, S rows of a level, N
tiles, Q queries of a tile, W keys of a tile, L levels, D head size.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.reference import NEG
from kernels_pallas.spec import GistSpec

TILE = 128  # tokens of a tile, about
SEGMENT = 64  # rows of the last level by which the part that tiles look at grows, at least
SEGMENTS = 8  # and into how many parts it is cut at most


def gist_attention_xla(q, k, v, spec: GistSpec, segment_ids, scale: float) -> tuple:
    """Per-level outputs. Scores, softmax and sums are float32."""
    B, T, H, D = q[0].shape
    K, sizes = k[0].shape[2], spec.rows(T)
    q_BKGRD = jnp.concatenate(q, axis=1).transpose(0, 2, 1, 3).reshape(B, K, H // K, -1, D)
    keys, values = ([_some(x).transpose(0, 2, 1, 3) for x in rows] for rows in (k, v))
    o_BKGRD = _attention(q_BKGRD, keys, values, segment_ids, spec, T, scale)
    o_BRHD = o_BKGRD.reshape(B, H, -1, D).transpose(0, 2, 1, 3)
    return tuple(jnp.split(o_BRHD, np.cumsum(sizes)[:-1], axis=1))


def _some(x_BSHD):
    """At least one row, so that there is something to slice; it is never seen."""
    return x_BSHD if x_BSHD.shape[1] else jnp.pad(x_BSHD, ((0, 0), (0, 1), (0, 0), (0, 0)))


# --- Which rows a tile asks for and looks at: known before anything runs ------------------------------------


class Plan(NamedTuple):
    query_NQ: np.ndarray  # the row that each slot of a tile asks for; any where it has none
    place_R: np.ndarray  # where in [N * Q] each row stands
    last_NQ: np.ndarray  # last token of each query's span
    start_NL: np.ndarray  # first row of the tile's run of each level
    width_L: tuple[int, ...]  # and how many rows it has; of the last level, in the last tile
    first_NLQ: np.ndarray  # the rows that each query sees, counted from the start of the run
    stop_NLQ: np.ndarray


def tile_tokens(spec: GistSpec, T: int) -> int:
    """A multiple of the longest span that fits into a tile."""
    wanted, span = min(TILE, T), spec.block
    while span * spec.block <= wanted:
        span *= spec.block
    return span * max(1, round(wanted / span))


@lru_cache(maxsize=64)
def plan_tiles(spec: GistSpec, T: int) -> Plan:
    tile, sizes = tile_tokens(spec, T), spec.rows(T)
    N = -(-T // tile)
    asked, query, places, ends, Q, before = [], [], [], [], 0, 0
    for level, rows in enumerate(sizes):
        span, row_S = spec.block**level, np.arange(rows)
        tile_S = ((row_S + 1) * span - 1) // tile
        slot_S = row_S - np.searchsorted(tile_S, tile_S)
        asked_NQ = np.full((N, max(1, tile // span)), -1)
        asked_NQ[tile_S, slot_S] = row_S
        asked.append(asked_NQ)
        query.append(np.where(asked_NQ < 0, 0, asked_NQ + before))
        places.append((tile_S, Q + slot_S))
        ends.append(np.clip((asked_NQ + 1) * span - 1, 0, T - 1))
        Q, before = Q + asked_NQ.shape[1], before + rows
    ranges = [spec.key_ranges(level, np.maximum(asked_NQ, 0)) for level, asked_NQ in enumerate(asked)]
    starts, widths, firsts, stops = [], [], [], []
    for m, rows in enumerate(sizes):
        first_NQ, stop_NQ = (
            np.concatenate([found[m][end] + 0 * a for found, a in zip(ranges, asked, strict=True)], axis=1)
            for end in (0, 1)
        )
        seen_NQ = (np.concatenate(asked, axis=1) >= 0) & (stop_NQ > first_NQ)
        begin_N = np.where(seen_NQ, first_NQ, rows).min(1) * (m < spec.levels)
        width = max(1, int((np.where(seen_NQ, stop_NQ, 0).max(1) - begin_N).max()))
        begin_N = np.clip(begin_N, 0, max(0, rows - width))
        starts.append(begin_N)
        widths.append(width)
        firsts.append(np.where(seen_NQ, first_NQ - begin_N[:, None], 0))
        stops.append(np.where(seen_NQ, stop_NQ - begin_N[:, None], 0))
    return Plan(
        np.concatenate(query, axis=1),
        np.concatenate([tile_S * Q + slot_S for tile_S, slot_S in places]),
        np.concatenate(ends, axis=1),
        np.stack(starts, axis=1).astype(np.int32),
        tuple(widths),
        np.stack(firsts, axis=1).astype(np.int32),
        np.stack(stops, axis=1).astype(np.int32),
    )


def _segments(plan: Plan) -> list[tuple[slice, tuple[int, ...]]]:
    """Runs of tiles, and how wide theirs are: the last level's grows from segment to segment."""
    N, rows = len(plan.start_NL), plan.width_L[-1]
    count = max(1, min(SEGMENTS, -(-rows // SEGMENT), N))
    parts = [slice(int(part[0]), int(part[-1]) + 1) for part in np.array_split(np.arange(N), count)]
    return [(part, (*plan.width_L[:-1], max(1, int(plan.stop_NLQ[part, -1].max())))) for part in parts]


# --- The two passes -----------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q_BKGRD, keys, values, segment_ids, spec, T, scale):
    return _forward(q_BKGRD, keys, values, segment_ids, spec, T, scale)[0]


class Tile(NamedTuple):
    """What the loops hand to a tile; documents are None without packed ones."""

    start_L: jax.Array
    first_LQ: jax.Array
    stop_LQ: jax.Array
    document_BQ: jax.Array | None


def _forward(q_BKGRD, keys, values, segment_ids, spec, T, scale):
    plan = plan_tiles(spec, T)
    documents = _documents(segment_ids, spec)
    q_NBKGQD = _to_tiles(q_BKGRD, plan)

    def one(widths, _, xs):
        tile, q_BKGQD = xs
        k_BKWD, v_BKWD = (_runs(rows, tile, widths) for rows in (keys, values))
        s_BKGQW = _scores(q_BKGQD, k_BKWD, tile, documents, widths, scale)
        # above what is hidden has, so that a query that sees nothing gets nothing
        top_BKGQ1 = jnp.maximum(s_BKGQW.max(-1, keepdims=True), NEG / 2)
        p_BKGQW = jnp.exp(s_BKGQW - top_BKGQ1)
        sum_BKGQ1 = jnp.maximum(p_BKGQW.sum(-1, keepdims=True), 1e-30)
        o_BKGQD = _dot("bkgqw,bkwd->bkgqd", p_BKGQW.astype(v_BKWD.dtype), v_BKWD) / sum_BKGQ1
        return None, (o_BKGQD.astype(q_BKGQD.dtype), top_BKGQ1 + jnp.log(sum_BKGQ1))

    _, (o_NBKGQD, lse_NBKGQ1) = _loop(one, plan, segment_ids, None, q_NBKGQD)
    return _to_rows(o_NBKGQD, plan), (q_NBKGQD, keys, values, segment_ids, o_NBKGQD, lse_NBKGQ1)


def _backward(spec, T, scale, saved, do_BKGRD):
    q_NBKGQD, keys, values, segment_ids, o_NBKGQD, lse_NBKGQ1 = saved
    plan = plan_tiles(spec, T)
    documents = _documents(segment_ids, spec)
    do_NBKGQD = _to_tiles(do_BKGRD, plan)
    delta_NBKGQ1 = (do_NBKGQD.astype(jnp.float32) * o_NBKGQD.astype(jnp.float32)).sum(-1, keepdims=True)

    def one(widths, grads, xs):
        tile, q_BKGQD, do_BKGQD, lse_BKGQ1, delta_BKGQ1 = xs
        k_BKWD, v_BKWD = (_runs(rows, tile, widths) for rows in (keys, values))
        p_BKGQW = jnp.exp(_scores(q_BKGQD, k_BKWD, tile, documents, widths, scale) - lse_BKGQ1)
        dp_BKGQW = _dot("bkgqd,bkwd->bkgqw", do_BKGQD, v_BKWD)
        ds_BKGQW = (p_BKGQW * (dp_BKGQW - delta_BKGQ1) * scale).astype(q_BKGQD.dtype)
        dq_BKGQD = _dot("bkgqw,bkwd->bkgqd", ds_BKGQW, k_BKWD).astype(q_BKGQD.dtype)
        dk_BKWD = _dot("bkgqw,bkgqd->bkwd", ds_BKGQW, q_BKGQD)
        dv_BKWD = _dot("bkgqw,bkgqd->bkwd", p_BKGQW.astype(do_BKGQD.dtype), do_BKGQD)
        return tuple(
            _add_runs(g, x, tile, widths) for g, x in zip(grads, (dk_BKWD, dv_BKWD), strict=True)
        ), dq_BKGQD

    zeros = tuple([jnp.zeros(x.shape, jnp.float32) for x in rows] for rows in (keys, values))
    grads, dq_NBKGQD = _loop(one, plan, segment_ids, zeros, q_NBKGQD, do_NBKGQD, lse_NBKGQ1, delta_NBKGQ1)
    dkeys, dvalues = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, (keys, values))
    return _to_rows(dq_NBKGQD, plan), dkeys, dvalues, None


_attention.defvjp(_forward, _backward)


def _loop(one, plan: Plan, segment_ids, carry, *arrays):
    """(carry, outputs [N, ...]) of `one(widths, carry, (tile, *arrays of the tile))` over all tiles."""
    document_NBQ = None
    if segment_ids is not None:
        document_NBQ = jnp.moveaxis(segment_ids[:, plan.last_NQ], 0, 1)
    xs = Tile(plan.start_NL, plan.first_NLQ, plan.stop_NLQ, document_NBQ), *arrays
    outputs = []
    for part, widths in _segments(plan):
        some = jax.tree.map(lambda x, part=part: jnp.asarray(x[part]), xs)
        carry, out = jax.lax.scan(partial(one, widths), carry, some)
        outputs.append(out)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def _scores(q_BKGQD, k_BKWD, tile: Tile, documents, widths, scale: float):
    """Float32 scores of a tile, NEG where a query does not see a key."""
    seen = []
    for m, width in enumerate(widths):
        row_W = jnp.arange(width)
        seen.append((row_W >= tile.first_LQ[m, :, None]) & (row_W < tile.stop_LQ[m, :, None]))
    seen_QW = jnp.concatenate(seen, axis=-1)
    if documents is not None:
        document_BW = jnp.concatenate(
            [
                jax.lax.dynamic_slice_in_dim(x_BS, tile.start_L[m], width, axis=1)
                for m, (x_BS, width) in enumerate(zip(documents, widths, strict=True))
            ],
            axis=1,
        )
        same_BQW = tile.document_BQ[:, :, None] == document_BW[:, None]
        seen_QW = (seen_QW & same_BQW)[:, None, None]
    return jnp.where(seen_QW, _dot("bkgqd,bkwd->bkgqw", q_BKGQD, k_BKWD) * scale, NEG)


def _runs(rows: list, tile: Tile, widths):
    """[B, K, W, D]: the tile's keys, the runs of all levels side by side."""
    return jnp.concatenate(
        [
            jax.lax.dynamic_slice_in_dim(x_BKSD, tile.start_L[m], width, axis=2)
            for m, (x_BKSD, width) in enumerate(zip(rows, widths, strict=True))
        ],
        axis=2,
    )


def _add_runs(rows: list, more_BKWD, tile: Tile, widths) -> list:
    parts = jnp.split(more_BKWD, np.cumsum(widths)[:-1], axis=2)
    return [
        jax.lax.dynamic_update_slice_in_dim(
            x, jax.lax.dynamic_slice_in_dim(x, tile.start_L[m], width, axis=2) + part, tile.start_L[m], axis=2
        )
        for m, (x, part, width) in enumerate(zip(rows, parts, widths, strict=True))
    ]


def _documents(segment_ids, spec: GistSpec):
    """[B, S] per level: the document of every row."""
    if segment_ids is None:
        return None
    T = segment_ids.shape[1]
    return [
        segment_ids[:, :: spec.block**level][:, : max(1, rows)] for level, rows in enumerate(spec.rows(T))
    ]


def _to_tiles(x_BKGRD, plan: Plan):
    return jnp.moveaxis(jnp.take(x_BKGRD, plan.query_NQ, axis=3), 3, 0)


def _to_rows(x_NBKGQD, plan: Plan):
    N, B, K, G, Q, D = x_NBKGQD.shape
    x_BKGPD = jnp.moveaxis(x_NBKGQD, 0, 3).reshape(B, K, G, N * Q, D)
    return jnp.take(x_BKGPD, plan.place_R, axis=3)


def _dot(equation: str, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
