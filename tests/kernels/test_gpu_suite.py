"""The GPU suite where there is no GPU: what it says, and that a case that fails costs one row."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu_kernels
from tests.runs import ROOT


def test_a_machine_without_a_gpu_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_kernels.hopper() is None


def test_every_case_gets_its_row(tmp_path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0'\n")
    driver.chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "OUT": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_kernels", "--minutes", "1.01"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "gist_attention.json").read_text())
    assert "H100" in found["gpu"]
    assert "no Hopper GPU" in found["cases"]["check_128"]["error"]
    assert "0 of" in done.stdout


@pytest.mark.parametrize("attention", ["dense", "gist"])
def test_steps_and_decoding_run(monkeypatch, attention):
    """The same functions on a model that a CPU can hold."""
    from megacontext_jax.model import arch

    real = arch.config_for_depth
    monkeypatch.setattr(
        arch,
        "config_for_depth",
        lambda depth, **fields: real(1, head_dim=16, aspect_ratio=32, **(fields | {"vocab_size": 256})),
    )
    step = gpu_kernels.training_step(attention, rows=2, tokens=64)
    assert step["tokens_per_second"] > 0
    assert 0 < step["loss"] < 10
    spoken = gpu_kernels.decoding(attention, batch=2, prompt=32, new_tokens=8)
    assert spoken["tokens_per_second"] > 0


def test_rows_are_readable():
    row = {"floor": 1.0, "gist": 2.0, "dense": 6.0, "sliding": 1.5}
    said = gpu_kernels.line("time_8192_4", {"forward": row, "both": row, "tile_density": 0.2})
    assert "3.00 x dense" in said
    assert "1.67 of dense x tile density" in said
    assert "after 60 s" in gpu_kernels.line("time_8192_4", {"error": "not done after 60 s"})


def test_the_configurations_that_are_timed_fit():
    from dataclasses import replace

    from kernels_pallas.mosaic_gpu.config import SHARED_MEMORY, default_config, largest

    head_dim = gpu_kernels.HEAD_DIM
    for variant in gpu_kernels.VARIANTS:
        assert largest(replace(default_config(head_dim), **variant), head_dim, 3) <= SHARED_MEMORY
