"""The call: which implementation runs, and why the ones before it do not."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.mosaic_gpu import gist_attention_mosaic, refusal
from kernels_pallas.reference import gist_attention_reference
from kernels_pallas.spec import GistSpec
from kernels_pallas.xla import gist_attention_xla

IMPLEMENTATIONS = {
    "mosaic_gpu": gist_attention_mosaic,
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

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {why}" for name, why in self.refused.items())
        return f"{self.name} ({reasons})" if reasons else self.name


def choose(
    implementation: str | None = None, *, spec: GistSpec, dtype, head_dim: int, require_fused: bool = False
) -> Chosen:
    """The implementation that `gist_attention` runs on this machine.

    Raises `Refused` where the one asked for by name does not run, and with `require_fused` where none of the fused
    kernels does.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise Refused(
            f"gist attention has no implementation {implementation!r}; choose from {', '.join(IMPLEMENTATIONS)}."
        )
    reason = refusal(spec, dtype, head_dim, _capability())
    if implementation == "mosaic_gpu" and reason:
        raise Refused(f"mosaic_gpu does not run: {reason}.")
    if implementation is None:
        chosen = Chosen("xla", {"mosaic_gpu": reason}) if reason else Chosen("mosaic_gpu", {})
    else:
        chosen = Chosen(implementation, {})
    if require_fused and chosen.name not in FUSED:
        raise Refused(f"a fused kernel is required and gist attention would run {chosen}.")
    return chosen


def _capability() -> float | None:
    """Compute capability of the GPU that runs the program, or that it is compiled for; None without one."""
    target = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if target is not None and target.platform in ("cuda", "gpu"):
        return 9.0 if any(name in target.device_kind for name in HOPPER) else 0.0
    found = getattr(jax.devices()[0], "compute_capability", None)
    return float(found) if found else None


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
    float32 or bfloat16; sums are float32. `segment_ids` int32 [B, T] keeps packed documents apart; a document
    starts on a multiple of block**levels, so that every row belongs to one. `scale` is 1 / sqrt(D) unless given.
    Returns a tuple of [B, T_l, H, D]; a row without any visible key is zero. Raises ValueError for shapes that do
    not belong together and `Refused` where the implementation asked for does not run.
    """
    _check(q, k, v, spec, segment_ids)
    scale = 1.0 / math.sqrt(q[0].shape[-1]) if scale is None else scale
    chosen = choose(implementation, spec=spec, dtype=q[0].dtype, head_dim=q[0].shape[-1])
    run = IMPLEMENTATIONS[chosen.name]
    return run(tuple(q), tuple(k), tuple(v), spec, segment_ids, scale)


def _check(q, k, v, spec: GistSpec, segment_ids) -> None:
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
