"""Where an entry stands: centre and spread of its span, and rotary tables damped by the spread (Gaussian RoPE).

A raw token has no spread, so a working context of raw tokens alone has the tables of the vanilla model, bit for
bit. Source of the idea: MegaContext's notes; what their code does otherwise is in docs/parity.md.
"""

import jax.numpy as jnp

from megacontext_jax.context.layout import Layout, spans, starts
from megacontext_jax.errors import UserError
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.gpt import rope_frequencies, rope_table

LONGEST = 1 << 25  # tokens of a history

KINDS = {
    "gaussian": "centre of the span, frequencies damped by its length",
    "simple": "centre of the span, no damping",
    "gaussian_alibi": "gaussian, and a bias that falls with distance",
    "rank": "the place in the working context, frequencies damped by the span",
}


def check_kind(kind: str) -> str:
    if kind not in KINDS:
        what = "has more channels than a head" if "lod2d" in kind else "is unknown"
        raise UserError(f"--positional-type {kind!r} {what}; choose one of {', '.join(KINDS)}.")
    return kind


def centres(layout: Layout, block: int, kind: str = "gaussian"):
    """The middle of each span in tokens, or with `rank` the entry's index: (int32 [B, W], what is left, 0 or 1/2)."""
    if kind == "rank":
        index_W = jnp.arange(layout.level_BW.shape[-1])
        return jnp.broadcast_to(index_W, layout.level_BW.shape), 0.0
    return span_centres(starts(layout, block), spans(layout.level_BW, block))


def span_centres(start, span):
    """The middle of `span` tokens from `start` on: (whole tokens, what is left, 0 or 1/2)."""
    return start + (span - 1) // 2, (span - 1) % 2 / 2


def spreads(layout: Layout, block: int):
    """float32 [B, W]: 0 for raw tokens, the span's length for gists."""
    return jnp.where(layout.level_BW > 0, spans(layout.level_BW, block), 0).astype(jnp.float32)


def entry_rope(cfg: GPTConfig, layout: Layout, block: int, kind: str, dtype):
    """cos and sin [B, W, D/2] of every entry."""
    sigma_BW = None if kind == "simple" else spreads(layout, block)
    mu_BW, fraction_BW = centres(layout, block, kind)
    return gaussian_rope(cfg, mu_BW, sigma_BW, dtype, fraction_BW)


def gaussian_rope(cfg: GPTConfig, mu_BW, sigma_BW, dtype, fraction_BW=0.0):
    """cos and sin [B, W, D/2] at mu + fraction, the faster channels damped by sigma (None: no damping).

    Whole numbers for mu keep their phase however far they are.
    """
    cos, sin = rope_table(cfg, mu_BW, jnp.float32, fraction_BW)
    if sigma_BW is not None:
        damping = jnp.exp(-0.5 * jnp.square(sigma_BW[..., None] * rope_frequencies(cfg)))
        cos, sin = cos * damping, sin * damping
    return cos.astype(dtype), sin.astype(dtype)


def alibi_slopes(n_head: int):
    """[H]: 1, 1/2, 1/4, ... (the fork's sequence)."""
    return 0.5 ** jnp.arange(n_head, dtype=jnp.float32)


def alibi_bias(layout: Layout, block: int, n_head: int):
    """[B, H, W, W], added to the scores: minus slope times distance."""
    mu_BW, fraction_BW = centres(layout, block)
    distance_BWW = mu_BW[:, :, None] - mu_BW[:, None, :] + fraction_BW[:, :, None] - fraction_BW[:, None, :]
    return -alibi_slopes(n_head)[:, None, None] * distance_BWW[:, None]
