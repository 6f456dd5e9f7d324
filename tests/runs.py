"""Scripts run as a user runs them, in folders of their own at the size of tiny.yaml; what they log; killing them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
N = 12  # steps in tiny.yaml


def command(script: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"scripts.{script}", "--config", "tests/tiny.yaml", *flags]


def flags(*words: str) -> list[str]:
    """The same for a script's `main` in this process."""
    return ["--config", "tests/tiny.yaml", *words]


def environment(folder: Path) -> dict:
    folders = {"NANOCHAT_BASE_DIR": str(folder / "base"), "MEGACONTEXT_ARTIFACTS": str(folder / "artifacts")}
    return os.environ | folders


def run(folder: Path, script: str, *flags: str, status: int = 0, configured: bool = True) -> str:
    """A script's output; not `configured`: one that takes no configuration."""
    done = subprocess.run(
        command(script, *flags) if configured else [sys.executable, "-m", f"scripts.{script}", *flags],
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def records(folder: Path, run_name: str) -> list[dict]:
    """All that a run has logged."""
    path = folder / "artifacts" / run_name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path, run_name: str) -> dict[int, float]:
    """Training loss by step."""
    found: dict[int, float] = {}
    for record in records(folder, run_name):
        if "train/loss_step" in record:
            assert record["step"] not in found, "a step was logged twice"
            found[record["step"]] = record["train/loss_step"]
    return found


def kill_when_saved(folder: Path, run_name: str, step: int, script: str, *flags: str) -> None:
    """Start a script and kill it as soon as a step of its run is saved."""
    process = subprocess.Popen(
        command(script, *flags), cwd=ROOT, env=environment(folder), stdout=subprocess.DEVNULL
    )
    saved = folder / f"artifacts/{run_name}/{step:06d}"
    deadline = time.monotonic() + 200
    while not saved.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
