"""Pictures for the report: curves of every training stage and accuracies beside chance, as PNG files."""

import math
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from megacontext_jax.telemetry.progress import format_quantity
from megacontext_jax.telemetry.sinks import series, write_atomic

Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # stage -> records of its metrics.jsonl
Results = Mapping[str, Mapping[str, Mapping[str, float]]]  # stage -> kind -> {"accuracy", "chance", "n"}

STAGE_TITLES = {
    "base": "Base training",
    "mid": "Mid-training",
    "sft": "Fine-tuning (SFT)",
    "rl": "Reinforcement (RL)",
}
# Okabe and Ito's palette: distinct for colour-blind readers, dark enough on white.
_COLOURS = {"base": "#0072B2", "mid": "#E69F00", "sft": "#009E73", "rl": "#CC79A7"}
_ACCENT = "#D55E00"
_INK = "#333333"
_STYLE = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": "#999999",
    "axes.labelcolor": _INK,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_SIZE_INCHES = (12.0, 7.0)
_DPI = 110


def training_curves(runs: Runs, path: Path) -> Path | None:
    """Training loss (upper row) and validation bits per byte (lower row), one column per stage.

    Returns `path`, or None without writing if no run has a loss.
    """
    runs = {stage: records for stage, records in runs.items() if series(records, "train/loss")[0]}
    rows = [("train/loss", "training loss\n(nats per token)"), ("val/bpb", "validation\n(bits per byte)")]
    return _grid(runs, rows, path, "Training and validation loss")


def schedule_curves(runs: Runs, path: Path) -> Path | None:
    """Learning-rate multiplier (upper row) and throughput (lower row), one column per stage."""
    runs = {stage: records for stage, records in runs.items() if series(records, "train/tok_per_sec")[0]}
    rows = [
        ("train/lrm", "learning-rate\nmultiplier"),
        ("train/tok_per_sec", "tokens per second"),
    ]
    return _grid(runs, rows, path, "Learning rate and throughput")


def accuracy_bars(results: Results, path: Path) -> Path | None:
    """Accuracy per kind of question, a bar per stage with its 95 % interval, and chance as a mark across."""
    stages = [stage for stage in STAGE_TITLES if results.get(stage)]
    stages += sorted(stage for stage in results if results[stage] and stage not in STAGE_TITLES)
    kinds = list(dict.fromkeys(kind for stage in stages for kind in results[stage]))
    if not kinds:
        return None
    with matplotlib.rc_context(_STYLE):
        inches = max(8.0, min(16.0, 3.5 + 1.5 * len(kinds))), 6.0
        figure = Figure(figsize=inches, dpi=_DPI, layout="constrained")
        axes = figure.add_subplot()
        width = 0.8 / len(stages)
        for index, stage in enumerate(stages):
            _bars(axes, results[stage], kinds, (index - (len(stages) - 1) / 2) * width, width, stage)
        for position, kind in enumerate(kinds):
            chances = [results[stage][kind]["chance"] for stage in stages if kind in results[stage]]
            label = "chance" if position == 0 else None
            marks = axes.hlines(chances, position - 0.46, position + 0.46, colors=_ACCENT, lw=2, label=label)
            marks.set(linestyle="--", clip_on=False)
        axes.set_xticks(range(len(kinds)), kinds)
        if len(kinds) > 8:
            axes.tick_params(axis="x", rotation=30)
        axes.grid(axis="x", visible=False)
        axes.set_xlim(-0.6, len(kinds) - 0.4)
        axes.set_ylim(0, 1.08)
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylabel("answers exactly right")
        axes.set_title("Held-out questions: accuracy beside chance", loc="left", pad=12)
        figure.legend(loc="outside right upper")
        return _save(figure, path)


