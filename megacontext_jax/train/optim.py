"""nanochat's optimisers on Optax: Muon for the matrices, AdamW for the rest, or AdamW for all.

Muon here is nanochat's, not `optax.contrib.muon`, which differs in momentum and scale. Its orthogonalisation
works on one stack of all equally shaped matrices of all layers: one product instead of many, and under a mesh
whole matrices are dealt out to the devices, so that none is computed twice.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.train.recipes import CLASSIC_MUON, RECIPES, Adam, Muon, Recipe, group_of
from megacontext_jax.train.schedule import Schedules

EPSILON = 1e-10  # AdamW's


class MuonState(NamedTuple):
    count: jax.Array
    momentum: optax.Updates


class NorMuonState(NamedTuple):
    count: jax.Array
    momentum: optax.Updates
    second: optax.Updates  # mean squares of the orthogonalised updates, per row or per column


def scale_by_muon(
    muon: Muon = CLASSIC_MUON,
    *,
    momentum: Callable,
    decay: Callable = lambda count: 0.0,
    dtype=jnp.float32,
    constrain=lambda stack: stack,
) -> optax.GradientTransformation:
    """Nesterov momentum, then orthogonalised updates scaled by sqrt(max(1, rows / columns)).

    Leaves are stacks [layers, rows, columns]. With `muon.beta2` the variance of rows (of columns in wide
    matrices) is evened out, and weights that the update shrinks decay by `decay(count)`. `constrain` places the
    gathered stacks [K, rows, columns] on a mesh (see `mesh.deal_matrices`); `dtype` is that of the iteration.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        count = jnp.zeros([], jnp.int32)
        if not muon.beta2:
            return MuonState(count, zeros)
        return NorMuonState(count, zeros, jax.tree.map(lambda p: jnp.zeros_like(_mean_square(p)), params))

    def update(updates, state, params=None):
        mu = momentum(state.count)
        buffers = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, updates)
        nesterov = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, buffers, updates)
        directions = _orthogonalise_tree(nesterov, muon, dtype, constrain)
        if not muon.beta2:
            state = MuonState(state.count + 1, buffers)
        else:
            second = jax.tree.map(
                lambda v, u: muon.beta2 * v + (1 - muon.beta2) * _mean_square(u), state.second, directions
            )
            rate = decay(state.count)
            directions = jax.tree.map(
                lambda u, v, w: _cautious(_even_out(u, v), w, rate), directions, second, params
            )
            state = NorMuonState(state.count + 1, buffers, second)
        return jax.tree.map(lambda u: u * max(1.0, u.shape[1] / u.shape[2]) ** 0.5, directions), state

    return optax.GradientTransformation(init, update)


def _mean_square(u_LRQ):
    """Mean squares [L, R, 1] of the rows, [L, 1, Q] of the columns where the matrix is wide."""
    return jnp.mean(jnp.square(u_LRQ), axis=-1 if u_LRQ.shape[1] >= u_LRQ.shape[2] else -2, keepdims=True)


def _even_out(u_LRQ, second):
    """Divides rows (columns) by their root mean square over time; the norm of each matrix stays."""
    scale = jax.lax.rsqrt(jnp.maximum(second, 1e-10))
    squares = _mean_square(u_LRQ)
    before = jnp.sqrt(jnp.sum(squares, axis=(-2, -1), keepdims=True))
    after = jnp.sqrt(jnp.sum(squares * jnp.square(scale), axis=(-2, -1), keepdims=True))
    size = math.sqrt(u_LRQ.size / squares.size)  # of what each mean was taken over
    return u_LRQ * (scale * (before * size / jnp.maximum(after * size, 1e-10)))


def _cautious(u_LRQ, w_LRQ, decay):
    """Weight decay where the update shrinks the weight."""
    return u_LRQ + decay * w_LRQ * (u_LRQ * w_LRQ >= 0)


def orthogonalise(g_KRQ, muon: Muon = CLASSIC_MUON, *, dtype=jnp.float32):
    """Approximate U V^T of each matrix (rows <= columns), iterated in `dtype`."""
    x = g_KRQ.astype(dtype)
    x = x / (muon.margin * _norm(x) + muon.epsilon).astype(dtype)
    for a, b, c in muon.coefficients:
        gram = jnp.einsum("krq,ksq->krs", x, x)
        poly = b * gram + c * jnp.einsum("krs,kst->krt", gram, gram)
        x = a * x + jnp.einsum("krs,ksq->krq", poly, x)
    return x.astype(g_KRQ.dtype)


def _norm(x, axis=(-2, -1)):
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axis, keepdims=True))


