"""Heads that have places: of every gist a head reads mostly what stood at its own places of the block.

A head returns the same from a gist whatever is asked, so that of two facts in one gist a head finds one. If all heads
read alike, those that look up agree on the same one, and training does not leave that state. Here every head has places of its own
from the start, in the dense steps before gists too, so that looking up forms once for every place. Measured in
docs/performance.md. Shape suffixes: B batch, T queries, S keys, H heads, K key heads, G query heads of a key head, D head
size, C width, r places of a block, Q queries at a time.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import GistSpec
from megacontext_jax.model.attention import NEG, AttentionFn

ELSEWHERE = 0.1  # weight, at first, of channels that hold other places
QUERIES = 128  # at a time


def places_of(heads: int, block: int) -> np.ndarray:
    """bool [K, r]: the places of each key head, runs that cover the block; several heads share one where they are more."""
    head, place = np.arange(heads)[:, None], np.arange(block)
    return (place * heads < (head + 1) * block) & (head * block < (place + 1) * heads)


def init_reading(layers: int, heads: int, block: int, channels: int):
    """Weights [L, K, C] on the channels of gists, before keys and values are taken; mean square 1.

    Channel c is where the mean of GistNet puts place c modulo r (`gistnet`).
    """
    own_KC = places_of(heads, block)[:, np.arange(channels) % block]
    share_K1 = own_KC.mean(axis=1, keepdims=True)
    own_weight_K1 = np.sqrt((1 - (1 - share_K1) * ELSEWHERE**2) / share_K1)
    weight_KC = np.where(own_KC, own_weight_K1, ELSEWHERE).astype(np.float32)
    return jnp.broadcast_to(weight_KC, (layers, heads, channels))


def place_attention(spec: GistSpec) -> AttentionFn:
    """Causal attention over tokens: near ones as in gist attention, of the others a head sees those at its own places."""

    def attention(q_BTHD, k_BTKD, v_BTKD, *, window: int | None = None):
        del window  # the pattern of every layer is `spec`
        B, T, H, D = q_BTHD.shape
        K = k_BTKD.shape[2]
        own_KS = places_of(K, spec.block)[:, np.arange(T) % spec.block]
        q_BTKGD = q_BTHD.reshape(B, T, K, H // K, D)
        pieces = -(-T // QUERIES)
        q_BTKGD = jnp.pad(q_BTKGD, ((0, 0), (0, pieces * QUERIES - T), (0, 0), (0, 0), (0, 0)))

        @jax.checkpoint
        def some(begin):
            q_BQKGD = jax.lax.dynamic_slice_in_dim(q_BTKGD, begin, QUERIES, axis=1)
            t_Q1, s_S = begin + jnp.arange(QUERIES)[:, None], jnp.arange(T)
            near_QS = s_S >= spec.lower_bounds(t_Q1)[0]
            seen_KQS = (s_S <= t_Q1) & (near_QS | own_KS[:, None])
            s_BKGQS = jnp.einsum("bqkgd,bskd->bkgqs", q_BQKGD, k_BTKD, preferred_element_type=jnp.float32)
            s_BKGQS = jnp.where(seen_KQS[:, None], s_BKGQS / math.sqrt(D), NEG)
            p_BKGQS = jax.nn.softmax(s_BKGQS, axis=-1).astype(v_BTKD.dtype)
            return jnp.einsum("bkgqs,bskd->bqkgd", p_BKGQS, v_BTKD)

        o_NBQKGD = jax.lax.map(some, jnp.arange(pieces) * QUERIES)
        return o_NBQKGD.swapaxes(0, 1).reshape(B, -1, H, D)[:, :T]

    return attention
