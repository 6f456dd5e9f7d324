import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.context.positions import gaussian_rope
from megacontext_jax.errors import UserError
from megacontext_jax.model import decode, gpt, loss
from megacontext_jax.model.arch import ARCHS, NANOCHAT, GPTConfig, config_for_depth
from megacontext_jax.model.attention import (
    blocked_attention,
    reference_attention,
    select_attention,
    xla_attention,
)
from megacontext_jax.model.objective import make_objective
from tests.model.nanochat_weights import CASES, by_name, golden_model

TINY = GPTConfig("pocket", sequence_len=48, vocab_size=250, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)


@pytest.fixture(scope="module")
def tiny():
    params = gpt.init_params(TINY, jax.random.key(0))
    params["smear_gate"] = jax.random.normal(jax.random.key(2), params["smear_gate"].shape)
    ids_BT = jax.random.randint(jax.random.key(1), (2, 48), 0, TINY.vocab_size)
    return params, ids_BT


def relative(a, b):
    """Largest error relative to the largest value (to 1e-3 where all values are tiny)."""
    return float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-3))


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_pytorch_nanochat(case, golden):
    cfg, params, z = golden_model(golden / "nanochat" / case)
    logits_BTV = gpt.forward(params, cfg, z["input_ids"])
    np.testing.assert_allclose(logits_BTV, z["logits"], atol=2e-5)
    assert (logits_BTV.argmax(-1) == z["logits"].argmax(-1)).all()
    objective = make_objective(cfg, attention_impl="auto", dtype="float32")
    for suffix in ("", "_masked"):
        batch = {"inputs": z["input_ids"], "targets": z[f"targets{suffix}"]}

        def mean(params, batch=batch):
            total, (weight, _) = objective.loss(params, batch, None)
            return total / weight

        value, grads = jax.jit(jax.value_and_grad(mean))(params)
        assert float(value) == pytest.approx(float(z[f"loss{suffix}"]), rel=1e-6)
        norms = {name: np.linalg.norm(np.float64(g)) for name, g in by_name(cfg, grads).items()}
        ours = [norms[name] for name in z["param_names"]]
        # the floor: with two layers the subtracted stream is the final one, and its gradient mere rounding
        np.testing.assert_allclose(ours, z[f"grad_norms{suffix}"], rtol=1e-5, atol=1e-6 * max(ours))
    whole = {
        name: np.asarray(g)
        for name, g in by_name(cfg, jax.jit(jax.grad(plain_mean(objective, z)))(params)).items()
    }
    for key in z.files:
        if key.startswith("grad:"):
            wanted = z[key]
            np.testing.assert_allclose(
                whole[key[5:]], wanted, atol=2e-5 * np.abs(wanted).max() + 2e-7, err_msg=key
            )
    nll_BT = objective.nll(params, {"inputs": z["input_ids"], "targets": z["targets"]})
    np.testing.assert_allclose(nll_BT.ravel(), z["loss_none"].ravel(), atol=3e-5)
    assert np.float64(nll_BT).mean() == pytest.approx(np.mean(z["loss_none"], dtype=np.float64), abs=1e-6)


def plain_mean(objective, z):
    def mean(params):
        total, (weight, _) = objective.loss(params, {"inputs": z["input_ids"], "targets": z["targets"]}, None)
        return total / weight

    return mean


@pytest.mark.parametrize("case", CASES)
def test_decoding_equals_pytorch_nanochat(case, golden):
    """Prefill of a few tokens, then token by token over the rest: windows, smear and values from the cache."""
    cfg, params, z = golden_model(golden / "nanochat" / case)
    ids_BT = z["input_ids"]
    B, T = ids_BT.shape
    unstacked = decode.unstack_layers(params)
    step = jax.jit(lambda ids, cache: decode.decode_step(unstacked, cfg, ids, cache))
    cache = decode.init_cache(cfg, B, T)
    logits_BV, cache = decode.prefill(unstacked, cfg, ids_BT[:, :9], jnp.full(B, 9), cache)
    for t in range(9, T):
        np.testing.assert_allclose(logits_BV, z["logits"][:, t - 1], atol=2.5e-5)
        logits_BV, cache = step(ids_BT[:, t], cache)
    np.testing.assert_allclose(logits_BV, z["logits"][:, -1], atol=2.5e-5)


