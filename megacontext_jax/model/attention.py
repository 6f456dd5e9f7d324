"""Causal attention over whole sequences: a readable reference, a blocked CPU path, cuDNN on GPUs.

`select_attention` decides once, outside `jit`, and says why; nothing falls back silently.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from megacontext_jax.errors import UserError

AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
NEG = -1e30  # a finite minus infinity: fully masked rows stay finite


class Choice(NamedTuple):
    name: str
    fn: AttentionFn
    why: str


def reference_attention(q_BTHD, k_BTKD, v_BTKD):
    """Softmax attention, causal, scores in full. K divides H: query head h reads key head h // (H / K)."""
    H, K, D = q_BTHD.shape[2], k_BTKD.shape[2], q_BTHD.shape[3]
    T = q_BTHD.shape[1]
    k_BTHD, v_BTHD = (jnp.repeat(x, H // K, axis=2) for x in (k_BTKD, v_BTKD))
    s_BHTS = jnp.einsum("bthd,bshd->bhts", q_BTHD, k_BTHD, preferred_element_type=jnp.float32)
    s_BHTS = s_BHTS / math.sqrt(D)
    causal_TS = jnp.tril(jnp.ones((T, T), bool))
    p_BHTS = jax.nn.softmax(jnp.where(causal_TS, s_BHTS, NEG), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", p_BHTS.astype(v_BTHD.dtype), v_BTHD)


def blocked_attention(q_BTHD, k_BTKD, v_BTKD, *, block: int = 64):
    """The same function, one block of queries at a time against its causal prefix of keys.

    Half the products of the reference, no [T, T] buffer that outlives its block, and a backward pass that
    recomputes the probabilities from the saved log-sum-exp. Made for CPUs, where XLA otherwise spends its
    time on elementwise passes over the scores.
    """
    H, K = q_BTHD.shape[2], k_BTKD.shape[2]
    k_BTHD, v_BTHD = (jnp.repeat(x, H // K, axis=2) if H != K else x for x in (k_BTKD, v_BTKD))
    q_BHTD, k_BHTD, v_BHTD = (x.transpose(0, 2, 1, 3) for x in (q_BTHD, k_BTHD, v_BTHD))
    return _blocked(q_BHTD, k_BHTD, v_BHTD, block).transpose(0, 2, 1, 3)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(q_BHTD, k_BHTD, v_BHTD, block):
    return _blocked_fwd(q_BHTD, k_BHTD, v_BHTD, block)[0]


def _blocks(T: int, block: int):
    return [(start, min(start + block, T)) for start in range(0, T, block)]


def _scores(q_BHbD, k_BHsD, start: int, end: int):
    """Scores of queries start..end against keys 0..end, masked on the diagonal block only."""
    s_BHbs = jnp.einsum("bhtd,bhsd->bhts", q_BHbD, k_BHsD, preferred_element_type=jnp.float32)
    s_BHbs = s_BHbs / math.sqrt(q_BHbD.shape[-1])
    visible = jnp.arange(end)[None, :] <= jnp.arange(start, end)[:, None]
    return jnp.where(visible, s_BHbs, NEG)


def _blocked_fwd(q_BHTD, k_BHTD, v_BHTD, block):
    outs, lses = [], []
    for start, end in _blocks(q_BHTD.shape[2], block):
        s_BHbs = _scores(q_BHTD[:, :, start:end], k_BHTD[:, :, :end], start, end)
        max_BHb1 = s_BHbs.max(-1, keepdims=True)
        e_BHbs = jnp.exp(s_BHbs - max_BHb1)
        sum_BHb1 = e_BHbs.sum(-1, keepdims=True)
        o_BHbD = jnp.einsum("bhts,bhsd->bhtd", e_BHbs.astype(v_BHTD.dtype), v_BHTD[:, :, :end])
        outs.append((o_BHbD / sum_BHb1).astype(v_BHTD.dtype))
        lses.append(max_BHb1 + jnp.log(sum_BHb1))
    o_BHTD = jnp.concatenate(outs, axis=2)
    return o_BHTD, (q_BHTD, k_BHTD, v_BHTD, o_BHTD, jnp.concatenate(lses, axis=2))


def _blocked_bwd(block, saved, do_BHTD):
    q_BHTD, k_BHTD, v_BHTD, o_BHTD, lse_BHT1 = saved
    T, scale = q_BHTD.shape[2], 1.0 / math.sqrt(q_BHTD.shape[-1])
    delta_BHT1 = (do_BHTD.astype(jnp.float32) * o_BHTD.astype(jnp.float32)).sum(-1, keepdims=True)
    dqs = []
    dk_BHTD = jnp.zeros(k_BHTD.shape, jnp.float32)
    dv_BHTD = jnp.zeros(v_BHTD.shape, jnp.float32)
    for start, end in _blocks(T, block):
        q_BHbD, do_BHbD = q_BHTD[:, :, start:end], do_BHTD[:, :, start:end]
        s_BHbs = _scores(q_BHbD, k_BHTD[:, :, :end], start, end)
        p_BHbs = jnp.exp(s_BHbs - lse_BHT1[:, :, start:end])
        dp_BHbs = jnp.einsum(
            "bhtd,bhsd->bhts", do_BHbD, v_BHTD[:, :, :end], preferred_element_type=jnp.float32
        )
        ds_BHbs = (p_BHbs * (dp_BHbs - delta_BHT1[:, :, start:end]) * scale).astype(q_BHTD.dtype)
        dqs.append(jnp.einsum("bhts,bhsd->bhtd", ds_BHbs, k_BHTD[:, :, :end]))
        dk_BHsD = jnp.einsum("bhts,bhtd->bhsd", ds_BHbs, q_BHbD, preferred_element_type=jnp.float32)
        dv_BHsD = jnp.einsum(
            "bhts,bhtd->bhsd", p_BHbs.astype(do_BHTD.dtype), do_BHbD, preferred_element_type=jnp.float32
        )
        dk_BHTD = dk_BHTD.at[:, :, :end].add(dk_BHsD)
        dv_BHTD = dv_BHTD.at[:, :, :end].add(dv_BHsD)
    dq_BHTD = jnp.concatenate(dqs, axis=2)
    return dq_BHTD, dk_BHTD.astype(k_BHTD.dtype), dv_BHTD.astype(v_BHTD.dtype)


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def cudnn_attention(q_BTHD, k_BTKD, v_BTKD):
    return jax.nn.dot_product_attention(q_BTHD, k_BTKD, v_BTKD, is_causal=True, implementation="cudnn")


def xla_attention(q_BTHD, k_BTKD, v_BTKD):
    return jax.nn.dot_product_attention(q_BTHD, k_BTKD, v_BTKD, is_causal=True, implementation="xla")


IMPLEMENTATIONS = {
    "reference": reference_attention,
    "blocked": blocked_attention,
    "cudnn": cudnn_attention,
    "xla": xla_attention,
}


def select_attention(
    impl: str, *, platform: str, dtype, head_dim: int, capability: float | None = None
) -> Choice:
    """Resolve `--attention-impl` for this platform; an impossible request is refused with its reason.

    `capability` is the CUDA compute capability of the device, None where it has none.
    """
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise UserError(f"Unknown --attention-impl {impl!r}; choose auto, {', '.join(IMPLEMENTATIONS)}.")
    refusal = _cudnn_refusal(platform, dtype, head_dim, capability)
    if impl == "cudnn" and refusal:
        raise UserError(f"--attention-impl cudnn cannot run here: {refusal}; use --attention-impl auto.")
    if impl != "auto":
        return Choice(impl, IMPLEMENTATIONS[impl], "asked for")
    if platform == "cpu":
        return Choice("blocked", blocked_attention, "blocked queries are the fastest dense path on a CPU")
    if refusal:
        return Choice("xla", xla_attention, f"cuDNN refused: {refusal}")
    return Choice("cudnn", cudnn_attention, "half precision on an NVIDIA GPU")


def _cudnn_refusal(platform: str, dtype, head_dim: int, capability: float | None) -> str | None:
    """Why cuDNN's fused attention cannot run, or None."""
    if platform not in ("gpu", "cuda"):
        return f"the device is a {platform}"
    if capability is None or capability < 8.0:
        return f"its fused kernels need compute capability 8.0 and this device has {capability}"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"it has no {jnp.dtype(dtype).name} kernel"
    if head_dim % 8 or head_dim > 128:
        return f"head size {head_dim} is not a multiple of 8 up to 128"
    return None
