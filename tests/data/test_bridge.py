"""Arrow, parquet, JSON lines and token ids become shards that training reads, long documents whole."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from megacontext_jax.config import Config, DataConfig
from megacontext_jax.data import bridge, bridge_documents, sources
from megacontext_jax.data.bridge import Options, build_dataset
from megacontext_jax.data.rowgroups import RowGroupSource, list_shards, split_shards
from megacontext_jax.data.stream import pretrain_stream
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError
from scripts import build_dataset as script

TOKENIZER_DIR = Path(__file__).parents[1] / "golden" / "pipeline_classic" / "base_dir" / "tokenizer"
TOKENIZER = Tokenizer.load(TOKENIZER_DIR)
BOS = TOKENIZER.bos
TEXTS = [f"Document {i} is about {i * i} things.\n" * (1 + i % 3) for i in range(30)]


def build(inputs, out, **options) -> dict:
    inputs = inputs if isinstance(inputs, list) else [inputs]
    return build_dataset(inputs, out, Options(**options), echo=lambda _: None)[0]


def read(folder, split: str) -> list[str]:
    source = RowGroupSource(split_shards(list_shards(folder), split))
    return [text for i in range(len(source)) for text in source[i]]


def write_stream(path: Path, table: pa.Table, rows: int = 7) -> None:
    """As Hugging Face `datasets` writes .arrow files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_file(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_jsonl(path: Path, rows) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def save_as_datasets(folder: Path, texts: list[str], files: int = 2) -> None:
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        part = texts[i * len(texts) // files : (i + 1) * len(texts) // files]
        write_stream(folder / name, pa.table({"text": part}))
    write_stream(folder / "cache-1234.arrow", pa.table({"text": ["computed from the others"]}))
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))


def put(path: Path, texts: list[str]) -> None:
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    rows = [{"text": text, "source": "web"} for text in texts]
    kinds = {
        "stream.arrow": lambda: write_stream(path, table),
        "file.arrow": lambda: write_file(path, table),
        "large.arrow": lambda: write_stream(
            path, table.set_column(1, "text", table["text"].cast(pa.large_string()))
        ),
        "dict.arrow": lambda: write_file(
            path, table.set_column(1, "text", table["text"].dictionary_encode())
        ),
        "view.arrow": lambda: write_file(
            path, table.set_column(1, "text", table["text"].cast(pa.string_view()))
        ),
        "binary.parquet": lambda: pq.write_table(
            table.set_column(1, "text", table["text"].cast(pa.binary())), path
        ),
        "lz4.feather": lambda: pa.feather.write_feather(table, path, compression="lz4", chunksize=7),
        "x.parquet": lambda: pq.write_table(table, path, row_group_size=7),
        "x.jsonl": lambda: write_jsonl(path, rows),
        "x.json": lambda: write_jsonl(path, rows),
        "x.jsonl.gz": lambda: write_jsonl(path, rows),
    }
    kinds[path.name]()


# Formats


@pytest.mark.parametrize(
    "name",
    [
        "stream.arrow",
        "file.arrow",
        "large.arrow",
        "dict.arrow",
        "view.arrow",
        "binary.parquet",
        "lz4.feather",
        "x.parquet",
        "x.jsonl",
        "x.json",
        "x.jsonl.gz",
    ],
)
def test_every_format_keeps_documents_and_order(tmp_path, name):
    put(tmp_path / name, TEXTS)
    made = build(tmp_path / name, tmp_path / "out")
    assert read(tmp_path / "out", "train") == TEXTS[:-1]
    assert read(tmp_path / "out", "val") == TEXTS[-1:]
    assert sorted(os.listdir(tmp_path / "out")) == [
        "manifest.json",
        "shard_00000.parquet",
        "shard_00001.parquet",
    ]
    assert made["counts"]["documents"] == 30
    assert made["counts"]["characters"] == sum(map(len, TEXTS))
    assert made["counts"]["longest"] == max(map(len, TEXTS))
    assert pq.ParquetFile(tmp_path / "out" / "shard_00000.parquet").schema_arrow.names == ["text"]


