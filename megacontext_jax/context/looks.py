"""How a model looks at its working context: where the attention of its newest entries goes.

Shape suffixes: R rows, W entries, Q newest entries that look, H heads, K key heads, D head size.
"""

import math

import jax
import jax.numpy as jnp

from megacontext_jax.context.layout import Layout

QUERIES = 16  # newest tokens that ask, at most


def attention_mass(layout: Layout, queries: int, hidden: int = 0):
    """`watch` of a trunk: attention [R, W] on every entry, mean over heads and the newest `queries` entries.

    The last `hidden` valid entries neither look nor are looked at.
    """
    count_R1 = layout.count_B[:, None] - hidden
    at_RQ = jnp.maximum(count_R1 - queries + jnp.arange(queries), 0)
    visible_RQW = jnp.arange(layout.valid_BW.shape[1]) <= at_RQ[..., None]

    def watch(q_RWHD, k_RWKD):
        q_RWHD, k_RWKD = jax.lax.stop_gradient((q_RWHD, k_RWKD))
        K, D = k_RWKD.shape[2:]
        q_RQHD = jnp.take_along_axis(q_RWHD, at_RQ[..., None, None], axis=1)
        q_RQKGD = q_RQHD.reshape(*at_RQ.shape, K, -1, D)
        s = jnp.einsum("rqkgd,rwkd->rkgqw", q_RQKGD, k_RWKD, preferred_element_type=jnp.float32)
        s = jnp.where(visible_RQW[:, None, None], s / math.sqrt(D), -jnp.inf)
        return jax.nn.softmax(s, axis=-1).mean((1, 2, 3))

    return watch


def standardised(value_RW, layout: Layout):
    """Deviations from the mean in units of the spread, raw entries and gists each among their like."""
    out_RW = jnp.zeros_like(value_RW)
    for kind_RW in (layout.level_BW == 0, layout.level_BW > 0):
        mask = kind_RW & layout.valid_BW
        n = jnp.maximum(mask.sum(-1, keepdims=True), 1)
        centred = jnp.where(mask, value_RW - jnp.where(mask, value_RW, 0.0).sum(-1, keepdims=True) / n, 0.0)
        spread = jnp.sqrt(jnp.square(centred).sum(-1, keepdims=True) / n + 1e-12)
        out_RW += jnp.where(mask, centred / spread, 0.0)
    return out_RW
