"""Networks, positions, levels and widths against arrays of the PyTorch MegaContext.

Where that code does what nobody meant, its arrays are left out by name (`NOT_COMPARED`, with the reason), or its
convention is written down in the test and our function is fed with it.
"""

import fnmatch
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.context.gistnet import GistConfig, encode
from megacontext_jax.context.layout import Layout, raw_layout, reachable_width, starts
from megacontext_jax.context.lensnet import LensConfig, init_lensnet, lens_scores, score_entries
from megacontext_jax.context.positions import (
    KINDS,
    alibi_bias,
    alibi_slopes,
    check_kind,
    entry_rope,
    gaussian_rope,
)
from megacontext_jax.context.tree import build_levels
from megacontext_jax.errors import UserError
from megacontext_jax.interop.names import places
from megacontext_jax.model.arch import ARCHS, GPTConfig
from megacontext_jax.model.attention import biased_attention, reference_attention
from megacontext_jax.model.gpt import Entries, embed, forward, rms_norm, rope_table, run_trunk
from megacontext_jax.model.loss import capped_logits, reference_nll
from tests.conftest import GOLDEN

NETWORKS = 2e-5  # of the norm of the output
ROUNDED = 8e-3  # one bfloat16 ulp at 1
EXACT = {"rtol": 0, "atol": 1e-6}  # float32 cosines of two libraries

COMPARED = (
    "gistnet",
    "lensnet",
    "gaussian_rope",
    "wc_positional",
    "tree",
    "tiny_gpt",
    "misc",
    "lens_loss_intended",
)
NOT_COMPARED = {  # arrays that are not here, by name
    # whole files
    "greedy_allocator": "edits off block boundaries, and collapses while there is room",
    "training_allocator": "collapses off block boundaries, drawn by Python's random.Random call by call",
    "controller_train": "learns to copy: the label of an entry is its own token, in compressed windows that of another "
    "place; windows are cut from the left; the sigma of positions grows with the length of the row",
    "inference": "prompts longer than the window raise; others are a sliding window of raw tokens",
    "auto_batch": "batch sizes that ignore memory and count iterations that never run",
    # rows of the files above
    "gistnet/mask": "no caller passes a padding mask, and pooling ignores it",
    "gistnet/transformer/*/output_masked": "the same",
    "tree/gistnet_after_bulk_append/*": "all new nodes but the last are zero",
    "tiny_gpt/*/BUGGY_logits_kvcache_prefill6_then_chunk6": "the mask is inverted: only forbidden keys are seen",
    "tiny_gpt/*/logits_kvcache_prefill6_then_single": "equal to logits_vanilla; decoding has its own tests",
    "misc/unreachable_segment_init/*": "never reached; its nodes do not start where its positions say",
    # no defects: left out for their size
    "lens_loss_intended/g*_w/*": "what the model and GistNet made of the tokens is given",
    "lens_loss_intended/tokens": "the same",
    "gistnet/transformer/mean/linear/*": "the linear head is compared behind query pooling",
    "gistnet/transformer/query/mlp/*": "the head is compared behind mean and cls pooling",
    "gistnet/transformer/cls/linear/*": "the head is compared behind query pooling",
}
SHOWN_TO_DIFFER = {  # arrays that are here so that a test can tell ours from them
    "wc_positional/sigma_base_is_max_length_64/*": "sigma is the length of the row to the level, not the span",
    "wc_positional/controller_alibi/cos": "the same",
    "wc_positional/controller_alibi/sin": "the same",
    "wc_positional/controller_alibi/bias": "sign inverted: distant keys are favoured; ours is its negative",
}


@pytest.fixture(scope="module")
def arrays():
    return {name: dict(np.load(GOLDEN / f"megacontext/{name}.npz")) for name in COMPARED}


def test_every_array_is_compared_or_left_out_with_a_reason(arrays):
    here = {path.stem for path in (GOLDEN / "megacontext").glob("*.npz")}
    here |= {f"{file}/{name}" for file, z in arrays.items() for name in z}
    assert here.issuperset(COMPARED)
    for name, reason in NOT_COMPARED.items():
        assert reason
        assert not fnmatch.filter(here, name), name
    for name, reason in SHOWN_TO_DIFFER.items():
        assert reason
        assert fnmatch.filter(here, name), name
    readme = (GOLDEN / "megacontext/README.md").read_text()
    for name in (*COMPARED, *(name for name in NOT_COMPARED if "/" not in name)):
        assert f"`{name}.npz`" in readme, name


