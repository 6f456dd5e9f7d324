"""A trained model is asked for ledgers in its own text."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.cli import parse
from megacontext_jax.errors import UserError
from megacontext_jax.eval.longcontext import ledgers
from megacontext_jax.eval.working_contexts import BASELINES, views_of
from megacontext_jax.infer.load import LoadedModel, random_model
from megacontext_jax.train.plan import model_of
from scripts import long_context_eval
from tests.infer import mocks

TOK = mocks.tokenizer()
T, H = 1024, 64  # a token is a byte here


def test_rows_ask_for_the_values_of_a_ledger():
    rows, chance = ledgers.make_rows(TOK, T, 4, H, seed=0)
    assert rows["inputs"].shape == rows["targets"].shape == (4, T)
    assert 1 / 24 < chance < 0.3
    for ids, targets in zip(rows["inputs"], rows["targets"], strict=True):
        asked = np.flatnonzero(targets >= 0)
        assert 0 < len(asked) < H
        assert asked.min() >= T - H
        inside = asked[asked < T - 1]
        np.testing.assert_array_equal(targets[inside], ids[inside + 1])
        text = TOK.decode(ids.tolist())
        statement = text[text.rindex("Ledger:") : text.rindex(" Again:")]
        answer = text[text.rindex(" Again:") : -1]
        assert all(pair in statement for pair in answer.removeprefix(" Again: ").split("; ")[:-1])
    again, _ = ledgers.make_rows(TOK, T, 4, H, seed=0)
    np.testing.assert_array_equal(rows["inputs"], again["inputs"])


def test_accuracy_is_that_of_the_answers(monkeypatch):
    monkeypatch.setattr(ledgers, "QUESTIONS", 8)
    monkeypatch.setattr(ledgers, "ROWS", 4)
    rows, _ = ledgers.make_rows(TOK, T, 8, H, seed=0)
    V = TOK.vocab_size
    cfg = SimpleNamespace(sequence_len=T, logit_cap=15.0, vocab_size=V)

    def knows(row_targets):
        """The right answer in some of the rows, which it knows by heart."""

        def hidden(params, ids_BT):
            same = (ids_BT[:, None] == jnp.asarray(rows["inputs"])).all(-1)
            return jax.nn.one_hot(jnp.asarray(row_targets)[same.argmax(-1)], V)

        objective = SimpleNamespace(hidden=hidden)
        return LoadedModel(objective, {"lm_head": jnp.eye(V)}, TOK, Path("mock"), 0)

    monkeypatch.setattr(LoadedModel, "cfg", cfg)
    all_right = ledgers.evaluate(knows(rows["targets"]), None, H, seed=0)
    assert all_right["full"] == 1.0
    half = np.where(np.arange(8)[:, None] < 4, rows["targets"], 7)
    share = (rows["targets"][:4] >= 0).sum() / (rows["targets"] >= 0).sum()
    assert ledgers.evaluate(knows(half), None, H, seed=0)["full"] == pytest.approx(share)


def test_every_view_is_asked(monkeypatch):
    monkeypatch.setattr(ledgers, "QUESTIONS", 2)
    monkeypatch.setattr(ledgers, "ROWS", 2)
    flags = ["--mc", "--depth", "1", "--aspect-ratio", "32", "--max-seq-len", str(T), "--block-size", "8"]
    flags += ["--vocab-size", str(TOK.vocab_size), "--mc-horizon", str(H), "--allocator-recent-tokens", "64"]
    config = parse(flags, doc="")
    model = random_model(config, model_of(config), TOK)
    found = ledgers.evaluate(model, views_of(config, model.context, lenses=BASELINES), H, seed=0)
    lenses = {f"gist_lens_{lens}" for lens in BASELINES}
    assert found.keys() == {"full", "sliding", "gist", "chance"} | lenses
    assert all(0 <= value < 0.5 for value in found.values())  # random weights


def test_what_cannot_be_asked_is_refused():
    config = parse(["--depth", "1", "--aspect-ratio", "32", "--max-seq-len", "200"], doc="")
    model = random_model(config, model_of(config), TOK)
    with pytest.raises(UserError, match=r"takes \d+ tokens with this tokenizer and a row has 200"):
        ledgers.evaluate(model, None, H, seed=0)
    with pytest.raises(UserError, match="do not hold a ledger twice"):
        ledgers.evaluate(model, None, 200, seed=0)
    with pytest.raises(UserError, match="--tasks are for the suite's own models"):
        long_context_eval.main(["-i", "base", "--tasks", "mqar_4x"])
