"""Runs the suite: trains what the tasks need, asks, and keeps every finished row."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import jax

from megacontext_jax.errors import UserError
from megacontext_jax.eval.longcontext.columns import COLUMNS, QUESTIONS, evaluate
from megacontext_jax.eval.longcontext.models import Size, budget, smallest, train
from megacontext_jax.eval.longcontext.pictures import draw_focus
from megacontext_jax.eval.longcontext.tasks import TASKS, Task
from megacontext_jax.telemetry.progress import Progress
from megacontext_jax.telemetry.sinks import write_atomic

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
    results, notes = _read(folder / RESULTS), _read(folder / NOTES)
    families: dict[str, list[Task]] = {}
    for task in tasks:
        mark = {"size": asdict(size), "seed": seed, "questions": QUESTIONS}
        if notes.get(task.name, {}).get("mark") != mark:
            families.setdefault(task.family, []).append(task)
    for family, members in families.items():
        params, seconds = {}, {}
        for kind in ("transformer", "mean"):
            label = f"{family}, {'learned' if kind == 'transformer' else 'mean'} gists"
            with Progress(label, size.steps, unit="steps") as progress:
                params[kind], seconds[kind] = train(
                    members[0], size, kind, seed, lambda step, loss, bar=progress: _advance(bar, step, loss)
                )
        for task in members:
            found = evaluate(task, size, params["transformer"], params["mean"], seed)
            results[task.name] = found | {"chance": task.chance}
            notes[task.name] = {
                "mark": {"size": asdict(size), "seed": seed, "questions": QUESTIONS},
                "about": task.about,
                "tokens": task.tokens,
                "entries": {"gists alone": smallest(task), "budget": budget(task)},
                "plateau": task.plateau,
                "training_seconds": seconds,
            }
            picture = draw_focus(task, size, params["transformer"], folder / f"focus_{task.name}.png")
            notes[task.name]["picture"] = picture.name
            write_atomic(folder / RESULTS, json.dumps(results, indent=2) + "\n")
            write_atomic(folder / NOTES, json.dumps(notes, indent=2) + "\n")
            say(line(task.name, results[task.name]))
        jax.clear_caches()
    return {task.name: results[task.name] for task in tasks}


def _advance(progress, step: int, loss) -> None:
    if step % 10 == 0:
        float(loss)  # not further ahead of the device than this
        progress.update(10)


def line(name: str, row: dict) -> str:
    cells = ", ".join(f"{column} {100 * row[column]:.1f}" for column in COLUMNS if column in row)
    return f"{name}: {cells} (chance {100 * row['chance']:.1f} %)"


def table(results: dict, notes: dict) -> list[list[str]]:
    """Rows of cells, the header first; accuracies in percent."""
    short = [column.replace("gist_lens_", "+ ") for column in COLUMNS]
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
                *(f"{100 * row[column]:.1f}" if column in row else "-" for column in COLUMNS),
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
