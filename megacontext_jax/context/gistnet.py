"""GistNet: a block of K vectors becomes one. The same weights serve every level.

`mean` only pools and is the baseline of every table; `transformer` runs the model's own block, bidirectional
inside the span, then pools and projects. In the residual form the projection starts at zero and is added to a mean
of the block, weighted per place and channel, so that training starts from what the block holds. Shape suffixes: N blocks, K vectors, C width.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from megacontext_jax.context import head_places
from megacontext_jax.context.blocks import init_blocks, init_linear, run_blocks, span_attention
from megacontext_jax.errors import UserError
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.decode import unstack
from megacontext_jax.model.gpt import linear, rms_norm, rope_table

KINDS, POOLINGS, HEADS = ("transformer", "mean"), ("mean", "query", "cls"), ("linear", "mlp", "none")
FORECASTS = ("expected", "direct")


@dataclass(frozen=True)
class GistConfig:
    """`causal`, `residual=False` and `kind="mean"` with a head describe the networks of the PyTorch fork."""

    gpt: GPTConfig  # the blocks: layers, width, heads, sharpness of attention, rotary base
    block: int = 32
    kind: str = "transformer"
    pooling: str = "mean"
    head: str = "mlp"
    causal: bool = False
    residual: bool = True  # added to the mean, then normed; otherwise the projection alone
    forecast: str = "expected"  # of the next gist: embedding that the head expects, or a direct projection
    # layers and key heads of a model whose heads have places (`head_places`); 0: all heads read gists alike
    read_layers: int = 0
    read_heads: int = 0

    def __post_init__(self):
        for what, value, known in (
            ("gistnet-type", self.kind, KINDS),
            ("gistnet-pooling", self.pooling, POOLINGS),
            ("gistnet-head", self.head, HEADS),
            ("mc-forecast", self.forecast, FORECASTS),
        ):
            if value not in known:
                raise UserError(f"--{what} does not take {value!r}; choose one of {', '.join(known)}.")
        if self.block < 2:
            raise UserError(f"--block-size {self.block} must be at least 2 tokens.")

    def flops_per_block(self) -> int:
        """Training FLOPs of one block: 6 per weight that multiplies, 12 per attention entry."""
        C, rows = self.gpt.n_embd, self.block + (self.pooling == "cls")
        head = {"linear": C * C, "mlp": 4 * C * C, "none": 0}[self.head]
        if self.kind == "mean":
            return 6 * head
        return self.gpt.n_layer * (6 * 12 * C * C + 12 * C * rows) * rows + 6 * head


def init_gistnet(cfg: GistConfig, key) -> dict:
    C = cfg.gpt.n_embd
    keys = jax.random.split(key, 4)
    params = {} if cfg.kind == "mean" else {"h": init_blocks(cfg.gpt, keys[0])}
    if cfg.kind != "mean" and cfg.pooling == "query":
        params["query"] = jax.random.normal(keys[1], (C,))
    if cfg.kind != "mean" and cfg.residual:
        params["places"] = _own_channels(cfg.block, C)
    if cfg.kind != "mean" and cfg.pooling == "cls":
        params["cls"] = jax.random.normal(keys[1], (C,))
    last = 0.0 if cfg.residual else 1.0
    if cfg.head == "linear":
        params["head"] = {"out": init_linear(keys[2], C, C, last)}
    elif cfg.head == "mlp":
        params["head"] = {
            "hidden": init_linear(keys[3], 2 * C, C),
            "out": init_linear(keys[2], C, 2 * C, last),
        }
    if cfg.read_heads:
        params["reading"] = head_places.init_reading(cfg.read_layers, cfg.read_heads, cfg.block, C)
    if cfg.forecast == "direct":
        params["forecast"] = jnp.eye(C)  # the next gist is like this one
    return params


def _own_channels(places: int, channels: int):
    """Weights [places, channels] under which every place of a block fills its own share of the channels.

    A plain mean forgets which value stood beside which key, and training does not leave that plateau by itself:
    no first step tells one place from another. Measured on associative recall in docs/performance.md.
    """
    own = jnp.arange(channels) % places == jnp.arange(places)[:, None]
    return math.sqrt(places) * own.astype(jnp.float32)


@jax.jit
def prepare(params: dict) -> dict:
    """The parameters as `encode` reads them fastest one block at a time: for inference."""
    return params | {"h": unstack(params["h"])} if "h" in params else params


def encode(params: dict, cfg: GistConfig, x_NKC):
    """Gists [N, C] of blocks [N, K, C], in the dtype of the blocks; `params` as trained, or from `prepare`."""
    places_KC = params["places"].astype(x_NKC.dtype) if "places" in params else 1.0
    mean_NC = jnp.mean(places_KC * x_NKC, axis=1)
    pooled_NC = mean_NC if cfg.kind == "mean" else _pool(params, cfg, x_NKC)
    gist_NC = _head(params.get("head", {}), pooled_NC)
    if not cfg.residual:
        return gist_NC
    if cfg.kind == "mean" and cfg.head == "none":
        return rms_norm(mean_NC)
    return rms_norm(mean_NC + gist_NC)


def _pool(params, cfg: GistConfig, x_NKC):
    N, _, C = x_NKC.shape
    if cfg.pooling == "cls":
        cls_N1C = jnp.broadcast_to(params["cls"].astype(x_NKC.dtype), (N, 1, C))
        x_NKC = jnp.concatenate([cls_N1C, x_NKC], axis=1)
    rope = rope_table(cfg.gpt, jnp.arange(x_NKC.shape[1]), x_NKC.dtype)
    x_NKC = run_blocks(params["h"], cfg.gpt, x_NKC, rope, partial(span_attention, causal=cfg.causal))
    if cfg.pooling == "cls":
        return x_NKC[:, 0]
    if cfg.pooling == "mean":
        places_KC = params["places"].astype(x_NKC.dtype) if cfg.residual else 1.0
        return jnp.mean(places_KC * x_NKC, axis=1)
    score_NK = jnp.einsum("nkc,c->nk", x_NKC, params["query"].astype(x_NKC.dtype))
    weight_NK = jax.nn.softmax(score_NK.astype(jnp.float32), axis=-1).astype(x_NKC.dtype)
    return jnp.einsum("nk,nkc->nc", weight_NK, x_NKC)


def _head(head: dict, x_NC):
    if "hidden" in head:
        x_NC = jax.nn.relu(affine(head["hidden"], x_NC))
    return affine(head["out"], x_NC) if "out" in head else x_NC


def affine(layer: dict, x):
    return linear(x, layer["weight"]) + layer["bias"].astype(x.dtype)
