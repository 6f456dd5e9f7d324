"""What the objective of --mc computes, against the vanilla objective and against plain loops."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.config import MegaContextConfig
from megacontext_jax.context import setup
from megacontext_jax.context.layout import Cut, Layout, compress, raw_layout
from megacontext_jax.context.lens_loss import LensLoss
from megacontext_jax.context.objective import ContextObjective, Mixture
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.loss import reference_nll
from megacontext_jax.model.objective import make_objective
from megacontext_jax.telemetry import names
from tests import quick

T, K, RECENT, HORIZON, WIDTH = 32, 4, 6, 4, 17
MIXTURE = Mixture(recent=RECENT, horizon=HORIZON)


def jit(fn):
    return jax.jit(fn, compiler_options=quick.OPTIONS)


def objective_of(
    arch: str = "pocket", mixture: Mixture = MIXTURE, layers: int = 2, window_pattern: str = "L"
):
    cfg = GPTConfig(arch, T, 60, layers, n_head=2, n_kv_head=2, n_embd=32, window_pattern=window_pattern)
    opts = MegaContextConfig(block_size=K, gistnet_layers=1, lensnet_layers=1)
    base = make_objective(cfg, attention_impl="auto", dtype="float32")
    return ContextObjective(base, setup.context_config(opts, cfg), mixture, WIDTH)


def params_of(objective) -> dict:
    """Random parameters; at the start of training whole parts are zero."""
    rng = np.random.default_rng(0)

    def draw(x):
        scale = 0.3 if x.ndim < 2 else x.shape[-1] ** -0.5
        return (scale * rng.normal(size=x.shape) + (x.ndim < 2)).astype(np.float32)

    return jax.tree.map(draw, jax.eval_shape(objective.init, jax.random.key(0)))


def tokens_of(rows: int, seed: int = 0) -> dict:
    """A batch; some targets are not to be predicted, and one row has none."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 60, (rows, T + 1), np.int32)
    targets = np.where(rng.random((rows, T)) < 0.2, -1, ids[:, 1:])
    targets[-1] = -1
    return {"inputs": ids[:, :-1], "targets": targets}


def draw_of(rows: int) -> Cut:
    """The working contexts that the loss draws under key 0."""
    key = jax.random.fold_in(jax.random.key(0), 0)
    return compress(key, rows, T, WIDTH, block=K, levels=2, recent=RECENT)


def norm(tree) -> float:
    return float(np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(tree))))


@pytest.fixture(scope="module")
def objective():
    return objective_of()


@pytest.fixture(scope="module")
def params(objective):
    return params_of(objective)


@pytest.fixture(scope="module")
def batch():
    return tokens_of(3)


def graded(mixture: Mixture):
    return jit(jax.value_and_grad(objective_of(mixture=mixture).loss, has_aux=True))


@pytest.fixture(scope="module")
def whole(params, batch):
    """((loss, (weight, statistics)), gradients) of two micro-batches with everything on."""
    step = graded(MIXTURE)
    return [step(params, tokens_of(3, seed), jax.random.key(seed)) for seed in (0, 1)]


def test_variants_by_recency_are_the_layout_of_use(params, batch):
    """With a share of 1 every variant has as many entries of each level as the context that is used."""
    by_recency = objective_of(mixture=replace(MIXTURE, recency_share=1.0, lens_weight=0.0))
    _, (_, stats) = jit(by_recency.loss)(params, batch, jax.random.key(0))
    used = compress(
        jax.random.key(9), 1, T, WIDTH, block=K, levels=2, recent=RECENT, oldest_first=True
    ).layout
    wanted_L = [(np.asarray(used.level_BW) == level).sum() for level in range(3)]
    assert (np.asarray(stats["entries_BNL"]) == wanted_L).all()


def test_the_dtype_of_the_small_networks_is_their_own(objective, params):
    """--mc-aux-dtype: gists rounded like bfloat16, kept in the model's dtype; the tokens are not touched."""
    ids_BT = tokens_of(2)["inputs"]
    half = replace(objective, aux_dtype=jnp.dtype(jnp.bfloat16))

    @jit
    def both(params):
        return objective.tables(params, ids_BT), half.tables(params, ids_BT)

    full, rounded = both(params)
    assert all(table.dtype == jnp.float32 for table in rounded)
    np.testing.assert_array_equal(full[0], rounded[0])
    error = np.linalg.norm(full[1] - rounded[1]) / np.linalg.norm(full[1])
    assert 1e-4 < error < 2e-2
    np.testing.assert_array_equal(rounded[1], rounded[1].astype(jnp.bfloat16).astype(jnp.float32))


