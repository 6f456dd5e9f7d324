"""The call: which implementation runs, and why the ones before it do not."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.reference import gist_attention_reference
from kernels_pallas.spec import GistSpec
from kernels_pallas.xla import gist_attention_xla


def _mosaic_gpu(q, k, v, spec: GistSpec, segment_ids, scale: float) -> tuple:
    from kernels_pallas.mosaic_gpu import gist_attention_mosaic_gpu  # half a second to import

    return gist_attention_mosaic_gpu(q, k, v, spec, segment_ids, scale)


# in the order in which they are tried; `reference` runs only when asked for
IMPLEMENTATIONS = {
    "mosaic_gpu": _mosaic_gpu,
    "xla": gist_attention_xla,
    "reference": gist_attention_reference,
}
FUSED = ("mosaic_gpu",)
HOPPER = (
    "H100",
    "H200",
    "H800",
    "H20",
    "GH200",
)  # in the name of a device that is compiled for ahead of time


class Refused(ValueError):
    """What was asked for cannot run here; the message says why."""


class Chosen(NamedTuple):
    name: str
    refused: dict[str, str]  # implementations that come first, and why they do not run


def choose(
    implementation: str | None = None,
    *,
    spec: GistSpec,
    head_dim: int,
    dtype,
    require_fused: bool = False,
) -> Chosen:
    """The implementation that `gist_attention` runs for such inputs, here or where it is compiled for.

    Asking for one by name and not getting it raises `Refused`; so does falling back to one that is no fused kernel
    where `require_fused` forbids it.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise Refused(
            f"gist attention has no implementation {implementation!r}; choose from {', '.join(IMPLEMENTATIONS)}."
        )
    refusal = _mosaic_gpu_refusal(spec, head_dim, dtype) if implementation in (None, "mosaic_gpu") else None
    if implementation == "mosaic_gpu" and refusal:
        raise Refused(f"gist attention by mosaic_gpu cannot run here: {refusal}.")
    name = implementation or ("xla" if refusal else "mosaic_gpu")
    if require_fused and name not in FUSED:
        why = f": mosaic_gpu: {refusal}" if refusal else ""
        raise Refused(f"gist attention would run as {name}, and a fused kernel is required{why}.")
    return Chosen(name, {"mosaic_gpu": refusal} if refusal else {})


def describe(chosen: Chosen) -> str:
    """One line for people: what runs, and why nothing better."""
    reasons = "; ".join(f"{name}: {why}" for name, why in chosen.refused.items())
    return f"gist attention: {chosen.name}" + (f" ({reasons})" if reasons else "")


def _mosaic_gpu_refusal(spec: GistSpec, head_dim: int, dtype) -> str | None:
    """Why the Hopper kernels cannot run, or None."""
    capability = _capability()
    if capability is None:
        return "this machine has no Hopper GPU"
    if capability.split(".")[0] != "9":
        return f"its kernels need a Hopper GPU (compute capability 9) and this one has {capability or 'none'}"
    try:
        from kernels_pallas.mosaic_gpu.config import refusal
    except ImportError as error:  # the interface of Mosaic GPU moves between versions of JAX
        return f"its kernels do not import with JAX {jax.__version__} ({error})"
    return refusal(spec, head_dim, dtype)


def _capability() -> str | None:
    """Compute capability of the GPU that runs the program, or that it is compiled for; None without one."""
    target = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if target is not None and target.platform in ("cuda", "gpu"):
        return "9.0" if any(name in target.device_kind for name in HOPPER) else ""
    device = jax.local_devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return None
    return str(getattr(device, "compute_capability", ""))


def gist_attention(
    q,
    k,
    v,
    *,
    spec: GistSpec,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Attention of tokens and gist rows, each over the tiling of its past that `spec` fixes.

    q, k, v: one array per level, [B, T_l, H, D] and [B, T_l, K, D] with K dividing H and T_l = T // block**l, in
    float32 or bfloat16; sums are float32. `segment_ids` int32 [B, T] keeps packed documents apart: runs of one id.
    A document starts on a multiple of block**levels, so that every row belongs to one. `scale` is positive, and
    1 / sqrt(D) unless given. Implementations are tried in the order of `IMPLEMENTATIONS`.
    Returns a tuple of [B, T_l, H, D]; a row without any visible key is zero. Raises ValueError for shapes that do
    not belong together and `Refused` where the implementation asked for does not run.
    """
    _check(q, k, v, spec, segment_ids, scale)
    head_dim = q[0].shape[-1]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    if segment_ids is not None:
        segment_ids = _numbered(segment_ids)
    chosen = choose(implementation, spec=spec, head_dim=head_dim, dtype=jnp.result_type(*q, *k, *v))
    return IMPLEMENTATIONS[chosen.name](tuple(q), tuple(k), tuple(v), spec, segment_ids, scale)


def _numbered(segment_ids):
    """Documents numbered from the start of each row, so that an id that comes back later is another document."""
    changes_BT = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum(changes_BT, axis=1, dtype=jnp.int32)


def _check(q, k, v, spec: GistSpec, segment_ids, scale) -> None:
    if scale is not None and not scale > 0:
        raise ValueError(f"gist_attention: scale {scale} must be positive.")
    if not len(q) == len(k) == len(v) == spec.levels + 1:
        raise ValueError(
            f"gist_attention: {len(q)}, {len(k)} and {len(v)} levels of q, k, v; the spec has {spec.levels + 1}."
        )
    B, T, H, D = q[0].shape
    K = k[0].shape[2]
    if H % K:
        raise ValueError(f"gist_attention: {H} query heads are not a multiple of {K} key heads.")
    for level, rows in enumerate(spec.rows(T)):
        wanted = {"q": (B, rows, H, D), "k": (B, rows, K, D), "v": (B, rows, K, D)}
        for name, x in (("q", q[level]), ("k", k[level]), ("v", v[level])):
            if x.shape != wanted[name]:
                raise ValueError(
                    f"gist_attention: {name} of level {level} has shape {x.shape}; {T} tokens ask for {wanted[name]}."
                )
            if x.dtype not in (jnp.float32, jnp.bfloat16):
                raise ValueError(
                    f"gist_attention: {name} of level {level} is {x.dtype}; use float32 or bfloat16."
                )
    if segment_ids is not None and segment_ids.shape != (B, T):
        raise ValueError(f"gist_attention: segment_ids has shape {segment_ids.shape}; it must be {(B, T)}.")