def near(ours, theirs, tolerance=NETWORKS):
    """Error within `tolerance` of the norm."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert error <= tolerance, error


# --- PyTorch's names --------------------------------------------------------------------------------------


def below(tree: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): x for name, x in tree.items() if name.startswith(prefix)}


def classic(layers: int, width: int, heads: int, **fields) -> GPTConfig:
    fields = {"n_kv_head": heads, "vocab_size": 64, "sequence_len": 16} | fields
    return GPTConfig("classic", n_layer=layers, n_embd=width, n_head=heads, **fields)


def stacked(cfg: GPTConfig, w: dict) -> dict:
    """The layers of a network named blocks.0, blocks.1, ... in the fork."""
    found: dict[str, list] = {}
    for name, place in places(cfg).items():
        if place.leaf[0] == "h":
            found.setdefault(place.leaf[1], []).append(w[name.replace("transformer.h.", "blocks.")])
    return {name: jnp.stack(layers) for name, layers in found.items()}


def affine_of(w: dict, name: str) -> dict:
    return {"weight": jnp.asarray(w[f"{name}.weight"]), "bias": jnp.asarray(w[f"{name}.bias"])}


def two_layers_of(w: dict, name: str) -> dict:
    """A torch Sequential(Linear, activation, Linear)."""
    return {"hidden": affine_of(w, f"{name}.0"), "out": affine_of(w, f"{name}.2")}


def gist_of(w: dict, *, block: int, layers: int, heads: int, **form):
    """(params, cfg) of one of the fork's GistNets."""
    sequential = next((name for name in ("head.mlp", "head.proj") if f"{name}.0.weight" in w), None)
    head = two_layers_of(w, sequential) if sequential else {"out": affine_of(w, "head.proj")}
    width = head["out"]["weight"].shape[0]
    cfg = GistConfig(
        classic(layers, width, heads),
        block=block,
        head="mlp" if sequential else "linear",
        causal=True,
        residual=False,
        **form,
    )
    params = {"head": head} | ({} if cfg.kind == "mean" else {"h": stacked(cfg.gpt, w)})
    params |= {"query": jnp.asarray(w["head.query"])} if "head.query" in w else {}
    params |= {"cls": jnp.asarray(w["cls_token"][0, 0])} if "cls_token" in w else {}
    return params, cfg


def lens_of(w: dict):
    """(params, cfg) of one of the fork's LensNets: two layers, two heads, blocks of 4."""
    mlp = "scorer.0.weight" in w
    cfg = LensConfig(
        classic(2, w["level_embed.weight"].shape[1], 2), block=4, head="mlp" if mlp else "linear", causal=True
    )
    params = {
        "h": stacked(cfg.gpt, w),
        "level_embed": jnp.asarray(w["level_embed.weight"]),
        "span": two_layers_of(w, "span_mlp"),
        "distance": two_layers_of(w, "dist_mlp"),
        "scorer": two_layers_of(w, "scorer") if mlp else {"out": affine_of(w, "scorer")},
    }
    return params, cfg


def lens_as_in_the_fork(params, cfg: LensConfig, x_BWC, rope, lods, positions):
    """Spans as they are; distances are positions over the largest position of the whole batch."""
    span_BW = (4.0**lods).astype(np.float32)
    distance_BW = (positions / max(positions.max(), 1)).astype(np.float32)
    everywhere = jnp.ones(lods.shape, bool)
    return score_entries(params, cfg, jnp.asarray(x_BWC), rope, lods, span_BW, distance_BW, everywhere)


def rope_of(cos, sin):
    return jnp.asarray(cos[:, :, 0]), jnp.asarray(sin[:, :, 0])


# --- GistNet and LensNet ----------------------------------------------------------------------------------

GISTNETS = (
    "mean/linear",
    "mean/mlp",
    "transformer/mean/mlp",
    "transformer/query/linear",
    "transformer/cls/mlp",
)


def gistnet_case(z: dict, case: str):
    *kind, _ = case.split("/")
    form = {"kind": kind[0]} | ({"pooling": kind[1]} if len(kind) > 1 else {})
    return gist_of(below(z, f"{case}/w/"), block=4, layers=2, heads=2, **form)