# --- Raw working contexts are the vanilla model ---------------------------------------------------------


@pytest.mark.parametrize(("arch", "pattern"), [("pocket", "L"), ("era3", "SL"), ("latest", "L")])
def test_raw_tokens_alone_are_the_vanilla_model(arch, pattern):
    objective = objective_of(arch, window_pattern=pattern)
    params, ids_BT = params_of(objective), tokens_of(2)["inputs"]

    @jit
    def both(params):
        tables = objective.tables(params, ids_BT)
        raw = objective.hidden(params, tables[:1], ids_BT, raw_layout(2, T))
        return raw, objective.base.hidden(params, ids_BT)

    raw, vanilla = both(params)
    np.testing.assert_array_equal(raw, vanilla)


def test_the_raw_part_is_the_vanilla_loss(objective, params, batch, whole):
    vanilla, (weight, _) = jit(objective.base.loss)(params, batch, None)
    (_, (ours, stats)), _ = whole[0]
    assert ours == weight == (batch["targets"] >= 0).sum()
    np.testing.assert_allclose(stats["raw_nats"], vanilla, rtol=1e-6)
    assert stats["raw_weight"] == weight


def test_without_variants_the_loss_is_the_vanilla_one(batch):
    alone = objective_of(mixture=replace(MIXTURE, variants=0), layers=1)

    @jit
    def both(params):
        losses = (alone.loss, alone.base.loss)
        return [jax.value_and_grad(loss, has_aux=True)(params, batch, jax.random.key(0)) for loss in losses]

    ((loss, (weight, stats)), grads), ((wanted, (wanted_weight, _)), wanted_grads) = both(params_of(alone))
    assert stats == {}
    assert alone.summarise(stats) == {}
    assert weight == wanted_weight
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# --- Who learns from what -------------------------------------------------------------------------------


def test_every_part_learns(whole):
    _, grads = whole[0]
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_the_lens_learns_from_its_loss_alone_which_bends_nothing_else(objective, params, batch, whole):
    (_, (weight, stats)), grads = whole[0]

    @jit
    @jax.grad
    def push(params):
        tables, cut = objective.tables(params, batch["inputs"]), draw_of(6)
        _, mass_RW = objective.look(params, tables, batch["inputs"], cut.layout)
        return objective.lens(params, tables, cut, mass_RW, stats["delta_BN"], stats["count_BN"] > 0)[0]

    alone = push(params)
    assert norm({name: x for name, x in alone.items() if name != "lensnet"}) == 0
    for ours, theirs in zip(
        jax.tree.leaves(grads["lensnet"]), jax.tree.leaves(alone["lensnet"]), strict=True
    ):
        np.testing.assert_allclose(ours, weight * MIXTURE.lens_weight * theirs, rtol=1e-3, atol=1e-5)


def test_a_frozen_base_does_not_learn_and_gists_do(batch):
    frozen = objective_of(
        mixture=replace(MIXTURE, freeze_base=True, variants=1, regression_weight=0.0), layers=1
    )
    grads, _ = jit(jax.grad(frozen.loss, has_aux=True))(params_of(frozen), batch, jax.random.key(0))
    assert norm(grads["gistnet"]) > 0
    assert norm({name: x for name, x in grads.items() if name != "gistnet"}) == 0


# --- What is predicted ----------------------------------------------------------------------------------


