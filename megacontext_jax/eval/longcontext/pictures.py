"""Pictures of working contexts: time on x, level of detail as colour, before and after focus."""

from pathlib import Path

import jax
import numpy as np

from megacontext_jax.eval.longcontext.columns import layouts
from megacontext_jax.eval.longcontext.models import objective_for
from megacontext_jax.eval.longcontext.tasks import Task
from megacontext_jax.eval.strips import token_levels

COLOURS = ("#2a6fbb", "#8cc0a8", "#e3a857", "#b5533c", "#6b4c8a")  # raw, level 1, 2, ...


def draw_strips(strips: dict[str, np.ndarray], path: Path, *, title: str, facts=None) -> Path:
    """One band per name from levels [T]; `facts` bool [T] are marked below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows = len(strips) + (facts is not None)
    figure, axes = plt.subplots(rows, 1, figsize=(9, 0.55 * rows + 1.1), sharex=True, squeeze=False)
    highest = max(int(levels.max()) for levels in strips.values())
    colours = ListedColormap(["#ffffff", *COLOURS])
    for axis, (name, levels) in zip(axes[:, 0], strips.items(), strict=False):
        axis.imshow(levels[None], aspect="auto", cmap=colours, vmin=-1, vmax=4, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set_yticks([])
    if facts is not None:
        axis = axes[-1, 0]
        axis.imshow(facts[None], aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axis.set_ylabel("asked for", rotation=0, ha="right", va="center", fontsize=9)
        axis.set_yticks([])
    axes[-1, 0].set_xlabel("token")
    names = ["raw", *(f"level {i}" for i in range(1, highest + 1))]
    handles = [Patch(color=COLOURS[i], label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="upper right", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(title, x=0.02, ha="left", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_focus(task: Task, size, params, path: Path) -> Path:
    """One question of a task: the context before focus, after it by each lens, and where the fact is."""
    objective = objective_for(task, size, "transformer")
    batch = task.make(np.random.default_rng(7), 2, task.tokens, True)
    tables = objective.tables(params, batch["inputs"])
    strips = {}
    for kind, name in (
        ("gist", "before focus"),
        ("learned", "learned lens"),
        ("attention", "attention"),
        ("oracle", "oracle"),
    ):
        layout = layouts(objective, task, params, tables, batch, jax.random.key(0), kind)
        strips[name] = token_levels(layout, task.block, task.tokens)[0]
    return draw_strips(strips, path, title=f"{task.name}: the working context", facts=batch["facts"][0])
