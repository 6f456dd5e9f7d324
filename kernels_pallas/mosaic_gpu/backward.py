"""Backward kernels: one pass over query tiles for dq, one over key tiles for dk and dv. No atomics: bits repeat.

Both recompute probabilities from the log-sum-exps. The pass over keys holds 128 keys, 64 per warpgroup, and works on
transposed scores; it loops over the query heads of a key head, so that grouped heads need no sum afterwards. Rows
above the tokens are seen by very many queries: their visits are cut into items that run side by side and leave
float32 parts, summed in a fixed order.

Shape suffixes: B batch, N rows of the query stream, S rows of keys, H heads, K key heads, D head size, Q 64 queries,
C keys of a tile (64 per warpgroup in the pass over keys), R first and stop per level, X 1 or B.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic_gpu.compat import COLUMN, ROW, Ops, kernel
from kernels_pallas.mosaic_gpu.config import HALF, TILE, WORKERS, Config, dkv_buffers, dq_buffers
from kernels_pallas.mosaic_gpu.forward import LOG2_E
from kernels_pallas.mosaic_gpu.ring import Pipe, bring_keys, drain, mask_keys, ring_barriers, slot
from kernels_pallas.mosaic_gpu.tiles import Visits


def sums_of(o_BNHD, do_BNHD, lse_BHN):
    """[B, H, N / 64, 2, 64]: log-sum-exps, and the sums of output times gradient."""
    delta_BHN = jnp.einsum("bnhd,bnhd->bhn", o_BNHD, do_BNHD, preferred_element_type=jnp.float32)
    B, H, N = lse_BHN.shape
    both = (x.reshape(B, H, N // HALF, HALF) for x in (lse_BHN, delta_BHN))
    return jnp.stack(list(both), axis=3)


def dq_pass(
    q_BNHD, do_BNHD, k, v, sums, ranges_XNRQ, visits: Visits, starts, scale, config: Config, interpret
):
    """dq_BNHD in bfloat16; arguments as in `forward`."""
    B, N, H, D = q_BNHD.shape
    group, tile, stages = H // k[0].shape[2], config.key_tile, config.dq_stages
    shared = visits.visit.shape[0] == 1
    factor = scale * LOG2_E
    ops = Ops(bool(interpret))

    def body(
        q_ref,
        do_ref,
        k0_ref,
        k1_ref,
        v0_ref,
        v1_ref,
        sums_ref,
        ranges_ref,
        visit_ref,
        full_ref,
        count_ref,
        *rest,
    ):
        dq_ref, smem, loaded, k_ready, v_ready, k_free, v_free = rest
        batch, head, block = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("tiles")
        wg = lax.axis_index("wg")
        x = jnp.int32(0) if shared else batch
        full, count = full_ref[x, block], count_ref[x, block]

        @pl.when(wg < WORKERS)
        def compute():
            ops.set_registers(240, "increase")
            q_smem, do_smem, ranges_smem, sums_smem = (smem[n].at[wg] for n in ("q", "do", "ranges", "sums"))
            rows, half = pl.ds(block * TILE + wg * HALF, HALF), block * WORKERS + wg
            plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem, loaded.at[wg])
            plgpu.copy_gmem_to_smem(do_ref.at[batch, rows, head], do_smem, loaded.at[wg])
            plgpu.copy_gmem_to_smem(ranges_ref.at[x, half], ranges_smem, loaded.at[wg])
            plgpu.copy_gmem_to_smem(sums_ref.at[batch, head, half], sums_smem, loaded.at[wg])
            plgpu.barrier_wait(loaded.at[wg])
            lse_Q, delta_Q = (ops.load(sums_smem.at[i], ROW) for i in (0, 1))

            def visit(masked: bool, step, dq_QD):
                here = slot(step, stages)
                k_smem, v_smem = smem["k"].at[here], smem["v"].at[here]
                plgpu.barrier_wait(k_ready.at[here])
                plgpu.barrier_wait(v_ready.at[here])

                def probabilities(s_QC):
                    if masked:
                        s_QC = mask_keys(ops, s_QC, ranges_smem, visit_ref[x, block, step])
                    return jnp.exp2(s_QC * factor - lax.broadcast_in_dim(lse_Q, s_QC.shape, [0]))

                # a mask on top of three accumulators of 64 by 128 would not fit in the registers
                p_QC, dp_QC = ops.two_products_t(
                    q_smem, k_smem, do_smem, v_smem, probabilities, overlap=tile * D < 128 * 128 or not masked
                )
                plgpu.barrier_arrive(v_free.at[here])
                ds_QC = p_QC * (dp_QC - lax.broadcast_in_dim(delta_Q, dp_QC.shape, [0]))
                dq_QD = ops.add_product(dq_QD, ds_QC.astype(jnp.bfloat16), k_smem)
                plgpu.barrier_arrive(k_free.at[here])
                return dq_QD

            dq_QD = ops.full((HALF, D), 0.0, plgpu.Layout.WGMMA)
            dq_QD = lax.fori_loop(0, full, lambda i, c: visit(False, i, c), dq_QD)
            dq_QD = lax.fori_loop(full, count, lambda i, c: visit(True, i, c), dq_QD)
            q_smem[...] = (dq_QD * scale).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[batch, rows, head])
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

    buffers = dq_buffers(config, D, ranges_XNRQ.shape[2] // 2)
    scratch = (
        {name: buffer.allocate() for name, buffer in buffers.items()},
        plgpu.Barrier(num_arrivals=4, num_barriers=WORKERS),
        *ring_barriers(stages),
    )
    run = kernel(
        body,
        out=(jax.ShapeDtypeStruct(q_BNHD.shape, jnp.bfloat16),),
        scratch=scratch,
        grid={"heads": H, "tiles": N // TILE, "batch": B},
        name="gist_dq",
        interpret=interpret,
    )
    return run(q_BNHD, do_BNHD, *k, *v, sums, ranges_XNRQ, *visits)[0]


def dkv_pass(
    k_BSKD,
    v_BSKD,
    q_BNHD,
    do_BNHD,
    sums,
    ranges_XNRQ,
    item_names,
    visits: Visits,
    scale,
    config,
    dtype,
    name,
    interpret,
):
    """(dk, dv) [B, items * 128, K, D] in `dtype`: the gradients that the visits of each item give its 128 keys.

    `item_names` int32 [items, 3]: first row of the keys in their array, their level, and first row in the level.
    """
    (B, _, H, D), K = q_BNHD.shape, k_BSKD.shape[2]
    group, stages, items = H // K, config.dkv_stages, len(item_names)
    shared = visits.visit.shape[0] == 1
    factor = scale * LOG2_E
    ops = Ops(bool(interpret))

    def body(
        k_ref, v_ref, q_ref, do_ref, sums_ref, ranges_ref, names_ref, visit_ref, full_ref, count_ref, *rest
    ):
        dk_ref, dv_ref, smem, loaded, ready, free = rest
        batch, key_head, item = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("items")
        wg = lax.axis_index("wg")
        x = jnp.int32(0) if shared else batch
        full, count = full_ref[x, item], count_ref[x, item]

        @pl.when(wg < WORKERS)
        def compute():
            ops.set_registers(240, "increase")
            k_smem, v_smem = smem["k"].at[wg], smem["v"].at[wg]
            rows = pl.ds(names_ref[item, 0] + wg * HALF, HALF)
            plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, key_head], k_smem, loaded.at[wg])
            plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, key_head], v_smem, loaded.at[wg])
            plgpu.barrier_wait(loaded.at[wg])
            first_row = names_ref[item, 2] + wg * HALF

            def visit(masked: bool, member, i, carry):
                here = slot(member * count + i, stages)
                q_smem, do_smem, ranges_smem, sums_smem = (
                    smem[n].at[here] for n in ("q", "do", "ranges", "sums")
                )
                plgpu.barrier_wait(ready.at[here])

                # a number per column costs 16 registers: each is loaded where it is used
                def column(ref):
                    return lax.broadcast_in_dim(ops.load(ref, COLUMN), (HALF, HALF), [1])

                def probabilities(s_CQ):
                    if masked:
                        key_CQ = ops.index(s_CQ.shape, 0) + first_row
                        nothing = ops.full(s_CQ.shape, -jnp.inf, plgpu.Layout.WGMMA)
                        s_CQ = jnp.where(key_CQ >= column(ranges_smem.at[0]), s_CQ, nothing)
                        s_CQ = jnp.where(key_CQ < column(ranges_smem.at[1]), s_CQ, nothing)
                    return jnp.exp2(s_CQ * factor - column(sums_smem.at[0]))

                p_CQ, dp_CQ = ops.two_products_t(k_smem, q_smem, v_smem, do_smem, probabilities)

                def ds():
                    return (p_CQ * (dp_CQ - column(sums_smem.at[1]))).astype(jnp.bfloat16)

                dv_CD, dk_CD = ops.add_two_products(carry, p_CQ.astype(jnp.bfloat16), do_smem, ds, q_smem)
                # ordinary loads read the slot: order them before the copy that fills it next
                plgpu.commit_smem()
                plgpu.barrier_arrive(free.at[here])
                return dv_CD, dk_CD

            def head(member, carry):
                carry = lax.fori_loop(0, full, lambda i, c: visit(False, member, i, c), carry)
                return lax.fori_loop(full, count, lambda i, c: visit(True, member, i, c), carry)

            zeros = ops.full((HALF, D), 0.0, plgpu.Layout.WGMMA)
            dv_CD, dk_CD = lax.fori_loop(0, group, head, (zeros, zeros))
            out_rows = pl.ds(item * TILE + wg * HALF, HALF)
            for ref, buffer, value in ((dk_ref, "k", dk_CD * scale), (dv_ref, "v", dv_CD)):
                staged = smem[buffer if dtype == jnp.bfloat16 else "out"].at[wg]
                staged[...] = value.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged, ref.at[batch, out_rows, key_head])
                plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WORKERS)
        def move():
            ops.set_registers(24, "decrease")
            level = names_ref[item, 1]

            def fetch(step, carry):
                here = slot(step, stages)
                head = key_head * group + lax.div(step, count)
                half = visit_ref[x, item, lax.rem(step, count)]

                @pl.when(step >= stages)
                def wait():
                    plgpu.barrier_wait(free.at[here])

                queries = pl.ds(half * HALF, HALF)
                for ref, to in (
                    (q_ref.at[batch, queries, head], "q"),
                    (do_ref.at[batch, queries, head], "do"),
                    (ranges_ref.at[x, half, pl.ds(2 * level, 2)], "ranges"),
                    (sums_ref.at[batch, head, half], "sums"),
                ):
                    plgpu.copy_gmem_to_smem(ref, smem[to].at[here], ready.at[here])
                return carry

            lax.fori_loop(0, group * count, fetch, None)
            drain(group * count, stages, [free])

    scratch = (
        {name: buffer.allocate() for name, buffer in dkv_buffers(config, D, dtype).items()},
        plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS),
        plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
    )
    run = kernel(
        body,
        out=(jax.ShapeDtypeStruct((B, items * TILE, K, D), dtype),) * 2,
        scratch=scratch,
        grid={"heads": K, "items": items, "batch": B},
        name=name,
        interpret=interpret,
    )
    return run(k_BSKD, v_BSKD, q_BNHD, do_BNHD, sums, ranges_XNRQ, jnp.asarray(item_names), *visits)
