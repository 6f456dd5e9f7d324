"""Gist attention by the definition: every score, one mask, one softmax. What all other paths are held against.

Shape suffixes: B batch, T rows of the queries' level, S rows of the keys' level, H heads, K key heads, D head size.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.spec import GistSpec

NEG = -1e30  # a finite minus infinity


def gist_attention_reference(q, k, v, spec: GistSpec, segment_ids, scale: float) -> tuple:
    """Per-level outputs; memory O(T^2). Scores, softmax and sums are float32."""
    return tuple(_level(level, q[level], k, v, spec, segment_ids, scale) for level in range(spec.levels + 1))


def _level(level: int, q_BTHD, k, v, spec: GistSpec, segment_ids, scale: float):
    B, T, H, D = q_BTHD.shape
    K = k[0].shape[2]
    q_BTKGD = q_BTHD.reshape(B, T, K, H // K, D)
    index_T = jnp.arange(T)
    scores, visible = [], []
    for m, (first_T, stop_T) in enumerate(spec.key_ranges(level, index_T)):
        row_S = jnp.arange(k[m].shape[1])
        s = jnp.einsum("btkgd,bskd->bkgts", q_BTKGD, k[m], preferred_element_type=jnp.float32) * scale
        seen_TS = (row_S >= first_T[:, None]) & (row_S < stop_T[:, None])
        seen_BTS = jnp.broadcast_to(seen_TS, (B, *seen_TS.shape))
        if segment_ids is not None:
            asking_BT = segment_ids[:, (index_T + 1) * spec.block**level - 1]
            told_BS = segment_ids[:, row_S * spec.block**m]
            seen_BTS &= asking_BT[:, :, None] == told_BS[:, None]
        scores.append(s)
        visible.append(seen_BTS)
    s, seen = jnp.concatenate(scores, axis=-1), jnp.concatenate(visible, axis=-1)[:, None, None]
    p = jax.nn.softmax(jnp.where(seen, s, NEG), axis=-1) * seen  # a row that sees nothing gives zeros
    v_BSKD = jnp.concatenate(v, axis=1)
    o_BTKGD = jnp.einsum("bkgts,bskd->btkgd", p, v_BSKD, preferred_element_type=jnp.float32)
    return o_BTKGD.reshape(B, T, H, D).astype(q_BTHD.dtype)
