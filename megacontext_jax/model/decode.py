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
    # where the newest Q entries look: attention per slot, mean over heads, sum over layers; None: nobody asks
    looks_BQS: jax.Array | None = None


def unstack_layers(params: dict) -> dict:
    """The weights as decoding reads them."""
    return params | {"lm_head": params["lm_head"].T, "h": unstack(layer_params(params))}


def unstack(stack: dict) -> tuple[dict, ...]:
    """One dict per layer, since slicing a stack would copy it at every call, and the matrices (in, out), which makes
    the products of a few rows up to twice as fast on CPUs."""
    return tuple({name: w[i].T for name, w in stack.items()} for i in range(len(stack["c_q"])))


def layer_weights(params: dict, cfg: GPTConfig, ids, dtype):
    """Per layer: its weights with the matrices (out, in) as views, its window, its value embeddings of `ids`."""
    values = dict(zip(cfg.value_embed_layers(), range(cfg.n_layer), strict=False))
    for i, (layer, window) in enumerate(zip(params["h"], cfg.windows(), strict=True)):
        value = None
        if i in values:
            rows = params["value_embeds"][values[i], ids].astype(dtype)
            value = {"gate": params["ve_gate"][values[i]], "rows": rows}
        yield i, {name: w.T for name, w in layer.items()}, window, value


def _write(cache_BKSD, x_BTKD, at_BT):
    """Rows into their slots, in place inside a loop; those behind the last slot are dropped.

    One scatter index per sequence and half of a head: a scatter with a single index would become a
    dynamic-update-slice, which XLA on CPUs fuses into its readers at the price of copying the whole cache.
    """
    B, K, S, D = cache_BKSD.shape
    x_BT2Kd = x_BTKD.reshape(B, -1, K, 2, D // 2).swapaxes(2, 3).astype(cache_BKSD.dtype)
    index = jnp.arange(B)[:, None, None], slice(None), at_BT[..., None], jnp.arange(2)
    return cache_BKSD.reshape(B, K, S, 2, D // 2).at[index].set(x_BT2Kd, mode="drop").reshape(B, K, S, D)


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
    x_BTC, rope = entries.x_BTC, entries.rope
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
    logits_BV, cache = extend(params, cfg, ids_B[:, None], jnp.ones_like(ids_B), cache, dtype=dtype)
    return logits_BV, cache


def extend(params, cfg: GPTConfig, ids_BT, count_B, cache: Cache, *, dtype=jnp.float32):
    """Append right-padded tokens, `count_B` of them valid, at least one. Returns as `decode_step`."""
    T = ids_BT.shape[1]
    rope = rope_table(cfg, (cache.length_B + cache.offset_B)[:, None] + jnp.arange(T), dtype)
    e_BTC = embed(params, ids_BT, dtype)
    before_BTC = jnp.concatenate([cache.previous_B1C.astype(dtype), e_BTC[:, :-1]], axis=1)
    entries = Entries(smear(params, e_BTC, before_BTC), rope, {})
    tokens_B = cache.length_B + cache.offset_B + count_B
    prompt = Prompt(ids_BT, tokens_B, jnp.ones(ids_BT.shape, bool), e_BTC)
    return extend_entries(params, cfg, entries, prompt, count_B, cache)


def _attend(q_BTHD, k_BKSD, v_BKSD, visible_BTS, looks: bool):
    """Attention [B, T, H, D] over the slots, and where it went [B, T, S], the mean of the heads, if `looks`."""
    B, T, H, D = q_BTHD.shape
    K, S = k_BKSD.shape[1:3]
    # time and the heads of a group as one axis: an axis of length 1 would cost a single token a third more
    q_BKQD = q_BTHD.reshape(B, T, K, -1, D).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, D)
    s_BKQS = jnp.einsum("bkqd,bksd->bkqs", q_BKQD, k_BKSD, preferred_element_type=jnp.float32)
    visible_BKQS = jnp.tile(visible_BTS, (1, H // K, 1))[:, None]
    p_BKQS = jax.nn.softmax(jnp.where(visible_BKQS, s_BKQS / math.sqrt(D), NEG), axis=-1)
    o_BKQD = jnp.einsum("bkqs,bksd->bkqd", p_BKQS.astype(v_BKSD.dtype), v_BKSD)
    o_BTHD = o_BKQD.reshape(B, K, -1, T, D).transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)
    looked_BTS = p_BKQS.reshape(B, H, T, S).mean(1) if looks else 0.0
    return o_BTHD.astype(q_BTHD.dtype), looked_BTS


def extend_entries(params, cfg: GPTConfig, entries: Entries, prompt: Prompt, count_B, cache: Cache):
    """Append right-padded entries behind the valid slots; an edit of a context is a shorter `length_B` and this.

    What stands in the slots before is neither computed again nor changed, whatever follows it.
    """
    x_BTC, rope = entries.x_BTC, entries.rope
    (B, T), S, dtype = x_BTC.shape[:2], cache.k[0].shape[2], x_BTC.dtype
    at_BT = cache.length_B[:, None] + jnp.arange(T)
    new_BT = jnp.arange(T) < count_B[:, None]
    slot_BT = jnp.where(new_BT, at_BT, S)
    back_BTS = at_BT[..., None] - jnp.arange(S)
    looks = cache.looks_BQS is not None
    x0_BTC, kept_BTC, ks, vs, looks_BTS = x_BTC, None, [], [], 0.0
    for i, layer, window, value in layer_weights(params, cfg, prompt.ids_BW, dtype):
        x_BTC = enter_block(layer, x_BTC, x0_BTC)
        if value is not None:
            value["rows"] = value["rows"] * prompt.raw_BW[..., None].astype(dtype)
        q, k, v = qkv(layer, cfg, x_BTC, rope, value)
        k_BKSD, v_BKSD = _write(cache.k[i], k, slot_BT), _write(cache.v[i], v, slot_BT)
        attn, looked_BTS = _attend(q, k_BKSD, v_BKSD, (back_BTS >= 0) & (back_BTS <= window), looks)
        looks_BTS = looks_BTS + looked_BTS
        x_BTC = close_block(layer, x_BTC, attn)
        kept_BTC = x_BTC if i == cfg.n_layer // 2 else kept_BTC
        ks.append(k_BKSD)
        vs.append(v_BKSD)
    last_B11 = (count_B - 1)[:, None, None]
    x_B1C, kept_B1C, e_B1C = (
        jnp.take_along_axis(y_BTC, last_B11, axis=1) for y_BTC in (x_BTC, kept_BTC, prompt.last_BWC)
    )
    length_B = cache.length_B + count_B
    looks_BQS = cache.looks_BQS
    if looks:
        Q = looks_BQS.shape[1]
        newest_BT = new_BT & (at_BT >= length_B[:, None] - Q)
        place_BT = jnp.where(newest_BT, at_BT % Q, Q)
        looks_BQS = looks_BQS.at[jnp.arange(B)[:, None], place_BT].set(looks_BTS, mode="drop")
    cache = Cache(tuple(ks), tuple(vs), e_B1C, length_B, prompt.tokens_B - length_B, looks_BQS)
    return head_logits(params, cfg, x_B1C, kept_B1C), cache


def head_logits(params, cfg, x_B1C, kept_B1C):
    x_B1C = leave_trunk(params, x_B1C, kept_B1C)
    return capped_logits(x_B1C, params["lm_head"].T, cfg.logit_cap, cfg.vocab_size)[:, 0]
