"""The packers: against a plain search, and resumed at every batch."""

import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext_jax.data import packing, records
from megacontext_jax.errors import UserError

BOS = 9


def dataset_of(documents, *, docs_per_record=3, repeat=False):
    """A record dataset over documents (lists of ids)."""
    groups = [documents[i : i + docs_per_record] for i in range(0, len(documents), docs_per_record)]
    order = grain.MapDataset.source(range(len(groups)))
    if repeat:
        order = order.repeat()
    made = order.map_with_index(lambda record, group: records.make_record(record, groups[group]))

    def recover(record, numbers):
        return [(np.array(groups[order[record]][number], np.int32), None) for number in numbers]

    return records.RecordDataset(made), recover, len(groups)


def make(kind, documents, batch_size=2, seq_len=5, *, repeat=False, buffer_size=3, chunk_docs=2):
    parent, recover, count = dataset_of(documents, repeat=repeat)
    common = {"pad_id": BOS, "epoch_records": count, "nothing_message": "there is nothing"}
    if kind == "concat":
        return packing.ConcatDataset(parent, batch_size, seq_len, **common)
    return packing.BestFitDataset(
        parent,
        batch_size,
        seq_len,
        recover=recover,
        crop=kind == "crop",
        buffer_size=buffer_size,
        chunk_docs=chunk_docs,
        **common,
    )


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        for name in ("inputs", "targets"):
            np.testing.assert_array_equal(one[name], other[name])


documents_strategy = st.lists(st.integers(1, 9), min_size=1, max_size=40).map(
    lambda lengths: [[10 * i + j for j in range(n)] for i, n in enumerate(lengths, 1)]
)


@given(st.lists(st.tuples(st.sampled_from(["add", "largest", "shortest"]), st.integers(1, 6)), max_size=60))
def test_best_fit_buffer_finds_what_a_plain_search_finds(steps):
    buffer, plain = packing.BestFitBuffer(), []
    for number, (what, length) in enumerate(steps):
        if what == "add":
            buffer.add(length, (length, number))
            plain.append((length, number))
            continue
        fitting = [item for item in plain if what == "shortest" or item[0] <= length]
        choose = max if what == "largest" else min
        # max and min return the first of equals, as the scan in the order of the buffer does
        expected = choose(fitting, key=lambda item: item[0]) if fitting else None
        found = buffer.take_largest(length) if what == "largest" else buffer.take_shortest()
        assert found == expected
        if expected:
            plain.remove(expected)
        assert buffer.items() == plain
        assert len(buffer) == len(plain)


def test_record_gives_its_documents_back():
    record = records.make_record(4, [[1, 2], [3], [4, 5, 6]], [[0, 1], [1], [1, 0, 1]])
    assert record["record"] == 4
    assert [tokens.tolist() for tokens, _ in records.documents_of(record)] == [[1, 2], [3], [4, 5, 6]]
    assert [mask.tolist() for _, mask in records.documents_of(record)] == [[0, 1], [1], [1, 0, 1]]
    assert records.documents_of(records.make_record(0, [], [])) == []
    assert records.documents_of(records.make_record(0, [[1]]))[0][1] is None


