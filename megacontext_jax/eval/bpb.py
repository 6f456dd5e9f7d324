"""Bits per byte: the loss in a unit that does not depend on the tokenizer."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from megacontext_jax import mesh as meshes


def make_bpb_step(nll_fn: Callable, token_bytes_V: np.ndarray, mesh: Mesh):
    """Compiled (params, batch) -> (nats, bytes) over the targets that stand for bytes.

    `nll_fn(params, batch)` gives nats [B, T] with 0 at ignored targets; special tokens have no bytes and do
    not count (nanochat's rule).
    """
    bytes_V = jnp.asarray(token_bytes_V, jnp.int32)

    def step(params, batch):
        nbytes_BT = jnp.where(batch["targets"] >= 0, bytes_V[jnp.maximum(batch["targets"], 0)], 0)
        nats_BT = jnp.where(nbytes_BT > 0, nll_fn(params, batch), 0.0)
        return nats_BT.sum(), nbytes_BT.sum()

    return jax.jit(step, out_shardings=meshes.replicated(mesh))


def bits_per_byte(bpb_step, params, batches: Iterable[dict], mesh: Mesh) -> float:
    """Evaluate on batches of this process's rows [B, T]; inf if no target has bytes."""
    sums = []
    for batch in batches:
        placed = {name: meshes.global_batch(mesh, rows) for name, rows in batch.items()}
        sums.append(bpb_step(params, placed))
        if jax.default_backend() == "cpu":
            jax.block_until_ready(sums[-1])  # simulated devices deadlock on queued collectives
    nats = sum(float(n) for n, _ in sums)
    nbytes = sum(int(b) for _, b in sums)
    return nats / (math.log(2) * nbytes) if nbytes else math.inf