@pytest.mark.parametrize("case", ["head_swa", "era3_feb05_ve32_half_window"])
def test_bfloat16_stays_near_float32_as_in_nanochat(case, golden):
    """nanochat's own bfloat16 forward differs by 0.20 at most and 0.027 on average (head_swa)."""
    cfg, params, z = golden_model(golden / "nanochat" / case)
    logits_BTV = gpt.forward(params, cfg, z["input_ids"], dtype=jnp.bfloat16)
    difference = np.abs(logits_BTV - z["logits"])
    assert difference.max() < 0.20
    assert difference.mean() < 0.027


@pytest.mark.parametrize("options", [{}, {"unroll": True}, {"remat": "full"}])
def test_scanned_groups_of_layers_equal_the_layers_one_by_one(options):
    """Ten layers SSL: two whole periods of six would break the pattern at the last, so the tail stands alone."""
    cfg = GPTConfig("latest", 256, 96, 10, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SSL")
    assert cfg.layer_period() == (6, 1)
    cfg = dataclasses.replace(cfg, n_layer=14, window_pattern="SL")
    assert cfg.layer_period() == (2, 7)
    params = gpt.init_params(cfg, jax.random.key(0))
    params = jax.tree.map(lambda w: w + 0.05 * jax.random.normal(jax.random.key(w.size), w.shape), params)
    ids_BT = jax.random.randint(jax.random.key(1), (2, 160), 0, 96)
    *_, last_BTC = gpt.residual_stream(params, cfg, ids_BT)
    scanned_BTC = gpt.hidden_states(params, cfg, ids_BT, **options)
    np.testing.assert_allclose(scanned_BTC, last_BTC, atol=2e-4)


@pytest.mark.parametrize("window", [None, 0, 1, 40, 64, 100])
@pytest.mark.parametrize(("T", "H", "K"), [(1, 4, 4), (47, 4, 1), (64, 2, 2), (130, 4, 2)])
def test_attention_equals_the_reference(T, H, K, window):
    q, k, v, g = (jax.random.normal(jax.random.key(i), (2, T, n, 16)) for i, n in enumerate((H, K, K, H)))

    def run(fn):
        out, vjp = jax.vjp(partial(fn, window=window), q, k, v)
        return out, *vjp(g)

    for fn in (blocked_attention, xla_attention):
        for ours, wanted in zip(run(fn), run(reference_attention), strict=True):
            assert float(jnp.abs(ours - wanted).max()) < 5e-6 * max(1.0, float(jnp.abs(wanted).max()))


def test_a_window_of_w_sees_w_tokens_back_and_itself():
    T, window = 12, 4
    q, k, v = (jax.random.normal(jax.random.key(i), (1, T, 1, 8)) for i in range(3))
    for fn in (reference_attention, blocked_attention, xla_attention):
        g_BTHD = jax.grad(lambda v, fn=fn: fn(q, k, v, window=window)[0, 9].sum())(v)
        assert np.flatnonzero(jnp.abs(g_BTHD).max((0, 2, 3))).tolist() == [5, 6, 7, 8, 9]


def test_blocked_attention_in_bfloat16_stays_near_float32():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 96, 2, 32)) for i in range(3))
    half = blocked_attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert half.dtype == jnp.bfloat16
    assert relative(half.astype(jnp.float32), reference_attention(q, k, v)) < 2e-2


