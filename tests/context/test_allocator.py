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
from megacontext_jax.context.allocator import (
    AllocatorConfig,
    apply_edits,
    new_focus,
    refocus,
    refocus_many,
)
from megacontext_jax.context.layout import Layout
from megacontext_jax.errors import UserError
from tests.conftest import GOLDEN

# (tokens, block, levels, recent, width, places)
SHAPES = ((256, 4, 3, 16, 64, 80), (250, 8, 2, 32, 100, 110), (64, 2, 4, 5, 20, 24))
ROWS = 256
ITERATIONS = 8
# settings that need no compilation, and those that sequences are tried with
CHOICES = {
    "expand_threshold": (0.1, 0.0),
    "collapse_threshold": (0.1, 0.3),
    "hysteresis": (0.2, 0.0),
    "edit_cost": (0.0, 0.3),
    "cooldown": (0, 1),
    "slack": (0, 9),
}


def config(shape, wishes=None, **changes) -> AllocatorConfig:
    return AllocatorConfig(shape[1], shape[2], shape[3], **({"cooldown": 1} | (wishes or {}) | changes))


@partial(jax.jit, static_argnums=(1, 2))
def begin(seed, shape, rows: int = ROWS) -> Layout:
    tokens, block, levels, recent, width, places = shape
    options = {"block": block, "levels": levels, "recent": recent}
    width = layouts.reachable_width(width, tokens, **options)
    drawn = layouts.compress(jax.random.key(seed), rows, tokens, width, **options).layout
    return Layout(*(jnp.pad(x, ((0, 0), (0, places - width))) for x in drawn))


def fewest(shape) -> int:
    return layouts.fewest_entries(shape[0], block=shape[1], levels=shape[2], recent=shape[3])


@partial(jax.jit, static_argnames=("shape", "kind", "most", "top_k"))
def step(focus, score_BW, budget_B, key, wishes, first_B=0, *, shape, kind="greedy", most=5, top_k=4):
    cfg = config(shape, wishes, kind=kind, max_replacements=most, top_k=top_k)
    return refocus(focus, score_BW, cfg, budget=budget_B, tokens=shape[0], first=first_B, key=key)


apply = jax.jit(apply_edits, static_argnames="block")


@partial(jax.jit, static_argnums=1)
def broken(layout, shape):
    tokens, block, levels, recent, _, places = shape
    return layouts.violations(
        layout, block=block, tokens=tokens, budget=places, recent=recent, max_level=levels
    )


def rows_of(layout, *more) -> list:
    """Per row, what the valid places hold: [(level, node, *more)]."""
    arrays = [np.asarray(x) for x in (layout.level_BW, layout.node_BW, *more)]
    return [
        [tuple(x[row, i].item() for x in arrays) for i in np.flatnonzero(valid)]
        for row, valid in enumerate(np.asarray(layout.valid_BW))
    ]


# --- Invariants ------------------------------------------------------------------------------------------


def codes(layout, levels_up=0):
    """One number for each (row, level, node); with `levels_up` that of the ancestor."""
    level, node, valid = (np.asarray(x, np.int64) for x in layout)
    return (np.arange(len(valid))[:, None] * 16 + level + levels_up) * 2**20 + node, valid.astype(bool)