def test_a_folder_of_everything_in_natural_order_with_mixed_schemas(tmp_path):
    data = tmp_path / "data"
    save_as_datasets(data / "a_saved", TEXTS[:10])
    pq.write_table(pa.table({"text": TEXTS[10:12], "other": [1, 2]}), data / "b2.parquet")
    pq.write_table(
        pa.table({"x": [[1]], "text": pa.array(TEXTS[12:13], pa.large_string())}), data / "b10.parquet"
    )
    (data / "c").mkdir()
    (data / "c" / "book.txt").write_bytes(b"\xef\xbb\xbfA long\r\nbook.")
    (data / ".hidden.txt").write_text("not read")
    (data / "README.md").write_text("not read")
    (data / "c" / "circle").symlink_to(data)
    out = data / "out"  # inside: not read by a second call
    for _ in range(2):
        build(data, out)
        assert read(out, "train") + read(out, "val") == [*TEXTS[:13], "A long\r\nbook."]
    manifest = json.loads((out / "manifest.json").read_text())
    assert [Path(source["path"]).name for source in manifest["sources"]] == [
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
        "b2.parquet",
        "b10.parquet",
        "book.txt",
    ]
    assert manifest["sources"][2]["size"] == (data / "b2.parquet").stat().st_size


def test_of_a_dataset_with_splits_train_is_read_and_the_rest_is_named(tmp_path):
    data = tmp_path / "data"
    for split, texts in (("test", ["secret"] * 5), ("train", TEXTS)):
        save_as_datasets(data / split, texts)
    (data / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "train"]}))
    said = []
    build_dataset([data], tmp_path / "out", Options(), echo=said.append)
    assert read(tmp_path / "out", "train") == TEXTS[:-1]
    assert "only train is read (not test)" in said[0]
    (data / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow, which .*state\.json lists, is missing"):
        build(data, tmp_path / "out2")


def test_text_and_ids_may_lie_side_by_side_and_caches_are_left_out(tmp_path):
    data = tmp_path / "data"
    write_stream(data / "a-train.arrow", pa.table({"text": TEXTS[:2], "input_ids": [[1], [2]]}))
    write_stream(data / "b.arrow", pa.table({"input_ids": [[BOS, *TOKENIZER.encode(TEXTS[2])], [BOS]]}))
    write_stream(data / "cache-0f.arrow", pa.table({"text": ["computed from the others"]}))
    put(data / "x.jsonl", TEXTS[3:5])
    (data / "dataset_info.json").write_text("{}")
    made = build(data, tmp_path / "out", tokenizer=TOKENIZER_DIR)
    assert read(tmp_path / "out", "train") + read(tmp_path / "out", "val") == TEXTS[:5]
    assert not made["exact_tokens"]


def test_links_into_a_hub_cache_keep_their_endings(tmp_path):
    (tmp_path / "snapshot").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "0a1b2c")
    (tmp_path / "snapshot" / "x.parquet").symlink_to(tmp_path / "0a1b2c")
    build(tmp_path / "snapshot" / "x.parquet", tmp_path / "out")
    assert len(read(tmp_path / "out", "train")) == 29


def test_null_blank_and_short_texts_are_dropped_and_counted(tmp_path):
    texts = [None, "", " \n\t", "abc", "four", None, "five!", "\u00e9" * 4]
    pq.write_table(pa.table({"body": texts}), tmp_path / "a.parquet")
    write_stream(tmp_path / "b.arrow", pa.table({"body": pa.nulls(3)}))
    write_jsonl(tmp_path / "c.jsonl", [{"body": None}, {"body": "sixth"}])
    made = build(tmp_path, tmp_path / "out", column="body", min_chars=4)
    assert read(tmp_path / "out", "train") == ["four", "five!", "\u00e9" * 4]
    assert read(tmp_path / "out", "val") == ["sixth"]
    assert {key: made["counts"][key] for key in ("null", "blank", "short", "documents")} == {
        "null": 6,
        "blank": 2,
        "short": 1,
        "documents": 4,
    }


