"""The tokenizer against nanochat's own output, an independent trainer, and damaged or hostile files."""

import base64
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext_jax.data.tokenizer import SPLIT_PATTERN, Tokenizer
from megacontext_jax.data.tokenizer_files import SPECIAL_TOKENS
from megacontext_jax.errors import UserError

GOLDEN_DIR = Path(__file__).parents[1] / "golden" / "pipeline_classic"
GOLDEN = json.loads((GOLDEN_DIR / "tokenizer_golden.json").read_text())
NANOCHAT_DIR = GOLDEN_DIR / "base_dir" / "tokenizer"
TOKENIZER = Tokenizer.load(NANOCHAT_DIR)


def golden_documents() -> list[str]:
    shards = sorted((GOLDEN_DIR / "base_dir" / "base_data").glob("*.parquet"))
    return [text for shard in shards for text in pq.read_table(shard)["text"].to_pylist()]


def long_conversation() -> dict:
    return {
        "messages": [
            {"role": "user", "content": "Tell me about the lighthouse."},
            {"role": "assistant", "content": "The keeper counted ships before dawn. " * 40},
        ]
    }


# Against nanochat


def test_pickle_of_nanochat_gives_its_vocabulary():
    assert TOKENIZER.vocab_size == GOLDEN["vocab_size"]
    assert TOKENIZER.bos == GOLDEN["bos"]
    assert TOKENIZER.special_tokens == GOLDEN["special_tokens"]
    assert TOKENIZER.vocabulary.pattern == GOLDEN["split_pattern"] == SPLIT_PATTERN
    ranks = [[base64.b64encode(token).decode(), i] for i, token in enumerate(TOKENIZER.vocabulary.merges)]
    assert ranks == GOLDEN["mergeable_ranks_b64"]


@pytest.mark.parametrize("case", GOLDEN["encodings"], ids=lambda case: repr(case["text"][:12]))
def test_encoding_equals_nanochat(case):
    assert TOKENIZER.encode(case["text"]) == case["ids"]
    assert TOKENIZER.encode(case["text"], prepend="<|bos|>") == case["ids_prepend_bos"]
    assert TOKENIZER.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_batch_encoding_equals_single(num_threads):
    texts = [case["text"] for case in GOLDEN["encodings"]]
    expected = [[TOKENIZER.bos, *case["ids"], 7] for case in GOLDEN["encodings"]]
    assert TOKENIZER.encode(texts, prepend=TOKENIZER.bos, append=7, num_threads=num_threads) == expected


@pytest.mark.parametrize("case", GOLDEN["conversations"])
def test_conversations_equal_nanochat(case):
    conversation = case["conversation"]
    before = json.dumps(conversation)
    assert TOKENIZER.render_conversation(conversation) == (case["ids"], case["mask"])
    assert TOKENIZER.render_conversation(conversation, max_tokens=32) == (
        case["ids_max32"],
        case["mask_max32"],
    )
    assert TOKENIZER.render_for_completion(conversation) == case["render_for_completion"]
    assert json.dumps(conversation) == before


def test_token_bytes_equal_nanochat():
    new, old = TOKENIZER.token_bytes(), TOKENIZER.token_bytes(legacy=True)
    assert new.dtype == old.dtype == np.int32
    assert new.tolist() == GOLDEN["token_bytes_new_raw"]
    assert old.tolist() == GOLDEN["token_bytes_old_str_roundtrip"]


def test_saved_pickle_is_what_pytorch_nanochat_loads(tmp_path):
    TOKENIZER.save(tmp_path)
    encoding = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())
    assert type(encoding).__module__ == "tiktoken.core"
    assert encoding.name == "rustbpe"
    assert encoding.n_vocab == GOLDEN["vocab_size"]
    assert encoding.encode_single_token("<|assistant_end|>") == GOLDEN["special_tokens"]["<|assistant_end|>"]
    assert [encoding.encode_ordinary(case["text"]) for case in GOLDEN["encodings"]] == [
        case["ids"] for case in GOLDEN["encodings"]
    ]


# Training


def reference_merges(texts: list[str], count: int) -> list[bytes]:
    """Greedy byte-pair merges in plain Python: most frequent pair first, ties to the smallest ids."""
    words = Counter(piece.encode() for text in texts for piece in regex.findall(SPLIT_PATTERN, text))
    tokens = [bytes([i]) for i in range(256)]
    split = {word: list(word) for word in words}
    for _ in range(count):
        pairs: Counter = Counter()
        for word, ids in split.items():
            for pair in itertools.pairwise(ids):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for word, ids in split.items():
            merged, i = [], 0
            while i < len(ids):
                hit = tuple(ids[i : i + 2]) == best
                merged.append(len(tokens) - 1 if hit else ids[i])
                i += 2 if hit else 1
            split[word] = merged
    return tokens


