import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.context import metrics


def test_forecasts_by_level():
    loss_RP = jnp.array([[1.0, 2.0, 3.0], [5.0, 7.0, 9.0]])
    level_RP = jnp.array([[1, 2, 1], [1, 1, 2]])
    known_RP = jnp.array([[True, True, True], [True, False, False]])
    np.testing.assert_array_equal(
        metrics.forecast_statistics(loss_RP, level_RP, known_RP, 3), [[9.0, 3.0], [2.0, 1.0], [0.0, 0.0]]
    )


@jax.jit
def summary(score_BNW, target_BNMW):
    """The lens metrics of one micro-batch of B sequences with N contexts."""
    B, N, M, W = target_BNMW.shape
    score_BNMW = jnp.broadcast_to(score_BNW[:, :, None], target_BNMW.shape)
    pairs_P = jnp.ones(B * N * M, bool)
    stats = metrics.lens_statistics(0.0, score_BNW, score_BNMW, target_BNMW, pairs_P, pairs_P)
    nats_BNW = jnp.ones((B, N, W))
    stats |= metrics.collect(nats_BNW, nats_BNW, nats_BNW, jnp.zeros((B, N, W), int), 1, 1)
    stats |= {"raw_nats": jnp.float32(1), "raw_weight": jnp.float32(1)}
    stats = jax.tree.map(lambda x: jnp.asarray(x)[None], stats)
    return metrics.summarise(stats, levels=1, horizon=1, ratio=2.0)


def found_of(score_BNW, target_BNMW):
    found = summary(score_BNW, target_BNMW)
    return {name.removeprefix("mc/"): float(x) for name, x in found.items()}


def test_correlations_are_those_of_each_sequence():
    """Three sequences; the scores of the second are all alike, so that it has none."""
    rng = np.random.default_rng(0)
    score_BNW = rng.uniform(-1, 1, (3, 2, 9)).astype(np.float32)
    target_BNMW = rng.uniform(-1, 1, (3, 2, 2, 9)).astype(np.float32)
    target_BNMW[rng.random(target_BNMW.shape) < 0.4] = 0.0  # nothing asked
    score_BNW[1] = 0.7
    corr = []
    for score_NW, target_NMW in ((score_BNW[i], target_BNMW[i]) for i in (0, 2)):
        score_NMW = np.broadcast_to(score_NW[:, None], target_NMW.shape)
        asked = target_NMW != 0
        corr.append(np.corrcoef(score_NMW[asked], target_NMW[asked])[0, 1])
    found = found_of(jnp.asarray(score_BNW), jnp.asarray(target_BNMW))
    assert found["preference_corr_mean"] == pytest.approx(sum(corr) / 3, abs=1e-6)
    assert found["preference_corr_max"] == pytest.approx(max(0, *corr), abs=1e-6)
    assert found["preference_corr_min"] == pytest.approx(min(0, *corr), abs=1e-6)
    assert found["preference_corr_mean_valid"] == pytest.approx(sum(corr) / 2, abs=1e-6)
    assert found["preference_corr_max_valid"] == pytest.approx(max(corr), abs=1e-6)
    assert found["preference_corr_min_valid"] == pytest.approx(min(corr), abs=1e-6)


def test_a_correlation_that_no_sequence_has_is_not_a_number():
    """And so is not logged."""
    found = found_of(jnp.zeros((2, 2, 4)), jnp.ones((2, 2, 2, 4)))
    assert found["preference_corr_mean"] == found["preference_corr_max"] == found["pref_span_corr"] == 0
    assert all(np.isnan(found[f"preference_corr_{name}_valid"]) for name in ("mean", "max", "min"))
