"""The device's part of a memory in a flat working context: programs of fixed shapes, compiled once per configuration.

Shape suffixes: P places, T entries of a piece, Q queries whose looks are kept, C width, V vocabulary.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.context.allocator import AllocatorConfig, Focus, refocus, refocus_many
from megacontext_jax.context.layout import Layout, starts
from megacontext_jax.context.lenses import bm25, standard
from megacontext_jax.context.objective import ContextObjective
from megacontext_jax.context.positions import centres, gaussian_rope, spreads
from megacontext_jax.infer.model import GPTDecoder
from megacontext_jax.model import decode, gpt
from megacontext_jax.model.gpt import Entries

# entries whose keys are computed at a time, compiled once each
PIECES = (32, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class FocusConfig:
    """How a working context is kept; hashable, one set of compiled programs each."""

    decoder: GPTDecoder
    objective: ContextObjective
    allocator: AllocatorConfig
    budget: int  # entries after a refocus
    lens: str = "learned"
    interval: int = 32  # tokens between refocuses
    iterations: int = 2  # rounds of edits of a refocus on the way, by one look
    rebuild_iterations: int = 8  # most of one before an answer
    rebuild_edits: int = 4  # per iteration of it
    recompute: float = 1.5  # entries per decoded token whose keys edits on the way may make anew, on average

    @property
    def block(self) -> int:
        return self.objective.context.block

    @property
    def positions(self) -> str:
        return self.objective.context.positions

    @cached_property
    def places(self) -> int:
        """Slots of the cache: the budget, and what may be appended before the next refocus."""
        return self.budget + max(32, self.interval) + 32

    @cached_property
    def pieces(self) -> tuple[int, ...]:
        """Sizes of the pieces in which keys are computed."""
        return *(s for s in PIECES if s < self.places), min(PIECES[-1], self.places)


class Piece(NamedTuple):
    """Entries of one context side by side, right-padded, with all that the model reads of them."""

    level_1T: np.ndarray
    node_1T: np.ndarray
    ids_1T: np.ndarray  # tokens; 0 for gists
    before_1T: np.ndarray  # the token before, shown or not; -1 for none
    gists_1TC: np.ndarray  # zeros for tokens
    count_1: np.ndarray  # entries that are there

    @property
    def layout(self) -> Layout:
        valid_1T = jnp.arange(self.level_1T.shape[1]) < self.count_1[:, None]
        return Layout(jnp.asarray(self.level_1T), jnp.asarray(self.node_1T), valid_1T)


def any_piece(cfg: FocusConfig, size: int) -> Piece:
    """One token in a piece of this size, to compile with."""
    zeros_1T = np.zeros((1, size), np.int32)
    gists_1TC = np.zeros((1, size, cfg.objective.cfg.n_embd), np.float32)
    return Piece(zeros_1T, zeros_1T, zeros_1T, zeros_1T - 1, gists_1TC, np.ones(1, np.int32))


def _rows(params, piece: Piece, dtype):
    """The rows of the level tables that a piece shows, [1, T, C]."""
    e_1TC = gpt.embed(params, piece.ids_1T, dtype)
    return jnp.where((piece.level_1T == 0)[..., None], e_1TC, piece.gists_1TC.astype(dtype))


@partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def extend(params, piece: Piece, tokens_1, cache, *, cfg: FocusConfig):
    """Appends entries to the cache; `tokens_1` is the end of the last one's span."""
    params, model, dtype = params["decode"], cfg.objective.cfg, cfg.decoder.dtype
    x_1TC = e_1TC = _rows(params, piece, dtype)
    raw_1T = piece.level_1T == 0
    if "smear_gate" in params:
        before_1TC = gpt.embed(params, jnp.maximum(piece.before_1T, 0), dtype)
        smeared_1T = raw_1T & (piece.before_1T >= 0)
        x_1TC = gpt.smear(params, x_1TC, before_1TC * smeared_1T[..., None].astype(dtype))
    layout = piece.layout
    mu_1T, fraction_1T = centres(layout, cfg.block, cfg.positions)
    if cfg.positions == "rank":  # the piece begins behind what the cache holds
        mu_1T = mu_1T + cache.length_B[:, None]
    sigma_1T = None if cfg.positions == "simple" else spreads(layout, cfg.block)
    rope = gaussian_rope(model, mu_1T, sigma_1T, dtype, fraction_1T)
    if cfg.positions == "rank":  # what is decoded next goes on counting entries
        tokens_1 = cache.length_B + piece.count_1
    prompt = decode.Prompt(piece.ids_1T, tokens_1, raw_1T, e_1TC)
    return decode.extend_entries(params, model, Entries(x_1TC, rope, {}), prompt, piece.count_1, cache)