def test_training_equals_an_independent_trainer():
    documents = golden_documents()
    trained = Tokenizer.train(iter(documents), 320)
    assert trained.vocab_size == 320
    assert list(trained.vocabulary.merges) == reference_merges(documents, 320 - 256 - 9)
    assert trained.special_tokens == {name: 311 + i for i, name in enumerate(SPECIAL_TOKENS)}


def test_numbers_split_in_groups_of_two():
    trained = Tokenizer.train(["12345678 " * 50], 300)
    assert max(len(token) for token in trained.vocabulary.merges if token.isdigit()) == 2


def test_small_text_ends_early_and_ids_follow_the_merges():
    trained = Tokenizer.train(["ab ab"], 5000)
    assert trained.vocab_size == 256 + 2 + 9  # "ab" and " ab"
    assert trained.bos == 258
    assert trained.decode(trained.encode("ab ab\n")) == "ab ab\n"


def test_only_training_needs_the_trainer(monkeypatch):
    monkeypatch.setitem(sys.modules, "rustbpe", None)  # as where the package is missing
    with pytest.raises(UserError, match="pip install rustbpe"):
        Tokenizer.train(["text"], 300)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.modules['rustbpe'] = None; import megacontext_jax.infer.load",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_training_refuses_what_cannot_work():
    with pytest.raises(UserError, match=r"264 is too small.*265"):
        Tokenizer.train(["text"], 264)
    with pytest.raises(UserError, match="no text"):
        Tokenizer.train(["", ""], 300)


# Text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_round_trip(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode_bytes(ids) == text.encode()
    assert all(id_ < 311 for id_ in ids)
    assert TOKENIZER.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("blank", [" ", "\u00a0", "\n"])
def test_a_million_blanks_do_not_break_the_split(blank):
    text = "before" + blank * 1_000_000 + "after"
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_long_text_without_blank_runs_is_encoded_in_one_piece():
    text = "The keeper's 42 ships. " * 12_000
    assert len(text) > 200_000
    assert TOKENIZER.encode(text) == TOKENIZER._encoding.encode_ordinary(text)


def test_a_million_blanks_do_not_break_training():
    assert Tokenizer.train(["ab " + " " * 1_000_000], 300).vocab_size > 265


# Conversations


def test_a_conversation_longer_than_the_row_fills_it_exactly():
    full, full_mask = TOKENIZER.render_conversation(long_conversation(), max_tokens=10_000)
    assert len(full) > 200
    for length in (33, 65, len(full) - 1):
        ids, mask = TOKENIZER.render_conversation(long_conversation(), max_tokens=length)
        assert (ids, mask) == (full[:length], full_mask[:length])
        assert len(ids) == len(mask) == length
    assert len(TOKENIZER.render_conversation(long_conversation(), max_tokens=len(full) + 1)[0]) == len(full)


def test_completion_prompt_of_a_conversation_that_ends_with_the_user():
    messages = GOLDEN["conversations"][1]["conversation"]["messages"]
    expected = GOLDEN["conversations"][1]["render_for_completion"]
    assert TOKENIZER.render_for_completion({"messages": messages[:-1]}) == expected
    cut = TOKENIZER.render_for_completion({"messages": messages}, max_tokens=10)
    assert cut == [*expected[:10], TOKENIZER.special("<|assistant_start|>")]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ([{"role": "user"}], "'role' and 'content'"),
        ([{"role": "assistant", "content": "x"}], "Message 0 .*'assistant', expected 'user'"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
            "Message 1 .*'user', expected",
        ),
        ([{"role": "system", "content": "x"}], "followed by a message from 'user'"),
        ([{"role": "user", "content": ["x"]}], "Message 0 .* must hold a string, not list"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}],
            "string or a list of parts",
        ),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image"}]}],
            "part of type 'image'",
        ),
    ],
)
def test_malformed_conversations_are_named(messages, words):
    with pytest.raises(UserError, match=words):
        TOKENIZER.render_conversation({"messages": messages})


# Files


def test_save_and_load(tmp_path):
    TOKENIZER.save(tmp_path / "tok")
    assert sorted(os.listdir(tmp_path / "tok")) == ["token_bytes.npy", "tokenizer.json", "tokenizer.pkl"]
    (tmp_path / "tok" / "tokenizer.pkl").unlink()
    loaded = Tokenizer.load(tmp_path / "tok")
    assert loaded.vocabulary == TOKENIZER.vocabulary
    assert loaded.digest == TOKENIZER.digest
    stored = np.load(tmp_path / "tok" / "token_bytes.npy", allow_pickle=False)
    assert stored.tolist() == GOLDEN["token_bytes_new_raw"]
    loaded.save(tmp_path / "tok")  # identical: allowed
    assert Tokenizer.load(tmp_path / "tok").digest == TOKENIZER.digest


