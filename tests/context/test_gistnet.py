"""GistNet as inference reads it gives what training's gives."""

import jax
import numpy as np
import pytest

from megacontext_jax.context import gistnet
from megacontext_jax.context.gistnet import GistConfig
from megacontext_jax.model.arch import GPTConfig

BLOCKS = GPTConfig("pocket", 64, 64, 2, n_head=2, n_kv_head=2, n_embd=32)


@pytest.mark.parametrize(
    ("kind", "pooling", "head"),
    [("transformer", "cls", "mlp"), ("transformer", "query", "linear"), ("mean", "mean", "none")],
)
def test_prepared_for_inference_it_makes_the_same_gists(kind, pooling, head):
    cfg = GistConfig(BLOCKS, block=8, kind=kind, pooling=pooling, head=head)
    params = gistnet.init_gistnet(cfg, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 50))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)
    x_NKC = jax.random.normal(jax.random.key(2), (3, 8, 32))
    expected = gistnet.encode(params, cfg, x_NKC)
    found = gistnet.encode(gistnet.prepare(params), cfg, x_NKC)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert float(np.abs(expected).mean()) > 0.1
