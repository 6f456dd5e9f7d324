"""The GPU kernels and a whole training step compile for Hopper on this machine, and the compiler has no complaint."""

import json
import platform
import subprocess
import sys

import pytest

from benchmarks.kernel_report import KERNELS, WHEELS, wrong
from tests.runs import ROOT


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="the GPU compiler is not made for it",
)
@pytest.mark.timeout(900)
def test_kernels_compile_for_hopper_without_spills():
    assert (WHEELS / "jax_plugins").is_dir(), (
        f"the GPU compiler is not in {WHEELS}; `bash run_tests.sh` puts it there"
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_report", "--step"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    programs = [x for x in found.values() if isinstance(x, dict)]
    assert len(programs) == 4
    assert all(set(KERNELS) < set(x) for x in programs)


def test_the_gate_is_closed_to_what_is_wrong():
    good = {"registers": 168, "spilled": 0, "shared_memory": 200_000, "wgmma": 32, "tma": 9, "mma_sync": 0}
    good["serialized"] = 0
    assert wrong(good) == []
    for change in (
        {"spilled": 8},
        {"serialized": 1},
        {"wgmma": 0},
        {"mma_sync": 4},
        {"tma": 0},
        {"shared_memory": 240_000},
    ):
        assert len(wrong(good | change)) == 1
