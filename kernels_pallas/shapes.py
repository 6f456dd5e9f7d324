"""Problems that tests and benchmarks share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.spec import GistSpec


class Problem(NamedTuple):
    tokens: int
    spec: GistSpec
    batch: int = 1
    heads: int = 2
    key_heads: int = 1
    head_dim: int = 16

    def pairs(self) -> int:
        """Pairs of query and key that are seen, of all levels."""
        return sum(
            int((stop - start).sum())
            for level, rows in enumerate(self.spec.rows(self.tokens))
            for start, stop in self.spec.key_ranges(level, np.arange(rows))
        )

    def arrays(self, seed: int = 0, dtype=jnp.float32):
        """q, k, v and an output gradient: per-level tuples of normal numbers."""
        keys = iter(jax.random.split(jax.random.key(seed), 4 * (self.spec.levels + 1)))
        shapes = {
            heads: [(self.batch, n, heads, self.head_dim) for n in self.spec.rows(self.tokens)]
            for heads in (self.heads, self.key_heads)
        }
        return tuple(
            tuple(jax.random.normal(next(keys), shape, dtype) for shape in shapes[heads])
            for heads in (self.heads, self.key_heads, self.key_heads, self.heads)
        )


# edges: odd lengths, less than a block, less than the window, one block, empty middle or far range, deep trees
EDGES = {
    "odd length": Problem(301, GistSpec(4, 16, 1, 2), batch=2),
    "less than a block": Problem(3, GistSpec(8, 16, 1, 2)),
    "less than the window": Problem(40, GistSpec(8, 64, 1, 2)),
    "one block": Problem(32, GistSpec(32, 32, 1, 2)),
    "no window": Problem(200, GistSpec(4, 0, 1, 2)),
    "no middle": Problem(260, GistSpec(4, 8, 0, 3)),
    "wide middle": Problem(520, GistSpec(4, 8, 3, 3)),
    "one level": Problem(517, GistSpec(8, 24, 1, 1)),
    "deep": Problem(300, GistSpec(2, 6, 1, 6), heads=4, key_heads=2),
    "window not in tiles": Problem(700, GistSpec(32, 96, 1, 2)),
    "blocks of 128": Problem(1100, GistSpec(128, 256, 1, 2), heads=1),
    "three per key head": Problem(170, GistSpec(4, 12, 2, 2), heads=6, key_heads=2, head_dim=8),
}