def test_an_entry_knows_nothing_after_the_token_it_predicts(objective, params):
    """Row t of the batch has other tokens after token t + 1, which the entry that ends at t predicts."""
    rng = np.random.default_rng(4)
    ids_T1 = rng.integers(0, 60, T + 1, np.int32)
    later_TT1 = np.arange(T + 1) > np.arange(T)[:, None] + 1
    ids_BT1 = np.concatenate([ids_T1[None], np.where(later_TT1, (ids_T1 + 7) % 60, ids_T1)])
    level_W = np.array([2, 0, 0, 0, 0, 1, *[0] * 8])
    node_W = np.array([0, 16, 17, 18, 19, 5, *range(24, 32)])
    layout = Layout(*(np.repeat(x[None], T + 1, axis=0) for x in (level_W, node_W, level_W >= 0)))
    last_W = np.array([15, 16, 17, 18, 19, 23, *range(24, 32)])

    @jit
    def nats(params):
        inputs_BT, targets_BT = ids_BT1[:, :-1], ids_BT1[:, 1:]
        x_BWC = objective.hidden(params, objective.tables(params, inputs_BT), inputs_BT, layout)
        return reference_nll(x_BWC, params["lm_head"], targets_BT[:, last_W], 15.0, 60)

    nats_BW = np.asarray(nats(params))
    for t in range(T):
        same = np.isclose(nats_BW[1 + t], nats_BW[0], rtol=1e-5, atol=1e-5)
        assert same[last_W <= t].all()
        assert not same[last_W > t].any()  # other labels: the test sees a difference where there is one