@partial(jax.jit, static_argnames=("cfg", "allocator", "passes"))
def edit(
    params,
    piece: Piece,
    age_1P,
    looks_1QP,
    tf_1QP,
    tokens_1,
    first,
    call,
    *,
    cfg: FocusConfig,
    allocator: AllocatorConfig,
    passes: int,
):
    """One look and `passes` rounds of edits by it, at the place `first` or behind, the budget aside: (focus after them,
    statistics, scores [1, P] before, those after)."""
    layout, key = piece.layout, jax.random.key(call)
    mass_1P = looks_1QP.sum(1)
    match cfg.lens:
        case "learned":
            x_1PC = _rows(params["train"], piece, cfg.decoder.dtype)
            scores_1P = cfg.objective.entry_scores(params["train"], x_1PC, layout, mass_1P)
        case "attention":
            scores_1P = standard(mass_1P, layout)
        case "lexical":
            scores_1P = bm25(tf_1QP, layout)
        case "random":
            scores_1P = standard(jax.random.normal(key, mass_1P.shape), layout)
        case _:
            scores_1P = _by_recency(layout, tokens_1, cfg.block)

    def of_this_look(edited: Layout):
        """An entry that an edit made has the score of what began where it begins."""
        before_P = jnp.where(layout.valid_BW, starts(layout, cfg.block), tokens_1[:, None])[0]
        at_P = jnp.searchsorted(before_P, starts(edited, cfg.block)[0], side="right") - 1
        return jnp.where(edited.valid_BW, scores_1P[:, at_P], 0.0)

    focus, stats = refocus_many(
        Focus(layout, age_1P),
        of_this_look,
        allocator,
        budget=cfg.budget,
        tokens=tokens_1,
        iterations=passes,
        first=first,
        key=key,
    )
    return focus, stats, scores_1P, of_this_look(focus.layout)


@partial(jax.jit, static_argnames="cfg")
def collapse_oldest(level_1P, node_1P, count_1, age_1P, tokens_1, *, cfg: FocusConfig) -> Focus:
    """The context within its budget, the oldest collapsed first; no lens looks."""
    valid_1P = jnp.arange(level_1P.shape[1]) < count_1[:, None]
    layout = Layout(level_1P, node_1P, valid_1P)
    scores_1P = _by_recency(layout, tokens_1, cfg.block)
    return refocus(Focus(layout, age_1P), scores_1P, cfg.allocator, budget=cfg.budget, tokens=tokens_1)[0]


@partial(jax.jit, static_argnames="cfg")
def collapse_unimportant(params, piece: Piece, age_1P, tokens_1, *, cfg: FocusConfig) -> Focus:
    """The context within its budget, by LensNet's scores of what the entries hold."""
    x_1PC = _rows(params["train"], piece, cfg.decoder.dtype)
    scores_1P = cfg.objective.entry_scores(params["train"], x_1PC, piece.layout, None)
    # it has read no question: nothing opens, and what is let go of could not come back
    allocator = replace(cfg.allocator, max_replacements=0, slack=0)
    return refocus(Focus(piece.layout, age_1P), scores_1P, allocator, budget=cfg.budget, tokens=tokens_1)[0]


def _by_recency(layout: Layout, tokens_1, block: int):
    """Below 0 and higher for the newer."""
    return jnp.where(layout.valid_BW, starts(layout, block) / tokens_1[:, None] - 1.0, 0.0)
