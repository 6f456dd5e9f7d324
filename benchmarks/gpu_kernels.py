"""Gist attention on a Hopper GPU: right, then fast. On a machine without one, what a CPU can tell.

    bash benchmarks/gpu_suite.sh                   everything, inside nine minutes
    python -m benchmarks.gpu_kernels --case NAME   one case in this process, its JSON on the last line

Every case runs in a process of its own with a limit of 60 s, so that a kernel that hangs costs one row. First the
kernels against the float32 reference, two runs bit for bit; then, for 2k to 64k tokens (bf16, 10 heads of 128,
normal inputs, batch 4 and 1), forward and forward with backward beside cuDNN dense causal attention, cuDNN with a
sliding window of equal size and chunked XLA; a training step of depth 12, dense and with gist attention; PyTorch's
flex_attention under the same mask where a PyTorch with CUDA is installed. The floor of each row is its products over
the visited tiles at the peak of the device, or its bytes at the bandwidth, whichever is longer. One JSON file
benchmarks/results/<gpu>/gist_attention.json (or under $OUT) keeps everything with command, versions and date.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 60  # seconds of a case
MINUTES = 9
HEADS, HEAD_DIM = 10, 128
LENGTHS = (2048, 4096, 8192, 32_768, 65_536)
XLA_UP_TO = 8192  # tokens: beyond, chunked XLA alone would use up a case's time
VARIANTS = (  # of the kernels' configuration: other tiles, shorter lists of visits, no schedule
    {"key_tile": 64, "forward_stages": 4, "dq_stages": 3},
    {"longest": 32},
    {"ping_pong": False},
)
CHECKS = ("check_128", "check_64", "check_packed")
STEPS = ("step_dense", "step_gist", "decode_dense", "decode_gist")
BANDWIDTH = {"h100": 3.35e12, "h200": 4.8e12}  # bytes/s, from the data sheets of the SXM boards


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", help=f"one of {', '.join(CHECKS + STEPS)}, flex_T, tune_T_VARIANT, time_T_BATCH"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin no case after these")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case)))
        return 0
    gpu = hopper()
    if gpu is None:
        print("This machine has no Hopper GPU (H100, H200): here is what its CPU can tell.\n")
        return subprocess.run([sys.executable, "-m", "benchmarks.gist_attention"]).returncode
    return drive(gpu, args.minutes)


def hopper() -> str | None:
    """Name of the first GPU if it is a Hopper; asked of the driver, so that no memory is taken."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    name, _, capability = said.stdout.splitlines()[0].rpartition(",") if said.stdout.strip() else ("", "", "")
    return name.strip() if capability.strip().startswith("9.") else None


# --- All cases ----------------------------------------------------------------------------------------------


def drive(gpu: str, minutes: float) -> int:
    started, results = time.monotonic(), {}
    path = (
        Path(os.environ.get("OUT", f"benchmarks/results/{gpu.lower().replace(' ', '-')}"))
        / "gist_attention.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = [
        *CHECKS,
        *(f"time_{T}_4" for T in LENGTHS),
        *STEPS,
        "flex_8192",
        *(f"tune_8192_{i}" for i in range(len(VARIANTS))),
        *(f"time_{T}_1" for T in LENGTHS),
    ]
    about = {
        "gpu": gpu,
        "command": "bash benchmarks/gpu_suite.sh",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "shape": f"bfloat16, {HEADS} heads of {HEAD_DIM}, blocks of 32, window 256, 1 middle span, 2 levels",
    }
    failed = False
    for case in cases:
        if time.monotonic() - started > 60 * minutes - LIMIT:
            results[case] = {"error": "not begun: the time was up"}
            continue
        results[case] = in_a_process(case)
        failed |= case in CHECKS and ("error" in results[case] or not results[case]["passed"])
        print(line(case, results[case]), flush=True)
        path.write_text(
            json.dumps({"benchmark": "gist_attention", **about, "cases": results}, indent=1) + "\n"
        )
    print(f"{path}: {sum('error' not in r for r in results.values())} of {len(cases)} cases")
    return 1 if failed else 0


