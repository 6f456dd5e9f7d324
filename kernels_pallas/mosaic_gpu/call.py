"""The differentiable call: lays rows out for the kernels, runs them, and brings the results back per level.

Shape suffixes as in the kernels: B batch, N rows of the query stream, S rows of keys, H heads, K key heads, D head
size, T tokens, X 1 or B.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.mosaic_gpu import tiles
from kernels_pallas.mosaic_gpu.backward import dkv_pass, dq_pass, sums_of
from kernels_pallas.mosaic_gpu.config import HALF, TILE, Config, default_config
from kernels_pallas.mosaic_gpu.forward import forward
from kernels_pallas.mosaic_gpu.tiles import Keys, Stream
from kernels_pallas.spec import GistSpec


class Setting(NamedTuple):
    """All that is fixed when a program is traced."""

    spec: GistSpec
    tokens: int
    scale: float
    config: Config
    interpret: object

    @property
    def stream(self) -> Stream:
        return Stream(self.spec, self.tokens, TILE)

    @property
    def keys(self) -> Keys:
        return Keys(self.stream.rows, TILE)


def gist_attention_mosaic_gpu(
    q, k, v, spec: GistSpec, segment_ids, scale: float, config: Config | None = None, interpret=False
) -> tuple:
    """Per-level outputs [B, T_l, H, D] in bfloat16. Memory grows with the rows: O(T).

    `interpret` runs the kernels on a CPU: Pallas' `InterpretGPUParams()`.
    """
    D, T = q[0].shape[-1], q[0].shape[1]
    setting = Setting(spec, T, float(scale), config or default_config(D), interpret)
    return _attention(setting, tuple(q), tuple(k), tuple(v), segment_ids)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(setting: Setting, q, k, v, segment_ids):
    return _forward(setting, q, k, v, segment_ids)[0]


def _forward(setting: Setting, q, k, v, segment_ids):
    stream, keys = setting.stream, setting.keys
    q_BNHD, k, v = to_stream(q, stream), key_arrays(k, keys), key_arrays(v, keys)
    ranges = visible(stream, segment_ids)
    o_BNHD, lse_BHN = forward(
        q_BNHD,
        k,
        v,
        by_half(ranges),
        query_visits(setting, ranges),
        keys.starts,
        setting.scale,
        setting.config,
        setting.interpret,
    )
    return from_stream(o_BNHD, stream), (q_BNHD, k, v, o_BNHD, lse_BHN, segment_ids)


def _backward(setting: Setting, saved, do):
    q_BNHD, k, v, o_BNHD, lse_BHN, segment_ids = saved
    stream, keys, config = setting.stream, setting.keys, setting.config
    do_BNHD = to_stream(do, stream)
    sums = sums_of(o_BNHD, do_BNHD, lse_BHN)
    ranges = visible(stream, segment_ids)
    halves = by_half(ranges)
    fixed = setting.scale, config
    dq_BNHD = dq_pass(
        q_BNHD,
        do_BNHD,
        k,
        v,
        sums,
        halves,
        query_visits(setting, ranges),
        keys.starts,
        *fixed,
        setting.interpret,
    )

    limits = tiles.bounds(ranges, HALF, xp(ranges))

    def over_keys(above: bool, dtype, name: str):
        lists = tiles.key_lists(stream, HALF, TILE, above, config.longest)
        if not len(lists.name):
            return [jnp.zeros_like(x[above]) for x in (k, v)]
        visits = batched(lists.visits(limits, TILE, xp(ranges)))
        found = dkv_pass(
            k[above],
            v[above],
            q_BNHD,
            do_BNHD,
            sums,
            halves,
            lists.name,
            visits,
            *fixed,
            dtype,
            name,
            setting.interpret,
        )
        if lists.parts is None:
            return found
        return [
            sum_parts(x, lists.parts).astype(x_in.dtype)
            for x, x_in in zip(found, (k[above], v[above]), strict=True)
        ]

    tokens = over_keys(False, jnp.bfloat16, "gist_dkv_tokens")
    above = over_keys(True, jnp.float32, "gist_dkv_above")
    dk, dv = (from_key_arrays(x, keys) for x in zip(tokens, above, strict=True))
    no_gradient = None if segment_ids is None else np.zeros(segment_ids.shape, jax.dtypes.float0)
    return from_stream(dq_BNHD, stream), dk, dv, no_gradient


_attention.defvjp(_forward, _backward)


# --- Rows in and out ------------------------------------------------------------------------------------


def to_stream(x, stream: Stream) -> jax.Array:
    """Per-level rows in the order of the stream; padding rows are zero, since garbage times 0 may be NaN."""
    return jnp.take(jnp.concatenate(x, axis=1), stream.order(), axis=1, mode="fill", fill_value=0)


def from_stream(x_BNHD, stream: Stream) -> tuple[jax.Array, ...]:
    return tuple(jnp.take(x_BNHD, place, axis=1, mode="clip") for place in stream.places())


def key_arrays(x, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """Rows of tokens, and rows of all levels above end to end, both in whole tiles with finite padding."""
    padded = [_pad(rows, keys.tiles(m) * keys.tile) for m, rows in enumerate(x)]
    above = jnp.concatenate(padded[1:], axis=1)
    return _pad(padded[0], keys.tile), _pad(above, keys.tile)


def from_key_arrays(x, keys: Keys) -> tuple[jax.Array, ...]:
    tokens, above = x
    parts = [above[:, start : start + n] for start, n in zip(keys.starts[1:], keys.rows[1:], strict=True)]
    return tokens[:, : keys.rows[0]], *parts


def sum_parts(x_BSKD, parts: np.ndarray):
    """Rows of every key tile: the sum of its items' parts, in their order."""
    B, _, K, D = x_BSKD.shape
    x = x_BSKD.reshape(B, -1, TILE, K, D)
    total = sum(jnp.take(x, parts[:, i], axis=1, mode="fill", fill_value=0) for i in range(parts.shape[1]))
    return total.reshape(B, -1, K, D)


