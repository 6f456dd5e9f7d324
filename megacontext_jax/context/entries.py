"""From a layout to what enters the transformer: embeddings, positions, value embeddings."""

import jax.numpy as jnp

from megacontext_jax.context.layout import Layout, starts
from megacontext_jax.context.positions import entry_rope
from megacontext_jax.context.tree import gather
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.gpt import Entries, smear, value_params


def pick(x_BT, index_RW):
    """x at token places; the rows R of the index are several (R // B, side by side) per row of x."""
    B = x_BT.shape[0]
    picked = jnp.take_along_axis(x_BT, index_RW.reshape(B, -1), axis=1)
    return picked.reshape(index_RW.shape)


def layout_entries(
    params, cfg: GPTConfig, tables: tuple, ids_BT, layout: Layout, *, block: int, positions: str = "gaussian"
) -> Entries:
    """Entries of the working contexts `layout` [R, W] over the level tables of B sequences (R a multiple of B).

    What belongs to tokens stays with them: a raw token is smeared with the token before it, whether or not that
    is shown, and has its value embeddings; gists have neither.
    """
    x_RWC = gather(tables, layout)
    begin_RW, raw_RW = starts(layout, block), layout.level_BW == 0
    dtype = x_RWC.dtype
    if "smear_gate" in params:
        before = Layout(jnp.zeros_like(begin_RW), jnp.maximum(begin_RW - 1, 0), layout.valid_BW)
        smeared_RW = raw_RW & (begin_RW > 0)
        previous_RWC = gather(tables[:1], before) * smeared_RW[..., None].astype(dtype)
        x_RWC = smear(params, x_RWC, previous_RWC)
    values = value_params(params, pick(ids_BT, jnp.where(raw_RW, begin_RW, 0)), dtype)
    if values:
        values["rows"] = values["rows"] * raw_RW[..., None].astype(dtype)
    return Entries(x_RWC, entry_rope(cfg, layout, block, positions, dtype), values)
