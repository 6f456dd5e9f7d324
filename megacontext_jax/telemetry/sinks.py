"""Metric streams: one JSONL file per run, always; Weights & Biases and OpenTelemetry beside it when asked for.

`open_metrics` decides once, at the start, what a run writes to, and says so (`Metrics.describe`). The JSONL
file is the truth: it follows the run through kills and resumes without doubled or torn lines.
"""

import contextlib
import json
import math
import netrc
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megacontext_jax.errors import UserError
from megacontext_jax.files import write_bytes
from megacontext_jax.telemetry.otel import off_because, open_otel

METRICS_FILE = "metrics.jsonl"
WANDB_FILE = "wandb_run.json"
PROJECTS = {"base": "nanochat", "mid": "nanochat-mid", "sft": "nanochat-sft", "rl": "nanochat-rl"}
SERVICE = "megacontext-train"  # OpenTelemetry's service.name
NO_WANDB_NAME = "dummy"  # nanochat's run name for "no wandb"
INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 120.0

_RESERVED = ("step", "time")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_MODES = ("online", "offline", "disabled")


def write_atomic(path: Path, data: bytes | str) -> None:
    """`write_bytes` for text too, as UTF-8. Raises UserError; the old file is then untouched."""
    write_bytes(path, data.encode() if isinstance(data, str) else data)


def move_aside(path: Path) -> Path:
    """Renames a file or folder to `<stem>.<timestamp><suffix>` beside itself and returns the new path."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(10_000):
        tail = stamp if attempt == 0 else f"{stamp}-{attempt}"
        target = path.with_name(f"{path.stem}.{tail}{path.suffix}")
        if not target.exists():
            os.rename(path, target)
            return target
    raise UserError(f"Cannot find a free name to move {path} aside; tidy up its folder.")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in the order they were logged; lines that are not JSON are passed over.

    A kill can tear the last line, so a line that does not parse is no error here. Non-finite numbers come
    back as floats.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"There is no metrics file {path}; train first or name another run.") from None
    records = (_parse(line) for line in data.split(b"\n"))
    return [record for record in records if record is not None]


def series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key, by rising step; where a step was logged twice the later value counts."""
    points = {record["step"]: record[key] for record in records if key in record}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


class JsonlSink:
    """Appends one JSON object per `log` call in a single write, so that a kill tears at most one line."""

    def __init__(self, path: Path, resume_step: int | None = None):
        self.path = path
        self._resume_step = resume_step
        self._repeats: list[bytes] = []
        if path.exists():
            if resume_step is None:
                if path.stat().st_size:
                    move_aside(path)
            else:
                self._repeats = _rewind(path, resume_step)
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise UserError(f"Cannot open {path} ({error.strerror}); make its folder writable.") from None

    def log(self, values: Mapping[str, Any], step: int) -> None:
        record = {"step": step, "time": round(time.time(), 3)}
        record |= {key: _plain(value) for key, value in values.items() if key not in _RESERVED}
        if self._repeats:
            self._drop_repeats(record)
        line = json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        try:
            self._file.write(line)
        except OSError as error:
            raise UserError(
                f"Cannot append to {self.path} ({error.strerror}); free some space and run the same command."
            ) from None

    def close(self, exit_code: int = 0) -> None:
        self._file.close()

    def _drop_repeats(self, record: Mapping[str, Any]) -> None:
        # Evaluations at the very step of the checkpoint may or may not run again after a resume. They stay
        # in the file until their like arrives, then the new one takes their place.
        if record["step"] != self._resume_step:
            self._repeats = []
            return
        old = [line for line in self._repeats if (_parse(line) or {}).keys() & record.keys() - set(_RESERVED)]
        if not old:
            return
        self._repeats = [line for line in self._repeats if line not in old]
        self._file.close()
        kept = [line for line in self.path.read_bytes().split(b"\n") if line and line not in old]
        write_atomic(self.path, b"".join(line + b"\n" for line in kept))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)