@pytest.mark.parametrize("vocab", [250, 256])
def test_fused_loss_equals_the_plain_one(vocab):
    x_BTC = jax.random.normal(jax.random.key(0), (3, 32, 24))
    head_VC = 3 * jax.random.normal(jax.random.key(1), (256, 24))  # saturates the soft cap
    targets_BT = jax.random.randint(jax.random.key(2), (3, 32), -1, vocab).at[1].set(-1)

    def total(fn):
        return lambda x, w: 0.37 * fn(x, w, targets_BT, 15.0, vocab).sum()

    sliced = partial(loss.nll_sum, slices=4)
    fused, grads = jax.value_and_grad(total(sliced), argnums=(0, 1))(x_BTC, head_VC)
    plain, wanted = jax.value_and_grad(total(loss.reference_nll), argnums=(0, 1))(x_BTC, head_VC)
    assert relative(fused, plain) < 1e-6
    for ours, expected in zip(grads, wanted, strict=True):
        assert relative(ours, expected) < 1e-5
    chunked = loss.chunked_nll(x_BTC, head_VC, targets_BT, 15.0, vocab, slices=4)
    assert relative(chunked, loss.reference_nll(x_BTC, head_VC, targets_BT, 15.0, vocab)) < 1e-6
    assert float(jnp.abs(chunked[1]).max()) == 0.0


def test_a_batch_without_targets_has_no_loss_and_no_gradient(tiny):
    params, ids_BT = tiny
    objective = make_objective(TINY, attention_impl="reference", dtype="float32")
    batch = {"inputs": ids_BT, "targets": jnp.full_like(ids_BT, -1)}
    (total, (weight, _)), grads = jax.value_and_grad(objective.loss, has_aux=True)(params, batch, None)
    assert float(total) == 0.0
    assert float(weight) == 0.0
    assert all(float(jnp.abs(g).max()) == 0.0 for g in jax.tree.leaves(grads))


def test_no_token_sees_the_future(tiny):
    params, ids_BT = tiny
    rope = gpt.rope_table(TINY, jnp.arange(48), jnp.float32)

    def early_logits(x_BTC, fn):
        """The first layer's output at positions below 20, as a function of all embeddings."""
        layer = jax.tree.map(lambda w: w[0], params["h"])
        return gpt.close_block(layer, x_BTC, fn(*gpt.qkv(layer, TINY, x_BTC, rope)))[:, :20]

    x_BTC = gpt.embed(params, ids_BT, jnp.float32)
    for fn in (blocked_attention, reference_attention):
        g_BTC = jax.grad(lambda x, fn=fn: jnp.square(early_logits(x, fn)).sum())(x_BTC)
        seen_T = jnp.abs(g_BTC).max(axis=(0, 2))
        assert (seen_T[:20] > 0).all()
        assert (seen_T[20:] == 0).all()


@pytest.mark.parametrize("options", [{"unroll": True}, {"remat": "full"}, {"remat": "dots"}])
def test_unrolling_and_recomputation_change_nothing(tiny, options):
    params, ids_BT = tiny

    direction_C = jax.random.normal(jax.random.key(2), (TINY.n_embd,))

    def value(params, **options):
        return (gpt.hidden_states(params, TINY, ids_BT, **options) @ direction_C).sum()

    plain, wanted = jax.value_and_grad(value)(params)
    other, grads = jax.value_and_grad(lambda p: value(p, **options))(params)
    assert relative(other, plain) < 1e-5  # a sum of 6,000 terms of both signs
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: relative(a, b) < 1e-4, grads, wanted)))


def test_decoding_rows_of_different_lengths_equals_the_full_forward(tiny):
    params, ids_BT = tiny
    full_BTV = gpt.forward(params, TINY, ids_BT)
    unstacked = decode.unstack_layers(params)
    rows, length_B = np.arange(2), np.array([5, 21])
    cache = decode.init_cache(TINY, 2, 48)
    step = jax.jit(lambda ids, cache: decode.decode_step(unstacked, TINY, ids, cache))
    logits_BV, cache = decode.prefill(unstacked, TINY, ids_BT[:, :24], jnp.array(length_B), cache)
    for t in range(20):
        at = length_B + t
        np.testing.assert_allclose(logits_BV, full_BTV[rows, at - 1], atol=2e-5)
        logits_BV, cache = step(ids_BT[rows, at], cache)
    assert cache.length_B.tolist() == [25, 41]


