"""nanochat's GPT: rotary positions, QK norm, relu squared, a norm after the embedding, an untied head.

Parameters are a plain pytree (`GPTConfig.param_shapes`); matrices are stored (out, in) as in PyTorch, layers
are stacked on axis 0. Shape suffixes: B batch, T tokens, C width, H heads, K key/value heads, D head size,
V vocabulary, S cache slots, L layers. Weights are float32; the dtype of the activations is an argument.
Source of the architecture: karpathy/nanochat; constants per generation live in `arch.py`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.attention import AttentionFn, blocked_attention
from megacontext_jax.model.loss import capped_logits

EPS = float(np.finfo(np.float32).eps)  # also for bfloat16 activations, as in nanochat


def init_params(cfg: GPTConfig, key: jax.Array) -> dict:
    """Random parameters: embedding N(0, 1), linears N(0, min(1, sqrt(out/in)) / sqrt(in)).

    Output projections and head are scaled by the architecture's `proj_init` (0 for classic).
    """
    shapes = cfg.param_shapes()
    leaves, treedef = jax.tree.flatten_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple))
    params, smear = [], cfg.constants.smear
    fixed = {
        "smear_gate": lambda shape: jnp.zeros(shape),
        "smear_lambda": lambda shape: jnp.full(shape, smear),
    }
    for (path, shape), leaf_key in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        name = path[-1].key
        if name in fixed:
            params.append(fixed[name](shape))
            continue
        if name == "wte":
            std = 1.0
        else:
            fan_out, fan_in = shape[-2:]
            std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
            if name in ("attn_proj", "mlp_proj", "lm_head"):
                std *= cfg.constants.proj_init
        params.append(std * jax.random.normal(leaf_key, shape, jnp.float32))
    return jax.tree.unflatten(treedef, params)


def rms_norm(x):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS)).astype(x.dtype)


def linear(x, w_OI):
    return jnp.einsum("...i,oi->...o", x, w_OI.astype(x.dtype))


def rope_table(cfg: GPTConfig, positions, dtype):
    """cos and sin of the rotary angles, shape [*positions.shape, D/2]."""
    D = cfg.head_dim
    freqs = cfg.constants.rope_base ** (-np.arange(0, D, 2, dtype=np.float32) / D)
    angles = positions[..., None].astype(jnp.float32) * freqs
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if cfg.constants.rope_bf16:
        cos, sin = cos.astype(jnp.bfloat16), sin.astype(jnp.bfloat16)
    return cos.astype(dtype), sin.astype(dtype)


def apply_rope(x_BTHD, rope):
    """Rotate the two halves of each head by minus the angle (nanochat's sign)."""
    cos, sin = (t[..., None, :] for t in rope)
    x1, x2 = jnp.split(x_BTHD, 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)


def embed(params, ids, dtype):
    """Normed embeddings; `ids` of any shape."""
    return rms_norm(params["wte"][ids].astype(dtype))


def smear(params, x, previous):
    """Mix the embedding of the token before into each token's, by a learned gate; the identity without smear.

    x and previous have the same shape [..., C]; both are embeddings before smearing.
    """
    if "smear_gate" not in params:
        return x
    gate = jax.nn.sigmoid(linear(x[..., : params["smear_gate"].shape[1]], params["smear_gate"]))
    return x + params["smear_lambda"].astype(x.dtype) * gate * previous


def shift_right(x_BTC):
    """Each position's predecessor; zeros before the first."""
    return jnp.pad(x_BTC, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def qkv(layer, cfg: GPTConfig, x_BTC, rope):
    """Normed and rotated queries and keys, and values, of one layer."""
    h_BTC = rms_norm(x_BTC)
    q, k, v = (
        linear(h_BTC, layer[name]).reshape(*h_BTC.shape[:-1], heads, cfg.head_dim)
        for name, heads in (("c_q", cfg.n_head), ("c_k", cfg.n_kv_head), ("c_v", cfg.n_kv_head))
    )
    q, k = (rms_norm(apply_rope(x, rope)) * cfg.constants.qk_scale for x in (q, k))
    return q, k, v


def close_block(layer, x_BTC, attn_BTHD):
    """The rest of a block: attention output into the residual stream, then the MLP."""
    x_BTC = x_BTC + linear(attn_BTHD.reshape(x_BTC.shape), layer["attn_proj"])
    hidden = jnp.square(jax.nn.relu(linear(rms_norm(x_BTC), layer["c_fc"])))
    return x_BTC + linear(hidden, layer["mlp_proj"])


def hidden_states(
    params,
    cfg: GPTConfig,
    ids_BT,
    *,
    attention: AttentionFn = blocked_attention,
    dtype=jnp.float32,
    remat: str = "none",
    unroll: int | bool = 1,
    place: Callable[[jax.Array], jax.Array] = lambda x_BTC: x_BTC,
):
    """Final normed activations [B, T, C].

    `remat` is none, dots (keep matrix products) or full (keep block inputs); `unroll` is that of `lax.scan`
    over the layers (True: all of them, faster on CPUs and slower to compile); `place` puts the residual
    stream on a mesh, since weights split over the same devices would otherwise pull it with them.
    """
    rope = rope_table(cfg, jnp.arange(ids_BT.shape[1]), dtype)

    def block(x_BTC, layer):
        with jax.named_scope("attention"):
            attn_BTHD = attention(*qkv(layer, cfg, x_BTC, rope))
        return place(close_block(layer, x_BTC, attn_BTHD)), None

    if remat == "full":
        block = jax.checkpoint(block)
    elif remat == "dots":
        block = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    x_BTC = place(embed(params, ids_BT, dtype))
    x_BTC = smear(params, x_BTC, shift_right(x_BTC))
    x_BTC, _ = jax.lax.scan(block, x_BTC, params["h"], unroll=unroll)
    return rms_norm(x_BTC)


def forward(params, cfg: GPTConfig, ids_BT, **options):
    """Float32 logits [B, T, V]. Options are those of `hidden_states`."""
    x_BTC = hidden_states(params, cfg, ids_BT, **options)
    return capped_logits(x_BTC, params["lm_head"], cfg.constants.softcap, cfg.vocab_size)
