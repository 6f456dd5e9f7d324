"""Decode kernel: one row per sequence over the slots of its ring, split over the keys.

A block of threads, one warpgroup, takes a tile of keys of one key head and all query heads that share it. A matrix
instruction has 64 rows, of which they fill a few: memory bounds this pass, not products. It leaves an output that is
not normalised, the largest score and the sum of the weights, in base 2, and XLA merges the parts.

Shape suffixes: B batch, K key heads, G query heads of a key head (padded to 8), S slots, P parts, C keys of a part,
D head size, Q 64 rows.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic_gpu.compat import COLUMN, ROW, Ops, kernel
from kernels_pallas.mosaic_gpu.config import DECODE_TILE, HALF, decode_buffers
from kernels_pallas.mosaic_gpu.forward import FLOOR, LOG2_E

SUBLANES = 8  # rows that a tiled buffer is cut into


# a program of its own: all layers and levels of a step share one that is traced and lowered once
@partial(jax.jit, static_argnames=("scale", "interpret"))
def decode_mosaic_gpu(q_BKGD, k_BKSD, v_BKSD, seen_BS, scale: float | None = None, *, interpret=False):
    """Attention float32 [B, K, G, D] of bfloat16 queries over the slots that are seen; zero where none is."""
    B, K, G, D = q_BKGD.shape
    if G > HALF:
        raise ValueError(
            f"gist_decode by mosaic_gpu: {G} query heads share a key head; its kernel takes {HALF}."
        )
    tile, rows = DECODE_TILE, -(-G // SUBLANES) * SUBLANES
    q_BKGD = _padded(q_BKGD, rows)
    S = max(tile, -(-k_BKSD.shape[2] // SUBLANES) * SUBLANES)
    k_BKSD, v_BKSD = (_padded(x, S) for x in (k_BKSD, v_BKSD))  # as they are, but for very small caches
    parts = -(-S // tile)
    # the last part begins early enough to be whole, and leaves what it repeats to the one before
    begin_P1 = jnp.minimum(jnp.arange(parts) * tile, S - tile)[:, None]
    slot_PC = begin_P1 + jnp.arange(tile)
    mine_PC = slot_PC >= jnp.arange(parts)[:, None] * tile
    seen_BS = jnp.pad(seen_BS, ((0, 0), (0, S - seen_BS.shape[1])))
    bias_BPC = jnp.where(seen_BS[:, slot_PC] & mine_PC, 0.0, -jnp.inf).astype(jnp.float32)
    factor = (1.0 / math.sqrt(D) if scale is None else scale) * LOG2_E
    ops = Ops(bool(interpret))

    def body(q_ref, k_ref, v_ref, bias_ref, o_ref, top_ref, sum_ref, smem, loaded, v_ready):
        part, head, batch = (lax.axis_index(name) for name in ("parts", "heads", "batch"))
        keys = pl.ds(jnp.minimum(part * tile, S - tile), tile)
        some = pl.ds(0, rows)  # the others hold anything, and stay among themselves
        plgpu.copy_gmem_to_smem(q_ref.at[batch, head], smem["q"].at[some], loaded)
        plgpu.copy_gmem_to_smem(k_ref.at[batch, head, keys], smem["k"], loaded)
        plgpu.copy_gmem_to_smem(bias_ref.at[batch, part], smem["bias"], loaded)
        plgpu.copy_gmem_to_smem(v_ref.at[batch, head, keys], smem["v"], v_ready)
        plgpu.barrier_wait(loaded)
        s_QC = ops.product_t(smem["q"], smem["k"]) * factor
        s_QC += lax.broadcast_in_dim(ops.load(smem["bias"], COLUMN), s_QC.shape, [1])
        top_Q = jnp.maximum(s_QC.max(axis=1), ops.full((HALF,), FLOOR, ROW))
        p_QC = jnp.exp2(s_QC - lax.broadcast_in_dim(top_Q, s_QC.shape, [0]))
        smem["top"][...] = top_Q
        smem["sum"][...] = p_QC.sum(axis=1)
        plgpu.barrier_wait(v_ready)
        nothing_QD = ops.full((HALF, D), 0.0, plgpu.Layout.WGMMA)
        smem["o"][...] = ops.add_product(nothing_QD, p_QC.astype(jnp.bfloat16), smem["v"])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["o"].at[some], o_ref.at[batch, head, part])
        plgpu.copy_smem_to_gmem(smem["top"], top_ref.at[batch, head, part])
        plgpu.copy_smem_to_gmem(smem["sum"], sum_ref.at[batch, head, part])
        plgpu.wait_smem_to_gmem(0)

    number = jax.ShapeDtypeStruct((B, K, parts, HALF), jnp.float32)
    run = kernel(
        body,
        out=(jax.ShapeDtypeStruct((B, K, parts, rows, D), jnp.float32), number, number),
        scratch=(
            {name: buffer.allocate() for name, buffer in decode_buffers(D).items()},
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(),
        ),
        grid={"parts": parts, "heads": K, "batch": B},
        warpgroups=1,
        name="gist_decode",
        interpret=interpret,
    )
    o_BKPGD, *numbers = run(q_BKGD, k_BKSD, v_BKSD, bias_BPC)
    top_BKPG, sum_BKPG = (x[..., :rows] for x in numbers)
    weight_BKPG = jnp.exp2(top_BKPG - top_BKPG.max(axis=2, keepdims=True))
    total_BKG1 = (weight_BKPG * sum_BKPG).sum(axis=2)[..., None]
    o_BKGD = (weight_BKPG[..., None] * o_BKPGD).sum(axis=2)
    return jnp.where(total_BKG1 > 0, o_BKGD / jnp.where(total_BKG1 > 0, total_BKG1, 1.0), 0.0)[:, :, :G]


def _padded(x_BKSD, slots: int):
    return jnp.pad(x_BKSD, ((0, 0), (0, 0), (0, slots - x_BKSD.shape[2]), (0, 0)))
