"""What differs between the JAX versions that run these kernels (0.10.2 to 0.12), and between chip and interpreter.

Kernels are written against `Ops`. On the chip its products are warpgroup matrix instructions on shared memory; in
interpret mode, which knows neither accumulator references nor transposed ones, they are `jnp.dot` of the same tiles.
Everything else a kernel does (tables, masks, barriers, copies, softmax) is the same code in both.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROW = plgpu.Layout.WGMMA.reduce(1)  # a number per row of an accumulator
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # a number per column

_OLD = jax.__version_info__ < (0, 11)  # where loads ask for an index, and transposing is a function


class Ops:
    """Operations of one warpgroup; `interpret` selects the ones that the interpreter knows."""

    def __init__(self, interpret: bool):
        self.interpret = interpret

    def cast(self, x, layout):
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def full(self, shape: tuple[int, ...], value, layout, dtype=jnp.float32):
        return self.cast(jnp.full(shape, value, dtype), layout)

    def load(self, ref, layout):
        """A vector in shared memory, spread over an accumulator's rows or columns."""
        if self.interpret:
            return ref[...]
        if _OLD:
            return plgpu.load(ref, (), layout=layout)
        return plgpu.load(ref, layout=layout)

    def index(self, shape: tuple[int, int], axis: int):
        if self.interpret:
            return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def product_t(self, a_ref, b_ref, issued=None):
        """a @ b.T in float32; `issued` runs once the instructions are under way."""
        issued = issued or (lambda: None)
        if self.interpret:
            issued()
            return self._done(jnp.dot(a_ref[...], b_ref[...].T, preferred_element_type=jnp.float32))

        def run(acc_ref):
            plgpu.wgmma(acc_ref, a_ref, transposed(b_ref))
            issued()
            return acc_ref[...]

        return pl.run_scoped(run, plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), jnp.float32))

    def add_product(self, acc, a, b_ref, issued=None):
        """acc + a @ b; `a` is in registers. `issued` runs once the instructions are under way."""
        issued = issued or (lambda: None)
        if self.interpret:
            issued()
            return self._done(acc + jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32))

        def run(acc_ref):
            plgpu.wgmma(acc_ref, a, b_ref)
            issued()

        return pl.run_state(run)(plgpu.ACC.init(acc))

    def two_products_t(self, a_ref, b_ref, c_ref, d_ref, between, overlap: bool = True):
        """(between(a @ b.T), c @ d.T); with `overlap`, `between` works while the second product is under way."""
        if self.interpret or not overlap:
            return between(self.product_t(a_ref, b_ref)), self.product_t(c_ref, d_ref)

        def run(first_ref, second_ref):
            plgpu.wgmma(first_ref, a_ref, transposed(b_ref))
            plgpu.wgmma(second_ref, c_ref, transposed(d_ref))
            first = between(plgpu.wgmma_accumulator_load(first_ref, wait_n=1))
            return first, second_ref[...]

        shapes = ((x.shape[0], y.shape[0]) for x, y in ((a_ref, b_ref), (c_ref, d_ref)))
        return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def add_two_products(self, accs, a, b_ref, make_c, d_ref):
        """(acc + a @ b, acc' + c @ d); c is made while the first product is under way."""
        if self.interpret:
            return self.add_product(accs[0], a, b_ref), self.add_product(accs[1], make_c(), d_ref)

        def run(refs):
            plgpu.wgmma(refs[0], a, b_ref)
            plgpu.wgmma(refs[1], make_c(), d_ref)

        return pl.run_state(run)(tuple(plgpu.ACC.init(acc) for acc in accs))

    def _done(self, x):
        """The interpreter's stand-in reads like any load; the matrix unit's reads need no fence before a copy."""
        plgpu.commit_smem()
        return x

    def set_registers(self, count: int, action: str) -> None:
        plgpu.set_max_registers(count, action=action)


def transposed(ref):
    return plgpu.transpose_ref(ref, (1, 0)) if _OLD else ref.transpose((1, 0))


def kernel(body, *, out, scratch, grid: dict[str, int], name: str, interpret, warpgroups: int = 3):
    """Three warpgroups per grid point, two that compute and one that moves memory, if nothing else is said."""
    run = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name=name,
        interpret=interpret,
    )

    def call(*operands):
        # under `shard_map` results differ between devices as operands do, which a kernel does not say of itself
        axes = frozenset().union(*(_varying(x) for x in operands))
        return tuple(
            jax.lax.pcast(x, tuple(sorted(axes - _varying(x))), to="varying") for x in run(*operands)
        )

    return call


def _varying(x) -> frozenset:
    """Names of the mesh axes over which an array differs, inside `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying
