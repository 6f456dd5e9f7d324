"""The names of MegaContext's metric streams and events, and what each of them means here.

The names are those of the PyTorch fork, so that its dashboards find them; where its figure was broken the meaning
is the intended one, and `ABSENT` says which of its names nothing here can fill. `{l}` stands for a level, `{h}` for
a horizon in tokens, `{ratio}` for a compression ratio (raw tokens per entry of the context), `{view}` for how a
history is shown (sliding, gist, or the lens that refocused it), `{set}` for a further set of held-out text. Losses
are in nats per token, times named `_ms` in milliseconds. The stages named `mc/..._ms` are timed with
--mc-log-timers at every validation, over one of its batches: each is a compiled program of its own, since the
training step is one.
"""

import re
from functools import cache

METRICS: dict[str, str] = {
    # every logged step
    "step": "optimiser steps done before this record",
    "total_training_flops": "FLOPs of all steps so far, estimated from the shapes",
    "total_training_tokens": "tokens of text of all steps so far",
    "total_training_time": "seconds in steps so far, compilation left out",
    "train/loss": "debiased moving average of the step's total loss",
    "train/loss_step": "the step's total loss",
    "train/loss_lod0": "next-token NLL of the raw sequences of the step",
    "train/lrm": "learning-rate multiplier",
    "train/dt": "seconds of the step",
    "train/tok_per_sec": "tokens of text per second",
    "train/mfu": "model FLOPs of the work really done over the devices' peak, in percent",
    "train/grad_norm": "global norm of the gradients",
    "train/param_norm": "global norm of the parameters before the step",
    "train/update_norm": "global norm of what the step adds to them",
    "train/weight": "tokens of the step that are predicted and counted",
    "train/tokens_per_step": "tokens of text per optimiser step",
    "train/grad_accum_steps": "forward and backward passes per optimiser step",
    "mc/grad_accum_steps": "the same, in steps whose passes hold working contexts too",
    # latency
    "mc/time_controller_ms": "sum of build, variant, positional and lens_forward: all but the model",
    "mc/build_ms": "building the tree of gists",
    "mc/variant_ms": "drawing the variants as a step does",
    "mc/positional_ms": "positions and rotary tables of the working contexts",
    "mc/focus_ms": "one pass of the focus allocator",
    "mc/base_forward_ms": "the model's forward pass over the working contexts, without its head",
    "mc/lens_forward_ms": "LensNet's forward pass over the working contexts",
    "mc/lens_loss_ms": "LensNet's loss, given the scores of the variants",
    "mc/lens_ms": "LensNet's forward pass over the variants and its loss together",
    "time/dataloader_ms": "the host's wait for the step's rows; the device may still be in the step before",
    # variants against the raw sequence
    "mc/variants_mean": "variants per sequence",
    "mc/variants_total": "variants in the step",
    "mc/adv_delta_mean": "mean over variants of NLL(variant) - NLL(raw) on the same targets",
    "mc/adv_delta_p95": "95th percentile over variants of that difference",
    "mc/adv_delta_std": "standard deviation over variants of that difference",
    "mc/lod_loss/{l}": "NLL of the variants, weighted by the share of their entries on level l",
    "mc/lod_delta/{l}": "NLL(variant) - NLL(raw), weighted the same way, for levels above 0",
    "mc/lod_count/{l}": "entries of level l in the step's working contexts",
    "mc/delta_nll_h{h}": "mean NLL of the next h tokens given the compressed context minus given the raw one",
    "mc/delta_nll_h{h}_p95": "95th percentile of that difference over sequences",
    "mc/delta_nll_h{h}/level_{l}": "mean of that difference, contexts weighted by the share of their entries on level l",
    "mc/delta_nll_h{h}/ratio_{ratio}": "mean of that difference over contexts of this compression ratio",
    "mc/gist_regression_loss": "loss of the predicted next gists against the true ones",
    "mc/gist_regression_loss/level_{l}": "the same for gists of level l",
    # the lens
    "mc/lens_loss": "LensNet's preference loss over pairs of variants, as optimised",
    "mc/preference_corr_mean": "correlation of scores and targets in a sequence, 0 if undefined; mean over sequences",
    "mc/preference_corr_max": "largest of these correlations",
    "mc/preference_corr_min": "smallest of these correlations",
    "mc/preference_corr_mean_valid": "mean over the sequences in which that correlation is defined",
    "mc/preference_corr_max_valid": "largest of these correlations",
    "mc/preference_corr_min_valid": "smallest of these correlations",
    "mc/preference_pair_count": "pairs of variants LensNet learned from",
    "mc/preference_agreement": "share of pairs whose scores point the way the measured losses do",
    "mc/policy_score_abs_mean": "mean absolute score",
    "mc/policy_score_std_mean": "standard deviation of the scores in a context, mean over contexts",
    "mc/pref_span_corr": "correlation of scores and targets over all supervised entries of a micro-batch",
    # the focus allocator
    "mc/swap_rate": "entries replaced by a refocus over the entries of the context before it",
    "mc/utilization": "valid entries of the working context over its budget",
    "mc/residency_mean": "mean number of refocuses the entries of the context have stayed in it",
    "mc/residency_p95": "95th percentile of that number",
    # evaluation
    "val/bpb": "bits per byte of held-out text",
    "val/{set}_bpb": "the same for a further set of held-out text",
    "val/delta_nll_h{h}/{view}": "mean NLL of the next h tokens under a view of held-out history minus under the raw one",
    "val/delta_nll_h{h}/{view}_p95": "95th percentile of that difference over sequences",
    "mc/runtime_tokens": "held-out tokens of the rows whose history was shown in working contexts",
    "mc/runtime_original_tokens": "tokens of history those contexts stand for",
    "mc/runtime_wc_tokens": "entries of those contexts after refocusing",
    "mc/runtime_refocus_updates": "refocuses of those contexts, each by one pass of the allocator",
    "mc/runtime_refocus_replacements": "expansions and collapses by these refocuses",
    "mc/runtime_total_ms": "tree, first contexts and all their refocuses in one program, model included",
}

