"""Train a tiny model on a mesh and print its losses as JSON; run by test_mesh.py in its own process.

python -m tests.train.mesh_program DATA FSDP TENSOR OPTIMIZER [STEPS] [COORDINATOR NUM_PROCESSES PROCESS_ID]

The optimizer `gist` is muon for a model with gist attention.
"""

import json
import sys
from dataclasses import replace

import jax
import numpy as np

from megacontext_jax import mesh as meshes
from megacontext_jax.config import StageConfig
from megacontext_jax.context.gist_rows import GistRows
from megacontext_jax.context.gistnet import GistConfig
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import make_objective
from megacontext_jax.train.optim import make_optimizer
from megacontext_jax.train.recipes import RECIPES
from megacontext_jax.train.schedule import schedules
from megacontext_jax.train.step import init_state, make_train_step

ROWS, T = 16, 32


def main(data: str, fsdp: str, tensor: str, optimizer_name: str, steps: str = "20", *processes: str) -> None:
    if processes:
        coordinator, count, index = processes
        meshes.start_distributed(coordinator, int(count), int(index))
    mesh = meshes.make_mesh(int(data), int(fsdp), int(tensor))
    # three layers: neither layers nor stacked matrices divide by eight
    arch, pattern = ("latest", "SL") if optimizer_name == "latest" else ("pocket", "L")
    cfg = GPTConfig(arch, T, 128, n_layer=3, n_head=4, n_kv_head=4, n_embd=64, window_pattern=pattern)
    gists = optimizer_name == "gist"
    if gists:
        optimizer_name = "muon"
        cfg = replace(cfg, attention="gist", gist_block=2, gist_window=4)
    objective = make_objective(cfg, attention_impl="auto", dtype="float32", mesh=mesh)
    if gists:
        objective = GistRows(objective, GistConfig(replace(cfg, n_layer=1, attention="dense"), block=2))
    # constant small rates: Adam's first steps divide by |g| and would amplify rounding
    opts = StageConfig(optimizer=optimizer_name, matrix_lr=2e-3, embedding_lr=2e-3, unembedding_lr=2e-3)
    if arch == "latest":  # its rate of the gates is fixed, and too large for a comparison
        opts = replace(
            opts, matrix_lr=0.02, embedding_lr=0.02, unembedding_lr=0.02, scalar_lr=0.02, init_lr_frac=0.1
        )
    schedule = schedules(opts, RECIPES[optimizer_name], 100, first_stage=True)
    optimizer = make_optimizer(opts, cfg, schedule, constrain=meshes.deal_matrices(mesh), context=gists)
    state = init_state(mesh, objective.init, optimizer, jax.random.key(0))
    shardings = meshes.state_shardings(mesh, state)
    step = make_train_step(objective.loss, optimizer, shardings, mesh, seed=0)

    share = ROWS // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    rng = np.random.default_rng(0)
    losses, norms = [], []
    for _ in range(int(steps)):
        tokens = rng.integers(0, cfg.vocab_size, (ROWS, T + 1), np.int32)[mine]
        tokens[:, 1::2] = tokens[:, :-1:2]  # something to learn
        batch = {"inputs": tokens[None, :, :-1], "targets": tokens[None, :, 1:]}
        state, metrics = step(state, {name: meshes.global_batch(mesh, x) for name, x in batch.items()})
        jax.block_until_ready(metrics)  # simulated devices deadlock on queued collectives
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))

    def share_of(tree):
        """Bytes on the first local device over bytes of the whole tree."""
        leaves = jax.tree.leaves(tree)
        local = sum(x.addressable_shards[0].data.nbytes for x in leaves)
        return local / sum(x.nbytes for x in leaves)

    shares = {"params": share_of(state.params), "opt": share_of(state.opt_state)}
    print(json.dumps({"losses": losses, "norms": norms, "shares": shares, "devices": jax.device_count()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