def test_right_padding_masks_and_cuts():
    batch = records.right_padded([([1, 2, 3], [0, 1, 0]), ([4, 5, 6, 7, 8], [0, 0, 1, 1, 1])], 0, width=3)
    np.testing.assert_array_equal(batch["inputs"], [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(batch["targets"], [[2, -1, -1], [-1, 6, 7]])
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32


@given(documents_strategy, st.integers(1, 3), st.integers(1, 7))
def test_concat_is_the_text_in_order_once(documents, batch_size, seq_len):
    batches = list(make("concat", documents, batch_size, seq_len))
    tokens = [token for document in documents for token in document]
    step = batch_size * seq_len + 1
    assert len(batches) == len(tokens) // step + (len(tokens) % step >= 2)
    for i, batch in enumerate(batches):
        part = tokens[i * step : (i + 1) * step]
        inputs, targets = batch["inputs"].ravel(), batch["targets"].ravel()
        assert inputs.tolist() == (part + [BOS] * step)[: step - 1]
        assert targets.tolist() == (part[1:] + [records.IGNORE] * step)[: step - 1]


@given(documents_strategy, st.integers(1, 3), st.integers(9, 12), st.integers(1, 8))
def test_padded_rows_hold_every_document_whole_once(documents, batch_size, seq_len, buffer_size):
    seen = []
    for batch in make("pad", documents, batch_size, seq_len, buffer_size=buffer_size):
        for inputs, targets in zip(batch["inputs"].tolist(), batch["targets"].tolist(), strict=True):
            row = [inputs[0], *targets]
            while row and row[0] != BOS and row[0] != records.IGNORE:
                document = documents[row[0] // 10 - 1]
                assert row[: len(document)] == document
                seen.append(document)
                row = row[len(document) :]
            assert all(token in (records.IGNORE, BOS) for token in row)
    assert sorted(seen) == sorted(documents)


@given(documents_strategy, st.integers(1, 3), st.integers(1, 7), st.integers(1, 8))
def test_cropped_rows_are_full_and_count_what_they_drop(documents, batch_size, seq_len, buffer_size):
    iterator = iter(make("crop", documents, batch_size, seq_len, buffer_size=buffer_size))
    batches = list(iterator)
    kept = sum(int((batch["targets"] != records.IGNORE).sum()) for batch in batches)
    firsts = sum(int((batch["inputs"][:, 0] != BOS).sum()) for batch in batches)
    assert iterator.placed_tokens == kept + firsts
    assert iterator.placed_tokens + iterator.dropped_tokens == sum(map(len, documents))
    assert iterator.placed_docs == len(documents)
    assert all((batch["targets"] != records.IGNORE).all() for batch in batches[:-1])


@pytest.mark.parametrize("kind", ["concat", "pad", "crop"])
@settings(max_examples=15, deadline=None)
@given(documents_strategy, st.integers(1, 3), st.integers(9, 12), st.integers(1, 8), st.integers(1, 4))
def test_every_position_resumes_exactly(kind, documents, batch_size, seq_len, buffer_size, chunk_docs):
    dataset = make(
        kind, documents, batch_size, seq_len, repeat=True, buffer_size=buffer_size, chunk_docs=chunk_docs
    )
    iterator = iter(dataset)
    states, batches = [], []
    for _ in range(6):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    for i, state in enumerate(states):
        again = iter(dataset)
        again.set_state(json.loads(state))
        assert json.dumps(again.get_state()) == state
        assert_same(take(again, len(batches) - i), batches[i:])
    iterator.set_state(json.loads(states[2]))  # going back in a stream that is running
    assert_same(take(iterator, 4), batches[2:])


@pytest.mark.parametrize("kind", ["concat", "crop"])
def test_state_does_not_grow(kind):
    rng = np.random.default_rng(0)
    documents = [[7] * int(n) for n in rng.integers(1, 40, 60)]
    iterator = iter(make(kind, documents, 2, 15, repeat=True, buffer_size=20))
    sizes = []
    for _ in range(400):
        next(iterator)
        sizes.append(len(json.dumps(iterator.get_state())))
    assert max(sizes) < 600
    assert max(sizes[200:]) < 1.3 * max(sizes[50:200])


@given(documents_strategy, st.integers(9, 12), st.integers(1, 8))
def test_counting_rows_agrees_with_packing_them(documents, seq_len, buffer_size):
    rows = sum(
        int((batch["inputs"][:, 0] != BOS).sum())
        for batch in make("pad", documents, 2, seq_len, buffer_size=buffer_size, chunk_docs=1)
    )
    lengths = [len(document) for document in documents]
    assert packing.count_padded_rows(lengths, seq_len + 1, buffer_size) == rows


def test_waiting_document_does_not_keep_its_record_in_memory():
    iterator = iter(make("pad", [[10] * 3, [20] * 9, [30] * 3], 1, 9, repeat=True))
    next(iterator)
    assert all(tokens.base is None for _, tokens, _ in iterator._buffer.items())


@pytest.mark.parametrize("kind", ["concat", "crop"])
def test_an_epoch_without_documents_ends_in_an_error(kind):
    empty = grain.MapDataset.source(range(4)).repeat().map_with_index(lambda r, _: records.make_record(r, []))
    common = {"pad_id": BOS, "epoch_records": 4, "nothing_message": "there is nothing"}
    parent = records.RecordDataset(empty)
    if kind == "concat":
        dataset = packing.ConcatDataset(parent, 1, 4, **common)
    else:
        dataset = packing.BestFitDataset(
            parent, 1, 4, recover=None, crop=True, buffer_size=1, chunk_docs=1, **common
        )
    with pytest.raises(UserError, match="there is nothing"):
        next(iter(dataset))
