"""A fact placed anywhere in a long history, asked at its end: what a session still knows.

A tiny model learns on rows of 256 tokens: numbers with marks in filler, the marks asked at the end, in working contexts
of three eighths of the row. LensNet learns beside it which spans are worth their room, judged by questions it does not see.
Then sessions read histories of up to hundreds of thousands of tokens, in as many entries, and answer.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.context.allocator import AllocatorConfig
from megacontext_jax.context.layout import reachable_width
from megacontext_jax.context.objective import ContextObjective
from megacontext_jax.context.store import create_store
from megacontext_jax.eval.longcontext.models import Size, fit, objective_for
from megacontext_jax.eval.longcontext.tasks import DIGITS, FILLER, MARKS, TASKS, passkey
from megacontext_jax.files import atomic_path, write_bytes
from megacontext_jax.infer.chat_model import levels_for, tree_options
from megacontext_jax.infer.focus_memory import FocusMemory
from megacontext_jax.infer.focus_programs import FocusConfig
from megacontext_jax.infer.model import GPTDecoder, prepare_params
from megacontext_jax.model.loss import capped_logits

BLOCK, ROW, LEVELS, BUDGET, RECENT, ASKED = 4, 256, 3, 96, 16, 8
RAW_SHARE = 0.2  # of the steps, before working contexts join: retrieval forms first
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FACTS, SPREAD = 4, 64  # facts of a history, and the tokens over which they lie
QUESTIONS = 4  # per history
CHANCE = 1 / DIGITS
RESULTS, MODEL = "long_history.json", "long_history_model.npz"
TASK = replace(
    TASKS["passkey_1x"],
    name="history",
    family="history",
    tokens=ROW,
    train_tokens=ROW,
    block=BLOCK,
    levels=LEVELS,
    make=passkey(ASKED, FACTS),
)


def objective_of(size: Size) -> ContextObjective:
    width = reachable_width(BUDGET, ROW, block=BLOCK, levels=LEVELS, recent=RECENT)
    found = objective_for(TASK, size, "transformer", width)
    # the questions are hidden from the lens, which learns what will be asked for
    mixture = replace(found.mixture, variants=4, recent=RECENT, ahead=ASKED, horizon=ASKED, recency_share=0.3)
    return replace(found, mixture=mixture)


def train(size: Size, seed: int, progress: Callable[[int, float], None]) -> tuple[dict, float]:
    """(parameters, seconds)."""
    objective = objective_of(size)
    raw = replace(objective, mixture=replace(objective.mixture, variants=0))
    first = round(RAW_SHARE * size.steps)
    return fit([raw, objective], TASK, size, seed, progress, turn=lambda step: int(step >= first))


def trained(size: Size, seed: int, folder: Path, progress) -> tuple[dict, float]:
    """The parameters in the folder if they were trained alike, or new ones, kept there."""
    template = jax.eval_shape(objective_of(size).init, jax.random.key(0))
    leaves, tree = jax.tree.flatten(template)
    mark, path = repr((size, seed)), folder / MODEL
    try:
        with np.load(path, allow_pickle=False) as saved:
            if str(saved["mark"]) == mark:
                found = [jnp.asarray(saved[f"leaf_{i}"]) for i in range(len(leaves))]
                return jax.tree.unflatten(tree, found), float(saved["seconds"])
    except (OSError, KeyError, ValueError):
        pass  # none, or of another version: trained anew
    params, seconds = train(size, seed, progress)
    arrays = {f"leaf_{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(params))}
    with atomic_path(path) as scratch, open(scratch, "wb") as file:
        np.savez(file, mark=mark, seconds=seconds, **arrays)
    return params, seconds


@dataclass(frozen=True)
class History:
    ids_T: np.ndarray
    marks: np.ndarray
    numbers: np.ndarray


def make_history(rng: np.random.Generator, tokens: int, depth: float) -> History:
    """Filler with the facts at a depth from 0, the beginning, to 1, the end."""
    ids_T = MARKS + DIGITS + rng.integers(0, FILLER, tokens)
    marks = rng.permutation(MARKS)[:FACTS]
    numbers = MARKS + rng.integers(0, DIGITS, FACTS)
    start = int(depth * (tokens - SPREAD)) // 2 * 2
    places = start + 2 * np.sort(rng.permutation(SPREAD // 2)[:FACTS])
    ids_T[places], ids_T[places + 1] = marks, numbers
    return History(ids_T.astype(np.uint32), marks, numbers)


class Reader:
    """Reads histories and answers, in a session's memory or in a sliding window of equal budget."""

    def __init__(self, size: Size, params: dict):
        objective = objective_of(size)
        levels = levels_for(BLOCK)
        allocator = AllocatorConfig(block=BLOCK, max_level=levels, recent=RECENT)
        decoder = GPTDecoder(objective.cfg, objective.base.attention.fn)
        self._cfg = FocusConfig(
            decoder, objective, allocator, BUDGET, "learned", rebuild_iterations=levels + 2
        )
        self._params = {"decode": prepare_params(params, np.dtype("float32")), "train": params}
        self._tree = tree_options(objective, params, levels)
        self._window = jax.jit(lambda ids_1T: _last_token(objective, params, ids_1T))

    def answers(self, history: History, asked: np.ndarray) -> tuple[int, int]:
        """Right answers to the marks of the facts `asked`: of the session, of the window."""
        memory = FocusMemory(self._cfg, self._params)
        tree = create_store("ram", **self._tree)
        tree.append(history.ids_T, gists=False)
        self._read(memory, tree)
        session = window = 0
        for fact in asked:
            tree.append(history.marks[fact : fact + 1].astype(np.uint32), gists=False)
            self._read(memory, tree)
            session += int(memory.logits_1V[0].argmax()) == history.numbers[fact]
            newest_1T = tree.tokens(len(tree) - BUDGET).astype(np.int32)[None]
            window += int(self._window(newest_1T)) == history.numbers[fact]
        return session, window

    def _read(self, memory: FocusMemory, tree) -> None:
        for _ in memory.catch_up(tree):
            pass


