"""The suite's own tiny models: trained on a task raw, in gists, and in gists with some blocks raw."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np

from megacontext_jax import mesh as meshes
from megacontext_jax.config import StageConfig
from megacontext_jax.context.gist_rows import GistRows
from megacontext_jax.context.gistnet import GistConfig
from megacontext_jax.context.layout import fewest_entries
from megacontext_jax.context.lensnet import LensConfig
from megacontext_jax.context.objective import ContextConfig, ContextObjective, Mixture
from megacontext_jax.eval.longcontext.tasks import Task
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import Objective, make_objective
from megacontext_jax.train.optim import make_optimizer
from megacontext_jax.train.recipes import RECIPES
from megacontext_jax.train.schedule import schedules
from megacontext_jax.train.step import init_state, make_train_step


@dataclass(frozen=True)
class Size:
    """Of a model and its training."""

    depth: int = 3
    row_depth: int = 4  # with gist attention: to bind, gather and read without ever seeing the fact raw
    width: int = 64
    heads: int = 4
    steps: int = 1500
    rows: int = 64
    positions: str = "rank"
    # gist attention: longest gap between near and far rows in training, share of the channels that turn with the position
    gap: int = 0
    rope_share: float = 1.0


OPTIONS = StageConfig(
    optimizer="muon",
    matrix_lr=0.02,
    embedding_lr=0.0035,
    unembedding_lr=0.0035,
    adam_beta1=0.9,
    adam_beta2=0.98,
    warmup_ratio=0.05,
    warmdown_ratio=0.3,
    final_lr_frac=0.05,
)


def objective_for(task: Task, size: Size, kind: str, width: int | None = None) -> ContextObjective:
    """`kind` is that of GistNet: transformer or mean."""
    shape = {"arch": "pocket", "n_embd": size.width, "n_head": size.heads, "n_kv_head": size.heads}
    cfg = GPTConfig(sequence_len=task.tokens, vocab_size=task.vocab, n_layer=size.depth, **shape)
    blocks = GPTConfig(sequence_len=task.tokens, vocab_size=64, n_layer=2, **shape)
    context = ContextConfig(
        GistConfig(blocks, block=task.block, kind=kind, head="none" if kind == "mean" else "mlp"),
        LensConfig(blocks, block=task.block, max_level=3),
        levels=task.levels,
        positions=size.positions,
    )
    mixture = Mixture(variants=2, recent=task.asked, horizon=task.asked, regression_weight=0.0)
    base = make_objective(cfg, attention_impl="auto", dtype="float32")
    return ContextObjective(base, context, mixture, width or smallest(task))


def smallest(task: Task) -> int:
    """Entries when only the question is raw."""
    return fewest_entries(task.tokens, block=task.block, levels=task.levels, recent=task.asked)


def budget(task: Task) -> int:
    """Entries of the gists, the raw question and what expansion may add."""
    return min(task.tokens, smallest(task) + task.expand * (task.block - 1) * max(1, task.levels - 1))


def rows_for(task: Task, size: Size, attention: str) -> GistRows | Objective:
    """The same layers with gist attention and no window, or with a sliding window of equal budget.

    A token sees its own block as tokens and everything before it as gists, in every layer.
    """
    cfg = GPTConfig(
        arch="pocket",
        n_embd=size.width,
        n_head=size.heads,
        n_kv_head=size.heads,
        n_layer=size.row_depth,
        sequence_len=task.tokens,
        vocab_size=task.vocab,
        attention=attention,
        rope_share=size.rope_share,
        gist_block=task.block,
        gist_window=0,
        gist_levels=task.levels,
    )
    base = make_objective(cfg, attention_impl="auto", dtype="float32")
    if attention == "sliding":
        return base
    blocks = replace(cfg, n_layer=2, attention="dense", vocab_size=64)
    gist = GistConfig(blocks, block=task.block)
    return GistRows(base, gist, regression_weight=0.0, longest_gap=size.gap)


Say = Callable[[int, float], None]


def train(task: Task, size: Size, kind: str, seed: int, progress: Say = lambda step, loss: None):
    """(parameters, seconds): raw in every step; in every other step all gists, otherwise some blocks raw."""
    task = at_training(task)
    widths = (smallest(task), budget(task))
    objectives = [objective_for(task, size, kind, width) for width in widths]
    if task.levels == 1:  # all contexts are the same one then
        single = replace(objectives[0].mixture, variants=1)
        objectives[0] = replace(objectives[0], mixture=single)
    return fit(objectives, task, size, seed, progress)


def train_rows(task: Task, size: Size, attention: str, seed: int, progress: Say = lambda step, loss: None):
    """(parameters, seconds) of a model with gist or sliding attention; every other step is dense."""
    task = at_training(task)
    objective = rows_for(task, size, attention)
    base = objective.base if attention == "gist" else objective
    dense = replace(base, cfg=replace(base.cfg, attention="dense"))
    return fit([objective, dense], task, size, seed, progress)


def at_training(task: Task) -> Task:
    return replace(task, tokens=task.train_tokens, levels=min(task.levels, 2))


def fit(
    objectives: list,
    task: Task,
    size: Size,
    seed: int,
    progress: Say,
    turn: Callable[[int], int] | None = None,
):
    """(parameters, seconds) after `size.steps` steps on fresh batches; step i has objective `turn(i)`, else they alternate."""
    turn = turn or (lambda step: step % len(objectives))
    started = time.monotonic()
    schedule = schedules(OPTIONS, RECIPES[OPTIONS.optimizer], size.steps, first_stage=True)
    optimizer = make_optimizer(OPTIONS, objectives[0].cfg, schedule, context=True)
    mesh = meshes.make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
    state = init_state(mesh, objectives[0].init, optimizer, jax.random.key(seed))
    shardings = meshes.state_shardings(mesh, state)
    steps = [make_train_step(o.loss, optimizer, shardings, mesh, seed=seed) for o in objectives]
    rng = np.random.default_rng(seed)
    for step in range(size.steps):
        batch = task.make(rng, size.rows, task.tokens, False)
        rows = {name: batch[name][None] for name in ("inputs", "targets")}
        state, metrics = steps[turn(step)](state, rows)
        progress(step + 1, metrics["loss"])
    jax.block_until_ready(state)
    return state.params, time.monotonic() - started
