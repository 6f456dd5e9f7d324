"""The report: every stage writes its section as JSON when it ends, `generate` makes `report.md` of them.

    python -m megacontext_jax.telemetry.report begin      note the start of a run, once
    python -m megacontext_jax.telemetry.report generate   write artifacts/report/report.md and its pictures
    python -m megacontext_jax.telemetry.report reset      move the report aside and begin a new one

A section replaces the one of the same name, so a stage that runs again is never in the report twice.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from megacontext_jax.errors import UserError
from megacontext_jax.paths import artifacts_dir, report_dir
from megacontext_jax.telemetry import hardware
from megacontext_jax.telemetry.progress import format_quantity
from megacontext_jax.telemetry.sinks import move_aside, read_metrics, write_atomic

TITLE = "megacontext-jax training report"
ORDER = (
    "tokenizer-training",
    "tokenizer-evaluation",
    "base-model-training",
    "base-model-loss",
    "base-model-evaluation",
    "midtraining",
    "chat-evaluation-mid",
    "chat-sft",
    "chat-evaluation-sft",
    "chat-rl",
    "chat-evaluation-rl",
    "working-contexts",
    "long-context",
    "long-context-model",
    "long-history",
)
STAGE_OF = {
    "base-model-training": "base",
    "base-model-loss": "base",
    "base-model-evaluation": "base",
    "midtraining": "mid",
    "chat-evaluation-mid": "mid",
    "chat-sft": "sft",
    "chat-evaluation-sft": "sft",
    "chat-rl": "rl",
    "chat-evaluation-rl": "rl",
}
STAGES = ("base", "mid", "sft", "rl")
ALWAYS_SHOWN = ("base", "mid", "sft")
RUN_FILE = "run.json"
REPORT_FILE = "report.md"

Facts = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def begin(tag: str = "") -> dict[str, Any]:
    """Notes when and on what this run started, unless that is noted already; returns the note.

    A report belongs to one tag: that of another tag is moved aside first (see `reset`).
    """
    path = report_dir() / RUN_FILE
    if path.exists():
        note = _read_json(path)
        if not tag or note.get("tag", "") in ("", tag):
            return note
        move_aside(report_dir())
    note = {"started": psutil.Process().create_time(), "machine": hardware.describe(), "tag": tag}
    _write_json(path, note)
    return note


def reset() -> Path | None:
    """Begins a new report; the old one is kept as `report.<timestamp>`, whose path is returned."""
    folder = report_dir()
    aside = move_aside(folder) if any(folder.iterdir()) else None
    begin()
    return aside


def write_section(
    slug: str,
    title: str,
    facts: Facts,
    *,
    run: str | None = None,
    summary: Mapping[str, float] | None = None,
    samples: Sequence[Mapping[str, str]] = (),
    metrics: Path | None = None,
    table: Sequence[Sequence[str]] = (),
    pictures: Sequence[str] = (),
    started: float | None = None,
) -> Path:
    """Writes (or replaces) one section of the report; returns its file.

    Args:
        slug: the section's name, letters, digits and dashes; the known ones are in `ORDER`.
        title: its heading.
        facts: "- key: value" lines, in order; a list of dicts is written one after the other.
        run: what produced it (e.g. folder and step), for `has_section`.
        summary: rows for the closing table, in the column of the section's stage. Default: the facts whose
            names begin with "Final ".
        samples: [{"prompt": ..., "completion": ...}], shown under "Samples".
        metrics: the stage's metrics.jsonl, from which `generate` draws the curves.
        table: rows of cells, the header first.
        pictures: names of picture files in the report's folder.
        started: Unix time of the stage's start; default: the start of this process.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
        raise UserError(f"'{slug}' cannot name a report section; use lower-case words joined by dashes.")
    begin()
    groups = [dict(facts)] if isinstance(facts, Mapping) else [dict(group) for group in facts if group]
    if summary is None:
        summary = {
            key.removeprefix("Final "): value
            for group in groups
            for key, value in group.items()
            if key.startswith("Final ") and isinstance(_number(value), float)
        }
    section = {
        "slug": slug,
        "title": title,
        "run": run,
        "started": psutil.Process().create_time() if started is None else started,
        "finished": time.time(),
        "facts": groups,
        "summary": dict(summary),
        "samples": [dict(sample) for sample in samples],
        "metrics": None if metrics is None else _stored_path(Path(metrics)),
        "table": [list(row) for row in table],
        "pictures": list(pictures),
    }
    path = report_dir() / f"{slug}.json"
    _write_json(path, section)
    return path


