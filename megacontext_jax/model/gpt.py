"""nanochat's GPT, every generation of it: rotary positions, QK norm, relu squared, a norm after the embedding.

Parameters are a plain pytree (`GPTConfig.param_shapes`); matrices are stored (out, in) as in PyTorch, layers
are stacked on axis 0. Shape suffixes: B batch, T tokens, C width, H heads, K key/value heads, D head size,
V vocabulary, S cache slots, L layers, N layers with value embeddings. Weights are float32; the dtype of the
activations is an argument. Source of the architecture: karpathy/nanochat; constants per generation live in
`arch.py`. What a generation does not have is absent from its parameters, and its function is the identity.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.attention import AttentionFn, blocked_attention, reference_attention
from megacontext_jax.model.loss import capped_logits

EPS = float(np.finfo(np.float32).eps)  # also for bfloat16 activations, as in nanochat
TURN = 1 << 16  # tokens; see `rope_table`


def init_params(cfg: GPTConfig, key: jax.Array) -> dict:
    """Random parameters of a new model, by the architecture's `Init`."""
    shapes = cfg.param_shapes()
    leaves, treedef = jax.tree.flatten_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    params = [_init(cfg, path[-1].key, shape, k) for (path, shape), k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, params)


def _init(cfg: GPTConfig, name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    init = cfg.constants.init
    bound = math.sqrt(3 / cfg.n_embd)
    if name in ("resid_lambdas", "x0_lambdas"):
        first, last = init.resid if name == "resid_lambdas" else init.x0
        return jnp.linspace(first, last, shape[0], dtype=jnp.float32)
    if name in ("smear_lambda", "backout_lambda"):
        return jnp.full(shape, init.smear if name == "smear_lambda" else init.backout, jnp.float32)
    if name in ("smear_gate", "ve_gate"):
        return init.gate * jax.random.uniform(key, shape, jnp.float32)
    if name == "wte":
        return init.wte_std * jax.random.normal(key, shape, jnp.float32)
    if name == "lm_head" and init.head_std is not None:
        return init.head_std * jax.random.normal(key, shape, jnp.float32)
    if init.uniform and name in ("c_q", "c_k", "c_v", "c_fc", "value_embeds"):
        scale = bound * (init.fc if name == "c_fc" else 1.0)
        return jax.random.uniform(key, shape, jnp.float32, -scale, scale)
    fan_out, fan_in = shape[-2:]
    std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
    if name in ("attn_proj", "mlp_proj", "lm_head"):
        std *= init.proj
    return std * jax.random.normal(key, shape, jnp.float32)


def rms_norm(x):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS)).astype(x.dtype)


def linear(x, w_OI):
    return jnp.einsum("...i,oi->...o", x, w_OI.astype(x.dtype))


