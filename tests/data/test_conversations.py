"""Conversations: nanochat's batches, exact positions, and one clear sentence for what is malformed."""

import json
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megacontext_jax.data import records
from megacontext_jax.data.conversations import (
    PACKINGS,
    ConversationSource,
    checked,
    conversation_stream,
    conversation_val_batches,
    estimate_tokens,
)
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
CLASSIC = np.load(GOLDEN / "conversations" / "classic.npz")
HEAD = np.load(GOLDEN / "conversations" / "head.npz")
CHATS = json.loads(str(CLASSIC["conversations_json"]))
RANKS = [(0, 1), (0, 2), (1, 2)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(GOLDEN / "pipeline_classic" / "base_dir" / "tokenizer")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return ConversationSource([write_lines(tmp_path_factory.mktemp("chats") / "chats.jsonl", CHATS)])


def write_lines(path, chats):
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")
    return path


def write_parquet(path, chats):
    pq.write_table(pa.table({"messages": [chat["messages"] for chat in chats]}), path, row_group_size=7)
    return path


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def made(count):
    return [chat(f"number {i}", "x" * (1 + i % 7)) for i in range(count)]


def take(iterator, count):
    return list(islice(iterator, count))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in ("inputs", "targets"):
            np.testing.assert_array_equal(one[name], other[name])


# Against nanochat


@pytest.mark.parametrize(("rank", "world"), RANKS)
def test_padded_packing_is_nanochats(rank, world, source, tokenizer):
    found = conversation_stream(
        source,
        tokenizer,
        2,
        96,
        packing="pad",
        shuffle=False,
        buffer_size=12,
        process_index=rank,
        process_count=world,
    )
    for i in range(5):
        batch, progress = next(found), found.progress()
        np.testing.assert_array_equal(batch["inputs"], HEAD[f"ws{world}_rank{rank}_x"][i])
        np.testing.assert_array_equal(batch["targets"], HEAD[f"ws{world}_rank{rank}_y"][i])
        state = [progress["progress"], float(progress["last_step"]), float(progress["epoch"])]
        assert state == pytest.approx(HEAD[f"ws{world}_rank{rank}_state"][i].tolist())


@pytest.mark.parametrize(("rank", "world"), RANKS)
def test_right_padded_rows_are_nanochats(rank, world, source, tokenizer):
    found = conversation_stream(
        source,
        tokenizer,
        4,
        80,
        packing="rows",
        shuffle=False,
        process_index=rank,
        process_count=world,
    )
    pad = tokenizer.special("<|assistant_end|>")
    for i in range(2):
        x, y = (CLASSIC[f"ws{world}_rank{rank}_{name}{i}"] for name in "xy")
        chats = [CHATS[rank + world * (4 * i + j)] for j in range(4)]
        exact = records.right_padded([tokenizer.render_conversation(c) for c in chats], pad)
        np.testing.assert_array_equal(exact["inputs"], x)
        np.testing.assert_array_equal(exact["targets"], y)
        batch, width = next(found), x.shape[1]  # the stream has nanochat's batch in a fixed width
        np.testing.assert_array_equal(batch["inputs"][:, :width], x)
        np.testing.assert_array_equal(batch["targets"][:, :width], y)
        assert (batch["inputs"][:, width:] == pad).all()
        assert (batch["targets"][:, width:] == -1).all()


@pytest.mark.parametrize("mask", [False, True])
def test_stream_is_the_rendered_text_in_order(mask, source, tokenizer):
    found = conversation_stream(source, tokenizer, 2, 31, packing="stream", mask=mask, shuffle=False)
    rendered = [tokenizer.render_conversation(c) for c in CHATS] * 2
    ids = np.array([token for row, _ in rendered for token in row])
    keep = np.array([flag for _, row in rendered for flag in row])
    for i, batch in enumerate(take(found, 40)):  # goes into the second epoch
        part = slice(63 * i, 63 * i + 63)
        np.testing.assert_array_equal(batch["inputs"].ravel(), ids[part][:-1])
        targets = np.where(keep[part][1:] if mask else 1, ids[part][1:], -1)
        np.testing.assert_array_equal(batch["targets"].ravel(), targets)
    assert found.progress()["epoch"] == 2
    assert found.progress()["last_step"]


# Positions and order


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_position_resumes_exactly(packing, shuffle, source, tokenizer):
    options = {
        "packing": packing,
        "shuffle": shuffle,
        "mask": True,
        "process_index": 1,
        "process_count": 2,
        "buffer_size": 12,
    }
    one = conversation_stream(source, tokenizer, 2, 96, **options)
    states, expected, progress = [], [], []
    for _ in range(30):
        states.append(json.dumps(one.get_state()))
        progress.append(one.progress())
        expected.append(next(one))
    assert one.progress()["epoch"] > 2
    for i in (0, 1, 5, 17, 26):
        again = conversation_stream(source, tokenizer, 2, 96, **options, state=json.loads(states[i]))
        assert json.dumps(again.get_state()) == states[i]
        assert again.progress() == progress[i]
        assert_same(take(again, 4), expected[i : i + 4])
    assert max(map(len, states)) < 900


def test_a_position_of_other_conversations_is_refused(source, tokenizer, tmp_path):
    other = ConversationSource([write_lines(tmp_path / "chats.jsonl", CHATS[:30])])
    state = conversation_stream(source, tokenizer, 2, 96).get_state()
    with pytest.raises(UserError, match="data changed"):
        conversation_stream(other, tokenizer, 2, 96, state=state)
    with pytest.raises(UserError, match="cut at 97 tokens, this run cuts at 65"):
        conversation_stream(source, tokenizer, 2, 64, state=state)
    with pytest.raises(UserError, match="packing 'pad'"):
        conversation_stream(source, tokenizer, 2, 96, packing="rows", state=state)
    with pytest.raises(UserError, match="shuffle seed 42"):
        conversation_stream(source, tokenizer, 2, 96, shuffle=False, state=state)


@pytest.mark.parametrize("world", [1, 3])
def test_each_epoch_is_a_new_permutation_dealt_out_to_the_processes(world, tmp_path, tokenizer):
    count = 20  # not a multiple of 3: the deal goes on across the end of an epoch
    chats = ConversationSource([write_lines(tmp_path / "chats.jsonl", made(count))])
    order = [None] * 2 * count
    for rank in range(world):
        one = conversation_stream(
            chats, tokenizer, 1, 64, packing="rows", seed=7, process_index=rank, process_count=world
        )
        for position in range(rank, 2 * count, world):
            text = tokenizer.decode([t for t in next(one)["inputs"][0] if t < tokenizer.bos])
            order[position] = int(text.split("number ")[1].split("x")[0])
    assert order[:count] == np.random.default_rng(7).permutation(count).tolist()
    assert sorted(order[count:]) == list(range(count))
    assert order[count:] != order[:count]


def test_worker_processes_give_the_same_batches_and_positions(source, tokenizer):
    options = {"packing": "pad", "process_index": 1, "process_count": 2, "buffer_size": 12}
    alone = conversation_stream(source, tokenizer, 2, 96, **options)
    take(alone, 5)
    state = json.dumps(alone.get_state())  # a position does not depend on who tokenises
    expected = take(alone, 30)
    worked = conversation_stream(source, tokenizer, 2, 96, **options, num_workers=2, state=json.loads(state))
    try:
        assert_same(take(worked, 20), expected[:20])
        assert estimate_tokens(worked) == estimate_tokens(alone)
        state = json.dumps(worked.get_state())
    finally:
        worked.close()
    again = conversation_stream(source, tokenizer, 2, 96, **options, state=json.loads(state))
    assert_same(take(again, 10), expected[20:])


def test_what_workers_get_carries_no_rows(source, tokenizer):
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 1000
    assert copy[3] == source[3]
    one = conversation_stream(source, tokenizer, 2, 96)
    record = pickle.loads(pickle.dumps(one.render))(5, 5)
    assert record["tokens"].tolist() == one.render(5, 5)["tokens"].tolist()


# Lengths


@pytest.mark.parametrize("packing", ["pad", "rows"])
def test_conversations_longer_than_a_row_neither_stall_nor_leave_a_row_empty(packing, tmp_path, tokenizer):
    long = [chat("why " * 3, "because " * n) for n in range(1, 120, 4)]
    chats = ConversationSource([write_lines(tmp_path / "chats.jsonl", long)])
    one = conversation_stream(chats, tokenizer, 4, 32, packing=packing, buffer_size=10)
    for batch in take(one, 60):
        assert ((batch["targets"] != -1).sum(1) > 0).all()
        assert ((batch["inputs"] == tokenizer.bos).any(1)).all()


def test_conversations_without_a_trained_token_are_passed_over(tmp_path, tokenizer):
    mixed = [chat("long question " * 40, "never seen"), chat("hi", "short")] * 3
    chats = ConversationSource([write_lines(tmp_path / "chats.jsonl", mixed)])
    one = conversation_stream(chats, tokenizer, 1, 32, packing="pad", buffer_size=2, shuffle=False)
    expected = tokenizer.render_conversation(mixed[1])[0]
    for batch in take(one, 5):
        assert batch["inputs"][0, : len(expected)].tolist() == expected
    assert one.progress()["progress"] > 1
    only = ConversationSource([write_lines(tmp_path / "only.jsonl", mixed[:1])])
    for packing in ("pad", "rows"):
        with pytest.raises(UserError, match="larger --max-seq-len"):
            next(conversation_stream(only, tokenizer, 1, 32, packing=packing))


def test_a_stream_keeps_long_conversations_whole_unless_told(tmp_path, tokenizer):
    chats = ConversationSource([write_lines(tmp_path / "chats.jsonl", [chat("q", "word " * 900)])])
    length = len(tokenizer.render_conversation(chats[0], None)[0])
    assert length > 2048
    for cut, expected in ((None, length), (2048, 2048)):
        one = conversation_stream(chats, tokenizer, 1, 4000, packing="stream", max_tokens=cut)
        batch = next(one)
        assert np.flatnonzero(batch["inputs"][0] == tokenizer.bos)[:2].tolist() == [0, expected]


@pytest.mark.parametrize("packing", PACKINGS)
def test_estimate_is_what_one_epoch_takes(packing, source, tokenizer):
    one = conversation_stream(source, tokenizer, 1, 96, packing=packing, shuffle=False, buffer_size=12)
    estimate = estimate_tokens(one)
    batches = list(
        conversation_val_batches(source, tokenizer, 1, 96, max_tokens=10**9, packing=packing, mask=None)
    )
    assert abs(estimate - 96 * len(batches)) <= 96


def test_estimate_extrapolates_from_a_sample(source, tokenizer, monkeypatch):
    one = conversation_stream(source, tokenizer, 1, 96, packing="stream")
    full = estimate_tokens(one)
    monkeypatch.setattr("megacontext_jax.data.conversations._SAMPLE", 10)
    assert estimate_tokens(one) != full
    assert estimate_tokens(one) == pytest.approx(full, rel=0.3)


# Validation


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("world", [1, 3])
def test_validation_is_one_pass_of_equal_length_everywhere(packing, world, source, tokenizer):
    trained = sum(sum(tokenizer.render_conversation(c)[1]) for c in CHATS)
    shares = []
    for rank in range(world):
        found = conversation_val_batches(
            source,
            tokenizer,
            2,
            96,
            max_tokens=10**9,
            packing=packing,
            mask=True,
            process_index=rank,
            process_count=world,
        )
        shares.append(list(found))
        assert_same(list(found), shares[-1])
    assert len({len(share) for share in shares}) == 1
    targets = sum(int((batch["targets"] != -1).sum()) for share in shares for batch in share)
    assert targets == trained if packing != "stream" else targets >= trained - sum(map(len, shares))
    limited = conversation_val_batches(source, tokenizer, 2, 96, max_tokens=500, packing=packing)
    assert len(list(limited)) == 2


# Files


def test_parquet_and_jsonl_read_the_same(tmp_path, tokenizer):
    chats = made(20)
    lines = write_lines(tmp_path / "a.jsonl", chats[:5] + [c["messages"] for c in chats[5:]])
    tables = [
        write_parquet(tmp_path / "b.parquet", chats[:15]),
        write_parquet(tmp_path / "c.parquet", chats[15:]),
    ]
    one, other = ConversationSource([lines]), ConversationSource(tables)
    assert len(one) == len(other) == 20
    assert [one[i] for i in range(20)] == [other[i] for i in range(20)] == chats
    for index in (-1, 20):
        with pytest.raises(IndexError):
            one[index]


def test_line_separators_inside_a_line_are_text(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(chat("a\u2028b\x85c", "d"), ensure_ascii=False) + "\n\n", "utf-8")
    source = ConversationSource([path])
    assert len(source) == 1
    assert source[0]["messages"][0]["content"] == "a\u2028b\x85c"


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"text": "hi"}, 'needs "messages"'),
        ({"messages": "hi"}, 'needs "messages"'),
        ([], 'needs "messages"'),
        (["hi", "there"], 'message 0 needs "role" and "content"'),
        ([USER, {"role": "assistant"}], 'message 1 needs "role" and "content"'),
        ([USER], "a user message and an answer"),
        ([{"role": "system", "content": "s"}, USER], "a user message and an answer"),
        ([ANSWER, USER], "message 0 has the role 'assistant', 'user' is due"),
        ([USER, USER], "message 1 has the role 'user', 'assistant' is due"),
        ([USER, ANSWER, {"role": "system", "content": "s"}], "message 2 has the role 'system'"),
        ([{"role": "user", "content": None}, ANSWER], "content of message 0"),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER], "content of message 0"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "text": ""}]}], "content of message 1"),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "content of message 1"),
    ],
)
def test_malformed_conversations_are_named(found, message, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(chat("q", "a")) + "\n\n" + json.dumps(found) + "\n")
    source = ConversationSource([path])
    assert source[0] == chat("q", "a")
    with pytest.raises(UserError, match=r"chats\.jsonl, line 3") as error:
        source[1]
    assert message in str(error.value)