def in_a_process(case: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--case", case]
    try:
        environment = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}  # the last line is then the error
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {LIMIT} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:500]}
    return json.loads(done.stdout.splitlines()[-1])


def line(case: str, found: dict) -> str:
    if "error" in found:
        return f"{case:<16} {found['error']}"
    if not case.startswith("time"):
        return f"{case:<16} " + ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()
        )
    parts = []
    for what in ("forward", "both"):
        row = found[what]
        rivals = ", ".join(
            f"{name} {row[name]:.3f}" for name in ("dense", "sliding", "xla") if row.get(name) is not None
        )
        parts.append(
            f"{what}: floor {row['floor']:.3f} ms, gist {row['gist']:.3f}, {rivals}; {row['dense'] / row['gist']:.2f} x dense, "
            f"{row['gist'] / row['dense'] / found['tile_density']:.2f} of dense x tile density"
        )
    return f"{case:<16} " + "\n                 ".join(parts)


# --- One case -----------------------------------------------------------------------------------------------


def run_case(name: str) -> dict:
    kind, *numbers = name.split("_")
    if kind == "check":
        return check(numbers[0])
    if kind == "time":
        return timing(*map(int, numbers))
    if kind == "step":
        return training_step(numbers[0])
    if kind == "decode":
        return decoding(numbers[0])
    if kind == "tune":
        return tuning(*map(int, numbers))
    if kind == "flex":
        return flex(int(numbers[0]))
    raise SystemExit(f"error: there is no case {name!r}; see --help.")


def check(which: str) -> dict:
    """Relative errors of outputs and gradients against the float32 reference; whether two runs agree in every bit."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kernels_pallas import GistSpec, gist_attention
    from kernels_pallas.shapes import Problem

    spec, segment_ids = GistSpec(), None
    problem = Problem(1500, spec, 2, 4, 2, 64 if which == "64" else 128)
    if which == "packed":
        problem = Problem(4096, spec, 2, 4, 2, 128)
        segment_ids = jnp.repeat(jnp.arange(4), 1024)[None].repeat(2, axis=0)

    def run(implementation, arrays):
        def attend(q, k, v):
            return gist_attention(q, k, v, spec=spec, segment_ids=segment_ids, implementation=implementation)

        def both(q, k, v, do):
            out, pull = jax.vjp(attend, q, k, v)
            return out, *pull(do)

        return jax.jit(both)(*arrays)

    arrays = problem.arrays(dtype=jnp.bfloat16)
    found, again = (run("mosaic_gpu", arrays) for _ in range(2))
    with jax.default_matmul_precision("highest"):
        wanted = run("reference", jax.tree.map(lambda x: x.astype(jnp.float32), arrays))
    errors = {}
    for what, ours, theirs in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        a, b = (np.concatenate([np.asarray(x, np.float32).ravel() for x in y]) for y in (ours, theirs))
        errors[what] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    alike = all(
        bool((a == b).all()) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True)
    )
    return errors | {"two_runs_alike": alike, "passed": alike and all(e < 1e-2 for e in errors.values())}


def timing(T: int, batch: int) -> dict:
    """Milliseconds of every implementation, and the floor of gist attention."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas import GistSpec, gist_attention
    from kernels_pallas.mosaic_gpu.config import default_config
    from kernels_pallas.mosaic_gpu.tiles import Stream, density
    from kernels_pallas.shapes import Problem
    from megacontext_jax.telemetry import hardware

    spec = GistSpec()
    problem = Problem(T, spec, batch, HEADS, HEADS, HEAD_DIM)
    q, k, v, do = problem.arrays(dtype=jnp.bfloat16)

    def gist(implementation):
        return lambda q, k, v: gist_attention(q, k, v, spec=spec, implementation=implementation)

    def dense(window):
        def attend(q, k, v):
            local = None if window is None else (window, 0)
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, local_window_size=local, implementation="cudnn"
            )

        return attend

    tokens = q[0], k[0], v[0], do[0]
    programs = {"gist": (gist("mosaic_gpu"), (q, k, v, do)), "dense": (dense(None), tokens)}
    programs["sliding"] = dense(spec.window), tokens
    if T <= XLA_UP_TO:
        programs["xla"] = gist("xla"), (q, k, v, do)
    device = jax.devices()[0].device_kind.lower()
    peak = hardware.peak_flops(device) or float("nan")
    bandwidth = next((rate for name, rate in BANDWIDTH.items() if name in device), float("nan"))
    config = default_config(HEAD_DIM)
    share = density(Stream(spec, T, 128), 128, config.key_tile)
    visited = share * T * (T + 1) / 2  # pairs of the visited tiles
    rows = sum(spec.rows(T)) * batch * HEADS * HEAD_DIM * 2  # bytes of one array
    floors = {
        "forward": max(4 * visited * batch * HEADS * HEAD_DIM / peak, 4 * rows / bandwidth),
        "both": max(14 * visited * batch * HEADS * HEAD_DIM / peak, 12 * rows / bandwidth),
    }
    found = {what: {"floor": 1e3 * floor} for what, floor in floors.items()}
    for name, (fn, arrays) in programs.items():

        def both(q, k, v, do, fn=fn):
            out, pull = jax.vjp(fn, q, k, v)
            return out, *pull(do)

        found["forward"][name] = milliseconds(jax.jit(fn), *arrays[:3])
        found["both"][name] = milliseconds(jax.jit(both), *arrays)
    return found | {
        "tile_density": share,
        "pair_density": problem.pairs() / (T * (T + 1) / 2),
        "device": device,
        "jax": jax.__version__,
        "config": str(config),
    }


