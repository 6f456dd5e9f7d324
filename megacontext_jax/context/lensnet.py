"""LensNet: a score in (-1, 1) for every entry of a working context; above 0 expand, below 0 collapse.

Bidirectional blocks of the model over the entries, then what an entry is (level, span, distance to the cursor)
beside what it holds, and how much the model itself looks at it. It begins as the last alone, the lens
`attention`, and learns where that is wrong. Features belong to their row alone: a score does not depend on the other rows of a batch.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from megacontext_jax.context.blocks import init_blocks, init_linear, masked_attention, run_blocks
from megacontext_jax.context.gistnet import affine
from megacontext_jax.context.layout import Layout, last_tokens, spans
from megacontext_jax.context.looks import standardised
from megacontext_jax.context.positions import entry_rope
from megacontext_jax.errors import UserError
from megacontext_jax.model.arch import GPTConfig

HEADS = ("mlp", "linear")


@dataclass(frozen=True)
class LensConfig:
    gpt: GPTConfig  # the blocks
    block: int = 32
    head: str = "mlp"
    max_level: int = 2
    causal: bool = False  # as in the PyTorch fork

    def __post_init__(self):
        if self.head not in HEADS:
            raise UserError(f"--lensnet-head does not take {self.head!r}; choose one of {', '.join(HEADS)}.")

    def flops_per_entry(self, width: int) -> int:
        """Training FLOPs of one entry among `width`."""
        C = self.gpt.n_embd
        scorer = 2 * C * max(C, 128) if self.head == "mlp" else 2 * C
        return self.gpt.n_layer * (6 * 12 * C * C + 12 * C * width) + 6 * (scorer + 2 * C * C)


def init_lensnet(cfg: LensConfig, key) -> dict:
    C = cfg.gpt.n_embd
    keys = jax.random.split(key, 8)
    hidden = max(C, 128)
    scorer = {"out": init_linear(keys[1], 1, 2 * C)}
    if cfg.head == "mlp":
        scorer = {"hidden": init_linear(keys[1], hidden, 2 * C), "out": init_linear(keys[2], 1, hidden)}
    return {
        "h": init_blocks(cfg.gpt, keys[0]),
        "level_embed": jax.random.normal(keys[3], (max(4, cfg.max_level + 1), C)),
        "span": {"hidden": init_linear(keys[4], C, 1), "out": init_linear(keys[5], C, C)},
        "distance": {"hidden": init_linear(keys[6], C, 1), "out": init_linear(keys[7], C, C)},
        "scorer": scorer | {"out": jax.tree.map(jnp.zeros_like, scorer["out"])},
        "looks": jnp.ones(2),  # raw entries, gists
    }


def lens_scores(
    params: dict,
    cfg: LensConfig,
    x_BWC,
    layout: Layout,
    kind: str = "gaussian",
    mass_BW=None,
    longest: int | None = None,
):
    """float32 scores [B, W] of the entries `x_BWC` of a layout; 0 at invalid places.

    `mass_BW` is the model's attention on every entry; the PyTorch fork's LensNet has none. What is further away than
    `longest`, the rows of training, or of a higher level than theirs, looks as if it were just as far and as high.
    """
    end_BW = last_tokens(layout, cfg.block)
    cursor_B1 = jnp.max(jnp.where(layout.valid_BW, end_BW, 0), axis=-1, keepdims=True)
    distance_BW = jnp.clip(cursor_B1 - end_BW, 0, longest)
    distance_BW = jnp.log1p(distance_BW.astype(jnp.float32)) / 8
    known_BW = jnp.minimum(layout.level_BW, cfg.max_level)
    span_BW = jnp.log(spans(known_BW, cfg.block).astype(jnp.float32)) / 8
    rope = entry_rope(cfg.gpt, layout, cfg.block, kind, x_BWC.dtype)
    looks_BW = 0.0
    if mass_BW is not None:
        gain_BW = params["looks"][jnp.minimum(layout.level_BW, 1)]
        looks_BW = gain_BW * standardised(mass_BW, layout)
    scores_BW = score_entries(
        params, cfg, x_BWC, rope, known_BW, span_BW, distance_BW, layout.valid_BW, looks_BW
    )
    return jnp.where(layout.valid_BW, scores_BW, 0.0)


def score_entries(
    params, cfg: LensConfig, x_BWC, rope, level_BW, span_BW, distance_BW, valid_BW, looks_BW=0.0
):
    """The network itself, on features that are given; `looks_BW` is added before the squashing."""
    visible = valid_BW[:, None, None, :]
    if cfg.causal:
        W = valid_BW.shape[-1]
        visible = visible & (jnp.arange(W)[:, None] >= jnp.arange(W))
    h_BWC = run_blocks(params["h"], cfg.gpt, x_BWC, rope, partial(masked_attention, visible=visible))
    features_BWC = params["level_embed"].astype(x_BWC.dtype)[level_BW]
    for name, value_BW in (("span", span_BW), ("distance", distance_BW)):
        hidden = jax.nn.silu(affine(params[name]["hidden"], value_BW[..., None].astype(x_BWC.dtype)))
        features_BWC += affine(params[name]["out"], hidden)
    both = jnp.concatenate([h_BWC, features_BWC], axis=-1)
    if "hidden" in params["scorer"]:
        both = jax.nn.relu(affine(params["scorer"]["hidden"], both))
    return jnp.tanh(affine(params["scorer"]["out"], both)[..., 0].astype(jnp.float32) + looks_BW)
