"""Statistics of a MegaContext step and the metrics made of them (names: telemetry/names.py).

`collect` runs once per micro-batch, `summarise` once per step on what all of them collected, stacked on axis 0.
"""

import jax.numpy as jnp


def collect(nll_BNW, delta_BNW, counted_BNW, level_BNW, levels: int, horizon: int) -> dict:
    """Per working context: loss, difference to the raw context on the same targets, shares of the levels.

    The difference over the horizon takes the last `horizon` entries, which are raw.
    """
    count_BN = counted_BNW.sum(-1)
    at_level = [level_BNW == level for level in range(levels + 1)]
    last = slice(-horizon, None)
    ahead_BN = counted_BNW[..., last].sum(-1)
    return {
        "loss_BN": (nll_BNW * counted_BNW).sum(-1) / jnp.maximum(count_BN, 1.0),
        "delta_BN": delta_BNW.sum(-1) / jnp.maximum(count_BN, 1.0),
        "count_BN": count_BN,
        "ahead_BN": delta_BNW[..., last].sum(-1) / jnp.maximum(ahead_BN, 1.0),
        "ahead_count_BN": ahead_BN,
        "entries_BNL": jnp.stack([x.sum(-1) for x in at_level], axis=-1),
    }


def lens_statistics(loss, score_BNW, score_BNMW, target_BNMW, agreement_P, supervised_P) -> dict:
    asked = target_BNMW != 0
    return {
        "lens_loss": loss,
        "pairs": supervised_P.sum(),
        "agreeing": (agreement_P & supervised_P).sum(),
        "score_abs": jnp.abs(score_BNW).mean(),
        "score_std": score_BNW.std(-1).mean(),
        "span_corr": _correlation(score_BNMW, target_BNMW, asked),
    }


def summarise(stats: dict, *, levels: int, horizon: int, ratio: float) -> dict:
    """Scalars by name. What no entry of the step can tell is NaN, and is not logged."""
    usable = stats["count_BN"] > 0
    delta, losses = stats["delta_BN"], stats["loss_BN"]
    ahead, ahead_usable = stats["ahead_BN"], stats["ahead_count_BN"] > 0
    entries = stats["entries_BNL"]
    share = entries / jnp.maximum(entries.sum(-1, keepdims=True), 1)
    mean, h = _weighted(delta, usable), f"mc/delta_nll_h{horizon}"
    out = {
        "train/loss_lod0": stats["raw_nats"].sum() / jnp.maximum(stats["raw_weight"].sum(), 1.0),
        "mc/adv_delta_mean": mean,
        "mc/adv_delta_p95": _quantile(delta, usable, 0.95),
        "mc/adv_delta_std": jnp.sqrt(_weighted(jnp.square(delta - mean), usable)),
        "mc/variants_mean": jnp.float32(delta.shape[-1]),
        "mc/variants_total": jnp.float32(delta.size),
        h: _weighted(ahead, ahead_usable),
        f"{h}_p95": _quantile(ahead, ahead_usable, 0.95),
        f"{h}/ratio_{float(f'{ratio:.2g}'):g}": _weighted(ahead, ahead_usable),
    }
    for level in range(levels + 1):
        out[f"mc/lod_loss/{level}"] = _weighted(losses, usable * share[..., level])
        out[f"mc/lod_count/{level}"] = entries[..., level].sum().astype(jnp.float32)
        if level:
            out[f"mc/lod_delta/{level}"] = _weighted(delta, usable * share[..., level])
            out[f"{h}/level_{level}"] = _weighted(ahead, ahead_usable * share[..., level])
    if "regression" in stats:
        out["mc/gist_regression_loss"] = stats["regression"].mean()
    if "lens_loss" in stats:
        pairs = stats["pairs"].sum()
        corr = stats["span_corr"]
        out |= {
            "mc/lens_loss": stats["lens_loss"].mean(),
            "mc/preference_agreement": jnp.where(pairs > 0, stats["agreeing"].sum() / pairs, jnp.nan),
            "mc/preference_pair_count": pairs.astype(jnp.float32),
            "mc/policy_score_abs_mean": stats["score_abs"].mean(),
            "mc/policy_score_std_mean": stats["score_std"].mean(),
            "mc/pref_span_corr": corr.mean(),
        }
    return out


def _weighted(x, weight):
    total = weight.sum()
    return jnp.where(total > 0, (x * weight).sum() / jnp.maximum(total, 1e-9), jnp.nan)


def _quantile(x, mask, q: float):
    return jnp.nanquantile(jnp.where(mask, x, jnp.nan), q)


def _correlation(a, b, mask):
    n = jnp.maximum(mask.sum(), 1)
    a, b = (jnp.where(mask, x - jnp.where(mask, x, 0.0).sum() / n, 0.0) for x in (a, b))
    return (a * b).sum() / jnp.sqrt((a * a).sum() * (b * b).sum() + 1e-12)
