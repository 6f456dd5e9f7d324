"""The levels of a batch of sequences: tokens below, then gists of gists."""

import jax.numpy as jnp

from megacontext_jax.context import gistnet
from megacontext_jax.context.gistnet import GistConfig
from megacontext_jax.context.layout import Layout
from megacontext_jax.model import gpt


def build_levels(encode, e_BTC, block: int, levels: int, prepare=lambda x_NKC: x_NKC) -> tuple:
    """Level tables (e_BTC, [B, T // K, C], [B, T // K^2, C], ...), one call of `encode` per level.

    `encode` maps blocks [N, K, C] to gists [N, C]; blocks of tokens pass through `prepare` before. Only whole
    blocks have a node; levels without one are left out.
    """
    tables = [e_BTC]
    for level in range(levels):
        below_BNC = tables[-1]
        B, n, C = below_BNC.shape
        if n < block:
            break
        whole = n // block
        blocks = below_BNC[:, : whole * block].reshape(B * whole, block, C)
        blocks = prepare(blocks) if level == 0 else blocks
        tables.append(encode(blocks).reshape(B, whole, C))
    return tuple(tables)


def gist_levels(params, cfg: GistConfig, levels: int, e_BTC, dtype=None) -> tuple:
    """Level tables of normed embeddings by the GistNet of the parameters, which runs in `dtype`.

    Inside its block a token is smeared as in the model; a gist depends on the tokens of its block alone, so that an edit leaves
    all others.
    """

    def encode(x_NKC):
        gist_NC = gistnet.encode(params["gistnet"], cfg, x_NKC.astype(dtype or x_NKC.dtype))
        return gist_NC.astype(x_NKC.dtype)

    return build_levels(
        encode, e_BTC, cfg.block, levels, lambda x_NKC: gpt.smear(params, x_NKC, gpt.shift_right(x_NKC))
    )


def gather(tables: tuple, layout: Layout):
    """The row of every entry, [B, W, C]. Rows of the layout may be several per row of the tables, side by side."""
    sizes = [table.shape[1] for table in tables]
    offsets = jnp.asarray([sum(sizes[:i]) for i in range(len(sizes))], jnp.int32)
    index_BW = offsets[layout.level_BW] + layout.node_BW
    flat_BNC = jnp.concatenate(tables, axis=1)
    B, C = flat_BNC.shape[0], flat_BNC.shape[2]
    per_row = index_BW.shape[0] // B
    rows_BnWC = jnp.take_along_axis(flat_BNC, index_BW.reshape(B, -1)[..., None], axis=1)
    return rows_BnWC.reshape(B * per_row, -1, C)
