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


def forecast_statistics(loss_RP, level_RP, known_RP, levels: int):
    """[levels, 2]: sum of the losses of the forecasts of gists of level 1, 2, ..., and how many."""
    at_level = [known_RP & (level_RP == level) for level in range(1, levels + 1)]
    return jnp.stack([jnp.stack([(loss_RP * here).sum(), here.sum()]) for here in at_level])


def lens_statistics(loss, score_BNW, score_BNMW, target_BNMW, agreement_P, supervised_P) -> dict:
    asked = target_BNMW != 0
    corr_B, defined_B = _correlation(score_BNMW, target_BNMW, asked, (1, 2, 3))
    return {
        "lens_loss": loss,
        "pairs": supervised_P.sum(),
        "agreeing": (agreement_P & supervised_P).sum(),
        "score_abs": jnp.abs(score_BNW).mean(),
        "score_std": score_BNW.std(-1).mean(),
        "span_corr": _correlation(score_BNMW, target_BNMW, asked, None)[0],
        "corr_B": corr_B,
        "corr_defined_B": defined_B,
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
        for level, (total, count) in enumerate(stats["forecasts"].sum(0), start=1):
            mean = jnp.where(count > 0, total / jnp.maximum(count, 1.0), jnp.nan)
            out[f"mc/gist_regression_loss/level_{level}"] = mean
    if "lens_loss" in stats:
        pairs = stats["pairs"].sum()
        out |= {
            "mc/lens_loss": stats["lens_loss"].mean(),
            "mc/preference_agreement": jnp.where(pairs > 0, stats["agreeing"].sum() / pairs, jnp.nan),
            "mc/preference_pair_count": pairs.astype(jnp.float32),
            "mc/policy_score_abs_mean": stats["score_abs"].mean(),
            "mc/policy_score_std_mean": stats["score_std"].mean(),
            "mc/pref_span_corr": stats["span_corr"].mean(),
        }
        corr, defined = stats["corr_B"], stats["corr_defined_B"]
        valid = jnp.where(defined, corr, jnp.nan)
        for name, all_of, valid_of in (
            ("mean", jnp.mean, jnp.nanmean),
            ("max", jnp.max, jnp.nanmax),
            ("min", jnp.min, jnp.nanmin),
        ):
            out[f"mc/preference_corr_{name}"] = all_of(corr)
            out[f"mc/preference_corr_{name}_valid"] = valid_of(valid)
    return out


def _weighted(x, weight):
    total = weight.sum()
    return jnp.where(total > 0, (x * weight).sum() / jnp.maximum(total, 1e-9), jnp.nan)


def _quantile(x, mask, q: float):
    return jnp.nanquantile(jnp.where(mask, x, jnp.nan), q)


def _correlation(a, b, mask, axes):
    """(Pearson's over the marked places of these axes, whether it is defined); 0 where it is not.

    What varies by less than a millionth, about the rounding of scores in (-1, 1), does not count as varying.
    """
    n = jnp.maximum(mask.sum(axes, keepdims=True), 1)

    def mean(x, keepdims=False):
        return (jnp.where(mask, x, 0.0) / n).sum(axes, keepdims=keepdims)

    a, b = a - mean(a, keepdims=True), b - mean(b, keepdims=True)
    var_a, var_b = mean(a * a), mean(b * b)
    defined = (var_a > 1e-12) & (var_b > 1e-12)
    return jnp.where(defined, mean(a * b) / jnp.sqrt(jnp.where(defined, var_a * var_b, 1.0)), 0.0), defined
