"""Gist attention one row at a time: what a sequence leaves behind is a ring of rows per level.

A query sees a run of rows of every level, so only the newest ones must be kept: about the window of tokens, and
`(mid_spans + 1) * block` rows of each middle level. The last level keeps all its rows. At small batches these
products are bound by their launch, so plain XLA is the implementation. Sequences of a batch may differ in length.

Shape suffixes: B batch, K key heads, S slots of a level, D head size.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.reference import NEG
from kernels_pallas.spec import GistSpec


class GistCache(NamedTuple):
    """Keys and values of one layer, [B, K, S, D] per level; row j of a level is in slot j modulo S."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def slots(spec: GistSpec, tokens: int) -> tuple[int, ...]:
    """Slots per level for sequences of up to `tokens` tokens; all but the last do not grow with them."""
    if tokens < 1:
        raise ValueError(f"gist_decode: a cache for {tokens} tokens holds nothing; give 1 or more.")
    r, counts, reach = spec.block, [], spec.window + spec.block
    for level in range(spec.levels + 1):
        rows = -(-tokens // r**level) if level == spec.levels else reach // r**level + 1
        counts.append(max(1, min(rows, -(-tokens // r**level))))
        reach += (spec.mid_spans + 1) * r ** (level + 2)  # how far back the next level can begin
    return tuple(counts)


def init_gist_cache(
    spec: GistSpec, batch: int, tokens: int, key_heads: int, head_dim: int, dtype=jnp.float32
) -> GistCache:
    """An empty cache of one layer for sequences of up to `tokens` tokens."""
    shapes = [(batch, key_heads, n, head_dim) for n in slots(spec, tokens)]
    return GistCache(*(tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2)))


def fill(cache: GistCache, k, v, length_B, spec: GistSpec) -> GistCache:
    """The cache after the first `length_B` tokens of sequences with rows k, v, [B, T_l, K, D] per level."""

    def newest(level: int, kept_BKSD, x_BSKD):
        if x_BSKD.shape[1] == 0:
            return kept_BKSD
        row_BS = _rows_in_slots(length_B // spec.block**level, kept_BKSD.shape[2])
        picked = jnp.take_along_axis(x_BSKD, jnp.maximum(row_BS, 0)[..., None, None], axis=1, mode="clip")
        return picked.transpose(0, 2, 1, 3).astype(kept_BKSD.dtype)

    levels = range(spec.levels + 1)
    return GistCache(
        *(
            tuple(newest(m, kept[m], x[m]) for m in levels)
            for kept, x in zip((cache.k, cache.v), (k, v), strict=True)
        )
    )


def append(cache: GistCache, level: int, k_BKD, v_BKD, row_B, write_B=True) -> GistCache:
    """Row `row_B` of a level into the cache, in the sequences that `write_B` names."""
    S = cache.k[level].shape[2]
    slot_B = jnp.where(write_B, row_B % S, S)  # behind the last slot: dropped

    def put(rows, x_BKD):
        return (*rows[:level], _write(rows[level], x_BKD, slot_B), *rows[level + 1 :])

    return GistCache(put(cache.k, k_BKD), put(cache.v, v_BKD))


def gist_extend(
    q, k, v, cache: GistCache, start_B, count_B, *, spec: GistSpec, scale=None
) -> tuple[tuple[jax.Array, ...], GistCache]:
    """Attention of several new tokens, and of the gists that they complete, over a cache; and the cache after them.

    `count_B` tokens follow the first `start_B`. q, k, v are tuples, level l holds rows `start_B // block**l` and on,
    [B, n_l, H or K, D], as many as T tokens can complete (`new_rows`); those that are not complete are ignored, and
    their outputs are of no account. The same numbers as `gist_attention` on whole sequences.
    """
    B, _, H, D = q[0].shape
    K = k[0].shape[2]
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    levels = range(spec.levels + 1)
    span = [spec.block**m for m in levels]
    first, stop = ([x_B // s for s in span] for x_B in (start_B, start_B + count_B))
    index = [first[m][:, None] + jnp.arange(q[m].shape[1]) for m in levels]
    # keys of a level: what the ring holds from before, then the new rows
    row = [jnp.concatenate([_rows_in_slots(first[m], cache.k[m].shape[2]), index[m]], axis=1) for m in levels]
    known = [
        jnp.concatenate(
            [row[m][:, : cache.k[m].shape[2]] >= 0, index[m] < stop[m][:, None]],
            axis=1,
        )
        for m in levels
    ]
    seen_BQS = jnp.concatenate(
        [
            jnp.concatenate(
                [
                    known[m][:, None]
                    & (row[m][:, None] >= begin[..., None])
                    & (row[m][:, None] < end[..., None])
                    for m, (begin, end) in enumerate(spec.key_ranges(level, index[level]))
                ],
                axis=2,
            )
            for level in levels
        ],
        axis=1,
    )
    new_k, new_v = ([x.transpose(0, 2, 1, 3).astype(cache.k[0].dtype) for x in y] for y in (k, v))
    k_BKSD, v_BKSD = (
        jnp.concatenate([x for pair in zip(old, new, strict=True) for x in pair], axis=2)
        for old, new in ((cache.k, new_k), (cache.v, new_v))
    )
    q_BRHD = jnp.concatenate(q, axis=1)
    R = q_BRHD.shape[1]
    q_BKQD = q_BRHD.reshape(B, R, K, -1, D).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, D)
    s_BKQS = jnp.einsum("bkqd,bksd->bkqs", q_BKQD, k_BKSD, preferred_element_type=jnp.float32)
    s_BKQS = jnp.where(jnp.tile(seen_BQS, (1, H // K, 1))[:, None], s_BKQS * scale, NEG)
    p_BKQS = jax.nn.softmax(s_BKQS, axis=-1).astype(v_BKSD.dtype)
    o_BKQD = jnp.einsum("bkqs,bksd->bkqd", p_BKQS, v_BKSD, preferred_element_type=jnp.float32)
    o_BRHD = o_BKQD.reshape(B, K, -1, R, D).transpose(0, 3, 1, 2, 4).reshape(B, R, H, D).astype(q_BRHD.dtype)
    out, begin = [], 0
    for x in q:
        out.append(o_BRHD[:, begin : begin + x.shape[1]])
        begin += x.shape[1]

    def newest(m: int, old_BKSD, new_BKSD):
        row_BS = _rows_in_slots(stop[m], old_BKSD.shape[2])
        place_BS = row_BS - first[m][:, None]
        picked = jnp.take_along_axis(
            new_BKSD, jnp.maximum(place_BS, 0)[:, None, :, None], axis=2, mode="clip"
        )
        return jnp.where((place_BS >= 0)[:, None, :, None], picked, old_BKSD)

    after = GistCache(
        *(
            tuple(newest(m, old[m], new[m]) for m in levels)
            for old, new in ((cache.k, new_k), (cache.v, new_v))
        )
    )
    return tuple(out), after


def new_rows(spec: GistSpec, tokens: int) -> tuple[int, ...]:
    """Most rows per level that `tokens` more tokens complete, wherever they begin."""
    return tuple(-(-tokens // spec.block**level) for level in range(spec.levels + 1))


def gist_decode(
    q_BHD, cache: GistCache, position_B, *, spec: GistSpec, level: int = 0, scale=None
) -> jax.Array:
    """Attention [B, H, D] of one row per sequence whose span ends with token `position_B`, itself appended before.

    Level 0 is a token. A row of level l asks after the rows of all lower levels that end with the same token have
    been appended, and before those of higher levels are. The same numbers as `gist_attention` on whole sequences.
    """
    B, H, D = q_BHD.shape
    K = cache.k[0].shape[1]
    q_BKGD = q_BHD.reshape(B, K, H // K, D)
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    ranges = spec.key_ranges(level, (position_B + 1) // spec.block**level - 1)
    scores = []
    for m, ((first_B, stop_B), k_BKSD) in enumerate(zip(ranges, cache.k, strict=True)):
        rows_B = (position_B + (m <= level)) // spec.block**m
        row_BS = _rows_in_slots(rows_B, k_BKSD.shape[2])
        seen_BS = (row_BS >= first_B[:, None]) & (row_BS < stop_B[:, None])
        s_BKGS = jnp.einsum("bkgd,bksd->bkgs", q_BKGD, k_BKSD, preferred_element_type=jnp.float32)
        scores.append(jnp.where(seen_BS[:, None, None], s_BKGS * scale, NEG))
    p_BKGS = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    v_BKSD = jnp.concatenate(cache.v, axis=2)
    o_BKGD = jnp.einsum(
        "bkgs,bksd->bkgd", p_BKGS.astype(v_BKSD.dtype), v_BKSD, preferred_element_type=jnp.float32
    )
    return o_BKGD.reshape(B, H, D).astype(q_BHD.dtype)


def _rows_in_slots(rows_B, S: int):
    """[B, S]: the newest of the rows 0, ..., rows_B - 1 that each slot holds; below 0 where it holds none."""
    newest_B1 = rows_B[:, None] - 1
    return newest_B1 - (newest_B1 - jnp.arange(S)) % S


def _write(rows_BKSD, x_BKD, slot_B):
    """One row per sequence, in place inside a loop (two scatter indices each: with one, XLA on CPUs would make a
    dynamic-update-slice of it and fuse that into its readers at the price of copying the whole cache)."""
    B, K, S, D = rows_BKSD.shape
    sequence_B1, halves = jnp.arange(B)[:, None], jnp.arange(2)[None]
    x_B2Kd = x_BKD.reshape(B, K, 2, D // 2).swapaxes(1, 2).astype(rows_BKSD.dtype)
    rows_BKS2d = rows_BKSD.reshape(B, K, S, 2, D // 2)
    return rows_BKS2d.at[sequence_B1, :, slot_B[:, None], halves].set(x_B2Kd, mode="drop").reshape(B, K, S, D)
