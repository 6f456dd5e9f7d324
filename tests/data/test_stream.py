"""The pretraining stream: nanochat's batches, exact positions, every shard of the work exactly once."""

import ast
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

from megacontext_jax.data import batches, conversations, mixture, packing, records, spelling, stream
from megacontext_jax.data.rowgroups import write_shards
from megacontext_jax.data.stream import pretrain_stream, val_batches
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
BASE_DIR = GOLDEN / "pipeline_classic" / "base_dir"
SHARDS = sorted((BASE_DIR / "base_data").glob("*.parquet"))
TRAIN, VAL = SHARDS[:-1], SHARDS[-1:]
SHAPE = (2, 32)
KINDS = {
    "concat": {},
    "shuffled": {"shuffle_seed": 5},
    "best_fit": {"packing": "best_fit", "buffer_size": 20, "chunk_docs": 4},
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(BASE_DIR / "tokenizer")


@pytest.fixture(scope="module", params=["classic", "head"])
def golden(request):
    return request.param, np.load(GOLDEN / "loaders" / f"{request.param}.npz")


def golden_options(name):
    return {} if name == "classic" else KINDS["best_fit"]


def take(iterator, count):
    return list(islice(iterator, count))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in ("inputs", "targets"):
            np.testing.assert_array_equal(one[name], other[name])


def texts_of(paths):
    return [text for path in paths for text in read(path)]


def read(path):
    source = stream.RowGroupSource([path])
    return [text for i in range(len(source)) for text in source[i]]


def shards(folder, texts, *, per_group=2, per_file=6):
    return write_shards(texts, folder, docs_per_group=per_group, docs_per_shard=per_file)


def ignoring(found):
    return int((found["targets"] != records.IGNORE).sum())


# Against nanochat


@pytest.mark.parametrize("split", ["train", "val"])
def test_classic_stream_is_nanochats(split, tokenizer):
    expected = np.load(GOLDEN / "loaders" / "classic.npz")
    batches = take(pretrain_stream(TRAIN if split == "train" else VAL, tokenizer, *SHAPE), 4)
    np.testing.assert_array_equal([b["inputs"] for b in batches], expected[f"{split}_x"])
    np.testing.assert_array_equal([b["targets"] for b in batches], expected[f"{split}_y"])
    assert batches[0]["inputs"].dtype == batches[0]["targets"].dtype == np.int32


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("buffer_size", [20, 1000])
def test_best_fit_is_nanochats(split, buffer_size, tokenizer):
    expected = np.load(GOLDEN / "loaders" / "head.npz")
    options = KINDS["best_fit"] | {"buffer_size": buffer_size}
    found = pretrain_stream(TRAIN if split == "train" else VAL, tokenizer, *SHAPE, **options)
    for i in range(4):
        batch, place = next(found), found.position()
        np.testing.assert_array_equal(batch["inputs"], expected[f"{split}_buf{buffer_size}_x"][i])
        np.testing.assert_array_equal(batch["targets"], expected[f"{split}_buf{buffer_size}_y"][i])
        state = [place["file"], place["row_group"], place["epoch"]]
        assert state == expected[f"{split}_buf{buffer_size}_state"][i].tolist()


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_see_what_nanochats_ranks_see(rank, golden, tokenizer):
    name, expected = golden
    found = pretrain_stream(
        TRAIN, tokenizer, *SHAPE, process_index=rank, process_count=2, **golden_options(name)
    )
    np.testing.assert_array_equal([b["inputs"] for b in take(found, 2)], expected[f"train_ws2_rank{rank}_x"])


def test_resuming_nanochats_way(tokenizer):
    expected = np.load(GOLDEN / "loaders" / "head.npz")
    found = pretrain_stream(TRAIN, tokenizer, *SHAPE, **KINDS["best_fit"])
    found.seek(file=0, row_group=2)  # the state is (0, 1, 1): nanochat goes on behind that row group
    np.testing.assert_array_equal(next(found)["inputs"], expected["train_resume_pq0_rg1_x"])
    place = found.position()
    state = [place["file"], place["row_group"], place["epoch"]]
    assert state == expected["train_resume_state"].tolist()


def test_seek_takes_the_next_row_group_of_this_process(tokenizer):
    found = pretrain_stream(TRAIN, tokenizer, *SHAPE, process_index=1, process_count=2)
    found.seek(file=0, row_group=2, epoch=3)  # process 1 has row group 1 of each file
    assert found.position() == {"epoch": 3, "file": 1, "name": TRAIN[1].name, "row_group": 1}
    with pytest.raises(UserError, match="shuffled"):
        pretrain_stream(TRAIN, tokenizer, *SHAPE, shuffle_seed=1).seek(0, 0)


# Positions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [(0, 1), (1, 2)])
def test_every_position_resumes_exactly(kind, share, tokenizer):
    options = KINDS[kind] | {"process_index": share[0], "process_count": share[1]}
    one = pretrain_stream(TRAIN, tokenizer, *SHAPE, **options)
    states, expected = [], []
    for _ in range(500):
        states.append(json.dumps(one.get_state()))
        expected.append(next(one))
    assert one.position()["epoch"] > 1
    for i in (0, 1, 37, 188, 333, 490):
        again = pretrain_stream(TRAIN, tokenizer, *SHAPE, **options, state=json.loads(states[i]))
        assert json.dumps(again.get_state()) == states[i]
        assert_same(take(again, 5), expected[i : i + 5])
    assert max(map(len, states)) < 700


def test_reading_ahead_does_not_move_the_position(tokenizer):
    one = pretrain_stream(TRAIN, tokenizer, *SHAPE)
    before = one.get_state()
    next(one)
    one.set_state(before)
    assert one.get_state() == before


def test_worker_processes_give_the_same_batches_and_positions(tokenizer):
    threaded = pretrain_stream(TRAIN, tokenizer, *SHAPE)
    take(threaded, 30)
    state = json.dumps(threaded.get_state())  # a position does not depend on who tokenises
    expected = take(threaded, 100)
    worked = pretrain_stream(TRAIN, tokenizer, *SHAPE, num_workers=2, state=json.loads(state))
    try:
        assert_same(take(worked, 60), expected[:60])
        state = json.dumps(worked.get_state())
    finally:
        worked.close()
    again = pretrain_stream(TRAIN, tokenizer, *SHAPE, state=json.loads(state))
    assert_same(take(again, 40), expected[60:])


def test_workers_end_with_a_killed_run(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "from megacontext_jax.data.stream import pretrain_stream\n"
        "if __name__ == '__main__':\n"
        "    stream = pretrain_stream(sys.argv[2:], sys.argv[1], 2, 32, num_workers=1)\n"
        "    next(stream)\n"
        "    print('reading', flush=True)\n"
        "    time.sleep(300)\n"
    )
    command = [sys.executable, str(script), str(BASE_DIR / "tokenizer"), *map(str, TRAIN)]
    root = str(Path(stream.__file__).parents[2])
    workers = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=root) as run:
        try:
            assert run.stdout.readline() == b"reading\n"
            workers = psutil.Process(run.pid).children(recursive=True)
            assert workers
        finally:
            run.kill()
    outlived = psutil.wait_procs(workers, timeout=20)[1]
    for worker in outlived:
        worker.kill()
    assert not outlived


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"process_count": 2}, "1 processes, this run has 2"),
        ({"process_count": 2, "process_index": 1}, "start 1, or begin this stage anew with --fresh"),
        ({"packing": "best_fit"}, "'concat'"),
        ({"shuffle_seed": 3}, "shuffle seed None"),
    ],
)
def test_a_position_of_another_run_is_refused(change, message, tokenizer):
    state = pretrain_stream(TRAIN, tokenizer, *SHAPE).get_state()
    with pytest.raises(UserError, match=message):
        pretrain_stream(TRAIN, tokenizer, *SHAPE, **change, state=state)


