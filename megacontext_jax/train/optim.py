"""nanochat's optimiser on Optax: Muon for the matrices, AdamW for embedding and head, or AdamW for all.

Muon here is nanochat's (classic), not `optax.contrib.muon`, which differs in momentum and scale. Its
orthogonalisation works on one stack of all equally shaped matrices of all layers: one product instead of
many, and under a mesh whole matrices are dealt out to the devices, so that none is computed twice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from megacontext_jax.train.schedule import lr_multiplier, muon_momentum

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic
NS_STEPS = 5


class MuonState(NamedTuple):
    count: jax.Array
    momentum: optax.Updates


def orthogonalise(g_KRQ, *, dtype=jnp.float32):
    """Approximate U V^T of each matrix (rows <= columns) by five Newton-Schulz steps in `dtype`."""
    a, b, c = NS_COEFFICIENTS
    x = g_KRQ.astype(dtype)
    norm_K11 = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1), keepdims=True))
    x = x / (norm_K11 + 1e-7).astype(dtype)
    for _ in range(NS_STEPS):
        gram = jnp.einsum("krq,ksq->krs", x, x)
        poly = b * gram + c * jnp.einsum("krs,kst->krt", gram, gram)
        x = a * x + jnp.einsum("krs,ksq->krq", poly, x)
    return x.astype(g_KRQ.dtype)


def scale_by_muon(*, dtype=jnp.float32, constrain=lambda stack: stack) -> optax.GradientTransformation:
    """Nesterov momentum, then orthogonalised updates scaled by sqrt(max(1, rows / columns)).

    Leaves are stacks [layers, rows, columns]. `constrain` places the gathered stacks [K, rows, columns] on a
    mesh (see `mesh.deal_matrices`).
    """

    def init(params):
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        mu = muon_momentum(state.count)
        momentum = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, updates)
        nesterov = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, momentum, updates)
        return _orthogonalise_tree(nesterov, dtype, constrain), MuonState(state.count + 1, momentum)

    return optax.GradientTransformation(init, update)


def _orthogonalise_tree(tree, dtype, constrain):
    leaves, treedef = jax.tree.flatten(tree)
    # A tall matrix is orthogonalised transposed, so that c_fc and mlp_proj share one stack.
    groups: dict[tuple[int, int], list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(tuple(sorted(leaf.shape[1:])), []).append(i)
    out = list(leaves)
    for members in groups.values():
        stack_KRQ = jnp.concatenate([_wide(leaves[i]) for i in members])
        done_KRQ = constrain(orthogonalise(constrain(stack_KRQ), dtype=dtype))
        start = 0
        for i in members:
            layers, rows, columns = leaves[i].shape
            part = done_KRQ[start : start + layers]
            start += layers
            part = part.swapaxes(1, 2) if rows > columns else part
            out[i] = part * max(1.0, rows / columns) ** 0.5
    return jax.tree.unflatten(treedef, out)


def _wide(x_LRQ):
    return x_LRQ.swapaxes(1, 2) if x_LRQ.shape[1] > x_LRQ.shape[2] else x_LRQ


def param_group(path) -> str:
    """wte, lm_head, matrix or scalar, from a params path."""
    name = path[0].key
    return {"wte": "wte", "lm_head": "lm_head", "h": "matrix"}.get(name, "scalar")


def make_optimizer(
    stage, *, n_embd: int, num_iterations: int, ns_dtype=jnp.float32, constrain=lambda stack: stack
) -> optax.GradientTransformation:
    """The optimiser of one training stage (a `StageConfig`).

    With `muon`, the AdamW rates are scaled by (width / 768)^-0.5 as in nanochat; with `adamw` they are taken
    as given.
    """
    multiplier = lr_multiplier(
        num_iterations,
        warmup_ratio=stage.warmup_ratio,
        warmdown_ratio=stage.warmdown_ratio,
        final_lr_frac=stage.final_lr_frac,
    )
    width_scale = (n_embd / 768) ** -0.5 if stage.optimizer == "muon" else 1.0

    def schedule(rate):
        return lambda count: rate * stage.init_lr_frac * multiplier(count)

    def adamw(rate):
        return optax.adamw(
            schedule(rate),
            b1=stage.adam_beta1,
            b2=stage.adam_beta2,
            eps=1e-10,
            weight_decay=stage.weight_decay,
        )

    if stage.optimizer == "muon":
        matrix = optax.chain(
            scale_by_muon(dtype=ns_dtype, constrain=constrain),
            optax.scale_by_learning_rate(schedule(stage.matrix_lr)),
        )
    else:
        matrix = adamw(stage.matrix_lr)
    groups = {
        "wte": adamw(stage.embedding_lr * width_scale),
        "lm_head": adamw(stage.unembedding_lr * width_scale),
        "matrix": matrix,
        "scalar": adamw(stage.scalar_lr),
    }
    partitioned = optax.partition(
        groups, lambda tree: jax.tree.map_with_path(lambda p, _: param_group(p), tree)
    )
    return optax.chain(_clip(stage.grad_clip), partitioned)


def _clip(max_norm: float) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(max_norm) if max_norm > 0 else optax.identity()
