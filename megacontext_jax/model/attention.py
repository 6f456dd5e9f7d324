"""Causal attention over whole sequences: a readable reference, a blocked CPU path, cuDNN on GPUs.

Every implementation takes `window`: a query sees itself and that many tokens before it (None: all of them).

`select_attention` decides once, outside `jit`, and says why; nothing falls back silently.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from megacontext_jax.errors import UserError

AttentionFn = Callable[..., jax.Array]  # (q_BTHD, k_BTKD, v_BTKD, *, window)
NEG = -1e30  # a finite minus infinity: fully masked rows stay finite


class Choice(NamedTuple):
    name: str
    fn: AttentionFn
    why: str

    @property
    def windowed(self) -> bool:
        """Whether a window saves work; otherwise it is only a mask over the full product."""
        return self.name in ("blocked", "cudnn")


def _visible(q_pos, k_pos, window: int | None):
    back = q_pos[:, None] - k_pos[None, :]
    return (back >= 0) if window is None else (back >= 0) & (back <= window)


def reference_attention(q_BTHD, k_BTKD, v_BTKD, *, window: int | None = None):
    """Softmax attention, causal, scores in full. K divides H: query head h reads key head h // (H / K)."""
    H, K, D = q_BTHD.shape[2], k_BTKD.shape[2], q_BTHD.shape[3]
    T = q_BTHD.shape[1]
    k_BTHD, v_BTHD = (jnp.repeat(x, H // K, axis=2) for x in (k_BTKD, v_BTKD))
    s_BHTS = jnp.einsum("bthd,bshd->bhts", q_BTHD, k_BTHD, preferred_element_type=jnp.float32)
    s_BHTS = s_BHTS / math.sqrt(D)
    visible_TS = _visible(jnp.arange(T), jnp.arange(T), window)
    p_BHTS = jax.nn.softmax(jnp.where(visible_TS, s_BHTS, NEG), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", p_BHTS.astype(v_BTHD.dtype), v_BTHD)


def biased_attention(bias_BHTT, q_BTHD, k_BTKD, v_BTKD, *, window: int | None = None):
    """Causal attention with a bias on the scores."""
    H, K = q_BTHD.shape[2], k_BTKD.shape[2]
    T = q_BTHD.shape[1]
    k_BTHD, v_BTHD = (jnp.repeat(x, H // K, axis=2) for x in (k_BTKD, v_BTKD))
    visible_TS = _visible(jnp.arange(T), jnp.arange(T), window)
    return jax.nn.dot_product_attention(
        q_BTHD, k_BTHD, v_BTHD, bias=bias_BHTT.astype(q_BTHD.dtype), mask=visible_TS
    )


def blocked_attention(q_BTHD, k_BTKD, v_BTKD, *, window: int | None = None, block: int = 64):
    """The same function, one block of queries at a time against the keys that it can see.

    Half the products of the reference, no [T, T] buffer that outlives its block, and a backward pass that
    recomputes the probabilities from the saved log-sum-exp. Made for CPUs, where XLA otherwise spends its
    time on elementwise passes over the scores.
    """
    H, K = q_BTHD.shape[2], k_BTKD.shape[2]
    k_BTHD, v_BTHD = (jnp.repeat(x, H // K, axis=2) if H != K else x for x in (k_BTKD, v_BTKD))
    q_BHTD, k_BHTD, v_BHTD = (x.transpose(0, 2, 1, 3) for x in (q_BTHD, k_BTHD, v_BTHD))
    return _blocked(q_BHTD, k_BHTD, v_BHTD, block, window).transpose(0, 2, 1, 3)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blocked(q_BHTD, k_BHTD, v_BHTD, block, window):
    return _blocked_fwd(q_BHTD, k_BHTD, v_BHTD, block, window)[0]


def _blocks(T: int, block: int, window: int | None):
    """(first key, first query, end) of each block: its queries see keys first key..end."""
    starts = range(0, T, block)
    return [(0 if window is None else max(0, s - window), s, min(s + block, T)) for s in starts]


def _scores(q_BHbD, k_BHsD, first: int, start: int, end: int, window: int | None):
    """Masked scores of queries start..end against keys first..end."""
    s_BHbs = jnp.einsum("bhtd,bhsd->bhts", q_BHbD, k_BHsD, preferred_element_type=jnp.float32)
    s_BHbs = s_BHbs / math.sqrt(q_BHbD.shape[-1])
    return jnp.where(_visible(jnp.arange(start, end), jnp.arange(first, end), window), s_BHbs, NEG)


def _blocked_fwd(q_BHTD, k_BHTD, v_BHTD, block, window):
    outs, lses = [], []
    for first, start, end in _blocks(q_BHTD.shape[2], block, window):
        s_BHbs = _scores(q_BHTD[:, :, start:end], k_BHTD[:, :, first:end], first, start, end, window)
        max_BHb1 = s_BHbs.max(-1, keepdims=True)
        e_BHbs = jnp.exp(s_BHbs - max_BHb1)
        sum_BHb1 = e_BHbs.sum(-1, keepdims=True)
        o_BHbD = jnp.einsum("bhts,bhsd->bhtd", e_BHbs.astype(v_BHTD.dtype), v_BHTD[:, :, first:end])
        outs.append((o_BHbD / sum_BHb1).astype(v_BHTD.dtype))
        lses.append(max_BHb1 + jnp.log(sum_BHb1))
    o_BHTD = jnp.concatenate(outs, axis=2)
    return o_BHTD, (q_BHTD, k_BHTD, v_BHTD, o_BHTD, jnp.concatenate(lses, axis=2))


def _blocked_bwd(block, window, saved, do_BHTD):
    q_BHTD, k_BHTD, v_BHTD, o_BHTD, lse_BHT1 = saved
    T, scale = q_BHTD.shape[2], 1.0 / math.sqrt(q_BHTD.shape[-1])
    delta_BHT1 = (do_BHTD.astype(jnp.float32) * o_BHTD.astype(jnp.float32)).sum(-1, keepdims=True)
    dqs = []
    dk_BHTD = jnp.zeros(k_BHTD.shape, jnp.float32)
    dv_BHTD = jnp.zeros(v_BHTD.shape, jnp.float32)
    for first, start, end in _blocks(T, block, window):
        q_BHbD, do_BHbD = q_BHTD[:, :, start:end], do_BHTD[:, :, start:end]
        s_BHbs = _scores(q_BHbD, k_BHTD[:, :, first:end], first, start, end, window)
        p_BHbs = jnp.exp(s_BHbs - lse_BHT1[:, :, start:end])
        dp_BHbs = jnp.einsum(
            "bhtd,bhsd->bhts", do_BHbD, v_BHTD[:, :, first:end], preferred_element_type=jnp.float32
        )
        ds_BHbs = (p_BHbs * (dp_BHbs - delta_BHT1[:, :, start:end]) * scale).astype(q_BHTD.dtype)
        dqs.append(jnp.einsum("bhts,bhsd->bhtd", ds_BHbs, k_BHTD[:, :, first:end]))
        dk_BHsD = jnp.einsum("bhts,bhtd->bhsd", ds_BHbs, q_BHbD, preferred_element_type=jnp.float32)
        dv_BHsD = jnp.einsum(
            "bhts,bhtd->bhsd", p_BHbs.astype(do_BHTD.dtype), do_BHbD, preferred_element_type=jnp.float32
        )
        dk_BHTD = dk_BHTD.at[:, :, first:end].add(dk_BHsD)
        dv_BHTD = dv_BHTD.at[:, :, first:end].add(dv_BHsD)
    dq_BHTD = jnp.concatenate(dqs, axis=2)
    return dq_BHTD, dk_BHTD.astype(k_BHTD.dtype), dv_BHTD.astype(v_BHTD.dtype)


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def cudnn_attention(q_BTHD, k_BTKD, v_BTKD, *, window: int | None = None):
    return _library_attention(q_BTHD, k_BTKD, v_BTKD, window, "cudnn")


def xla_attention(q_BTHD, k_BTKD, v_BTKD, *, window: int | None = None):
    return _library_attention(q_BTHD, k_BTKD, v_BTKD, window, "xla")


def _library_attention(q_BTHD, k_BTKD, v_BTKD, window, implementation):
    local = None if window is None else (window, 0)
    return jax.nn.dot_product_attention(
        q_BTHD, k_BTKD, v_BTKD, is_causal=True, local_window_size=local, implementation=implementation
    )


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
