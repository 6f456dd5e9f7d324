"""The built-in corpus: layout, determinism, resumption, and the shape of the curriculum."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from megacontext_jax.data.corpus import MANIFEST, build, built_files, mixture, python_english
from megacontext_jax.data.corpus import build as build_function
from megacontext_jax.data.corpus.words import CLASSES, NAMES, SPELLED
from megacontext_jax.data.corpus.world import split_of, stream
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError
from megacontext_jax.eval import tasks
from megacontext_jax.files import scratch_path
from tests.corpus_reader import answer_from_text

SMALL = {
    "pretrain_mchars": 0.6,
    "val_mchars": 0.06,
    "mid_conversations": 60,
    "sft_conversations": 50,
    "val_conversations": 20,
    "shards": 3,
    "max_doc_tokens": 3000,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build(tmp_path_factory.mktemp("corpus"), seed=1, **SMALL)


def texts(path):
    return pq.read_table(path)["text"].to_pylist()


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_layout(corpus):
    names = set(digests(corpus))
    assert names == {
        *(f"pretrain/shard_{i:05d}.parquet" for i in range(4)),
        "python_val.parquet",
        *(f"{stage}/{split}-00000.parquet" for stage in ("mid", "sft") for split in ("train", "val")),
        MANIFEST,
    }
    files = json.loads((corpus / MANIFEST).read_text())["files"]
    assert set(files) == names - {MANIFEST}
    for name, facts in files.items():
        table = pq.read_table(corpus / name)
        assert facts["rows"] == table.num_rows == sum(facts["documents"].values())
        assert facts["characters"] == sum(facts["characters_by_kind"].values())
        if name.startswith("pretrain"):
            assert facts["characters"] == sum(map(len, table["text"].to_pylist()))
    assert pq.ParquetFile(corpus / "pretrain/shard_00000.parquet").metadata.row_group(0).num_rows <= 1024
    assert (corpus / "pretrain/shard_00000.parquet").read_bytes()[:4] == b"PAR1"


def test_conversations_alternate_and_fit_a_row(corpus):
    for stage, n in (("mid", 60), ("sft", 50)):
        rows = pq.read_table(corpus / stage / "train-00000.parquet")["messages"].to_pylist()
        assert len(rows) == n
        assert max(len(row) for row in rows) > 2, "some conversations ask more than once"
        for messages in rows:
            assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
            assert all(m["content"].strip() == m["content"] != "" for m in messages)
            pieces = sum(len(re.findall(r"\w+|[^\w\s]", m["content"])) + 2 for m in messages)
            assert pieces <= 256


def test_same_arguments_same_bytes(corpus, tmp_path):
    again = build(tmp_path, seed=1, **SMALL)
    assert again.name == corpus.name
    assert digests(again) == digests(corpus)


def test_a_finished_corpus_is_returned_untouched(corpus, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    monkeypatch.setattr(mixture, "documents", None)  # would fail if anything were generated again
    assert build(corpus.parent, seed=1, **SMALL) == corpus
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_a_half_written_corpus_is_completed(corpus, tmp_path):
    folder = build(tmp_path, seed=1, **SMALL)
    kept = folder / "pretrain/shard_00000.parquet"
    before = kept.stat().st_mtime_ns
    (folder / MANIFEST).unlink()
    (folder / "pretrain/shard_00001.parquet").unlink()
    torn = scratch_path(folder / "pretrain/shard_00001.parquet")
    torn.with_name(torn.name.replace(f".{os.getpid()}.", f".{dead_process()}.")).write_bytes(b"PAR1 torn")
    (folder / "sft/val-00000.parquet").unlink()
    assert build(tmp_path, seed=1, **SMALL) == folder
    assert digests(folder) == digests(corpus)
    assert kept.stat().st_mtime_ns == before


def dead_process() -> int:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=subprocess.PIPE)
    return int(done.stdout)


@pytest.mark.parametrize("name", ["pretrain/shard_00003.parquet", "sft/train-00000.parquet"])
def test_a_missing_or_changed_file_is_refused_by_name_and_can_be_made_again(corpus, tmp_path, name):
    folder = tmp_path / corpus.name
    shutil.copytree(corpus, folder)
    path, manifest = folder / name, folder / MANIFEST
    path.unlink()
    with pytest.raises(UserError, match=rf"{path} .* is missing; delete {manifest} and run the same command"):
        build(tmp_path, seed=1, **SMALL)
    manifest.unlink()
    assert digests(build(tmp_path, seed=1, **SMALL)) == digests(corpus)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{path} .* bytes instead of .*; delete it and {manifest}"):
        build(tmp_path, seed=1, **SMALL)
    manifest.unlink()
    with pytest.raises(UserError, match=rf"{path} .* is damaged; delete it"):
        build(tmp_path, seed=1, **SMALL)
    path.unlink()
    assert digests(build(tmp_path, seed=1, **SMALL)) == digests(corpus)


def test_the_list_of_files_is_the_manifests(corpus, tmp_path):
    folder = tmp_path / corpus.name
    shutil.copytree(corpus, folder)
    shutil.copy(folder / "pretrain/shard_00000.parquet", folder / "pretrain/shard_99999.parquet")
    names = [path.name for path in built_files(folder, "pretrain/shard_*")]
    assert names == [f"shard_{i:05d}.parquet" for i in range(4)]


def test_two_builds_at_once_give_the_same_bytes(tmp_path, monkeypatch):
    tiny = {**SMALL, "pretrain_mchars": 0.05, "val_mchars": 0.02, "shards": 1}
    documents, others = mixture.documents, []

    def interrupted(*args):
        rows = documents(*args)
        yield next(rows)
        if not others:  # a second process builds everything while the first file is half written
            code = (
                "import sys, json; from megacontext_jax.data.corpus import build;"
                "build(sys.argv[1], seed=1, **json.loads(sys.argv[2]))"
            )
            others.append(subprocess.run([sys.executable, "-c", code, tmp_path / "both", json.dumps(tiny)]))
        yield from rows

    monkeypatch.setattr(mixture, "documents", interrupted)
    folder = build(tmp_path / "both", seed=1, **tiny)
    assert [other.returncode for other in others] == [0]
    monkeypatch.undo()
    assert digests(folder) == digests(build(tmp_path / "alone", seed=1, **tiny))


@pytest.mark.parametrize("change", [{"seed": 2}, {"shards": 4}])
def test_other_arguments_get_another_folder(corpus, change):
    before = digests(corpus)
    other = build(corpus.parent, **{"seed": 1, **SMALL, **change})
    assert other != corpus
    assert other.parent == corpus.parent
    assert digests(corpus) == before


def test_a_newer_generator_gets_another_folder(corpus, monkeypatch):
    module = sys.modules[build_function.__module__]
    monkeypatch.setattr(module, "GENERATOR_VERSION", module.GENERATOR_VERSION + 1)
    other = build(corpus.parent, seed=1, **{**SMALL, "pretrain_mchars": 0.1})
    assert other != corpus
    assert f"v{module.GENERATOR_VERSION}" in other.name


def test_seeds_and_splits_are_disjoint(corpus, tmp_path):
    english = set(mixture.English("train", 0)._passages) | set(mixture.English("val", 0)._passages)
    other = build(tmp_path, seed=2, **SMALL)

    def generated(folder, names):
        return {t for name in names for t in texts(folder / name)} - english

    train = [f"pretrain/shard_{i:05d}.parquet" for i in range(3)]
    a, b = generated(corpus, train), generated(other, train)
    val = generated(corpus, ["pretrain/shard_00003.parquet"])
    assert len(a) > 500
    assert len(val) > 50
    assert not a & b
    assert not (a | b) & val


def test_held_out_english_is_not_trained_on(corpus):
    held_out = set(texts(corpus / "python_val.parquet"))
    train, val = python_english.passages()
    assert held_out == set(val)
    assert not held_out & set(train)
    everything = "\n".join(
        text for i in range(3) for text in texts(corpus / f"pretrain/shard_{i:05d}.parquet")
    )
    assert not [passage for passage in held_out if len(passage) > 200 and passage in everything]
    assert sum(p in everything for p in train[:500]) > 20, "real English is part of the mix"


def test_english_is_prose():
    train, val = python_english.passages()
    assert sum(map(len, train)) > 800_000
    assert sum(map(len, val)) > 20_000
    assert max(map(len, train)) <= 1500
    assert not [p for p in (*train, *val) if ">>>" in p or not p.isascii()]


def test_curriculum_runs_from_short_and_dense_to_long(corpus):
    manifest = json.loads((corpus / MANIFEST).read_text())["files"]
    first, last = (manifest[f"pretrain/shard_{i:05d}.parquet"] for i in (0, 2))
    for name in ("ledger", "facts"):
        mean = [f["characters_by_kind"][name] / f["documents"][name] for f in (first, last)]
        assert mean[0] < mean[1]
    assert first["characters_by_kind"]["recall"] > last["characters_by_kind"]["recall"]
    assert first["documents"].get("long", 0) < last["documents"]["long"]


def test_shares_are_met(corpus):
    manifest = json.loads((corpus / MANIFEST).read_text())["files"]
    facts = manifest["pretrain/shard_00000.parquet"]
    wanted = {
        k: (mixture.shares_at(mixture.PRETRAIN, 0.0)[k] + mixture.shares_at(mixture.PRETRAIN, 1 / 3)[k]) / 2
        for k in ("ledger", "english")
    }
    for kind, share in wanted.items():
        assert facts["characters_by_kind"][kind] / facts["characters"] == pytest.approx(share, abs=0.03)


def test_long_documents_ask_late_about_early_facts():
    rng = stream("train", 0, "long")
    english = mixture.English("train", 0)
    sizes = []
    for _ in range(30):
        text = mixture.make_document(rng, "long", "train", 1.0, english, 20_000)
        parts = text.split("\n\n")
        sizes.append(len(text) / 4)
        assert split_of(parts[0]) == "train"
        late = re.findall(r"([^.?]*\?) ([^.?]*\.)", parts[-1])
        assert 4 <= len(late) <= 6
        for question, answer in late:  # the whole text in between does not change what the first story said
            whole = " ".join(parts[:-1]).replace("\n", " ")
            assert answer_from_text("facts", f"{parts[0]} {question.strip()}") == answer
            assert answer_from_text("facts", f"{whole} {question.strip()}") == answer
    assert min(sizes) < 1500
    assert 12_000 < max(sizes) < 22_000


def test_words_are_single_and_classes_disjoint():
    words = [word for group in CLASSES.values() for word in group]
    assert len(words) == len(set(words))
    assert all(re.fullmatch(r"[A-Za-z]+", word) for word in words)
    assert len(SPELLED) == len(words)


def test_streams_are_independent():
    assert stream("train", 1, "a").random() != stream("train", 1, "b").random()
    assert stream("train", 1, "a").random() == stream("train", 1, "a").random()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"pretrain_mchars": 0}, "pretrain_mchars above 0"),
        ({"sft_conversations": 0}, "sft_conversations of at least 1"),
        ({"shards": -1}, "shards of at least 1"),
        ({"max_doc_tokens": 10}, "max_doc_tokens of at least 400"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path, **{**SMALL, **bad})
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="Cannot write the built-in corpus to"):
        build(tmp_path / "file", **SMALL)


def test_an_installation_without_text_is_refused(monkeypatch):
    monkeypatch.setattr(python_english, "_texts", list)
    with pytest.raises(UserError, match="carries no source files"):
        python_english.passages(701)


def test_command_line_prints_a_table_and_needs_no_jax(tmp_path):
    code = (
        "import sys; sys.modules['jax'] = None; from megacontext_jax.data.corpus.__main__ import main;"
        f"sys.exit(main(['--out', {str(tmp_path)!r}, '--pretrain-mchars', '0.2', '--mid-conversations', '5',"
        " '--sft-conversations', '5']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ledger +\d+ +[\d,]+ +\d+\.\d%$", done.stdout, re.M)
    failed = subprocess.run(
        [
            sys.executable,
            "-m",
            "megacontext_jax.data.corpus",
            "--out",
            str(tmp_path),
            "--pretrain-mchars",
            "-1",
        ],
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: The built-in corpus needs pretrain_mchars above 0")


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return Tokenizer.train(
        (t for i in range(3) for t in texts(corpus / f"pretrain/shard_{i:05d}.parquet")), 2048
    )


def test_every_word_of_the_world_is_one_token(tokenizer):
    """With 2,048 entries: recalling a word is then one step, in a document and in a chat turn."""
    words = [word for group in CLASSES.values() for word in group]
    assert [word for word in words if len(tokenizer.encode(" " + word)) != 1] == []
    assert [n for n in range(100) if len(tokenizer.encode(str(n))) != 1] == []


def test_conversations_fit_256_tokens(tokenizer):
    for stage in mixture.CHATS:
        for _, messages in mixture.chats(stream("train", 4, stage), "train", stage, 400):
            ids, mask = tokenizer.render_conversation({"messages": messages}, max_tokens=10_000)
            assert len(ids) <= 257
            assert sum(mask) > 0


def test_held_out_prompts_fit_256_tokens(tokenizer):
    for kind in tasks.TASKS:
        for example in tasks.make(kind, 100, seed=8):
            assert len(tokenizer.render_conversation(example.conversation())[0]) <= 256


def test_documents_of_the_first_tenth_are_short(tokenizer):
    texts_ = [
        text
        for kind, text in mixture.documents(
            stream("train", 3), "train", 0.0, 0.1, 150_000, mixture.English("train", 3), 20_000
        )
        if kind != "english"
    ]
    sizes = sorted(len(tokenizer.encode(text)) for text in texts_)
    assert sizes[len(sizes) * 9 // 10] <= 128


def test_words_join_one_by_one_in_training():
    def known(split: str, level: float) -> set[str]:
        rng = random.Random(1)
        texts = [mixture.make_document(rng, "recall", split, level, None, 0) for _ in range(300)]
        return {word for text in texts for word in re.findall(r"[A-Za-z]+", text)} & set(NAMES)

    assert len(known("train", 0.0)) == 8
    assert known("train", 0.0) < known("train", 0.25) < known("train", 0.5)
    assert known("train", 0.5) == known("val", 0.0) == set(NAMES)
