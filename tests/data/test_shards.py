"""Row groups as records, the split by file, the writer, and every way a parquet file can be wrong."""

import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacontext_jax.data.shards import (
    RowGroupSource,
    ShardWriter,
    check_shard,
    iter_texts,
    list_shards,
    split_shards,
    write_shards,
)
from megacontext_jax.errors import UserError
from megacontext_jax.files import scratch_path

GOLDEN_SHARDS = Path(__file__).parents[1] / "golden" / "pipeline_classic" / "base_dir" / "base_data"


def texts(count: int) -> list[str]:
    return [f"document {i} " + "word " * (i % 7) for i in range(count)]


# Writing


def test_shards_have_nanochats_form(tmp_path):
    paths = write_shards(texts(100), tmp_path / "new", docs_per_group=16, docs_per_shard=40)
    assert [path.name for path in paths] == [f"shard_{i:05d}.parquet" for i in range(3)]
    assert sorted(os.listdir(tmp_path / "new")) == [path.name for path in paths]
    metadata = pq.ParquetFile(paths[0]).metadata
    assert [metadata.row_group(i).num_rows for i in range(3)] == [16, 16, 8]
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert (
        pq.ParquetFile(paths[0]).schema_arrow
        == pq.ParquetFile(GOLDEN_SHARDS / "shard_00000.parquet").schema_arrow
    )
    assert [text for path in paths for text in pq.read_table(path)["text"].to_pylist()] == texts(100)


def test_no_documents_make_no_file(tmp_path):
    assert write_shards([], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_writing_never_replaces_a_shard(tmp_path):
    (first,) = write_shards(texts(3), tmp_path)
    before = first.read_bytes()
    with pytest.raises(UserError, match=r"shard_00000\.parquet exists already"):
        write_shards(texts(4), tmp_path)
    assert [first] == list(tmp_path.iterdir())
    assert first.read_bytes() == before


def test_an_interrupted_writer_leaves_only_complete_shards(tmp_path):
    def source():
        yield from texts(50)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(source(), tmp_path, docs_per_group=8, docs_per_shard=20)
    assert sorted(os.listdir(tmp_path)) == ["shard_00000.parquet", "shard_00001.parquet"]
    assert RowGroupSource(list_shards(tmp_path)).num_rows == 40


def test_scratch_of_a_dead_process_is_removed(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    alive = scratch_path(tmp_path / "shard_00000.parquet")
    dead = alive.with_name(alive.name.replace(str(os.getpid()), str(process.pid)))
    for path in (alive, dead, tmp_path / "notes.tmp"):
        path.write_text("x")
    ShardWriter(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([alive, tmp_path / "notes.tmp"])


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match=r"disk is full: cannot write .*shard_00000\.parquet"):
        write_shards(texts(3), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    paths = write_shards(["a\ud800b", "🙂"], tmp_path)
    assert RowGroupSource(paths)[0] == ["a\ufffdb", "🙂"]


# Reading


def test_source_reads_every_row_group_of_nanochats_shards():
    paths = list_shards(GOLDEN_SHARDS)
    source = RowGroupSource(paths)
    assert (len(source), source.num_rows) == (9, 144)
    for index in range(9):
        assert source.locate(index) == (index // 3, index % 3)
        expected = pq.ParquetFile(paths[index // 3]).read_row_group(index % 3)["text"].to_pylist()
        assert source[index] == expected
    for outside in (-1, 9):
        with pytest.raises(IndexError):
            source[outside]


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=4))
def test_locate_finds_each_group_of_uneven_files(tmp_path_factory, sizes):
    folder = tmp_path_factory.mktemp("uneven")
    expected, paths, number = [], [], 0
    for f, groups in enumerate(sizes):
        paths.append(folder / f"{f}.parquet")
        with pq.ParquetWriter(paths[-1], pa.schema([("text", pa.string())])) as writer:
            for g, rows in enumerate(groups):
                values = [f"{number + k}" for k in range(rows)]
                writer.write_table(pa.table({"text": values}))
                expected.append(((f, g), values))
                number += rows
    source = RowGroupSource(paths)
    assert [(source.locate(i), source[i]) for i in range(len(source))] == expected
    assert source.num_rows == number


def test_source_can_be_pickled_and_shared_by_threads():
    source = RowGroupSource(list_shards(GOLDEN_SHARDS))
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(copy.__getitem__, range(9))) == [source[i] for i in range(9)]


def test_source_reads_conversations(tmp_path):
    messages = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]] * 3
    pq.write_table(pa.table({"messages": messages}), tmp_path / "train-00000.parquet")
    source = RowGroupSource(list_shards(tmp_path, "train-*.parquet"), column="messages")
    assert source[0] == messages


def test_nulls_read_as_empty_documents(tmp_path):
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "x.parquet")
    assert RowGroupSource([tmp_path / "x.parquet"])[0] == ["a", "", "b"]


