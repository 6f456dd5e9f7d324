"""Where gists pay: nats lost on every kind of text of the built-in corpus when its history is shown in few entries.

    python -m benchmarks.context_views -i base --config configs/run10_cpu.yaml [--tag TAG] [--context-rows 64]

For each kind fresh held-out documents are packed into rows, as `scripts.base_loss --mc` does with the whole
validation set; views and the horizon are the same. A sliding window of equal budget keeps all that lies near;
gists can only win where something further back is asked for. Takes the flags of the scripts. The last line is JSON.
"""

import json
import random

import jax
import numpy as np

from megacontext_jax import mesh as meshes
from megacontext_jax import runtime
from megacontext_jax.cli import parse, run_main
from megacontext_jax.data.corpus.mixture import PRETRAIN, English, make_document
from megacontext_jax.eval.working_contexts import BASELINES, Probe, views_of
from megacontext_jax.infer.load import load_model

LONGEST = 2000  # tokens of a document
BATCH = 64


def main(argv: list[str]) -> None:
    config = parse(["--mc", *argv], doc=__doc__, show=("eval", "run"))
    runtime.start(config.run)
    mesh = meshes.make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
    model = load_model(config, mesh=mesh)
    views = views_of(config, model.context, lenses=BASELINES)
    result = {}
    for kind in PRETRAIN[-1][1]:
        batches = rows_of(kind, model.tokenizer, model.cfg.sequence_len, config.eval.context_rows)
        metrics = Probe(views, batches, mesh, rows=config.eval.context_rows)(model.params)
        prefix = f"val/delta_nll_h{views.horizon}/"
        result[kind] = {
            name.removeprefix(prefix): round(value, 4)
            for name, value in metrics.items()
            if name.startswith(prefix) and not name.endswith("_p95")
        }
        print(f"{kind:>10}: " + ", ".join(f"{view} {value:+.4f}" for view, value in result[kind].items()))
    print(json.dumps({"benchmark": "context_views", "model": str(model), "budget": views.budget, **result}))


def rows_of(kind: str, tokenizer, tokens: int, rows: int) -> list[dict]:
    """Batches of rows of one kind of text; a document longer than a row is cut at a random place."""
    rng, english = random.Random(f"context_views/{kind}"), English("val", 1)
    found = []
    while len(found) < rows:
        ids: list[int] = []
        while len(ids) < tokens + 1:
            ids += [tokenizer.bos, *tokenizer.encode(make_document(rng, kind, "val", 1.0, english, LONGEST))]
        start = rng.randrange(len(ids) - tokens)
        found.append(ids[start : start + tokens + 1])
    array = np.array(found, np.int32)
    return [
        {"inputs": part[:, :-1], "targets": part[:, 1:]}
        for part in np.array_split(array, max(1, rows // BATCH))
    ]


if __name__ == "__main__":
    run_main(main)