def test_labels_and_differences_as_a_loop(objective, params, batch, whole):
    (_, (_, stats)), _ = whole[0]
    B, N = 3, MIXTURE.variants

    @jit
    def hidden(params):
        cut = draw_of(B * N)
        tables = objective.tables(params, batch["inputs"])
        x_RWC = objective.hidden(params, tables, batch["inputs"], cut.layout)
        return x_RWC, objective.base.nll(params, batch), cut.layout

    x_RWC, raw_BT, layout = hidden(params)
    level_RW, node_RW = np.asarray(layout.level_BW), np.asarray(layout.node_BW)
    labels_RW = np.full((B * N, WIDTH), -1, np.int32)
    base_RW, counted_RW = np.zeros((B * N, WIDTH)), np.zeros((B * N, WIDTH), bool)
    for r in range(B * N):
        for w in range(WIDTH):
            tokens = range(node_RW[r, w] * K ** level_RW[r, w], (node_RW[r, w] + 1) * K ** level_RW[r, w])
            labels_RW[r, w] = batch["targets"][r // N, tokens[-1]]
            base_RW[r, w] = raw_BT[r // N, tokens[-1]]
            counted_RW[r, w] = len(tokens) == 1 and labels_RW[r, w] >= 0
    nll_RW = reference_nll(x_RWC, params["lm_head"], labels_RW, 15.0, 60)

    def mean(x_RW):
        sums = (x_RW * counted_RW).sum(1) / np.maximum(counted_RW.sum(1), 1)
        return sums.reshape(B, N)

    tail = np.arange(WIDTH) >= WIDTH - HORIZON
    ahead_R = ((nll_RW - base_RW) * counted_RW * tail).sum(1) / np.maximum((counted_RW * tail).sum(1), 1)
    np.testing.assert_array_equal(stats["count_BN"], counted_RW.sum(1).reshape(B, N))
    np.testing.assert_allclose(stats["loss_BN"], mean(nll_RW), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["delta_BN"], mean(nll_RW - base_RW), atol=1e-5)
    np.testing.assert_allclose(stats["ahead_BN"], ahead_R.reshape(B, N), atol=1e-5)
    assert np.abs(stats["delta_BN"][:-1]).min() > 1e-4
    for level in range(3):
        np.testing.assert_array_equal(
            stats["entries_BNL"][..., level], (level_RW == level).sum(1).reshape(B, N)
        )


def test_the_total_is_the_mean_of_raw_and_compressed_rows_and_the_weighted_rest(whole):
    (loss, (weight, stats)), _ = whole[0]
    variants = (stats["loss_BN"] * stats["count_BN"]).sum() / stats["count_BN"].sum()
    wanted = (stats["raw_nats"] / weight + 2 * variants) / 3
    wanted += MIXTURE.regression_weight * stats["regression"] + MIXTURE.lens_weight * stats["lens_loss"]
    np.testing.assert_allclose(loss, weight * wanted, rtol=1e-5)


# --- Metrics --------------------------------------------------------------------------------------------


def test_metrics_of_two_micro_batches_are_finite_and_have_known_names(objective, whole):
    stats = jax.tree.map(lambda *x: jnp.stack(x), *(stats for (_, (_, stats)), _ in whole))
    found = {name: float(x) for name, x in jit(objective.summarise)(stats).items()}
    assert {name for name in found if not names.is_known(name)} == set()
    assert all(map(np.isfinite, found.values())), found
    count, delta = (np.stack([s["count_BN"] for (_, (_, s)), _ in whole]), np.asarray(stats["delta_BN"]))
    np.testing.assert_allclose(found["mc/adv_delta_mean"], delta[count > 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["mc/adv_delta_p95"], np.quantile(delta[count > 0], 0.95), rtol=1e-5)
    assert found["mc/variants_total"] == 2 * 3 * 2
    assert sum(found[f"mc/lod_count/{level}"] for level in range(3)) == 2 * 3 * 2 * WIDTH
    assert f"mc/delta_nll_h{HORIZON}/ratio_{T / WIDTH:.2g}" in found


@pytest.mark.parametrize(("width", "ratio"), [(WIDTH, "1.9"), (8, "4"), (1, "32")])
def test_the_ratio_is_part_of_a_name(objective, whole, width, ratio):
    stats = jax.tree.map(lambda x: x[None], whole[0][0][1][1])
    found = jax.eval_shape(replace(objective, width=width).summarise, stats)
    assert f"mc/delta_nll_h{HORIZON}/ratio_{ratio}" in found


def test_high_ratios_have_known_names_too(objective, whole):
    stats = jax.tree.map(lambda x: x[None], whole[0][0][1][1])
    long = replace(objective.base, cfg=replace(objective.cfg, sequence_len=2048))
    found = jax.eval_shape(replace(objective, base=long, width=16).summarise, stats)
    assert f"mc/delta_nll_h{HORIZON}/ratio_130" in found
    assert {name for name in found if not names.is_known(name)} == set()


# --- The lens -------------------------------------------------------------------------------------------


def test_both_contexts_of_a_pair_teach_the_lens(objective, monkeypatch):
    """Context 0 shows block 0 raw and block 1 as a gist, context 1 the other way round and predicts far better."""
    blocks, W = 6, 29
    level_NW, node_NW = np.zeros((2, W), np.int32), np.zeros((2, W), np.int32)
    node_NW[0] = [0, 1, 2, 3, 1, *range(8, 32)]
    node_NW[1] = [0, 4, 5, 6, 7, *range(8, 32)]
    level_NW[0, 4] = level_NW[1, 0] = 1
    block_level_NG = np.zeros((2, blocks), np.int32)
    block_level_NG[0, 1] = block_level_NG[1, 0] = 1
    cut = Cut(
        Layout(jnp.asarray(level_NW), jnp.asarray(node_NW), jnp.ones((2, W), bool)),
        jnp.asarray(block_level_NG),
    )
    judge = replace(objective, mixture=replace(MIXTURE, lens=LensLoss(rank_weight=0.0, budget_weight=0.0)))

    @jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(score_NW):
        monkeypatch.setattr(ContextObjective, "scores", lambda *_: score_NW)
        return judge.lens({}, (), cut, jnp.ones((2, W)), jnp.array([[2.0, 0.5]]), jnp.ones((1, 2), bool))

    (_, stats), push_NW = step(jnp.zeros((2, W)))
    push_NW = -np.asarray(push_NW)  # what a step does to the scores
    assert push_NW[0, 4] > 0  # the gist that ought to be open
    assert (push_NW[0, :4] < 0).all()  # the block that ought to be closed
    assert push_NW[1, 0] < 0  # and in the better context both are to stay
    assert (push_NW[1, 1:5] > 0).all()
    assert (push_NW[:, 5:] == 0).all()  # shown alike: nothing to learn
    assert stats["pairs"] == 2


def test_the_lens_does_not_see_the_tokens_it_is_judged_by(objective, params, batch):
    @jit
    def scores(params, ids_BT):
        tables, layout = objective.tables(params, ids_BT), draw_of(3).layout
        _, mass_RW = objective.look(params, tables, ids_BT, layout, 3)
        return objective.scores(params, tables, layout, mass_RW, 3)

    found = scores(params, batch["inputs"])
    other = batch["inputs"].copy()
    other[:, -3:] = (other[:, -3:] + 1) % 60
    np.testing.assert_array_equal(found, scores(params, other))
    other[:, -4] = (other[:, -4] + 1) % 60
    assert (np.abs(found - scores(params, other))[:, :-3].max(1) > 0).all()
    assert (found[:, -3:] == 0).all()
