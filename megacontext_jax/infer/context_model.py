"""Decoding from a working context: a prompt longer than the budget enters in gists and the raw spans a lens chose.

The prompt is laid out raw, the oldest blocks are collapsed until it fits, then the lens refocuses; answers follow
raw. Rows of a batch have their own lengths. Sessions that go on and refocus on the way are another matter.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from megacontext_jax.context.allocator import AllocatorConfig, new_focus, refocus, refocus_many
from megacontext_jax.context.entries import layout_entries, pick
from megacontext_jax.context.layout import Layout, raw_layout, starts
from megacontext_jax.context.lenses import LENSES, View
from megacontext_jax.context.objective import ContextObjective
from megacontext_jax.context.tree import gather
from megacontext_jax.infer.model import GPTDecoder, Model, prepare_params
from megacontext_jax.model import decode


@dataclass(frozen=True)
class ContextDecoder:
    """A `Decoder` over {"decode": prepared weights, "train": the training pytree}."""

    inner: GPTDecoder
    objective: ContextObjective
    allocator: AllocatorConfig
    budget: int
    lens: str
    iterations: int

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    @property
    def window(self) -> int:
        return self.inner.window

    def init_cache(self, batch, slots):
        return self.inner.init_cache(batch, slots)

    def prefill(self, params, ids_BT, length_B, cache):
        objective, full = self.objective, params["train"]
        block = objective.context.block
        tables = objective.tables(full, ids_BT)
        layout = self.layout(full, tables, ids_BT, length_B)
        entries = layout_entries(
            full, objective.cfg, tables, ids_BT, layout, block=block, positions=objective.context.positions
        )
        raw_BW = layout.level_BW == 0
        ids_BW = pick(ids_BT, jnp.where(raw_BW, starts(layout, block), 0))
        # what follows goes on counting tokens, or entries where these are the positions
        seen_B = layout.count_B if objective.context.positions == "rank" else length_B
        prompt = decode.Prompt(ids_BW, seen_B, raw_BW, gather(tables, layout))
        return decode.prefill_entries(
            params["decode"],
            objective.cfg,
            entries,
            prompt,
            layout.count_B,
            cache,
            attention=self.inner.attention,
        )

    def layout(self, params, tables, ids_BT, length_B) -> Layout:
        """Working contexts of prompts of `length_B` tokens, in as many places as the padded prompt has."""
        B, T = ids_BT.shape
        cfg = self.allocator
        raw = raw_layout(B, T)
        focus = new_focus(raw._replace(valid_BW=raw.valid_BW & (raw.node_BW < length_B[:, None])), cfg)
        oldest_first_BW = starts(focus.layout, cfg.block) / T - 1.0
        focus, _ = refocus(focus, oldest_first_BW, cfg, budget=self.budget, tokens=length_B)
        if self.iterations == 0:
            return focus.layout
        focus = new_focus(focus.layout, cfg)

        def score(layout):
            return LENSES[self.lens](View(self.objective, params, tables, ids_BT, layout, jax.random.key(0)))

        focus, _ = refocus_many(
            focus, score, cfg, budget=self.budget, tokens=length_B, iterations=self.iterations
        )
        return focus.layout

    def decode_step(self, params, ids_B, cache):
        return self.inner.decode_step(params["decode"], ids_B, cache)


def context_model(params: Any, decoder: ContextDecoder) -> Model:
    """A model with MegaContext ready to generate from working contexts."""
    return Model(decoder, {"decode": prepare_params(params, decoder.inner.dtype), "train": params})
