"""The tables of the GPU kernels: every visible pair in exactly one visited tile, full tiles full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import GistSpec
from kernels_pallas.mosaic_gpu.config import SHARED_MEMORY, Config, candidates, default, shared_memory
from kernels_pallas.mosaic_gpu.tiles import Tiles, density, plan


def visible(tiles: Tiles) -> np.ndarray:
    """bool [R, S] by the ranges that each query sees."""
    seen = np.zeros((len(tiles.query_R), tiles.offsets[-1]), bool)
    for m, (begin, end) in enumerate(zip(tiles.offsets[:-1], tiles.offsets[1:], strict=True)):
        row = np.arange(end - begin)
        first, stop = tiles.first_LR[m, :, None], tiles.stop_LR[m, :, None]
        seen[:, begin:end] = (row >= first) & (row < stop)
    return seen


@given(
    block=st.integers(2, 9),
    windows=st.integers(0, 12),
    middle=st.integers(0, 3),
    levels=st.integers(1, 4),
    tokens=st.integers(1, 900),
    block_k=st.sampled_from([64, 128]),
)
@settings(max_examples=60, deadline=None)
def test_every_pair_is_visited_once(block, windows, middle, levels, tokens, block_k):
    spec, config = GistSpec(block, windows * block, middle, levels), Config(block_k)
    tiles = plan(spec, tokens, config)
    sizes = spec.rows(tokens)
    seen = visible(tiles)

    # the stream holds every row once, with the ranges of the definition
    assert sorted(tiles.query_R[tiles.query_R >= 0]) == list(range(sum(sizes)))
    np.testing.assert_array_equal(tiles.query_R[tiles.place], np.arange(sum(sizes)))
    before = 0
    for level, n in enumerate(sizes):
        counts = sum(stop - start for start, stop in spec.key_ranges(level, np.arange(n)))
        np.testing.assert_array_equal(seen[tiles.place[before : before + n]].sum(1), counts)
        before += n

    real = tiles.query_R >= 0
    for visits, rows, keys, transposed in (
        (tiles.keys_of_queries, 128, block_k, False),
        (tiles.queries_of_keys, 64, 128, True),
    ):
        blocks = seen.reshape(len(seen) // rows, rows, -1, keys).transpose(0, 2, 1, 3)
        some = blocks.any((2, 3))
        all_ = (blocks | ~real.reshape(-1, 1, rows, 1)).all((2, 3))
        if transposed:
            some, all_ = some.T, all_.T
        for n, (steps, full, count) in enumerate(
            zip(visits.step_NS, visits.full_N, visits.all_N, strict=True)
        ):
            visited = steps[:count]
            assert len(set(visited)) == count
            assert set(np.flatnonzero(some[n])) <= set(visited)
            assert all_[n, visited[:full]].all()
        assert list(visits.all_N[visits.order_N]) == sorted(visits.all_N, reverse=True)


def test_far_tiles_are_full_and_the_work_falls_with_length():
    spec, config = GistSpec(), Config()
    tiles = plan(spec, 65_536, config)
    assert tiles.keys_of_queries.full_N.sum() > 0
    found = [density(spec, T, config) for T in (2048, 4096, 8192, 65_536)]
    assert found == sorted(found, reverse=True)
    assert found[0] < 0.6
    assert found[-1] < 0.03


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_fit(head_dim):
    assert max(shared_memory(default(head_dim), head_dim, 4).values()) < SHARED_MEMORY
    assert default(head_dim) in candidates(head_dim, 2)