def _last_token(objective: ContextObjective, params, ids_1T):
    cfg, x_1TC = objective.cfg, objective.base.hidden(params, ids_1T)
    return capped_logits(x_1TC[:, -1:], params["lm_head"], cfg.logit_cap, cfg.vocab_size)[0, 0].argmax()


def run(
    size: Size, seed: int, lengths: list[int], count: int, folder: Path, progress
) -> Iterator[tuple[int, float, dict]]:
    """Yields (tokens, depth, {"session": share, "window": share}) of all cells and keeps them in `folder`.

    Cells that were found with the same settings are not run again.
    """
    params, seconds = trained(size, seed, folder, progress)
    mark = {"size": repr(size), "seed": seed, "histories": count, "questions": QUESTIONS, "budget": BUDGET}
    results = read_results(folder)
    if results.get("mark") != mark:
        results = {"mark": mark, "chance": CHANCE, "training_seconds": seconds, "cells": {}}
    reader = None
    for tokens in lengths:
        for depth in DEPTHS:
            name = f"{tokens}@{depth}"
            if name not in results["cells"]:
                reader = reader or Reader(size, params)
                results["cells"][name] = ask(reader, tokens, depth, count, seed)
                write_bytes(folder / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
            yield tokens, depth, results["cells"][name]


def ask(reader: Reader, tokens: int, depth: float, count: int, seed: int) -> dict[str, float]:
    """Shares of right answers over `count` histories."""
    right = np.zeros(2)
    for i in range(count):
        rng = np.random.default_rng([10_000 + seed, i, tokens])
        history = make_history(rng, tokens, depth)
        right += reader.answers(history, rng.integers(0, FACTS, QUESTIONS))
    session, window = (right / (count * QUESTIONS)).tolist()
    return {"session": session, "window": window}


def read_results(folder: Path) -> dict:
    try:
        return json.loads((folder / RESULTS).read_text())
    except (OSError, ValueError):
        return {}


def draw(cells: dict[tuple[int, float], dict], path: Path) -> Path:
    """Two maps, lengths on x and depths on y: the session's accuracy and the window's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = sorted({tokens for tokens, _ in cells})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, kind, title in zip(
        axes,
        ("session", "window"),
        (f"session, {BUDGET} entries", f"sliding window, {BUDGET} tokens"),
        strict=True,
    ):
        grid = [[100 * cells[n, depth][kind] for n in lengths] for depth in DEPTHS]
        image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", color="w" if value < 60 else "k")
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set_yticks(range(len(DEPTHS)), [f"{100 * depth:.0f} %" for depth in DEPTHS])
        axis.set_xlabel("tokens of history")
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("where the fact is")
    figure.colorbar(image, ax=axes, label=f"answered, % (chance {100 * CHANCE:.0f})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