def test_well_formed_conversations_pass():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "python", "text": "1"},
        {"type": "python_output", "text": "1"},
    ]
    for messages in (
        [USER, ANSWER],
        [{"role": "system", "content": "s"}, USER, ANSWER],
        [USER, ANSWER, USER],
        [USER, {"role": "assistant", "content": parts}],
    ):
        assert checked(messages, "here") == {"messages": messages}
        assert checked({"messages": messages, "more": 1}, "here") == {"messages": messages, "more": 1}


def test_bad_files_are_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no conversation files"):
        ConversationSource([])
    with pytest.raises(UserError, match=r"no\.jsonl is missing"):
        ConversationSource([tmp_path / "no.jsonl"])
    with pytest.raises(UserError, match=r"no\.parquet is missing"):
        ConversationSource([tmp_path / "no.parquet"])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        ConversationSource([tmp_path / "empty.jsonl"])
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.jsonl cannot be read"):
        ConversationSource([tmp_path / "binary.jsonl"])
    (tmp_path / "broken.jsonl").write_text('{"messages": [')
    with pytest.raises(UserError, match=r"broken\.jsonl, line 1 is not JSON"):
        ConversationSource([tmp_path / "broken.jsonl"])[0]
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet has no column 'messages'"):
        ConversationSource([tmp_path / "other.parquet"])
    whole = write_parquet(tmp_path / "cut.parquet", made(50)).read_bytes()
    source = ConversationSource([tmp_path / "cut.parquet"])
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.parquet is damaged"):
        source[0]
    with pytest.raises(UserError, match=r"cut\.parquet is not a complete parquet file"):
        ConversationSource([tmp_path / "cut.parquet"])


def test_a_malformed_row_stops_the_stream_with_its_place(tmp_path, tokenizer):
    chats = [*made(3), {"messages": [ANSWER, USER]}]
    path = write_parquet(tmp_path / "train-00000.parquet", chats)
    one = conversation_stream(ConversationSource([path]), tokenizer, 2, 64, packing="rows", shuffle=False)
    with pytest.raises(UserError, match=r"train-00000\.parquet, row 3: message 0"):
        take(one, 4)


def test_wrong_arguments_are_errors(source, tokenizer):
    with pytest.raises(UserError, match="no packing 'loose'"):
        conversation_stream(source, tokenizer, 2, 96, packing="loose")
    with pytest.raises(UserError, match="no process 1 among 1"):
        conversation_stream(source, tokenizer, 2, 96, process_index=1)
    with pytest.raises(UserError, match="40 conversations are too few for 41 processes"):
        conversation_stream(source, tokenizer, 2, 96, process_count=41)
