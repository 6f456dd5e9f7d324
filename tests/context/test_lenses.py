"""The lenses that score a working context, and the context that a lens leaves."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.context.allocator import AllocatorConfig
from megacontext_jax.context.focus import focus
from megacontext_jax.context.layout import Layout, last_tokens, raw_layout, starts, violations
from megacontext_jax.context.lenses import LENSES, View
from megacontext_jax.context.looks import attention_mass
from megacontext_jax.model.attention import reference_attention
from megacontext_jax.model.gpt import qkv, token_entries
from tests.context.test_objective import K, T, jit, objective_of, params_of

B, W = 3, 20
FACTS = [(1, 5), (2, 26), (0, 13)]  # (row, token) that an answer needs
RAW_BLOCKS = [[2], [0, 1], []]  # of the first six blocks, those shown raw; the other ones are gists


def layout_of(row: int) -> list[tuple[int, int]]:
    """(level, node) of the entries: four gists as one where they can, then raw tokens; row 0 ends four earlier."""
    shown = [(0, n) if b in RAW_BLOCKS[row] else (1, b) for b in range(6) for n in range(K * b, K * b + K)]
    shown = [(2, 0) if row == 2 and node < 4 and level else (level, node) for level, node in shown]
    return list(dict.fromkeys([*shown, *((0, n) for n in range(24, T if row else T - 4))]))


def mixed_layout() -> Layout:
    level_BW, node_BW = np.zeros((B, W), np.int32), np.zeros((B, W), np.int32)
    valid_BW = np.zeros((B, W), bool)
    for b in range(B):
        entries = layout_of(b)
        level_BW[b, : len(entries)], node_BW[b, : len(entries)] = zip(*entries, strict=True)
        valid_BW[b, : len(entries)] = True
    return Layout(level_BW, node_BW, valid_BW)


LAYOUT = mixed_layout()


@pytest.fixture(scope="module")
def objective():
    return objective_of(layers=1)


@pytest.fixture(scope="module")
def params(objective):
    params = params_of(objective)
    out = params["lensnet"]["scorer"]["out"]
    out |= {"weight": out["weight"] / 10, "bias": np.zeros(1, np.float32)}  # away from -1 and 1
    return params


@pytest.fixture(scope="module")
def ids_BT():
    """The words of the last tokens stand in block 3 of row 0, and nowhere else before."""
    ids = np.random.default_rng(0).integers(0, 40, (B, T), np.int32)
    ids[:, -16:] = np.arange(40, 56)
    ids[0, 12:15] = [40, 47, 55]
    return ids


@pytest.fixture(scope="module")
def scores(objective, params, ids_BT):
    """Scores of every lens: of the batch, and of its first row alone, without places that it does not fill."""
    fact_BT = np.zeros((B, T), bool)
    fact_BT[tuple(np.transpose(FACTS))] = True
    layout = LAYOUT

    def all_lenses(params, rows: slice, places: int):
        tables = tuple(x[rows] for x in objective.tables(params, ids_BT))
        some = Layout(*(x[rows, :places] for x in layout))
        view = View(objective, params, tables, ids_BT[rows], some, jax.random.key(1), fact_BT[rows])
        return {name: lens(view) for name, lens in LENSES.items()}

    @jit
    def run(params):
        return all_lenses(params, slice(None), W), all_lenses(params, slice(1), len(layout_of(0)))

    return jax.device_get(run(params))


@pytest.mark.parametrize("lens", LENSES)
def test_scores_have_the_shape_of_the_context_and_lie_in_range(scores, lens):
    score_BW, valid_BW = scores[0][lens], LAYOUT.valid_BW
    assert score_BW.shape == (B, W)
    assert (np.abs(score_BW) <= 1).all()
    assert not valid_BW.all()
    assert (score_BW[~valid_BW] == 0).all()
    assert (np.std(score_BW, axis=1) > 0.01).all() == (lens != "none")


@pytest.mark.parametrize("lens", sorted(LENSES.keys() - {"random"}))
def test_a_score_does_not_depend_on_the_other_rows_or_on_empty_places(scores, lens):
    whole, alone = scores
    np.testing.assert_allclose(alone[lens], whole[lens][:1, : len(layout_of(0))], atol=1e-5)


def test_the_oracle_expands_what_covers_a_fact(scores):
    layout = LAYOUT
    begin, end = (np.asarray(x) for x in (starts(layout, K), last_tokens(layout, K)))
    fact_B1 = np.array([[token] for _, token in sorted(FACTS)])
    covers_BW = (begin <= fact_B1) & (fact_B1 <= end) & layout.valid_BW
    assert (covers_BW.sum(1) == 1).all()
    np.testing.assert_array_equal(scores[0]["oracle"], np.where(covers_BW, 1.0, -1.0) * layout.valid_BW)


def test_lexical_prefers_the_block_with_the_words_asked_for(scores):
    score_W, layout = scores[0]["lexical"][0], LAYOUT
    node_W = np.where(layout.level_BW[0] == 1, layout.node_BW[0], -1)
    by_block = {block: score_W[node_W == block].item() for block in (0, 1, 3)}  # those before the words asked
    assert max(by_block, key=by_block.get) == 3
    assert by_block[0] < 0
    assert by_block[1] < 0
    assert by_block[3] > by_block[0] + 0.5


def test_attention_mass_is_the_models_attention(objective, params, ids_BT):
    """One-hot values make the output of the plain attention the attention itself."""
    cfg, queries, hidden = objective.cfg, 5, 3

    @jit
    def both(params):
        tables, raw = objective.tables(params, ids_BT), raw_layout(B, T)
        _, mass_BT = objective.hidden(params, tables, ids_BT, raw, attention_mass(raw, queries, hidden))
        x_BTC, rope, *_ = token_entries(params, cfg, ids_BT, jnp.float32)
        q, k, _ = qkv({name: w[0] for name, w in params["h"].items()}, cfg, x_BTC, rope)
        one_hot = jnp.broadcast_to(jnp.eye(T)[:, None], (B, T, cfg.n_kv_head, T))
        return mass_BT, reference_attention(q, k, one_hot), objective.look(params, tables, ids_BT, LAYOUT)

    mass_BT, attention_BTHS, (x_BWC, mass_BW) = jax.device_get(both(params))
    expected_BT = attention_BTHS[:, -queries - hidden : -hidden].mean((1, 2))
    np.testing.assert_allclose(mass_BT, expected_BT, atol=1e-5)
    assert (mass_BT[:, -hidden:] == 0).all()
    assert x_BWC.shape == (B, W, cfg.n_embd)
    assert (mass_BW >= 0).all()
    assert (mass_BW[~LAYOUT.valid_BW] == 0).all()
    np.testing.assert_allclose(mass_BW.sum(1), 1, rtol=1e-5)


def test_layers_are_summed_and_watching_changes_nothing(ids_BT):
    objective = objective_of(layers=2)
    params = params_of(objective)

    @jit
    def run(params):
        tables = objective.tables(params, ids_BT)
        x_BWC, mass_BW = objective.look(params, tables, ids_BT, LAYOUT)
        return x_BWC, mass_BW, objective.hidden(params, tables, ids_BT, LAYOUT)

    x_BWC, mass_BW, plain_BWC = run(params)
    np.testing.assert_allclose(x_BWC, plain_BWC, atol=1e-6)
    np.testing.assert_allclose(mass_BW.sum(1), 2, rtol=1e-5)


def test_a_new_lensnet_is_the_attention_lens(objective, ids_BT):
    """It starts from the strongest lens that needs no training."""

    @jit
    def run(params):
        view = View(objective, params, objective.tables(params, ids_BT), ids_BT, LAYOUT, jax.random.key(0))
        return LENSES["learned"](view), LENSES["attention"](view)

    learned_BW, attention_BW = run(objective.init(jax.random.key(0)))
    np.testing.assert_allclose(learned_BW, attention_BW, atol=1e-6)
    assert np.std(attention_BW) > 0.1


@pytest.mark.parametrize(("budget", "lenses"), [(12, ("learned",)), (17, ("random", "oracle", "none"))])
def test_focus_keeps_the_budget_and_covers_every_token(objective, params, ids_BT, budget, lenses):
    cfg = AllocatorConfig(block=K, max_level=2, recent=8, cooldown=0)
    fact_BT = np.zeros((B, T), bool)
    fact_BT[:, 13] = True

    @jit
    def run(params):
        tables = objective.tables(params, ids_BT)
        options = {"budget": budget, "iterations": 3, "spare": 0.5, "fact_RT": fact_BT}
        return {lens: focus(objective, params, tables, ids_BT, cfg, lens=lens, **options) for lens in lenses}

    for lens, found in jax.device_get(run(params)).items():
        broken = violations(found.layout, block=K, tokens=T, budget=budget, recent=8, max_level=2)
        assert not any(np.any(x) for x in broken.values()), (lens, broken)
        begin, end = (np.asarray(x) for x in (starts(found.layout, K), last_tokens(found.layout, K)))
        for b in range(B):
            tokens = [
                range(begin[b, w], end[b, w] + 1)
                for w in range(begin.shape[1])
                if found.layout.valid_BW[b, w]
            ]
            assert [t for span in tokens for t in span] == list(range(T))
        edits = found.stats.expands_B + found.stats.collapses_B
        fact = (begin == 13) & (end == 13) & found.layout.valid_BW
        if lens == "none":
            assert (edits == 0).all()
        if lens == "oracle":
            assert (edits > 0).all()
            assert fact.any(1).all()  # raw at last


def test_further_than_a_row_of_training_looks_as_far_as_its_end(objective, params):
    """A lens knows no greater distances; within a row they matter."""
    far_context = replace(objective.context, positions="rank")
    objective = replace(objective, context=far_context)
    x_1WC = jax.random.normal(jax.random.key(0), (1, 8, objective.cfg.n_embd))

    def scores(gap: int):
        node_1W = np.concatenate([np.arange(4), gap + np.arange(4)])[None]
        layout = Layout(np.zeros((1, 8), np.int32), node_1W, np.ones((1, 8), bool))
        return jit(objective.entry_scores)(params, x_1WC, layout, None)[0]

    np.testing.assert_array_equal(scores(3 * T), scores(100 * T))
    assert np.abs(scores(10) - scores(3 * T)).max() > 1e-4
