"""The training script on simulated devices and in two processes: the same losses, whatever devices go on."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megacontext_jax.data import rowgroups

ROOT = Path(__file__).parents[2]
N, SAVED = 6, 3  # steps, and the step where the others go on
FLAGS = (
    *("--total-batch-size", "512", "--num-iterations", str(N), "--save-every", str(SAVED)),
    *("--eval-tokens", "1024"),
)
RUN = "artifacts/megacontext_base_d2"


def start(folder: Path, module: str, *flags: str, devices: int = 1) -> subprocess.Popen:
    env = os.environ | {
        "NANOCHAT_BASE_DIR": str(folder / "base"),
        "MEGACONTEXT_ARTIFACTS": str(folder / "artifacts"),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    return subprocess.Popen(
        [sys.executable, "-m", module, "--config", "tests/tiny.yaml", *flags],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    try:
        said, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, said[-3000:]
    assert "Traceback" not in said
    return said


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    found = {r["step"]: r["train/loss_step"] for r in metrics(folder) if "train/loss_step" in r}
    assert list(found) == list(range(N))
    return list(found.values())


def bpb(folder: Path, step: int) -> dict[str, float]:
    (record,) = (r for r in metrics(folder) if r["step"] == step and "val/bpb" in r)
    return {name: value for name, value in record.items() if name.endswith("bpb")}


def assert_close(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert actual[name] == pytest.approx(value, rel=1e-5), name


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """A base folder with a tokenizer, and the flags of every run.

    The text is the built-in one in small row groups: a row group is the least that a process can read.
    """
    folder = tmp_path_factory.mktemp("prepared")
    finish(start(folder, "scripts.prepare_data"))
    (built,) = (folder / "base/builtin").glob("*/pretrain")
    texts = list(rowgroups.iter_texts(rowgroups.list_shards(built)))
    rowgroups.write_shards(texts, folder / "text", docs_per_group=16, docs_per_shard=(len(texts) + 1) // 2)
    flags = ("--data-dir", str(folder / "text"))
    finish(start(folder, "scripts.tok_train", *flags))
    return folder / "base", (*FLAGS, *flags)


@pytest.fixture(scope="module")
def on_eight(prepared, tmp_path_factory) -> Path:
    """The run on eight devices, uninterrupted."""
    folder = tmp_path_factory.mktemp("eight")
    base, flags = prepared
    shutil.copytree(base, folder / "base", symlinks=True)
    flags += ("--eval-every", "-1", "--device-batch-size", "1", "--fsdp-axis", "4")
    said = finish(start(folder, "scripts.base_train", *flags, devices=8))
    assert "data 2 x fsdp 4 x tensor 1" in said
    curve = losses(folder)
    assert curve[-1] < curve[0]
    return folder


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_of_eight_devices_goes_on_with_fewer(prepared, on_eight, tmp_path, devices):
    shutil.copytree(on_eight / "base", tmp_path / "base", symlinks=True)
    shutil.copytree(on_eight / "artifacts", tmp_path / "artifacts", symlinks=True)
    shutil.rmtree(tmp_path / RUN / f"{N:06d}")
    before = losses(tmp_path)
    rows = 8 // devices  # as many at once as on eight: a batch of an evaluation drops its last token
    flags = (*prepared[1], "--eval-every", "-1", "--device-batch-size", str(rows))
    said = finish(start(tmp_path, "scripts.base_train", *flags, devices=devices))
    assert f"Continuing megacontext_base_d2 at step {SAVED} of {N}." in said
    assert (tmp_path / RUN / f"{N:06d}").is_dir()
    after = losses(tmp_path)
    assert after[SAVED:] != before[SAVED:]  # computed again: rounding differs
    np.testing.assert_allclose(after, before, rtol=1e-5)
    assert_close(bpb(tmp_path, N), bpb(on_eight, N))


def test_two_processes_train_evaluate_and_report_as_one(prepared, tmp_path):
    base, flags = prepared
    flags += ("--eval-every", str(SAVED))
    for name in ("one", "two"):
        shutil.copytree(base, tmp_path / name / "base", symlinks=True)
    finish(start(tmp_path / "one", "tests.train.joined_program", *flags, "--device-batch-size", "4"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    flags += ("--device-batch-size", "2")
    together = ("--coordinator", address, "--num-processes", "2", "--process-id")
    two = tmp_path / "two"
    processes = [start(two, "scripts.base_train", *flags, *together, str(i)) for i in range(2)]
    try:
        said = [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert "8 of 64 tokens in 2 micro-batch(es)" in said[0]
    assert "Step" not in said[1]  # process 0 speaks
    one = tmp_path / "one"
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    for step in (0, SAVED, N):
        assert_close(bpb(two, step), bpb(one, step))
    report = json.loads((two / "artifacts/report/base-model-training.json").read_text())
    assert "2 x cpu" in json.dumps(report)
    assert sorted(p.name for p in (two / RUN).glob("0*")) == [f"{SAVED:06d}", f"{N:06d}"]
