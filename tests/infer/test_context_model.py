"""Decoding from a working context against the training forward pass on the same layout."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.context.allocator import AllocatorConfig
from megacontext_jax.context.layout import append_raw, violations
from megacontext_jax.infer.context_model import ContextDecoder, context_model
from megacontext_jax.infer.model import GPTDecoder
from megacontext_jax.model.loss import capped_logits
from tests.context.test_objective import K, T, jit, objective_of, params_of

RECENT, NEW = 2, 4  # raw tokens at the end of a prompt; tokens that follow it
LENGTHS = np.array([28, 26, 15, 7], np.int32)  # of the prompts; the last fits every budget raw


def decoder_of(objective, budget: int, lens: str = "learned", iterations: int = 1) -> ContextDecoder:
    """Its lens edits wherever it can."""
    allocator = AllocatorConfig(
        block=K, max_level=2, recent=RECENT, expand_threshold=-1.0, collapse_threshold=-1.0, hysteresis=-2.0
    )
    inner = GPTDecoder(objective.cfg, objective.base.attention.fn)
    return ContextDecoder(inner, objective, allocator, budget, lens, iterations)


def answers(decoder, params, ids_BT):
    """Logits [B, NEW + 1, V] after the prompts and after each of the tokens that follow."""
    B = len(LENGTHS)
    logits_BV, cache = decoder.prefill(params, ids_BT, LENGTHS, decoder.init_cache(B, T + NEW))

    def step(cache, i):
        logits_BV, cache = decoder.decode_step(params, ids_BT[jnp.arange(B), LENGTHS + i], cache)
        return cache, logits_BV

    _, more_nBV = jax.lax.scan(step, cache, jnp.arange(NEW))
    return jnp.concatenate([logits_BV[None], more_nBV]).swapaxes(0, 1)


@pytest.fixture(
    scope="module",
    params=[("pocket", 13, "gaussian"), ("era3", 8, "gaussian"), ("pocket", 13, "rank")],
    ids=["pocket", "era3", "rank"],
)
def decoded(request):
    """The layouts of the prompts, and the logits of both decoders and of the training pass."""
    arch, budget, positions = request.param
    objective = objective_of(arch)
    objective = replace(objective, context=replace(objective.context, positions=positions))
    decoder, params = decoder_of(objective, budget), params_of(objective)
    ids_BT = jnp.asarray(np.random.default_rng(1).integers(0, 60, (len(LENGTHS), T), np.int32))

    @jit
    def run(params):
        model = context_model(params, decoder)
        tables = objective.tables(params, ids_BT)
        layout = decoder.layout(params, tables, ids_BT, LENGTHS)
        # the training pass: the tokens that follow are raw
        whole = append_raw(layout, LENGTHS[:, None], NEW)
        x_BWC = objective.hidden(params, tables, ids_BT, whole)
        at_Bn = layout.count_B[:, None] - 1 + jnp.arange(NEW + 1)
        x_BnC = jnp.take_along_axis(x_BWC, at_Bn[..., None], axis=1)
        cfg = objective.cfg
        return (
            layout,
            answers(decoder, model.params, ids_BT),
            capped_logits(x_BnC, params["lm_head"], cfg.logit_cap, cfg.vocab_size),
            answers(decoder.inner, model.params["decode"], ids_BT),
        )

    return budget, *jax.device_get(run(params))


def test_logits_are_those_of_the_training_pass(decoded):
    *_, ours, trained, _ = decoded
    assert np.abs(trained).max() > 0.5
    np.testing.assert_allclose(ours, trained, atol=1e-4)


def test_a_prompt_within_the_budget_gets_the_vanilla_answer(decoded):
    *_, ours, _, vanilla = decoded
    np.testing.assert_array_equal(ours[-1], vanilla[-1])
    assert (np.abs(ours - vanilla).max((1, 2))[:-1] > 0.01).all()  # the others are in gists


def test_the_budget_holds_and_is_used(decoded):
    budget, layout, *_ = decoded
    broken = violations(layout, block=K, tokens=LENGTHS, budget=budget, recent=RECENT, max_level=2)
    assert not any(x.any() for x in broken.values()), broken
    count_B = layout.valid_BW.sum(-1)
    assert (count_B[:-1] > budget - K).all()  # not smaller than it has to be
    assert (layout.level_BW.max(-1)[:-1] > 0).all()
    assert count_B[-1] == LENGTHS[-1]
    assert (layout.level_BW[-1] == 0).all()
    assert layout.level_BW.max() == (2 if budget == 8 else 1)


def test_a_lens_chooses_what_stays_raw():
    objective = objective_of(layers=1)
    ids_BT = np.random.default_rng(1).integers(0, 60, (4, T), np.int32)

    @jit
    def layouts(params):
        tables = objective.tables(params, ids_BT)
        return [
            decoder_of(objective, 13, lens, n).layout(params, tables, ids_BT, LENGTHS)
            for lens, n in (("random", 0), ("random", 1))
        ]

    seed, refocused = jax.device_get(layouts(params_of(objective)))
    assert seed.level_BW[0].tolist()[:6] == [2, 0, 0, 0, 0, 0]  # the oldest first
    assert (seed.level_BW[:2] != refocused.level_BW[:2]).any()
    np.testing.assert_array_equal(seed.valid_BW.sum(-1)[3], refocused.valid_BW.sum(-1)[3])
