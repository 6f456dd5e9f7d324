"""A model whose layers carry gist rows: equal to the dense one where all is near, causal, told by its forecasts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.context.forecast import forecast_loss
from megacontext_jax.context.gist_rows import GistRows, gaps, row_rope
from megacontext_jax.context.gistnet import GistConfig
from megacontext_jax.errors import UserError
from megacontext_jax.model import gpt
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import make_objective

T = 64
CFG = GPTConfig(
    arch="pocket",
    sequence_len=T,
    vocab_size=64,
    n_layer=2,
    n_head=2,
    n_kv_head=1,
    n_embd=32,
    attention="gist",
    gist_block=4,
    gist_window=8,
)


def rows_objective(cfg=CFG, places=False, **options) -> GistRows:
    base = make_objective(cfg, attention_impl="auto", dtype="float32")
    blocks = replace(cfg, n_kv_head=cfg.n_head, n_layer=1, attention="dense", window_pattern="L")
    read = {"read_layers": cfg.n_layer, "read_heads": cfg.n_kv_head} if places else {}
    return GistRows(base, GistConfig(blocks, block=cfg.gist_block, **read), **options)


@pytest.fixture(scope="module")
def ids_BT():
    return jax.random.randint(jax.random.key(1), (2, T), 0, CFG.vocab_size)


def batch_of(ids_BT):
    return {"inputs": ids_BT, "targets": jnp.roll(ids_BT, -1, axis=1).at[:, -1].set(-1)}


@pytest.mark.parametrize("arch", ["pocket", "latest"])
def test_a_window_over_everything_is_the_dense_model(arch, ids_BT):
    cfg = replace(CFG, arch=arch, gist_window=T, n_layer=3)
    objective = rows_objective(cfg, places=arch == "pocket")
    params = _moved(objective.init(jax.random.key(0)))
    rows = objective.hidden(params, ids_BT)[0]
    dense = gpt.hidden_states(params, replace(cfg, attention="dense"), ids_BT)
    np.testing.assert_allclose(rows, dense, atol=2e-5)
    near = rows_objective(replace(cfg, gist_window=8)).hidden(params, ids_BT)[0]
    assert jnp.abs(near - dense).max() > 1e-2  # gists are not the tokens


def test_tokens_have_the_phases_of_the_dense_model():
    cos, sin = row_rope(CFG, CFG.gist_spec.rows(T), jnp.float32)
    expected = gpt.rope_table(CFG, jnp.arange(T), jnp.float32)
    np.testing.assert_array_equal(cos[:T], expected[0])
    np.testing.assert_array_equal(sin[:T], expected[1])
    plain = row_rope(replace(CFG, gist_positions="plain"), CFG.gist_spec.rows(T), jnp.float32)
    np.testing.assert_allclose(plain[0][T], jnp.cos(1.5 * gpt.rope_frequencies(CFG)), atol=1e-6)
    assert (cos[T:] ** 2 + sin[T:] ** 2 < 0.999).any()  # spans damp the fast channels


def test_nothing_at_or_before_a_token_depends_on_what_follows(ids_BT):
    objective = rows_objective()
    params = _moved(objective.init(jax.random.key(0)))
    hidden = jax.jit(objective.hidden)
    before = hidden(params, ids_BT)
    for t in (1, 17, 32, 63):
        after = hidden(params, ids_BT.at[:, t].set((ids_BT[:, t] + 1) % CFG.vocab_size))
        for level, (a, b) in enumerate(zip(before, after, strict=True)):
            ended = t // CFG.gist_block**level  # rows whose span ends before token t
            np.testing.assert_array_equal(a[:, :ended], b[:, :ended])
        assert jnp.abs(before[0][:, t] - after[0][:, t]).max() > 0


def test_implementations_agree_on_the_whole_model(ids_BT):
    params = _moved(rows_objective().init(jax.random.key(0)))
    found = {}
    for name in ("xla", "reference"):
        objective = rows_objective(implementation=name)
        found[name] = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))(
            params, batch_of(ids_BT), jax.random.key(0)
        )
    (loss, (weight, stats)), grads = found["xla"]
    np.testing.assert_allclose(loss, found["reference"][0][0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(found["reference"][1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))
    assert weight == 2 * (T - 1)
    metrics = rows_objective().summarise(jax.tree.map(lambda x: x[None], stats))
    assert 0 < metrics["mc/gist_regression_loss"] < 2
    assert set(metrics) == {f"mc/gist_regression_loss{x}" for x in ("", "/level_1", "/level_2")}
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(grads["gistnet"]))


def test_a_direct_forecast_is_a_projection_of_its_own(ids_BT):
    objective = rows_objective()
    objective = replace(objective, gist=replace(objective.gist, forecast="direct"))
    params = _moved(objective.init(jax.random.key(0)))
    grads = jax.grad(lambda params: objective.loss(params, batch_of(ids_BT), jax.random.key(0))[0])(params)
    assert jnp.abs(grads["gistnet"]["forecast"]).max() > 0
    same = params | {"gistnet": params["gistnet"] | {"forecast": jnp.eye(CFG.n_embd)}}
    h_RPC = jax.random.normal(jax.random.key(2), (2, 3, CFG.n_embd))
    np.testing.assert_allclose(forecast_loss(same, CFG, h_RPC, h_RPC), 0.0, atol=1e-6)
    np.testing.assert_allclose(forecast_loss(same, CFG, h_RPC, -h_RPC), 2.0, rtol=1e-6)


def test_gaps_move_what_is_near_away_from_what_is_far(ids_BT):
    cfg, spec = replace(CFG, gist_levels=2), CFG.gist_spec
    sizes, longest = spec.rows(T), 1 << 25
    gap_BR = np.asarray(gaps(cfg, 64, T, longest, jax.random.key(3)))
    start_R = np.concatenate([np.arange(n) * 4**level for level, n in enumerate(sizes)])
    for gap_R in gap_BR:
        boundary = start_R[gap_R > 0].min()
        assert boundary % 16 == 0
        np.testing.assert_array_equal(gap_R, np.where(start_R >= boundary, gap_R.max(), 0))
    lengths = gap_BR.max(axis=1)
    assert 1 <= lengths.min() < 1000
    assert longest / 1000 < lengths.max() <= longest
    assert gaps(cfg, 2, T, 0, jax.random.key(3)) is None
    assert gaps(cfg, 2, 16, longest, jax.random.key(3)) is None  # no boundary

    objective = rows_objective()
    params = _moved(objective.init(jax.random.key(0)))
    near = objective.hidden(params, ids_BT)[0]
    far = objective.hidden(params, ids_BT, gap_BR=jnp.asarray(np.where(start_R >= 32, 1 << 20, 0)))[0]
    np.testing.assert_allclose(far[:, :32], near[:, :32], atol=1e-5)
    assert jnp.abs(far[:, 32:] - near[:, 32:]).max() > 1e-2
    trained = replace(objective, longest_gap=longest)
    losses = [trained.loss(params, batch_of(ids_BT), jax.random.key(i))[0] for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_sequence_shorter_than_a_block(ids_BT):
    objective = rows_objective()
    params = objective.init(jax.random.key(0))
    batch = {name: x[:, :3] for name, x in batch_of(ids_BT).items()}
    loss, (weight, stats) = objective.loss(params, batch, jax.random.key(0))
    assert jnp.isfinite(loss)
    assert weight == 6
    assert jnp.isnan(objective.summarise(jax.tree.map(lambda x: x[None], stats))["mc/gist_regression_loss"])


def test_work_is_counted():
    long = replace(CFG, sequence_len=4096, gist_block=32, gist_window=256)
    dense = replace(long, attention="dense").flops_per_token()
    gist = rows_objective(long, regression_weight=0.0).flops_per_token
    assert gist < dense
    expected = rows_objective(long)
    direct = replace(expected, gist=replace(expected.gist, forecast="direct"))
    assert gist < direct.flops_per_token < expected.flops_per_token


def test_sliding_has_the_budget_of_gist_attention():
    sliding = replace(CFG, attention="sliding")
    window = sliding.windows()
    assert len(set(window)) == 1
    assert len(window) == CFG.n_layer
    assert window[0] + 1 == CFG.keys_per_token().max() < T // 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention": "gits"}, "--attention"),
        ({"gist_window": 10}, "multiple"),
        ({"gist_positions": "rank"}, "--gist-positions"),
        ({"window_pattern": "SL"}, "--window-pattern"),
    ],
)
def test_impossible_patterns_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        replace(CFG, **change)


def _moved(params):
    """No weight at its start, where a missing path would not show."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, moved)
