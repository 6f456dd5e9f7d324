"""Choosing the next token from logits: temperature, top-k and, inside the candidates, top-p.

Everything is jittable with one static number, the count of candidates: 1 is greedy, 0 the whole vocabulary,
any other K a `lax.top_k` that is masked down to the top_k and top_p asked for. Different settings share a
compiled program wherever K is the same. Every row has its own key, so that what it draws does not depend on
the rows beside it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.errors import UserError

NUCLEUS = 256  # candidates for top-p without top-k
_COLDEST = 1e-6  # temperatures below are greedy


class Settings(NamedTuple):
    """What one call of the sampler may vary without compiling anew; scalars."""

    temperature: jax.Array
    top_k: jax.Array  # 0 = off
    top_p: jax.Array  # 1 = off


def settings(
    temperature: float, top_k: int | None, top_p: float | None, vocab_size: int
) -> tuple[Settings, int]:
    """Checked settings and the number of candidates they need.

    `top_k` None or 0 is off, and so is one beyond the vocabulary; `top_p` None or 1 is off. Top-p without
    top-k looks at the 256 most likely tokens. Raises UserError for values outside their range.
    """
    top_k, top_p = top_k or 0, 1.0 if top_p is None else top_p
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature} must be 0 (greedy) or a positive number.")
    if top_k < 0:
        raise UserError(f"--top-k {top_k} must be 0 (off) or a positive number.")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p} must lie above 0 and at most at 1 (off).")
    if top_k >= vocab_size:
        top_k = 0
    if temperature < _COLDEST or top_k == 1:
        candidates = 1
    elif top_k:
        candidates = min(vocab_size, max(64, 1 << (top_k - 1).bit_length()))
    else:
        candidates = min(vocab_size, NUCLEUS) if top_p < 1 else 0
    scalars = Settings(np.float32(max(temperature, _COLDEST)), np.int32(top_k), np.float32(top_p))
    return scalars, candidates


def row_keys(seed: int, rows: int) -> jax.Array:
    """One key per row, a function of the seed and the row's number alone."""
    return _row_keys(np.uint32(seed % 2**32), rows)


@partial(jax.jit, static_argnums=1)
def _row_keys(seed, rows: int):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


def greedy(logits_BV) -> jax.Array:
    """The most likely token of each row, the lowest of equals.

    Two plain reductions: XLA's argmax carries an index along and does not vectorise on CPUs.
    """
    V = logits_BV.shape[-1]
    best_B1 = logits_BV.max(-1, keepdims=True)
    return jnp.where(logits_BV == best_B1, jnp.arange(V, dtype=jnp.int32), V - 1).min(-1)


def sample(logits_BV, keys_B, chosen: Settings, candidates: int) -> jax.Array:
    """One token per row, int32[B]."""
    if candidates == 1:
        return greedy(logits_BV)
    if candidates == 0:
        z_BK, ids_BK = logits_BV / chosen.temperature, None
    else:
        # without the barrier any slice of the result makes XLA sort the whole vocabulary on CPUs, 100x slower
        z_BK, ids_BK = jax.lax.optimization_barrier(jax.lax.top_k(logits_BV, candidates))
        z_BK = (z_BK - z_BK[:, :1]) / chosen.temperature
        rank_K = jnp.arange(candidates)
        kept_BK = jnp.broadcast_to((chosen.top_k == 0) | (rank_K < chosen.top_k), z_BK.shape)
        p_BK = jax.nn.softmax(jnp.where(kept_BK, z_BK, -jnp.inf), axis=-1)
        kept_BK &= jnp.cumsum(p_BK, axis=-1) - p_BK < chosen.top_p
        z_BK = jnp.where(kept_BK, z_BK, -jnp.inf)
    noise_BK = jax.vmap(lambda key: jax.random.gumbel(key, z_BK.shape[-1:]))(keys_B)
    choice_B = greedy(z_BK + noise_BK)
    if ids_BK is None:
        return choice_B
    return jnp.take_along_axis(ids_BK, choice_B[:, None], axis=-1)[:, 0]