class WandbSink:
    """A wandb run under a stable id. A failure after the start costs the wandb stream, never the training."""

    def __init__(self, run: Any, say: Callable[[str], None]):
        self._run = run
        self._say = say

    def log(self, values: Mapping[str, Any], step: int) -> None:
        if self._run is None or step < self._run.step:
            return  # the server has these steps from before the resume and would refuse them
        plain = {key: _parsed(_plain(value)) for key, value in values.items()}
        self._guard("logging", lambda: self._run.log({**plain, "step": step}, step=step))

    def close(self, exit_code: int = 0) -> None:
        if self._run is not None:
            self._guard("closing", lambda: self._run.finish(exit_code=exit_code))
        self._run = None

    def _guard(self, doing: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self._say(
                f"wandb failed while {doing} ({_sentence(error)}); the run goes on with {METRICS_FILE}."
            )
            self._run = None


class Metrics:
    """Fans every record out to its sinks. Closing it twice is fine; as a context manager it closes itself."""

    def __init__(self, sinks: list[Any], path: Path | None, wandb_status: str, otel_status: str = "off"):
        self._sinks = sinks
        self.path = path
        self.wandb_status = wandb_status
        self.otel_status = otel_status

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Writes one record; values are numbers, strings or small arrays (anything with `.tolist()`)."""
        for sink in self._sinks:
            sink.log(values, int(step))

    def event(self, kind: str, fields: Mapping[str, Any], session_id: str = "") -> None:
        """Hands an event (see `names.SPANS`) to the sinks that take events: OpenTelemetry, as a span.

        Fields are numbers, strings, None, small arrays, and lists and mappings of them.
        """
        takers = [sink for sink in self._sinks if hasattr(sink, "event")]
        if takers:
            plain = {str(key): _parsed(_plain(value)) for key, value in fields.items()}
            for sink in takers:
                sink.event(kind, plain, session_id)

    def describe(self) -> str:
        """One line for the console: where the metrics go."""
        where = self.path or "written by process 0"
        return f"metrics: {where} | wandb: {self.wandb_status} | otel: {self.otel_status}"

    def close(self, exit_code: int = 0) -> None:
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close(exit_code)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self.close(exit_code=0 if kind is None else 1)


def open_metrics(
    run_dir: Path | str,
    *,
    stage: str,
    run_name: str = "",
    config: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
    wandb_mode: str = "auto",
    primary: bool = True,
    say: Callable[[str], None] | None = None,
    project: str | None = None,
) -> Metrics:
    """Opens the metric streams of one run; call it before any long work.

    Args:
        run_dir: the run's folder; receives `metrics.jsonl`, `wandb_run.json` and wandb's own files.
        stage: base, mid, sft or rl; names the wandb project as nanochat does.
        run_name: wandb's run name. Empty: the folder's name, and wandb only if a key or mode asks for it.
            "dummy": no wandb (nanochat's convention).
        config: flags and derived numbers, stored with the wandb run.
        resume_step: the number of finished steps the run continues from. What the killed run logged beyond
            that is dropped. None: a fresh start; an older metrics file is moved aside.
        wandb_mode: auto, online, offline or disabled. auto follows WANDB_MODE, then WANDB_API_KEY.
        primary: False on all processes but the first, which write nothing.
        say: receives the sentences for the user; standard error by default. One of them may come from the
            thread that sends to OpenTelemetry.
        project: wandb's project, in the place of the stage's.

    Raises:
        UserError: a bad mode or stage, a folder that cannot be written, MEGACONTEXT_ENABLE_WANDB=1 and
            wandb cannot be reached, or a MC_OTEL_ENDPOINT that is no address or lacks its package.
    """
    if stage not in PROJECTS:
        raise UserError(f"Unknown stage '{stage}' for metrics; use one of {', '.join(PROJECTS)}.")
    if not primary:
        return Metrics([], None, "written by process 0")
    say = say or (lambda sentence: print(sentence, file=sys.stderr, flush=True))
    run_dir = Path(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot create {run_dir} ({error.strerror}); make its parent writable.") from None

    mode, why = _wandb_mode(wandb_mode, run_name)
    name = run_name if run_name not in ("", NO_WANDB_NAME) else run_dir.name
    project = project or PROJECTS[stage]
    with contextlib.ExitStack() as opened:  # what is open is closed if the start is refused
        otel = open_otel(SERVICE, name, say=say)
        if otel:
            opened.callback(otel.close, exit_code=1)
        wandb_sink, status = None, f"off ({why})"
        if mode != "disabled":
            try:
                identity = _wandb_identity(run_dir, fresh=resume_step is None)
                run = _init_wandb(run_dir, mode, project, name, identity, _plain(dict(config or {})))
                wandb_sink, status = WandbSink(run, say), f"{mode}, project {project}, run {name}"
                opened.callback(wandb_sink.close, exit_code=1)
                if mode == "online" and run.url:
                    status += f", {run.url}"
            except _Unreachable as error:
                if _enforced():
                    raise UserError(
                        f"MEGACONTEXT_ENABLE_WANDB=1 but wandb cannot be reached ({error}); set WANDB_API_KEY "
                        "and check the network, use WANDB_MODE=offline, or unset MEGACONTEXT_ENABLE_WANDB."
                    ) from None
                status = f"off ({error})"
                say(f"wandb cannot be reached ({error}); the run goes on with {run_dir / METRICS_FILE}.")
        # The file is opened last: a start refused above leaves the curves of the run before it alone.
        jsonl = JsonlSink(run_dir / METRICS_FILE, resume_step)
        opened.pop_all()
    otel_status = otel.describe() if otel else f"off ({off_because()})"
    return Metrics([sink for sink in (jsonl, wandb_sink, otel) if sink], jsonl.path, status, otel_status)


class _Unreachable(Exception):
    """wandb does not answer; the text is a clause without a full stop."""


def _enforced() -> bool:
    value = os.environ.get("MEGACONTEXT_ENABLE_WANDB", "").strip().lower()
    return value not in ("", "0", "false", "no", "off")


def _wandb_mode(requested: str, run_name: str) -> tuple[str, str]:
    """The mode to use and, where it is "disabled", the reason."""
    if requested not in ("auto", *_MODES):
        raise UserError(f"Unknown wandb mode '{requested}'; use auto, online, offline or disabled.")
    environment = os.environ.get("WANDB_MODE", "").strip().lower()
    environment = {"dryrun": "offline", "run": "online"}.get(environment, environment)
    if environment and environment not in _MODES:
        raise UserError(f"Unknown WANDB_MODE '{environment}'; use online, offline or disabled.")
    mode = requested if requested != "auto" else environment

    if _enforced():
        if mode == "disabled":
            raise UserError(
                "MEGACONTEXT_ENABLE_WANDB=1 demands wandb, which is disabled (WANDB_MODE or --wandb); "
                "drop one of the two."
            )
        return mode or "online", ""
    if run_name == NO_WANDB_NAME:
        return "disabled", "the run is named dummy"
    if mode:
        return mode, "disabled on request"
    # A name given by hand is a wish for wandb, as in nanochat; the default name is not.
    if os.environ.get("WANDB_API_KEY") or run_name:
        return "online", ""
    return "disabled", "WANDB_API_KEY is not set"


def _wandb_identity(run_dir: Path, fresh: bool) -> str:
    """The run's stable wandb id, made on the first start and read again on every resume."""
    path = run_dir / WANDB_FILE
    if path.exists() and fresh:
        move_aside(path)
    if path.exists():
        try:
            return str(json.loads(path.read_text())["id"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; move it away to log to a new wandb run.") from None
    identity = uuid.uuid4().hex[:8]
    write_atomic(path, json.dumps({"id": identity}) + "\n")
    return identity


def _init_wandb(run_dir: Path, mode: str, project: str, name: str, identity: str, config: dict) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise _Unreachable(f"the wandb package cannot be imported: {_sentence(error)}") from None
    try:
        if mode == "online" and not _has_credentials(wandb.Settings().base_url):
            # Asked before wandb does: at a terminal it would stop and wait for someone to type a key.
            raise _Unreachable("no WANDB_API_KEY and no `wandb login` found")
        options: dict[str, Any] = {
            "console": "off",  # wandb would wrap stdout and record every redrawn progress bar
            "silent": True,
            "init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_TIMEOUT_S),
        }
        if "finish_timeout" in wandb.Settings.model_fields:
            options["finish_timeout"] = FINISH_TIMEOUT_S
        return wandb.init(
            mode=mode,
            dir=str(run_dir),
            project=project,
            name=name,
            id=identity,
            config=config,
            resume="allow" if mode == "online" else None,
            allow_val_change=True,
            settings=wandb.Settings(**options),
        )
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise _Unreachable(_sentence(error)) from None


def _has_credentials(base_url: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(path.expanduser())).authenticators(urlsplit(base_url).hostname or ""):
                return True
    return False


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") if lines else type(error).__name__)[:300]


def _rewind(path: Path, step: int) -> list[bytes]:
    """Takes back what was logged after `step` steps were done; returns the lines logged exactly there.

    A training record of step s describes the update from s to s+1, an evaluation at s the state before it:
    so training records go from s on, others from s+1 on. Lines that do not parse stay, except a torn last
    one.
    """
    data = path.read_bytes()
    lines = data.split(b"\n")
    torn = lines.pop()  # empty after a whole line
    if torn and _parse(torn) is not None:
        lines.append(torn)
    kept, repeats = [], []
    for line in lines:
        record = _parse(line)
        if record is not None:
            training = any(key.startswith("train/") for key in record)
            if record["step"] > step or (record["step"] == step and training):
                continue
            if record["step"] == step:
                repeats.append(line)
        kept.append(line)
    rewritten = b"".join(line + b"\n" for line in kept)
    if rewritten != data:
        write_atomic(path, rewritten)
    return repeats


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return {key: _parsed(value) for key, value in record.items()}


def _parsed(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    """Array scalars as numbers, arrays as lists, non-finite floats as strings (strict JSON has none)."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