# Token ids


def packed(texts: list[str], length: int) -> list[list[int]]:
    """All documents behind one another, in rows of one length: what packing scripts write."""
    ids = [id_ for text in texts for id_ in [BOS, *TOKENIZER.encode(text)]]
    return [ids[i : i + length] for i in range(0, len(ids), length)]


@pytest.mark.parametrize("kind", ["arrow", "fixed", "large", "parquet", "jsonl"])
def test_chunks_of_documents_are_joined_exactly(tmp_path, kind):
    texts = [*TEXTS, "Caf\u00e9 \U0001f642 \u6f22\u5b57 " * 300]  # characters of several tokens, cut anywhere
    rows = packed(texts, 13)
    rows[-1] += [BOS] * (13 - len(rows[-1]))  # padding
    cut = len(rows) // 2  # a document goes on in the next file
    for number, part in enumerate((rows[:cut], rows[cut:])):
        path = tmp_path / "data" / f"data-{number:05d}.{kind if kind in ('parquet', 'jsonl') else 'arrow'}"
        path.parent.mkdir(exist_ok=True)
        if kind == "parquet":
            pq.write_table(pa.table({"input_ids": pa.array(part, pa.list_(pa.uint16()))}), path)
        elif kind == "jsonl":
            write_jsonl(path, [{"tokens": row} for row in part])
        else:
            types = {"fixed": pa.list_(pa.int32(), 13), "large": pa.large_list(pa.int64())}
            column = pa.array(part, types.get(kind, pa.list_(pa.int32())))
            write_stream(path, pa.table({"input_ids": column, "attention_mask": column}))
    made = build(tmp_path / "data", tmp_path / "out", tokenizer=TOKENIZER_DIR)
    assert read(tmp_path / "out", "train") + read(tmp_path / "out", "val") == texts
    assert made["counts"]["tokens"] == sum(len(TOKENIZER.encode(text)) for text in texts)
    assert made["exact_tokens"]
    assert made["warnings"] == []


def test_rows_without_any_beginning_are_documents_unless_told_otherwise(tmp_path):
    pq.write_table(
        pa.table({"input_ids": [TOKENIZER.encode(text) for text in TEXTS]}), tmp_path / "a.parquet"
    )
    made = build(tmp_path / "a.parquet", tmp_path / "out", tokenizer=TOKENIZER_DIR)
    assert read(tmp_path / "out", "train") == TEXTS[:-1]
    assert "no document begins (<|bos|>) in the first 30 rows" in made["warnings"][0]
    with pytest.raises(UserError, match=r"1 document\(s\) are left"):
        build(tmp_path / "a.parquet", tmp_path / "o", tokenizer=TOKENIZER_DIR, rows="chunks")
    rows = [[BOS, *TOKENIZER.encode("one")], TOKENIZER.encode("two"), [*TOKENIZER.encode("three"), BOS]]
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "b.parquet")
    build(tmp_path / "b.parquet", tmp_path / "rows", tokenizer=TOKENIZER_DIR, rows="documents")
    assert read(tmp_path / "rows", "train") + read(tmp_path / "rows", "val") == ["one", "two", "three"]
    pq.write_table(pa.table({"input_ids": [*rows, TOKENIZER.encode("four")]}), tmp_path / "c.parquet")
    build(tmp_path / "c.parquet", tmp_path / "chunks", tokenizer=TOKENIZER_DIR)
    assert read(tmp_path / "chunks", "train") == ["onetwothree"]


def test_a_tokenisation_of_another_kind_is_told_with_its_share(tmp_path):
    rows = [[BOS, *TOKENIZER.encode(text)] for text in TEXTS]
    rows[3] = [BOS, *b"spelled in bytes"]
    rows[4] = [BOS, 0xC3, *TOKENIZER.encode(" broken")]  # half a character
    pq.write_table(pa.table({"tokens": rows}), tmp_path / "a.parquet")
    made = build(tmp_path / "a.parquet", tmp_path / "out", tokenizer=TOKENIZER_DIR)
    assert read(tmp_path / "out", "train")[3:5] == ["spelled in bytes", "\ufffd broken"]
    assert "of the tokens in 2 of 30 documents looked at" in made["warnings"][0]
    share = float(made["warnings"][0].split("%")[0].split()[-1])
    assert 0 < share < 100 * 30 / made["counts"]["tokens"]