def table(golden, name):
    return json.loads((golden / f"nanochat/tables/{name}.json").read_text())


@pytest.mark.parametrize("arch", [arch.name for arch in NANOCHAT])
def test_sizes_follow_nanochat_by_depth(golden, arch):
    vocab = 65536 if arch == "classic" else 32768
    for row in table(golden, f"scaling_{arch}"):
        cfg = config_for_depth(row["depth"], arch=arch, vocab_size=vocab, sequence_len=2048)
        assert (cfg.n_embd, cfg.n_head) == (row["model_dim"], row["n_head"])
        counts, wanted = cfg.num_params(), row.get("param_counts", {"total": row.get("num_params")})
        counts["transformer_matrices"] = counts["transformer"]
        assert {name: counts[name] for name in wanted} == wanted
        assert cfg.flops_per_token() == row["flops_per_token"]
        if "window_sizes" in row:
            assert list(cfg.windows()) == row["window_sizes"]
            assert list(cfg.value_embed_layers()) == row["ve_layers"]


@pytest.mark.parametrize("arch", [arch.name for arch in NANOCHAT])
def test_initial_parameters_have_nanochats_statistics(golden, arch):
    stats = table(golden, f"init_stats_{arch}")
    cfg = config_for_depth(4, arch=arch, vocab_size=512, sequence_len=2048)
    params = by_name(cfg, gpt.init_params(cfg, jax.random.key(0)))
    assert params.keys() == stats.keys()
    for name, x in params.items():
        wanted = stats[name]
        assert list(x.shape) == wanted["shape"], name
        noise = 5 / np.sqrt(x.size)  # five standard errors
        assert abs(x.mean() - wanted["mean"]) <= 1e-6 + 2 * noise * wanted["std"], name
        std = x.std(ddof=1) if x.size > 1 else 0.0
        assert abs(std - wanted["std"]) <= 1e-6 + noise * wanted["std"], name
        if arch != "classic" and name not in ("transformer.wte.weight", "lm_head.weight"):  # bounded draws
            largest = max(abs(wanted["min"]), abs(wanted["max"]))
            assert np.abs(x).max() == pytest.approx(largest, rel=0.2, abs=1e-6), name


def test_rotary_tables_round_as_nanochats():
    """Heads of 128 over 2,048 positions in bfloat16: the exact values of float32 angles, but for ties.

    The cosine of one processor differs in its last bit from that of another, in PyTorch as in XLA.
    """
    cfg = GPTConfig("classic", 2048, 256, n_layer=1, n_head=2, n_kv_head=2, n_embd=256)
    tables = gpt.rope_table(cfg, jnp.arange(2048), jnp.bfloat16)
    angles = (np.arange(2048, dtype=np.float32)[:, None] * gpt.rope_frequencies(cfg)).astype(np.float64)
    for exact, table in zip((np.cos(angles), np.sin(angles)), tables, strict=True):
        rounded = exact.astype(np.float32).astype(jnp.bfloat16)
        steps = rounded.view(np.int16).astype(int) - np.asarray(table).view(np.int16).astype(int)
        assert np.abs(steps).max() <= 1
        assert (steps != 0).sum() <= 8