def rope_frequencies(cfg: GPTConfig) -> np.ndarray:
    """float32 [D/2], radians per token, in nanochat's order of roundings; 0 for channels that do not turn.

    These are what is left of a far gist, whose span damps all others (p-RoPE; Barbero et al. 2024, arXiv:2410.06205).
    """
    D = cfg.head_dim
    frequency = 1.0 / np.float32(cfg.constants.rope_base) ** (
        np.arange(0, D, 2, dtype=np.float32) / np.float32(D)
    )
    return np.where(np.arange(D // 2) < round(cfg.rope_share * (D // 2)), frequency, np.float32(0))


def rope_table(cfg: GPTConfig, positions, dtype, fraction=0.0):
    """cos and sin of the rotary angles at `positions + fraction`, shape [*positions.shape, D/2].

    Whole positions of any size keep their phase: in float32 a product of position and frequency would be off by more than a
    radian at 33 million. Early generations round to bfloat16.
    """
    angles = _angles(cfg, positions, fraction)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if cfg.constants.rope_bf16:
        cos, sin = cos.astype(jnp.bfloat16), sin.astype(jnp.bfloat16)
    return cos.astype(dtype), sin.astype(dtype)


def _angles(cfg: GPTConfig, positions, fraction):
    frequency = rope_frequencies(cfg)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        return (positions + fraction)[..., None].astype(jnp.float32) * frequency
    # below TURN the same products as ever; whole turns of TURN tokens add what they leave of a circle
    turn, rest = positions // TURN, positions % TURN
    left_over = np.float32(np.mod(TURN * frequency.astype(np.float64), 2 * np.pi))
    near = (rest.astype(jnp.float32) + fraction)[..., None] * frequency
    return turn[..., None].astype(jnp.float32) * left_over + near


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


def layer_params(params) -> dict:
    """All that a block reads, with the layers on axis 0."""
    reading = {name: x for name, x in params.get("gistnet", {}).items() if name == "reading"}
    return (
        params["h"]
        | reading
        | {name: params[name] for name in ("resid_lambdas", "x0_lambdas") if name in params}
    )


def value_params(params, ids, dtype) -> dict:
    """Gates and the tokens' rows of the value embeddings, with the layers that have them on axis 0.

    `ids` of any shape; all rows are gathered at once, so that their gradient is one scatter.
    """
    if "value_embeds" not in params:
        return {}
    return {"gate": params["ve_gate"], "rows": params["value_embeds"][:, ids].astype(dtype)}


def enter_block(layer, x_BTC, x0_BTC):
    """The stream that enters a block: scaled, with a share of the embedding x0."""
    if "resid_lambdas" not in layer:
        return x_BTC
    mixed_BTC = layer["resid_lambdas"] * x_BTC + layer["x0_lambdas"] * x0_BTC
    return mixed_BTC.astype(x_BTC.dtype)


def qkv(layer, cfg: GPTConfig, x_BTC, rope, value=None, gists: int = 0):
    """Normed and rotated queries and keys, and values, of one layer.

    `value` is the layer's part of `value_params`: its rows are added to the values by a gate per head. Of the last
    `gists` rows every key head reads the channels by weights of its own, where a model has those (`context.head_places`).
    """
    h_BTC = rms_norm(x_BTC)
    q = linear(h_BTC, layer["c_q"]).reshape(*h_BTC.shape[:-1], cfg.n_head, cfg.head_dim)
    k, v = (_of_key_heads(layer, cfg, name, h_BTC, gists) for name in ("c_k", "c_v"))
    if value is not None:
        gate_BTK = jax.nn.sigmoid(linear(h_BTC[..., : value["gate"].shape[-1]], value["gate"]))
        v = v + (cfg.constants.ve_scale * gate_BTK)[..., None] * value["rows"].reshape(v.shape)
    q, k = (rms_norm(apply_rope(x, rope)) * cfg.constants.qk_scale for x in (q, k))
    return q, k, v


def _of_key_heads(layer, cfg: GPTConfig, name: str, h_BTC, gists: int):
    heads = cfg.n_kv_head, cfg.head_dim
    if "reading" not in layer or not gists:
        return linear(h_BTC, layer[name]).reshape(*h_BTC.shape[:-1], *heads)
    batch, tokens = h_BTC.shape[0], h_BTC.shape[1] - gists
    raw = linear(h_BTC[:, :tokens], layer[name]).reshape(batch, tokens, *heads)
    w_KDC = layer[name].reshape(*heads, -1) * layer["reading"][:, None]
    read = jnp.einsum("btc,kdc->btkd", h_BTC[:, tokens:], w_KDC.astype(h_BTC.dtype))
    return jnp.concatenate([raw, read], axis=1)


def close_block(layer, x_BTC, attn_BTHD):
    """The rest of a block: attention output into the residual stream, then the MLP."""
    x_BTC = x_BTC + linear(attn_BTHD.reshape(x_BTC.shape), layer["attn_proj"])
    hidden = jnp.square(jax.nn.relu(linear(rms_norm(x_BTC), layer["c_fc"])))
    return x_BTC + linear(hidden, layer["mlp_proj"])


def leave_trunk(params, x_BTC, middle_BTC):
    """The final normed activations; the stream at half depth is partly subtracted where the model has that."""
    if "backout_lambda" in params:
        x_BTC = x_BTC - params["backout_lambda"].astype(x_BTC.dtype) * middle_BTC
    return rms_norm(x_BTC)


def fold_layers(cfg: GPTConfig, block, carry, layers, values, unroll: int | bool = 1):
    """Run `block(kind, index, carry, layer, value)` over all layers; returns the last carry.

    `layers` is a tree with the layers on axis 0, `values` one with the layers that have value embeddings (None is
    handed to the others). Whole periods of equal layers are scanned: then `index` is traced and the static `kind`
    is the layer of the first period that looks the same.
    """
    period, repeats = cfg.layer_period()
    ve_layers, done = cfg.value_embed_layers(), period * repeats
    done_values = sum(i < done for i in ve_layers)

    def fold(kinds, start, carry, layers, values):
        n = 0
        for j, kind in enumerate(kinds):
            value = jax.tree.map(lambda x, n=n: x[n], values) if kind in ve_layers else None
            n += kind in ve_layers
            carry = block(kind, start + j, carry, jax.tree.map(lambda x, j=j: x[j], layers), value)
        return carry

    def group(carry, xs):
        g, layers, values = xs
        return fold(range(period), g * period, carry, layers, values), None

    def grouped(tree, count):
        return jax.tree.map(lambda x: x[:count].reshape(repeats, -1, *x.shape[1:]), tree)

    xs = jnp.arange(repeats), grouped(layers, done), grouped(values, done_values)
    carry, _ = jax.lax.scan(group, carry, xs, unroll=unroll)
    rest = (jax.tree.map(lambda x, n=n: x[n:], tree) for tree, n in ((layers, done), (values, done_values)))
    return fold(range(done, cfg.n_layer), done, carry, *rest)


class Entries(NamedTuple):
    """What enters the transformer, one row per place of the sequence."""

    x_BTC: jax.Array  # normed embeddings, smeared where the model does that
    rope: tuple[jax.Array, jax.Array]  # cos and sin [T, D/2] or [B, T, D/2]
    values: dict  # see `value_params`
    gists: int = 0  # how many of the last rows are gists, static


def token_entries(params, cfg: GPTConfig, ids_BT, dtype, place=lambda x_BTC: x_BTC) -> Entries:
    """A sequence of tokens at positions 0, 1, ..."""
    e_BTC = place(embed(params, ids_BT, dtype))
    x_BTC = smear(params, e_BTC, shift_right(e_BTC))
    rope = rope_table(cfg, jnp.arange(ids_BT.shape[1]), dtype)
    return Entries(x_BTC, rope, value_params(params, ids_BT, dtype))


def hidden_states(params, cfg: GPTConfig, ids_BT, *, dtype=jnp.float32, place=lambda x_BTC: x_BTC, **options):
    """Final normed activations [B, T, C] of a sequence of tokens; options are those of `run_trunk`."""
    entries = token_entries(params, cfg, ids_BT, dtype, place)
    return run_trunk(params, cfg, entries, place=place, **options)


def run_trunk(
    params,
    cfg: GPTConfig,
    entries: Entries,
    *,
    attention: AttentionFn = blocked_attention,
    remat: str = "none",
    unroll: int | bool = 1,
    place: Callable[[jax.Array], jax.Array] = lambda x_BTC: x_BTC,
    watch: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
):
    """Final normed activations [B, T, C] of all layers over the entries.

    With `watch`, a function of a layer's queries and keys to float32 [B, T], also its sum over the layers.

    `remat` is none, dots (keep matrix products) or full (keep block inputs); `unroll` is that of `lax.scan`
    over the layers (True: all of them, faster on CPUs and slower to compile); `place` puts the residual
    stream on a mesh, since weights split over the same devices would otherwise pull it with them.
    """
    x0_BTC, rope, values, gists = entries
    T, middle, period = x0_BTC.shape[1], cfg.n_layer // 2, cfg.layer_period()[0]
    windows = [window if window < T else None for window in cfg.windows()]

    def run(window, x_BTC, x0_BTC, layer, value):
        x_BTC = enter_block(layer, x_BTC, x0_BTC)
        if value is not None:
            value = value | {"rows": place(value["rows"])}
        with jax.named_scope("attention"):
            q, k, v = qkv(layer, cfg, x_BTC, rope, value, gists)
            attn_BTHD = attention(q, k, v, window=window)
        return place(close_block(layer, x_BTC, attn_BTHD)), None if watch is None else watch(q, k)

    def block(kind, index, carry, layer, value):
        x_BTC, kept_BTC, watched_BT = carry
        fn = partial(run, windows[kind])
        if remat == "full":
            fn = jax.checkpoint(fn)
        elif remat == "dots":
            fn = jax.checkpoint(fn, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        x_BTC, more_BT = fn(x_BTC, x0_BTC, layer, value)
        if watch is not None:
            watched_BT = watched_BT + more_BT
        if kept_BTC is not None and kind in (middle, middle % period):
            kept_BTC = jnp.where(index == middle, x_BTC, kept_BTC)
        return x_BTC, kept_BTC, watched_BT

    kept_BTC = x0_BTC if cfg.constants.backout else None
    watched_BT = None if watch is None else jnp.zeros(x0_BTC.shape[:2])
    carry = x0_BTC, kept_BTC, watched_BT
    *ends, watched_BT = fold_layers(cfg, block, carry, layer_params(params), values, unroll)
    x_BTC = leave_trunk(params, *ends)
    return x_BTC if watch is None else (x_BTC, watched_BT)


def residual_stream(params, cfg: GPTConfig, ids_BT, *, dtype=jnp.float32):
    """The stream [B, T, C] after every block, then the final normed activations: the plain form, layer by layer."""
    T, ve_layers = ids_BT.shape[1], cfg.value_embed_layers()
    rope = rope_table(cfg, jnp.arange(T), dtype)
    layers, values = layer_params(params), value_params(params, ids_BT, dtype)
    e_BTC = embed(params, ids_BT, dtype)
    x0_BTC = smear(params, e_BTC, shift_right(e_BTC))
    x_BTC, stream = x0_BTC, []
    for i, window in enumerate(cfg.windows()):
        layer = {name: w[i] for name, w in layers.items()}
        value = {name: w[ve_layers.index(i)] for name, w in values.items()} if i in ve_layers else None
        x_BTC = enter_block(layer, x_BTC, x0_BTC)
        attn_BTHD = reference_attention(
            *qkv(layer, cfg, x_BTC, rope, value), window=window if window < T else None
        )
        x_BTC = close_block(layer, x_BTC, attn_BTHD)
        stream.append(x_BTC)
    return [*stream, leave_trunk(params, x_BTC, stream[cfg.n_layer // 2])]


def forward(params, cfg: GPTConfig, ids_BT, **options):
    """Float32 logits [B, T, V]. Options are those of `hidden_states`."""
    x_BTC = hidden_states(params, cfg, ids_BT, **options)
    return capped_logits(x_BTC, params["lm_head"], cfg.logit_cap, cfg.vocab_size)
