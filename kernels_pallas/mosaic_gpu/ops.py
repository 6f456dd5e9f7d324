"""What the kernels say about registers and matrix units, once for the GPU and once for interpret mode.

Interpret mode (CPU) knows neither layouts nor accumulators nor operands in registers, so there the same products
are plain ones; barriers, copies, indices, masks and the softmax are the code that runs on the GPU. The API differs
between JAX 0.10 and 0.11, which is met here and nowhere else.
"""

import inspect
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)  # of a vector along a matrix


class Ops(NamedTuple):
    """`interpreted`: the parameters of interpret mode, None on a GPU."""

    interpreted: object | None = None

    def full(self, shape, value, dtype=jnp.float32, layout=plgpu.Layout.WGMMA):
        x = jnp.full(shape, value, dtype)
        return x if self.interpreted else plgpu.layout_cast(x, layout)

    def iota(self, shape, axis: int):
        if self.interpreted:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def load(self, ref, layout):
        """A vector from shared memory."""
        if self.interpreted:
            return ref[...]
        if "idx" in inspect.signature(plgpu.load).parameters and jax.__version_info__ < (0, 11):
            return plgpu.load(ref, (), layout=layout)
        return plgpu.load(ref, layout=layout)

    def product_nt(self, a_ref, b_ref):
        """a @ b.T in float32, both in shared memory."""
        if self.interpreted:
            return jnp.dot(a_ref[...], b_ref[...].T, preferred_element_type=jnp.float32)

        def compute(acc_ref):
            plgpu.wgmma(acc_ref, a_ref, _transposed(b_ref))
            return acc_ref[...]

        return pl.run_scoped(compute, plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), jnp.float32))

    def add_product(self, acc, a, b_ref):
        """acc + a @ b, where `a` is in registers and b in shared memory."""
        if self.interpreted:
            return acc + jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)
        return pl.run_state(partial(_add, a, b_ref))(plgpu.ACC.init(acc))

    def rows(self, x, shape):
        return lax.broadcast_in_dim(x, shape, [0])

    def columns(self, x, shape):
        return lax.broadcast_in_dim(x, shape, [1])

    def registers(self, count: int, action: str) -> None:
        if not self.interpreted:
            plgpu.set_max_registers(count, action=action)

    def drain(self, steps, stages: int, *barriers) -> None:
        """Interpret mode wants every arrival to be waited for, those of the last slots too."""
        if not self.interpreted:
            return

        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(i):
            for barrier in barriers:
                plgpu.barrier_wait(barrier.at[lax.rem(i, stages)])

    def kernel(self, body, *, out_type, scratch_types, grid: dict[str, int], name: str):
        """A call of two computing warpgroups and one that loads; the grid by the names of its axes."""
        options = {"interpret": self.interpreted} if self.interpreted else {}
        return plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=scratch_types,
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            num_threads=3,
            thread_name="wg",
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
            kernel_name=name,
            **options,
        )


def _add(a, b_ref, acc_ref):
    plgpu.wgmma(acc_ref, a, b_ref)


def _transposed(ref):
    if jax.__version_info__ >= (0, 11):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def matrix(*shape):
    """Shared memory for bfloat16 matrices as wgmma and TMA want them."""
    return plgpu.SMEM(
        shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    )


def vector(*shape, dtype=jnp.float32):
    return plgpu.SMEM(shape, dtype)
