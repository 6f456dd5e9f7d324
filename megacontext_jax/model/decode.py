"""Decoding with a key/value cache of static shape.

Rows of a batch may have different lengths: prompts are padded on the right and every row keeps its own
position, so that one compiled step serves any mixture of conversations.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.attention import NEG, AttentionFn, reference_attention
from megacontext_jax.model.gpt import (
    Entries,
    close_block,
    embed,
    enter_block,
    layer_params,
    leave_trunk,
    qkv,
    rope_table,
    shift_right,
    smear,
)
from megacontext_jax.model.loss import capped_logits


class Cache(NamedTuple):
    """What a sequence leaves behind for the tokens to come."""

    k: tuple[jax.Array, ...]  # per layer [B, K, S, D], after rotation and norm
    v: tuple[jax.Array, ...]
    previous_B1C: jax.Array  # embedding of the last token, for the smear
    length_B: jax.Array  # valid slots of each row
    offset_B: jax.Array  # tokens that a row has seen beyond its slots: more than none where some share a gist


def unstack_layers(params: dict) -> dict:
    """The weights as decoding reads them: one dict per layer, since slicing a stack would copy it, and the
    matrices (in, out), which makes the products of a few rows up to twice as fast on CPUs."""
    n_layer = params["h"]["c_q"].shape[0]
    layers = tuple({name: w[i].T for name, w in layer_params(params).items()} for i in range(n_layer))
    return params | {"lm_head": params["lm_head"].T, "h": layers}


def layer_weights(params: dict, cfg: GPTConfig, ids, dtype):
    """Per layer: its weights with the matrices (out, in) as views, its window, its value embeddings of `ids`."""
    values = dict(zip(cfg.value_embed_layers(), range(cfg.n_layer), strict=False))
    for i, (layer, window) in enumerate(zip(params["h"], cfg.windows(), strict=True)):
        value = None
        if i in values:
            rows = params["value_embeds"][values[i], ids].astype(dtype)
            value = {"gate": params["ve_gate"][values[i]], "rows": rows}
        yield i, {name: w.T for name, w in layer.items()}, window, value


def _append(cache_BKSD, x_BKD, pos_B):
    """Writes one row per sequence, in place inside a loop; full rows drop it.

    One scatter index per sequence and half of a head: a scatter with a single index would become a
    dynamic-update-slice, which XLA on CPUs fuses into its readers at the price of copying the whole cache.
    """
    B, K, S, D = cache_BKSD.shape
    rows_B1, halves = jnp.arange(B)[:, None], jnp.arange(2)[None]
    x_B2Kd = x_BKD.reshape(B, K, 2, D // 2).swapaxes(1, 2).astype(cache_BKSD.dtype)
    cache_BKS2d = cache_BKSD.reshape(B, K, S, 2, D // 2)
    return cache_BKS2d.at[rows_B1, :, pos_B[:, None], halves].set(x_B2Kd, mode="drop").reshape(B, K, S, D)


def init_cache(cfg: GPTConfig, batch: int, slots: int, dtype=jnp.float32) -> Cache:
    shape = (batch, cfg.n_kv_head, slots, cfg.head_dim)
    arrays = [tuple(jnp.zeros(shape, dtype) for _ in range(cfg.n_layer)) for _ in range(2)]
    previous_B1C = jnp.zeros((batch, 1, cfg.n_embd), dtype)
    return Cache(*arrays, previous_B1C, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))


def prefill(
    params,
    cfg: GPTConfig,
    ids_BT,
    length_B,
    cache: Cache,
    *,
    attention: AttentionFn = reference_attention,
    dtype=jnp.float32,
):
    """Fill an empty cache with right-padded prompts.

    Returns the float32 logits [B, V] after each row's last valid token, and the cache.
    """
    e_BTC = embed(params, ids_BT, dtype)
    x_BTC = smear(params, e_BTC, shift_right(e_BTC))
    entries = Entries(x_BTC, rope_table(cfg, jnp.arange(ids_BT.shape[1]), dtype), {})
    tokens = Prompt(ids_BT, length_B, jnp.ones(ids_BT.shape, bool), e_BTC)
    return prefill_entries(params, cfg, entries, tokens, length_B, cache, attention=attention)


class Prompt(NamedTuple):
    """The tokens behind the places of a prompt."""

    ids_BW: jax.Array  # what place w stands for; of no account where it is no token
    tokens_B: jax.Array  # seen in all
    raw_BW: jax.Array  # bool: the place is a token
    last_BWC: jax.Array  # embeddings, of which that of the last valid place is kept for the smear


def prefill_entries(
    params, cfg: GPTConfig, entries: Entries, prompt: Prompt, count_B, cache: Cache, *, attention: AttentionFn
):
    """Fill an empty cache with right-padded entries, of which `count_B` are valid; returns as `prefill`."""
    x_BTC, rope, _ = entries
    T, dtype = x_BTC.shape[1], x_BTC.dtype
    x0_BTC, kept_BTC, ks, vs = x_BTC, None, [], []
    for i, layer, window, value in layer_weights(params, cfg, prompt.ids_BW, dtype):
        x_BTC = enter_block(layer, x_BTC, x0_BTC)
        if value is not None:
            value["rows"] = value["rows"] * prompt.raw_BW[..., None].astype(dtype)
        q, k, v = qkv(layer, cfg, x_BTC, rope, value)
        x_BTC = close_block(layer, x_BTC, attention(q, k, v, window=window if window < T else None))
        kept_BTC = x_BTC if i == cfg.n_layer // 2 else kept_BTC
        ks.append(cache.k[i].at[:, :, :T].set(k.transpose(0, 2, 1, 3).astype(cache.k[i].dtype)))
        vs.append(cache.v[i].at[:, :, :T].set(v.transpose(0, 2, 1, 3).astype(cache.v[i].dtype)))
    last_B11 = (count_B - 1)[:, None, None]
    x_B1C, kept_B1C, e_B1C = (
        jnp.take_along_axis(y_BTC, last_B11, axis=1) for y_BTC in (x_BTC, kept_BTC, prompt.last_BWC)
    )
    cache = Cache(tuple(ks), tuple(vs), e_B1C, count_B, prompt.tokens_B - count_B)
    return head_logits(params, cfg, x_B1C, kept_B1C), cache


def decode_step(params, cfg: GPTConfig, ids_B, cache: Cache, *, dtype=jnp.float32):
    """Append one token per row. Returns float32 logits [B, V] and the cache, one slot longer.

    A row whose cache is full drops the write; callers stop at the window's end.
    """
    B, S = ids_B.shape[0], cache.k[0].shape[2]
    pos_B = cache.length_B
    rope = rope_table(cfg, (pos_B + cache.offset_B)[:, None], dtype)
    back_BS = pos_B[:, None] - jnp.arange(S)
    e_B1C = embed(params, ids_B[:, None], dtype)
    x_B1C = smear(params, e_B1C, cache.previous_B1C.astype(dtype))
    x0_B1C, kept_B1C, ks, vs = x_B1C, None, [], []
    for i, layer, window, value in layer_weights(params, cfg, ids_B[:, None], dtype):
        x_B1C = enter_block(layer, x_B1C, x0_B1C)
        q, k, v = qkv(layer, cfg, x_B1C, rope, value)
        k_BKSD = _append(cache.k[i], k[:, 0], pos_B)
        v_BKSD = _append(cache.v[i], v[:, 0], pos_B)
        q_BKGD = q.reshape(B, cfg.n_kv_head, -1, cfg.head_dim)
        s_BKGS = jnp.einsum("bkgd,bksd->bkgs", q_BKGD, k_BKSD, preferred_element_type=jnp.float32)
        visible_BS = (back_BS >= 0) & (back_BS <= window)
        s_BKGS = jnp.where(visible_BS[:, None, None], s_BKGS / math.sqrt(cfg.head_dim), NEG)
        p_BKGS = jax.nn.softmax(s_BKGS, axis=-1).astype(v_BKSD.dtype)
        attn = jnp.einsum("bkgs,bksd->bkgd", p_BKGS, v_BKSD).astype(x_B1C.dtype)
        x_B1C = close_block(layer, x_B1C, attn)
        kept_B1C = x_B1C if i == cfg.n_layer // 2 else kept_B1C
        ks.append(k_BKSD)
        vs.append(v_BKSD)
    return head_logits(params, cfg, x_B1C, kept_B1C), Cache(
        tuple(ks), tuple(vs), e_B1C, pos_B + 1, cache.offset_B
    )


def head_logits(params, cfg, x_B1C, kept_B1C):
    x_B1C = leave_trunk(params, x_B1C, kept_B1C)
    return capped_logits(x_B1C, params["lm_head"].T, cfg.logit_cap, cfg.vocab_size)[:, 0]
