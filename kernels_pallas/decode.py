"""Gist attention one row at a time: what a sequence leaves behind is a ring of rows per level.

A query sees a run of rows of every level, so only the newest ones must be kept: about the window of tokens, and
`(M + 1) * block` rows of each middle level. The last level keeps all its rows. The rings of all levels lie side
by side in one array, so that a step is two products however many levels there are. At small batches these are bound
by their launches, so plain XLA is what runs unless the kernel is asked for. Sequences of a batch may differ in length.

Shape suffixes: B batch, K key heads, S slots of all levels, D head size, R new rows of all levels, Q queries times the
query heads of a key head.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.api import Refused, choose
from kernels_pallas.reference import NEG
from kernels_pallas.spec import GistSpec

SLOTS = 8  # a cache has a multiple of these


@partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=("sizes",))
@dataclass(frozen=True)
class GistCache:
    """Keys and values of one layer, [B, K, S, D]; row j of a level is in its slot j modulo the level's size."""

    k: jax.Array
    v: jax.Array
    sizes: tuple[int, ...]  # slots per level


def slots(spec: GistSpec, tokens: int) -> tuple[int, ...]:
    """Slots per level for sequences of up to `tokens` tokens; all but the last do not grow with them."""
    if tokens < 1:
        raise ValueError(f"gist_decode: a cache for {tokens} tokens holds nothing; give 1 or more.")
    r, counts, reach = spec.block, [], spec.window + spec.block
    for level in range(spec.levels + 1):
        rows = -(-tokens // r**level) if level == spec.levels else reach // r**level + 1
        counts.append(max(1, min(rows, -(-tokens // r**level))))
        if level < spec.levels - 1:  # how far back the next level can begin
            reach += (spec.mid_spans_per_level[level] + 1) * r ** (level + 2)
    counts[-1] += -sum(counts) % SLOTS  # that a tile of keys is whole
    return tuple(counts)


def init_gist_cache(
    spec: GistSpec, batch: int, tokens: int, key_heads: int, head_dim: int, dtype=jnp.float32
) -> GistCache:
    """An empty cache of one layer for sequences of up to `tokens` tokens."""
    sizes = slots(spec, tokens)
    k, v = (jnp.zeros((batch, key_heads, sum(sizes), head_dim), dtype) for _ in range(2))
    return GistCache(k, v, sizes)


def fill(cache: GistCache, k, v, length_B, spec: GistSpec) -> GistCache:
    """The cache after the first `length_B` tokens of sequences with rows k, v, [B, T_l, K, D] per level."""
    ring = _Ring(spec, cache.sizes)
    begin = np.cumsum([0, *(x.shape[1] for x in k)])[:-1]
    row_BS = ring.rows(length_B)
    place_BS = jnp.maximum(row_BS, 0) + begin[ring.level_S]

    def newest(old_BKSD, x):
        x_BRKD = jnp.concatenate(x, axis=1)
        picked = jnp.take_along_axis(x_BRKD, place_BS[..., None, None], axis=1, mode="clip")
        picked = picked.transpose(0, 2, 1, 3).astype(old_BKSD.dtype)
        return jnp.where((row_BS >= 0)[:, None, :, None], picked, old_BKSD)

    return GistCache(newest(cache.k, k), newest(cache.v, v), cache.sizes)


def append(cache: GistCache, level: int, k_BKD, v_BKD, row_B, write_B=True) -> GistCache:
    """Row `row_B` of a level into the cache, in the sequences that `write_B` names."""
    size, S = cache.sizes[level], sum(cache.sizes)
    slot_B = jnp.where(write_B, sum(cache.sizes[:level]) + row_B % size, S)  # behind the last slot: dropped
    return GistCache(_write(cache.k, k_BKD, slot_B), _write(cache.v, v_BKD, slot_B), cache.sizes)


def gist_decode(
    q_BHD,
    cache: GistCache,
    position_B,
    *,
    spec: GistSpec,
    level: int = 0,
    scale=None,
    implementation: str = "xla",
) -> jax.Array:
    """Attention [B, H, D] of one row per sequence whose span ends with token `position_B`, itself appended before.

    Level 0 is a token. A row of level l asks after the rows of all lower levels that end with the same token have
    been appended, and before those of higher levels are. The same numbers as `gist_attention` on whole sequences.
    `implementation` is xla, or mosaic_gpu: the kernel for Hopper GPUs, which takes what `choose` says of them.
    """
    B, H, D = q_BHD.shape
    K = cache.k.shape[1]
    if implementation not in ("xla", "mosaic_gpu"):
        raise Refused(f"gist_decode has no implementation {implementation!r}; choose from xla, mosaic_gpu.")
    seen_BS = seen_slots(cache, position_B, spec, level)
    q_BKGD = q_BHD.reshape(B, K, H // K, D)
    dtype = jnp.result_type(q_BHD, cache.k, cache.v)
    if choose(implementation, spec=spec, head_dim=D, dtype=dtype).name == "mosaic_gpu":
        from kernels_pallas.mosaic_gpu.decode import decode_mosaic_gpu

        o_BKGD = decode_mosaic_gpu(q_BKGD, cache.k, cache.v, seen_BS, scale)
    else:
        o_BKGD = _attend(q_BKGD, cache.k, cache.v, seen_BS[:, None, None], scale)
    return o_BKGD.reshape(B, H, D).astype(q_BHD.dtype)


def seen_slots(cache: GistCache, position_B, spec: GistSpec, level: int = 0):
    """bool [B, S]: the slots that the row of a level sees whose span ends with token `position_B`."""
    ring = _Ring(spec, cache.sizes)
    # the rows that are there: those of higher levels that end here are not yet
    row_BS = ring.rows(position_B[:, None] + (ring.level_S <= level))
    return ring.seen(row_BS, level, (position_B + 1) // spec.block**level - 1)


def gist_extend(
    q, k, v, cache: GistCache, start_B, count_B, *, spec: GistSpec, scale=None
) -> tuple[tuple[jax.Array, ...], GistCache]:
    """Attention of several new tokens, and of the gists that they complete, over a cache; and the cache after them.

    `count_B` tokens follow the first `start_B`. q, k, v are tuples, level l holds rows `start_B // block**l` and on,
    [B, n_l, H or K, D], as many as T tokens can complete (`new_rows`); those that are not complete are ignored, and
    their outputs are of no account. The same numbers as `gist_attention` on whole sequences.
    """
    B, _, H, D = q[0].shape
    K, S = cache.k.shape[1:3]
    ring, new = _Ring(spec, cache.sizes), [x.shape[1] for x in q]
    first = [start_B // spec.block**level for level in range(spec.levels + 1)]
    index = [first_B[:, None] + jnp.arange(n) for first_B, n in zip(first, new, strict=True)]

    # keys: what the ring holds from before, then the new rows
    stop = [(start_B + count_B) // spec.block**level for level in range(spec.levels + 1)]
    complete = [i < stop_B[:, None] for i, stop_B in zip(index, stop, strict=True)]
    row_BX = jnp.concatenate(
        [ring.rows(start_B), *(jnp.where(c, i, -1) for c, i in zip(complete, index, strict=True))], axis=1
    )
    keys = _Ring(spec, cache.sizes, tuple(new))
    seen_BRX = jnp.concatenate([keys.seen(row_BX, level, i) for level, i in enumerate(index)], axis=1)
    k_BKRD, v_BKRD = (jnp.concatenate(x, axis=1).transpose(0, 2, 1, 3).astype(cache.k.dtype) for x in (k, v))
    k_BKXD, v_BKXD = (jnp.concatenate(pair, axis=2) for pair in ((cache.k, k_BKRD), (cache.v, v_BKRD)))
    q_BRHD = jnp.concatenate(q, axis=1)
    R = q_BRHD.shape[1]
    q_BKQD = q_BRHD.reshape(B, R, K, -1, D).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, D)
    o_BKQD = _attend(q_BKQD, k_BKXD, v_BKXD, jnp.tile(seen_BRX, (1, H // K, 1))[:, None], scale)
    o_BRHD = o_BKQD.reshape(B, K, -1, R, D).transpose(0, 3, 1, 2, 4).reshape(B, R, H, D).astype(q_BRHD.dtype)
    out = tuple(jnp.split(o_BRHD, np.cumsum(new)[:-1], axis=1))

    # the ring after: a slot keeps its row, or takes the newest one that falls to it
    row_BS = ring.rows(start_B + count_B)
    first_BS = jnp.stack(first, axis=1)[:, ring.level_S]
    is_new_BS = row_BS >= first_BS
    begin_S = np.cumsum([0, *new])[:-1][ring.level_S]
    source_BS = jnp.where(is_new_BS, S + begin_S + row_BS - first_BS, jnp.arange(S))[:, None, :, None]
    after = (jnp.take_along_axis(x, source_BS, axis=2, mode="clip") for x in (k_BKXD, v_BKXD))
    return out, GistCache(*after, cache.sizes)


def new_rows(spec: GistSpec, tokens: int) -> tuple[int, ...]:
    """Most rows per level that `tokens` more tokens complete, wherever they begin."""
    return tuple(-(-tokens // spec.block**level) for level in range(spec.levels + 1))


class _Ring:
    """Which row every slot holds, and who sees it; static but for positions. `new` rows may stand behind the slots."""

    def __init__(self, spec: GistSpec, sizes: tuple[int, ...], new: tuple[int, ...] = ()):
        levels = np.arange(spec.levels + 1)
        self.spec = spec
        self.level_S = np.concatenate([np.repeat(levels, sizes), np.repeat(levels[: len(new)], new)])
        self._size_S = np.repeat(sizes, sizes)
        self._slot_S = np.concatenate([np.arange(n) for n in sizes])

    def rows(self, tokens_B):
        """[B, S]: the newest row that falls to each slot after `tokens_B` tokens ([B], or [B, S] per slot); below 0 where
        there is none."""
        tokens_BS = tokens_B[:, None] if tokens_B.ndim == 1 else tokens_B
        newest_BS = tokens_BS // self.spec.block**self.level_S - 1
        return newest_BS - (newest_BS - self._slot_S) % self._size_S

    def seen(self, row_BS, level: int, index):
        """[*index.shape, S]: whether row `index` of a level, [B] or [B, N], sees the rows held; negative ones nobody does."""
        ranges = self.spec.key_ranges(level, index)
        first, stop = (jnp.stack(x, axis=-1)[..., self.level_S] for x in zip(*ranges, strict=True))
        row = row_BS if index.ndim == 1 else row_BS[:, None]
        return (row >= jnp.maximum(first, 0)) & (row < stop)


def _attend(q_BKQD, k_BKSD, v_BKSD, seen, scale):
    scale = 1.0 / math.sqrt(q_BKQD.shape[-1]) if scale is None else scale
    s_BKQS = jnp.einsum("bkqd,bksd->bkqs", q_BKQD, k_BKSD, preferred_element_type=jnp.float32)
    p_BKQS = jax.nn.softmax(jnp.where(seen, s_BKQS * scale, NEG), axis=-1).astype(v_BKSD.dtype)
    return jnp.einsum("bkqs,bksd->bkqd", p_BKQS, v_BKSD, preferred_element_type=jnp.float32)


def _write(rows_BKSD, x_BKD, slot_B):
    """One row per sequence, in place inside a loop (two scatter indices each: with one, XLA on CPUs would make a
    dynamic-update-slice of it and fuse that into its readers at the price of copying the whole cache)."""
    B, K, S, D = rows_BKSD.shape
    sequence_B1, halves = jnp.arange(B)[:, None], jnp.arange(2)[None]
    x_B2Kd = x_BKD.reshape(B, K, 2, D // 2).swapaxes(1, 2).astype(rows_BKSD.dtype)
    rows_BKS2d = rows_BKSD.reshape(B, K, S, 2, D // 2)
    return rows_BKS2d.at[sequence_B1, :, slot_B[:, None], halves].set(x_B2Kd, mode="drop").reshape(B, K, S, D)