def test_a_position_of_another_process_is_refused(tokenizer):
    first = pretrain_stream(TRAIN, tokenizer, *SHAPE, process_index=0, process_count=2)
    second = pretrain_stream(TRAIN, tokenizer, *SHAPE, process_index=1, process_count=2)
    with pytest.raises(UserError, match="process 0, this is process 1"):
        second.set_state(first.get_state())


def test_a_position_in_other_data_is_refused(tokenizer, tmp_path):
    paths = shards(tmp_path, ["one", "two", "three"])
    state = pretrain_stream(paths, tokenizer, *SHAPE).get_state()
    paths[0].unlink()
    shards(tmp_path, ["one", "two", "quite another text"])
    with pytest.raises(UserError, match="data changed"):
        pretrain_stream(paths, tokenizer, *SHAPE, state=state)
    for foreign in ({}, None, {"next_index": 3}):
        with pytest.raises(UserError, match="no data position"):
            pretrain_stream(paths, tokenizer, *SHAPE).set_state(foreign)


def test_a_position_of_another_tokenizer_is_refused(tokenizer):
    other = Tokenizer.train(["some other words to merge, some more words"], 280)
    state = pretrain_stream(TRAIN, tokenizer, *SHAPE).get_state()
    with pytest.raises(UserError, match="tokenizer changed"):
        pretrain_stream(TRAIN, other, *SHAPE, state=state)


