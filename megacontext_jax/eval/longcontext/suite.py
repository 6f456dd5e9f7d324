"""Runs the suite: trains what the tasks need, asks, and keeps every finished row."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax

from megacontext_jax.errors import UserError
from megacontext_jax.eval.longcontext.columns import (
    ATTENTIONS,
    COLUMNS,
    FAR,
    GAP,
    QUESTIONS,
    evaluate,
    evaluate_rows,
)
from megacontext_jax.eval.longcontext.models import Size, budget, rows_for, smallest, train, train_rows
from megacontext_jax.eval.longcontext.pictures import draw_focus
from megacontext_jax.eval.longcontext.tasks import TASKS, Task
from megacontext_jax.telemetry.progress import Progress
from megacontext_jax.telemetry.sinks import write_atomic

SHOWN = (*COLUMNS, *ATTENTIONS, *(column + FAR for column in ATTENTIONS), "gist_attention" + GAP)
RESULTS = "long_context.json"
NOTES = "long_context_runs.json"


def choose(names: str) -> list[Task]:
    """Tasks of names joined by | or commas; all without any."""
    wanted = [name.strip() for name in names.replace(",", "|").split("|") if name.strip()]
    unknown = [name for name in wanted if name not in TASKS]
    if unknown:
        raise UserError(f"--tasks: there is no task {', '.join(unknown)}; choose from {', '.join(TASKS)}.")
    return [TASKS[name] for name in (wanted or TASKS)]


def run(tasks: list[Task], size: Size, seed: int, folder: Path, say: Callable[[str], None] = print) -> dict:
    """{task: {column: accuracy, "chance": y}} of all tasks, also in `folder`; finished tasks are not run again."""
    book = Book(folder, {"size": asdict(size), "seed": seed, "questions": QUESTIONS})
    for family, members in book.missing(tasks, "mark").items():
        params, seconds = {}, {}
        for kind in ("transformer", "mean"):
            label = f"{family}, {'learned' if kind == 'transformer' else 'mean'} gists"
            with Progress(label, size.steps, unit="steps") as progress:
                params[kind], seconds[kind] = train(members[0], size, kind, seed, partial(_advance, progress))
        for task in members:
            found = evaluate(task, size, params["transformer"], params["mean"], seed)
            picture = draw_focus(task, size, params["transformer"], folder / f"focus_{task.name}.png")
            facts = {
                "entries": {"gists alone": smallest(task), "budget": budget(task)},
                "training_seconds": seconds,
                "picture": picture.name,
            }
            book.enter(task, found, facts, "mark")
            say(line(task.name, found | {"chance": task.chance}))
        jax.clear_caches()
    return {task.name: book.results[task.name] for task in tasks}


def run_rows(
    tasks: list[Task], size: Size, seed: int, folder: Path, say: Callable[[str], None] = print
) -> dict:
    """As `run`, for the columns of models with gist attention and with a sliding window of equal budget."""
    book = Book(folder, {"size": asdict(size), "seed": seed, "questions": QUESTIONS})
    for family, members in book.missing(tasks, "mark_rows").items():
        params, seconds = {}, {}
        for column, attention in ATTENTIONS.items():
            with Progress(f"{family}, {attention} attention", size.steps, unit="steps") as progress:
                params[column], seconds[attention] = train_rows(
                    members[0], size, attention, seed, partial(_advance, progress)
                )
        for task in members:
            found = evaluate_rows(task, size, params, seed)
            keys = int(rows_for(task, size, "gist").cfg.keys_per_token().max())
            book.enter(task, found, {"keys per token": keys, "row_training_seconds": seconds}, "mark_rows")
            say(line(task.name, found | {"chance": task.chance}))
        jax.clear_caches()
    return {task.name: book.results[task.name] for task in tasks}


class Book:
    """The two files of results: accuracies for readers, and how they came about."""

    def __init__(self, folder: Path, mark: dict):
        self.folder, self.mark = folder, mark
        self.results, self.notes = _read(folder / RESULTS), _read(folder / NOTES)

    def missing(self, tasks: list[Task], part: str) -> dict[str, list[Task]]:
        """Tasks by family of which `part` of the columns was not found with these settings."""
        families: dict[str, list[Task]] = {}
        for task in tasks:
            if self.notes.get(task.name, {}).get(part) != self.mark:
                families.setdefault(task.family, []).append(task)
        return families

    def enter(self, task: Task, found: dict, facts: dict, part: str) -> None:
        about = {"about": task.about, "tokens": task.tokens, "plateau": task.plateau, part: self.mark}
        # columns found with other settings do not stand beside these
        other = {"mark": "mark_rows", "mark_rows": "mark"}[part]
        stale = self.notes.get(task.name, {}).get(other) not in (None, self.mark)
        before = ({}, {}) if stale else (self.results.get(task.name, {}), self.notes.get(task.name, {}))
        self.enter_alone(task.name, before[0] | found | {"chance": task.chance}, before[1] | about | facts)

    def enter_alone(self, name: str, row: dict, notes: dict) -> None:
        """A whole row, in place of the one of this name."""
        self.results[name], self.notes[name] = row, notes
        write_atomic(self.folder / RESULTS, json.dumps(self.results, indent=2) + "\n")
        write_atomic(self.folder / NOTES, json.dumps(self.notes, indent=2) + "\n")


def _advance(progress, step: int, loss) -> None:
    if step % 10 == 0:
        float(loss)  # not further ahead of the device than this
        progress.update(10)


def line(name: str, row: dict) -> str:
    cells = ", ".join(f"{column} {100 * row[column]:.1f}" for column in SHOWN if column in row)
    return f"{name}: {cells} (chance {100 * row['chance']:.1f} %)"


def table(results: dict, notes: dict) -> list[list[str]]:
    """Rows of cells, the header first; accuracies in percent."""
    shown = [column for column in SHOWN if any(column in row for row in results.values())]
    short = [column.replace("gist_lens_", "+ ") for column in shown]
    rows = [["Task", "tokens", "entries", "chance", "plateau", *short]]
    for name, row in results.items():
        note = notes.get(name, {})
        entries = note.get("entries", {})
        rows.append(
            [
                name,
                str(note.get("tokens", "")),
                f"{entries.get('gists alone', '')} / {entries.get('budget', '')}",
                f"{100 * row['chance']:.1f}",
                f"{100 * note['plateau']:.0f}" if "plateau" in note else "",
                *(f"{100 * row[column]:.1f}" if column in row else "-" for column in shown),
            ]
        )
    return rows


def read_notes(folder: Path) -> dict:
    return _read(folder / NOTES)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path} is damaged; move it away and run the suite again.") from None
