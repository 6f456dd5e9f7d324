import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.errors import UserError
from megacontext_jax.infer import sampler

sample = jax.jit(sampler.sample, static_argnums=3)
LOGITS = np.log(np.array([0.05, 0.4, 0.25, 0.2, 0.1], np.float32))


def draw(logits, n=4000, seed=0, **options):
    """Frequencies of the tokens over n rows with the same logits."""
    options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    chosen, candidates = sampler.settings(**options, vocab_size=len(logits))
    rows = jnp.broadcast_to(jnp.asarray(logits), (n, len(logits)))
    ids = np.asarray(sample(rows, sampler.row_keys(seed, n), chosen, candidates))
    assert ids.dtype == np.int32
    return np.bincount(ids, minlength=len(logits)) / n


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, softmax(LOGITS)),
        ({"temperature": 0.5}, softmax(2 * LOGITS)),
        ({"temperature": 3.0}, softmax(LOGITS / 3)),
        ({"top_k": 0, "top_p": 1.0}, softmax(LOGITS)),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),
        ({"top_k": 2, "temperature": 0.5}, [0, 0.16 / 0.2225, 0.0625 / 0.2225, 0, 0]),
        ({"top_k": 99}, softmax(LOGITS)),
        ({"top_p": 0.6}, [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),
        ({"top_p": 0.7}, [0, 0.4 / 0.85, 0.25 / 0.85, 0.2 / 0.85, 0]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),
        ({"top_k": 4, "top_p": 0.45}, [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-9, "top_k": 3}, [0, 1, 0, 0, 0]),
        ({"top_k": 1, "temperature": 5.0}, [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_distribution(options, expected):
    found = draw(LOGITS, **options)
    expected = np.asarray(expected)
    # four standard deviations of a frequency; what must not be drawn is never drawn
    assert np.all(np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / 4000))


def test_top_k_within_a_larger_bucket_of_candidates():
    logits = np.linspace(0, 1, 500)
    found = draw(logits, top_k=50)
    assert set(np.flatnonzero(found)) == set(range(450, 500))
    assert sampler.settings(1.0, 50, None, 500)[1] == 64
    assert sampler.settings(1.0, 60, 0.9, 500)[1] == 64  # the same program serves both


def test_greedy_takes_the_first_of_equals():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, 1.0], [-jnp.inf, -3.0, -jnp.inf]])
    assert sampler.greedy(logits).tolist() == [1, 0, 1]


def test_extreme_temperatures_stay_finite():
    big = np.array([-1e4, 0.0, 1e4, 9.99e3], np.float32)
    assert draw(big, temperature=1e-6)[2] == 1
    assert draw(big, temperature=1e-5, top_k=3)[2] == 1
    assert np.count_nonzero(draw(big, temperature=1e9)) == 4


def test_a_row_draws_the_same_whatever_is_beside_it():
    logits = jax.random.normal(jax.random.key(1), (6, 100))
    chosen, candidates = sampler.settings(1.0, 20, 0.9, 100)
    keys = sampler.row_keys(7, 6)
    together = sample(logits, keys, chosen, candidates)
    alone = [sample(logits[i : i + 1], keys[i : i + 1], chosen, candidates)[0] for i in range(6)]
    assert together.tolist() == [int(x) for x in alone]
    assert jnp.array_equal(jax.random.key_data(keys[:3]), jax.random.key_data(sampler.row_keys(7, 3)))
    assert not jnp.array_equal(jax.random.key_data(keys[0]), jax.random.key_data(sampler.row_keys(8, 1)[0]))


def test_any_seed_will_do():
    for seed in (-1, 0, 2**31, 2**63, 10**30):
        sampler.row_keys(seed, 2)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ((-0.1, None, None), "--temperature -0.1"),
        ((float("nan"), None, None), "--temperature nan"),
        ((float("inf"), None, None), "--temperature inf"),
        ((1.0, -3, None), "--top-k -3"),
        ((1.0, None, 0.0), "--top-p 0.0"),
        ((1.0, None, 1.5), "--top-p 1.5"),
    ],
)
def test_refuses_settings_out_of_range(options, flag):
    with pytest.raises(UserError, match=flag):
        sampler.settings(*options, vocab_size=100)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how CPUs compile top_k")
@pytest.mark.parametrize(("top_k", "top_p"), [(50, None), (50, 0.9), (None, 0.9)])
def test_never_sorts_the_vocabulary(top_k, top_p):
    chosen, candidates = sampler.settings(1.0, top_k, top_p, 4096)
    logits = jnp.zeros((8, 4096))
    program = sample.lower(logits, sampler.row_keys(0, 8), chosen, candidates).compile().as_text()
    assert " sort(" not in program
    assert "topk" in program.lower()
