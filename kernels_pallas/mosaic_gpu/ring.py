"""What the passes over queries share: the warpgroup that brings keys and values, and the mask.

Shape suffixes: B batch, S rows of keys, K key heads, D head size, Q 64 queries, C keys of a tile.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic_gpu.compat import ROW, Ops
from kernels_pallas.mosaic_gpu.config import WORKERS
from kernels_pallas.mosaic_gpu.tiles import LEVEL_SHIFT


def slot(step, stages: int):
    return lax.rem(step, jnp.int32(stages))


def level_and_row(name, key_tile: int):
    """Level of a named key tile, and its first row inside that level."""
    return name >> LEVEL_SHIFT, (name & (2**LEVEL_SHIFT - 1)) * key_tile


class Pipe(NamedTuple):
    """The way of keys, or of values, into shared memory."""

    refs: tuple  # [B, S, K, D]: rows of tokens, and of all levels above
    buffer: object  # [stages, key tile, D]
    ready: object  # barriers, one per slot of the buffer
    free: object


def ring_barriers(stages: int) -> tuple:
    """Keys ready, values ready, keys free, values free."""
    ready, free = plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages)
    return ready, ready, free, free


def bring_keys(
    pipes, batch, key_head, name_of, count, starts: tuple[int, ...], key_tile: int, stages: int
) -> None:
    """Fills the ring with one key tile per step, as fast as the other warpgroups free its slots.

    `name_of(step)` names the tile, and `starts` says where each level begins in its array.
    """

    def fetch(step, carry):
        level, row = level_and_row(name_of(step), key_tile)
        for m, start in enumerate(starts):
            if start:
                row = row + jnp.where(level == m, jnp.int32(start), jnp.int32(0))
        here = slot(step, stages)
        for refs, buffer, ready, free in pipes:

            @pl.when(step >= stages)
            def wait(free=free):
                plgpu.barrier_wait(free.at[here])

            for above, ref in enumerate(refs):

                @pl.when((level > 0) == bool(above))
                def copy(ref=ref, buffer=buffer, ready=ready):
                    rows = ref.at[batch, pl.ds(row, key_tile), key_head]
                    plgpu.copy_gmem_to_smem(rows, buffer.at[here], ready.at[here])

        return carry

    lax.fori_loop(0, count, fetch, None)
    drain(count, stages, [free for *_, free in pipes])


def drain(count, stages: int, barriers) -> None:
    """Waits until the last slots are free again: every phase of a barrier has an observer."""

    def wait(step, carry):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[slot(step, stages)])
        return carry

    lax.fori_loop(jnp.maximum(count - stages, 0), count, wait, None)


def mask_keys(ops: Ops, s_QC, ranges_smem, name):
    """Minus infinity where a query does not see a key of the named tile."""
    level, row = level_and_row(name, s_QC.shape[1])
    first_Q = ops.load(ranges_smem.at[2 * level], ROW) - row
    stop_Q = ops.load(ranges_smem.at[2 * level + 1], ROW) - row
    key_QC = ops.index(s_QC.shape, 1)
    first_QC, stop_QC = (lax.broadcast_in_dim(x, s_QC.shape, [0]) for x in (first_Q, stop_Q))
    return jnp.where(
        (key_QC >= first_QC) & (key_QC < stop_QC), s_QC, ops.full(s_QC.shape, -jnp.inf, plgpu.Layout.WGMMA)
    )
