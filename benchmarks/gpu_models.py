"""Cases of the GPU suite that run a model of depth 12. Each yields what it knows before every further step."""

import dataclasses
import statistics
import time
from collections.abc import Iterator

from benchmarks.gpu_timing import milliseconds


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


def training_step(attention: str, rows: int = 8, tokens: int = 4096) -> Iterator[dict]:
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
    peak = hardware.peak_flops(jax.devices()[0].device_kind) or float("nan")
    seconds = []
    yield {"under_way": "the first step, which compiles"}
    for i in range(13):
        started = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)
        if i < 3:  # what is compiled, and what that left to do
            continue
        rate = rows * tokens / statistics.median(seconds[3:])
        yield {
            "tokens_per_second": rate,
            "mfu": rate * objective.flops_per_token / peak,
            "loss": float(metrics["loss"]),
            "steps": len(seconds) - 3,
        }


def decoding(which: str, batch: int = 8, prompt: int = 2048, new_tokens: int = 256) -> Iterator[dict]:
    """Tokens per second of greedy decoding behind a prompt, depth 12: dense, gist, or gist by the decode kernel."""
    import jax
    import jax.numpy as jnp

    from megacontext_jax.infer.load import decoding_model

    objective = objective_of("dense" if which == "dense" else "gist", prompt + new_tokens)
    if which == "kernel":
        objective = dataclasses.replace(objective, decode_implementation="mosaic_gpu")
    decoder, weights = decoding_model(jax.jit(objective.init)(jax.random.key(0)), objective)
    ids = jax.random.randint(jax.random.key(1), (batch, prompt), 0, decoder.vocab_size)
    lengths = jnp.full(batch, prompt, jnp.int32)
    cache = decoder.init_cache(batch, prompt + new_tokens)
    found = {"batch": batch, "prompt": prompt}
    yield found | {"under_way": "the prompt"}
    logits, cache = jax.jit(decoder.prefill)(weights, ids, lengths, cache)

    @jax.jit
    def go_on(weights, logits, cache):
        def one(_, carry):
            return decoder.decode_step(weights, carry[0].argmax(-1), carry[1])

        return jax.lax.fori_loop(0, new_tokens, one, (logits, cache))

    yield found | {"under_way": "decoding"}
    seconds = milliseconds(go_on, weights, logits, cache) / 1e3
    yield found | {"tokens_per_second": batch * new_tokens / seconds}
