"""What --mc costs: the training step beside the vanilla one, and what in it is neither model nor network.

    python -m benchmarks.context_step [--block 32] [--seq-len 512]

Depth 4, width 256, 2 heads, 8 rows, vocabulary 4,096, era classic, float32; working contexts of a quarter of the
row, N = 1, 2, 4 of them per row. Three programs take turns, medians are compared:

* vanilla: loss and gradients of the raw rows;
* bare: what --mc cannot do without, on arrays that are given: raw rows, GistNet over the blocks, the model over the
  contexts' entries, LensNet over them, with all gradients;
* mc: the loss and gradients of training. What it takes beyond `bare` is the controller: drawing layouts, gathering
  entries and labels, positions, pairs, statistics.

The floor is the vanilla time multiplied by the ratio of the FLOPs. The last line is JSON.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import gemm_gflops
from megacontext_jax.config import MegaContextConfig
from megacontext_jax.context import gistnet, lensnet, setup
from megacontext_jax.context.layout import compress, last_tokens
from megacontext_jax.context.objective import ContextObjective
from megacontext_jax.context.positions import entry_rope
from megacontext_jax.model import gpt, loss
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import make_objective

ROWS, ROUNDS = 8, 9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--variants", type=int, nargs="*", default=[1, 2, 4])
    args = parser.parse_args()
    T = args.seq_len
    cfg = GPTConfig(sequence_len=T, vocab_size=4096, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)
    base = make_objective(cfg, attention_impl="auto", dtype="float32")
    opts = MegaContextConfig(block_size=args.block)
    context = setup.context_config(opts, cfg)
    width = setup.final_width(opts, context, T)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocab_size, (ROWS, T + 1), np.int32)
    batch = {"inputs": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}
    rate = gemm_gflops()
    print(
        f"matrix products: {rate:.0f} GFLOP/s; {T} tokens, blocks of {args.block}, {width} entries per context"
    )
    result = {"gemm_gflops": rate, "seq_len": T, "block": args.block, "width": width}
    for N in args.variants:
        mix = replace(setup.mixture(opts, T), variants=N)
        objective = ContextObjective(base, context, mix, width)
        result[f"n{N}"] = measure(base, objective, batch)
        r = result[f"n{N}"]
        print(
            f"N = {N}: vanilla {r['vanilla_ms']:.0f} ms, mc {r['mc_ms']:.0f} ms = {r['time_ratio']:.2f} x, FLOPs "
            f"{r['flops_ratio']:.2f} x: {r['time_ratio'] / r['flops_ratio']:.2f} of the floor; controller "
            f"{r['controller_ms']:.0f} ms = {100 * r['controller_share']:.0f} %"
        )
    print(
        json.dumps(
            {"benchmark": "context_step", "machine": platform.processor() or platform.machine(), **result}
        )
    )


def measure(base, objective: ContextObjective, batch: dict) -> dict:
    params = objective.init(jax.random.key(0))
    arrays = bare_inputs(objective, params, batch)

    def grads(fn):
        return jax.jit(jax.value_and_grad(fn, has_aux=True))

    key = jax.random.key(1)
    programs = {
        "vanilla": (grads(lambda p: base.loss(p, batch, None)), base.init(jax.random.key(0))),
        "bare": (grads(lambda p: bare_loss(objective, p, batch, arrays)), params),
        "mc": (grads(lambda p: objective.loss(p, batch, key)), params),
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(ROUNDS + 1):
        for name, (program, inputs) in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program(inputs))
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - started)
    ms = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    flops = objective.flops_per_token / base.flops_per_token
    controller = ms["mc"] - ms["bare"]
    return {f"{name}_ms": value for name, value in ms.items()} | {
        "time_ratio": ms["mc"] / ms["vanilla"],
        "flops_ratio": flops,
        "controller_ms": controller,
        "controller_share": controller / ms["mc"],
    }


def bare_inputs(objective: ContextObjective, params, batch) -> dict:
    """What the controller would hand on, made beforehand."""
    ctx, mix, (B, T) = objective.context, objective.mixture, batch["inputs"].shape
    options = {"block": ctx.block, "levels": ctx.levels, "recent": mix.recent}
    layout = compress(jax.random.key(1), B * mix.variants, T, objective.width, **options).layout
    labels = jnp.take_along_axis(
        batch["targets"], last_tokens(layout, ctx.block).reshape(B, -1), axis=1
    ).reshape(layout.level_BW.shape)
    blocks = [B * (T // ctx.block**level) for level in range(1, ctx.levels + 1)]
    C = objective.cfg.n_embd
    return {
        "layout": layout,
        "labels": labels,
        "rope": entry_rope(objective.cfg, layout, ctx.block, ctx.positions, jnp.float32),
        "entries": jax.random.normal(jax.random.key(2), (*layout.level_BW.shape, C)),
        "blocks": [jax.random.normal(jax.random.key(3), (n, ctx.block, C)) for n in blocks if n],
    }


def bare_loss(objective: ContextObjective, params, batch, arrays):
    base = objective.base
    raw, (weight, _) = base.loss(params, batch, None)
    total = raw
    for x_NKC in arrays["blocks"]:
        total += gistnet.encode(params["gistnet"], objective.context.gist, x_NKC).sum()
    entries = gpt.Entries(gpt.rms_norm(arrays["entries"]), arrays["rope"], {})
    x_RWC = base.trunk(params, entries)
    weights_RW = (arrays["layout"].level_BW == 0).astype(jnp.float32)
    total += base.nats(loss.weighted_nll, params, x_RWC, arrays["labels"], weights_RW)[0]
    if objective.mixture.lens_weight and objective.mixture.variants > 1:
        ctx = objective.context
        mass_RW = jnp.ones(arrays["labels"].shape)
        scores_RW = lensnet.lens_scores(
            params["lensnet"], ctx.lens, arrays["entries"], arrays["layout"], mass_BW=mass_RW
        )
        total += scores_RW.sum()
    return total, (weight, {})


if __name__ == "__main__":
    main()