def test_conversation_markers_become_line_breaks(tmp_path):
    talk = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    ids, _ = TOKENIZER.render_conversation(talk)
    pq.write_table(pa.table({"tokens": [ids, ids]}), tmp_path / "a.parquet")
    made = build(tmp_path / "a.parquet", tmp_path / "out", tokenizer=TOKENIZER_DIR)
    assert read(tmp_path / "out", "train") == ["\nWhy?\n\nSo.\n"]
    assert made["warnings"] == [
        "8 conversation markers (<|user_start|> ...) have no text and became line breaks."
    ]


@pytest.mark.parametrize("bad", [-1, TOKENIZER.vocab_size, 2**40])
def test_foreign_ids_are_refused_with_row_and_value(tmp_path, bad):
    pq.write_table(pa.table({"tokens": [[BOS, 1], [2], [3, bad]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet, row 3, holds the token id {bad}, .* ids 0 to 3"):
        build(tmp_path / "a.parquet", tmp_path / "out", tokenizer=TOKENIZER_DIR)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"holds token ids \(column 'tokens'\); .* with --tokenizer"):
        build(tmp_path / "a.parquet", tmp_path / "out")


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3, is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2, is not JSON in UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', r"line 2, has no 'text' \(it has 'body'\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"line 2, holds int in 'text', not a string"),
        ("a.jsonl", b'{"tokens": [1]}\n{"tokens": [1, 2.5]}\n', r"line 2, holds no list of integers"),
        ("a.jsonl", b'{"tokens": [1]}\n{"tokens": [[1], 2]}\n', r"line 2, holds no list of integers"),
        ("a.json", b'["x"]\n', r"a\.json, line 1, is not a JSON object"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9],
            r"a\.jsonl\.gz is not a complete gzip file",
        ),
        ("a.txt", b"one\ntwo\nth\xffree\n", r"a\.txt, line 3, is not UTF-8"),
        ("a.parquet", b"PAR1", r"a\.parquet is not a complete parquet file"),
        ("a.arrow", b"", r"a\.arrow is not a complete Arrow file"),
        ("a.arrow", b"ARROW1\0\0 and no more", r"a\.arrow is not a complete Arrow file"),
        ("a.feather", b"FEA1....", r"a\.feather is Feather version 1"),
        ("a.md", b"text", r"a\.md is of no kind that is read"),
        ("a.txt", b"lonely", r"1 document\(s\) are left"),
        ("a.jsonl", b"", r"0 document\(s\) are left"),
    ],
)
def test_bad_files_are_named_and_leave_nothing(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        build(tmp_path / name, tmp_path / "out", tokenizer=TOKENIZER_DIR)
    assert os.listdir(tmp_path) == [name]


def test_bytes_that_are_not_utf8_and_cut_streams_are_named(tmp_path):
    broken = pa.Array.from_buffers(
        pa.string(), 2, pa.array([b"good", b"b\xffd"]).buffers()
    )  # what a careless writer leaves
    write_stream(tmp_path / "a.arrow", pa.table({"text": broken}))
    with pytest.raises(UserError, match=r"a\.arrow, row 2, is not UTF-8 text"):
        build(tmp_path / "a.arrow", tmp_path / "out")
    put(tmp_path / "stream.arrow", TEXTS)
    whole = (tmp_path / "stream.arrow").read_bytes()
    (tmp_path / "stream.arrow").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=r"stream\.arrow is not a complete Arrow file"):
        build(tmp_path / "stream.arrow", tmp_path / "out")


