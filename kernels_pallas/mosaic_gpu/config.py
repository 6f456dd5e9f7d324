"""Sizes of the kernels' tiles, and whether they fit. One description of the scratch serves allocation and estimate."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.spec import GistSpec

HEAD_DIMS = (64, 128)
BLOCKS = (8, 32, 128)
SHARED_MEMORY = 227 * 1024  # bytes that one block of threads can have on Hopper
HALF = 64  # rows of a warpgroup: the height of its matrix instruction
WORKERS = 2  # warpgroups that compute
TILE = WORKERS * HALF  # rows that they hold: of queries, or of keys in the pass over keys
DECODE_TILE = (
    64  # keys of a part: a default pattern's 400 slots are 7 blocks of threads per sequence and key head
)
RESERVED = 4096  # barriers, alignment, and room in which the compiler reduces over a warpgroup


@dataclass(frozen=True)
class Config:
    key_tile: int = 128  # keys per visit of the passes over queries
    forward_stages: int = 2  # key tiles under way
    dq_stages: int = 2
    dkv_stages: int = 2  # half tiles of queries under way
    longest: int = 64  # visits per work item of the pass over gist keys
    ping_pong: bool = True  # one warpgroup multiplies while the other takes its softmax


class Buffer(NamedTuple):
    shape: tuple[int, ...]
    dtype: object
    tiled: bool = False  # an operand or a result of matrix instructions, in their layout

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def allocate(self):
        if not self.tiled:
            return plgpu.SMEM(self.shape, self.dtype)
        columns = 128 // jnp.dtype(self.dtype).itemsize
        transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(self.shape, self.dtype, transforms=transforms)


def forward_buffers(config: Config, head_dim: int, levels: int) -> dict[str, Buffer]:
    tiles = (config.forward_stages, config.key_tile, head_dim)
    return {
        "q": Buffer((WORKERS, HALF, head_dim), jnp.bfloat16, True),
        "k": Buffer(tiles, jnp.bfloat16, True),
        "v": Buffer(tiles, jnp.bfloat16, True),
        "ranges": Buffer((WORKERS, 2 * levels, HALF), jnp.int32),
        "lse": Buffer((WORKERS, HALF), jnp.float32),
    }


def dq_buffers(config: Config, head_dim: int, levels: int) -> dict[str, Buffer]:
    tiles = (config.dq_stages, config.key_tile, head_dim)
    return {
        "q": Buffer((WORKERS, HALF, head_dim), jnp.bfloat16, True),
        "do": Buffer((WORKERS, HALF, head_dim), jnp.bfloat16, True),
        "k": Buffer(tiles, jnp.bfloat16, True),
        "v": Buffer(tiles, jnp.bfloat16, True),
        "ranges": Buffer((WORKERS, 2 * levels, HALF), jnp.int32),
        "sums": Buffer((WORKERS, 2, HALF), jnp.float32),
    }


def dkv_buffers(config: Config, head_dim: int, out_dtype) -> dict[str, Buffer]:
    tiles = (config.dkv_stages, HALF, head_dim)
    kept = (WORKERS, HALF, head_dim)
    buffers = {
        "k": Buffer(kept, jnp.bfloat16, True),
        "v": Buffer(kept, jnp.bfloat16, True),
        "q": Buffer(tiles, jnp.bfloat16, True),
        "do": Buffer(tiles, jnp.bfloat16, True),
        "ranges": Buffer((config.dkv_stages, 2, HALF), jnp.int32),
        "sums": Buffer((config.dkv_stages, 2, HALF), jnp.float32),
    }
    if out_dtype != jnp.bfloat16:  # bfloat16 results leave through the buffers of k and v
        buffers["out"] = Buffer(kept, out_dtype, True)
    return buffers


def decode_buffers(head_dim: int) -> dict[str, Buffer]:
    tile = (DECODE_TILE, head_dim)
    return {
        "q": Buffer((HALF, head_dim), jnp.bfloat16, True),
        "k": Buffer(tile, jnp.bfloat16, True),
        "v": Buffer(tile, jnp.bfloat16, True),
        "o": Buffer((HALF, head_dim), jnp.float32, True),
        "bias": Buffer((DECODE_TILE,), jnp.float32),
        "top": Buffer((HALF,), jnp.float32),
        "sum": Buffer((HALF,), jnp.float32),
    }


def shared_bytes(buffers: dict[str, Buffer]) -> int:
    return sum(buffer.bytes for buffer in buffers.values()) + RESERVED


def largest(config: Config, head_dim: int, levels: int) -> int:
    """Bytes of shared memory of the kernel that needs most."""
    return max(
        shared_bytes(forward_buffers(config, head_dim, levels)),
        shared_bytes(dq_buffers(config, head_dim, levels)),
        shared_bytes(dkv_buffers(config, head_dim, jnp.float32)),
    )


def refusal(spec: GistSpec, head_dim: int, dtype) -> str | None:
    """Why the kernels cannot take such inputs, or None."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return (
            f"Hopper's matrix unit takes {jnp.dtype(dtype).name} only as TF32, so its kernels take bfloat16"
        )
    if head_dim not in HEAD_DIMS:
        return f"its kernels are made for heads of {' or '.join(map(str, HEAD_DIMS))} and not of {head_dim}"
    if spec.block not in BLOCKS:
        return (
            f"its kernels are made for blocks of {', '.join(map(str, BLOCKS))} tokens and not of {spec.block}"
        )
    needed = largest(default_config(head_dim), head_dim, spec.levels + 1)
    if needed > SHARED_MEMORY:
        return f"{spec.levels} levels need {needed} bytes of shared memory and a block has {SHARED_MEMORY}"
    return None


def default_config(head_dim: int) -> Config:
    """Deeper pipelines where a tile is small."""
    return Config(forward_stages=4, dq_stages=3, dkv_stages=4) if head_dim == 64 else Config()


def tuning_configs(head_dim: int) -> list[Config]:
    """What is worth timing beside the default: smaller tiles, shorter lists of visits, no schedule."""
    default = default_config(head_dim)
    return [
        replace(default, key_tile=64, forward_stages=4, dq_stages=3),
        replace(default, longest=32),
        replace(default, ping_pong=False),
    ]