def check_atomic(before: Layout, after: Layout, stats, block: int, rows_B):
    """Of `rows_B`: an entry stays, or all its children replace it, or its parent replaces all its siblings."""
    old, new = (Layout(*(np.asarray(x)[rows_B] for x in y)) for y in (before, after))
    (old_code, old_valid), (new_code, new_valid) = codes(old), codes(new)
    has_new = lambda code: np.isin(code, new_code[new_valid])  # noqa: E731
    has_old = lambda code: np.isin(code, old_code[old_valid])  # noqa: E731
    stays = has_new(old_code)
    child = codes(old._replace(node_BW=old.node_BW * block), -1)[0]
    children = np.stack([has_new(child + j) for j in range(block)])
    first_node = old.node_BW // block * block
    up = has_new(codes(old._replace(node_BW=old.node_BW // block), 1)[0])
    siblings = np.stack([has_old(codes(old._replace(node_BW=first_node + j))[0]) for j in range(block)])
    expanded = children.all(0) & (old.level_BW > 0)
    collapsed = up & siblings.all(0)
    ways = stays.astype(int) + expanded + collapsed
    assert (ways[old_valid] == 1).all()
    assert ((expanded & old_valid).sum(-1) == np.asarray(stats.expands_B)[rows_B]).all()
    assert ((collapsed & old_valid).sum(-1) == block * np.asarray(stats.collapses_B)[rows_B]).all()
    assert (np.asarray(stats.expands_B + stats.collapses_B)[rows_B] <= 5).all()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    case=st.sampled_from([*((s, "greedy") for s in SHAPES), (SHAPES[0], "stochastic_greedy")]),
    spread=st.sampled_from((1.0, 0.3)),
    wishes=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()}),
)
def test_random_edit_sequences_break_no_invariant(seed, case, spread, wishes):
    """10 examples of 256 windows and 8 iterations: 20,480 edited windows."""
    (shape, kind), draw = case, np.random.default_rng(seed)
    _, block, _, _, width, places = shape
    focus = new_focus(begin(seed, shape), config(shape))
    edits = swaps = 0
    for i in range(ITERATIONS):
        budget = draw.integers(width - 6, places + 1, ROWS)
        budget = np.where(draw.random(ROWS) < 0.1, fewest(shape) + draw.integers(-2, 9, ROWS), budget)
        budget = np.where(draw.random(ROWS) < 0.4, np.maximum(budget, focus.layout.count_B), budget)
        score = draw.uniform(-spread, spread, (ROWS, places)).astype(np.float32)
        score = np.where(focus.layout.valid_BW, score, np.nan)  # what unused places hold is never read
        before = focus
        key = jax.random.split(jax.random.key(seed + i), ROWS)
        focus, stats = step(focus, score, budget.astype(np.int32), key, wishes, shape=shape, kind=kind)
        told = broken(focus.layout, shape)
        assert {name: int(bad.sum()) for name, bad in told.items()} == dict.fromkeys(told, 0)
        count, old = (np.asarray(x.layout.count_B) for x in (focus, before))
        assert (count <= np.maximum(budget, fewest(shape))).all()  # met, or everything is collapsed
        up, down = np.asarray(stats.expands_B), np.asarray(stats.collapses_B)
        assert (count - old == (block - 1) * (up - down)).all()
        within = old <= budget
        assert (up[~within] == 0).all()
        assert (up >= down)[within].all()  # nothing collapses for its own sake
        check_atomic(before.layout, focus.layout, stats, block, within)
        age = np.asarray(focus.age_BW)[np.asarray(focus.layout.valid_BW)]
        assert ((age == 0).sum() > 0) == bool((up + down).sum())
        edits, swaps = edits + (up + down).sum(), swaps + (within & (down > 0)).sum()
    assert edits > ROWS
    assert swaps > 0 or spread < 1 or wishes["collapse_threshold"] > 0.1


# --- The plain form --------------------------------------------------------------------------------------


