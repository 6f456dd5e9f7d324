"""Shapes of the kernels' tiles, what they keep in shared memory, and which are worth trying."""

import itertools
from dataclasses import dataclass

WARPGROUP_ROWS = 64  # rows of a wgmma's result; two warpgroups compute, one loads
COMPUTE = 2
Q_TILE = COMPUTE * WARPGROUP_ROWS  # query rows of a thread block, forward and dq
SHARED_MEMORY = 227 * 1024  # bytes that a thread block of Hopper can have
HEAD_DIMS = (64, 128)
BYTES = 2  # of bfloat16


@dataclass(frozen=True)
class Config:
    """Tiles of one kernel set. Keys of `dkv` come in tiles of 128: 64 per warpgroup."""

    block_k: int = 128  # keys per step, forward and dq
    stages: int = 2  # key tiles in flight, forward and dq
    stages_dkv: int = 2  # query tiles in flight, dkv

    @property
    def key_tile(self) -> int:
        """Levels are padded to a multiple of this, so that a tile never spans two."""
        return max(self.block_k, Q_TILE)


def shared_memory(config: Config, head_dim: int, levels: int) -> dict[str, int]:
    """Bytes of shared memory per kernel, barriers aside."""
    tile, bounds = Q_TILE * head_dim * BYTES, (levels + 1) * 2 * Q_TILE * 4
    keys = 2 * config.stages * config.block_k * head_dim * BYTES
    queries = 2 * config.stages_dkv * WARPGROUP_ROWS * head_dim * BYTES
    numbers = Q_TILE * 4
    return {
        "forward": tile + keys + bounds + numbers,
        "dq": 2 * tile + keys + bounds + 2 * numbers,
        "dkv": 2 * tile + queries + config.stages_dkv * 4 * WARPGROUP_ROWS * 4,
    }


def default(head_dim: int) -> Config:
    """The tiles that run unless others are asked for."""
    del head_dim
    return Config()


def candidates(head_dim: int, levels: int) -> list[Config]:
    """What is worth timing: all that fits."""
    space = itertools.product((64, 128), (2, 3, 4), (2, 3))
    found = [Config(*choice) for choice in space]
    return [c for c in found if max(shared_memory(c, head_dim, levels).values()) < SHARED_MEMORY - 1024]