def _pad(x_BSKD, at_least: int):
    return jnp.pad(x_BSKD, ((0, 0), (0, max(0, at_least - x_BSKD.shape[1])), (0, 0), (0, 0)))


# --- Tables ---------------------------------------------------------------------------------------------


def visible(stream: Stream, segment_ids):
    """[levels, 2, N] in numpy, or [B, levels, 2, N] where documents cut the ranges short."""
    ranges = stream.ranges()
    if segment_ids is None:
        return ranges
    changes_BT = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    token_T = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    begin_BT = jax.lax.cummax(jnp.where(changes_BT, token_T, 0), axis=1)
    begin_BN = begin_BT[:, stream.last_tokens()]
    cut = []
    for m, (first_N, stop_N) in enumerate(ranges):
        first_BN = jnp.maximum(first_N, -(-begin_BN // stream.spec.block**m))
        cut.append(jnp.stack([first_BN, jnp.broadcast_to(stop_N, first_BN.shape)], axis=1))
    return jnp.stack(cut, axis=1)


def query_visits(setting: Setting, ranges) -> tiles.Visits:
    tile = setting.config.key_tile
    lists = tiles.query_lists(setting.stream, TILE, tile)
    return batched(lists.visits(tiles.bounds(ranges, TILE, xp(ranges)), tile, xp(ranges)))


def xp(ranges):
    return np if isinstance(ranges, np.ndarray) else jnp


def by_half(ranges):
    """[X, N / 64, 2 * levels, 64]: what a warpgroup copies in one piece."""
    if ranges.ndim == 3:
        ranges = ranges[None]
    X, levels, _, N = ranges.shape
    return jnp.asarray(ranges).reshape(X, 2 * levels, N // HALF, HALF).transpose(0, 2, 1, 3)


def batched(visits: tiles.Visits) -> tiles.Visits:
    """With a batch axis, of length 1 where the tables are the same for all."""
    static = isinstance(visits.visit, np.ndarray)
    return tiles.Visits(*(jnp.asarray(x[None] if static else x) for x in visits))
