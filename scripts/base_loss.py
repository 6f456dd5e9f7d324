"""Bits per byte of a trained model on training, validation and further held-out text.

python -m scripts.base_loss -i base
python -m scripts.base_loss -i base -g d12 -s 1000 --split-tokens 1000000
python -m scripts.base_loss -i base --mc      also what working contexts cost, under every lens
"""

from functools import partial

import jax

from megacontext_jax import mesh as meshes
from megacontext_jax import runtime
from megacontext_jax.cli import parse, run_main
from megacontext_jax.data import sources
from megacontext_jax.data.stream import val_batches
from megacontext_jax.eval.bpb import bits_per_byte, make_bpb_step
from megacontext_jax.eval.working_contexts import BASELINES, Probe, views_of
from megacontext_jax.infer.load import load_model
from megacontext_jax.telemetry import report


def main(argv: list[str]) -> None:
    config = parse(argv, doc=__doc__, show=("eval", "run", "data"))
    runtime.start(config.run)
    mesh = meshes.make_mesh(config.run.data_axis, config.run.fsdp_axis, config.run.tensor_axis)
    model = load_model(config, mesh=mesh)
    text = sources.prepare_text(config)
    rows = config.base.device_batch_size * meshes.batch_shards(mesh) // jax.process_count()
    here = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    splits = {"train": text.train, "val": text.val, **text.held_out}
    step = make_bpb_step(model.objective.nll, model.tokenizer.token_bytes(), mesh)
    facts = {"model": str(model)}
    for name, paths in splits.items():
        options = {"max_tokens": config.eval.split_tokens, "packing": config.data.packing} | here
        batches = partial(val_batches, **options)
        bpb = bits_per_byte(
            step, model.params, batches(paths, model.tokenizer, rows, model.cfg.sequence_len), mesh
        )
        facts[f"{name} bpb"] = bpb
        runtime.print0(f"{name:<8} bits per byte: {bpb:.6f}")
        if model.context is not None and name != "train":
            facts |= working_contexts(
                config, model, mesh, name, batches(paths, model.tokenizer, rows, model.cfg.sequence_len)
            )
    if jax.process_index() == 0:
        report.write_section("base-model-loss", "Base model loss", facts)


def working_contexts(config, model, mesh, name: str, batches) -> dict:
    """Differences in nats over the next H tokens under every view of the history, printed and as facts."""
    probe = Probe(
        views_of(config, model.context, lenses=BASELINES),
        batches,
        mesh,
        rows=config.eval.context_rows,
    )
    metrics = probe(model.params)
    runtime.print0(f"{name:<8} {probe.line(metrics)}")
    prefix = f"val/delta_nll_h{config.mc.mc_horizon}/"
    return {
        f"{name} nats above the raw context, {view.removeprefix(prefix)}": value
        for view, value in metrics.items()
        if view.startswith(prefix)
    }


if __name__ == "__main__":
    run_main(main)
