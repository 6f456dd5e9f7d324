"""The focus allocator: invariants over many edits, agreement with a plain form, and each rule by a small case."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext_jax.context import allocator
from megacontext_jax.context import layout as layouts
from megacontext_jax.context.allocator import AllocatorConfig, new_focus, refocus
from megacontext_jax.context.layout import Layout
from megacontext_jax.errors import UserError

# (tokens, block, levels, recent, width, places)
SHAPES = ((256, 4, 3, 16, 64, 80), (250, 8, 2, 32, 100, 110), (64, 2, 4, 5, 20, 24))
ROWS = 256


def config(shape, **changes) -> AllocatorConfig:
    return AllocatorConfig(block=shape[1], max_level=shape[2], recent=shape[3], **({"cooldown": 1} | changes))


def begin(seed: int, shape, rows: int = ROWS) -> Layout:
    tokens, block, levels, recent, width, places = shape
    options = {"block": block, "levels": levels, "recent": recent}
    width = layouts.reachable_width(width, tokens, **options)
    drawn = layouts.compress(jax.random.key(seed), rows, tokens, width, **options).layout
    return Layout(*(jnp.pad(x, ((0, 0), (0, places - width))) for x in drawn))


@partial(jax.jit, static_argnums=(3, 4))
def iterate(focus, budget, seed, shape, kind):
    key = jax.random.key(seed)
    scores = jax.random.uniform(key, focus.layout.level_BW.shape, minval=-1)
    after, stats = refocus(focus, scores, config(shape, kind=kind), budget=budget, tokens=shape[0], key=key)
    broken = layouts.violations(
        after.layout,
        block=shape[1],
        tokens=shape[0],
        budget=shape[5],
        recent=shape[3],
        max_level=shape[2],
    )
    return after, stats, broken


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), shape=st.sampled_from(SHAPES), kind=st.sampled_from(allocator.KINDS))
def test_random_edit_sequences_break_no_invariant(seed, shape, kind):
    """8 examples of 256 windows and 8 iterations, 16,384 edited windows in all."""
    focus = new_focus(begin(seed, shape), config(shape))
    budgets = np.random.default_rng(seed).integers(shape[4] - 6, shape[5] + 1, 8)
    edits = 0
    for i, budget in enumerate(budgets):
        before = focus.layout.count_B
        focus, stats, broken = iterate(focus, int(budget), seed + i, shape, kind)
        assert {name: int(bad.sum()) for name, bad in broken.items()} == dict.fromkeys(broken, 0)
        count = focus.layout.count_B
        assert (count <= jnp.maximum(budget, before)).all()  # never over it, and never further over it
        change = (shape[1] - 1) * (stats.expands_B - stats.collapses_B)
        assert (count - before == change).all()  # every edit is whole
        edits += int((stats.expands_B + stats.collapses_B).sum())
    assert edits > ROWS


def plain(layout, scores, cfg: AllocatorConfig, budget: int, tokens: int):
    """One row, rule by rule: entries [(level, node)] after a greedy iteration within the budget."""
    K = cfg.block
    entries = [(int(a), int(b)) for a, b, v in zip(*layout, strict=True) if v]
    expands = [i for i, (level, _) in enumerate(entries) if level > 0 and scores[i] >= cfg.expand_threshold]
    groups = {}
    for i, (level, node) in enumerate(entries):
        family = [(level, node + j) for j in range(K)]
        whole = entries[i : i + K] == family and node % K == 0 and level < cfg.max_level
        if not whole or (node + K) * K**level > tokens - cfg.recent or set(range(i, i + K)) & set(expands):
            continue
        mean = np.float32(np.mean(scores[i : i + K], dtype=np.float32))
        if mean <= -cfg.collapse_threshold:
            groups[i] = mean
    expands.sort(key=lambda i: -scores[i])
    queue = sorted(groups, key=lambda i: groups[i])
    room, left, up, down = budget - len(entries), cfg.max_replacements, [], []
    for i in expands:
        if left >= 1 and room >= K - 1:
            up.append(i)
            room, left = room - (K - 1), left - 1
        elif left >= 2 and queue and scores[i] - groups[queue[0]] >= cfg.hysteresis:
            up.append(i)
            down.append(queue.pop(0))
            left -= 2
        else:
            break
    out, i = [], 0
    while i < len(entries):
        level, node = entries[i]
        if i in down:
            out.append((level + 1, node // K))
            i += K
            continue
        out += [(level - 1, node * K + j) for j in range(K)] if i in up else [(level, node)]
        i += 1
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_what_the_rules_say(shape):
    rows = 40
    start = begin(5, shape, rows)
    scores = np.random.default_rng(1).uniform(-1, 1, start.level_BW.shape).astype(np.float32)
    cfg = config(shape, max_replacements=5)
    budget = int(start.count_B[0]) + shape[1]  # room for one expansion, the others are swaps
    after, stats = refocus(new_focus(start, cfg), jnp.asarray(scores), cfg, budget=budget, tokens=shape[0])
    for row in range(rows):
        wanted = plain([np.asarray(x)[row] for x in start], scores[row], cfg, budget, shape[0])
        found = [
            (int(a), int(b)) for a, b, v in zip(*(np.asarray(x)[row] for x in after.layout), strict=True) if v
        ]
        assert found == wanted
    assert (stats.collapses_B > 0).any()


def test_rows_do_not_depend_on_each_other():
    shape = SHAPES[0]
    start = begin(2, shape, 8)
    scores = jax.random.uniform(jax.random.key(1), start.level_BW.shape, minval=-1)
    for kind in allocator.KINDS:
        cfg = config(shape, kind=kind)
        together, _ = refocus(new_focus(start, cfg), scores, cfg, budget=64, tokens=256)
        alone, _ = refocus(
            new_focus(Layout(*(x[:1] for x in start)), cfg), scores[:1], cfg, budget=64, tokens=256
        )
        assert (together.layout.node_BW[:1] == alone.layout.node_BW).all()


# 32 tokens, blocks of 4: gists 0 and 1, raw 8..15, gists 4 and 5, raw 24..31; 20 entries
def small() -> Layout:
    entries = [
        (1, 0),
        (1, 1),
        *((0, i) for i in range(8, 16)),
        (1, 4),
        (1, 5),
        *((0, i) for i in range(24, 32)),
    ]
    level, node = (jnp.asarray([list(x)]) for x in zip(*entries, strict=True))
    return Layout(level, node, jnp.ones(level.shape, bool))


def edit(scores: dict, budget=20, age=None, **changes):
    cfg = AllocatorConfig(block=4, max_level=2, recent=8, **({"cooldown": 2} | changes))
    score = jnp.zeros((1, 20)).at[0, jnp.asarray(list(scores))].set(jnp.asarray(list(scores.values())))
    focus = new_focus(small(), cfg)
    if age is not None:
        focus = focus._replace(age_BW=focus.age_BW.at[0, age].set(0))
    focus = focus._replace(layout=Layout(*(jnp.pad(x, ((0, 0), (0, 4))) for x in focus.layout)),
                           age_BW=jnp.pad(focus.age_BW, ((0, 0), (0, 4))))  # fmt: skip
    _, stats = refocus(focus, jnp.pad(score, ((0, 0), (0, 4))), cfg, budget=budget, tokens=32)
    return int(stats.expands_B[0]), int(stats.collapses_B[0])


LOW = dict.fromkeys(range(2, 6), -0.5)  # the first raw block


def test_a_full_context_is_refocused_by_swaps():
    assert edit({0: 0.9} | LOW) == (1, 1)
    assert edit({0: 0.9}) == (0, 0)  # nothing pays for it
    assert edit({0: 0.9}, budget=23) == (1, 0)  # it fits
    assert edit(LOW) == (0, 0)  # nothing collapses for its own sake
    assert edit({0: 0.9, 1: 0.8} | LOW, max_replacements=1) == (0, 0)  # a swap is two edits


def test_thresholds_hysteresis_cooldown_and_cost():
    assert edit({0: 0.05} | LOW) == (0, 0)
    assert edit({0: 0.05} | LOW, expand_threshold=0.01) == (1, 1)
    assert edit({0: 0.9} | dict.fromkeys(range(2, 6), -0.05)) == (0, 0)
    assert edit({0: 0.3} | LOW, hysteresis=0.81) == (0, 0)
    assert edit({0: 0.3} | LOW, hysteresis=0.79) == (1, 1)
    assert edit({0: 0.9} | LOW, age=0) == (0, 0)
    assert edit({0: 0.9} | LOW, age=3) == (0, 0)  # one of the group
    assert edit({0: 0.5} | LOW, edit_cost=0.45) == (0, 0)  # everything lies behind it
    assert edit({10: 0.5} | LOW, budget=23, edit_cost=0.45) == (1, 0)  # less lies behind this one


def test_the_tail_stays_and_a_budget_that_shrank_is_met():
    assert edit({0: 0.9} | dict.fromkeys(range(12, 20), -0.9)) == (0, 0)
    assert edit({0: 0.9}, budget=17) == (0, 1)
    assert edit({0: 0.9}, budget=14) == (0, 2)


def test_expanding_a_collapsed_block_brings_its_tokens_back():
    marks = jnp.zeros((1, 20), bool)
    folded, age = allocator.apply_edits(
        small(), jnp.ones((1, 20), jnp.int32), marks, marks.at[0, 6].set(True), 4
    )
    assert (int(folded.level_BW[0, 6]), int(folded.node_BW[0, 6]), int(age[0, 6])) == (1, 3, 0)
    back, _ = allocator.apply_edits(folded, age, marks.at[0, 6].set(True), marks, 4)
    assert (back.level_BW == small().level_BW).all()
    assert (back.node_BW == small().node_BW).all()


def test_stochastic_choice_draws_among_the_best_and_top_1_is_greedy():
    shape = SHAPES[0]
    start = begin(4, shape)
    scores = jax.random.uniform(jax.random.key(3), start.level_BW.shape, minval=-1)

    def run(seed, **changes):
        cfg = config(shape, max_replacements=2, **changes)
        key = jax.random.key(seed)
        return refocus(new_focus(start, cfg), scores, cfg, budget=80, tokens=256, key=key)[0].layout.node_BW

    greedy = run(0)
    assert (run(1, kind="stochastic_greedy", top_k=1) == greedy).all()
    drawn = run(1, kind="stochastic_greedy")
    assert 0.1 < (drawn != greedy).any(1).mean() < 1.0
    assert (drawn != run(2, kind="stochastic_greedy")).any()
    with pytest.raises(UserError, match="greedy"):
        AllocatorConfig(block=4, max_level=2, kind="simple")