def has_section(slug: str, run: str | None = None) -> bool:
    """True if the section is there; with `run`, if it was written for exactly that run."""
    path = report_dir() / f"{slug}.json"
    return path.exists() and (run is None or _read_section(path)["run"] == run)


def write_chat_eval(
    stage: str,
    results: Mapping[str, Mapping[str, float]],
    facts: Facts | None = None,
    *,
    run: str | None = None,
    samples: Sequence[Mapping[str, str]] = (),
    started: float | None = None,
) -> Path:
    """Writes `chat_eval_<stage>.json` ({kind: {"accuracy", "chance", "n"}}) and its section.

    Returns the JSON file; the other arguments are those of `write_section`.
    """
    path = report_dir() / f"chat_eval_{stage}.json"
    _write_json(path, {kind: dict(values) for kind, values in results.items()})
    lines = {
        kind: f"{_percent(values['accuracy'])} (chance {_percent(values['chance'])}, {values['n']} questions)"
        for kind, values in results.items()
    }
    groups = [facts] if isinstance(facts, Mapping) else list(facts or [])
    write_section(
        f"chat-evaluation-{stage}",
        f"Chat evaluation {stage}",
        [*groups, lines],
        run=run,
        summary={},  # the table takes the accuracies from the results file
        samples=samples,
        started=started,
    )
    return path


def generate() -> Path:
    """Assembles `report.md` and its pictures from what the stages wrote; returns its path.

    Raises:
        UserError: no stage has written a section yet, or one of the files is damaged.
    """
    folder = report_dir()
    sections = _sections(folder)
    if not sections:
        raise UserError(f"There is nothing to report in {folder}; run a stage first, e.g. run10.sh.")
    results = _chat_results(folder)
    note = begin()

    parts = [_header(note), *(_section(section) for section in sections)]
    parts += [_curves(folder, sections), _accuracies(folder, results), _samples(sections)]
    parts.append(_summary(sections, results, note))
    path = folder / REPORT_FILE
    write_atomic(path, "\n".join(part for part in parts if part))
    return path


# --- Files -----------------------------------------------------------------------------------------------


def _write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, default=_number, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; run its stage again or move the file away.")
    return value


def _read_section(path: Path) -> dict[str, Any]:
    section = _read_json(path)
    if not {"slug", "title", "run", "started", "finished", "facts", "summary", "samples"} <= section.keys():
        raise UserError(f"{path} is not a section of the report; move the file away.")
    return section


def _sections(folder: Path) -> list[dict[str, Any]]:
    """All sections: the known ones in their order, then others by name."""
    paths = [path for path in sorted(folder.glob("*.json")) if path.name != RUN_FILE and "_" not in path.name]
    known = {slug: index for index, slug in enumerate(ORDER)}
    return sorted(map(_read_section, paths), key=lambda section: known.get(section["slug"], len(known)))


