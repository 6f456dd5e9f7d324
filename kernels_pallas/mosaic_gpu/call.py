"""The call of the Mosaic GPU kernels: rows into their order and padding, forward and backward, and out again."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.mosaic_gpu import backward, config, tiles
from kernels_pallas.mosaic_gpu.config import WARPGROUP_ROWS, Config
from kernels_pallas.mosaic_gpu.forward import forward
from kernels_pallas.mosaic_gpu.ops import Ops
from kernels_pallas.spec import GistSpec


def refusal(spec: GistSpec, dtype, head_dim: int, capability: float | None) -> str | None:
    """Why the kernels do not run this, or None. `capability` is the device's, None where it is no NVIDIA GPU."""
    if capability is None:
        return "this machine has no NVIDIA GPU"
    if not 9.0 <= capability < 10.0:
        return f"the kernels are Hopper's (compute capability 9.0) and this GPU has {capability}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"Hopper multiplies {jnp.dtype(dtype).name} as TF32; the kernels take bfloat16 only"
    if head_dim not in config.HEAD_DIMS:
        return f"head size {head_dim} is not one of {', '.join(map(str, config.HEAD_DIMS))}"
    needed = max(config.shared_memory(config.default(head_dim), head_dim, spec.levels).values())
    if needed > config.SHARED_MEMORY - 4096:
        return f"{spec.levels} levels need {needed} bytes of shared memory"
    return None


def gist_attention_mosaic(
    q, k, v, spec: GistSpec, segment_ids, scale: float, cfg=None, interpreted=None
) -> tuple:
    """Per-level outputs in bfloat16. `interpreted`: parameters of interpret mode, for tests on CPUs."""
    T, D = q[0].shape[1], q[0].shape[-1]
    cfg = cfg or config.default(D)
    plan = tiles.plan(spec, T, cfg)
    q_BRHD = jnp.concatenate(q, axis=1)[:, np.maximum(plan.query_R, 0)]
    keys, values = (_pad_levels(x, plan) for x in (k, v))
    bounds = _bounds(plan, spec, segment_ids)
    o_BRHD = _attention(
        q_BRHD, keys, values, bounds, spec, T, scale, cfg, interpreted, segment_ids is not None
    )
    return tuple(jnp.split(o_BRHD[:, plan.place], np.cumsum(spec.rows(T))[:-1], axis=1))


def _pad_levels(levels, plan: tiles.Tiles):
    """[B, S, K, D]: the levels one behind the other, zeros up to the next tile."""
    padded = [
        jnp.pad(x, ((0, 0), (0, end - begin - x.shape[1]), (0, 0), (0, 0)))
        for x, begin, end in zip(levels, plan.offsets[:-1], plan.offsets[1:], strict=True)
    ]
    return jnp.concatenate(padded, axis=1)


def _bounds(plan: tiles.Tiles, spec: GistSpec, segment_ids):
    """int32 [1 or B, R / 64, L + 1, 2, 64]: the rows of each level that each query sees, of its own document."""
    first_BLR, stop_BLR = (jnp.asarray(x)[None] for x in (plan.first_LR, plan.stop_LR))
    if segment_ids is not None:
        T = segment_ids.shape[1]
        begins_BT = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        start_BT = jax.lax.cummax(jnp.where(begins_BT, jnp.arange(T), 0), axis=1)
        end_r = np.concatenate([(np.arange(n) + 1) * spec.block**m - 1 for m, n in enumerate(spec.rows(T))])
        start_BR = start_BT[:, end_r[np.maximum(plan.query_R, 0)]]
        spans_L = spec.block ** np.arange(spec.levels + 1)
        first_BLR = jnp.maximum(first_BLR, start_BR[:, None] // spans_L[:, None])
        stop_BLR = jnp.broadcast_to(stop_BLR, first_BLR.shape)
    bounds_BLxR = jnp.stack([first_BLR, stop_BLR], axis=2).astype(jnp.int32)
    B, L, _, R = bounds_BLxR.shape
    return bounds_BLxR.reshape(B, L, 2, R // WARPGROUP_ROWS, WARPGROUP_ROWS).transpose(0, 3, 1, 2, 4)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8, 9))
def _attention(q_BRHD, k_BSKD, v_BSKD, bounds, spec, T, scale, cfg: Config, interpreted, masked):
    return _forward(q_BRHD, k_BSKD, v_BSKD, bounds, spec, T, scale, cfg, interpreted, masked)[0]


def _forward(q_BRHD, k_BSKD, v_BSKD, bounds, spec, T, scale, cfg, interpreted, masked):
    plan = tiles.plan(spec, T, cfg)
    o_BRHD, lse_BHR = forward(q_BRHD, k_BSKD, v_BSKD, bounds, plan, scale, cfg, Ops(interpreted), masked)
    return o_BRHD, (q_BRHD, k_BSKD, v_BSKD, bounds, o_BRHD, lse_BHR)


def _backward(spec, T, scale, cfg, interpreted, masked, saved, do_BRHD):
    q_BRHD, k_BSKD, v_BSKD, bounds, o_BRHD, lse_BHR = saved
    delta_BHR = jnp.einsum("brhd,brhd->bhr", do_BRHD, o_BRHD, preferred_element_type=jnp.float32)
    arrays = q_BRHD, k_BSKD, v_BSKD, do_BRHD.astype(jnp.bfloat16), lse_BHR, delta_BHR, bounds
    options = tiles.plan(spec, T, cfg), scale, cfg, Ops(interpreted), masked
    return backward.dq(*arrays, *options), *backward.dkv(*arrays, *options), None


_attention.defvjp(_forward, _backward)
