"""Gist attention: the pattern itself, and every implementation against the reference."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import GistSpec, Refused, gist_attention
from kernels_pallas.shapes import EDGES, Problem
from tests import quick

SPECS = st.builds(
    lambda r, w, m, levels: GistSpec(r, r * w, m, levels),
    st.sampled_from((2, 3, 4, 8, 32)),
    st.integers(0, 5),
    st.integers(0, 3),
    st.integers(1, 5),
)


def jit(fn):
    return jax.jit(fn, compiler_options=quick.OPTIONS)


def relative(found, wanted) -> float:
    """Norm of the difference over all levels, relative to that of what is wanted."""
    found, wanted = (np.concatenate([np.ravel(x).astype(np.float64) for x in xs]) for xs in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


# --- Who sees whom --------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(spec=SPECS, t=st.integers(0, 100_000))
def test_a_token_sees_every_earlier_token_exactly_once(spec, t):
    nearest = covers(spec, t)
    assert t // spec.block * spec.block - nearest <= spec.window


def covers(spec, t) -> int:
    """Checks that a token sees every token up to itself exactly once; the first that it sees as a token."""
    seen = []
    for level, (first, stop) in enumerate(spec.key_ranges(0, t)):
        span = spec.block**level
        if first < stop:
            seen.append((first * span, stop * span))
    seen.sort()
    assert seen[0][0] == 0
    assert seen[-1][1] == t + 1
    assert all(a[1] == b[0] for a, b in pairwise(seen)), seen
    return seen[-1][0]


@settings(max_examples=300, deadline=None)
@given(spec=SPECS, level=st.integers(1, 5), index=st.integers(0, 500))
def test_a_gist_sees_its_own_span_and_nothing_behind_it(spec, level, index):
    level = min(level, spec.levels)
    end = (index + 1) * spec.block**level
    ranges = spec.key_ranges(level, index)
    token = spec.key_ranges(0, end - 1)
    for m, (first, stop) in enumerate(ranges):
        assert first == token[m].start
        assert stop * spec.block**m <= end
        assert stop == (end // spec.block**m if m <= level else token[m].stop)
    assert ranges[level].start <= index < ranges[level].stop


def test_detail_falls_with_distance_and_the_number_of_keys_stays_small():
    spec = GistSpec()
    counts = {t: sum(stop - first for first, stop in spec.key_ranges(0, t)) for t in (8_191, 65_535)}
    assert counts[8_191] < 400  # design: about 324 on average
    assert counts[65_535] < 430
    deep = GistSpec(levels=4)
    assert sum(stop - first for first, stop in deep.key_ranges(0, 1_000_000)) < 450


def test_more_levels_change_nothing_before_they_are_needed():
    spec, deeper = GistSpec(4, 8, 1, 2), GistSpec(4, 8, 1, 4)
    for t in range(64 + 64):
        assert [*spec.key_ranges(0, t), (0, 0), (0, 0)] == deeper.key_ranges(0, t)


@settings(max_examples=200, deadline=None)
@given(
    spec=SPECS,
    more=st.integers(1, 3),
    tokens=st.integers(1, 2000),
    at=st.integers(0, 1999),
    far=st.integers(0, 100_000),
)
def test_a_deeper_pattern_is_the_same_for_as_many_tokens_as_it_is_told(spec, more, tokens, at, far):
    deeper, nothing = spec.deeper(spec.levels + more, tokens), [(0, 0)] * more
    assert deeper.levels == spec.levels + more
    t = at % tokens
    assert [*spec.key_ranges(0, t), *nothing] == deeper.key_ranges(0, t)
    for level in range(1, spec.levels + 1):
        row = (t + 1) // spec.block**level - 1
        if row >= 0:
            assert [*spec.key_ranges(level, row), *nothing] == deeper.key_ranges(level, row)
    covers(deeper, far)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mid_spans": (1, 2, 3)}, "must be one number, or 1 for 2 levels"),
        ({"mid_spans": (-1,)}, "cannot be negative"),
        ({"block": 1}, "block 1 must be at least 2"),
        ({"window": 100}, "window 100 must be a multiple of block 32"),
        ({"window": -32}, "window -32 must be a multiple"),
        ({"mid_spans": -1}, "mid_spans -1 cannot be negative"),
        ({"levels": 0}, "levels 0 must be at least 1"),
    ],
)
def test_impossible_patterns_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        GistSpec(**fields)


# --- The reference --------------------------------------------------------------------------------------


def plain(q, k, v, spec, level, index, head, group):
    """One output in float64 by lists."""
    keys, values = [], []
    for m, (first, stop) in enumerate(spec.key_ranges(level, index)):
        keys += [k[m][0, j, head // group] for j in range(first, stop)]
        values += [v[m][0, j, head // group] for j in range(first, stop)]
    asking = np.asarray(q[level][0, index, head], np.float64)
    s = np.array(keys, np.float64) @ asking / np.sqrt(len(asking))
    p = np.exp(s - s.max())
    return p / p.sum() @ np.array(values, np.float64)


def test_the_reference_is_a_softmax_over_the_rows_that_are_seen():
    problem = EDGES["three per key head"]
    q, k, v, _ = problem.arrays()
    out = jit(partial(gist_attention, spec=problem.spec, implementation="reference"))(q, k, v)
    rng = np.random.default_rng(0)
    for level, rows in enumerate(problem.spec.rows(problem.tokens)):
        for index in {0, rows - 1, *rng.integers(0, rows, 5).tolist()}:
            wanted = plain(q, k, v, problem.spec, level, index, 4, 3)
            np.testing.assert_allclose(out[level][0, index, 4], wanted, rtol=1e-5, atol=1e-5)


def test_no_output_depends_on_a_later_token():
    """By gradients: of one output of each level, with respect to every key and value row."""
    problem = Problem(130, GistSpec(4, 8, 1, 2))
    q, k, v, _ = problem.arrays()
    r = problem.spec.block

    @jit
    def push(k, v, level_weights):
        def pick(k, v):
            out = gist_attention(q, k, v, spec=problem.spec, implementation="reference")
            return sum((o * w).sum() for o, w in zip(out, level_weights, strict=True))

        return jax.grad(pick, argnums=(0, 1))(k, v)

    for level, index in ((0, 70), (0, 129), (1, 17), (2, 3)):
        weights = tuple(jnp.zeros_like(x) for x in q)
        weights = tuple(w.at[:, index].set(1.0) if m == level else w for m, w in enumerate(weights))
        end = (index + 1) * r**level
        for grads in push(k, v, weights):
            touched = set()
            for m, grad in enumerate(grads):
                rows = np.flatnonzero(np.abs(np.asarray(grad)).sum((0, 2, 3)))
                assert all((row + 1) * r**m <= end for row in rows), (level, index, m)
                touched |= {t for row in rows for t in range(row * r**m, (row + 1) * r**m)}
            assert touched == set(range(end))


# --- Implementations against the reference --------------------------------------------------------------


def both(problem: Problem, implementation: str, dtype=jnp.float32, segment_ids=None):
    """(outputs and gradients of q, k, v) of an implementation and of the float32 reference."""

    def run(arrays, implementation):
        *inputs, weights = arrays

        def loss(q, k, v):
            out = gist_attention(
                q, k, v, spec=problem.spec, segment_ids=segment_ids, implementation=implementation
            )
            return sum((o.astype(jnp.float32) * w).sum() for o, w in zip(out, weights, strict=True)), out

        grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs)
        return (out, *grads)

    arrays = problem.arrays(dtype=dtype)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    found = jit(partial(run, implementation=implementation))(arrays)
    return found, jit(partial(run, implementation="reference"))(exact)


@pytest.mark.parametrize("name", EDGES)
def test_xla_is_the_reference(name):
    found, wanted = both(EDGES[name], "xla")
    for what, ours, theirs in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert relative(ours, theirs) < 2e-5, what
        assert all(np.isfinite(x).all() for x in ours), what


def test_xla_windows_that_would_reach_behind_the_last_row():
    """640 is the first length at which a tile of this pattern needs less of level 1 than its loop reads."""
    found, wanted = both(Problem(640, GistSpec(16, 0, 1, 2)), "xla")
    assert all(relative(ours, theirs) < 2e-5 for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_bfloat16_stays_near_the_float32_reference(implementation):
    found, wanted = both(EDGES["window not in tiles"], implementation, jnp.bfloat16)
    for what, ours, theirs in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert all(x.dtype == jnp.bfloat16 for x in ours)
        assert relative(ours, theirs) < 1e-2, what


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_packed_documents_do_not_see_each_other(implementation):
    """Each document of a packed row comes out as if it were alone."""
    spec = GistSpec(4, 8, 1, 2)
    ends = (16, 96, 112, 208)  # documents start on multiples of 16
    problem = Problem(ends[-1], spec, batch=2)
    q, k, v, _ = problem.arrays()
    ids_T = np.searchsorted(ends, np.arange(ends[-1]), side="right")
    ids_BT = jnp.asarray(np.stack([ids_T, np.zeros_like(ids_T)]), jnp.int32)
    call = partial(gist_attention, spec=spec, implementation=implementation)
    packed = jit(call)(q, k, v, segment_ids=ids_BT)
    for start, end in zip((0, *ends), ends, strict=False):
        alone = [tuple(x[:1, start // 4**m : end // 4**m] for m, x in enumerate(xs)) for xs in (q, k, v)]
        wanted = jit(call)(*alone)
        part = tuple(x[:1, start // 4**m : end // 4**m] for m, x in enumerate(packed))
        assert relative(part, wanted) < 2e-6
    whole = jit(call)(*(tuple(x[1:] for x in xs) for xs in (q, k, v)))
    assert relative(tuple(x[1:] for x in packed), whole) < 2e-6


def test_gradients_of_packed_documents():
    spec = GistSpec(4, 8, 1, 2)
    ids_BT = jnp.asarray(np.repeat([[0, 1, 2]], [16, 64, 48], axis=1), jnp.int32)
    found, wanted = both(Problem(128, spec), "xla", segment_ids=ids_BT)
    assert all(relative(ours, theirs) < 2e-5 for ours, theirs in zip(found, wanted, strict=True))


def test_xla_memory_grows_with_the_tokens_alone():
    """One head of 64, forward and backward, 65,536 tokens: under 2 GB, and twice that of half as many."""
    spec = GistSpec()

    def bytes_of(tokens: int) -> int:
        shapes = [jax.ShapeDtypeStruct((1, n, 1, 64), jnp.float32) for n in spec.rows(tokens)]
        push = jax.grad(
            lambda *x: sum((o * o).sum() for o in gist_attention(*x, spec=spec)), argnums=(0, 1, 2)
        )
        memory = jit(push).lower(shapes, shapes, shapes).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes

    most, half = bytes_of(65_536), bytes_of(32_768)
    assert most < 2e9
    assert most < 2.2 * half


def test_an_id_that_comes_back_is_another_document():
    q, k, v, _ = Problem(48, GistSpec(4, 16, 1, 2)).arrays()
    found = [
        gist_attention(
            q, k, v, spec=GistSpec(4, 16, 1, 2), segment_ids=jnp.repeat(jnp.array([ids]), 16, axis=1)
        )
        for ids in ([7, 1, 7], [0, 1, 2], [7, 7, 7])
    ]
    for a, b in zip(found[0], found[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert relative(found[0], found[2]) > 0.1


# --- What is refused ------------------------------------------------------------------------------------


def test_calls_that_do_not_fit_are_refused():
    problem = EDGES["odd length"]
    q, k, v, _ = problem.arrays()
    call = partial(gist_attention, spec=problem.spec)
    with pytest.raises(Refused, match=r"no implementation 'cuda'; choose from mosaic_gpu, xla, reference"):
        call(q, k, v, implementation="cuda")
    with pytest.raises(ValueError, match=r"2, 3 and 3 levels of q, k, v; the spec has 3"):
        call(q[:2], k, v)
    with pytest.raises(
        ValueError, match=r"k of level 1 has shape \(2, 74, 1, 16\); 301 tokens ask for \(2, 75, 1, 16\)"
    ):
        call(q, (k[0], k[1][:, :-1], k[2]), v)
    with pytest.raises(ValueError, match="v of level 0 is int32"):
        call(q, k, (v[0].astype(jnp.int32), *v[1:]))
    with pytest.raises(ValueError, match=r"segment_ids has shape \(2, 300\); it must be \(2, 301\)"):
        call(q, k, v, segment_ids=jnp.zeros((2, 300), jnp.int32))
    with pytest.raises(ValueError, match="2 query heads are not a multiple of 3 key heads"):
        call(q, tuple(jnp.repeat(x, 3, axis=2) for x in k), v)
