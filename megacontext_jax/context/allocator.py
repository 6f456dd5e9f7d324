"""The focus allocator: which entries of a working context expand, which blocks collapse, inside a budget.

One iteration is a pure function of layout, scores and ages. Expansions and collapses queue separately; every
expansion takes block - 1 places and every collapse frees as many, so that a full context is refocused by swaps of
net zero. Shape suffixes: B rows, W places.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from megacontext_jax.context.layout import Layout, spans, starts
from megacontext_jax.errors import UserError

KINDS = ("greedy", "stochastic_greedy")


@dataclass(frozen=True)
class AllocatorConfig:
    block: int
    max_level: int
    recent: int = 128  # newest tokens, never collapsed
    kind: str = "greedy"
    expand_threshold: float = 0.1
    collapse_threshold: float = 0.1
    max_replacements: int = 4  # edits per iteration
    top_k: int = 4  # stochastic_greedy: candidates of a draw
    temperature: float = 1.0
    cooldown: int = 2  # iterations in which what an edit made is left alone
    hysteresis: float = 0.2  # score that a swap must gain
    edit_cost: float = 0.0  # score per share of the context behind the edit, whose cache it invalidates

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(
                f"--allocator-type does not take {self.kind!r}; choose one of {', '.join(KINDS)}."
            )


class Focus(NamedTuple):
    layout: Layout
    age_BW: (
        jax.Array
    )  # iterations since an edit made the entry; at the start `cooldown`, so that all may be edited


class EditStats(NamedTuple):
    expands_B: jax.Array
    collapses_B: jax.Array
    swap_rate_B: jax.Array  # edits over entries before
    utilization_B: jax.Array  # entries after over the budget
    residency_mean_B: jax.Array  # iterations the entries have stayed
    residency_p95_B: jax.Array


def new_focus(layout: Layout, cfg: AllocatorConfig) -> Focus:
    return Focus(layout, jnp.full(layout.level_BW.shape, cfg.cooldown, jnp.int32))


def refocus(
    focus: Focus, score_BW, cfg: AllocatorConfig, *, budget, tokens, key=None
) -> tuple[Focus, EditStats]:
    """One iteration. `budget` and `tokens` (of the whole history) are numbers or [B].

    Scores above 0 ask to expand, below 0 to collapse. Within the budget at most `max_replacements` edits are made,
    the most wanted expansions first; one that does not fit is paid for by the most wanted collapse, if the two
    scores are `hysteresis` apart. Nothing collapses for its own sake. Over the budget the lowest groups collapse,
    as many as it takes or as there are, and nothing expands.
    """
    layout, age_BW = focus
    B, W = score_BW.shape
    K = cfg.block
    budget_B = jnp.broadcast_to(jnp.asarray(budget, jnp.int32), (B,))
    tokens_B1 = jnp.broadcast_to(jnp.asarray(tokens, jnp.int32), (B,))[:, None]
    count_B = layout.count_B
    behind_BW = 1.0 - jnp.arange(W) / jnp.maximum(count_B[:, None], 1)  # share of the context behind an entry
    rested_BW = layout.valid_BW & (age_BW >= cfg.cooldown)
    gain_BW = score_BW - cfg.edit_cost * behind_BW
    expand_BW = rested_BW & (layout.level_BW > 0) & (gain_BW >= cfg.expand_threshold)

    group_BW = _groups(layout, K, cfg.max_level, tokens_B1 - cfg.recent)
    loss_BW = _window_sum(score_BW, K) / K + cfg.edit_cost * behind_BW
    idle_BW = group_BW & (_window_sum(rested_BW, K) == K) & (_window_sum(expand_BW, K) == 0)
    collapse_BW = idle_BW & (loss_BW <= -cfg.collapse_threshold)

    # over the budget
    over_B = jnp.maximum(count_B - budget_B, 0)
    needed_B = -(-over_B // (K - 1))
    order_BW = jnp.argsort(jnp.where(group_BW, loss_BW, jnp.inf), axis=1)
    forced_BW = group_BW & (jnp.argsort(order_BW, axis=1) < needed_B[:, None])

    # within it
    key = jax.random.key(0) if key is None else key

    def edit(i, carry):
        expand_BW, collapse_BW, chosen_BW, folded_BW, room_B, left_B = carry
        up_B, up_score_B = _best(gain_BW, expand_BW, cfg, jax.random.fold_in(key, 2 * i))
        down_B, down_score_B = _best(-loss_BW, collapse_BW, cfg, jax.random.fold_in(key, 2 * i + 1))
        fits_B = room_B >= K - 1
        swap_B = ~fits_B & (left_B >= 2) & (up_score_B + down_score_B >= cfg.hysteresis)
        do_B = (left_B >= 1) & (up_score_B > -jnp.inf) & (fits_B | swap_B)
        up_BW = do_B[:, None] & (jnp.arange(W) == up_B[:, None])
        down_BW = (do_B & ~fits_B)[:, None] & (jnp.arange(W) == down_B[:, None])
        room_B -= jnp.where(do_B & fits_B, K - 1, 0)
        left_B -= jnp.where(do_B, jnp.where(fits_B, 1, 2), 0)
        return (
            expand_BW & ~up_BW,
            collapse_BW & ~down_BW,
            chosen_BW | up_BW,
            folded_BW | down_BW,
            room_B,
            left_B,
        )

    nothing_BW = jnp.zeros((B, W), bool)
    left_B = jnp.where(over_B > 0, 0, cfg.max_replacements)
    carry = (expand_BW, collapse_BW, nothing_BW, nothing_BW, budget_B - count_B, left_B)
    _, _, chosen_BW, folded_BW, _, _ = jax.lax.fori_loop(0, cfg.max_replacements, edit, carry)
    folded_BW |= forced_BW
    after, age_BW = apply_edits(layout, age_BW + 1, chosen_BW, folded_BW, K)
    return Focus(after, age_BW), _statistics(layout, after, age_BW, chosen_BW, folded_BW, budget_B)


def refocus_many(
    focus: Focus, score, cfg: AllocatorConfig, *, budget, tokens, iterations: int, key=None
) -> tuple[Focus, EditStats]:
    """`iterations` of `refocus`, each with fresh scores `score(layout)` [B, W]; edits and swap rates are summed."""
    key = jax.random.key(0) if key is None else key

    def step(focus, i):
        key_i = jax.random.fold_in(key, i)
        return refocus(focus, score(focus.layout), cfg, budget=budget, tokens=tokens, key=key_i)

    focus, stats = jax.lax.scan(step, focus, jnp.arange(iterations))
    total, last = jax.tree.map(lambda x: x.sum(0), stats), jax.tree.map(lambda x: x[-1], stats)
    return focus, total._replace(
        utilization_B=last.utilization_B,
        residency_mean_B=last.residency_mean_B,
        residency_p95_B=last.residency_p95_B,
    )


def apply_edits(layout: Layout, age_BW, expand_BW, collapse_BW, block: int) -> tuple[Layout, jax.Array]:
    """Every marked entry becomes its `block` children, every group of siblings marked at its first its parent.

    Edits must not overlap and their result must fit the places there are.
    """
    level, node, valid = layout
    B, W = valid.shape
    inside_BW = _window_sum(collapse_BW, block, backwards=True) > 0  # members of collapsing groups
    size_BW = jnp.where(expand_BW, block, jnp.where(inside_BW & ~collapse_BW, 0, 1)) * valid
    ends_BW = jnp.cumsum(size_BW, axis=1)
    # the entry that each new place comes from: entries that end at or before the place are behind it
    marks_BW = jnp.zeros((B, W + 1), jnp.int32).at[jnp.arange(B)[:, None], jnp.minimum(ends_BW, W)].add(1)
    of_BW = jnp.minimum(jnp.cumsum(marks_BW[:, :W], axis=1), W - 1)

    def take(x):
        return jnp.take_along_axis(x, of_BW, axis=1)

    child_BW = jnp.arange(W) - take(ends_BW - size_BW)
    up, down = take(collapse_BW), take(expand_BW)
    new_level = take(level) + up - down
    new_node = jnp.where(down, take(node) * block + child_BW, jnp.where(up, take(node) // block, take(node)))
    new_valid = jnp.arange(W) < ends_BW[:, -1:]
    new_age = jnp.where(up | down, 0, take(age_BW))
    clean = Layout(jnp.where(new_valid, new_level, 0), jnp.where(new_valid, new_node, 0), new_valid)
    return clean, jnp.where(new_valid, new_age, 0)


def _groups(layout: Layout, block: int, max_level: int, limit_B1):
    """Marks the first of every whole, aligned group of siblings that ends at or before the limit."""
    level, node, valid = layout
    W = valid.shape[1]
    if block > W:
        return jnp.zeros_like(valid)

    def ahead(x, fill):
        return jnp.pad(x[:, block - 1 :], ((0, 0), (0, block - 1)), constant_values=fill)

    # entries tile the tokens, so equal first and last siblings leave room for nothing else between them
    whole = ahead(valid, False) & (ahead(level, -1) == level) & (ahead(node, -1) == node + block - 1)
    end_BW = starts(layout, block) + block * spans(level, block)
    return valid & whole & (level < max_level) & (node % block == 0) & (end_BW <= limit_B1)


def _window_sum(x_BW, block: int, backwards: bool = False):
    """Sum over an entry and the block - 1 behind it (before it if backwards)."""
    x_BW = x_BW.astype(jnp.float32 if jnp.issubdtype(x_BW.dtype, jnp.floating) else jnp.int32)
    W = x_BW.shape[1]
    pad = (block - 1, 0) if backwards else (0, block - 1)
    padded = jnp.pad(x_BW, ((0, 0), pad))
    return jax.lax.reduce_window(padded, jnp.zeros((), x_BW.dtype), jax.lax.add, (1, block), (1, 1), "VALID")[
        :, :W
    ]


def _best(value_BW, among_BW, cfg: AllocatorConfig, key):
    """(index, value) of the choice among the marked entries; minus infinity where none is."""
    masked_BW = jnp.where(among_BW, value_BW, -jnp.inf)
    pick_BW = masked_BW
    if cfg.kind == "stochastic_greedy" and cfg.top_k > 1:
        k = min(cfg.top_k, masked_BW.shape[1])
        least_B1 = jax.lax.top_k(masked_BW, k)[0][:, -1:]
        noise_BW = jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(key, i), masked_BW.shape[1:]))(
            jnp.arange(masked_BW.shape[0])
        )
        drawn_BW = jnp.abs(masked_BW) / max(cfg.temperature, 1e-6) + noise_BW
        pick_BW = jnp.where(among_BW & (masked_BW >= least_B1), drawn_BW, -jnp.inf)
    index_B = jnp.argmax(pick_BW, axis=1)
    return index_B, jnp.take_along_axis(masked_BW, index_B[:, None], axis=1)[:, 0]


def _statistics(before: Layout, after: Layout, age_BW, expand_BW, collapse_BW, budget_B) -> EditStats:
    expands_B, collapses_B = expand_BW.sum(-1), collapse_BW.sum(-1)
    known = jnp.where(after.valid_BW, age_BW, 0)
    count_B = jnp.maximum(after.count_B, 1)
    return EditStats(
        expands_B,
        collapses_B,
        (expands_B + collapses_B) / jnp.maximum(before.count_B, 1),
        after.count_B / jnp.maximum(budget_B, 1),
        known.sum(-1) / count_B,
        jnp.nanquantile(jnp.where(after.valid_BW, age_BW.astype(jnp.float32), jnp.nan), 0.95, axis=-1),
    )
