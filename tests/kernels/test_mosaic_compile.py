"""The GPU kernels and whole training steps compile for Hopper on this machine, and the compiler has no complaint."""

import json
import platform
import subprocess
import sys

import pytest

from benchmarks.kernel_report import KERNELS, WHEELS, Program, growth_allowed, report, wrong
from tests.runs import ROOT


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="the GPU compiler is not made for it",
)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("what", ["--step", pytest.param("--tiers", marks=pytest.mark.slow)])
def test_kernels_compile_for_hopper_without_spills(what):
    assert (WHEELS / "jax_plugins").is_dir(), (
        f"the GPU compiler is not in {WHEELS}; `bash run_tests.sh` puts it there"
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_report", what], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    programs = {name: set(x) for name, x in found.items() if isinstance(x, dict)}
    assert len(programs) == (13 if what == "--step" else 2)
    for name, kernels in programs.items():
        assert kernels > ({"gist_decode"} if name.startswith("decode") else set(KERNELS))


class Compiled:
    """What is left of a program: its kernels, as the compiler describes them in a folder, and its memory."""

    def __init__(self, folder, kernels: list[tuple[str, int]], temporary: int, arguments: int = 0):
        for i, (name, spilled) in enumerate(kernels):
            said = f"Used 168 registers\n{spilled} bytes spill stores, {spilled} bytes spill loads"
            (folder / f"{name}_{i}.ptx").write_text("wgmma.mma_async cp.async.bulk.tensor")
            (folder / f"{name}_{i}.ptxas").write_text(said)
            (folder / f"{name}_{i}.mlir-passes.log").write_text("dynamic_shared_memory_size %c1024_i32")
        self.temp_size_in_bytes, self.argument_size_in_bytes = temporary, arguments
        self.output_size_in_bytes = self.alias_size_in_bytes = self.generated_code_size_in_bytes = 0

    def memory_analysis(self):
        return self


GOOD = [(name, 0) for name in KERNELS]


@pytest.mark.parametrize(
    ("kernels", "temporary", "fault"),
    [
        (GOOD + GOOD, 1000, None),
        ([("gist_dq", 8), *GOOD], 1000, "gist_dq: 16 bytes spilled"),  # not the last of its name
        ([*GOOD, ("gist_dq", 8)], 1000, "gist_dq: 16 bytes spilled"),
        (GOOD[1:], 1000, "lacks gist_forward"),
        (GOOD, 10**6 + growth_allowed(2, 8192), None),  # tables, and what else grows with T
        (GOOD, 10**6 + growth_allowed(2, 8192) + 1, "a buffer of T^2 numbers"),
        (GOOD, 10**9, "the device has"),
    ],
)
def test_every_kernel_and_the_memory_are_held_to_account(tmp_path, capsys, kernels, temporary, fault):
    programs = [
        Program("short", lambda: Compiled(tmp_path, GOOD, 10**6), 4, 4096),
        Program("long", lambda: Compiled(tmp_path, kernels, temporary, 10**8), 2, 8192, "short", 10**9),
    ]
    assert report(tmp_path, programs) == (fault is not None)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert any(fault in x for x in found["failures"]) if fault else not found["failures"]


def test_a_mask_of_one_byte_per_pair_is_too_much():
    """Of one row, whatever the heads and the width of a number; a gist's rows are no T^2."""
    assert growth_allowed(2, 8192) < 2 * 8192**2 - 4 * 4096**2


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
