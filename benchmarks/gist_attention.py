"""Gist attention against dense causal attention, forward and backward, on this machine's CPU.

    python -m benchmarks.gist_attention [--tokens 512 1024 2048 4096 8192] [--heads 2] [--head-dim 64]

float32, batch 1, normal inputs, the default pattern (blocks of 32, window 256, two levels). Implementations take
turns, medians are compared: dense causal attention as the models use it on CPUs (`blocked`), that of jax.nn, and
gist attention of token and gist rows (`xla`). The floor of each is its products alone at the rate of a large matrix
product: 4 FLOPs per pair and channel forward, 10 backward. The last line is JSON.
"""

import argparse
import json
import statistics
import time

import jax

from benchmarks.common import gemm_gflops, machine
from kernels_pallas import GistSpec, gist_attention
from kernels_pallas.shapes import Problem
from megacontext_jax.model.attention import blocked_attention

LONGEST = 65_536  # tokens, of which only the memory is looked at


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    spec, rate = GistSpec(), gemm_gflops()
    print(f"{machine()}; matrix products: {rate:.0f} GFLOP/s; {args.heads} heads of {args.head_dim}, {spec}")
    result = {}
    for tokens in args.tokens:
        result[tokens] = measure(
            Problem(tokens, spec, 1, args.heads, args.heads, args.head_dim), args.rounds, rate
        )
        r = result[tokens]
        print(
            f"{tokens:>7} tokens: blocked {r['blocked_ms']:8.1f} ms, jax.nn {r['jax_nn_ms']:8.1f} ms, gist "
            f"{r['gist_ms']:7.1f} ms = {r['blocked_ms'] / r['gist_ms']:4.1f} x faster than blocked; "
            f"floors {r['dense_floor_ms']:.1f} and {r['gist_floor_ms']:.1f} ms"
        )
    memory = temporary_bytes(Problem(LONGEST, spec, 1, 1, 1, args.head_dim))
    print(
        f"{LONGEST:>7} tokens, 1 head: {memory / 2**20:.0f} MB beside arguments and results, forward and backward"
    )
    first = next((n for n, r in result.items() if r["gist_ms"] < r["blocked_ms"]), None)
    print(
        f"gist attention is the faster one from {first} tokens on"
        if first
        else "gist attention is never faster"
    )
    print(
        json.dumps(
            {
                "benchmark": "gist_attention",
                "machine": machine(),
                "gemm_gflops": round(rate, 1),
                "temporary_bytes_65536": memory,
                **result,
            }
        )
    )


def measure(problem: Problem, rounds: int, rate: float) -> dict:
    q, k, v, _ = problem.arrays()
    dense = (q[0], k[0], v[0])
    programs = {
        "blocked": (blocked_attention, dense),
        "jax_nn": (lambda *x: jax.nn.dot_product_attention(*x, is_causal=True), dense),
        "gist": (lambda *x: gist_attention(*x, spec=problem.spec), (q, k, v)),
    }
    compiled = {name: (grads(fn), arrays) for name, (fn, arrays) in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, (fn, arrays) in compiled.items():
            started = time.perf_counter()
            jax.block_until_ready(fn(*arrays))
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - started)
    T = problem.tokens
    flops_per_pair = 14 * problem.heads * problem.head_dim
    floors = {"dense": T * (T + 1) / 2, "gist": problem.pairs()}
    return {f"{name}_ms": round(1e3 * statistics.median(times), 2) for name, times in seconds.items()} | {
        f"{name}_floor_ms": round(count * flops_per_pair / rate / 1e6, 2) for name, count in floors.items()
    }


def temporary_bytes(problem: Problem) -> int:
    """What the compiled forward and backward pass holds."""
    q, k, v, _ = jax.eval_shape(problem.arrays)
    compiled = grads(lambda *x: gist_attention(*x, spec=problem.spec)).lower(q, k, v).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def grads(fn):
    return jax.jit(
        jax.grad(lambda *x: sum((o * o).sum() for o in jax.tree.leaves(fn(*x))), argnums=(0, 1, 2))
    )


if __name__ == "__main__":
    main()