def tuning(T: int, variant: int) -> dict:
    """Milliseconds of gist attention in another configuration, to hold against the row of `time_T_4`."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from kernels_pallas import GistSpec
    from kernels_pallas.mosaic_gpu import gist_attention_mosaic_gpu
    from kernels_pallas.mosaic_gpu.config import default_config
    from kernels_pallas.shapes import Problem

    config = dataclasses.replace(default_config(HEAD_DIM), **VARIANTS[variant])
    problem = Problem(T, GistSpec(), 4, HEADS, HEADS, HEAD_DIM)

    def attend(q, k, v):
        return gist_attention_mosaic_gpu(q, k, v, problem.spec, None, HEAD_DIM**-0.5, config)

    def both(q, k, v, do):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(do)

    arrays = problem.arrays(dtype=jnp.bfloat16)
    return {
        "forward": milliseconds(jax.jit(attend), *arrays[:3]),
        "both": milliseconds(jax.jit(both), *arrays),
        "config": str(config),
    }


def milliseconds(fn, *arrays, rounds: int = 9) -> float:
    """Median over rounds of several calls in a row, so that their launches overlap with what runs."""
    import jax

    def once(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            out = fn(*arrays)
        jax.block_until_ready(out)
        return (time.perf_counter() - started) / calls

    once(1)  # compiles
    calls = max(1, min(50, int(0.1 / max(once(2), 1e-6))))
    return 1e3 * statistics.median(once(calls) for _ in range(rounds))


def objective_of(attention: str, tokens: int, mesh=None):
    """A model of depth 12 in bfloat16."""
    from megacontext_jax.config import Config
    from megacontext_jax.context.gist_rows import GistRows
    from megacontext_jax.context.setup import gist_config
    from megacontext_jax.model.arch import config_for_depth
    from megacontext_jax.model.objective import make_objective

    cfg = config_for_depth(12, sequence_len=tokens, vocab_size=65_536, attention=attention)
    base = make_objective(cfg, attention_impl="auto", dtype="bfloat16", remat="dots", mesh=mesh)
    return base if attention == "dense" else GistRows(base, gist_config(Config().mc, cfg))


def training_step(attention: str, rows: int = 8, tokens: int = 4096) -> dict:
    """Tokens per second and MFU of a training step of depth 12."""
    import jax
    import numpy as np

    from megacontext_jax import mesh as meshes
    from megacontext_jax.config import Config
    from megacontext_jax.telemetry import hardware
    from megacontext_jax.train.optim import make_optimizer
    from megacontext_jax.train.recipes import RECIPES
    from megacontext_jax.train.schedule import schedules
    from megacontext_jax.train.step import init_state, make_train_step

    opts = Config().base
    mesh = meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    objective = objective_of(attention, tokens, mesh)
    schedule = schedules(opts, RECIPES[opts.optimizer], 100, first_stage=True)
    optimizer = make_optimizer(
        opts, objective.cfg, schedule, ns_dtype=jax.numpy.bfloat16, context=attention == "gist"
    )
    state = init_state(mesh, objective.init, optimizer, jax.random.key(0))
    step = make_train_step(objective.loss, optimizer, meshes.state_shardings(mesh, state), mesh, seed=0)
    ids = np.random.default_rng(0).integers(0, objective.cfg.vocab_size, (1, rows, tokens + 1), np.int32)
    batch = {"inputs": ids[..., :-1].copy(), "targets": ids[..., 1:].copy()}
    batch = {name: meshes.global_batch(mesh, x) for name, x in batch.items()}
    seconds = []
    for _ in range(13):
        started = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)
    rate = rows * tokens / statistics.median(seconds[3:])
    peak = hardware.peak_flops(jax.devices()[0].device_kind) or float("nan")
    return {
        "tokens_per_second": rate,
        "mfu": rate * objective.flops_per_token / peak,
        "loss": float(metrics["loss"]),
    }


def decoding(attention: str, batch: int = 8, prompt: int = 2048, new_tokens: int = 256) -> dict:
    """Tokens per second of greedy decoding behind a prompt, depth 12."""
    import jax
    import jax.numpy as jnp

    from megacontext_jax.infer.load import decoding_model

    objective = objective_of(attention, prompt + new_tokens)
    decoder, weights = decoding_model(jax.jit(objective.init)(jax.random.key(0)), objective)
    ids = jax.random.randint(jax.random.key(1), (batch, prompt), 0, decoder.vocab_size)
    lengths = jnp.full(batch, prompt, jnp.int32)
    cache = decoder.init_cache(batch, prompt + new_tokens)
    logits, cache = jax.jit(decoder.prefill)(weights, ids, lengths, cache)

    @jax.jit
    def go_on(weights, logits, cache):
        def one(_, carry):
            return decoder.decode_step(weights, carry[0].argmax(-1), carry[1])

        return jax.lax.fori_loop(0, new_tokens, one, (logits, cache))

    seconds = milliseconds(go_on, weights, logits, cache, rounds=5) / 1e3
    return {"tokens_per_second": batch * new_tokens / seconds, "batch": batch, "prompt": prompt}


def flex(T: int) -> dict:
    """PyTorch's flex_attention under the mask of the same pattern, forward and forward with backward."""
    try:
        import torch
    except ModuleNotFoundError:
        return {"error": "no PyTorch here"}
    if not torch.cuda.is_available():
        return {"error": "this PyTorch has no CUDA"}
    import numpy as np
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from kernels_pallas import GistSpec
    from kernels_pallas.mosaic_gpu.tiles import Keys, Stream

    stream = Stream(GistSpec(), T, 128)
    keys = Keys(stream.rows, 128)
    ranges = torch.as_tensor(stream.ranges()).cuda()  # [levels, 2, rows]
    counts = [keys.tiles(m) * keys.tile for m in range(len(keys.rows))]
    level = torch.as_tensor(np.repeat(np.arange(len(counts)), counts)).cuda()
    row = torch.as_tensor(np.concatenate([np.arange(n) for n in counts])).cuda()
    R, S = stream.length, sum(counts)

    def seen(b, h, q, k):
        return (row[k] >= ranges[level[k], 0, q]) & (row[k] < ranges[level[k], 1, q])

    mask = create_block_mask(seen, None, None, R, S, device="cuda")
    attend = torch.compile(flex_attention)
    arrays = [
        torch.randn(4, HEADS, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (R, S, S)
    ]
    do = torch.randn_like(arrays[0])

    def forward():
        return attend(*arrays, block_mask=mask)

    def both():
        out = forward()
        torch.autograd.grad(out, arrays, do)

    def measure(fn) -> float:
        for _ in range(3):
            fn()
        times = []
        for _ in range(9):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(5):
                fn()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - started) / 5)
        return 1e3 * statistics.median(times)

    return {"forward": measure(forward), "both": measure(both), "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(main())
