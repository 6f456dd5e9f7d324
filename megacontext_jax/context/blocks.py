"""The model's own block over short or mixed sequences, without the causal mask: the body of GistNet and LensNet."""

import math

import jax
import jax.numpy as jnp

from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.attention import NEG
from megacontext_jax.model.gpt import close_block, qkv


def init_blocks(cfg: GPTConfig, key) -> dict:
    """Stacked layers as in the GPT; projections back into the stream start small, so that the input comes through."""
    shapes = cfg.param_shapes()["h"]
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape) * (0.3 if name.endswith("_proj") else 1.0) / math.sqrt(shape[-1])
        for (name, shape), k in zip(shapes.items(), keys, strict=True)
    }


def init_linear(key, out: int, inner: int, scale: float = 1.0) -> dict:
    weight = scale * jax.random.normal(key, (out, inner)) / math.sqrt(inner)
    return {"weight": weight, "bias": jnp.zeros(out)}


def run_blocks(layers: dict | tuple[dict, ...], cfg: GPTConfig, x_BTC, rope, attention):
    """All layers, stacked or from `decode.unstack`; `attention(q_BTHD, k_BTHD, v_BTHD)` decides who sees whom."""

    def block(x_BTC, layer):
        return close_block(layer, x_BTC, attention(*qkv(layer, cfg, x_BTC, rope))), None

    if isinstance(layers, tuple):
        for layer in layers:
            x_BTC, _ = block(x_BTC, {name: w.T for name, w in layer.items()})
        return x_BTC
    return jax.lax.scan(block, x_BTC, layers, unroll=True)[0]


def span_attention(q_NKHD, k_NKHD, v_NKHD, *, causal: bool = False):
    """Attention inside each of many short spans.

    Spans of few tokens are joined to tiles of about 64 with a block-diagonal mask: a few large products in place
    of very many tiny ones.
    """
    N, K, H, D = q_NKHD.shape
    per_tile = max(1, min(N, 64 // K))
    pad = -N % per_tile
    q, k, v = (
        jnp.pad(x, ((0, pad), (0, 0), (0, 0), (0, 0))).reshape(-1, per_tile * K, H, D)
        for x in (q_NKHD, k_NKHD, v_NKHD)
    )
    place = jnp.arange(per_tile * K)
    visible_TS = place[:, None] // K == place // K
    if causal:
        visible_TS &= place[:, None] >= place
    return masked_attention(q, k, v, visible_TS).reshape(N + pad, K, H, D)[:N]


def masked_attention(q_BTHD, k_BSHD, v_BSHD, visible):
    """Softmax attention; `visible` broadcasts to [B, H, T, S]."""
    s_BHTS = jnp.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD, preferred_element_type=jnp.float32)
    s_BHTS = jnp.where(visible, s_BHTS / math.sqrt(q_BTHD.shape[-1]), NEG)
    p_BHTS = jax.nn.softmax(s_BHTS, axis=-1).astype(v_BSHD.dtype)
    return jnp.einsum("bhts,bshd->bthd", p_BHTS, v_BSHD)
