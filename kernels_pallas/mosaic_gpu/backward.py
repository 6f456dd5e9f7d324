"""Backward kernels: dq by tiles of queries, dk and dv by tiles of keys. No atomics, so two runs give the same bits.

Both recompute the probabilities from the log-sum-exp of the forward pass. `dq` visits the tiles of keys that the
forward pass visits; `dkv` holds 128 keys of one key head and walks over the tiles of 64 queries that see some of
them, of all the query heads that share them. Keys of the last level are seen by nearly every later query: their
tiles begin first. Shape suffixes as in `forward`; c 64 keys of a warpgroup, C tiles of 128 keys.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic_gpu.config import COMPUTE, Q_TILE, WARPGROUP_ROWS, Config
from kernels_pallas.mosaic_gpu.forward import LOG2E
from kernels_pallas.mosaic_gpu.ops import COLUMNS, ROWS, matrix, vector
from kernels_pallas.mosaic_gpu.tiles import Tiles


def dq(q_BRHD, k_BSKD, v_BSKD, do_BRHD, lse_BHR, delta_BHR, bounds, tiles, scale, config, ops, masked):
    """dq [B, R, H, D] in bfloat16; arguments as in `forward`, delta is the row sum of do * out."""
    B, R, H, D = q_BRHD.shape
    G = H // k_BSKD.shape[2]
    levels = bounds.shape[2]
    q, bk, stages = WARPGROUP_ROWS, config.block_k, config.stages
    visits = tiles.keys_of_queries

    def body(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, bounds_ref, *rest):
        step_ref, full_ref, all_ref, level_ref, base_ref, dq_ref, *scratch = rest
        (
            (q_smem2, do_smem2, k_smem, v_smem, numbers_smem2, bounds_smem2),
            (start_bars, k_bars, v_bars),
            done,
        ) = scratch
        k_done, v_done = done
        batch, head, wg = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("wg")
        tile = lax.axis_index("tiles")
        steps, full = all_ref[tile], jnp.int32(0) if masked else full_ref[tile]

        @pl.when(wg < COMPUTE)
        def compute():
            ops.registers(232, "increase")
            q_smem, do_smem, numbers_smem, bounds_smem = (
                x.at[wg] for x in (q_smem2, do_smem2, numbers_smem2, bounds_smem2)
            )
            begin = tile * Q_TILE + wg * q
            bounds_of = batch if bounds.shape[0] > 1 else 0
            rows = batch, pl.ds(begin, q), head
            bar = start_bars.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[rows], q_smem, bar)
            plgpu.copy_gmem_to_smem(do_ref.at[rows], do_smem, bar)
            for i, ref in enumerate((lse_ref, delta_ref)):
                plgpu.copy_gmem_to_smem(ref.at[batch, head, pl.ds(begin, q)], numbers_smem.at[i], bar)
            plgpu.copy_gmem_to_smem(bounds_ref.at[bounds_of, tile * COMPUTE + wg], bounds_smem, bar)
            plgpu.barrier_wait(bar)
            lse_q, delta_q = (ops.load(numbers_smem.at[i], ROWS) for i in (0, 1))

            def step(i, dq_qD, mask: bool):
                slot = lax.rem(i, stages)
                plgpu.barrier_wait(k_bars.at[slot])
                s_qk = ops.product_nt(q_smem, k_smem.at[slot]) * (scale * LOG2E)
                p_qk = jnp.exp2(s_qk - ops.rows(lse_q, (q, bk)))
                if mask:
                    key_tile = step_ref[tile, i]
                    level = level_ref[key_tile]
                    key_qk = base_ref[key_tile] + ops.iota((q, bk), 1)
                    first_q, stop_q = (ops.load(bounds_smem.at[level, end], ROWS) for end in (0, 1))
                    seen_qk = (key_qk >= ops.rows(first_q, (q, bk))) & (key_qk < ops.rows(stop_q, (q, bk)))
                    p_qk = jnp.where(seen_qk, p_qk, 0.0)
                plgpu.barrier_wait(v_bars.at[slot])
                dp_qk = ops.product_nt(do_smem, v_smem.at[slot])
                plgpu.barrier_arrive(v_done.at[slot])
                ds_qk = p_qk * (dp_qk - ops.rows(delta_q, (q, bk))) * scale
                dq_qD = ops.add_product(dq_qD, ds_qk.astype(jnp.bfloat16), k_smem.at[slot])
                plgpu.barrier_arrive(k_done.at[slot])
                return dq_qD

            dq_qD = lax.fori_loop(0, full, lambda i, x: step(i, x, mask=False), ops.full((q, D), 0.0))
            dq_qD = lax.fori_loop(full, steps, lambda i, x: step(i, x, mask=True), dq_qD)
            q_smem[...] = dq_qD.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[rows])
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
        out_type=jax.ShapeDtypeStruct(q_BRHD.shape, jnp.bfloat16),
        scratch_types=(
            (
                matrix(COMPUTE, q, D),
                matrix(COMPUTE, q, D),
                matrix(stages, bk, D),
                matrix(stages, bk, D),
                vector(COMPUTE, 2, q),
                vector(COMPUTE, levels, 2, q, dtype=jnp.int32),
            ),
            (
                plgpu.Barrier(num_arrivals=5, num_barriers=COMPUTE),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
            ),
            (plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),) * 2,
        ),
        grid={"heads": H, "tiles": R // Q_TILE, "batch": B},
        name="gist_dq",
    )
    tables = visits.step_NS, visits.full_N, visits.all_N, tiles.level_J, tiles.base_J
    arrays = q_BRHD, k_BSKD, v_BSKD, do_BRHD, lse_BHR, delta_BHR, bounds
    return run(*arrays, *(jnp.asarray(x) for x in tables))


def dkv(
    q_BRHD,
    k_BSKD,
    v_BSKD,
    do_BRHD,
    lse_BHR,
    delta_BHR,
    bounds,
    tiles: Tiles,
    scale,
    config: Config,
    ops,
    masked,
):
    """(dk, dv) [B, S, K, D] in bfloat16; arguments as in `dq`."""
    B, S, K, D = k_BSKD.shape
    G = q_BRHD.shape[2] // K
    q, c, stages = WARPGROUP_ROWS, WARPGROUP_ROWS, config.stages_dkv
    visits = tiles.queries_of_keys

    def body(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, bounds_ref, *rest):
        step_ref, full_ref, all_ref, order_ref, level_ref, base_ref, dk_ref, dv_ref, *scratch = rest
        (
            (k_smem2, v_smem2, q_smem, do_smem, numbers_smem, bounds_smem),
            (start_bars, q_bars, do_bars),
            done,
        ) = scratch
        q_done, do_done = done
        batch, head, wg = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("wg")
        tile = order_ref[lax.axis_index("tiles")]
        level = level_ref[tile]
        count, full = all_ref[tile], jnp.int32(0) if masked else full_ref[tile]
        steps = count * G  # all full tiles of all query heads first

        def visit(i):
            """(query head, tile of queries) of a step."""
            if G == 1:
                return head, step_ref[tile, i]
            late = i >= full * G
            length = jnp.maximum(jnp.where(late, count - full, full), 1)
            i = i - jnp.where(late, full * G, 0)
            return head * G + lax.div(i, length), step_ref[
                tile, lax.rem(i, length) + jnp.where(late, full, 0)
            ]

        @pl.when(wg < COMPUTE)
        def compute():
            ops.registers(232, "increase")
            k_smem, v_smem = k_smem2.at[wg], v_smem2.at[wg]
            begin = tile * Q_TILE + wg * c
            rows = batch, pl.ds(begin, c), head
            plgpu.copy_gmem_to_smem(k_ref.at[rows], k_smem, start_bars.at[wg])
            plgpu.copy_gmem_to_smem(v_ref.at[rows], v_smem, start_bars.at[wg])
            plgpu.barrier_wait(start_bars.at[wg])

            def step(i, carry, mask: bool):
                dk_cD, dv_cD = carry
                slot = lax.rem(i, stages)
                plgpu.barrier_wait(q_bars.at[slot])
                s_cq = ops.product_nt(k_smem, q_smem.at[slot]) * (scale * LOG2E)
                lse_q = ops.load(numbers_smem.at[slot, 0], COLUMNS)
                p_cq = jnp.exp2(s_cq - ops.columns(lse_q, (c, q)))
                if mask:
                    key_cq = base_ref[tile] + wg * c + ops.iota((c, q), 0)
                    first_q, stop_q = (ops.load(bounds_smem.at[slot, end], COLUMNS) for end in (0, 1))
                    seen_cq = (key_cq >= ops.columns(first_q, (c, q))) & (
                        key_cq < ops.columns(stop_q, (c, q))
                    )
                    p_cq = jnp.where(seen_cq, p_cq, 0.0)
                plgpu.barrier_wait(do_bars.at[slot])
                dv_cD = ops.add_product(dv_cD, p_cq.astype(jnp.bfloat16), do_smem.at[slot])
                dp_cq = ops.product_nt(v_smem, do_smem.at[slot])
                plgpu.barrier_arrive(do_done.at[slot])
                # read late: two accumulators leave few registers
                delta_q = ops.load(numbers_smem.at[slot, 1], COLUMNS)
                ds_cq = p_cq * (dp_cq - ops.columns(delta_q, (c, q))) * scale
                dk_cD = ops.add_product(dk_cD, ds_cq.astype(jnp.bfloat16), q_smem.at[slot])
                # numbers and bounds were read by ordinary loads: order these before the next copy into the slot
                plgpu.commit_smem()
                plgpu.barrier_arrive(q_done.at[slot])
                return dk_cD, dv_cD

            carry = ops.full((c, D), 0.0), ops.full((c, D), 0.0)
            carry = lax.fori_loop(0, full * G, lambda i, x: step(i, x, mask=False), carry)
            dk_cD, dv_cD = lax.fori_loop(full * G, steps, lambda i, x: step(i, x, mask=True), carry)
            k_smem[...] = dk_cD.astype(jnp.bfloat16)
            v_smem[...] = dv_cD.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_smem, dk_ref.at[rows])
            plgpu.copy_smem_to_gmem(v_smem, dv_ref.at[rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == COMPUTE)
        def load():
            ops.registers(40, "decrease")
            bounds_of = batch if bounds.shape[0] > 1 else 0

            @pl.loop(0, steps)
            def _(i):
                slot = lax.rem(i, stages)
                q_head, q_tile = visit(i)
                rows = batch, pl.ds(q_tile * q, q), q_head
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(q_done.at[slot]))
                plgpu.copy_gmem_to_smem(q_ref.at[rows], q_smem.at[slot], q_bars.at[slot])
                for j, ref in enumerate((lse_ref, delta_ref)):
                    plgpu.copy_gmem_to_smem(
                        ref.at[batch, q_head, pl.ds(q_tile * q, q)], numbers_smem.at[slot, j], q_bars.at[slot]
                    )
                plgpu.copy_gmem_to_smem(
                    bounds_ref.at[bounds_of, q_tile, level], bounds_smem.at[slot], q_bars.at[slot]
                )
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(do_done.at[slot]))
                plgpu.copy_gmem_to_smem(do_ref.at[rows], do_smem.at[slot], do_bars.at[slot])

            ops.drain(steps, stages, q_done, do_done)

    shape = jax.ShapeDtypeStruct(k_BSKD.shape, jnp.bfloat16)
    run = ops.kernel(
        body,
        out_type=(shape, shape),
        scratch_types=(
            (
                matrix(COMPUTE, c, D),
                matrix(COMPUTE, c, D),
                matrix(stages, q, D),
                matrix(stages, q, D),
                vector(stages, 2, q),
                vector(stages, 2, q, dtype=jnp.int32),
            ),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
                plgpu.Barrier(num_arrivals=4, num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
            ),
            (plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),) * 2,
        ),
        grid={"heads": K, "tiles": S // Q_TILE, "batch": B},
        name="gist_dkv",
    )
    tables = visits.step_NS, visits.full_N, visits.all_N, visits.order_N, tiles.level_C, tiles.base_C
    arrays = q_BRHD, k_BSKD, v_BSKD, do_BRHD, lse_BHR, delta_BHR, bounds
    return run(*arrays, *(jnp.asarray(x) for x in tables))