def plain_edits(entries, ups, downs, block: int):
    """[(level, node, age)] after edits at places."""
    out, i = [], 0
    while i < len(entries):
        level, node, age = entries[i]
        if i in downs:
            out.append((level + 1, node // block, 0))
            i += block
            continue
        out += [(level - 1, node * block + j, 0) for j in range(block)] if i in ups else [(level, node, age)]
        i += 1
    return out


def plain_groups(entries, cfg: AllocatorConfig, tokens: int) -> list[int]:
    K, found = cfg.block, []
    for i, (level, node, *_) in enumerate(entries):
        family = [(level, node + j) for j in range(K)]
        there = [tuple(e[:2]) for e in entries[i : i + K]] == family
        legal = node % K == 0 and level < cfg.max_level and (node + K) * K**level <= tokens - cfg.recent
        if there and legal:
            found.append(i)
    return found


def plain_refocus(entries, scores, cfg: AllocatorConfig, budget: int, tokens: int, first: int):
    """One row, rule by rule: entries [(level, node, age)] after a greedy iteration."""
    K, N = cfg.block, len(entries)
    cost = [cfg.edit_cost * (1 - i / N) for i in range(N)]
    means = {i: sum(scores[i : i + K]) / K for i in plain_groups(entries, cfg, tokens)}
    if budget < N:
        aged = [(level, node, age + 1) for level, node, age in entries]
        budget -= cfg.slack
        while len(aged) > budget:
            groups = plain_groups(aged, cfg, tokens)
            groups.sort(key=lambda i: max(scores[i : i + K]) + cfg.edit_cost * (1 - i / len(aged)))
            needed = -(-(len(aged) - budget) // (K - 1))
            down = groups[: -(-needed // 4)]
            if not down:
                break
            starts = set(down)
            inside = {i + j for i in down for j in range(1, K)}
            scores = [
                max(scores[i : i + K]) if i in starts else scores[i]
                for i in range(len(aged))
                if i not in inside
            ]
            aged = plain_edits(aged, (), down, K)
        return aged
    rested = [age >= cfg.cooldown and i >= first for i, (*_, age) in enumerate(entries)]
    gain = {
        i: scores[i] - cost[i]
        for i in range(N)
        if rested[i] and entries[i][0] > 0 and scores[i] - cost[i] >= cfg.expand_threshold
    }
    loss = {
        i: mean + cost[i]
        for i, mean in means.items()
        if all(rested[i : i + K])
        and not gain.keys() & set(range(i, i + K))
        and mean + cost[i] <= -cfg.collapse_threshold
    }
    queue, room = sorted(loss, key=loss.get), budget - cfg.slack - N
    left, ups, downs = cfg.max_replacements, [], []
    for i in sorted(gain, key=lambda i: -gain[i]):
        if room >= K - 1:
            if left < 1:
                break
            room, left = room - (K - 1), left - 1
        elif left >= 2 and queue and gain[i] - loss[queue[0]] >= cfg.hysteresis:
            downs.append(queue.pop(0))
            left -= 2
        else:
            break
        ups.append(i)
    aged = [(level, node, age + 1) for level, node, age in entries]
    return plain_edits(aged, ups, downs, K)


GRID = {
    "expand_threshold": 0.125,
    "collapse_threshold": 0.25,
    "hysteresis": 0.5,
    "edit_cost": 0.0,
    "cooldown": 1,
    "slack": 5,
}
FINE = {
    "expand_threshold": 0.1,
    "collapse_threshold": 0.05,
    "hysteresis": 0.2,
    "edit_cost": 0.3,
    "cooldown": 2,
    "slack": 0,
}


@pytest.mark.parametrize("wishes", [GRID, FINE], ids=["ties and thresholds met exactly", "edit cost"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_what_the_rules_say(shape, wishes):
    draw = np.random.default_rng(3)
    tokens, block, _, _, _, places = shape
    cfg = config(shape, wishes, max_replacements=5)
    focus = new_focus(begin(5, shape), cfg)
    swaps = forced = 0
    for _ in range(3):
        score = draw.uniform(-1, 1, (ROWS, places)).astype(np.float32)
        if wishes is GRID:
            score = np.round(score * 8) / 8
        budget = draw.integers(fewest(shape), places + 1, ROWS)
        budget = np.where(draw.random(ROWS) < 0.7, np.asarray(focus.layout.count_B) + block // 2, budget)
        budget = np.minimum(budget, places)
        before = rows_of(focus.layout, focus.age_BW)
        first = np.where(draw.random(ROWS) < 0.5, 0, draw.integers(0, places, ROWS)).astype(np.int32)
        focus, stats = step(focus, score, budget.astype(np.int32), None, wishes, first, shape=shape)
        for row, found in enumerate(rows_of(focus.layout, focus.age_BW)):
            scores = score[row].astype(float).tolist()
            assert found == plain_refocus(
                before[row], scores, cfg, int(budget[row]), tokens, int(first[row])
            ), row
        swaps += int(((stats.expands_B > 0) & (stats.collapses_B > 0)).sum())
        forced += int((stats.collapses_B > stats.expands_B).sum())
    assert min(swaps, forced) > 20


@pytest.mark.parametrize("shape", SHAPES)
def test_edits_are_whole_and_undone_by_their_opposites(shape):
    tokens, block, _, _, _, places = shape
    layout = begin(11, shape)
    draw = np.random.default_rng(0)
    cfg, marks = config(shape), np.zeros((2, ROWS, places), bool)
    age_BW = np.where(layout.valid_BW, 7, 0)
    before, wanted = rows_of(layout, age_BW), []
    for row, entries in enumerate(before):
        downs = [i for i in plain_groups(entries, cfg, tokens) if draw.random() < 0.5]
        taken = {i + j for i in downs for j in range(block)}
        ups = [i for i, e in enumerate(entries) if e[0] > 0 and i not in taken and draw.random() < 0.5]
        ups = ups[: (places - len(entries)) // (block - 1) + len(downs)]
        marks[0, row, ups], marks[1, row, downs] = True, True
        wanted.append(plain_edits(entries, ups, downs, block))
    after, age = apply(layout, age_BW, *marks, block=block)
    assert rows_of(after, age) == wanted
    assert marks[0].any(1).sum() > 20
    assert marks[1].any(1).sum() > 20
    # a made entry whose parent was there is one of its children; the first of them collapses again
    old_code, old_valid = codes(layout)
    made = np.asarray(after.valid_BW) & (np.asarray(age) == 0)
    child = made & np.isin(codes(after._replace(node_BW=after.node_BW // block), 1)[0], old_code[old_valid])
    first = child & (np.asarray(after.node_BW) % block == 0)
    back, _ = apply(after, age, made & ~child, first, block=block)
    assert [e[:2] for row in rows_of(back) for e in row] == [e[:2] for row in before for e in row]


def test_edits_on_block_boundaries_are_those_of_pytorch_megacontext():
    """The steps of the fork whose edits are aligned.

    Left out, since from their first edit on they collapse spans that start off a block boundary, and expand them
    to other tokens than those collapsed: all steps of greedy_over_softmax_collapse,
    greedy_under_softmax_custom_scores, greedy_expand_from_lod1, greedy_batch_mean_scores and stochastic_topk1
    (which also lets edits overlap).
    """
    z = np.load(GOLDEN / "megacontext/greedy_allocator_steps.npz")
    steps = sorted({name.rsplit("/", 1)[0] for name in z})
    assert steps == [f"greedy_expand_from_lod2/step{i}" for i in range(4)]
    W, K, entries = 24, 4, {}
    for when in ("before", "after"):
        for name in steps:
            position, level = z[f"{name}/positions_{when}"].astype(int), z[f"{name}/lods_{when}"].astype(int)
            assert (position % K**level == 0).all()
            entries[name, when] = list(zip(level.tolist(), (position // K**level).tolist(), strict=True))
    before, marks = np.zeros((3, len(steps), W), int), np.zeros((2, len(steps), W), bool)
    for row, name in enumerate(steps):
        after = set(entries[name, "after"])
        for i, (level, node) in enumerate(entries[name, "before"]):
            before[:, row, i] = level, node, 1
            marks[0, row, i] = (level - 1, node * K) in after
            marks[1, row, i] = (level + 1, node // K) in after and node % K == 0
    layout = Layout(jnp.asarray(before[0]), jnp.asarray(before[1]), jnp.asarray(before[2] > 0))
    assert (marks.sum(-1) == [[2, 2, 2, 1], [0, 0, 0, 1]]).all()
    after, _ = apply(layout, jnp.zeros_like(layout.node_BW), *map(jnp.asarray, marks), block=K)
    assert rows_of(after) == [entries[name, "after"] for name in steps]


# --- Rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", allocator.KINDS)
def test_rows_do_not_depend_on_each_other(kind):
    shape, wishes = SHAPES[0], FINE
    start = begin(2, shape)
    focus = new_focus(start, config(shape, wishes))
    score = jax.random.uniform(jax.random.key(1), start.level_BW.shape, minval=-1)
    budget = start.count_B + jnp.arange(ROWS) % 7 - 3
    keys = jax.random.split(jax.random.key(9), ROWS)
    run = partial(step, wishes=wishes, shape=shape, kind=kind)
    together = run(focus, score, budget, keys)
    assert (together[1].collapses_B > 0).any()
    for i in (0, 3, 4, 77):
        alone = run(*jax.tree.map(lambda x, i=i: x[i : i + 1], (focus, score, budget, keys)))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i : i + 1], b), together, alone)
    if kind == "greedy":
        one = jax.vmap(lambda *x: run(*jax.tree.map(lambda y: y[None], x)))
        mapped = jax.tree.map(lambda x: x[:, 0], one(focus, score, budget, keys))
        jax.tree.map(np.testing.assert_array_equal, together, mapped)
    again = run(focus, score, budget, keys)
    jax.tree.map(np.testing.assert_array_equal, together, again)


# --- Rules, one by one -----------------------------------------------------------------------------------

SMALL = (32, 4, 2, 8, 20, 24)
# 32 tokens, blocks of 4: gists 0 and 1, raw 8..15, gists 4 and 5, raw 24..31; 20 entries in 24 places
ENTRIES = [(1, 0), (1, 1), *((0, i) for i in range(8, 16)), (1, 4), (1, 5), *((0, i) for i in range(24, 32))]
LOW = dict.fromkeys(range(2, 6), -0.5)  # the first raw block
DEFAULTS = {name: getattr(AllocatorConfig(4, 2), name) for name in CHOICES}


def small(rows: int = 1) -> Layout:
    level, node = (
        jnp.pad(jnp.asarray([list(x)] * rows), ((0, 0), (0, 4))) for x in zip(*ENTRIES, strict=True)
    )
    return Layout(level, node, jnp.broadcast_to(jnp.arange(24) < 20, level.shape))


def small_scores(scores: dict):
    row = jnp.zeros((1, 24))
    return row.at[0, jnp.asarray(list(scores), int)].set(jnp.asarray(list(scores.values()), jnp.float32))


def edit(scores: dict, budget=20, age=None, most=5, first=0, **changes):
    """(expansions, collapses) of one iteration; `age` is the place of an entry that was just made."""
    focus = new_focus(small(), config(SMALL, DEFAULTS | changes))
    if age is not None:
        focus = focus._replace(age_BW=focus.age_BW.at[0, age].set(0))
    budget_B = jnp.asarray([budget], jnp.int32)
    after, stats = step(
        focus, small_scores(scores), budget_B, None, DEFAULTS | changes, first, shape=SMALL, most=most
    )
    assert int(after.layout.count_B[0]) == 20 + 3 * int(stats.expands_B[0] - stats.collapses_B[0])
    return int(stats.expands_B[0]), int(stats.collapses_B[0])


def test_a_full_context_is_refocused_by_swaps():
    assert edit({0: 0.9} | LOW) == (1, 1)
    assert edit({0: 0.9} | LOW, budget=22) == (1, 1)  # two free places are too few for three more entries
    assert edit({0: 0.9}) == (0, 0)  # nothing pays for it
    assert edit({0: 0.9}, budget=23) == (1, 0)  # it fits
    assert edit(LOW) == (0, 0)  # nothing collapses for its own sake
    assert edit(LOW, budget=24) == (0, 0)


def test_edits_are_counted():
    assert edit({0: 0.9, 1: 0.8} | LOW, most=1) == (0, 0)  # a swap is two edits
    assert edit({0: 0.9, 1: 0.8} | LOW, most=1, budget=23) == (1, 0)
    assert edit({0: 0.9, 1: 0.8, 10: 0.7} | dict.fromkeys(range(2, 10), -0.5)) == (2, 2)
    assert edit({0: 0.9, 1: 0.8} | LOW, budget=14, most=1) == (0, 2)  # the budget is above their number


def test_thresholds():
    assert edit({0: 0.05} | LOW) == (0, 0)
    assert edit({0: 0.05} | LOW, expand_threshold=0.01) == (1, 1)
    assert edit({0: 0.9} | dict.fromkeys(range(2, 6), -0.05)) == (0, 0)
    assert edit({0: 0.9} | dict.fromkeys(range(2, 6), -0.05), collapse_threshold=0.01) == (1, 1)
    assert edit({0: 0.9, 2: -0.3}, collapse_threshold=0.08) == (0, 0)  # the mean of the group counts
    assert edit({0: 0.9, 2: -0.4}, collapse_threshold=0.08) == (1, 1)


def test_hysteresis():
    assert edit({0: 0.3} | LOW, hysteresis=0.81) == (0, 0)
    assert edit({0: 0.3} | LOW, hysteresis=0.79) == (1, 1)
    assert edit({0: 0.3}, budget=23, hysteresis=0.81) == (1, 0)  # only swaps must gain it


def test_cooldown():
    assert edit({0: 0.9} | LOW, age=0) == (0, 0)
    assert edit({0: 0.9} | LOW, age=3) == (0, 0)  # one of the group
    assert edit({0: 0.9} | LOW, age=3, cooldown=0) == (1, 1)
    assert edit(LOW, budget=17, age=3) == (0, 1)  # not where the budget asks
    focus, room = new_focus(small(), config(SMALL, DEFAULTS)), jnp.asarray([24], jnp.int32)
    edits = []
    for i in range(5):  # an expansion, then its undoing is asked for in vain for two iterations
        down = dict.fromkeys(range(4), -0.9) | {4: 0.9}
        scores = small_scores({0: 0.9} if i == 0 else down)
        focus, stats = step(focus, scores, room, None, DEFAULTS, shape=SMALL)
        edits.append((int(stats.expands_B[0]), int(stats.collapses_B[0])))
    assert edits == [(1, 0), (0, 0), (0, 0), (1, 1), (0, 0)]


def test_edit_cost():
    assert edit({0: 0.5} | LOW, edit_cost=0.45) == (0, 0)  # everything lies behind it
    assert edit({0: 0.5}, budget=23, edit_cost=0.45) == (0, 0)
    assert edit({10: 0.5}, budget=23, edit_cost=0.45) == (1, 0)  # less lies behind this one
    late = dict.fromkeys(range(6, 10), -0.4)
    assert edit({11: 0.9} | dict.fromkeys(range(2, 6), -0.4), edit_cost=0.4) == (0, 0)
    assert edit({11: 0.9} | late, edit_cost=0.4) == (1, 1)


def test_what_cannot_be_paid_for_waits():
    low, late = LOW | {0: 0.9}, dict.fromkeys(range(6, 10), -0.5) | {11: 0.9}
    assert edit(low, first=1) == (0, 0)
    assert edit(low, first=0) == (1, 1)
    assert edit(late, first=6) == (1, 1)
    assert edit(late, first=7) == (0, 0)  # the group begins before it
    assert edit({}, budget=17, first=20) == (0, 1)  # the budget is no wish


def test_an_edit_opens_what_lies_behind_it():
    cfg = config(SMALL, DEFAULTS | {"cooldown": 0})

    def score(layout):  # the raw blocks should go, the gist of tokens 16..19 should open
        start_BW = layouts.starts(layout, 4)
        return jnp.where(
            start_BW < 8, 0.0, jnp.where(start_BW < 12, -0.9, jnp.where(start_BW < 16, -0.5, 0.0))
        ) + (0.9 * (start_BW == 16))

    for budget, iterations, edits in ((20, 2, (0, 0)), (17, 1, (0, 1)), (17, 2, (1, 2))):
        _, stats = refocus_many(
            new_focus(small(), cfg), score, cfg, budget=budget, tokens=32, first=20, iterations=iterations
        )
        assert (int(stats.expands_B[0]), int(stats.collapses_B[0])) == edits


def test_slack_makes_forced_collapses_seldom():
    assert edit({}, budget=19) == (0, 1)
    assert edit({}, budget=19, slack=5) == (0, 2)
    assert edit({}, budget=20, slack=5) == (0, 0)  # within the budget nothing is forced
    assert edit({0: 0.9}, budget=23) == (1, 0)
    assert edit({0: 0.9}, budget=23, slack=1) == (0, 0)  # an expansion leaves it free,
    assert edit({0: 0.9} | LOW, budget=23, slack=1) == (1, 1)  # a swap takes nothing


def test_no_group_collapses_around_an_expansion():
    level, node = [1] * 6 + [0] * 8, [*range(6), *range(24, 32)]
    arrays = (np.pad([x], ((0, 0), (0, 10))) for x in (level, node, [True] * 14))
    focus = new_focus(Layout(*map(jnp.asarray, arrays)), config(SMALL, DEFAULTS))
    scores = dict.fromkeys(range(4), -0.9)
    for score, edits in ((0.2, (0, 0)), (0.0, (1, 1))):
        asked = small_scores(scores | {1: score, 4: 0.3})
        _, stats = step(focus, asked, jnp.asarray([14], jnp.int32), None, DEFAULTS, shape=SMALL)
        assert (int(stats.expands_B[0]), int(stats.collapses_B[0])) == edits


def test_the_tail_stays():
    assert edit({0: 0.9} | dict.fromkeys(range(12, 20), -0.9)) == (0, 0)
    assert edit({}, budget=2) == (0, 3)  # two raw blocks, then four gists into one; tokens 16..31 stay


def test_a_budget_that_shrank_is_met():
    assert edit({0: 0.9}, budget=17) == (0, 1)
    assert edit(dict.fromkeys(range(20), 0.9), budget=14) == (0, 2)  # whatever the scores ask for
    focus = new_focus(small(), config(SMALL))
    lower = small_scores(dict.fromkeys(range(6, 10), -0.1))
    after, _ = step(focus, lower, jnp.asarray([17], jnp.int32), None, DEFAULTS, shape=SMALL)
    assert (1, 3) in rows_of(after.layout)[0]  # the lower of the two blocks
    assert (1, 2) not in rows_of(after.layout)[0]


def test_a_budget_above_the_places_counts_as_these():
    assert edit({0: 0.9, 1: 0.8}, budget=100) == (1, 0)
    assert edit({0: 0.9, 1: 0.8} | LOW, budget=100) == (2, 1)


def test_expanding_a_collapsed_block_brings_its_tokens_back():
    marks, layout = jnp.zeros((1, 24), bool), small()
    age = jnp.ones((1, 24), jnp.int32)
    folded, age = apply(layout, age, marks, marks.at[0, 6].set(True), block=4)
    assert rows_of(folded, age)[0][6] == (1, 3, 0)
    back, _ = apply(folded, age, marks.at[0, 6].set(True), marks, block=4)
    jax.tree.map(np.testing.assert_array_equal, back, layout)


# --- Statistics, iterations, draws -----------------------------------------------------------------------


def test_statistics():
    shape = SHAPES[0]
    focus = new_focus(begin(8, shape), config(shape))
    focus = focus._replace(age_BW=jax.random.randint(jax.random.key(2), focus.age_BW.shape, 0, 50))
    score = jax.random.uniform(jax.random.key(5), focus.layout.level_BW.shape, minval=-1)
    budget = jnp.asarray(np.random.default_rng(1).integers(60, 81, ROWS), jnp.int32)
    after, stats = step(focus, score, budget, None, GRID, shape=shape)
    edits = stats.expands_B + stats.collapses_B
    np.testing.assert_allclose(stats.swap_rate_B, edits / focus.layout.count_B, rtol=1e-6)
    np.testing.assert_allclose(stats.utilization_B, after.layout.count_B / budget, rtol=1e-6)
    ages = [np.asarray([age for *_, age in row]) for row in rows_of(after.layout, after.age_BW)]
    np.testing.assert_allclose(stats.residency_mean_B, [x.mean() for x in ages], rtol=1e-6)
    np.testing.assert_allclose(stats.residency_p95_B, [np.quantile(x, 0.95) for x in ages], rtol=1e-5)


def test_iterations_see_fresh_scores():
    cfg, T = config(SMALL, DEFAULTS | {"cooldown": 1}), 32

    def score(layout):  # wants the newest raw, the oldest coarse
        return layouts.starts(layout, 4) / 16 - 0.9

    @partial(jax.jit, static_argnums=1)
    def many(focus, iterations):
        return refocus_many(focus, score, cfg, budget=20, tokens=T, iterations=iterations)

    start = new_focus(small(), cfg)
    focus, total = start, np.zeros(3)
    for _ in range(3):
        focus, stats = step(
            focus, score(focus.layout), jnp.asarray([20]), None, DEFAULTS | {"cooldown": 1}, shape=SMALL
        )
        total += [float(x[0]) for x in stats[:3]]
    found, summed = many(start, 3)
    jax.tree.map(np.testing.assert_array_equal, found, focus)
    np.testing.assert_allclose([float(x[0]) for x in summed[:3]], total, rtol=1e-6)
    assert total[0] > 0
    for name in ("utilization_B", "residency_mean_B", "residency_p95_B"):
        np.testing.assert_array_equal(getattr(summed, name), getattr(stats, name))
    same, none = many(start, 0)
    jax.tree.map(np.testing.assert_array_equal, same, start)
    assert (int(none.expands_B[0]), float(none.utilization_B[0])) == (0, 1.0)


def test_stochastic_choice_draws_among_the_best_by_softmax():
    rows, cfg = 4096, AllocatorConfig(4, 2, 8, kind="stochastic_greedy", top_k=2, temperature=0.25)
    focus = new_focus(small(rows), cfg)
    score = jnp.broadcast_to(small_scores({0: 0.3, 1: 0.9, 10: 0.4, 11: 0.2}), (rows, 24))
    run = jax.jit(partial(refocus, cfg=cfg, budget=24, tokens=32))
    after, stats = run(focus, score, key=jax.random.key(1))
    assert (stats.expands_B == 1).all()
    chosen = np.asarray((focus.layout.level_BW != after.layout.level_BW).argmax(1))
    assert set(chosen.tolist()) == {1, 10}
    share = 1 / (1 + np.exp(-0.5 / 0.25))
    assert abs((chosen == 1).mean() - share) < 4 * np.sqrt(share * (1 - share) / rows)
    other, _ = run(focus, score, key=jax.random.key(2))
    assert (other.layout.level_BW != after.layout.level_BW).any()


def test_stochastic_choice_among_one_is_greedy():
    shape = SHAPES[0]
    focus = new_focus(begin(4, shape), config(shape, FINE))
    score = jax.random.uniform(jax.random.key(3), focus.layout.level_BW.shape, minval=-1)
    budget, key = focus.layout.count_B + 3, jax.random.split(jax.random.key(7), ROWS)
    greedy = step(focus, score, budget, key, FINE, shape=shape)
    one = step(focus, score, budget, key, FINE, shape=shape, kind="stochastic_greedy", top_k=1)
    jax.tree.map(np.testing.assert_array_equal, greedy, one)
    four = step(focus, score, budget, key, FINE, shape=shape, kind="stochastic_greedy")
    assert 0.1 < (four[0].layout.node_BW != greedy[0].layout.node_BW).any(1).mean() < 1.0


def test_other_kinds_are_refused():
    with pytest.raises(UserError, match="greedy"):
        AllocatorConfig(block=4, max_level=2, kind="simple")
