"""Gist attention on a Hopper GPU: right, then fast. On a machine without one, what a CPU can tell.

    bash benchmarks/gpu_suite.sh                   everything, inside nine minutes
    python -m benchmarks.gpu_kernels --case NAME   one case in this process; its last line of JSON is the result

Every case runs in a process of its own with a limit (60 s; twice that for a model of depth 12, which takes longest to
compile), and prints what it has before each further step: a kernel that hangs costs one figure. First the kernels
against the float32 reference, two runs bit for bit; where one of these checks hangs, no further case is begun that
runs the same kernels alone. Then, for 2k to 64k tokens (bf16, 10 heads of 128, normal inputs, batch 4 and 1), forward
and forward with backward: cuDNN dense causal attention, cuDNN with a sliding window of equal size, the kernels, and
chunked XLA; a training step and decoding of depth 12, dense and with gist attention; PyTorch's flex_attention
under the same mask where a PyTorch with CUDA is installed; compute-sanitizer's memory and race checkers where they
are. The floor of each row is the products of the pairs that are seen at the peak of the device, or its bytes at the
bandwidth, whichever is longer; beside it stands how many tiles are visited. One JSON file,
benchmarks/results/<gpu>/gist_attention.json (or under $OUT), keeps everything with command, versions and date.

The exit status is 1 if a check did not pass, a case that was begun lacks its figure of gist attention, or no row was
timed.
"""

import argparse
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import gpu_checks, gpu_models, gpu_timing
from benchmarks.gpu_timing import HEAD_DIM, HEADS, LENGTHS, summary

LIMIT = 60  # seconds of a case
MINUTES = 9
LAST_WAIT = 15  # seconds in which a process that is killed should be gone; one stuck in the driver never is
ATTENTION_CHECKS = tuple(f"check_{name}" for name in gpu_checks.PROBLEMS)
CHECKS = (*ATTENTION_CHECKS, "check_decode")
STEPS = ("step_dense", "step_gist", "decode_dense", "decode_gist", "decode_kernel")
RINGS = tuple(f"ring_{batch}" for batch in (1, 16, 64))
SANITIZERS = ("sanitizer_memcheck", "sanitizer_racecheck")
# how many `tuning_configs` there are; to ask them takes Mosaic GPU, which not every machine can import
TUNED = tuple(f"tune_8192_{i}" for i in range(3))
CASES = (
    "versions",
    *CHECKS,
    *(f"time_{T}_4" for T in LENGTHS),
    *STEPS,
    *RINGS,
    "flex_8192",
    *SANITIZERS,
    *(f"time_{T}_1" for T in LENGTHS),
    *TUNED,
)
# what tells nothing where the attention kernels hang
KERNELS_ALONE = (*ATTENTION_CHECKS, *SANITIZERS, *TUNED)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", help=f"one of {', '.join(CASES)}")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin no case that could end later")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a case")
    args = parser.parse_args()
    if args.case:
        for found in steps_of(args.case):
            print(json.dumps(found), flush=True)
        return 0
    gpu = hopper()
    if gpu is None:
        print("This machine has no Hopper GPU (H100, H200): here is what its CPU can tell.\n")
        command = [sys.executable, "-m", "benchmarks.gist_attention"]
        return subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode
    folder = Path(os.environ.get("OUT") or f"benchmarks/results/{gpu.lower().replace(' ', '-')}")
    return drive(gpu, folder, args.minutes, args.limit)


def steps_of(case: str) -> Iterator[dict]:
    """What is known of a case before each of its steps and at its end."""
    kind, *rest = case.split("_")
    if kind == "versions":
        return gpu_checks.versions()
    if kind == "check":
        return gpu_checks.decode_check() if rest == ["decode"] else gpu_checks.check(rest[0])
    if kind == "sanitizer":
        return gpu_checks.sanitizer(rest[0])
    if kind == "time":
        return gpu_timing.timing(*map(int, rest))
    if kind == "ring":
        return gpu_timing.ring(int(rest[0]))
    if kind == "tune":
        return gpu_timing.tuning(*map(int, rest))
    if kind == "flex":
        return gpu_timing.flex(int(rest[0]))
    if kind == "step":
        return gpu_models.training_step(rest[0])
    if kind == "decode":
        return gpu_models.decoding(rest[0])
    raise SystemExit(f"error: there is no case {case!r}; see --help.")


def hopper() -> str | None:
    """Name of the first GPU if it is a Hopper; asked of the driver, so that no memory is taken."""
    name, _, capability = smi("name,compute_cap").rpartition(",")
    return name.strip() if capability.strip().startswith("9.") else None