def test_a_missing_column_lists_those_there_are(tmp_path):
    write_stream(tmp_path / "a.arrow", pa.table({"id": [1], "body": ["x"], "input_ids": [["x"]]}))
    with pytest.raises(UserError, match=r"has no column 'text' \(it has 'id', 'body', 'input_ids'\)"):
        build(tmp_path / "a.arrow", tmp_path / "out")
    with pytest.raises(UserError, match=r"has no column 'nix' \(it has 'id'.*--ids-column"):
        build(tmp_path / "a.arrow", tmp_path / "out", column="nix")
    with pytest.raises(UserError, match=r"column 'id' of .*a\.arrow holds int64, not strings"):
        build(tmp_path / "a.arrow", tmp_path / "out", column="id")
    with pytest.raises(UserError, match=r"'input_ids' of .* holds list<.*string>, not lists of integers"):
        build(tmp_path / "a.arrow", tmp_path / "out", ids_column="input_ids", tokenizer=TOKENIZER_DIR)
    with pytest.raises(UserError, match=r"There is no file or folder .*nowhere"):
        build(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no \.arrow"):
        build(tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize(
    "wrong",
    [
        {"val_fraction": 0.0},
        {"val_fraction": 0.7},
        {"min_chars": -1},
        {"shard_mchars": 0.0},
        {"shards": 0},
        {"docs_per_group": 9000},
        {"seed": -1},
        {"column": "a", "ids_column": "b"},
    ],
)
def test_senseless_values_name_their_flag(tmp_path, wrong):
    with pytest.raises(UserError, match="^--" + next(iter(wrong)).replace("_", "-")):
        build(tmp_path, tmp_path / "out", **wrong)


# Shards


def test_every_kth_is_held_out_and_shards_end_at_their_size(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"text": f"{i:04d}" * 25} for i in range(100)])
    made = build(
        tmp_path / "x.jsonl", tmp_path / "out", val_fraction=0.1, shard_mchars=0.003, docs_per_group=7
    )
    texts = [f"{i:04d}" * 25 for i in range(100)]
    assert read(tmp_path / "out", "val") == texts[9::10]
    assert read(tmp_path / "out", "train") == [text for i, text in enumerate(texts) if i % 10 != 9]
    shards = list_shards(tmp_path / "out")
    assert [pq.ParquetFile(path).metadata.num_rows for path in shards] == [30, 30, 30, 10]
    assert RowGroupSource(shards[:1])[0] == read(tmp_path / "out", "train")[:7]
    assert made["train"] == {"documents": 90, "characters": 9000}
    assert made["row_groups"] == 15


@pytest.mark.parametrize("sizes", [[10] * 50, [1] * 30 + [5000], [5000] + [1] * 30, [1, 1, 1, 1, 100]])
def test_a_number_of_shards_is_kept_to(tmp_path, sizes):
    texts = [chr(97 + i % 26) * size for i, size in enumerate([*sizes, 3])]
    write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    build(tmp_path / "x.jsonl", tmp_path / "out", shards=5)
    assert len(list_shards(tmp_path / "out")) == 6
    assert read(tmp_path / "out", "train") == texts[:-1]
    with pytest.raises(UserError, match=r"--shards 99 is more than the \d+ training"):
        build(tmp_path / "x.jsonl", tmp_path / "many", shards=99)


