"""Tables of the Hopper kernels: every visible pair is met exactly once, and whole tiles are whole."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import GistSpec, Refused, api, choose, describe
from kernels_pallas.mosaic_gpu import call, config, tiles
from kernels_pallas.mosaic_gpu.config import SHARED_MEMORY, default_config, largest, tuning_configs
from kernels_pallas.mosaic_gpu.tiles import LEVEL_SHIFT, Keys, Stream
from tests.kernels.test_gist_attention import SPECS

UNIT = 32  # small tiles: many of them at lengths that a dense mask can hold
STREAMS = st.builds(lambda spec, tokens: Stream(spec, tokens, UNIT), SPECS, st.integers(1, 500))


def dense(stream: Stream, document_T=None) -> list[np.ndarray]:
    """Per key level, [rows of the stream, rows of the level]: who sees whom, row by row from the definition."""
    spec, r = stream.spec, stream.spec.block
    entries = sorted(((i + 1) * r**level, level, i) for level, n in enumerate(stream.rows) for i in range(n))
    seen = [np.zeros((stream.length, n), bool) for n in stream.rows]
    for place, (end, level, index) in enumerate(entries):
        for m, (first, stop) in enumerate(spec.key_ranges(level, index)):
            for key in range(first, stop):
                if document_T is None or document_T[key * r**m] == document_T[end - 1]:
                    seen[m][place, key] = True
    return seen


def in_tiles(seen_NS: np.ndarray, query_tile: int, key_tile: int) -> np.ndarray:
    """[query tiles, key tiles]: pairs seen in each."""
    rows = -(-seen_NS.shape[1] // key_tile) * key_tile
    padded = np.pad(seen_NS, ((0, 0), (0, rows - seen_NS.shape[1])))
    shape = len(padded) // query_tile, query_tile, rows // key_tile, key_tile
    return padded.reshape(shape).sum((1, 3))


def check_query_lists(seen: list[np.ndarray], visits: tiles.Visits, query_tile: int, key_tile: int) -> None:
    counts = [in_tiles(x, query_tile, key_tile) for x in seen]
    met = [np.zeros(x.shape, int) for x in counts]
    for i, (visit, full, count) in enumerate(zip(*visits, strict=True)):
        for step, name in enumerate(visit[:count]):
            level, tile = name >> LEVEL_SHIFT, name & (2**LEVEL_SHIFT - 1)
            met[level][i, tile] += 1
            if step < full:
                assert counts[level][i, tile] == query_tile * key_tile, "a tile without a mask is not whole"
    for some, times in zip(counts, met, strict=True):
        assert times.max(initial=0) <= 1, "a tile is visited twice"
        assert (times[some > 0] == 1).all(), "a visible pair is in no visited tile"


@settings(max_examples=60, deadline=None)
@given(stream=STREAMS)
def test_the_stream_holds_every_row_once_in_the_order_of_time(stream):
    order, total = stream.order(), sum(stream.rows)
    assert sorted(order[:total]) == list(range(total))
    assert (order[total:] == total).all()
    assert len(order) % UNIT == 0
    assert (np.diff(stream.last_tokens()[:total]) >= 0).all()
    for level, place in enumerate(stream.places()):
        first = sum(stream.rows[:level])
        assert (order[place] == np.arange(first, first + stream.rows[level])).all()


@settings(max_examples=60, deadline=None)
@given(stream=STREAMS)
def test_ranges_are_those_of_the_definition(stream):
    for (first_N, stop_N), seen_NS in zip(stream.ranges(), dense(stream), strict=True):
        row_S = np.arange(seen_NS.shape[1])
        assert (((row_S >= first_N[:, None]) & (row_S < stop_N[:, None])) == seen_NS).all()


@settings(max_examples=60, deadline=None)
@given(stream=STREAMS, query_tile=st.sampled_from((16, 32)), key_tile=st.sampled_from((8, 16, 32)))
def test_every_visible_pair_is_in_one_visited_tile(stream, query_tile, key_tile):
    lists = tiles.query_lists(stream, query_tile, key_tile)
    visits = lists.visits(tiles.bounds(stream.ranges(), query_tile), key_tile)
    check_query_lists(dense(stream), visits, query_tile, key_tile)


@settings(max_examples=60, deadline=None)
@given(stream=STREAMS, longest=st.integers(1, 9))
def test_key_lists_are_the_transpose(stream, longest):
    query_tile, key_tile = 16, 32
    found = tiles.pairs(stream, query_tile, key_tile)
    wanted = sorted(zip(found.query, found.level, found.key, strict=True))
    limits = tiles.bounds(stream.ranges(), query_tile)
    seen, listed = dense(stream), []
    keys = Keys(stream.rows, key_tile)
    for above in (False, True):
        lists = tiles.key_lists(stream, query_tile, key_tile, above, longest)
        visits = lists.visits(limits, key_tile)
        assert (visits.count == (lists.query >= 0).sum(1)).all(), "a listed tile sees nothing"
        for (first, level, start), visit, full, count in zip(lists.name, *visits, strict=True):
            assert first == keys.starts[level] + start
            assert not above or count <= longest
            listed += [(query, level, start // key_tile) for query in visit[:count]]
            for query in visit[:full]:
                assert (
                    in_tiles(seen[level], query_tile, key_tile)[query, start // key_tile]
                    == query_tile * key_tile
                )
        if above:
            owners = {
                item: tile
                for tile, items in enumerate(lists.parts)
                for item in items
                if item < len(lists.name)
            }
            assert owners == {item: name[0] // key_tile for item, name in enumerate(lists.name)}
        else:
            assert (lists.name[:, 0] == np.arange(len(lists.name)) * key_tile).all()
    assert sorted(listed) == wanted


@pytest.mark.parametrize(
    ("spec", "lengths"),
    [
        (GistSpec(2, 4, 1, 3), (3, 1, 7, 2)),
        (GistSpec(4, 0, 0, 2), (1, 6, 5)),
        (GistSpec(8, 64, 1, 1), (4, 9, 1)),
        (GistSpec(4, 8, 2, 2), (12,)),
    ],
)
def test_documents_only_cut_ranges(spec, lengths):
    unit = spec.block**spec.levels
    document_T = np.repeat(np.arange(len(lengths)) % 2, np.array(lengths) * unit)  # ids come back
    stream = Stream(spec, len(document_T), UNIT)
    run_T = np.repeat(np.arange(len(lengths)), np.array(lengths) * unit)
    ranges = np.asarray(call.visible(stream, jnp.asarray(document_T[None], jnp.int32)))
    seen = dense(stream, run_T)
    for (first_N, stop_N), seen_NS in zip(ranges[0], seen, strict=True):
        row_S = np.arange(seen_NS.shape[1])
        assert (((row_S >= first_N[:, None]) & (row_S < stop_N[:, None])) == seen_NS).all()
    lists = tiles.query_lists(stream, 16, 16)
    visits = lists.visits(tiles.bounds(jnp.asarray(ranges), 16, jnp), 16, jnp)
    check_query_lists(seen, tiles.Visits(*(np.asarray(x[0]) for x in visits)), 16, 16)


def test_the_visited_share_of_dense_causal_attention_falls():
    """Window 256, blocks of 32, two levels; tiles of 128 by 128."""
    share = {n: tiles.density(Stream(GistSpec(), n, 128)) for n in (2_048, 4_096, 8_192, 65_536)}
    assert share[4_096] < 0.40
    assert share[8_192] < 0.22
    assert share[65_536] < 0.03


@pytest.mark.parametrize("head_dim", [64, 128])
def test_configurations_fit_the_shared_memory(head_dim):
    assert largest(default_config(head_dim), head_dim, levels=9) <= SHARED_MEMORY
    found = tuning_configs(head_dim)
    assert len({default_config(head_dim), *found}) == 1 + len(found)
    assert all(largest(config, head_dim, levels=3) <= SHARED_MEMORY for config in found)


# --- What does not run says why -------------------------------------------------------------------------


def test_what_the_kernels_cannot_take_is_said():
    assert config.refusal(GistSpec(), 128, jnp.bfloat16) is None
    for options, words in (
        ((GistSpec(), 128, jnp.float32), "TF32"),
        ((GistSpec(), 96, jnp.bfloat16), "heads of 64 or 128"),
        ((GistSpec(4, 16), 64, jnp.bfloat16), "blocks of 8, 32, 128"),
        ((GistSpec(levels=60), 128, jnp.bfloat16), "shared memory"),
    ):
        assert words in config.refusal(*options)


def test_a_fallback_is_told_and_can_be_forbidden(monkeypatch):
    options = {"spec": GistSpec(), "dtype": jnp.bfloat16, "head_dim": 64}
    assert describe(choose(**options)) == "gist attention: xla (mosaic_gpu: this machine has no Hopper GPU)"
    assert describe(choose("reference", **options)) == "gist attention: reference"
    for wanted, more in (("mosaic_gpu", {}), (None, {"require_fused": True}), ("flash", {})):
        with pytest.raises(Refused):
            choose(wanted, **options, **more)
    monkeypatch.setattr(api, "_capability", lambda: "9.0")
    assert choose(**options, require_fused=True).name == "mosaic_gpu"
    monkeypatch.setattr(api, "_capability", lambda: "12.0")  # a 5090
    assert "12.0" in choose(**options).refused["mosaic_gpu"]