def test_iter_texts_caps_documents_and_stops_after_crossing_the_limit():
    paths = split_shards(list_shards(GOLDEN_SHARDS), "train")
    everything = [text for path in paths for text in pq.read_table(path)["text"].to_pylist()]
    assert list(iter_texts(paths)) == everything
    assert list(iter_texts(paths, doc_cap=20)) == [text[:20] for text in everything]
    limit = sum(len(text[:50]) for text in everything[:30])
    # exactly reaching the limit is not crossing it: one more document, as nanochat
    assert list(iter_texts(paths, max_chars=limit, doc_cap=50)) == [text[:50] for text in everything[:31]]
    assert list(iter_texts(paths, max_chars=limit - 1, doc_cap=50)) == [text[:50] for text in everything[:30]]


# The split


def test_last_file_is_validation():
    paths = list_shards(GOLDEN_SHARDS)
    assert [path.name for path in paths] == [f"shard_{i:05d}.parquet" for i in range(3)]
    assert split_shards(paths, "train") == paths[:2]
    assert split_shards(paths, "val") == paths[2:]


def test_folders_that_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        list_shards(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds no file \*\.parquet"):
        list_shards(tmp_path)
    write_shards(texts(3), tmp_path)
    for split in ("train", "val"):
        with pytest.raises(
            UserError, match=r"shard_00000\.parquet\): the last file .* is the validation split"
        ):
            split_shards(list_shards(tmp_path), split)


# Files that are wrong


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[: len(data) // 2], "not a complete parquet file"),
        (lambda data: data[:-1], "not a complete parquet file"),
        (lambda data: b"", "not a complete parquet file"),
        (lambda data: b"<html>Log in to continue</html>" * 20, "not a complete parquet file"),
        (lambda data: data[:-400] + bytes(392) + data[-8:], "not a complete parquet file"),
    ],
)
def test_broken_files_are_named_when_the_source_opens(tmp_path, damage, words):
    paths = write_shards(texts(20), tmp_path, docs_per_shard=5)
    paths[2].write_bytes(damage(paths[2].read_bytes()))
    with pytest.raises(UserError, match=rf"shard_00002\.parquet is {words}.*fetch it again"):
        RowGroupSource(paths)


def test_unsuitable_files_are_named(tmp_path):
    path = tmp_path / "x.parquet"
    with pytest.raises(UserError, match=r"x\.parquet is missing"):
        check_shard(path)
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), path)
    with pytest.raises(UserError, match=r"x\.parquet has no column 'text' \(it has body, id\)"):
        check_shard(path)
    assert check_shard(path, column=None).rows == 1
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match=r"'text' of .*x\.parquet holds int64"):
        check_shard(path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(UserError, match=r"x\.parquet holds no rows"):
        check_shard(path)
    with pytest.raises(UserError, match="no data files"):
        RowGroupSource([])


def test_damage_inside_a_row_group_is_named_when_it_is_read(tmp_path):
    (path,) = write_shards(texts(20), tmp_path, docs_per_group=10)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    source = RowGroupSource([path])
    assert source[0] == texts(20)[:10]
    with pytest.raises(UserError, match=r"Row group 1 of .*shard_00000\.parquet cannot be read"):
        source[1]


def test_a_file_that_vanishes_during_the_run_is_named(tmp_path):
    paths = write_shards(texts(4), tmp_path, docs_per_shard=2)
    source = RowGroupSource(paths)
    paths[1].unlink()
    with pytest.raises(UserError, match=r"Row group 0 of .*shard_00001\.parquet cannot be read"):
        source[1]
