"""From a configuration to files: what is missing is named, nothing is written into a user's folder."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megacontext_jax.config import Config, DataConfig, TokenizerConfig
from megacontext_jax.data import sources
from megacontext_jax.data.corpus import MANIFEST
from megacontext_jax.data.rowgroups import write_shards
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError
from megacontext_jax.paths import base_dir, report_dir
from scripts import tok_train

SMALL = Config(
    data=DataConfig(corpus_mchars=0.05, mid_conversations=5, sft_conversations=5),
    tokenizer=TokenizerConfig(vocab_size=300, max_chars=20_000),
)
TEXTS = [f"Number {i} of the documents says {i * i}, and no more than that." for i in range(40)]


def snapshot(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.fixture
def shards_of(tmp_path):
    """A function that puts shards with these numbers into the folder of fineweb_edu."""

    def put(*numbers: int) -> Path:
        folder = base_dir() / "base_data"
        for path in write_shards(TEXTS[: max(numbers) + 1], tmp_path / "made", docs_per_shard=1):
            if int(path.stem[-5:]) in numbers:
                folder.mkdir(exist_ok=True)
                shutil.move(path, folder / path.name)
        return folder

    return put


def test_a_missing_built_in_shard_never_makes_another_one_validation():
    text = sources.prepare_text(SMALL)
    assert (len(text.train), len(text.val)) == (8, 1)
    manifest = text.val[0].parents[1] / MANIFEST
    text.val[0].unlink()
    with pytest.raises(UserError, match=rf"{text.val[0]} .* is missing; delete {manifest}"):
        sources.prepare_text(SMALL)
    with pytest.raises(UserError, match=rf"{text.val[0]} .* is missing"):
        sources.conversations(SMALL, "mid")
    manifest.unlink()
    assert sources.prepare_text(SMALL) == text


def test_files_beside_the_built_in_ones_are_not_read():
    text, chat = sources.prepare_text(SMALL), sources.conversations(SMALL, "sft")
    folder = text.val[0].parents[1]
    shutil.copy(text.train[0], folder / "pretrain/shard_99999.parquet")
    shutil.copy(folder / "sft/val-00000.parquet", folder / "sft/train-00001.parquet")
    assert sources.prepare_text(SMALL) == text
    assert len(sources.conversations(SMALL, "sft").train) == len(chat.train) == 5


def real(num_shards: int) -> Config:
    return replace(SMALL, data=DataConfig(dataset="fineweb_edu", num_shards=num_shards))


def test_real_shards_are_the_ones_asked_for_whatever_else_lies_there(shards_of):
    folder = shards_of(0, 1, 2, 3, 4)
    text = sources.prepare_text(real(4))
    assert [path.name for path in text.train] == [f"shard_{i:05d}.parquet" for i in range(3)]
    assert text.val == [folder / "shard_00003.parquet"]
    assert text.tokenizer_dir == base_dir() / "tokenizer"


@pytest.mark.parametrize(("there", "missing"), [((0, 1, 2), 3), ((0, 2, 3), 1)])
def test_a_missing_real_shard_is_named_with_the_remedy(shards_of, there, missing):
    folder = shards_of(*there)
    with pytest.raises(
        UserError, match=rf"{folder}/shard_0000{missing}.parquet is missing .*scripts\.prepare_data"
    ):
        sources.prepare_text(real(4))


def test_without_any_shard_the_first_is_named():
    with pytest.raises(UserError, match=r"base_data/shard_00000.parquet is missing \(4 of 4"):
        sources.prepare_text(real(4))


def test_the_fixed_validation_file_of_climbmix_is_asked_for():
    folder = base_dir() / "base_data_climbmix"
    write_shards(TEXTS[:3], folder, docs_per_shard=1)
    climbmix = replace(SMALL, data=DataConfig(dataset="climbmix", num_shards=3))
    with pytest.raises(UserError, match=r"shard_06542.parquet is missing \(1 of 4"):
        sources.prepare_text(climbmix)


def of_folder(folder: str | Path) -> Config:
    return replace(SMALL, data=DataConfig(data_dir=str(folder)))


def flags(folder: str | Path, *more: str) -> list[str]:
    return ["--data-dir", str(folder), "--vocab-size", "300", "--max-chars", "20000", *more]


@pytest.mark.parametrize("kind", ["shards", "jsonl"])
def test_a_users_folder_is_read_and_never_written_to(kind, tmp_path):
    mine = tmp_path / "mine"
    if kind == "shards":
        write_shards(TEXTS, mine, docs_per_shard=20)
    else:
        mine.mkdir()
        (mine / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    before = snapshot(mine)
    mine.chmod(0o500)
    text = sources.prepare_text(of_folder(mine))
    assert (text.train[0].parent == mine) == (kind == "shards")
    assert text.tokenizer_dir.name == "tokenizer_300"
    assert text.tokenizer_dir.parents[1] == base_dir() / "text"
    tok_train.main(flags(mine))
    assert sources.load_tokenizer(text.tokenizer_dir).vocab_size == 300
    assert sources.prepare_text(of_folder(mine)) == text
    mine.chmod(0o700)
    assert snapshot(mine) == before


def test_relative_and_absolute_spelling_are_the_same_data(tmp_path, monkeypatch):
    mine = tmp_path / "texts" / "mine"
    write_shards(TEXTS, mine, docs_per_shard=20)
    monkeypatch.chdir(mine.parent)
    monkeypatch.setenv("HOME", str(mine.parent))
    (tmp_path / "link").symlink_to(mine)
    text = sources.prepare_text(of_folder(mine))
    for spelling in ("mine", "./mine/", "../texts/mine", "~/mine", tmp_path / "link"):
        assert sources.prepare_text(of_folder(spelling)) == text


def test_hidden_files_beside_ready_shards_are_not_read(tmp_path):
    mine = tmp_path / "mine"
    shards = write_shards(TEXTS, mine, docs_per_shard=20)
    (mine / "._shard_00000.parquet").write_bytes(b"left by a Mac")
    text = sources.prepare_text(of_folder(mine))
    assert [*text.train, *text.val] == shards


# The tokenizer of tok_train


@pytest.fixture
def mine(tmp_path):
    write_shards(TEXTS, tmp_path / "mine", docs_per_shard=20)
    return tmp_path / "mine"


@pytest.fixture
def finished(mine):
    """The folder of a finished tokenizer, and its files."""
    tok_train.main(flags(mine))
    folder = sources.prepare_text(of_folder(mine)).tokenizer_dir
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "training.json"}


def test_a_finished_tokenizer_is_left_as_it_is(finished, mine, capsys):
    folder, content = finished
    assert content.keys() == {"training.json", "tokenizer.pkl", "token_bytes.npy", "tokenizer.json"}
    before = snapshot(folder)
    shutil.rmtree(report_dir())
    tok_train.main(flags(mine))
    assert (report_dir() / "tokenizer-training.json").exists()
    assert "is finished (300 tokens); nothing to do." in capsys.readouterr().out
    assert snapshot(folder) == before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(8))
def test_a_kill_at_any_moment_of_saving_is_completed(after, finished, mine, monkeypatch):
    folder, content = finished
    shutil.rmtree(folder)
    calls = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > after:
                raise Killed
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:  # a kill leaves its scratch file
        for module, name in ((os, "replace"), (Path, "write_bytes")):
            patch.setattr(module, name, counted(getattr(module, name)))
        patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            tok_train.main(flags(mine))
    for path in folder.glob("*.tmp"):  # of a process that is gone
        path.rename(path.with_name(path.name.replace(f".{os.getpid()}.", ".99999999.")))
    tok_train.main(flags(mine))
    assert written(folder) == {name: data for name, data in content.items() if name != "training.json"}
    assert (
        json.loads((folder / "training.json").read_text()).keys()
        == json.loads(content["training.json"]).keys()
    )


def test_an_empty_folder_is_no_tokenizer(finished, mine):
    folder, content = finished
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"scripts\.tok_train"):
        sources.load_tokenizer(folder)
    tok_train.main(flags(mine))
    assert written(folder)["tokenizer.json"] == content["tokenizer.json"]


@pytest.mark.parametrize("more", [("--max-chars", "1000"), ("--doc-cap", "20")])
def test_other_training_options_are_refused_with_both_values(finished, mine, more):
    before = {"--max-chars": 20_000, "--doc-cap": 10_000}[more[0]]
    folder, content = finished
    with pytest.raises(
        UserError, match=rf"{folder} was trained with {more[0]} {before} and {more[0]} is now {more[1]}"
    ):
        tok_train.main(flags(mine, *more))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content


def test_a_text_that_ran_out_of_pairs_is_finished_for_the_size_asked_for(mine):
    large = replace(of_folder(mine), tokenizer=replace(SMALL.tokenizer, vocab_size=60_000))
    more = ("--vocab-size", "60000")
    tok_train.main(flags(mine, *more))
    folder = sources.prepare_text(large).tokenizer_dir
    tokenizer = sources.load_tokenizer(folder)
    assert tokenizer.vocab_size < 60_000
    tok_train.main(flags(mine, *more))
    sources.check_vocabulary(tokenizer, 60_000, folder)
    for other in (tokenizer.vocab_size, 60_001, 300):
        with pytest.raises(UserError, match=r"its training asked for 60000.*; use --vocab-size 60000"):
            sources.check_vocabulary(tokenizer, other, folder)


@pytest.mark.parametrize("wanted", [299, 301])
def test_a_tokenizer_of_another_size_is_refused(wanted, finished):
    folder, _ = finished
    tokenizer = sources.load_tokenizer(folder)
    sources.check_vocabulary(tokenizer, 300, folder)
    for note in ("there", "gone"):
        if note == "gone":
            (folder / "training.json").unlink()
        with pytest.raises(UserError, match=rf"{folder} has 300 tokens and --vocab-size is {wanted}"):
            sources.check_vocabulary(tokenizer, wanted, folder)


def test_pytorch_nanochats_tokenizer_is_used_and_left_alone(shards_of, capsys):
    shards_of(0, 1)
    folder = base_dir() / "tokenizer"
    Tokenizer.train(TEXTS, 300).save(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "token_bytes.npy").unlink()
    before = snapshot(folder)
    command = ["--dataset", "fineweb_edu", "--num-shards", "2", "--vocab-size", "300"]
    tok_train.main(command)
    assert "not on record" in capsys.readouterr().out
    assert snapshot(folder) == before
    (folder / "training.json").write_text(json.dumps({"digest": "of another"}))
    tok_train.main(command)
    assert "not on record" in capsys.readouterr().out


def test_a_damaged_note_is_named(finished, mine):
    folder, content = finished
    (folder / "training.json").write_bytes(content["training.json"][:40])
    with pytest.raises(UserError, match=r"training\.json is damaged .*; delete it"):
        tok_train.main(flags(mine))


def test_saving_again_writes_nothing_and_mends_the_table(finished):
    folder, content = finished
    tokenizer, before = sources.load_tokenizer(folder), snapshot(folder)
    tokenizer.save(folder)
    assert snapshot(folder) == before
    (folder / "token_bytes.npy").write_bytes(b"short")
    (folder / "tokenizer.json").unlink()
    tokenizer.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