# Names of the fork, metrics and events (or event.field), that are never sent, and why.
ABSENT: dict[str, str] = {
    "time/forward_ms": "forward pass, backward pass and update are one compiled program; train/dt is its time",
    "time/optimizer_ms": "forward pass, backward pass and update are one compiled program; train/dt is its time",
    "core_metric": "the tasks of CORE are not evaluated; chat_eval and long_context_eval judge a model",
    "centered_results": "the tasks of CORE are not evaluated; chat_eval and long_context_eval judge a model",
    "mc/runtime_prefill_replacements": "first contexts are laid out by recency in one go; nothing is replaced",
    "mc_batch_counters": "training draws its contexts in one go, without siblings and edits that it could count",
    "variant_fallbacks": "there is no fallback: a width that cannot be drawn is refused at the start",
    "focus_allocator.lod_hint": "the allocator gets scores of entries, never a level as a hint",
    "mc_tree_snapshot.access": "level tables are arrays that keep no count of who read them",
    "working_context_snapshot.events": "a layout keeps no log; focus_allocator tells of the edits",
}

SPANS: dict[str, tuple[str, ...]] = {
    "lensnet_usage": (
        "context",
        "label",
        "batched_calls",
        "batched_variants",
        "batched_tokens",
        "allocator_calls",
        "allocator_tokens",
    ),
    "gistnet_usage": ("context", "label", "calls", "block_batches", "block_tokens"),
    "focus_allocator": (
        "tag",
        "source",
        "edits",
        "swap_rate",
        "num_expand",
        "num_collapse",
        "wc_length",
        "utilization",
        "residency_mean",
        "residency_p95",
        "score_mean",
        "score_std",
        "score_max",
        "score_min",
    ),
    "kv_cache": (
        "reason",
        "kept",
        "recomputed",
        "wc_length",
    ),  # entries whose keys an edit left alone, or not
    "mc_tree_snapshot": ("tag", "summary", "total_tokens", "max_lod"),
    "working_context_snapshot": ("tag", "length", "lods", "positions"),
    "delta_nll": ("mean", "p95", "horizon"),
    "lod_metrics": ("lod_{l}_loss",),
    "lod_counts": ("lod_{l}_count",),
    "mc_batch_stats": ("variants_total", "variants_mean", "variants_max", "variants_min"),
    "mc_preflight": ("message", "ok"),
}

_PLACES = {"{l}": r"\d+", "{h}": r"\d+", "{ratio}": r"\d+(?:\.\d+)?", "{view}": "[a-z]+", "{set}": "[a-z]+"}


def is_known(name: str) -> bool:
    """Whether a metric has this name, values in the place of placeholders."""
    return bool(template(name))


def meaning(name: str) -> str:
    """One line on what a metric is; empty for a name that is not listed."""
    return METRICS.get(template(name), "")


@cache
def template(name: str) -> str:
    """The key of `METRICS` that a name fills in; empty for a name that is not listed."""
    if "{" in name:
        return ""
    return next((key for pattern, key in _patterns() if pattern.fullmatch(name)), "")


@cache
def _patterns() -> list[tuple[re.Pattern, str]]:
    patterns = []
    for key in METRICS:
        pattern = re.escape(key)
        for placeholder, values in _PLACES.items():
            pattern = pattern.replace(re.escape(placeholder), values)
        patterns.append((re.compile(pattern, re.ASCII), key))
    return patterns