def test_shuffling_is_a_permutation_of_the_seed_in_bounded_memory(tmp_path, monkeypatch):
    texts = [f"text {i}" for i in range(1000)]
    write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    monkeypatch.setattr(bridge, "_BUFFER_CHARS", 2000)
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        build(tmp_path / "x.jsonl", tmp_path / out, shuffle=True, seed=seed)
    first, again, other = (read(tmp_path / out, "train") for out in "abc")
    assert first == again != other
    assert sorted([*first, *read(tmp_path / "a", "val")]) == sorted(texts)
    where = [int(text.split()[1]) for text in first]
    assert np.abs(np.diff(where)).mean() > 30
    assert len({number // 64 for number in where[:250]}) < 9  # of 16: no more groups are in the buffer
    assert where[:64] != sorted(where[:64])
    assert abs(np.corrcoef(where, range(len(where)))[0, 1]) < 0.8
    assert sorted(os.listdir(tmp_path / "a")) == sorted(os.listdir(tmp_path / "c"))


def test_batches_are_streamed(tmp_path, monkeypatch):
    """The data set passes in order through a small window, and memory does not follow its size."""
    monkeypatch.setattr("megacontext_jax.data.rowgroups._CHARS_PER_GROUP", 200_000)
    text = "a long text " * 2000
    schema = pa.schema([("text", pa.string())])
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for _ in range(40):
            writer.write_batch(pa.record_batch([[text] * 50], schema))  # 48 MB in all
    pulled, written = 0, []
    real_keep = bridge_documents.Counts.keep

    def keep(self, documents, min_chars):
        def watched():
            nonlocal pulled
            for document in documents:
                pulled += 1
                yield document

        return real_keep(self, watched(), min_chars)

    real_write = pq.ParquetWriter.write_table

    def write_table(self, table, **options):
        written.append(pulled)
        return real_write(self, table, **options)

    monkeypatch.setattr(bridge_documents.Counts, "keep", keep)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", write_table)
    tracemalloc.start()
    build(tmp_path / "x.arrow", tmp_path / "out", docs_per_group=16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written[0] <= 16
    assert max(np.diff(written[:-1])) <= 16
    assert peak < 12e6
    assert len(read(tmp_path / "out", "train")) == 1980


# Interruptions and second calls


def test_a_finished_folder_is_recognised_and_never_overwritten(tmp_path):
    put(tmp_path / "x.parquet", TEXTS)
    out = tmp_path / "out"
    out.mkdir()  # empty is as good as missing
    first = build(tmp_path / "x.parquet", out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again, finished = build_dataset([tmp_path / "x.parquet"], out, Options(), echo=print)
    assert finished
    build(tmp_path / "x.parquet", out, column="text")  # the same said in full
    assert again == json.loads(json.dumps(first))
    for options, words in (
        ({"min_chars": 3}, "was made with --min-chars 0, not with --min-chars 3"),
        ({"shuffle": True}, "was made without --shuffle, not with --shuffle"),
        ({"shards": 2}, "was made without --shards, not with --shards 2"),
    ):
        with pytest.raises(UserError, match=words):
            build(tmp_path / "x.parquet", out, **options)
    put(tmp_path / "x.jsonl", TEXTS)
    with pytest.raises(UserError, match=r"from other data \(there were more or fewer files\)"):
        build([tmp_path / "x.parquet", tmp_path / "x.jsonl"], out)
    with pytest.raises(UserError, match=r"from other data \(.*x\.jsonl has changed, or is read from"):
        build(tmp_path / "x.jsonl", out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    (out / "shard_00000.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is damaged \(shard_00000\.parquet is missing or not"):
        build(tmp_path / "x.parquet", out)
    shutil.rmtree(out)
    build(tmp_path / "x.parquet", out)
    assert read(out, "train") == TEXTS[:-1]


@pytest.mark.parametrize("name", ["notes.txt", "shard_00000.parquet", "manifest.json"])
def test_a_folder_with_other_content_is_refused(tmp_path, name):
    put(tmp_path / "x.parquet", TEXTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"format": "another"}')
    with pytest.raises(UserError, match=rf"out holds other files \({name}.*new folder as --out"):
        build(tmp_path / "x.parquet", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [name]
    with pytest.raises(UserError, match=r"x\.parquet is a file; give another folder as --out"):
        build(tmp_path / "x.parquet", tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"Cannot write .*x\.parquet/out .* choose a writable folder"):
        build(tmp_path / "x.parquet", tmp_path / "x.parquet" / "out")


@pytest.mark.parametrize("how", ["full", "ctrl-c"])
@pytest.mark.parametrize("options", [{}, {"shuffle": True}])
def test_a_full_disk_or_an_interrupt_leaves_nothing(tmp_path, monkeypatch, how, options):
    put(tmp_path / "x.jsonl", TEXTS)
    calls = 0
    real = pq.ParquetWriter.write_table

    def fails_later(self, table, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(errno.ENOSPC, "No space left on device") if how == "full" else KeyboardInterrupt
        return real(self, table, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", fails_later)
        with pytest.raises(UserError if how == "full" else KeyboardInterrupt) as caught:
            build(tmp_path / "x.jsonl", tmp_path / "out", docs_per_group=3, **options)
    if how == "full":
        assert "The disk is full: cannot write" in str(caught.value)
    assert os.listdir(tmp_path) == ["x.jsonl"]
    build(tmp_path / "x.jsonl", tmp_path / "out", docs_per_group=3, **options)
    assert sorted(read(tmp_path / "out", "train")) == sorted(TEXTS[:-1])


def test_what_a_kill_left_is_removed_and_begun_again(tmp_path):
    put(tmp_path / "x.jsonl", TEXTS)
    code = (
        "import os, signal, pyarrow.parquet as pq\n"
        "pq.ParquetWriter.write_table = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from scripts.build_dataset import main\n"
        f"main([{str(tmp_path / 'x.jsonl')!r}, '--out', {str(tmp_path / 'out')!r}])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    (left,) = tmp_path.glob("out.*.tmp")
    assert list(left.glob("*.parquet")) == []
    assert not (tmp_path / "out").exists()
    build(tmp_path / "x.jsonl", tmp_path / "out")
    assert not left.exists()
    assert read(tmp_path / "out", "train") == TEXTS[:-1]


# Training


def test_training_reads_a_long_document_without_a_gap(tmp_path):
    rng = np.random.default_rng(0)
    words = ["lake", "stone", "river", "the", "of", "and", "moss", "counted", "lantern", "seven"]
    book = " ".join(rng.choice(words, 60_000))
    ids = TOKENIZER.encode(book)
    assert len(ids) > 50_000
    rows = packed([TEXTS[0], book, *TEXTS[1:]], 2048)
    write_stream(tmp_path / "data.arrow", pa.table({"input_ids": rows}))
    made = build(tmp_path / "data.arrow", tmp_path / "out", tokenizer=TOKENIZER_DIR)
    assert made["counts"]["longest_tokens"] == len(ids)
    text = sources.prepare_text(Config(data=DataConfig(data_dir=str(tmp_path / "out"))))
    assert text.folder == tmp_path / "out"
    assert (len(text.train), len(text.val)) == (1, 1)
    stream = pretrain_stream(text.train, TOKENIZER, 1, 4096)
    seen = []
    for _ in range(len(ids) // 4096 + 2):
        batch = next(stream)
        seen += [*batch["inputs"].ravel().tolist(), int(batch["targets"][0, -1])]
    stream.close()
    start = 1 + len(TOKENIZER.encode(TEXTS[0]))
    assert seen[start : start + 1 + len(ids) + 1] == [BOS, *ids, BOS]


def test_the_script_says_what_there_is_and_how_to_train(tmp_path, capsys):
    texts = ["word " * (1 << i) for i in range(16)]
    write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    argv = [
        str(tmp_path / "x.jsonl"),
        "--out",
        str(tmp_path / "my out"),
        "--min_chars",
        "7",
        "--val-fraction=0.5",
    ]
    script.main(argv)
    said = capsys.readouterr().out
    assert "1 training shard(s) of 8 documents in 1 row groups, 1 held-out shard of 7 documents" in said
    assert "15 documents, 327,670 characters, about 81,917 tokens; the longest has 163,840" in said
    assert "dropped: 0 null, 0 empty, 1 too short" in said
    assert "32,768 to 65,535              1          50.0%" in said
    assert "at least 1k tokens: 6 documents (40.0%)" in said
    assert "at least 16k tokens: 2 documents" in said
    assert f"base_train --data-dir '{tmp_path / 'my out'}'" in said
    script.main(argv)
    assert "is finished; nothing to do" in capsys.readouterr().out
