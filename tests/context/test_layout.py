"""Layouts: the invariants of every drawn working context, and that each broken one is told."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext_jax.context import layout as layouts
from megacontext_jax.errors import UserError

# (tokens, block, levels, recent, wanted width)
SHAPES = (
    (256, 4, 3, 16, 64),
    (250, 8, 2, 32, 100),
    (64, 2, 4, 5, 12),
    (2048, 32, 2, 128, 600),
    (40, 4, 2, 0, 40),
    (97, 3, 1, 0, 33),
    (90, 3, 3, 9, 15),
    (20, 8, 3, 16, 20),
)
ROWS = 512


@partial(jax.jit, static_argnums=1)
def draw(seed, shape, oldest_first=False):
    tokens, block, levels, recent, wanted = shape
    options = {"block": block, "levels": levels, "recent": recent}
    width = layouts.reachable_width(wanted, tokens, **options)
    cut = layouts.compress(jax.random.key(seed), ROWS, tokens, width, oldest_first=oldest_first, **options)
    broken = layouts.violations(
        cut.layout, block=block, tokens=tokens, budget=wanted, recent=recent, max_level=levels
    )
    return cut, broken


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31 - 1), shape=st.sampled_from(SHAPES))
def test_drawn_layouts_break_no_invariant(seed, shape):
    """20 examples of 512 rows: 10,240 windows."""
    tokens, block, levels, recent, wanted = shape
    cut, broken = draw(seed, shape)
    assert {name: int(bad.sum()) for name, bad in broken.items()} == dict.fromkeys(broken, 0)
    assert cut.layout.valid_BW.all()
    width = layouts.reachable_width(wanted, tokens, block=block, levels=levels, recent=recent)
    assert cut.layout.level_BW.shape == (ROWS, width)
    assert wanted - block + 1 < width <= wanted
    tail = cut.layout.level_BW[:, width - min(recent, width) :]
    assert (tail == 0).all()
    again, _ = draw(seed, shape)
    jax.tree.map(np.testing.assert_array_equal, again, cut)


@pytest.mark.parametrize("shape", SHAPES)
def test_first_and_last_tokens_count_the_whole_sequence(shape):
    cut, _ = draw(4, shape)
    begin, last = (np.asarray(f(cut.layout, shape[1])) for f in (layouts.starts, layouts.last_tokens))
    for row in range(8):
        covered = [np.arange(a, b + 1) for a, b in zip(begin[row], last[row], strict=True)]
        np.testing.assert_array_equal(np.concatenate(covered), np.arange(shape[0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_block_levels_are_those_of_the_entries(shape):
    cut, _ = draw(3, shape)
    block = shape[1]
    level, begin = (np.asarray(x) for x in (cut.layout.level_BW, layouts.starts(cut.layout, block)))
    shown = np.pad(np.asarray(cut.block_level_BN), ((0, 0), (0, 1)))  # behind the blocks: raw
    inside = begin // block < shown.shape[1]
    rows = np.arange(ROWS)[:, None]
    at = np.minimum(begin // block, shown.shape[1] - 1)
    assert (np.where(inside, shown[rows, at], 0) == level).all()


def test_layouts_vary_and_oldest_first_does_not():
    shape = SHAPES[0]
    cut, _ = draw(1, shape)
    assert len(np.unique(np.asarray(cut.block_level_BN), axis=0)) > 0.5 * ROWS
    assert len(np.unique(np.asarray(cut.layout.level_BW > 1).sum(1))) > 5  # also how many upper gists
    every_other = np.arange(ROWS) % 2 == 0
    some, _ = draw(1, shape, every_other)
    first, broken = draw(1, shape, np.ones(ROWS, bool))
    np.testing.assert_array_equal(some.block_level_BN[::2], first.block_level_BN[::2])
    np.testing.assert_array_equal(some.block_level_BN[1::2], cut.block_level_BN[1::2])
    assert len(np.unique(np.asarray(first.block_level_BN), axis=0)) == 1
    assert not any(bad.any() for bad in broken.values())
    levels = np.asarray(first.block_level_BN)[0]
    assert (np.diff(levels[levels.nonzero()]) <= 0).all()  # coarse, then finer, then raw
    assert (np.diff((levels > 0).astype(int)) <= 0).all()


def legal() -> layouts.Layout:
    """16 tokens in blocks of 4: a gist, then twelve raw tokens, one place unused."""
    level = jnp.asarray([[1] + [0] * 12 + [0]])
    node = jnp.asarray([[0, *range(4, 16), 0]])
    return layouts.Layout(level, node, jnp.arange(14)[None] < 13)


# "alignment" has no case: a whole node cannot start off a multiple of its span, whatever the arrays hold
BREAKS = {
    "budget": ("budget", lambda x: (x, {"budget": 12})),
    "a token twice, another not at all": (
        "contiguity",
        lambda x: (x._replace(node_BW=x.node_BW.at[0, 5].set(9)), {}),
    ),
    "the first token is missing": (
        "contiguity",
        lambda x: (layouts.Layout(*(y[:, 1:] for y in x)), {}),
    ),
    "the last token is missing": ("contiguity", lambda x: (x, {"tokens": 17})),
    "a token too many": ("contiguity", lambda x: (x, {"tokens": 15})),
    "a gist over its own tokens": (
        "contiguity",
        lambda x: (x._replace(level_BW=x.level_BW.at[0, 1].set(1), node_BW=x.node_BW.at[0, 1].set(0)), {}),
    ),
    "above the highest level": ("legality", lambda x: (x, {"max_level": 0})),
    "a gist in the raw tail": ("tail", lambda x: (x, {"recent": 13})),
}


@pytest.mark.parametrize("case", BREAKS)
def test_each_broken_invariant_is_told(case):
    name, change = BREAKS[case]
    options = {"block": 4, "tokens": 16, "budget": 13, "recent": 4, "max_level": 2}
    whole = layouts.violations(legal(), **options)
    assert not any(bool(bad[0]) for bad in whole.values())
    broken, changed = change(legal())
    told = layouts.violations(broken, **(options | changed))
    assert [key for key, bad in told.items() if bool(bad[0])] == [name]


@pytest.mark.parametrize("hole", ["gap at the end", "a place in the middle"])
def test_missing_tokens_are_told(hole):
    place = 12 if hole == "gap at the end" else 6
    broken = legal()._replace(valid_BW=legal().valid_BW.at[0, place].set(False))
    told = layouts.violations(broken, block=4, tokens=16, budget=13, recent=4, max_level=2)
    assert bool(told["contiguity"][0])


def test_widths_that_cannot_be_reached_are_refused():
    options = {"block": 4, "levels": 2, "recent": 8}
    fewest = layouts.fewest_entries(64, **options)
    assert layouts.reachable_width(fewest, 64, **options) == fewest
    assert layouts.reachable_width(64, 64, **options) == 64
    for target in range(fewest, 65):
        width = layouts.reachable_width(target, 64, **options)
        assert target - 3 < width <= target
    with pytest.raises(UserError, match=f"at least {fewest}"):
        layouts.reachable_width(fewest - 1, 64, **options)


def test_raw_entries_are_appended_behind_the_valid_ones():
    longer = layouts.append_raw(legal(), 16, 3)
    told = layouts.violations(longer, block=4, tokens=19, budget=16, recent=4, max_level=2)
    assert not any(bool(bad[0]) for bad in told.values())
    assert int(longer.count_B[0]) == 16


# --- Layouts of any length --------------------------------------------------------------------------------


@given(
    tokens=st.integers(1, 4**9),
    block=st.sampled_from([2, 4, 8, 32]),
    spare=st.integers(0, 200),
    recent=st.integers(0, 40),
)
@settings(max_examples=300, deadline=None)
def test_a_history_of_any_length_fits(tokens, block, spare, recent):
    max_level = next(n for n in range(1, 20) if block ** (n + 1) >= 4**9)
    budget = layouts.enough_entries(block=block, levels=max_level, recent=recent) + spare
    level, node = layouts.tapered_layout(tokens, budget, block=block, max_level=max_level, recent=recent)
    span = block ** level.astype(np.int64)
    ends = np.cumsum(span)
    assert len(level) <= budget
    assert ends[-1] == tokens
    np.testing.assert_array_equal(node * span, ends - span)  # aligned, without gap or overlap
    assert (ends[level > 0] <= tokens - recent).all()
    assert (np.diff(level) <= 0).all()  # detail falls with distance
    if tokens <= budget:
        assert not level.any()
