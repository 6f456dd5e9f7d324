"""What the table compares: the same questions under several ways to show the history."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.context.allocator import AllocatorConfig
from megacontext_jax.context.focus import focus, seed_layout
from megacontext_jax.context.gist_rows import GistRows, gap_at
from megacontext_jax.context.layout import Layout, raw_layout
from megacontext_jax.context.objective import ContextObjective
from megacontext_jax.eval.longcontext.models import budget, objective_for, rows_for
from megacontext_jax.eval.longcontext.tasks import Task
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.loss import capped_logits

LENSES = ("learned", "attention", "lexical", "random", "oracle")
COLUMNS = ("full", "sliding", "mean", "gist", *(f"gist_lens_{lens}" for lens in LENSES))
ATTENTIONS = {
    "gist_attention": "gist",
    "sliding_attention": "sliding",
}  # models of their own, --attention gist
GAP, AWAY = "_gap", 1_000_000  # added to the column of gist attention: as many tokens away from the questions
FAR = "_far"  # added to these columns: questions about what a sliding window does not reach, layer upon layer
QUESTIONS = 512  # sequences per task
ROWS = 64


def evaluate(task: Task, size, learned, mean, seed: int) -> dict[str, float]:
    """Accuracy per column; `learned` and `mean` are the parameters of the two models of the task."""
    objective = objective_for(task, size, "transformer")
    baseline = objective_for(task, size, "mean")
    score = jax.jit(partial(_score, objective, task, ("full", "sliding", "gist", *LENSES)))
    score_mean = jax.jit(partial(_score, baseline, task, ("gist",)))
    rng = np.random.default_rng(10_000 + seed)
    rows = max(8, min(ROWS, ROWS * 256 // task.tokens))
    totals: dict[str, float] = {}
    for i in range(QUESTIONS // rows):
        batch = task.make(rng, rows, task.tokens, True)
        found = score(learned, batch, jax.random.key(i))
        found["mean"] = score_mean(mean, batch, jax.random.key(i))["gist"]
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + float(value) / (QUESTIONS // rows)
    return {name: totals[name.removeprefix("gist_lens_")] for name in COLUMNS}


def evaluate_rows(task: Task, size, params: dict, seed: int) -> dict[str, float]:
    """Accuracy of the models {column: parameters} with gist and with sliding attention.

    Windows hand on from layer to layer what they see; where a task has facts beyond that, the columns with `FAR` are
    the accuracy on these. Gist attention is also asked as if `AWAY` tokens lay before the questions (`GAP`).
    """
    reach = _reach(rows_for(task, size, "sliding").cfg)
    models = {column: rows_for(task, size, ATTENTIONS[column]) for column in params}
    scores = {column: jax.jit(partial(_score_rows, model, task)) for column, model in models.items()}
    for column, model in models.items():
        if isinstance(model, GistRows):
            scores[column + GAP] = jax.jit(partial(_score_rows, model, task, away=AWAY))
    rng = np.random.default_rng(10_000 + seed)
    rows = max(8, min(ROWS, ROWS * 256 // task.tokens))
    right: dict[str, list] = {column: [] for column in scores}
    far: list = []
    for _ in range(QUESTIONS // rows):
        batch = task.make(rng, rows, task.tokens, True)
        newest_B = task.tokens - 1 - np.argmax(batch["facts"][:, ::-1], axis=1)
        far.append(newest_B < task.tokens - task.asked - reach)
        for column, score in scores.items():
            right[column].append(np.asarray(score(params[column.removesuffix(GAP)], batch)))
    far_N = np.concatenate(far)
    found = {column: np.concatenate(share) for column, share in right.items()}
    means = {column: float(share_N.mean()) for column, share_N in found.items()}
    if far_N.any():
        means |= {column + FAR: float(found[column][far_N].mean()) for column in params}
    return means


def _reach(cfg: GPTConfig) -> int:
    """Tokens back from which something can arrive through all layers of a sliding window, smear included."""
    return sum(cfg.windows()) + cfg.constants.smear


def _score_rows(objective, task: Task, params, batch, away: int = 0):
    """Share of right answers [B], with so many tokens more between the questions' block and what came before."""
    options = {}
    if away:
        block, length = objective.cfg.gist_block, batch["inputs"].shape[1]
        boundary = (length - task.asked) // block * block
        options["gap_BR"] = jnp.broadcast_to(
            gap_at(objective.cfg, length, boundary, away),
            (len(batch["inputs"]), sum(objective.cfg.gist_spec.rows(length))),
        )
    hidden = objective.hidden(params, batch["inputs"], **options)
    x_BTC = hidden[0] if isinstance(hidden, tuple) else hidden
    cfg = objective.cfg
    logits_BAV = capped_logits(x_BTC[:, -task.asked :], params["lm_head"], cfg.logit_cap, cfg.vocab_size)
    return (logits_BAV.argmax(-1) == batch["targets"][:, -task.asked :]).mean(-1)


def allocator_for(task: Task) -> AllocatorConfig:
    """Expansions into spare places and swaps; scores decide alone."""
    return AllocatorConfig(
        block=task.block,
        max_level=task.levels,
        recent=task.asked,
        expand_threshold=-1.0,
        collapse_threshold=-1.0,
        max_replacements=task.expand,
        cooldown=0,
        hysteresis=0.0,
    )


def layouts(objective: ContextObjective, task: Task, params, tables, batch, key, kind: str) -> Layout:
    """The working contexts of a column for a batch of histories."""
    ids_BT = batch["inputs"]
    B, T = ids_BT.shape
    entries = budget(task)
    if kind == "full":
        return raw_layout(B, T)
    if kind == "sliding":
        raw = raw_layout(B, T)
        return Layout(*(x[:, T - entries :] for x in raw))
    cfg = allocator_for(task)
    if kind == "gist":
        return seed_layout(B, T, entries, cfg, spare=1.0)
    return focus(
        objective,
        params,
        tables,
        ids_BT,
        cfg,
        budget=entries,
        lens=kind,
        iterations=task.levels,
        spare=1.0,
        key=key,
        fact_RT=batch["facts"],
    ).layout


def _score(objective: ContextObjective, task: Task, kinds, params, batch, key) -> dict:
    tables = objective.tables(params, batch["inputs"])
    answers = batch["targets"][:, -task.asked :]
    found = {}
    for kind in kinds:
        layout = layouts(objective, task, params, tables, batch, key, kind)
        x_RWC = objective.hidden(params, tables, batch["inputs"], layout)
        last_RA = layout.count_B[:, None] - task.asked + jnp.arange(task.asked)
        x_RAC = jnp.take_along_axis(x_RWC, last_RA[..., None], axis=1)
        cfg = objective.cfg
        logits_RAV = capped_logits(x_RAC, params["lm_head"], cfg.logit_cap, cfg.vocab_size)
        found[kind] = (logits_RAV.argmax(-1) == answers).mean()
    return found
