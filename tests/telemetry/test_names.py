import pytest

from megacontext_jax.telemetry import names

# Every name of the reference page's list for wandb, and why some are not ours.
FORK_LIST = """
step total_training_flops total_training_time
train/loss train/loss_lod0 train/lrm train/dt train/tok_per_sec train/mfu train/grad_norm
train/tokens_per_step train/grad_accum_steps mc/grad_accum_steps
mc/time_controller_ms time/forward_ms time/optimizer_ms time/dataloader_ms
mc/base_forward_ms mc/lens_forward_ms mc/lens_loss_ms mc/lens_ms
mc/variants_mean mc/variants_total
mc/adv_delta_mean mc/adv_delta_p95 mc/adv_delta_std
mc/lod_loss/{l} mc/lod_delta/{l} mc/lod_count/{l}
mc/lens_loss
mc/preference_corr_mean_valid mc/preference_corr_max_valid mc/preference_corr_min_valid mc/preference_pair_count
mc/preference_corr_mean mc/preference_corr_max mc/preference_corr_min mc/preference_agreement
mc/policy_score_abs_mean mc/policy_score_std_mean mc/pref_span_corr
val/bpb core_metric centered_results
mc/runtime_tokens mc/runtime_original_tokens mc/runtime_wc_tokens mc/runtime_refocus_updates
mc/runtime_prefill_replacements mc/runtime_refocus_replacements mc/runtime_total_ms
val_loss mmlu_acc arc_easy_acc lrm train_loss num_tokens
"""
# chat_sft alone logged these; here every stage logs train/loss, train/lrm, val/bpb and total_training_tokens
NOT_OURS = {"val_loss", "mmlu_acc", "arc_easy_acc", "lrm", "train_loss", "num_tokens"}
OURS = {
    # what the fork's records lacked
    "total_training_tokens",
    "train/loss_step",
    "train/param_norm",
    "train/update_norm",
    "train/weight",
    "val/{set}_bpb",
    # streams the fork demanded and had no name for
    "mc/delta_nll_h{h}",
    "mc/delta_nll_h{h}_p95",
    "mc/delta_nll_h{h}/level_{l}",
    "mc/delta_nll_h{h}/ratio_{ratio}",
    "mc/gist_regression_loss",
    "mc/gist_regression_loss/level_{l}",
    # the same difference on held-out text, under every way to show the history that is compared
    "val/delta_nll_h{h}/{view}",
    "val/delta_nll_h{h}/{view}_p95",
    # streams that were fields of spans only
    "mc/swap_rate",
    "mc/utilization",
    "mc/residency_mean",
    "mc/residency_p95",
    # stages the fork timed (its last_timings) without logging the time
    "mc/build_ms",
    "mc/variant_ms",
    "mc/positional_ms",
    "mc/focus_ms",
}
FORK_SPANS = {
    "mc_batch_counters": "step sibling_expands sibling_collapses allocator_edits",
    "lensnet_usage": "context label batched_calls batched_variants batched_tokens allocator_calls allocator_tokens",
    "gistnet_usage": "context label calls block_batches block_tokens",
    "focus_allocator": "tag source lod_hint edits swap_rate num_expand num_collapse wc_length utilization "
    "residency_mean residency_p95 score_mean score_std score_max score_min",
    "mc_tree_snapshot": "tag summary total_tokens max_lod access",
    "working_context_snapshot": "tag length lods positions events",
    "delta_nll": "mean p95",
    "lod_metrics": "lod_{l}_loss",
    "lod_counts": "lod_{l}_count",
    "variant_fallbacks": "count",
    "mc_batch_stats": "variants_total variants_mean variants_max variants_min",
    "mc_preflight": "message ok",
}
OUR_FIELDS = {("delta_nll", "horizon")}  # the fork's difference had no horizon
OUR_SPANS = {"kv_cache": "reason kept recomputed wc_length"}  # the fork decoded without a cache


def test_metrics_are_the_forks_and_ours():
    fork = set(FORK_LIST.split())
    assert fork >= NOT_OURS
    assert set(names.METRICS) == fork - NOT_OURS - set(names.ABSENT) | OURS


def test_spans_are_the_forks_and_ours():
    known = FORK_SPANS | OUR_SPANS
    known = {(event, field) for event, fields in known.items() for field in fields.split()}
    absent = {(event, field) for event, field in known if {event, f"{event}.{field}"} & set(names.ABSENT)}
    ours = {(event, field) for event, fields in names.SPANS.items() for field in fields}
    assert ours == known - absent | OUR_FIELDS


def test_every_absent_name_is_the_forks_and_has_a_reason():
    fields = {f"{event}.{field}" for event, fields in FORK_SPANS.items() for field in fields.split()}
    for name, reason in names.ABSENT.items():
        assert name in {*FORK_LIST.split(), *FORK_SPANS, *fields}
        assert 20 < len(reason) < 110, name
        assert not names.is_known(name)


def test_every_metric_has_one_line_of_meaning():
    for name, meaning in names.METRICS.items():
        assert 5 < len(meaning) < 110, name
        assert "\n" not in meaning
        assert names.is_known(name) == ("{" not in name)


@pytest.mark.parametrize(
    "name",
    [
        "mc/lens_loss",
        "mc/lod_loss/0",
        "mc/delta_nll_h32",
        "mc/delta_nll_h1024_p95",
        "mc/delta_nll_h32/level_2",
        "mc/delta_nll_h32/ratio_8",
        "mc/delta_nll_h32/ratio_7.5",
        "mc/gist_regression_loss/level_1",
        "val/python_bpb",
        "val/delta_nll_h32/sliding",
        "val/delta_nll_h8/learned_p95",
    ],
)
def test_known(name):
    assert names.is_known(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "mc/lens",
        "mc/lens_loss ",
        "time/forward_ms",
        "val/_bpb",
        "xmc/lens_loss",
        "mc/lod_loss/",
        "mc/lod_loss/{l}",
        "mc/lod_loss/two",
        "mc/lod_loss/٣",
        "mc/delta_nll_h",
        "mc/delta_nll_h32_p50",
        "mc/delta_nll_h32/ratio_7.",
        "mc/delta_nll_h32/level_1.5",
        "val/delta_nll_h32/",
        "val/delta_nll_h/learned",
        "val/delta_nll_h32/learned_p50",
    ],
)
def test_unknown(name):
    assert not names.is_known(name)


def test_meaning_is_that_of_the_template():
    assert names.meaning("mc/lod_count/3") == names.METRICS["mc/lod_count/{l}"]
    assert names.meaning("mc/delta_nll_h32_p95") == names.METRICS["mc/delta_nll_h{h}_p95"]
