"""One training step: gradient accumulation, optimiser, norms. Pure, compiled once, state donated."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from megacontext_jax import mesh as meshes


class TrainState(NamedTuple):
    params: dict
    opt_state: optax.OptState
    step: jax.Array


# (params, {"inputs", "targets"} of [B, T], key) -> (summed loss, (weight, statistics)); the loss reported is the
# quotient of the sums, and `summarise` makes metrics of the statistics of all micro-batches
LossFn = Callable[[dict, dict, jax.Array], tuple[jax.Array, tuple[jax.Array, dict]]]


def _fresh(optimizer, params: dict) -> TrainState:
    return TrainState(params, optimizer.init(params), jnp.zeros([], jnp.int32))


def init_state(mesh: Mesh, init: Callable[[jax.Array], dict], optimizer, key) -> TrainState:
    """A fresh state, born sharded."""
    template = abstract_state(mesh, init, optimizer, key)
    shardings = jax.tree.map(lambda x: x.sharding, template)
    return jax.jit(lambda key: _fresh(optimizer, init(key)), out_shardings=shardings)(key)


def state_from(params: dict, template: TrainState, optimizer) -> TrainState:
    """The state at the start of a stage that goes on from given parameters, which are consumed."""
    shardings = jax.tree.map(lambda x: x.sharding, template)
    return jax.jit(lambda p: _fresh(optimizer, p), out_shardings=shardings, donate_argnums=0)(params)


def abstract_state(mesh: Mesh, init, optimizer, key) -> TrainState:
    """Shapes and shardings of the state without making it: the template for restoring."""
    shapes = jax.eval_shape(lambda key: _fresh(optimizer, init(key)), key)
    shardings = meshes.state_shardings(mesh, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def make_train_step(
    loss_fn: LossFn,
    optimizer,
    shardings: TrainState,
    mesh: Mesh,
    *,
    seed: int,
    summarise: Callable[[dict], dict] = lambda stats: {},
):
    """Compiled (state, batch) -> (state, metrics).

    Batch arrays are [A, B, T]: A micro-batches are accumulated. The gradient is that of the summed loss of
    the whole batch over its whole weight, so rows with few targets count for what they hold and an empty
    batch moves nothing. Randomness inside the loss derives from (seed, step, micro-batch): no state.
    """

    def step(state: TrainState, batch: dict):
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def micro_step(carry, xs):
            grads, loss, weight = carry
            micro, index = xs

            def loss_of(params):
                return loss_fn(params, micro, jax.random.fold_in(key, index))

            (micro_loss, (micro_weight, stats)), micro_grads = jax.value_and_grad(loss_of, has_aux=True)(
                state.params
            )
            grads = jax.tree.map(jnp.add, grads, micro_grads)
            return (grads, loss + micro_loss, weight + micro_weight), stats

        accumulation = batch["inputs"].shape[0]
        zeros = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros([]), jnp.zeros([]))
        xs = (batch, jnp.arange(accumulation))
        if accumulation == 1:  # no second copy of the gradients
            (grads, loss, weight), stats = micro_step(zeros, jax.tree.map(lambda x: x[0], xs))
            stats = jax.tree.map(lambda x: x[None], stats)
        else:
            (grads, loss, weight), stats = jax.lax.scan(micro_step, zeros, xs)
        weight = jnp.maximum(weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss / weight,
            "weight": weight,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(state.params),
            "update_norm": optax.tree.norm(updates),
            **summarise(stats),
        }
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, meshes.replicated(mesh)))
