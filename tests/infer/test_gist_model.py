"""Generation with gist attention says what whole sequences would."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.infer.gist_model import gist_model
from megacontext_jax.model.loss import capped_logits
from tests.context.test_gist_rows import CFG, _moved, rows_objective


def whole(objective, params, ids_BT):
    x_BTC = jax.jit(objective.hidden)(params, ids_BT)[0]
    return capped_logits(x_BTC, params["lm_head"], objective.cfg.logit_cap, objective.cfg.vocab_size)


@pytest.mark.parametrize(
    ("arch", "levels", "tokens", "places"),
    [("pocket", 3, 5000, False), ("latest", 2, 150, True), ("classic", 1, 60, True)],
)
def test_token_by_token(arch, levels, tokens, places):
    cfg = replace(CFG, arch=arch, gist_levels=levels, gist_window=16, sequence_len=tokens)
    objective = rows_objective(cfg, places)
    params = _moved(objective.init(jax.random.key(0)))
    ids_BT = jax.random.randint(jax.random.key(1), (2, tokens), 0, cfg.vocab_size)
    expected_BTV = whole(objective, params, ids_BT)
    decoder, weights = gist_model(params, objective)

    # rows of a batch begin at different lengths, in the middle of blocks and at their ends
    length_B = jnp.array([13, 32])
    first, cache = jax.jit(decoder.prefill)(weights, ids_BT[:, :40], length_B, decoder.init_cache(2, tokens))
    for b, n in enumerate(length_B):
        np.testing.assert_allclose(first[b], expected_BTV[b, n - 1], atol=1e-4)

    @jax.jit
    def go_on(cache):
        def step(cache, _):
            ids_B = jnp.take_along_axis(ids_BT, cache.length_B[:, None], axis=1, mode="clip")[:, 0]
            logits_BV, cache = decoder.decode_step(weights, ids_B, cache)
            return cache, logits_BV

        return jax.lax.scan(step, cache, None, length=tokens - 40)

    _, found_NBV = go_on(cache)
    for b, n in enumerate(length_B):
        np.testing.assert_allclose(found_NBV[:, b], expected_BTV[b, n : n + tokens - 40], atol=1e-4)
