"""Gist, dense and sliding attention on the built-in corpus: equal shape, equal tokens, equal seeds.

    python -m scripts.prepare_data --config run10_cpu; python -m scripts.tok_train --config run10_cpu
    python -m benchmarks.corpus_attention [--seeds 42,43] [--kinds dense,gist,sliding] [FLAGS OF base_train]

Every run is the base stage of the CPU recipe (`base_train --config run10_cpu FLAGS`), alone on a core, under the tag
KIND-SEED: what was begun goes on, what is finished is only measured, so that other flags want another
MEGACONTEXT_ARTIFACTS. Flags that mean nothing to a kind of attention are left out of its runs. Width, depth, tokens and
optimiser are alike; a gist run has GistNet and its rows besides, and is dense for its first steps (--mc-raw-share),
which the sliding runs are not. The figures are bits per byte of validation under the run's own attention, and the share of
lookups answered (`megacontext_jax.eval.lookups`): near ones, at most 24 tokens back, and the others by what gists of 4
make of their pair: whether a block's end parts it, and whether its block holds another one too. The last line is JSON.
"""

import argparse
import dataclasses
import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.common import machine
from megacontext_jax.config import DataConfig
from megacontext_jax.context.row_setup import IDLE_FLAGS

KINDS = ("dense", "gist", "sliding")
NEAR, BLOCK = 24, 4
CONFIG = ["--config", "run10_cpu"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", default="42,43")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--measure", metavar="TAG", help="only measure this finished run")
    args, flags = parser.parse_known_args()
    if args.measure:
        print(json.dumps(evaluate(args.measure, flags)))
        return 0
    free, runs, failed = queue.SimpleQueue(), [], 0
    for core in sorted(os.sched_getaffinity(0)):
        free.put(core)

    def one(job):
        core = free.get()
        try:
            return train_and_measure(*job, flags, core)
        finally:
            free.put(core)

    jobs = [(kind, int(seed)) for seed in args.seeds.split(",") for kind in args.kinds.split(",")]
    with ThreadPoolExecutor(free.qsize()) as pool:
        for (kind, seed), done in [(job, pool.submit(one, job)) for job in jobs]:
            try:
                runs.append({"attention": kind, "seed": seed} | done.result())
                print(f"{kind:<8} seed {seed}: {describe(runs[-1])}", flush=True)
            except subprocess.CalledProcessError as error:
                print(f"{kind:<8} seed {seed} failed:\n{error.stdout[-2000:]}", flush=True)
                failed += 1
    print(json.dumps({"machine": machine(), "flags": " ".join(flags), "runs": runs}))
    return 1 if failed else 0


def train_and_measure(kind: str, seed: int, flags: list[str], core: int) -> dict:
    """A run and its figures, in processes on one core; CalledProcessError with what they said."""
    tag, data = f"{kind}-{seed}", [field.name for field in dataclasses.fields(DataConfig)]
    idle = [at.rpartition(".")[2] for at in IDLE_FLAGS[kind]]
    train = ["scripts.base_train", *CONFIG, "--attention", kind, "--seed", str(seed), "--tag", tag]
    train += choose(flags, lambda name: name not in idle)
    measure = ["benchmarks.corpus_attention", "--measure", tag, *choose(flags, lambda name: name in data)]
    for words in (train, measure):
        said = subprocess.run(
            ["taskset", "-c", str(core), sys.executable, "-m", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        ).stdout
    return json.loads(said.splitlines()[-1])


def choose(flags: list[str], wanted: Callable[[str], bool]) -> list[str]:
    """The flags whose name `wanted` takes (`--name=value`, or `--name` and what follows up to the next flag)."""
    taken, take = [], True
    for word in flags:
        if word.startswith("--"):
            take = wanted(word[2:].partition("=")[0].rpartition(".")[2].replace("-", "_"))
        taken += [word] * take
    return taken


def describe(run: dict) -> str:
    shares = (f"{name} {percent} % of {count}" for name, (percent, count) in run["lookups"].items())
    return f"{run['val_bpb']:.4f} bits per byte; lookups: {', '.join(shares)}"


def evaluate(tag: str, data_flags: list[str]) -> dict:
    """Bits per byte and lookups of a finished run."""
    import jax
    import numpy as np

    from megacontext_jax import mesh as meshes
    from megacontext_jax import runtime
    from megacontext_jax.cli import parse
    from megacontext_jax.context.gist_rows import GistRows
    from megacontext_jax.data import sources
    from megacontext_jax.data.stream import val_batches
    from megacontext_jax.eval.bpb import bits_per_byte, make_bpb_step
    from megacontext_jax.eval.lookups import lookups, world_tokens
    from megacontext_jax.infer.load import load_model
    from megacontext_jax.model.loss import capped_logits

    config = parse([*CONFIG, "-i", "base", "--tag", tag, *data_flags], doc=__doc__)
    runtime.start(config.run)
    model = load_model(config)
    batches = val_batches(
        sources.prepare_text(config).val,
        model.tokenizer,
        config.base.device_batch_size,
        model.cfg.sequence_len,
        max_tokens=config.eval.split_tokens,
        packing=config.data.packing,
    )
    mesh = meshes.make_mesh()
    step = make_bpb_step(model.objective.nll, model.tokenizer.token_bytes(), mesh)
    found = {"val_bpb": round(bits_per_byte(step, model.params, batches, mesh), 4)}

    @jax.jit
    def guesses(params, ids_BT):
        hidden = model.objective.hidden(params, ids_BT)
        x_BTC = hidden[0] if isinstance(model.objective, GistRows) else hidden
        cfg = model.cfg
        return capped_logits(x_BTC, params["lm_head"], cfg.logit_cap, cfg.vocab_size).argmax(-1)

    words, rows = world_tokens(model.tokenizer), []
    for batch in batches:
        guess_BT = np.asarray(guesses(model.params, batch["inputs"]))
        for ids_T, targets_T, guess_T in zip(batch["inputs"], batch["targets"], guess_BT, strict=True):
            at, *about = lookups(ids_T, targets_T, words, BLOCK)
            rows.append([guess_T[at] == targets_T[at], *about])
    right, distance, parted, shared = (np.concatenate(x) for x in zip(*rows, strict=True))
    far = distance > NEAR
    kinds = {"near": ~far}
    kinds |= {
        f"{pair}, {company}": far & (parted == (pair == "parted")) & (shared == (company == "shared"))
        for pair in ("whole", "parted")
        for company in ("alone", "shared")
    }
    found["lookups"] = {
        name: [round(100 * float(right[mask].mean()), 1) if mask.any() else None, int(mask.sum())]
        for name, mask in kinds.items()
    }
    return found


if __name__ == "__main__":
    sys.exit(main())
