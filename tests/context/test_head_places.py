"""Heads with places of their own: which, what they see as tokens, what they read of gists."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import GistSpec
from megacontext_jax.context.head_places import init_reading, place_attention, places_of
from megacontext_jax.model import gpt
from megacontext_jax.model.attention import reference_attention
from tests.context.test_gist_rows import CFG, _moved, rows_objective

SHAPES = [(1, 4), (2, 4), (3, 4), (4, 4), (8, 4), (6, 32), (12, 8)]


@pytest.mark.parametrize(("heads", "block"), SHAPES)
def test_every_place_has_a_head_and_every_head_a_place(heads, block):
    own = places_of(heads, block)
    assert own.any(axis=0).all()
    assert own.any(axis=1).all()
    assert own.sum() < heads + block  # no more of it than must be
    weights = np.asarray(init_reading(2, heads, block, 24 * block))
    np.testing.assert_allclose((weights**2).mean(axis=-1), 1.0, rtol=1e-6)
    assert ((weights[0] > 0.5) == own[:, np.arange(24 * block) % block]).all()


def qkv(heads=4, key_heads=2, tokens=150):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (2, tokens, n, 8))
        for key, n in zip(keys, (heads, key_heads, key_heads), strict=True)
    ]


def test_with_a_window_over_everything_it_is_causal_attention():
    arrays = qkv()
    found = jax.jit(place_attention(GistSpec(4, 200, 1, 1)))(*arrays)
    np.testing.assert_allclose(found, reference_attention(*arrays), atol=2e-6)


def test_what_is_seen():
    """By gradients: near tokens by all heads, of the others those at a head's places, nothing that follows."""
    q, k, v = qkv()
    spec = GistSpec(4, 8, 1, 1)
    attend = jax.jit(place_attention(spec))
    for t in (0, 3, 40, 149):
        for head in range(4):
            pull = jax.grad(lambda v, t=t, head=head: attend(q, k, v)[0, t, head].sum())(v)
            seen_S = np.asarray(jnp.abs(pull[0]).sum(-1) > 0)[:, head // 2]
            s = np.arange(150)
            own = places_of(2, 4)[head // 2, s % 4]
            assert (seen_S == ((s <= t) & ((s >= t // 4 * 4 - 8) | own))).all()


def test_a_head_reads_its_own_places_of_a_gist():
    """The first values of a gist depend on the channels of a head's places, and hardly on others."""
    cfg = replace(CFG, n_kv_head=2, arch="classic")
    params = rows_objective(cfg, places=True).init(jax.random.key(0))
    layer = {name: w[0] for name, w in gpt.layer_params(params).items()}
    rope = gpt.rope_table(cfg, jnp.zeros(1, jnp.int32), jnp.float32)
    x_C = jax.random.normal(jax.random.key(1), (cfg.n_embd,))
    pull_KDC = jax.jacobian(lambda x: gpt.qkv(layer, cfg, x[None, None], rope, gists=1)[2][0, 0])(x_C)
    by_channel_KC = np.asarray(jnp.square(pull_KDC).sum(axis=1))
    for head, own in enumerate(places_of(2, cfg.gist_block)):
        mine = own[np.arange(cfg.n_embd) % cfg.gist_block]
        assert by_channel_KC[head, mine].mean() > 20 * by_channel_KC[head, ~mine].mean()


def test_tokens_are_read_alike():
    objective = rows_objective(CFG, places=True)
    params = _moved(objective.init(jax.random.key(0)))
    layers = gpt.layer_params(params)
    layer = {name: w[0] for name, w in layers.items()}
    x_BTC = jax.random.normal(jax.random.key(2), (2, 12, CFG.n_embd))
    rope = gpt.rope_table(CFG, jnp.arange(12), jnp.float32)
    mixed = gpt.qkv(layer, CFG, x_BTC, rope, gists=4)
    plain = gpt.qkv({name: w for name, w in layer.items() if name != "reading"}, CFG, x_BTC, rope)
    for a, b in zip(mixed, plain, strict=True):
        np.testing.assert_allclose(a[:, :8], b[:, :8], rtol=1e-6)
    np.testing.assert_allclose(mixed[0], plain[0], rtol=1e-6)  # queries are everybody's
    assert jnp.abs(mixed[1][:, 8:] - plain[1][:, 8:]).max() > 1e-2