def test_digest_depends_on_everything_and_survives_pickling():
    other = Tokenizer.train(golden_documents(), 320)
    assert len({TOKENIZER.digest, other.digest, Tokenizer.train(golden_documents(), 321).digest}) == 3
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy.digest == TOKENIZER.digest
    assert copy.encode("hello world") == TOKENIZER.encode("hello world")


def test_save_refuses_to_replace_another_tokenizer(tmp_path):
    TOKENIZER.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = Tokenizer.train(golden_documents(), 300)
    with pytest.raises(UserError, match=rf"{TOKENIZER.digest[:12]}.*vocabulary 300.*move that folder aside"):
        other.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_killed_save_leaves_a_usable_or_empty_folder(tmp_path, monkeypatch):
    def full_disk(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match=r"disk is full.*tokenizer\.pkl"):
        TOKENIZER.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in .*nowhere.*scripts\.tok_train"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data.replace(b'"aXI="', b'"aXM="').replace(b'"ICA="', b'"IHE="'),  # other merges
        lambda data: data.replace(b'"<|bos|>": 311', b'"<|bos|>": 312'),
        lambda data: data.replace(b"megacontext-tokenizer", b"another-tokenizer"),
        lambda data: data.replace(b'"merges"', b'"model"'),
        lambda data: b"[1, 2]",
        lambda data: b"\xff\xfe",
    ],
)
def test_damaged_json_is_refused_by_name(tmp_path, damage):
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = path.read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        Tokenizer.load(tmp_path)


def test_flipped_bits_in_the_json_never_give_another_tokenizer(tmp_path):
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer.pkl").unlink()
    path = tmp_path / "tokenizer.json"
    data = path.read_bytes()
    refused = 0
    for position in range(5, len(data), 41):
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        try:
            loaded = Tokenizer.load(tmp_path)
        except UserError:
            refused += 1
        else:  # a place that carries no meaning
            assert loaded.vocabulary == TOKENIZER.vocabulary
    assert refused > 50


def test_two_different_tokenizers_in_one_folder_are_refused(tmp_path):
    TOKENIZER.save(tmp_path / "a")
    Tokenizer.train(golden_documents(), 300).save(tmp_path / "b")
    os.replace(tmp_path / "b" / "tokenizer.pkl", tmp_path / "a" / "tokenizer.pkl")
    with pytest.raises(UserError, match=r"two different tokenizers.*vocabulary 320.*vocabulary 300"):
        Tokenizer.load(tmp_path / "a")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-ran",)


def encoding_state(**changes) -> bytes:
    """A pickle of tiktoken's Encoding class with a state of our making."""
    state = {
        "name": "rustbpe",
        "pat_str": SPLIT_PATTERN,
        "mergeable_ranks": {bytes([i]): i for i in range(256)},
        "special_tokens": {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)},
        **changes,
    }
    head = b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81"
    return head + pickle.dumps(state, protocol=4)[2:-1] + b"b."


def test_handmade_pickle_loads(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(encoding_state())
    assert Tokenizer.load(tmp_path).vocab_size == 265


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        encoding_state()[:-40],
        pickle.dumps({"a": 1}),
        pickle.dumps("gpt2"),
        pickle.dumps(Hostile()),
        encoding_state(name=Hostile()),
        encoding_state(mergeable_ranks=[b"a"]),
        encoding_state(mergeable_ranks={bytes([i]): i for i in range(255)}),
        encoding_state(mergeable_ranks={bytes([i]): 2 * i for i in range(256)}),
        encoding_state(special_tokens={"<|bos|>": 256}),
        encoding_state(special_tokens=dict.fromkeys(SPECIAL_TOKENS, 0)),
        encoding_state(pat_str=None),
        encoding_state(pat_str="(unclosed"),
        b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93\x8c\x01x\x85R.",
    ],
)
def test_damaged_or_hostile_pickles_are_refused_and_run_nothing(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(data)
    with pytest.raises(UserError, match=r"tokenizer\.pkl is damaged or not a nanochat tokenizer"):
        Tokenizer.load(tmp_path)
    assert not (tmp_path / "hostile-ran").exists()


def test_the_data_modules_do_not_import_jax():
    code = (
        "import sys, megacontext_jax.data.tokenizer, megacontext_jax.data.shards;"
        "sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