def _equilibrate(x_LRQ):
    """Every row scaled to the mean (quadratic) norm of its matrix's rows."""
    target = _norm(x_LRQ) / math.sqrt(x_LRQ.shape[1])
    return x_LRQ * (target / jnp.maximum(_norm(x_LRQ, -1), 1e-6)).astype(x_LRQ.dtype)


def _renormalise(x_LRQ):
    """Scaled to the Frobenius norm of a matrix with orthonormal rows (columns)."""
    return x_LRQ * (math.sqrt(min(x_LRQ.shape[1:])) / jnp.maximum(_norm(x_LRQ), 1e-6)).astype(x_LRQ.dtype)


def _orthogonalise_tree(tree, muon: Muon, dtype, constrain):
    leaves, treedef = jax.tree.flatten(tree)
    # A tall matrix is orthogonalised transposed, so that c_fc and mlp_proj share one stack.
    groups: dict[tuple[int, int], list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(tuple(sorted(leaf.shape[1:])), []).append(i)
    out = list(leaves)
    for members in groups.values():
        begun = (_equilibrate(leaves[i].astype(dtype)) if muon.equilibrate else leaves[i] for i in members)
        stack_KRQ = jnp.concatenate([_wide(x) for x in begun])
        done_KRQ = constrain(orthogonalise(constrain(stack_KRQ), muon, dtype=dtype))
        start = 0
        for i in members:
            layers, rows, columns = leaves[i].shape
            part = done_KRQ[start : start + layers].astype(leaves[i].dtype)
            start += layers
            part = part.swapaxes(1, 2) if rows > columns else part
            out[i] = _renormalise(part) if muon.renormalise else part
    return jax.tree.unflatten(treedef, out)


def _wide(x_LRQ):
    return x_LRQ.swapaxes(1, 2) if x_LRQ.shape[1] > x_LRQ.shape[2] else x_LRQ


def base_rate(adam: Adam, opts, n_embd: int, scale: float = 1.0) -> float:
    """The unscheduled learning rate of an AdamW group; `scale` is what the batch size asks for."""
    rate = adam.factor if adam.rate is None else adam.factor * getattr(opts, adam.rate) * scale
    return rate * (n_embd / 768) ** -0.5 if adam.wide else rate


def make_optimizer(
    opts,
    cfg: GPTConfig,
    schedules: Schedules,
    *,
    rate_scale: float = 1.0,
    weight_decay: float | None = None,
    ns_dtype=jnp.float32,
    constrain=lambda stack: stack,
    context: bool = False,
    freeze_base: bool = False,
) -> optax.GradientTransformation:
    """The optimiser of one training stage (a `StageConfig`) for a model.

    `rate_scale` and `weight_decay` (None: the option's) are what the plan derives from batch and horizon;
    with `context` the parameters hold GistNet and LensNet too, with `freeze_base` only those move.
    """
    recipe: Recipe = RECIPES[opts.optimizer]
    weight_decay = opts.weight_decay if weight_decay is None else weight_decay

    def schedule(rate):
        return lambda count: rate * opts.init_lr_frac * schedules.rate(count)

    def adamw(adam: Adam):
        b1, b2 = adam.betas or (opts.adam_beta1, opts.adam_beta2)
        return optax.adamw(
            schedule(base_rate(adam, opts, cfg.n_embd, rate_scale)),
            b1=b1,
            b2=b2,
            eps=EPSILON,
            weight_decay=weight_decay if adam.decay is None else adam.decay,
        )

    # groups that every checkpoint has, and those of this model
    present = {group_of((name,)) for name in cfg.param_shapes()} | {"wte", "lm_head", "matrix", "scalar"}
    present |= {"context"} if context else set()
    transforms = {name: adamw(adam) for name, adam in recipe.groups.items() if name in present}
    if recipe.muon is not None:

        def decay(count):
            return weight_decay * schedules.decay(count)

        transforms["matrix"] = optax.chain(
            scale_by_muon(
                recipe.muon,
                momentum=schedules.momentum,
                decay=decay,
                dtype=ns_dtype,
                constrain=constrain,
            ),
            *([optax.add_decayed_weights(decay)] if recipe.decay_matrices else []),
            optax.scale_by_learning_rate(schedule(opts.matrix_lr * rate_scale)),
        )
    if freeze_base:
        transforms["frozen"] = optax.set_to_zero()

    def label(path, _):
        names = tuple(key.key for key in path)
        frozen = freeze_base and names[0] not in ("gistnet", "lensnet")
        return "frozen" if frozen else group_of(names)

    partitioned = optax.partition(transforms, lambda tree: jax.tree.map_with_path(label, tree))
    return optax.chain(_clip(opts.grad_clip), partitioned)


def _clip(max_norm: float) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(max_norm) if max_norm > 0 else optax.identity()
