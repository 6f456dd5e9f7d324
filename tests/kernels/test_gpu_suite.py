"""The GPU suite where there is no GPU: what it says, and that a case that fails or hangs costs one figure."""

import json
import math
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from benchmarks import gpu_checks, gpu_kernels, gpu_models, gpu_timing
from kernels_pallas import GistSpec
from kernels_pallas.mosaic_gpu.config import refusal
from kernels_pallas.shapes import Problem
from tests.runs import ROOT


def last(steps) -> dict:
    *_, found = steps
    return found


def test_a_machine_without_a_gpu_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_kernels.hopper() is None


def test_another_gpu_is_no_cpu(monkeypatch):
    """Where a GPU is no Hopper, what the CPU can tell is still told by the CPU."""
    asked = {}

    def run(command, env):
        asked.update(env)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(gpu_kernels, "hopper", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_kernels"])
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert gpu_kernels.main() == 3
    assert asked["JAX_PLATFORMS"] == "cpu"
    assert asked["PATH"] == os.environ["PATH"]


def test_every_case_gets_its_row(tmp_path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text(
        "#!/bin/sh\ncase $1 in *name*) echo 'NVIDIA H100 80GB HBM3, 9.0' ;; *) echo 580.1 ;; esac\n"
    )
    driver.chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "OUT": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_kernels", "--minutes", "0", "--limit", "30"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "gist_attention.json").read_text())
    assert "H100" in found["gpu"]
    assert found["driver"] == "580.1"
    assert found["command"].endswith("-m benchmarks.gpu_kernels --minutes 0 --limit 30")
    assert list(found["cases"]) == list(gpu_kernels.CASES)
    for case in gpu_kernels.CASES:
        assert found["cases"][case] == {"error": "not begun"}
        assert f"{case:<20} not begun" in done.stdout
    assert "FAILED: no row was timed" in done.stdout


def test_what_it_runs_on_is_recorded(tmp_path):
    found = gpu_kernels.in_a_process("versions", 100, tmp_path / "cache")
    assert "error" not in found
    assert found["jax"] == jax.__version__
    assert found["device"] == "cpu"


def case_that(body: str, monkeypatch, tmp_path, limit=20.0) -> dict:
    """What the suite keeps of a case whose process runs `body`."""
    script = tmp_path / "case.sh"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return gpu_kernels.in_a_process("time_2048_4", limit, tmp_path / "cache")


def test_what_was_measured_outlives_a_case_that_hangs(monkeypatch, tmp_path):
    """Also where something that the case has started holds on to its output."""
    body = """echo '{"both_ms": {"xla": 2.0}, "under_way": "gist, both"}'; printf '{"both_ms": {"xl'; sleep 60 & sleep 60"""
    started = time.monotonic()
    found = case_that(body, monkeypatch, tmp_path, limit=1.0)
    assert time.monotonic() - started < 30
    assert found["both_ms"] == {"xla": 2.0}
    assert found["error"] == "not done after 1 s"
    assert "not done after 1 s (during gist, both)" in gpu_kernels.line("time_2048_4", found)


def test_a_process_that_cannot_be_killed_does_not_hold_up_the_suite(monkeypatch, tmp_path):
    kill, spared = os.killpg, []
    monkeypatch.setattr(os, "killpg", lambda *x: spared.append(x))
    monkeypatch.setattr(gpu_kernels, "LAST_WAIT", 0.5)
    found = case_that("echo '{}'; exec sleep 20", monkeypatch, tmp_path, limit=0.5)
    kill(*spared[0])
    assert found["error"] == "not done after 0.5 s, and could not be ended"
    assert found["seconds"] < 10


def test_what_was_measured_outlives_a_case_that_fails(monkeypatch, tmp_path):
    found = case_that("echo '{\"both_ms\": {}}'; echo 'RuntimeError: no' >&2; exit 1", monkeypatch, tmp_path)
    assert found["error"] == "RuntimeError: no"
    assert found["both_ms"] == {}
    assert "error" in case_that("exit 0", monkeypatch, tmp_path)  # a case that says nothing has not passed


@pytest.mark.parametrize("runs", [True, False])
def test_what_fails_costs_its_own_figures(monkeypatch, runs):
    """On a CPU there is no cuDNN, chunked XLA runs at every length; our kernels may fail too."""
    from kernels_pallas import api

    if runs:
        monkeypatch.setitem(api.IMPLEMENTATIONS, "mosaic_gpu", api.IMPLEMENTATIONS["xla"])
        monkeypatch.setattr(api, "_mosaic_gpu_refusal", lambda *x: None)
    monkeypatch.setattr(gpu_timing, "HEADS", 1)
    steps = [json.loads(json.dumps(x)) for x in gpu_timing.timing(100, 1)]
    order = [x["under_way"] for x in steps if "under_way" in x]
    names = ("dense", "sliding", "gist", "xla")
    assert order == [f"{name}, {what}" for name in names for what in ("forward", "both")]
    assert all(x["forward_ms"].keys() == {"floor"} for x in steps[:6])
    found, failing = steps[-1], ("dense", "sliding", *(() if runs else ("gist",)))
    assert found["both_ms"].keys() == {"floor", "xla"} | ({"gist"} if runs else set())
    assert found["failed"].keys() == {f"{x}, {y}" for x in failing for y in ("forward", "both")}


def test_floors_are_those_of_the_pairs_that_are_seen(monkeypatch):
    from megacontext_jax.telemetry import hardware

    monkeypatch.setattr(hardware, "peak_flops", lambda kind: 1e12)
    monkeypatch.setattr(gpu_timing, "BANDWIDTH", {"cpu": 1e15})
    problem = Problem(2048, GistSpec(), 2, 3, 3, 128)
    found = gpu_timing.bounds(problem)
    assert found["forward_ms"]["floor"] == pytest.approx(1e3 * 4 * problem.pairs() * 6 * 128 / 1e12)
    assert found["both_ms"]["floor"] == pytest.approx(1e3 * 14 * problem.pairs() * 6 * 128 / 1e12)
    assert found["visited_tiles"] * 128 * 128 > problem.pairs()
    assert found["pair_density"] < found["tile_density"]
    monkeypatch.setattr(gpu_timing, "BANDWIDTH", {"cpu": 1e9})  # where bytes take longer
    assert gpu_timing.bounds(problem)["forward_ms"]["floor"] > 2 * found["forward_ms"]["floor"]


def test_bandwidths_are_found_by_the_name_of_the_device():
    assert gpu_timing.bandwidth("NVIDIA H200") == 4.8e12
    assert gpu_timing.bandwidth("NVIDIA H100 80GB HBM3") == 3.35e12
    assert math.isnan(gpu_timing.bandwidth("cpu"))


@pytest.fixture
def kernel_is_xla(monkeypatch):
    """The decode kernel played by plain attention, on a machine that could run it; gives what was asked of it."""
    from kernels_pallas import api, decode
    from kernels_pallas.mosaic_gpu import decode as kernel

    asked = []

    def attend(q_BKGD, k_BKSD, v_BKSD, seen_BS, scale):
        asked.append(q_BKGD.shape)
        return decode._attend(q_BKGD, k_BKSD, v_BKSD, seen_BS[:, None, None], scale)

    monkeypatch.setattr(api, "_mosaic_gpu_refusal", lambda *x: None)
    monkeypatch.setattr(kernel, "decode_mosaic_gpu", attend)
    return asked


def test_decoding_is_checked(kernel_is_xla):
    found = last(gpu_checks.decode_check(Problem(90, GistSpec(4, 8, 1, 2), 2, 4, 2, 16), 60))
    assert found["passed"]
    assert found["float32"] < 1e-5
    assert found["bfloat16, the kernel"] == found["bfloat16"]
    assert (2, 2, 2, 16) in kernel_is_xla


def test_rings_are_timed(kernel_is_xla, monkeypatch):
    monkeypatch.setattr(gpu_timing, "BANDWIDTH", {"cpu": 1e9})
    *steps, found = gpu_timing.ring(1, steps=2, tokens=2**11)
    assert [x["under_way"] for x in steps] == ["xla", "mosaic_gpu"]
    assert found["xla_us"] > 0
    assert found["mosaic_gpu_us"] > 0
    assert found["floor_us"] == pytest.approx(1e6 * 10 * found["seen"] * 128 * 4 / 1e9)
    assert found["seen"] < found["slots"]
    assert kernel_is_xla


def test_a_kernel_that_cannot_run_costs_its_own_figure():
    found = last(gpu_timing.ring(1, steps=2, tokens=2**11))
    assert found["xla_us"] > 0
    assert "no Hopper GPU" in found["failed"]["mosaic_gpu"]


def test_a_check_passes_only_what_is_close(monkeypatch):
    """The check itself, with the kernels played by the reference, or by something else."""
    from kernels_pallas import api
    from kernels_pallas.reference import gist_attention_reference

    monkeypatch.setattr(api, "_mosaic_gpu_refusal", lambda *x: None)
    monkeypatch.setitem(gpu_checks.PROBLEMS, "tiny", Problem(50, GistSpec(8, 16, 1, 1)))
    monkeypatch.setitem(api.IMPLEMENTATIONS, "mosaic_gpu", gist_attention_reference)
    found = last(gpu_checks.check("tiny"))
    assert found["passed"]
    assert found["two_runs_alike"]

    def off(q, k, v, spec, segment_ids, scale):
        return gist_attention_reference(q, k, v, spec, segment_ids, 1.1 * scale)

    monkeypatch.setitem(api.IMPLEMENTATIONS, "mosaic_gpu", off)
    assert not last(gpu_checks.check("tiny"))["passed"]


def test_every_level_counts_alone():
    """However few rows it has; and what should be zero must be."""
    wanted = (np.ones(10_000), np.ones(3), np.zeros(0), np.zeros(2))
    assert gpu_checks.relative_error(wanted, wanted) == 0
    for place, value, error in ((1, 1.5, 0.5), (3, 1e-9, np.inf), (0, np.nan, np.nan)):
        ours = list(wanted)
        ours[place] = np.full_like(wanted[place], value)
        assert gpu_checks.relative_error(tuple(ours), wanted) == pytest.approx(error, nan_ok=True)


def test_rows_are_packed_differently(monkeypatch):
    """Who takes the documents of one row for those of all does not pass."""
    from kernels_pallas import api
    from kernels_pallas.reference import gist_attention_reference

    problem = gpu_checks.PROBLEMS["packed"]
    ids_BT = np.asarray(gpu_checks.documents())
    assert ids_BT.shape == (problem.batch, problem.tokens)
    begin_T = np.flatnonzero(np.diff(ids_BT).any(axis=0)) + 1
    assert not (begin_T % problem.spec.block**problem.spec.levels).any()

    def one_for_all(q, k, v, spec, segment_ids, scale):
        return gist_attention_reference(q, k, v, spec, segment_ids[:1].repeat(2, axis=0), scale)

    monkeypatch.setattr(api, "_mosaic_gpu_refusal", lambda *x: None)
    monkeypatch.setattr(gpu_checks, "DOCUMENT", 16)
    monkeypatch.setitem(gpu_checks.PROBLEMS, "packed", Problem(64, GistSpec(8, 8, 1, 1), 2))
    for kernel, passes in ((gist_attention_reference, True), (one_for_all, False)):
        monkeypatch.setitem(api.IMPLEMENTATIONS, "mosaic_gpu", kernel)
        assert last(gpu_checks.check("packed"))["passed"] == passes


def test_the_problems_of_the_checks_are_taken():
    assert {x.spec.block for x in gpu_checks.PROBLEMS.values()} == {8, 32, 128}
    for problem in (*gpu_checks.PROBLEMS.values(), gpu_checks.SMALL):
        assert refusal(problem.spec, problem.head_dim, "bfloat16") is None
        assert all(problem.spec.rows(problem.tokens))
    long = gpu_checks.PROBLEMS["heads128"]
    assert long.spec.lower_bounds(long.tokens - 1)[1] > 0  # a token sees rows of the second level


def test_checkers_of_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert last(gpu_checks.sanitizer("memcheck")) == {"skipped": "compute-sanitizer is not installed"}
    tool = tmp_path / "compute-sanitizer"
    said = "echo '========= ERROR SUMMARY: %d errors'; exit %d"
    for errors, status, ran in ((0, 0, True), (2, 9, True), (0, 0, False)):
        tool.write_text(
            "#!/bin/sh\n" + ("echo the small problem ran\n" if ran else "") + said % (errors, status)
        )
        tool.chmod(0o755)
        found = last(gpu_checks.sanitizer("memcheck"))
        assert found["passed"] == (ran and not errors)
        assert found["summary"] == f"ERROR SUMMARY: {errors} errors"


def test_what_fails_the_suite():
    good = {case: {"passed": True} for case in gpu_kernels.CHECKS}
    good |= {"sanitizer_memcheck": {"skipped": "-"}, "sanitizer_racecheck": {"error": "not done after 60 s"}}
    timed = {"forward_ms": {"gist": 0.3}, "both_ms": {"gist": 1.0}}
    good |= {"time_2048_4": timed, "time_4096_4": {"error": "not begun"}, "time_8192_4": timed}
    good |= {"tune_8192_0": {"error": "not begun: check_packed hung"}, "ring_1": {"mosaic_gpu_us": 9.0}}
    good |= {"tune_8192_1": {"forward_ms": 0.3, "both_ms": 1.0}, "step_dense": {"error": "no memory"}}
    good |= {"step_gist": {"tokens_per_second": 1.0, "error": "not done after 120 s"}}
    assert gpu_kernels.failures(good) == []
    for case, instead in (
        ("check_heads64", {"passed": False}),
        ("check_packed", {"error": "not begun"}),
        ("sanitizer_racecheck", {"passed": False}),
        ("time_2048_4", {"both_ms": {"floor": 1.0}, "error": "not done after 60 s"}),
        ("time_2048_4", timed | {"forward_ms": {}, "failed": {"gist, forward": "no"}}),
        ("tune_8192_1", {"forward_ms": 0.3, "error": "not done after 60 s"}),
        ("ring_1", {"xla_us": 9.0, "failed": {"mosaic_gpu": "no"}}),
        ("step_gist", {"error": "no memory"}),
        ("decode_gist", {"batch": 8, "error": "no memory"}),
        ("decode_kernel", {"batch": 8, "error": "no memory"}),
    ):
        (why,) = gpu_kernels.failures(good | {case: instead})
        assert case in why
    hangs = {"xla_us": 9.0, "under_way": "mosaic_gpu", "error": "not done after 60 s"}
    wanted = "ring_1 lacks a figure of gist attention; not done after 60 s (during mosaic_gpu)"
    assert gpu_kernels.failures(good | {"ring_1": hangs}) == [wanted]
    none = {case: {"error": "not begun"} for case in good if case.startswith("time_")}
    assert gpu_kernels.failures(good | none) == ["no row was timed"]


def test_kernels_that_hang_in_a_check_are_not_begun_alone():
    def begun(check: str, error: str) -> set[str]:
        results = {"check_decode": {"error": "not done after 60 s"}, check: {"error": error}}
        return {case for case in gpu_kernels.CASES if gpu_kernels.not_begun(case, results, False) is None}

    assert begun("check_blocks8", "RuntimeError: no") == set(gpu_kernels.CASES)
    left = begun("check_blocks8", "not done after 60 s, and could not be ended")
    assert {case.split("_")[0] for case in left} == {
        "versions",
        "check",
        "time",
        "step",
        "decode",
        "ring",
        "flex",
    }
    assert {case for case in left if case.startswith("check")} == {"check_decode"}
    hung = {"check_heads64": {"error": "not done after 60 s"}}
    assert gpu_kernels.not_begun("tune_8192_0", hung, False) == "not begun: check_heads64 hung"
    assert gpu_kernels.not_begun("versions", {}, True) == "not begun"


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
    step = last(gpu_models.training_step(attention, rows=2, tokens=64))
    assert step["tokens_per_second"] > 0
    assert 0 < step["loss"] < 10
    spoken = last(gpu_models.decoding(attention, batch=2, prompt=32, new_tokens=8))
    assert spoken["tokens_per_second"] > 0


def test_rows_are_readable():
    row = {"floor": 1.0, "gist": 2.0, "dense": 6.0}
    cut_short = {"floor": 1.0, "gist": 2.0}
    shared = {"tile_density": 0.2, "visited_tiles": 77}
    results = {
        "check_packed": {"passed": True},
        "time_8192_4": {"forward_ms": row, "both_ms": cut_short, "failed": {"sliding, both": "no"}} | shared,
        "time_8192_1": {"error": "not begun"},
    }
    head, forward, both = gpu_timing.summary(results).splitlines()
    assert head.split()[3:5] == ["floor", "ms"]
    wanted = "8192 4 forward 1.000 2.000 6.000 - - 3.00 1.67 77 = 20.0 %"
    assert forward.split() == wanted.split()
    wanted = "8192 4 both 1.000 2.000 - - - - - 77 = 20.0 %"
    assert both.split() == wanted.split()
    said = gpu_kernels.line("time_8192_4", results["time_8192_4"])
    assert "forward: floor 1.000, gist 2.000, dense 6.000 ms" in said
    assert "sliding, both failed: no" in said
    said = gpu_kernels.line("ring_16", {"xla_us": 9.0, "failed": {"mosaic_gpu": "no"}})
    assert said.endswith("xla_us 9; mosaic_gpu failed: no")


def test_every_configuration_has_its_case():
    from kernels_pallas.mosaic_gpu.config import tuning_configs

    assert len(tuning_configs(gpu_timing.HEAD_DIM)) == len(gpu_kernels.TUNED)
