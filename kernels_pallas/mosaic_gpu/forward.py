"""Forward kernel: 128 queries of one head against the tiles of keys that some of them see.

One warpgroup copies keys and values into a ring of shared memory, two compute for 64 queries each: scores by wgmma,
online softmax in base 2 in registers, output by wgmma. While one computes its softmax the other has the matrix unit.
Masks are compared on the tiles that need one: a query sees keys [first, stop) of the tile's level.

Shape suffixes: B batch, R rows of queries, S rows of keys, H heads, K key heads, D head size, L levels, q 64 queries
of a warpgroup, k keys of a tile, J key tiles, N query tiles.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic_gpu.config import COMPUTE, Q_TILE, WARPGROUP_ROWS, Config
from kernels_pallas.mosaic_gpu.ops import ROWS, Ops, matrix, vector
from kernels_pallas.mosaic_gpu.tiles import Tiles

NEG = -1e30  # a finite minus infinity
LOG2E = math.log2(math.e)


def forward(
    q_BRHD, k_BSKD, v_BSKD, bounds, tiles: Tiles, scale: float, config: Config, ops: Ops, masked: bool
):
    """(out [B, R, H, D], log-sum-exp in base 2 [B, H, R]).

    `bounds` int32 [1 or B, R / 64, L + 1, 2, 64] is what each query sees; `masked`: also on tiles called full.
    """
    B, R, H, D = q_BRHD.shape
    G = H // k_BSKD.shape[2]
    levels = bounds.shape[2]
    q, bk, stages = WARPGROUP_ROWS, config.block_k, config.stages
    visits = tiles.keys_of_queries

    def body(q_ref, k_ref, v_ref, bounds_ref, step_ref, full_ref, all_ref, level_ref, base_ref, *rest):
        o_ref, lse_ref, *scratch = rest
        (qo_smem2, k_smem, v_smem, bounds_smem2, lse_smem2), (start_bars, k_bars, v_bars), done, turn = (
            scratch
        )
        k_done, v_done = done
        batch, head, wg = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("wg")
        tile = lax.axis_index("tiles")
        steps, full = all_ref[tile], jnp.int32(0) if masked else full_ref[tile]

        def leave():  # the matrix unit to the other warpgroup
            if not ops.interpreted:
                plgpu.barrier_arrive(turn)

        def take():
            if not ops.interpreted:
                plgpu.barrier_wait(turn)

        def pass_the_turn():
            leave()
            take()

        @pl.when(wg < COMPUTE)
        def compute():
            ops.registers(232, "increase")
            qo_smem, bounds_smem, lse_smem = (x.at[wg] for x in (qo_smem2, bounds_smem2, lse_smem2))
            begin = tile * Q_TILE + wg * q
            bounds_of = batch if bounds.shape[0] > 1 else 0
            plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(begin, q), head], qo_smem, start_bars.at[wg])
            plgpu.copy_gmem_to_smem(
                bounds_ref.at[bounds_of, tile * COMPUTE + wg], bounds_smem, start_bars.at[wg]
            )
            plgpu.barrier_wait(start_bars.at[wg])

            def step(i, carry, mask: bool):
                acc_qD, top_q, sum_q = carry
                slot = lax.rem(i, stages)
                plgpu.barrier_wait(k_bars.at[slot])
                s_qk = ops.product_nt(qo_smem, k_smem.at[slot]) * (scale * LOG2E)
                pass_the_turn()
                plgpu.barrier_arrive(k_done.at[slot])
                if mask:
                    key_tile = step_ref[tile, i]
                    level = level_ref[key_tile]
                    key_qk = base_ref[key_tile] + ops.iota((q, bk), 1)
                    first_q, stop_q = (ops.load(bounds_smem.at[level, end], ROWS) for end in (0, 1))
                    seen_qk = (key_qk >= ops.rows(first_q, (q, bk))) & (key_qk < ops.rows(stop_q, (q, bk)))
                    s_qk = jnp.where(seen_qk, s_qk, NEG)
                new_q = jnp.maximum(top_q, s_qk.max(axis=1))
                # a query that has seen nothing yet counts hidden keys; the first key it sees wipes them out
                shrink_q = jnp.exp2(top_q - new_q)
                p_qk = jnp.exp2(s_qk - ops.rows(new_q, (q, bk)))
                sum_q = sum_q * shrink_q + p_qk.sum(axis=1)
                acc_qD = acc_qD * ops.rows(shrink_q, (q, D))
                p16_qk = p_qk.astype(jnp.bfloat16)
                acc_qD, new_q, sum_q, p16_qk = lax.optimization_barrier((acc_qD, new_q, sum_q, p16_qk))
                leave()
                plgpu.barrier_wait(v_bars.at[slot])
                take()
                acc_qD = ops.add_product(acc_qD, p16_qk, v_smem.at[slot])
                plgpu.barrier_arrive(v_done.at[slot])
                return acc_qD, new_q, sum_q

            carry = ops.full((q, D), 0.0), ops.full((q,), NEG, layout=ROWS), ops.full((q,), 0.0, layout=ROWS)
            pl.when(wg == 1)(pass_the_turn)
            carry = lax.fori_loop(0, full, lambda i, c: step(i, c, mask=False), carry)
            acc_qD, top_q, sum_q = lax.fori_loop(full, steps, lambda i, c: step(i, c, mask=True), carry)
            pl.when(wg == 0)(pass_the_turn)

            qo_smem[...] = (acc_qD / ops.rows(sum_q, (q, D))).astype(jnp.bfloat16)
            lse_smem[...] = top_q + jnp.log(sum_q) * LOG2E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(qo_smem, o_ref.at[batch, pl.ds(begin, q), head])
            plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[batch, head, pl.ds(begin, q)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == COMPUTE)
        def load():
            ops.registers(40, "decrease")
            key_head = lax.div(head, jnp.int32(G))
            pairs = ((k_ref, k_smem, k_bars, k_done), (v_ref, v_smem, v_bars, v_done))

            @pl.loop(0, steps)
            def _(i):
                slot = lax.rem(i, stages)
                rows = batch, pl.ds(step_ref[tile, i] * bk, bk), key_head
                for ref, smem, bars, free in pairs:
                    pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(ref.at[rows], smem.at[slot], bars.at[slot])

            ops.drain(steps, stages, k_done, v_done)

    run = ops.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q_BRHD.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((B, H, R), jnp.float32),
        ),
        scratch_types=(
            (
                matrix(COMPUTE, q, D),
                matrix(stages, bk, D),
                matrix(stages, bk, D),
                vector(COMPUTE, levels, 2, q, dtype=jnp.int32),
                vector(COMPUTE, q),
            ),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
            ),
            (plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),) * 2,
            plgpu.Barrier(num_arrivals=COMPUTE),
        ),
        grid={"heads": H, "tiles": R // Q_TILE, "batch": B},
        name="gist_forward",
    )
    tables = visits.step_NS, visits.full_N, visits.all_N, tiles.level_J, tiles.base_J
    return run(q_BRHD, k_BSKD, v_BSKD, bounds, *(jnp.asarray(x) for x in tables))
