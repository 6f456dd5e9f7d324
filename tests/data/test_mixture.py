"""nanochat's mixtures from small files of the hub's schemas; the hub itself is a server on this machine."""

import json
import pickle
import random
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megacontext_jax.data import mixture
from megacontext_jax.data.conversations import checked
from megacontext_jax.data.mixture import (
    MIXTURES,
    HubSet,
    Mixture,
    Part,
    Words,
    build_mixture,
    download_mixture,
    from_arc,
    from_gsm8k,
    from_mmlu,
    multiple_choice,
)
from megacontext_jax.data.spelling import count_letter, spell_word
from megacontext_jax.errors import UserError

WORDS = ["strawberry", "banana", "kayak", "tree", "q"]
EXPECTED_ROWS = {"HuggingFaceTB/smol-smoltalk": 9, "cais/mmlu": 7, "openai/gsm8k": 5, "allenai/ai2_arc": 4}


def rows_of(data):
    """Made-up rows of a hub set, in its schema."""
    name, count = data.repo, EXPECTED_ROWS[data.repo]
    if name == "HuggingFaceTB/smol-smoltalk":
        talk = [{"content": "s", "role": "system"}, {"content": "q", "role": "user"}]
        return [
            {"messages": [*talk, {"content": f"{data.split} talk {i}", "role": "assistant"}], "source": "x"}
            for i in range(count)
        ]
    if name == "cais/mmlu":
        return [
            {"question": f"{data.split} {i}?", "subject": "art", "choices": list("wxyz"), "answer": i % 4}
            for i in range(count)
        ]
    if name == "openai/gsm8k":
        return [
            {"question": f"{data.split} sum {i}?", "answer": f"so <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"}
            for i in range(count)
        ]
    return [
        {
            "id": f"{i}",
            "question": f"{data.subset} {i}?",
            "choices": {"text": ["up", "down", "left"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        }
        for i in range(count)
    ]


def hub_sets():
    parts = [part for parts in MIXTURES.values() for part in parts]
    return list(dict.fromkeys(part.data for part in parts if isinstance(part.data, HubSet)))


def write_set(folder, rows, files=2):
    """Rows as the parquet files of a folder; returns their names."""
    folder.mkdir(parents=True)
    names = [f"{i:05d}.parquet" for i in range(files)]
    for i, name in enumerate(names):
        part = rows[i * len(rows) // files : (i + 1) * len(rows) // files]
        pq.write_table(pa.Table.from_pylist(part), folder / name)
    return names


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("task_data")
    for data in hub_sets():
        names = write_set(data.folder(root), rows_of(data))
        (data.folder(root) / "manifest.json").write_text(json.dumps(names))
    mixture.WORDS.path(root).write_text("\n".join(WORDS) + "\n")
    talk = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]
    mixture.IDENTITY.path(root).write_text("".join(json.dumps(talk) + "\n" for _ in range(3)))
    return root


# Converters


def test_multiple_choice_prompt():
    assert multiple_choice("Why?", "AB", ["it is", "it was"]) == (
        "Multiple Choice question: Why?\n- it is=A\n- it was=B\n\n"
        "Respond only with the letter of the correct answer."
    )


def test_mmlu_row_with_and_without_the_wrapper():
    row = {"question": "Why?", "subject": "art", "choices": ["a", "b", "c", "d"], "answer": 2}
    found = from_mmlu(row)
    assert found["messages"][1] == {"role": "assistant", "content": "C"}
    assert "- c=C\n" in found["messages"][0]["content"]
    assert (found["subject"], found["letters"]) == ("art", ["A", "B", "C", "D"])
    assert from_mmlu({"train": row}) == found


def test_arc_row_keeps_its_own_letters():
    found = from_arc(
        {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    )
    assert found["messages"][0]["content"].count("- b=2\n") == 1
    assert found["messages"][1]["content"] == "2"
    assert found["letters"] == ["1", "2"]


def test_gsm8k_calls_become_tool_parts():
    answer = "12/60 = $<<12/60=0.2>>0.2 a minute.\n<<0.2*50=10>><<5>>\n<<a=b=3>>#### 10"
    kinds = [
        (p["type"], p["text"])
        for p in from_gsm8k({"question": "q", "answer": answer})["messages"][1]["content"]
    ]
    assert kinds == [
        ("text", "12/60 = $"),
        ("python", "12/60"),
        ("python_output", "0.2"),
        ("text", "0.2 a minute.\n"),
        ("python", "0.2*50"),
        ("python_output", "10"),
        ("python", "5"),
        ("python_output", ""),
        ("text", "\n"),
        ("python", "a=b"),
        ("python_output", "3"),
        ("text", "#### 10"),
    ]


def test_spelling():
    found = spell_word(random.Random(0), ["tree"])
    assert found["messages"][0]["content"] == "Spell the word: tree"
    assert found["messages"][1]["content"] == "tree:t,r,e,e"


@pytest.mark.parametrize("seed", range(60))
def test_counting_letters_is_right(seed):
    found = checked(count_letter(random.Random(seed), WORDS), "here")
    question, parts = found["messages"][0]["content"], found["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["text", "python", "python_output", "text"]
    word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", parts[1]["text"]).groups()
    count = str(word.count(letter))
    assert parts[2]["text"] == count
    assert re.search(r"#### (\d+)$", parts[3]["text"]).group(1) == count
    assert f"By hand I get {count}." in parts[0]["text"]
    assert f"{word}:{','.join(word)}\n" in parts[0]["text"]
    assert word in WORDS
    assert word in question
    assert letter in question


# Mixtures


def test_mixture_order_is_nanochats(data_dir):
    parts = [Part(mixture.SMOLTALK), Part(mixture.GSM8K, repeat=2, start=1, stop=4)]
    monkey = {"some_train": tuple(parts)}
    talk = [row["messages"] for row in rows_of(mixture.SMOLTALK)]
    sums = [from_gsm8k(row)["messages"] for row in rows_of(mixture.GSM8K)]
    talk = [talk[i] for i in np.random.default_rng(42).permutation(len(talk))]
    sums = [sums[i] for i in np.random.default_rng(42).permutation(len(sums))]
    tasks = [talk, sums[1:4], sums[1:4]]
    pairs = [(task, i) for task, rows in enumerate(tasks) for i in range(len(rows))]
    random.Random(42).shuffle(pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "MIXTURES", monkey)
        found = build_mixture("some_train", data_dir)
    assert [found[i]["messages"] for i in range(len(found))] == [tasks[task][i] for task, i in pairs]


@pytest.mark.parametrize("name", MIXTURES)
def test_every_mixture_has_every_example(name, data_dir):
    found = build_mixture(name, data_dir)
    size = 0
    for part in MIXTURES[name]:
        if isinstance(part.data, HubSet):
            rows = EXPECTED_ROWS[part.data.repo]
        else:
            rows = part.data.size if isinstance(part.data, Words) else 3
        size += part.repeat * len(range(rows)[part.start : part.stop])
    assert len(found) == size
    for i in random.Random(0).sample(range(size), min(size, 200)):
        checked(found[i], name)


def test_mixtures_have_nanochats_sizes():
    """With about the rows the real sets have."""
    real = {
        mixture.SMOLTALK: 460_341,
        mixture.SMOLTALK_TEST: 24_229,
        mixture.MMLU_AUX: 99_842,
        mixture.MMLU_TEST: 14_042,
        mixture.GSM8K: 7_473,
        mixture.GSM8K_TEST: 1_319,
        mixture.ARC_EASY: 2_251,
        mixture.ARC_CHALLENGE: 1_119,
        mixture.IDENTITY: 1_000,
    }

    def size(name):
        return sum(
            part.repeat * len(range(real.get(part.data) or part.data.size)[part.start : part.stop])
            for part in MIXTURES[name]
        )

    assert round(size("mid_train"), -3) == 850_000  # "848K rows" with 460K + 100K + 8K + ...
    assert round(size("sft_train"), -3) == 22_000
    assert size("mid_val") == size("sft_2026_val") == 24_229 + 5_200 + 420
    assert size("sft_2026_train") == 460_341 + 3 * 99_842 + 4 * 7_473


def test_held_out_words_differ_from_training(data_dir):
    tasks = [
        mixture.WordTask(Words(mixture.WORDS, count_letter, 50, s), data_dir, "") for s in ("train", "test")
    ]
    assert [tasks[0][i] for i in range(50)] != [tasks[1][i] for i in range(50)]
    assert tasks[0][7] == tasks[0][7] == count_letter(random.Random(7), WORDS)
    assert tasks[1][7] == count_letter(random.Random(-8), WORDS)


def test_pickling_carries_only_names(data_dir):
    found = build_mixture("mid_val", data_dir)
    expected = [found[i] for i in range(len(found))]
    rows = found._sources[0]
    assert len(pickle.dumps(rows)) < 2000
    copy = pickle.loads(pickle.dumps(found))
    assert [copy[i] for i in range(len(copy))] == expected
    assert copy.digest == found.digest


def test_digests_tell_mixtures_apart(data_dir):
    digests = [
        build_mixture(name, data_dir).digest for name in ("mid_train", "mid_val", "sft_train", "sft_val")
    ]
    assert len(set(digests)) == 4


# Mistakes


def test_missing_files_name_the_command(tmp_path, data_dir):
    command = re.escape(f"run `python -m megacontext_jax.data.mixture mid --data-dir {tmp_path}`")
    with pytest.raises(UserError, match=rf"smol-smoltalk \(default, train\) is not in .*{command}"):
        build_mixture("mid_train", tmp_path)
    for data in hub_sets():
        data.folder(tmp_path).mkdir(parents=True)
        for path in data.folder(data_dir).iterdir():
            (data.folder(tmp_path) / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=rf"identity_conversations\.jsonl are missing; {command}"):
        build_mixture("mid_train", tmp_path)
    mixture.IDENTITY.path(tmp_path).write_bytes(mixture.IDENTITY.path(data_dir).read_bytes())
    with pytest.raises(UserError, match=rf"words_alpha\.txt is missing; {command}"):
        build_mixture("mid_train", tmp_path)
    (mixture.SMOLTALK.folder(tmp_path) / "00001.parquet").unlink()
    with pytest.raises(UserError, match=r"00001\.parquet is missing"):
        build_mixture("mid_train", tmp_path)


def test_foreign_rows_are_named(tmp_path):
    for data in (mixture.ARC_EASY, mixture.SMOLTALK_TEST):
        names = write_set(
            data.folder(tmp_path), [{"question": "q", "answerKey": "Z", "messages": []}], files=1
        )
        (data.folder(tmp_path) / "manifest.json").write_text(json.dumps(names))
    with pytest.raises(UserError, match=r"00000\.parquet, row 0 does not look like allenai/ai2_arc"):
        mixture.HubRows(mixture.ARC_EASY, tmp_path, "")[0]
    with pytest.raises(UserError, match=r"00000\.parquet, row 0 is not a conversation"):
        build_mixture("sft_val", tmp_path)[0]


def test_unknown_names_and_empty_mixtures():
    with pytest.raises(UserError, match="no mixture 'rl_train'"):
        build_mixture("rl_train")
    with pytest.raises(UserError, match="no mixture for 'rl'"):
        download_mixture("rl")
    with pytest.raises(UserError, match="no conversation"):
        Mixture([])


# Downloading


@pytest.fixture
def hub(tmp_path):
    """A hub on this machine with two of the sets; gives its address and the paths it was asked for."""
    site, asked = tmp_path / "site", []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    address = f"http://127.0.0.1:{server.server_address[1]}"
    for data in (mixture.GSM8K, mixture.SMOLTALK_TEST):
        folder = f"api/datasets/{data.repo}/parquet/{data.subset}"
        names = write_set(site / "files" / data.repo / data.split, rows_of(data))
        (site / folder).mkdir(parents=True)
        urls = [f"{address}/files/{data.repo}/{data.split}/{name}" for name in names]
        (site / folder / data.split).write_text(json.dumps(urls))
    (site / "words.txt").write_text("\n".join(WORDS))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield address, asked, site
    server.shutdown()
    server.server_close()


@pytest.fixture
def small_stage(hub, monkeypatch):
    words = Words(mixture.WebFile(f"{hub[0]}/words.txt"), spell_word, 10)
    parts = {"mid_train": (Part(mixture.GSM8K), Part(words)), "mid_val": (Part(mixture.SMOLTALK_TEST),)}
    monkeypatch.setattr(mixture, "MIXTURES", parts)


def test_download_then_build(hub, small_stage, tmp_path, monkeypatch, capsys):
    address, asked, _ = hub
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert mixture.main(["mid", "--data-dir", str(tmp_path / "data")]) == 0
    assert "mid: 5 files, 15 conversations to train on, 9 held out" in capsys.readouterr().out
    count = len(asked)
    download_mixture("mid", tmp_path / "data")
    assert len(asked) == count  # everything is there: the hub is not asked again
    folder = mixture.GSM8K.folder(tmp_path / "data")
    assert json.loads((folder / "manifest.json").read_text()) == ["00000.parquet", "00001.parquet"]
    assert folder.relative_to(tmp_path / "data").as_posix() == "openai--gsm8k/main/train"
    assert len(build_mixture("mid_train", tmp_path / "data")) == 15


def test_an_unfinished_download_is_no_data(hub, small_stage, tmp_path):
    address, _, site = hub
    missing = site / "files" / mixture.GSM8K.repo / "train" / "00001.parquet"
    kept = missing.read_bytes()
    missing.unlink()
    with pytest.raises(UserError, match=r"00001\.parquet"):
        download_mixture("mid", tmp_path / "data", hub=address)
    with pytest.raises(UserError, match="is not in"):
        build_mixture("mid_train", tmp_path / "data")
    missing.write_bytes(kept)
    assert len(download_mixture("mid", tmp_path / "data", hub=address)) == 5


def test_a_file_lost_after_the_download_is_named_and_fetched_again(hub, small_stage, tmp_path):
    address, _, _ = hub
    paths = download_mixture("mid", tmp_path, hub=address)
    lost = mixture.GSM8K.folder(tmp_path) / "00001.parquet"
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(UserError, match=rf"{lost} is missing"):
        build_mixture("mid_train", tmp_path)
    assert download_mixture("mid", tmp_path, hub=address) == paths
    assert lost.read_bytes() == content


def test_a_strange_answer_of_the_hub_is_an_error(hub, small_stage, tmp_path):
    address, _, site = hub
    listing = site / f"api/datasets/{mixture.GSM8K.repo}/parquet/main/train"
    for answer in ('{"error": "gated"}', "<html>", "[]", "[1]"):
        listing.write_text(answer)
        with pytest.raises(UserError, match="did not give a list of parquet files"):
            download_mixture("mid", tmp_path / "data", hub=address)
