"""MegaPrediction: the final activations of a gist forecast the next gist, through the head that predicts tokens or directly."""

import jax
import jax.numpy as jnp

from megacontext_jax.model import gpt, loss
from megacontext_jax.model.arch import GPTConfig


def level_weight(level):
    """Of a forecast at a level, relative to level 1."""
    return jnp.where(level > 1, 0.5, 1.0)


def forecast_loss(params, cfg: GPTConfig, h_RPC, target_RPC):
    """1 - cosine [R, P] between the gists that final activations of gists forecast and those that came.

    The forecast is the embedding that the next-token distribution expects or, where GistNet brings one (`GistConfig.forecast`),
    a projection of its own; targets get no gradient.
    """
    if "forecast" in params["gistnet"]:
        forecast_RPC = gpt.linear(h_RPC, params["gistnet"]["forecast"])
        return 1 - cosine(forecast_RPC, jax.lax.stop_gradient(target_RPC))
    logits_RPV = loss.capped_logits(h_RPC, params["lm_head"], cfg.logit_cap, cfg.vocab_size)
    embedding_VC = gpt.rms_norm(params["wte"][: cfg.vocab_size].astype(h_RPC.dtype))
    expected_RPC = jax.nn.softmax(logits_RPV).astype(h_RPC.dtype) @ embedding_VC
    return 1 - cosine(expected_RPC, jax.lax.stop_gradient(target_RPC))


def cosine(a, b):
    a, b = (x.astype(jnp.float32) for x in (a, b))
    norms = jnp.sqrt(jnp.square(a).sum(-1) * jnp.square(b).sum(-1) + 1e-12)
    return (a * b).sum(-1) / norms