def test_each_reading_thread_has_a_tokenizer_of_its_own(tokenizer):
    own = pickle.loads(pickle.dumps(records.PerThread(tokenizer)))
    assert records.PerThread(tokenizer)() is tokenizer
    with ThreadPoolExecutor(1) as pool:
        first, second = pool.submit(own).result(), pool.submit(own).result()
    assert first is second is not own()
    assert first.digest == tokenizer.digest


# Who reads what


@pytest.mark.parametrize("groups", [[3, 3], [1, 1, 1, 1, 1], [5, 1, 2], [2, 2]])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_row_groups_are_dealt_out_once(groups, count, tmp_path):
    paths = []
    for i, n in enumerate(groups):
        paths += write_shards(["text"] * n, tmp_path, docs_per_group=1, docs_per_shard=None, prefix=f"{i}_")
    corpus = stream.Corpus(paths)
    shares = [corpus.share(i, count) for i in range(count)]
    assert sorted(group for share in shares for group in share) == list(range(sum(groups)))
    assert all(shares)
    if max(groups) >= count:  # nanochat's order: every count-th row group of each file
        files = [corpus.source.locate(group) for group in shares[count - 1]]
        assert files == [(f, g) for f, n in enumerate(groups) for g in range(count - 1, n, count)]


def test_more_processes_than_row_groups_is_an_error(tmp_path, tokenizer):
    paths = shards(tmp_path, ["a", "b"], per_group=1)
    with pytest.raises(UserError, match="2 row groups for 3 processes"):
        pretrain_stream(paths, tokenizer, *SHAPE, process_index=2, process_count=3)


def test_shuffling_deals_out_each_epoch_once_and_differs_between_epochs(tmp_path, tokenizer):
    paths = shards(tmp_path, [f"{i}" for i in range(40)], per_group=1, per_file=10)
    orders = []
    for process in range(2):
        one = pretrain_stream(paths, tokenizer, 1, 8, shuffle_seed=3, process_index=process, process_count=2)
        orders.append([one._order[i] for i in range(40)])
    epochs = [sorted(orders[0][k : k + 20] + orders[1][k : k + 20]) for k in (0, 20)]
    assert epochs == [list(range(40))] * 2
    assert orders[0][:20] != orders[0][20:]
    assert orders[0][:20] != sorted(orders[0][:20])


def test_no_order_is_the_order_of_the_files(tokenizer):
    one = pretrain_stream(TRAIN, tokenizer, 1, 100)
    found = np.concatenate([np.append(b["inputs"], b["targets"][:, -1:]) for b in take(one, 20)])
    rows = tokenizer.encode(texts_of(TRAIN), prepend=tokenizer.bos)
    assert found.tolist() == [token for row in rows for token in row][: len(found)]


# Odd corpora


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_corpus_smaller_than_a_batch_is_repeated(packing, tmp_path, tokenizer):
    paths = shards(tmp_path, ["tiny", ""])
    one = pretrain_stream(paths, tokenizer, 2, 64, packing=packing)
    batch = take(one, 3)[-1]
    assert ignoring(batch) == 128
    assert one.position()["epoch"] > 10


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_empty_documents_are_a_bos_each(packing, tmp_path, tokenizer):
    one = pretrain_stream(shards(tmp_path, [""] * 5), tokenizer, 1, 8, packing=packing)
    assert (next(one)["inputs"] == tokenizer.bos).all()


