"""The benchmark of inference says what its users read from it, for every kind of model."""

import json

import pytest

from megacontext_jax.cli import parse
from megacontext_jax.errors import UserError
from megacontext_jax.infer.bench import Words
from megacontext_jax.infer.load import random_chat
from megacontext_jax.train.plan import model_of
from scripts import infer_bench
from tests.runs import flags

FIELDS = {
    "history",
    "ms_per_token_p50",
    "ms_per_token_p99",
    "ms_per_token_mean",
    "ttft_s",
    "read_tokens_per_s",
    "device_bytes",
}


def test_every_kind_is_timed_and_nothing_on_the_device_grows(capsys):
    pattern = ("--block-size", "8", "--gist-window", "64")  # which the plain model has no use for
    infer_bench.main(
        flags("--histories", "300,900", "--bench-tokens", "64", "--max-seq-len", "256", *pattern)
    )
    out = capsys.readouterr().out
    records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert all(record.keys() >= FIELDS for record in records)
    assert all(0 < record["ms_per_token_p50"] <= record["ms_per_token_p99"] for record in records)
    by_kind: dict[str, list[dict]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)
    assert by_kind.keys() == {"plain", "gist attention", "working context"}
    assert len(by_kind["plain"]) == 1  # at its window
    for kind in ("gist attention", "working context"):
        short, long = by_kind[kind]
        assert (short["history"], long["history"]) == (300, 900)
        assert long["device_bytes"] == pytest.approx(short["device_bytes"], rel=0.01)
        assert long["tree_bytes"] > 2 * short["tree_bytes"]
        assert long["times_plain"] > 0
    assert out.count("the floor of a token") == 3


def test_bad_lengths_are_refused():
    for words, sentence in (
        (("--histories", "4k"), "whole numbers"),
        (("--histories", "0"), "at least 1"),
        (("--bench-tokens", "3"), "at least 64"),
    ):
        with pytest.raises(UserError, match=sentence):
            infer_bench.main(flags(*words))


def test_the_budget_of_conversations_is_the_evaluations_own_and_never_too_small():
    words = ("--mc", "--block-size", "4", "--allocator-recent-tokens", "12", "--mc-horizon", "8")

    def chat(budget: str):
        asked = ("--mc-eval-soft-max-length", budget, "--allocator-soft-max", "2048")
        config = parse(flags(*words, *asked), doc="")
        return random_chat(config, model_of(config), Words(config.tokenizer.vocab_size))

    assert chat("60").focus.budget == 60
    with pytest.raises(UserError, match="A budget of 40 entries does not hold a conversation"):
        chat("40")
