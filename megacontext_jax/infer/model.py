"""What engine and sessions ask of a model: pure functions over a cache of static shape."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from megacontext_jax.model import decode
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.attention import AttentionFn, reference_attention


class Region(NamedTuple):
    """A stretch of history shown at one level of detail: tokens [start, stop), in `entries` entries."""

    level: int
    start: int
    stop: int
    entries: int
    score: float | None = None  # mean of the lens's scores, where there is a lens


class Decoder(Hashable, Protocol):
    """The functions of a model; equal decoders share their compiled programs.

    A cache is a NamedTuple of arrays with the rows on axis 0 and a field `length_B`, the number of tokens
    each row has seen.
    """

    vocab_size: int
    window: int  # most tokens of a sequence, prompt included

    def init_cache(self, batch: int, slots: int) -> Any: ...

    def prefill(self, params, ids_BT, length_B, cache) -> tuple[jax.Array, Any]:
        """Logits [B, V] after each right-padded prompt, and the filled cache."""

    def decode_step(self, params, ids_B, cache) -> tuple[jax.Array, Any]:
        """Logits [B, V] after one more token per row, and the cache."""

    def extend(self, params, ids_BT, count_B, cache) -> tuple[jax.Array, Any]:
        """Logits [B, V] after `count_B` >= 1 more tokens per row, right-padded, and the cache."""

    def regions(self, tokens: int) -> list[Region]:
        """How the next token sees a history of `tokens` tokens, oldest first."""


F32 = np.dtype("float32")


class Model(NamedTuple):
    """A decoder and its parameters."""

    decoder: Decoder
    params: Any


@dataclass(frozen=True)
class GPTDecoder:
    """The GPT of `model/`, with one choice of prefill attention and activation dtype."""

    cfg: GPTConfig
    attention: AttentionFn = reference_attention
    dtype: np.dtype = F32

    @property
    def vocab_size(self) -> int:
        return self.cfg.vocab_size

    @property
    def window(self) -> int:
        return self.cfg.sequence_len

    def init_cache(self, batch, slots):
        return decode.init_cache(self.cfg, batch, slots, self.dtype)

    def prefill(self, params, ids_BT, length_B, cache):
        return decode.prefill(
            params, self.cfg, ids_BT, length_B, cache, attention=self.attention, dtype=self.dtype
        )

    def decode_step(self, params, ids_B, cache):
        return decode.decode_step(params, self.cfg, ids_B, cache, dtype=self.dtype)

    def extend(self, params, ids_BT, count_B, cache):
        return decode.extend(params, self.cfg, ids_BT, count_B, cache, dtype=self.dtype)

    def regions(self, tokens: int) -> list[Region]:
        begin = max(0, tokens - max(self.cfg.windows()) - 1)
        return [Region(0, begin, tokens, tokens - begin)]


def gpt_model(
    params, cfg: GPTConfig, *, attention: AttentionFn = reference_attention, dtype="float32"
) -> Model:
    """A GPT ready to generate: weights in the dtype they are used in, one array per layer.

    `params` is the training pytree (float32, layers stacked). Casting once matters: decoding reads every
    weight for every token.
    """
    dtype = np.dtype(dtype)
    return Model(GPTDecoder(cfg, attention, dtype), prepare_params(params, dtype))


@partial(jax.jit, static_argnums=1)
def prepare_params(params, dtype: np.dtype):
    """The weights as `decode` reads them, cast to `dtype`; GistNet and LensNet are left out."""
    params = {name: x for name, x in params.items() if name not in ("gistnet", "lensnet")}
    # scales of single numbers stay float32, as in training
    return decode.unstack_layers(jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 1 else w, params))
