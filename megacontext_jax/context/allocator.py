"""The focus allocator: which entries of a working context expand, which blocks collapse, inside a budget.

One iteration is a pure function of layout, scores and ages. Expansions and collapses queue separately; every
expansion takes block - 1 places and every collapse frees as many, so that a full context is refocused by swaps of
net zero. Rows know nothing of each other. Shape suffixes: B rows, W places, Q places in a queue, M edits.
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
    # entries that expansions leave free and forced collapses free besides, so that these come seldom
    slack: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(
                f"--allocator-type does not take {self.kind!r}; choose one of {', '.join(KINDS)}."
            )


class Focus(NamedTuple):
    layout: Layout
    # iterations since an edit made the entry; at the start `cooldown`, so that all may be edited
    age_BW: jax.Array


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
    focus: Focus, score_BW, cfg: AllocatorConfig, *, budget, tokens, first=0, key=None
) -> tuple[Focus, EditStats]:
    """One iteration. `budget` (entries), `tokens` (of the whole history) and `first` are numbers or [B].

    Scores (finite) above 0 ask to expand, below 0 to collapse. Within the budget at most `max_replacements` edits
    are made, the most wanted expansions first; one that does not fit is paid for by the most wanted collapse, if
    the two scores are `hysteresis` apart. Nothing collapses for its own sake. A budget above the places there are
    counts as these.

    Nothing before place `first` is edited, because the caller cannot pay for what lies behind it.

    Over the budget nothing expands, and the lowest groups collapse until it is met with `slack` or nothing is left
    to collapse: thresholds, cooldown, `max_replacements` and `first` are wishes, the budget is not (`_fit`).

    `key` is one key or one for each row; only "stochastic_greedy" draws (of key 0 where none is given).
    """
    B, W = score_BW.shape
    budget_B = jnp.broadcast_to(jnp.asarray(budget, jnp.int32), (B,))
    limit_B1 = jnp.broadcast_to(jnp.asarray(tokens, jnp.int32), (B,))[:, None] - cfg.recent
    before_B = focus.layout.count_B
    older = Focus(focus.layout, focus.age_BW + 1)
    within_B = before_B <= budget_B
    fitted, forced_B = jax.lax.cond(
        within_B.all(),
        lambda: (older, jnp.zeros(B, jnp.int32)),
        lambda: _fit(older, score_BW, cfg, jnp.where(within_B, budget_B, budget_B - cfg.slack), limit_B1),
    )
    most_B = jnp.where(within_B, cfg.max_replacements, 0)
    room_B = jnp.minimum(budget_B, W) - cfg.slack - before_B
    open_BW = jnp.arange(W) >= jnp.broadcast_to(jnp.asarray(first, jnp.int32), (B,))[:, None]
    expand_BW, collapse_BW = _select(fitted, score_BW, cfg, room_B, most_B, limit_B1, open_BW, key)
    after = Focus(*apply_edits(*fitted, expand_BW, collapse_BW, cfg.block))
    expands_B, collapses_B = expand_BW.sum(-1), forced_B + collapse_BW.sum(-1)
    return after, _statistics(after, expands_B, collapses_B, before_B, budget_B)


def refocus_many(
    focus: Focus, score, cfg: AllocatorConfig, *, budget, tokens, iterations: int, first=0, key=None
) -> tuple[Focus, EditStats]:
    """`iterations` of `refocus`, each with fresh scores `score(layout)` [B, W]; edits and swap rates are summed,
    the other statistics are those of the end. What an iteration edits opens all that lies behind it to the next."""
    B = focus.age_BW.shape[0]
    key_B = _row_keys(key, B)
    none_B = jnp.zeros(B, jnp.int32)
    budget_B, first_B = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), (B,)) for x in (budget, first))

    def step(carry, i):
        focus, total, first_B = carry
        key_i = jax.vmap(jax.random.fold_in, (0, None))(key_B, i)
        after, new = refocus(
            focus, score(focus.layout), cfg, budget=budget, tokens=tokens, first=first_B, key=key_i
        )
        summed = {name: getattr(total, name) + getattr(new, name) for name in EditStats._fields[:3]}
        edited_BW = (after.layout.level_BW != focus.layout.level_BW) | (
            after.layout.node_BW != focus.layout.node_BW
        )
        edited_B = jnp.where(edited_BW.any(-1), jnp.argmax(edited_BW, axis=-1), edited_BW.shape[1])
        return (after, new._replace(**summed), jnp.minimum(first_B, edited_B)), None

    total = _statistics(focus, none_B, none_B, focus.layout.count_B, budget_B)
    return jax.lax.scan(step, (focus, total, first_B), jnp.arange(iterations))[0][:2]


def apply_edits(layout: Layout, age_BW, expand_BW, collapse_BW, block: int) -> tuple[Layout, jax.Array]:
    """Every marked entry becomes its `block` children, every group of siblings marked at its first its parent.

    What an edit makes has age 0. Edits must not overlap and their result must fit the places there are.
    """
    after, of_BW, made_BW = _rearrange(layout, expand_BW, collapse_BW, block)
    return after, jnp.where(after.valid_BW & ~made_BW, _take(age_BW, of_BW), 0)


def _rearrange(layout: Layout, expand_BW, collapse_BW, block: int):
    """(layout after the edits, the entry that each place comes from, whether an edit made it)."""
    level, node, valid = layout
    B, W = valid.shape
    inside_BW = _window_sum(collapse_BW.astype(jnp.int32), block, backwards=True) > 0  # of collapsing groups
    size_BW = jnp.where(expand_BW, block, jnp.where(inside_BW & ~collapse_BW, 0, 1)) * valid
    ends_BW = jnp.cumsum(size_BW, axis=1)
    # entries that end at or before a place are behind it
    marks_BW = jnp.zeros((B, W + 1), jnp.int32).at[jnp.arange(B)[:, None], jnp.minimum(ends_BW, W)].add(1)
    of_BW = jnp.minimum(jnp.cumsum(marks_BW[:, :W], axis=1), W - 1)
    up, down, old = _take(collapse_BW, of_BW), _take(expand_BW, of_BW), _take(node, of_BW)
    child_BW = jnp.arange(W) - _take(ends_BW - size_BW, of_BW)
    new_level = _take(level, of_BW) + up - down
    new_node = jnp.where(down, old * block + child_BW, jnp.where(up, old // block, old))
    new_valid = jnp.arange(W) < ends_BW[:, -1:]
    after = Layout(jnp.where(new_valid, new_level, 0), jnp.where(new_valid, new_node, 0), new_valid)
    return after, of_BW, up | down


# --- Choice of edits ---------------------------------------------------------------------------------------


def _select(focus: Focus, score_BW, cfg: AllocatorConfig, room_B, most_B, limit_B1, open_BW, key):
    """Marks (expand_BW, collapse_BW) of at most `most_B` edits at open places that leave no more than `room_B` places
    fewer."""
    (layout, age_BW), K = focus, cfg.block
    B, W = score_BW.shape
    most, nothing_BW = min(cfg.max_replacements, W), jnp.zeros((B, W), bool)
    if most == 0:
        return nothing_BW, nothing_BW
    cost_BW = _cost(layout, cfg)
    rested_BW = open_BW & layout.valid_BW & (age_BW > cfg.cooldown)  # ages count this iteration already
    gain_BW = score_BW - cost_BW
    expand_BW = rested_BW & (layout.level_BW > 0) & (gain_BW >= cfg.expand_threshold)
    loss_BW = _window_sum(score_BW, K) / K + cost_BW
    idle_BW = _window_sum((rested_BW & ~expand_BW).astype(jnp.int32), K) == K
    collapse_BW = _groups(layout, cfg, limit_B1) & idle_BW & (loss_BW <= -cfg.collapse_threshold)

    # a draw chooses among the first `draws` that are left, so that no more than these can ever be chosen
    draws = max(1, cfg.top_k) if cfg.kind == "stochastic_greedy" else 1
    length = min(W, most + draws - 1)
    up_BQ, up_at_BQ = jax.lax.top_k(jnp.where(expand_BW, gain_BW, -jnp.inf), length)
    down_BQ, down_at_BQ = jax.lax.top_k(jnp.where(collapse_BW, -loss_BW, -jnp.inf), length)
    if draws > 1:
        shape = (max(most, 1), 2, length)
        noise_MB2Q = jax.vmap(lambda k: jax.random.gumbel(k, shape), out_axes=1)(_row_keys(key, B))

    def edit(i, carry):
        up_open_BQ, down_open_BQ, room_B, left_B = carry
        noise_B2Q = noise_MB2Q[i] if draws > 1 else jnp.zeros((1, 2, 1))
        up_BQ1, up_value_B = _draw(up_BQ, up_open_BQ, noise_B2Q[:, 0], draws, cfg.temperature)
        down_BQ1, down_value_B = _draw(down_BQ, down_open_BQ, noise_B2Q[:, 1], draws, cfg.temperature)
        fits_B = room_B >= K - 1
        add_B = fits_B & (left_B >= 1) & (up_value_B > -jnp.inf)
        swap_B = ~fits_B & (left_B >= 2) & (up_value_B + down_value_B >= cfg.hysteresis)
        return (
            up_open_BQ & ~(up_BQ1 & (add_B | swap_B)[:, None]),
            down_open_BQ & ~(down_BQ1 & swap_B[:, None]),
            room_B - (K - 1) * add_B,
            left_B - add_B - 2 * swap_B,
        )

    carry = (up_BQ > -jnp.inf, down_BQ > -jnp.inf, room_B, most_B)
    up_open_BQ, down_open_BQ, _, _ = jax.lax.fori_loop(0, most, edit, carry)
    row_B1 = jnp.arange(B)[:, None]
    return (
        nothing_BW.at[row_B1, up_at_BQ].set((up_BQ > -jnp.inf) & ~up_open_BQ),
        nothing_BW.at[row_B1, down_at_BQ].set((down_BQ > -jnp.inf) & ~down_open_BQ),
    )


def _draw(value_BQ, open_BQ, noise_BQ, draws: int, temperature: float):
    """(mark of the choice, its value) in a queue sorted by value; no mark and minus infinity if it is empty."""
    rank_BQ = jnp.cumsum(open_BQ, axis=1)
    among_BQ = open_BQ & (rank_BQ <= draws)
    if draws > 1:
        drawn_BQ = jnp.where(among_BQ, jnp.abs(value_BQ) / max(temperature, 1e-6) + noise_BQ, -jnp.inf)
        among_BQ &= jnp.arange(value_BQ.shape[1]) == jnp.argmax(drawn_BQ, axis=1)[:, None]
    return among_BQ, jnp.where(among_BQ, value_BQ, -jnp.inf).max(-1)


def _fit(focus: Focus, score_BW, cfg: AllocatorConfig, budget_B, limit_B1) -> tuple[Focus, jax.Array]:
    """Collapses the lowest groups of the rows over their budget; the second value counts them [B].

    A group is worth its best entry, which is what a collapse blurs, and so is the parent it leaves. A pass makes the lowest quarter of the collapses that are still needed: their parents may then form groups of the
    next level, scored by what they cover, before anything higher must give way. It ends when all rows fit or nothing is
    left to collapse.
    """
    K = cfg.block

    def over(layout):
        return jnp.maximum(layout.count_B - budget_B, 0)

    def squeeze(carry):
        (layout, age_BW), score_BW, made_B, _ = carry
        worth_BW = _window_max(score_BW, K)
        needed_B = -(-over(layout) // (K - 1))
        marks_BW = _lowest(worth_BW + _cost(layout, cfg), _groups(layout, cfg, limit_B1), -(-needed_B // 4))
        after, of_BW, _ = _rearrange(layout, jnp.zeros_like(marks_BW), marks_BW, K)
        score_BW = _take(jnp.where(marks_BW, worth_BW, score_BW), of_BW)
        age_BW = _take(jnp.where(marks_BW, 0, age_BW), of_BW)
        return Focus(after, age_BW), score_BW, made_B + marks_BW.sum(-1), marks_BW.any()

    def goes_on(carry):
        (layout, _), _, _, moved = carry
        return moved & (over(layout) > 0).any()

    carry = focus, score_BW.astype(jnp.float32), jnp.zeros_like(budget_B), jnp.array(True)
    focus, _, made_B, _ = jax.lax.while_loop(goes_on, squeeze, carry)
    return focus, made_B


def _cost(layout: Layout, cfg: AllocatorConfig):
    """What the share of the context behind an entry, itself included, takes off the score of an edit there."""
    W = layout.valid_BW.shape[1]
    return cfg.edit_cost * (1.0 - jnp.arange(W) / jnp.maximum(layout.count_B[:, None], 1))


def _groups(layout: Layout, cfg: AllocatorConfig, limit_B1):
    """Marks the first of every whole, aligned group of siblings that may have a parent and ends within the limit."""
    level, node, valid = layout
    K, W = cfg.block, valid.shape[1]
    if K > W:
        return jnp.zeros_like(valid)

    def ahead(x, fill):
        return jnp.pad(x[:, K - 1 :], ((0, 0), (0, K - 1)), constant_values=fill)

    # entries tile the tokens, so equal first and last siblings leave room for nothing else between them
    whole = ahead(valid, False) & (ahead(level, -1) == level) & (ahead(node, -1) == node + K - 1)
    end_BW = starts(layout, K) + K * spans(level, K)
    return valid & whole & (level < cfg.max_level) & (node % K == 0) & (end_BW <= limit_B1)


def _lowest(value_BW, among_BW, n_B):
    """Marks the n lowest of the entries that are marked, the first ones where values are equal."""
    n_B1 = n_B[:, None]
    sorted_BW = jnp.sort(jnp.where(among_BW, value_BW, jnp.inf), axis=1)
    last_B1 = jnp.take_along_axis(sorted_BW, jnp.clip(n_B1 - 1, 0, sorted_BW.shape[1] - 1), axis=1)
    below_BW, equal_BW = among_BW & (value_BW < last_B1), among_BW & (value_BW == last_B1)
    return below_BW | (equal_BW & (jnp.cumsum(equal_BW, axis=1) <= n_B1 - below_BW.sum(-1, keepdims=True)))


def _window_sum(x_BW, block: int, backwards: bool = False):
    """Sum over an entry and the block - 1 behind it (before it if backwards); places outside count as 0.

    Sums of 1, 2, 4, ... neighbours add up to it: log2(block) additions, the same ones wherever the window lies.
    """
    W, sum_BW, done = x_BW.shape[1], jnp.zeros_like(x_BW), 0

    def shift(y_BW, by):
        by = min(by, W)
        if backwards:
            return jnp.pad(y_BW, ((0, 0), (by, 0)))[:, :W]
        return jnp.pad(y_BW, ((0, 0), (0, by)))[:, by:]

    for bit in range(block.bit_length()):
        if block >> bit & 1:
            sum_BW += shift(x_BW, done)
            done += 1 << bit
        x_BW += shift(x_BW, 1 << bit)
    return sum_BW


def _window_max(x_BW, block: int):
    """Largest value of an entry and the block - 1 behind it; places outside do not count."""
    W, low = x_BW.shape[1], jnp.finfo(x_BW.dtype).min
    padded_BX = jnp.pad(x_BW, ((0, 0), (0, block - 1)), constant_values=low)
    return jnp.stack([padded_BX[:, i : i + W] for i in range(block)]).max(0)


def _take(x_BW, of_BW):
    return jnp.take_along_axis(x_BW, of_BW, axis=1)


def _row_keys(key, rows: int):
    """One key for each row; they are taken as they are if there are so many already."""
    key = jax.random.key(0) if key is None else key
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def _statistics(focus: Focus, expands_B, collapses_B, before_B, budget_B) -> EditStats:
    (layout, age_BW), count_B = focus, jnp.maximum(focus.layout.count_B, 1)
    # the 95th percentile, between two ages where it falls there
    sorted_BW = jnp.sort(jnp.where(layout.valid_BW, age_BW, jnp.iinfo(jnp.int32).max), axis=1)
    place_B1 = 0.95 * (count_B[:, None] - 1)
    low_B1, high_B1 = (_take(sorted_BW, f(place_B1).astype(jnp.int32)) for f in (jnp.floor, jnp.ceil))
    p95_B1 = low_B1 + (place_B1 - jnp.floor(place_B1)) * (high_B1 - low_B1)
    return EditStats(
        expands_B,
        collapses_B,
        (expands_B + collapses_B) / jnp.maximum(before_B, 1),
        layout.count_B / jnp.maximum(budget_B, 1),
        jnp.where(layout.valid_BW, age_BW, 0).sum(-1) / count_B,
        p95_B1[:, 0],
    )
