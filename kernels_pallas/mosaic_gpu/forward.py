"""Forward kernel: outputs and log-sum-exps of one query tile over the key tiles that it visits.

Two warpgroups hold 64 queries each and run one online softmax, in base 2, over all levels; a third brings keys and
values through a ring of buffers. While one of the two multiplies, the other takes its softmax (`ping_pong`). Tiles
that every query sees whole come first and skip the mask.

Shape suffixes: B batch, N rows of the query stream, S rows of keys, H heads, K key heads, D head size, Q 64 queries,
C keys of a tile, R first and stop per level, X 1 or B (tables are shared by the batch where there are no documents).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic_gpu.compat import ROW, Ops, kernel
from kernels_pallas.mosaic_gpu.config import HALF, TILE, WORKERS, Config, forward_buffers
from kernels_pallas.mosaic_gpu.ring import Pipe, bring_keys, mask_keys, ring_barriers, slot
from kernels_pallas.mosaic_gpu.tiles import Visits

FLOOR = -1e20  # below every score: a row that has seen nothing keeps finite numbers
EMPTY = 1e30  # log-sum-exp of a row that sees nothing: its probabilities are 0 in the backward pass
LOG2_E = math.log2(math.e)


def forward(q_BNHD, k, v, ranges_XNRQ, visits: Visits, starts, scale: float, config: Config, interpret):
    """(o_BNHD in bfloat16, lse_BHN in float32 and base 2).

    k, v: pairs of [B, S, K, D], rows of tokens and of all levels above; `starts` says where each level begins.
    """
    B, N, H, D = q_BNHD.shape
    group, tile, stages = H // k[0].shape[2], config.key_tile, config.forward_stages
    shared = visits.visit.shape[0] == 1
    factor = scale * LOG2_E
    ping_pong = config.ping_pong and not interpret  # a schedule, without effect on results
    ops = Ops(bool(interpret))

    def body(q_ref, k0_ref, k1_ref, v0_ref, v1_ref, ranges_ref, visit_ref, full_ref, count_ref, *rest):
        o_ref, lse_ref, smem, loaded, k_ready, v_ready, k_free, v_free, turn = rest
        batch, head, block = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("tiles")
        wg = lax.axis_index("wg")
        x = jnp.int32(0) if shared else batch
        full, count = full_ref[x, block], count_ref[x, block]

        def hand_over():
            if ping_pong:
                plgpu.barrier_arrive(turn)

        def await_turn():
            if ping_pong:
                plgpu.barrier_wait(turn)

        def swap():
            hand_over()
            await_turn()

        @pl.when(wg < WORKERS)
        def compute():
            ops.set_registers(240, "increase")
            q_smem, ranges_smem, lse_smem = (smem[name].at[wg] for name in ("q", "ranges", "lse"))
            rows = pl.ds(block * TILE + wg * HALF, HALF)
            plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem, loaded.at[wg])
            plgpu.copy_gmem_to_smem(ranges_ref.at[x, block * WORKERS + wg], ranges_smem, loaded.at[wg])
            plgpu.barrier_wait(loaded.at[wg])

            @pl.when(count > 0)
            def first_keys():
                plgpu.barrier_wait(k_ready.at[0])

            pl.when(wg == 1)(swap)

            def visit(masked: bool, step, carry):
                acc_QD, top_Q, sum_Q = carry
                here = slot(step, stages)
                s_QC = ops.product_t(q_smem, smem["k"].at[here], issued=swap)
                plgpu.barrier_arrive(k_free.at[here])
                if masked:
                    s_QC = mask_keys(ops, s_QC, ranges_smem, visit_ref[x, block, step])
                higher_Q = jnp.maximum(top_Q, s_QC.max(axis=1) * factor)
                decay_Q = jnp.exp2(top_Q - higher_Q)
                p_QC = jnp.exp2(s_QC * factor - lax.broadcast_in_dim(higher_Q, s_QC.shape, [0]))
                acc_QD *= lax.broadcast_in_dim(decay_Q, acc_QD.shape, [0])
                sum_Q = sum_Q * decay_Q + p_QC.sum(axis=1)
                p16_QC = p_QC.astype(jnp.bfloat16)
                # nothing of the softmax may drift behind the hand-over
                acc_QD, sum_Q, higher_Q, p16_QC = lax.optimization_barrier((acc_QD, sum_Q, higher_Q, p16_QC))
                hand_over()
                plgpu.barrier_wait(v_ready.at[here])
                await_turn()

                def next_keys():
                    @pl.when(step + 1 < count)
                    def wait():
                        plgpu.barrier_wait(k_ready.at[slot(step + 1, stages)])

                acc_QD = ops.add_product(acc_QD, p16_QC, smem["v"].at[here], issued=next_keys)
                plgpu.barrier_arrive(v_free.at[here])
                return acc_QD, higher_Q, sum_Q

            carry = (
                ops.full((HALF, D), 0.0, plgpu.Layout.WGMMA),
                ops.full((HALF,), FLOOR, ROW),
                ops.full((HALF,), 0.0, ROW),
            )
            carry = lax.fori_loop(0, full, lambda i, c: visit(False, i, c), carry)
            acc_QD, top_Q, sum_Q = lax.fori_loop(full, count, lambda i, c: visit(True, i, c), carry)
            pl.when(wg == 0)(swap)

            some_Q = sum_Q > 0.0
            sum_Q = jnp.where(some_Q, sum_Q, jnp.full_like(sum_Q, 1.0))
            o_QD = acc_QD / lax.broadcast_in_dim(sum_Q, acc_QD.shape, [0])
            q_smem[...] = o_QD.astype(jnp.bfloat16)
            lse_smem[...] = jnp.where(some_Q, top_Q + jnp.log(sum_Q) * LOG2_E, jnp.full_like(sum_Q, EMPTY))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, o_ref.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WORKERS)
        def move():
            ops.set_registers(24, "decrease")
            key_head = lax.div(head, jnp.int32(group))
            pipes = (
                Pipe((k0_ref, k1_ref), smem["k"], k_ready, k_free),
                Pipe((v0_ref, v1_ref), smem["v"], v_ready, v_free),
            )
            bring_keys(
                pipes, batch, key_head, lambda step: visit_ref[x, block, step], count, starts, tile, stages
            )

    buffers = forward_buffers(config, D, ranges_XNRQ.shape[2] // 2)
    scratch = (
        {name: buffer.allocate() for name, buffer in buffers.items()},
        plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS),
        *ring_barriers(stages),
        plgpu.Barrier(num_arrivals=WORKERS),
    )
    run = kernel(
        body,
        out=(jax.ShapeDtypeStruct(q_BNHD.shape, jnp.bfloat16), jax.ShapeDtypeStruct((B, H, N), jnp.float32)),
        scratch=scratch,
        grid={"heads": H, "tiles": N // TILE, "batch": B},
        name="gist_forward",
        interpret=interpret,
    )
    return run(q_BNHD, *k, *v, ranges_XNRQ, *visits)
