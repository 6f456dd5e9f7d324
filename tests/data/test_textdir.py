"""A user's folder of mixed files becomes standard shards, once."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megacontext_jax.data.shards import (
    RowGroupSource,
    list_shards,
    prepare_text_dir,
    split_shards,
    write_shards,
)
from megacontext_jax.errors import UserError


def read(folder, split: str) -> list[str]:
    source = RowGroupSource(split_shards(list_shards(folder), split))
    return [text for i in range(len(source)) for text in source[i]]


def jsonl(path, texts, **extra) -> None:
    path.write_text("".join(json.dumps({"text": text, **extra}) + "\n" for text in texts))


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine", tmp_path / "out"


def test_mixed_kinds_in_name_order_with_every_twentieth_held_out(folders):
    data, out = folders
    (data / "sub").mkdir()
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["parquet 0", None, "parquet 1"]}), data / "a.parquet")
    jsonl(data / "b.jsonl", [f"line {i}" for i in range(30)] + ["", "  \n"], source="web")
    (data / "sub" / "c.TXT").write_bytes(b"\xef\xbb\xbf" + b"long text\r\n" * 5000)
    (data / "README.md").write_text("not read")
    (data / ".hidden.txt").write_text("not read")
    expected = ["parquet 0", "parquet 1", *(f"line {i}" for i in range(30)), "long text\r\n" * 5000]
    prepared = prepare_text_dir(data, out)
    assert prepared.parent == out
    assert read(prepared, "val") == [expected[19]]
    assert read(prepared, "train") == expected[:19] + expected[20:]
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["train"] == {"documents": 32, "characters": sum(map(len, expected)) - len(expected[19])}
    assert list(manifest["shards"]) == [path.name for path in list_shards(prepared)]
    assert os.listdir(out) == [prepared.name]


@pytest.mark.parametrize(
    ("count", "held_out"), [(2, [1]), (19, [18]), (20, [19]), (21, [19]), (45, [19, 39])]
)
def test_held_out_documents(folders, count, held_out):
    data, out = folders
    texts = [f"text {i}" for i in range(count)]
    jsonl(data / "x.jsonl", texts)
    prepared = prepare_text_dir(data, out)
    assert read(prepared, "val") == [texts[i] for i in held_out]
    assert read(prepared, "train") == [text for i, text in enumerate(texts) if i not in held_out]


def test_one_document_gives_its_last_part(folders):
    data, out = folders
    text = "".join(f"Paragraph {i}, line one.\nLine two.\n\n" for i in range(100))
    (data / "book.txt").write_text(text)
    prepared = prepare_text_dir(data, out)
    (train,), (val,) = read(prepared, "train"), read(prepared, "val")
    assert train + val == text
    assert val.startswith("Paragraph ")
    assert 0.08 < len(val) / len(text) < 0.13


def test_second_call_reads_nothing_and_changes_are_noticed(folders, monkeypatch):
    data, out = folders
    jsonl(data / "x.jsonl", ["one", "two"])
    first = prepare_text_dir(data, out)
    times = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("megacontext_jax.data.textdir._documents", None)
        assert prepare_text_dir(data, out) == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == times
    jsonl(data / "x.jsonl", ["one", "six"])
    os.utime(data / "x.jsonl", ns=(1, 1))
    second = prepare_text_dir(data, out)
    assert second != first
    assert read(first, "val") == ["two"]  # what a run may be reading stays
    assert read(second, "val") == ["six"]


@pytest.mark.parametrize("case", ["missing", "changed", "extra", "manifest"])
def test_a_damaged_preparation_is_refused_by_name(folders, case):
    data, out = folders
    jsonl(data / "x.jsonl", ["one", "two"])
    prepared = prepare_text_dir(data, out)
    path = {"extra": prepared / "shard_9.parquet", "manifest": prepared / "manifest.json"}.get(
        case, list_shards(prepared)[-1]
    )
    if case == "missing":
        path.unlink()
    else:
        path.write_bytes(b"{}")
    with pytest.raises(
        UserError, match=rf"{prepared.name} is damaged \({path.name} is .*; delete that folder"
    ):
        prepare_text_dir(data, out)
    shutil.rmtree(prepared)
    assert read(prepare_text_dir(data, out), "val") == ["two"]


def test_out_dir_inside_the_data_folder_is_not_read(folders):
    data, _ = folders
    (data / "a.txt").write_text("one")
    (data / "b.txt").write_text("two")
    prepared = prepare_text_dir(data, data / "prepared")
    assert prepare_text_dir(data, data / "prepared") == prepared
    assert read(prepared, "train") == ["one"]


def test_ready_shards_are_used_in_place(folders):
    data, out = folders
    write_shards([f"text {i}" for i in range(10)], data, docs_per_shard=5)
    assert prepare_text_dir(data, out) == data
    assert not out.exists()


@pytest.mark.parametrize("case", ["one file", "huge row group", "sub-folder"])
def test_parquet_of_another_form_is_written_anew(folders, case):
    data, out = folders
    rows = 9000 if case == "huge row group" else 40
    texts = [f"text {i}" for i in range(rows)]
    pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), data / "a.parquet")
    if case != "one file":
        other = data / ("sub" if case == "sub-folder" else "") / "b.parquet"
        other.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": ["last"]}), other)
    prepared = prepare_text_dir(data, out)
    assert prepared != data
    assert read(prepared, "val") == texts[19::20]
    assert len(read(prepared, "train")) == rows - rows // 20 + (case != "one file")
    assert max(map(len, (RowGroupSource(list_shards(prepared))[i] for i in range(2)))) <= 256


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3, is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2, is not JSON in UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', r"a\.jsonl, line 2, is not an object"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl, line 1, is not an object"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl, line 1, is not an object"),
        ("a.txt", b"one\ntwo\nth\xffree\n", r"a\.txt, line 3, is not UTF-8"),
        ("a.txt", b"", "too little text"),
        ("a.txt", b"x", "too little text"),
        ("a.parquet", b"PAR1", r"a\.parquet is not a complete parquet file"),
        ("a.md", b"text", r"holds no \.parquet, \.jsonl or \.txt file"),
    ],
)
def test_bad_files_are_named_and_leave_nothing(folders, name, content, words):
    data, out = folders
    (data / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        prepare_text_dir(data, out)
    assert not out.exists() or list(out.iterdir()) == []


def test_missing_folder_and_missing_column(folders, tmp_path):
    data, out = folders
    with pytest.raises(UserError, match="nowhere does not exist; check --data-dir"):
        prepare_text_dir(tmp_path / "nowhere", out)
    pq.write_table(pa.table({"body": ["x"]}), data / "a.parquet")
    pq.write_table(pa.table({"body": ["x"]}), data / "b.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text'"):
        prepare_text_dir(data, out)


def test_escaped_half_surrogates_of_json_survive(folders):
    data, out = folders
    (data / "a.jsonl").write_text('{"text": "bad \\ud83d half"}\n{"text": "ok"}\n')
    assert read(prepare_text_dir(data, out), "train") == ["bad \ufffd half"]