def _chat_results(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    results = {}
    for path in sorted(folder.glob("chat_eval_*.json")):
        kinds = _read_json(path)
        for values in kinds.values():
            if not isinstance(values, dict) or not {"accuracy", "chance", "n"} <= values.keys():
                raise UserError(f"{path} is not a result of chat_eval; run chat_eval again or move it away.")
        results[path.stem.removeprefix("chat_eval_")] = kinds
    order = {stage: index for index, stage in enumerate(STAGES)}
    return dict(sorted(results.items(), key=lambda item: order.get(item[0], len(order))))


def _stored_path(path: Path) -> str:
    """Relative to the artifacts folder where it lies inside, so that the folder can be moved."""
    path = path.absolute()
    root = artifacts_dir()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


# --- Text ------------------------------------------------------------------------------------------------


def _header(note: Mapping[str, Any]) -> str:
    machine = note["machine"]
    git = machine.get("git")
    lines = [f"# {TITLE}", "", f"Generated: {_time(time.time())}", ""]
    if git:
        state = "with uncommitted changes" if git["dirty"] else "clean"
        facts = {"Branch": git["branch"], "Commit": f"{git['commit']} ({state})", "Message": git["message"]}
        lines += ["### Git", "", *_bullets(facts), ""]
    gpus = [f"{gpu['name']} ({format_quantity(gpu['memory_bytes'], 'B')})" for gpu in machine["gpus"]]
    facts = {
        "Platform": machine["platform"],
        "CPU": f"{machine['cpu']}, {machine['cpu_cores']} usable cores",
        "Memory": format_quantity(machine["memory_bytes"], "B"),
        "GPUs": ", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus)) or "none",
    }
    lines += ["### Hardware", "", *_bullets(facts), ""]
    lines += ["### Software", "", *_bullets({"Python": machine["python"], **machine["versions"]}), ""]
    lines += ["### Bloat", "", *_bullets(bloat()), ""]
    lines += [f"Run started: {_time(note['started'])}", "", "---", ""]
    return "\n".join(lines)


def bloat(root: Path = hardware.PROJECT_ROOT) -> dict[str, int]:
    """Size of the project's own text: files, lines, characters, and tokens at four characters each."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", "*.py", "*.sh", "*.md", "*.yaml", "*.toml", "*.html"],
            capture_output=True,
            timeout=20,
        )
        paths = [root / name for name in listed.stdout.decode().split("\0") if name]
    except (OSError, subprocess.TimeoutExpired):
        paths = []
    paths = paths or sorted(Path(__file__).parents[1].rglob("*.py"))
    texts = [path.read_text(errors="replace") for path in paths if path.is_file()]
    characters = sum(map(len, texts))
    return {
        "Files": len(texts),
        "Lines": sum(text.count("\n") for text in texts),
        "Characters": characters,
        "Tokens (approx.)": characters // 4,
    }


def _section(section: Mapping[str, Any]) -> str:
    lines = [f"## {section['title']}", "", f"timestamp: {_time(section['finished'])}", ""]
    if section["run"] and not any("run" in group for group in section["facts"]):
        lines += [f"- run: {section['run']}"]
    for group in section["facts"]:
        lines += _bullets(group)
    if section.get("table"):
        lines += ["", *_table(section["table"])]
    for name in section.get("pictures", ()):
        lines += ["", f"![{section['title']}]({name})"]
    return "\n".join([*lines, ""])


def _curves(folder: Path, sections: Sequence[Mapping[str, Any]]) -> str:
    from megacontext_jax.telemetry import plots  # matplotlib takes a second, and training needs only the rest

    runs, missing = {}, []
    for section in sections:
        if not section.get("metrics"):
            continue
        path = artifacts_dir() / section["metrics"]  # an absolute path stays itself
        if path.exists():
            runs[STAGE_OF.get(section["slug"], section["slug"])] = read_metrics(path)
        else:
            missing.append(f'The metrics of "{section["title"]}" are gone ({section["metrics"]}).')
    pictures = [
        ("Training and validation loss", plots.training_curves(runs, folder / "loss.png")),
        ("Learning rate and throughput", plots.schedule_curves(runs, folder / "schedule.png")),
    ]
    lines = [f"![{title}]({path.name})\n" for title, path in pictures if path]
    if not lines and not missing:
        return ""
    return "\n".join(["## Training curves", "", *lines, *(f"{sentence}\n" for sentence in missing)])


def _accuracies(folder: Path, results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    from megacontext_jax.telemetry import plots

    kinds = list(dict.fromkeys(kind for values in results.values() for kind in values))
    if not kinds:
        return ""
    rows = [["Kind", "Chance", *(stage.upper() for stage in results)]]
    for kind in kinds:
        found = [values[kind] for values in results.values() if kind in values]
        chances = dict.fromkeys(_percent(value["chance"]) for value in found)
        cells = [
            f"{_percent(values[kind]['accuracy'])} (n={values[kind]['n']})" if kind in values else "-"
            for values in results.values()
        ]
        rows.append([kind, " / ".join(chances), *cells])
    picture = plots.accuracy_bars(results, folder / "accuracy.png")
    lines = ["## Accuracy beside chance", "", *_table(rows), ""]
    return "\n".join([*lines, f"![Accuracy beside chance]({picture.name})\n" if picture else ""])


def _samples(sections: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for section in sections:
        if section["samples"]:
            lines += [f"### {section['title']}", ""]
        for sample in section["samples"]:
            text = f"> {sample.get('prompt', '')}\n{sample.get('completion', '')}".rstrip()
            longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            lines += [f"{fence}text", text, fence, ""]
    return "\n".join(["## Samples", "", *lines]) if lines else ""


def _summary(sections: Sequence[Mapping[str, Any]], results: Mapping, note: Mapping[str, Any]) -> str:
    cells: dict[str, dict[str, Any]] = {}
    for section in sections:
        stage = STAGE_OF.get(section["slug"])
        for metric, value in section["summary"].items() if stage else ():
            cells.setdefault(metric, {})[stage] = value
    for stage, kinds in results.items():
        for kind, values in kinds.items():
            cells.setdefault(kind, {})[stage] = values["accuracy"]
    # As in nanochat's report: CORE leads, ChatCORE closes.
    names = sorted(cells, key=lambda name: {"CORE": -1, "ChatCORE": 1}.get(name, 0))
    used = {stage for values in cells.values() for stage in values}
    stages = [stage for stage in STAGES if stage in ALWAYS_SHOWN or stage in used]
    rows = [["Metric", *(stage.upper() for stage in stages)]]
    rows += [[name, *(_value(cells[name].get(stage, "-")) for stage in stages)] for name in names]

    start = min([note["started"], *(section["started"] for section in sections)])
    minutes = max(0, int(max(section["finished"] for section in sections) - start)) // 60
    lines = ["## Summary", ""]
    if names:
        lines += [*_table(rows), ""]
    return "\n".join([*lines, f"Total wall clock time: {minutes // 60}h{minutes % 60}m", ""])


def _bullets(facts: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            lines += _bullets({f"{key}.{name}": item for name, item in value.items()})
        else:
            lines.append(f"- {key}: {_value(value)}")
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [line(escaped[0]), line(["-" * width for width in widths]), *map(line, escaped[1:])]


def _value(value: Any) -> str:
    """nanochat's formats: four decimals, commas in large integers; an exponent where those would not do."""
    value = _number(value)
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        small_or_large = value != 0 and not 1e-3 <= abs(value) < 1e9
        return f"{value:.4e}" if small_or_large else f"{value:,.4f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return " ".join(str(value).split("\n"))


def _number(value: Any) -> Any:
    """Array scalars as Python numbers, arrays as lists, other foreign things as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str | list | tuple | Mapping):
        return value
    return str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def main(argv: list[str]) -> int:
    """The command line: begin, generate or reset."""
    if argv in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    tagged = len(argv) == 2 and argv[0] == "begin"
    if not tagged and (len(argv) != 1 or argv[0] not in ("begin", "generate", "reset")):
        raise UserError(f"report takes begin [TAG], generate or reset, not '{' '.join(argv)}'.")
    if argv[0] == "begin":
        begin(*argv[1:])
    elif argv[0] == "generate":
        print(f"Wrote {generate()}")
    else:
        aside = reset()
        print(f"Moved the old report to {aside}" if aside else "Began a new report")
    return 0


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
