"""The working context of a history as a model uses it: laid out by recency, then refocused by a lens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from megacontext_jax.context.allocator import AllocatorConfig, EditStats, new_focus, refocus_many
from megacontext_jax.context.layout import Layout, compress, fewest_entries, reachable_width
from megacontext_jax.context.lenses import LENSES, View


class Focused(NamedTuple):
    layout: Layout
    before: Layout
    stats: EditStats


def seed_layout(rows: int, tokens: int, budget: int, cfg: AllocatorConfig, spare: float = 0.0) -> Layout:
    """Newest raw, then gists, the oldest coarsest, with `budget` places of which a share may be spare.

    The share is of what lies between the smallest possible context and the budget: places for expansions.
    """
    options = {"block": cfg.block, "levels": cfg.max_level, "recent": cfg.recent}
    most = reachable_width(min(tokens, budget), tokens, **options)
    fewest = fewest_entries(tokens, **options)
    width = reachable_width(round(most - spare * (most - fewest)), tokens, **options)
    layout = compress(jax.random.key(0), rows, tokens, width, oldest_first=True, **options).layout
    return Layout(*(jnp.pad(x, ((0, 0), (0, max(0, budget - width)))) for x in layout))


def focus(
    objective,
    params,
    tables,
    ids_RT,
    cfg: AllocatorConfig,
    *,
    budget: int,
    lens: str,
    iterations: int,
    spare: float = 0.0,
    key=None,
    fact_RT=None,
) -> Focused:
    """A working context of the whole history `ids_RT` [R, T] with at most `budget` entries."""
    R, T = ids_RT.shape
    key = jax.random.key(0) if key is None else key
    seed = seed_layout(R, T, budget, cfg, spare)

    def score(layout):
        return LENSES[lens](View(objective, params, tables, ids_RT, layout, key, fact_RT))

    focused, stats = refocus_many(
        new_focus(seed, cfg), score, cfg, budget=budget, tokens=T, iterations=iterations, key=key
    )
    return Focused(focused.layout, seed, stats)