@pytest.mark.parametrize("case", GISTNETS)
def test_gistnet(case, arrays):
    z = arrays["gistnet"]
    params, cfg = gistnet_case(z, case)
    near(encode(params, cfg, z["input"]), z[f"{case}/output"])


def test_cls_pooling_is_constant_only_where_it_is_causal(arrays):
    """The fork's first vector sees itself alone."""
    z = arrays["gistnet"]
    params, cfg = gistnet_case(z, "transformer/cls/mlp")
    assert np.ptp(z["transformer/cls/mlp/output"], axis=0).max() == 0
    assert np.ptp(encode(params, cfg, z["input"]), axis=0).max() < 1e-6
    assert np.ptp(encode(params, replace(cfg, causal=False), z["input"]), axis=0).max() > 0.1


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_lensnet(head, arrays):
    z = arrays["lensnet"]
    params, cfg = lens_of(below(z, f"{head}/w/"))
    rope = rope_of(z["cos"], z["sin"])
    near(
        lens_as_in_the_fork(params, cfg, z["embeddings"], rope, z["lods"], z["positions"]),
        z[f"{head}/scores"],
    )


def test_scores_belong_to_their_row_and_look_both_ways():
    """What the fork's do not: there a row's scores move with the other rows, and nothing to the right counts."""
    cfg = LensConfig(classic(1, 32, 2), block=4)
    params = jax.jit(partial(init_lensnet, cfg))(jax.random.key(0))
    out = params["scorer"]["out"]  # zero at the start
    out |= {"weight": jax.random.normal(jax.random.key(2), out["weight"].shape) / 10}
    x_BWC = jax.random.normal(jax.random.key(1), (2, 6, 32))
    level_BW = jnp.array([[1, 1, 0, 0, 0, 0], [2, 2, 1, 1, 0, 0]])
    node_BW = jnp.array([[0, 1, 8, 9, 10, 11], [0, 1, 8, 9, 40, 41]])
    layout = Layout(level_BW, node_BW, jnp.ones((2, 6), bool))
    moved_BWC = x_BWC.at[0, -1].add(1.0)

    @partial(jax.jit, static_argnums=0)
    def scores(cfg, x_BWC, layout=layout):
        return lens_scores(params, cfg, x_BWC, layout)

    both = scores(cfg, x_BWC)
    alone = scores(cfg, x_BWC[:1], Layout(*(x[:1] for x in layout)))
    np.testing.assert_allclose(both[:1], alone, rtol=0, atol=1e-6)
    assert (jnp.abs(scores(cfg, moved_BWC) - both)[0] > 1e-5).all()
    causal = replace(cfg, causal=True)
    change_W = jnp.abs(scores(causal, moved_BWC) - scores(causal, x_BWC))[0]
    assert change_W[:-1].max() == 0
    assert change_W[-1] > 1e-5


# --- Positions --------------------------------------------------------------------------------------------

SIZES = {"hd16_bs4_nh4": (16, 4, 4), "hd64_bs32_nh2": (64, 32, 2)}


def spread_in_the_fork(lods, base: int):
    """At least 1, so that raw tokens are damped too; ours are not."""
    return np.maximum(1.0, np.float32(base) ** lods).astype(np.float32)


