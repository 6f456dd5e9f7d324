"""Training step and decoding on this machine, beside PyTorch nanochat of the same shape.

    python -m benchmarks.train_decode
    python -m benchmarks.train_decode --torch-module DIR [--torch-python PYTHON]

Depth 4, width 256, 2 heads, 256 tokens, 4 rows, vocabulary 4,096, era classic, Muon with AdamW, float32, two
threads. DIR is a checkout of PyTorch nanochat at its classic generation (e.g. adb5d4a); its Newton-Schulz runs in
float32 too, since bfloat16 on a CPU without such units would not be a fair opponent. Each side runs in its own
process, the sides take turns, medians are compared. The last line is JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

SHAPE = {"sequence_len": 256, "vocab_size": 4096, "n_layer": 4, "n_head": 2, "n_kv_head": 2, "n_embd": 256}
ROWS, STEPS = 4, 20
PROMPT, NEW_TOKENS, BATCHES = 64, 128, (1, 8)


def measure_jax() -> dict:
    import jax
    import numpy as np

    from benchmarks.common import gemm_gflops
    from megacontext_jax import mesh as meshes
    from megacontext_jax.config import StageConfig
    from megacontext_jax.model import decode
    from megacontext_jax.model.arch import GPTConfig
    from megacontext_jax.model.objective import make_objective
    from megacontext_jax.train.optim import make_optimizer
    from megacontext_jax.train.recipes import RECIPES
    from megacontext_jax.train.schedule import schedules
    from megacontext_jax.train.step import init_state, make_train_step

    cfg = GPTConfig(arch="classic", **SHAPE)
    objective = make_objective(cfg, attention_impl="auto", dtype="float32")
    mesh = meshes.make_mesh()
    opts = StageConfig()
    optimizer = make_optimizer(opts, cfg, schedules(opts, RECIPES[opts.optimizer], 1000, first_stage=True))
    state = init_state(mesh, objective.init, optimizer, jax.random.key(0))
    shardings = meshes.state_shardings(mesh, state)
    step = make_train_step(objective.loss, optimizer, shardings, mesh, seed=0)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, ROWS, cfg.sequence_len + 1), np.int32)
    batch = {"inputs": tokens[..., :-1].copy(), "targets": tokens[..., 1:].copy()}
    seconds = []
    for _ in range(STEPS + 3):
        placed = {name: meshes.global_batch(mesh, rows) for name, rows in batch.items()}
        start = time.perf_counter()
        state, metrics = step(state, placed)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    result = {"step_ms": 1e3 * statistics.median(seconds[3:]), "gemm_gflops": gemm_gflops()}

    params = decode.unstack_layers(state.params)
    for batch_size in BATCHES:
        prompt = jax.numpy.asarray(tokens[0, :1, :PROMPT].repeat(batch_size, 0))
        run = greedy_loop(decode.decode_step, cfg)
        prefill = jax.jit(lambda p, ids, lengths, cache: decode.prefill(p, cfg, ids, lengths, cache))
        times = []
        for _ in range(6):
            cache = decode.init_cache(cfg, batch_size, PROMPT + NEW_TOKENS)
            lengths = jax.numpy.full(batch_size, PROMPT)
            logits, cache = jax.block_until_ready(prefill(params, prompt, lengths, cache))
            start = time.perf_counter()
            jax.block_until_ready(run(params, logits, cache))
            times.append(time.perf_counter() - start)
        result[f"decode_b{batch_size}_ms"] = 1e3 * statistics.median(times[1:]) / NEW_TOKENS
    return result


def measure_torch(module: str) -> dict:
    sys.path.insert(0, module)
    import types

    import torch

    torch.set_num_threads(2)
    from nanochat import muon
    from nanochat.gpt import GPT, GPTConfig

    def newton_schulz_fp32(G, steps):
        a, b, c = 3.4445, -4.7750, 2.0315
        X = G.mT if G.size(-2) > G.size(-1) else G
        X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(steps):
            A = X @ X.mT
            X = a * X + (b * A + c * A @ A) @ X
        return X.mT if G.size(-2) > G.size(-1) else X

    muon.zeropower_via_newtonschulz5 = newton_schulz_fp32
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    model.init_weights()
    optimizers = model.setup_optimizers()
    tokens = torch.randint(0, SHAPE["vocab_size"], (ROWS, SHAPE["sequence_len"] + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    seconds = []
    for _ in range(STEPS + 3):
        start = time.perf_counter()
        model(inputs, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    result = {"step_ms": 1e3 * statistics.median(seconds[3:])}

    model.eval()
    head_dim = SHAPE["n_embd"] // SHAPE["n_head"]
    sys.modules.setdefault("nanochat.checkpoint_manager", types.SimpleNamespace(load_model=None))
    from nanochat.engine import KVCache

    for batch_size in BATCHES:
        times = []
        for _ in range(4):
            slots = PROMPT + NEW_TOKENS
            cache = KVCache(batch_size, SHAPE["n_kv_head"], slots, head_dim, SHAPE["n_layer"])
            with torch.inference_mode():
                logits = model(tokens[:1, :PROMPT].repeat(batch_size, 1), kv_cache=cache)[:, -1]
                start = time.perf_counter()
                for _ in range(NEW_TOKENS):
                    ids = logits.argmax(-1, keepdim=True)
                    logits = model(ids, kv_cache=cache)[:, -1]
                times.append(time.perf_counter() - start)
        result[f"decode_b{batch_size}_ms"] = 1e3 * statistics.median(times[1:]) / NEW_TOKENS
    return result


def greedy_loop(decode_step, cfg):
    """Compiled (params, logits, cache) -> NEW_TOKENS greedy tokens per row, the cache donated."""
    import jax
    import jax.numpy as jnp

    from megacontext_jax.infer.sampler import greedy

    def run(params, logits_BV, cache):
        def body(_, carry):
            logits_BV, cache, out_B = carry
            ids_B = greedy(logits_BV)
            logits_BV, cache = decode_step(params, cfg, ids_B, cache)
            return logits_BV, cache, out_B + ids_B

        start = (logits_BV, cache, jnp.zeros(logits_BV.shape[0], jnp.int32))
        return jax.lax.fori_loop(0, NEW_TOKENS, body, start)[2]

    return jax.jit(run, donate_argnums=2)


def spawn(side: str, python: str, module: str) -> dict:
    command = [python, "-m", "benchmarks.train_decode", "--worker", side, "--torch-module", module]
    env = os.environ | {"OMP_NUM_THREADS": "2", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"error: the {side} side failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-module", default="", help="checkout of PyTorch nanochat, classic")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure_jax() if args.worker == "jax" else measure_torch(args.torch_module)))
        return

    rounds = {"jax": [], "torch": []}
    for _ in range(args.rounds):
        rounds["jax"].append(spawn("jax", sys.executable, ""))
        if args.torch_module:
            rounds["torch"].append(spawn("torch", args.torch_python, args.torch_module))
    sides = {
        side: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for side, results in rounds.items()
        if results
    }

    from benchmarks.common import machine
    from megacontext_jax.model.arch import GPTConfig

    cfg = GPTConfig(arch="classic", **SHAPE)
    tokens = ROWS * cfg.sequence_len
    # roofline: the step's FLOPs (model and Newton-Schulz) at this machine's measured matrix product
    n, w = cfg.n_layer, cfg.n_embd
    ns_flops = n * 5 * (4 * 6 * w**3 + 2 * 18 * w**3)
    flops = tokens * cfg.flops_per_token() + ns_flops
    floor_ms = flops / (sides["jax"]["gemm_gflops"] * 1e9) * 1e3
    weight_bytes = 4 * (cfg.num_params()["total"] - cfg.num_params()["wte"])
    print(f"machine   {machine()}")
    print(
        f"roofline  step {flops / 1e9:.1f} GFLOP at {sides['jax']['gemm_gflops']:.0f} GFLOP/s = {floor_ms:.0f} ms;"
    )
    print(f"          decode reads {weight_bytes / 1e6:.1f} MB of weights per step")
    print(f"{'':<8}{'step ms':>10}{'tokens/s':>11}" + "".join(f"{f'decode B{b} ms':>16}" for b in BATCHES))
    for side, r in sides.items():
        cells = "".join(f"{r[f'decode_b{b}_ms']:>16.2f}" for b in BATCHES)
        print(f"{side:<8}{r['step_ms']:>10.1f}{tokens / r['step_ms'] * 1e3:>11,.0f}{cells}")
    record = {
        "benchmark": "train_decode",
        "machine": machine(),
        "shape": SHAPE,
        "rows": ROWS,
        "floor_ms": floor_ms,
    }
    record |= {side: r | {"tokens_per_s": tokens / r["step_ms"] * 1e3} for side, r in sides.items()}
    print(json.dumps(record | {"python": platform.python_version()}))


if __name__ == "__main__":
    main()