def test_documents_longer_than_a_row(tmp_path, tokenizer):
    paths = shards(tmp_path, ["word " * 400, "word " * 300], per_group=1)
    cropped = pretrain_stream(paths, tokenizer, 1, 16, packing="best_fit", buffer_size=2)
    batch = next(cropped)
    assert batch["inputs"][0, 0] == tokenizer.bos
    assert cropped.kept_share < 0.1
    concatenated = pretrain_stream(paths, tokenizer, 1, 16)
    assert sum(int((b["inputs"] == tokenizer.bos).sum()) for b in take(concatenated, 20)) < 3
    assert concatenated.kept_share == 1.0


def test_no_data_and_wrong_names_are_errors(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no data files"):
        pretrain_stream([], tokenizer, *SHAPE)
    with pytest.raises(UserError, match="no packing 'loose'"):
        pretrain_stream(TRAIN, tokenizer, *SHAPE, packing="loose")
    with pytest.raises(UserError, match="no packing 'loose'"):
        val_batches(VAL, tokenizer, *SHAPE, max_tokens=100, packing="loose")
    with pytest.raises(UserError, match="missing"):
        pretrain_stream([tmp_path / "shard_00000.parquet"], tokenizer, *SHAPE)
    with pytest.raises(UserError, match="no process 2 among 2"):
        pretrain_stream(TRAIN, tokenizer, *SHAPE, process_index=2, process_count=2)


def test_a_file_that_vanishes_during_the_run_is_named(tmp_path, tokenizer):
    paths = shards(tmp_path, ["some text"] * 200, per_group=1, per_file=100)
    one = pretrain_stream(paths, tokenizer, 1, 16)
    next(one)
    paths[1].unlink()
    with pytest.raises(UserError, match=paths[1].name):
        take(one, 200)


def test_the_tokenizer_may_be_a_folder(tokenizer):
    expected = take(pretrain_stream(TRAIN, tokenizer, *SHAPE), 1)
    assert_same(take(pretrain_stream(TRAIN, BASE_DIR / "tokenizer", *SHAPE), 1), expected)


# Validation


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_validation_is_one_pass_of_equal_length_everywhere(packing, count, tmp_path, tokenizer):
    texts = ["word " * n for n in (1, 60, 3, 5, 2, 2, 40)]
    paths = shards(tmp_path, texts, per_group=2, per_file=7)
    tokens = sum(map(len, tokenizer.encode(texts, prepend=tokenizer.bos)))
    shares = []
    for process in range(count):
        found = val_batches(
            paths,
            tokenizer,
            2,
            8,
            max_tokens=10**9,
            packing=packing,
            process_index=process,
            process_count=count,
        )
        first = list(found)
        assert_same(list(found), first)  # kept in memory
        found._kept = None
        assert_same(list(found), first)  # made again
        shares.append(first)
    assert len({len(share) for share in shares}) == 1
    assert all(batch["inputs"].shape == (2, 8) for share in shares for batch in share)
    targets = sum(ignoring(batch) for share in shares for batch in share)
    if packing == "concat":  # each batch uses one token as a target only
        full = sum(1 for share in shares for batch in share if ignoring(batch))
        assert targets == tokens - full
    else:
        assert targets > 0


def test_validation_stops_at_the_limit_and_starts_at_the_beginning(tokenizer):
    expected = np.load(GOLDEN / "loaders" / "classic.npz")
    found = val_batches(VAL, tokenizer, *SHAPE, max_tokens=4 * 64 + 63)
    for _ in range(2):
        np.testing.assert_array_equal([b["inputs"] for b in found], expected["val_x"])
    assert len(list(val_batches(VAL, tokenizer, *SHAPE, max_tokens=1))) == 1
    best = val_batches(VAL, tokenizer, *SHAPE, max_tokens=4 * 64, **KINDS["best_fit"])
    expected = np.load(GOLDEN / "loaders" / "head.npz")["val_buf20_y"]
    np.testing.assert_array_equal([b["targets"] for b in best], expected)


def test_stopping_early_does_not_shorten_the_next_validation(tokenizer):
    found = val_batches(VAL, tokenizer, *SHAPE, max_tokens=10**6)
    take(iter(found), 2)
    assert len(list(found)) > 2


@pytest.mark.parametrize("module", [stream, packing, records, batches, conversations, mixture, spelling])
def test_workers_need_no_jax(module):
    tree = ast.parse(Path(module.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax")]
