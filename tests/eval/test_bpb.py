"""Bits per byte as PyTorch nanochat counts them, on its own models, loaders and byte counts."""

import json
from itertools import islice

import pytest

from megacontext_jax import mesh as meshes
from megacontext_jax.data.stream import pretrain_stream
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.eval.bpb import bits_per_byte, make_bpb_step
from megacontext_jax.model.objective import make_objective
from tests.model.nanochat_weights import golden_model


@pytest.mark.parametrize(
    ("pipeline", "packing", "legacy"),
    [("pipeline_classic", "concat", True), ("pipeline_head", "best_fit", False)],
)
def test_bits_per_byte_equal_nanochats(golden, pipeline, packing, legacy):
    base = golden / pipeline / "base_dir"
    wanted = json.loads((golden / pipeline / "eval_engine_golden.json").read_text())["bpb_val_B2_T64_steps4"]
    cfg, params, _ = golden_model(base / "base_checkpoints/d2")
    tokenizer = Tokenizer.load(base / "tokenizer")
    held_out = golden / "pipeline_classic/base_dir/base_data/shard_00002.parquet"
    batches = islice(pretrain_stream([held_out], tokenizer, 2, 64, packing=packing), 4)
    mesh = meshes.make_mesh()
    objective = make_objective(cfg, attention_impl="auto", dtype="float32")
    step = make_bpb_step(objective.nll, tokenizer.token_bytes(legacy=legacy), mesh)
    assert bits_per_byte(step, params, batches, mesh) == pytest.approx(wanted, abs=2e-6)