def unrounded(cfg: GPTConfig, monkeypatch) -> GPTConfig:
    """The classic architecture without the rounding of its rotary tables; the fork damps, then rounds."""
    monkeypatch.setitem(ARCHS, "unrounded", replace(ARCHS["classic"], name="unrounded", rope_bf16=False))
    return replace(cfg, arch="unrounded")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "kind", ["simple", "gaussian", "gaussian_alibi", "gaussian_lod2d", "gaussian_lod2d_alibi"]
)
def test_rotary_tables(kind, size, arrays, monkeypatch):
    """The fork stands an entry at its first token and damps raw tokens; both are given to our function here."""
    z, (head_dim, block, heads) = arrays["gaussian_rope"], SIZES[size]
    theirs = below(z, f"{kind}/{size}/")
    cfg = classic(1, heads * head_dim, heads)
    plain = unrounded(cfg, monkeypatch)
    sigma = None if kind == "simple" else spread_in_the_fork(z["lods"], block)
    for name, ours in zip(
        ("cos", "sin"), gaussian_rope(plain, z["positions"], sigma, jnp.float32), strict=True
    ):
        # a frequency may round to its neighbour (powers differ between processors), which an angle multiplies
        atol = np.finfo(np.float32).eps * max(1.0, np.abs(z["positions"]).max())
        np.testing.assert_allclose(ours, theirs[f"{name}_f32_prebf16"][:, :, 0], rtol=0, atol=atol)
    half = slice(head_dim // 2)
    for name, ours in zip(
        ("cos", "sin"), gaussian_rope(cfg, z["positions"], sigma, jnp.bfloat16), strict=True
    ):
        np.testing.assert_allclose(np.float32(ours), theirs[name][:, :, 0, half], rtol=0, atol=ROUNDED)
    if "lod2d" in kind:  # more channels than a head has: their controller and our option refuse them
        with pytest.raises(UserError, match="more channels than a head"):
            check_kind(kind)
        for name, ours in zip(("cos", "sin"), rope_table(plain, z["lods"], jnp.bfloat16), strict=True):
            np.testing.assert_array_equal(np.float32(ours), theirs[name][:, :, 0, head_dim // 2 :])
    else:
        assert check_kind(kind) == kind
    if "alibi" in kind:
        np.testing.assert_array_equal(alibi_slopes(heads), theirs["alibi_slopes"].ravel())


def test_positions_of_a_working_context(arrays):
    z = arrays["wc_positional"]
    cfg = classic(1, 32, 2)
    sigma = spread_in_the_fork(z["lods"], 4)
    for name, ours in zip(
        ("cos", "sin"), gaussian_rope(cfg, z["positions"], sigma, jnp.float32), strict=True
    ):
        near_rows = z[f"sigma_base_is_block_4/{name}"][:, :, 0]
        np.testing.assert_allclose(ours, near_rows, rtol=0, atol=ROUNDED)
        for defect in ("sigma_base_is_max_length_64", "controller_alibi"):
            assert np.abs(ours - z[f"{defect}/{name}"][:, :, 0]).max() > 0.1


def test_bias_falls_with_distance(arrays):
    """The fork's grows: its sign is inverted."""
    z = arrays["wc_positional"]
    starts_BW = jnp.asarray(z["positions"])
    raw = Layout(jnp.zeros_like(starts_BW), starts_BW, jnp.ones(starts_BW.shape, bool))
    bias = alibi_bias(raw, 4, 2)
    np.testing.assert_array_equal(alibi_slopes(2), z["controller_alibi/slopes"].ravel())
    np.testing.assert_array_equal(bias, -z["controller_alibi/bias"])
    assert (bias[0, :, -1, :-1] < 0).all()


def test_vanilla_tables(arrays):
    """Of the model, and inside GistNet; exactly."""
    cfg = classic(1, 32, 2)
    tables = [below(arrays["tiny_gpt"], f"{heads}/rope_") for heads in ("mha", "gqa")]
    tables += [below(arrays["gistnet"], f"internal_rope/T{tokens}/") for tokens in (4, 5)]
    for theirs in tables:
        ours = rope_table(cfg, jnp.arange(theirs["cos"].shape[1]), jnp.float32)
        np.testing.assert_array_equal(ours[0], theirs["cos"][0, :, 0])
        np.testing.assert_array_equal(ours[1], theirs["sin"][0, :, 0])


@pytest.mark.parametrize("arch", ["classic", "latest", "pocket"])
@pytest.mark.parametrize("kind", KINDS)
def test_raw_tokens_have_the_tables_of_the_vanilla_model(kind, arch):
    cfg = replace(classic(1, 32, 2), arch=arch)
    for dtype in (jnp.float32, jnp.bfloat16):
        ours = entry_rope(cfg, raw_layout(1, 300), 4, kind, dtype)
        vanilla = rope_table(cfg, jnp.arange(300), dtype)
        for a, b in zip(ours, vanilla, strict=True):
            np.testing.assert_array_equal(a[0], b)


# --- Levels and widths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["meanpool", "gistnet"])
def test_levels(network, arrays):
    z = arrays["tree"]
    params, cfg = gist_of(below(z, "gist_w/"), block=4, layers=1, heads=2)
    encoder = partial(encode, params, cfg) if network == "gistnet" else lambda x_NKC: x_NKC.mean(1)
    tables = build_levels(encoder, z["embed_table"][z["tokens"]], 4, 2)
    for level in (1, 2):
        near(tables[level], z[f"{network}/level{level}"])
        node = jnp.broadcast_to(jnp.arange(tables[level].shape[1]), tables[level].shape[:2])
        begin = starts(Layout(jnp.full_like(node, level), node, node >= 0), 4)
        np.testing.assert_array_equal(begin, z[f"meanpool/pos{level}"])


def test_levels_of_a_longer_sequence(arrays):
    """What the fork has after appending token by token, and after building anew."""
    z = arrays["tree"]
    params, cfg = gist_of(below(z, "gist_w/"), block=4, layers=1, heads=2)
    tokens = np.concatenate([z["tokens"], z["append_tokens"]], axis=1)
    tables = build_levels(partial(encode, params, cfg), z["embed_table"][tokens], 4, 2)
    for level in (1, 2):
        near(tables[level], z[f"gistnet_after_single_appends/level{level}"])
        near(tables[level], z[f"gistnet_full_rebuild/level{level}"])


def test_reachable_widths(arrays):
    """Also with a raw tail: then the same width, or none where aligned blocks do not suffice."""
    rows = arrays["misc"][
        "wc_length_schedule__maxlen_bs_cliTrainWc_effTrainWc_progress_ntok_target_reachable"
    ]
    refused = set()
    for longest, block, *_, tokens, target, reachable in rows:
        shape = {"tokens": int(tokens), "block": int(block), "levels": 2}
        assert reachable_width(int(target), recent=0, **shape) == reachable
        try:
            assert reachable_width(int(target), recent=int(longest) // 8, **shape) == reachable
        except UserError:
            refused.add((int(tokens), int(block), int(target)))
    assert refused == {(64, 4, 12)}  # 14 blocks and 3 of 4 blocks before the tail leave 13 entries


# --- The model over entries -------------------------------------------------------------------------------


def model_of(z: dict, heads: str):
    w = below(z, f"{heads}/w/")
    cfg = classic(2, 32, 2, n_kv_head=2 if heads == "mha" else 1)
    blocks = {name.replace("transformer.h.", "blocks."): x for name, x in w.items()}
    params = {"wte": w["transformer.wte.weight"], "lm_head": w["lm_head.weight"], "h": stacked(cfg, blocks)}
    return jax.tree.map(jnp.asarray, params), cfg, below(z, f"{heads}/")


def head_of(params, cfg: GPTConfig, x_BTC):
    return capped_logits(x_BTC, params["lm_head"], cfg.logit_cap, cfg.vocab_size)


@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_model_over_entries(heads, arrays):
    """The fork norms what stands in for embeddings as it norms embeddings."""
    params, cfg, z = model_of(arrays["tiny_gpt"], heads)
    near(forward(params, cfg, z["idx"]), z["logits_vanilla"])
    rope = rope_of(z["cos_override"], z["sin_override"])
    tokens = Entries(embed(params, z["idx"], jnp.float32), rope, {})
    near(head_of(params, cfg, run_trunk(params, cfg, tokens)), z["logits_override_tokens"])
    given = Entries(rms_norm(jnp.asarray(z["inputs_embeds"])), rope, {})
    x_BTC = run_trunk(params, cfg, given)
    near(head_of(params, cfg, x_BTC), z["logits_override_embeds"])
    nll_BT = reference_nll(x_BTC, params["lm_head"], z["targets"], cfg.logit_cap, cfg.vocab_size)
    near(nll_BT.ravel(), z["loss_none_override_embeds"])
    if heads == "mha":
        biased = partial(biased_attention, jnp.asarray(z["alibi_override"]))
        x_BTC = run_trunk(params, cfg, given, attention=biased)
        near(head_of(params, cfg, x_BTC), z["logits_override_embeds_alibi"])


@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_vanilla_loss(heads, arrays):
    params, cfg, z = model_of(arrays["tiny_gpt"], heads)
    entries = Entries(embed(params, z["idx"], jnp.float32), rope_table(cfg, jnp.arange(12), jnp.float32), {})
    x_BTC = run_trunk(params, cfg, entries, attention=reference_attention)
    nll_BT = reference_nll(x_BTC, params["lm_head"], z["targets"], cfg.logit_cap, cfg.vocab_size)
    near(nll_BT.ravel(), z["loss_none_vanilla"])
    near(nll_BT.sum() / (z["targets"] >= 0).sum(), z["loss_mean_vanilla"])