def wilson_interval(accuracy: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share seen in `n` trials (Wilson 1927)."""
    if n <= 0:
        return 0.0, 1.0
    centre = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _bars(axes: Axes, kinds: Mapping, names: list[str], offset: float, width: float, stage: str) -> None:
    spots = [index + offset for index, name in enumerate(names) if name in kinds]
    values = [kinds[name] for name in names if name in kinds]
    heights = [value["accuracy"] for value in values]
    limits = [wilson_interval(value["accuracy"], value["n"]) for value in values]
    errors = [
        [max(0.0, height - low) for height, (low, _) in zip(heights, limits, strict=True)],
        [max(0.0, high - height) for height, (_, high) in zip(heights, limits, strict=True)],
    ]
    label = STAGE_TITLES.get(stage, stage)
    colour = _COLOURS.get(stage, "#56B4E9")
    axes.bar(spots, heights, 0.92 * width, color=colour, label=label)
    axes.errorbar(spots, heights, yerr=errors, fmt="none", ecolor=_INK, elinewidth=1.1, capsize=3)
    for spot, height, (_, high) in zip(spots, heights, limits, strict=True):
        text = f"{100 * height:.1f}".removesuffix(".0")
        axes.text(spot, max(high, height) + 0.012, text, ha="center", va="bottom", fontsize=9.5, color=_INK)


def _grid(runs: Runs, rows: list[tuple[str, str]], path: Path, title: str) -> Path | None:
    if not runs:
        return None
    rows = [(key, label) for key, label in rows if any(series(records, key)[0] for records in runs.values())]
    stages = [stage for stage in STAGE_TITLES if stage in runs] + sorted(set(runs) - set(STAGE_TITLES))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        grid = figure.subplots(len(rows), len(stages), squeeze=False, sharex="col")
        for column, stage in enumerate(stages):
            for row, (key, label) in enumerate(rows):
                axes = grid[row][column]
                unit = _curve(axes, runs[stage], key, _COLOURS.get(stage, "#56B4E9"))
                if column == 0:
                    axes.set_ylabel(label)
            grid[0][column].set_title(STAGE_TITLES.get(stage, stage), loc="left")
            grid[-1][column].set_xlabel(unit)
        figure.align_ylabels(grid[:, 0])
        figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold", color=_INK)
        return _save(figure, path)


def _curve(axes: Axes, records: Sequence[Mapping[str, Any]], key: str, colour: str) -> str:
    """Draws one key over tokens (or steps, if tokens were not logged); returns the label of the x axis."""
    steps, values = series(records, key)
    token_steps, tokens = series(records, "total_training_tokens")
    if token_steps:
        # A training record counts its own step's tokens; an evaluation at step s precedes that step.
        ahead = 0 if key.startswith("train/") else 1
        x = np.interp(steps, [ahead - 1, *(np.asarray(token_steps) + ahead)], [0, *tokens])
    else:
        x = np.asarray(steps, float)
    y = np.asarray(values, float)
    good = np.isfinite(y)
    few = len(y) <= 40
    if good.any():
        axes.plot(x[good], y[good], color=colour, lw=1.8, marker="o" if few else None, markersize=4)
        axes.set_title(_headline(y[good], key), loc="right", fontsize=11, color=colour)
        _frame(axes, y[good], key)
    else:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color="#999999")
        axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    return "training tokens" if token_steps else "step"


def _headline(y: np.ndarray, key: str) -> str:
    """The one number to read off a curve."""
    if key == "train/tok_per_sec":
        return f"median {format_quantity(float(np.median(y)))}"
    return f"final {y[-1]:.3f}"


def _short(value: float, _: int | None = None) -> str:
    """Tick labels: 0, 500k, 1.5M."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{prefix}"
    return f"{value:g}"


def _frame(axes: Axes, y: np.ndarray, key: str) -> None:
    """Axis limits that show the curve's course, from zero where zero means something."""
    if key in ("train/lrm", "train/tok_per_sec"):
        axes.set_ylim(0, 1.2 * (y.max() or 1.0))
    else:
        low, high = y.min(), y.max()
        room = (high - low) or 0.1 * (abs(high) or 1.0)
        axes.set_ylim(low - 0.08 * room, high + 0.15 * room)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    if key == "train/tok_per_sec":
        axes.yaxis.set_major_formatter(FuncFormatter(_short))


def _save(figure: Figure, path: Path) -> Path:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(Path(path), buffer.getvalue())
    return Path(os.fspath(path))