def test_smear_mixes_in_the_token_before_and_only_that(tiny):
    params, ids_BT = tiny
    e_BTC = gpt.embed(params, ids_BT, jnp.float32)
    x_BTC = gpt.smear(params, e_BTC, gpt.shift_right(e_BTC))
    np.testing.assert_array_equal(x_BTC[:, 0], e_BTC[:, 0])
    gate = 2.0 / (1.0 + np.exp(-np.asarray(e_BTC[:, :, :24]) @ np.asarray(params["smear_gate"][0])))
    np.testing.assert_allclose(x_BTC[:, 1:], e_BTC[:, 1:] + gate[:, 1:, None] * e_BTC[:, :-1], atol=1e-5)
    without = {name: w for name, w in params.items() if not name.startswith("smear")}
    assert gpt.smear(without, e_BTC, e_BTC) is e_BTC


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_sharpness_is_the_architectures(arch):
    cfg = GPTConfig(arch, 8, 64, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
    layer = jax.tree.map(lambda w: w[0], gpt.init_params(cfg, jax.random.key(0))["h"])
    x = jax.random.normal(jax.random.key(1), (1, 8, 32))
    q, k, _ = gpt.qkv(layer, cfg, x, gpt.rope_table(cfg, jnp.arange(8), x.dtype))
    for y in (q, k):
        rms = jnp.sqrt(jnp.square(y).mean(-1))
        np.testing.assert_allclose(rms, cfg.constants.qk_scale, rtol=1e-3)


def test_impossible_shapes_and_choices_are_refused_in_one_sentence():
    for make, word in [
        (lambda: GPTConfig("baroque"), "baroque"),
        (lambda: GPTConfig(n_embd=100, n_head=3, n_kv_head=3), "100"),
        (lambda: GPTConfig(n_head=6, n_kv_head=4), "4"),
        (lambda: config_for_depth(0), "depth 0"),
        (lambda: config_for_depth(4, arch="baroque"), "baroque"),
        (lambda: GPTConfig(window_pattern="SXL"), "SXL"),
        (lambda: GPTConfig(window_pattern=""), "''"),
        (lambda: GPTConfig(softcap=-1.0), "softcap"),
        (lambda: GPTConfig(rope_share=0.0), "--rope-share"),
        (lambda: select_attention("flash", platform="cpu", dtype="float32", head_dim=64), "flash"),
        (lambda: select_attention("cudnn", platform="cpu", dtype="bfloat16", head_dim=64), "cpu"),
    ]:
        with pytest.raises(UserError, match=word):
            make()


def test_dispatch_says_what_it_chose_and_why():
    choice = select_attention("auto", platform="cpu", dtype="float32", head_dim=64)
    assert choice.name == "blocked"
    assert choice.why
    choice = select_attention("auto", platform="gpu", dtype="bfloat16", head_dim=128, capability=9.0)
    assert choice.name == "cudnn"
    old = select_attention("auto", platform="gpu", dtype="bfloat16", head_dim=128, capability=7.0)
    assert (old.name, "7.0" in old.why) == ("xla", True)
    choice = select_attention("auto", platform="gpu", dtype="float32", head_dim=128, capability=9.0)
    assert choice.name == "xla"
    assert "float32" in choice.why


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_phases_of_far_positions(fraction):
    far = np.array([5, gpt.TURN - 1, gpt.TURN, 1_000_001, (1 << 25) - 1], np.int32)
    angles = (far + fraction)[:, None] * gpt.rope_frequencies(TINY).astype(np.float64)
    cos, sin = gpt.rope_table(TINY, jnp.asarray(far), jnp.float32, fraction)
    np.testing.assert_allclose(cos, np.cos(angles), atol=0.01)
    np.testing.assert_allclose(sin, np.sin(angles), atol=0.01)
    floats = gpt.rope_table(TINY, jnp.asarray(far[:2], jnp.float32), jnp.float32, fraction)
    np.testing.assert_array_equal(cos[:2], floats[0])


def test_channels_beyond_the_share_do_not_turn():
    far = jnp.asarray([3, 1 << 25], jnp.int32)
    whole, half = (
        gpt.rope_table(dataclasses.replace(TINY, rope_share=share), far, jnp.float32) for share in (1.0, 0.5)
    )
    D = TINY.head_dim
    for table, still, rest in zip(whole, half, (1.0, 0.0), strict=True):
        np.testing.assert_array_equal(still[:, : D // 4], table[:, : D // 4])
        np.testing.assert_array_equal(still[:, D // 4 :], rest)
    damped = gaussian_rope(dataclasses.replace(TINY, rope_share=0.5), far, jnp.full(2, 1e6), jnp.float32)
    np.testing.assert_array_equal(
        damped[0], [[0.0] * (D // 4) + [1.0] * (D // 4)] * 2
    )  # what is left of a far gist
