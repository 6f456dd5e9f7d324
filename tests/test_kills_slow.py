"""Storms of kill -9 on every training script: whatever moment they hit, the end is the same, bit for bit.

The moments are drawn from a seed: half of them anywhere from the start of the process, half while it does its
work, which is short beside the imports and the compilation.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from megacontext_jax.checkpoints.restore import load_params

WORKS = ("Training a tokenizer", "Compiled the training step")  # said when the work begins
ROOT = Path(__file__).parents[1]
STAGES = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft"}
N, KILLS = 30, 8
FLAGS = ("--num-iterations", str(N), "--save-every", "2")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def start(folder: Path, script: str, *flags: str) -> subprocess.Popen:
    folders = {"NANOCHAT_BASE_DIR": str(folder / "base"), "MEGACONTEXT_ARTIFACTS": str(folder / "artifacts")}
    return subprocess.Popen(
        [sys.executable, "-m", f"scripts.{script}", "--config", "tests/tiny.yaml", *flags],
        cwd=ROOT,
        env=os.environ | folders | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, script: str, *flags: str) -> tuple[float, float]:
    """Run to the end; returns the seconds until the work began, and those it took."""
    begun = time.monotonic()
    process, work, said = start(folder, script, *flags), begun, ""
    for line in process.stdout:
        said += line
        if line.startswith(WORKS):
            work = time.monotonic()
    assert process.wait() == 0, said[-3000:]
    assert "Traceback" not in said
    return work - begun, time.monotonic() - work


def storm(
    folder: Path, script: str, spans: tuple[float, float], check: Callable[[Path], None], *flags: str
) -> None:
    """Start the script and kill it, `KILLS` times, then let it end.

    Whenever it is faster than the kill, and at the end, `check` compares what it made and clears it away.
    """
    rng, (before, work) = random.Random(script), spans
    kills = starts = 0
    while kills < KILLS:
        starts += 1
        assert starts <= 4 * KILLS, f"only {kills} kills hit"
        process, said = start(folder, script, *flags), ""
        if kills % 2:
            moment = rng.uniform(0, before + work)
        else:
            for line in process.stdout:
                said += line
                if line.startswith(WORKS):
                    break
            moment = rng.uniform(0, work / 2)
        try:
            said += process.communicate(timeout=moment)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            said += process.communicate()[0]
            kills += 1
        else:
            assert process.returncode == 0, said[-3000:]
            check(folder)
        assert "Traceback" not in said
        assert "error:" not in said
    finish(folder, script, *flags)
    check(folder)


def curve(folder: Path, stage: str) -> list[tuple]:
    """Every loss and evaluation in the order of the steps; no step may be there twice."""
    path = folder / f"artifacts/megacontext_{stage}_d2/metrics.jsonl"
    found = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        for name in ("train/loss_step", "val/bpb"):
            if name in record:
                assert (record["step"], name) not in found, "logged twice"
                found[record["step"], name] = record[name]
    assert [step for step, name in sorted(found) if name == "train/loss_step"] == list(range(N))
    return sorted(found.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All scripts uninterrupted, and how long each of them takes before and during its work."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder, "prepare_data")
    shutil.copytree(folder / "base", folder / "prepared")
    spans = {"tok": finish(folder, "tok_train")}
    spans |= {stage: finish(folder, script, *FLAGS) for stage, script in STAGES.items()}
    assert all(before > 0 for before, _ in spans.values())
    return folder, spans


def test_the_tokenizer(whole, tmp_path):
    folder, spans = whole
    shutil.copytree(folder / "prepared", tmp_path / "base")
    (wanted,) = (folder / "base/builtin").glob("*/tokenizer_512")

    def check(place: Path) -> None:
        made = place / wanted.relative_to(folder)
        assert sorted(p.name for p in made.iterdir()) == sorted(p.name for p in wanted.iterdir())
        for name in ("tokenizer.json", "tokenizer.pkl", "token_bytes.npy"):
            assert (made / name).read_bytes() == (wanted / name).read_bytes(), name
        assert (place / "artifacts/report/tokenizer-training.json").is_file()
        shutil.rmtree(made)
        shutil.rmtree(place / "artifacts")

    storm(tmp_path, "tok_train", spans["tok"], check)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage(whole, tmp_path, stage):
    folder, spans = whole
    shutil.copytree(folder / "base", tmp_path / "base", symlinks=True)
    for link in (tmp_path / "base").glob("megacontext_*"):
        link.unlink()
    for source in list(STAGES)[: list(STAGES).index(stage)]:
        name = f"artifacts/megacontext_{source}_d2"
        shutil.copytree(folder / name, tmp_path / name)
    name = f"artifacts/megacontext_{stage}_d2"
    wanted = curve(folder, stage), arrays(load_params(folder / name))
    section = {"base": "base-model-training", "mid": "midtraining", "sft": "chat-sft"}[stage]

    def check(place: Path) -> None:
        assert curve(place, stage) == wanted[0]
        assert arrays(load_params(place / name)) == wanted[1]
        assert not list((place / name / "unfinished").iterdir())
        assert sorted(p.name for p in (place / name).glob("0*")) == [f"{N - 2:06d}", f"{N:06d}"]
        report = place / f"artifacts/report/{section}.json"
        assert report.is_file()
        report.unlink()
        shutil.rmtree(place / name)

    storm(tmp_path, STAGES[stage], spans[stage], check, *FLAGS)


def arrays(params: dict) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]