def smi(fields: str) -> str:
    """What the driver says of the first GPU, or nothing."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""
    return said.splitlines()[0] if said.strip() else ""


# --- All cases ----------------------------------------------------------------------------------------------


def drive(gpu: str, folder: Path, minutes: float, limit: float) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the case under way is ended too
    started, results = time.monotonic(), {}
    path = folder / "gist_attention.json"
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "gpu": gpu,
        "driver": smi("driver_version"),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "shape": f"bfloat16, {HEADS} heads of {HEAD_DIM}, blocks of 32, window 256, 1 middle span, 2 levels",
        "seconds_per_case": limit,
    }
    for case in CASES:
        most = 2 * limit if case in STEPS else limit
        late = time.monotonic() - started > 60 * minutes - most
        why = not_begun(case, results, late)
        results[case] = {"error": why} if why else in_a_process(case, most, folder / "cache")
        print(line(case, results[case]), flush=True)
        path.write_text(
            json.dumps({"benchmark": "gist_attention", **about, "cases": results}, indent=1) + "\n"
        )
    print(f"\n{summary(results)}\n")
    wrong = failures(results)
    for what in wrong:
        print(f"FAILED: {what}")
    print(f"{path}: {sum('error' not in r for r in results.values())} of {len(CASES)} cases")
    return 1 if wrong else 0


def not_begun(case: str, results: dict[str, dict], late: bool) -> str | None:
    """Why a case is not begun, or None: it could end too late, or it runs only kernels that hung in a check."""
    if late:
        return "not begun"
    hung = [c for c in ATTENTION_CHECKS if results.get(c, {}).get("error", "").startswith("not done after")]
    return f"not begun: {hung[0]} hung" if hung and case in KERNELS_ALONE else None


def failures(results: dict[str, dict]) -> list[str]:
    """Why the whole suite did not pass."""
    wrong = [f"{case} did not pass" for case in CHECKS if not results[case].get("passed")]
    wrong += [f"{case} did not pass" for case in SANITIZERS if results[case].get("passed") is False]
    for case, found in results.items():
        if None in own_figures(case, found) and not found.get("error", "").startswith("not begun"):
            wrong.append("; ".join([f"{case} lacks a figure of gist attention", *troubles(found)]))
    if not any("gist" in r.get("both_ms", {}) for case, r in results.items() if case.startswith("time_")):
        wrong.append("no row was timed")
    return wrong


def own_figures(case: str, found: dict) -> list[float | None]:
    """The figures for whose sake a case is run, None for one that it lacks; what only checks or compares has none."""
    kind = case.split("_")[0]
    if kind == "time":
        return [found.get(what, {}).get("gist") for what in ("forward_ms", "both_ms")]
    if kind == "tune":
        return [found.get("forward_ms"), found.get("both_ms")]
    if kind == "ring":
        return [found.get("mosaic_gpu_us")]
    return [found.get("tokens_per_second")] if case in ("step_gist", "decode_gist", "decode_kernel") else []


def troubles(found: dict) -> list[str]:
    """What failed in a case, and what ended it, with its reason."""
    told = [f"{what} failed: {why}" for what, why in found.get("failed", {}).items()]
    if "error" in found:
        told.append(found["error"] + (f" (during {found['under_way']})" if "under_way" in found else ""))
    return told


def in_a_process(case: str, limit: float, cache: Path) -> dict:
    """What the case found, with an "error" if it did not come to its end."""
    # folders of their own depth: programs are shared by the cases, and are no results
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax" / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment |= os.environ | {"JAX_TRACEBACK_FILTERING": "off"}  # the last line is then the error
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--case", case]
    started = time.monotonic()
    # files, not pipes: what a case that is killed has started itself could hold a pipe open
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            command, stdout=out, stderr=complaints, env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            ended = end(process)
        out.seek(0)
        complaints.seek(0)
        found = last_json(out.read())
        said = complaints.read().strip().splitlines()
    if status is None:
        found["error"] = f"not done after {limit:g} s" + ("" if ended else ", and could not be ended")
    elif status or not found:
        found["error"] = (said or [f"status {status}"])[-1][:500]
    return found | {"seconds": round(time.monotonic() - started, 1)}


def end(process: subprocess.Popen) -> bool:
    """Kill a process that still runs, and what it has started; whether it is gone after `LAST_WAIT` at most."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(LAST_WAIT)
        except subprocess.TimeoutExpired:
            return False
    return True


def last_json(text: str) -> dict:
    """The last whole line that is a JSON object; what a killed process was writing is not whole."""
    for row in reversed(text.splitlines()):
        try:
            found = json.loads(row)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def line(case: str, found: dict) -> str:
    """One case for people."""
    facts = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in found.items()
        if name not in ("error", "seconds", "under_way") and not isinstance(value, dict)
    ]
    if case.startswith("time_"):
        facts = [
            f"{what}: " + ", ".join(f"{name} {ms:.3f}" for name, ms in found[f"{what}_ms"].items()) + " ms"
            for what in ("forward", "both")
            if f"{what}_ms" in found
        ]
    return f"{case:<20} " + "; ".join([*facts, *troubles(found)])


if __name__ == "__main__":
    sys.exit(main())
