"""Trees that grow by appending: one content however it was appended, stored, killed and reopened."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext_jax.context import disk_rows, disk_store, store_base
from megacontext_jax.context.store import create_store, open_store, refresh_store
from megacontext_jax.errors import UserError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from store_kill import GISTNETS, SHAPE, embed, functions, stream  # noqa: E402

SMALL = {"block": 2, "width": 4, "max_levels": 3, "chunk": 8}


@pytest.fixture(autouse=True)
def synced(monkeypatch) -> list[str]:
    """Names of what was forced to the disk; a kill does not need it, and it is slow."""
    names: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda d: names.append(Path(os.readlink(f"/proc/self/fd/{d}")).name))
    return names


def quiet(sentence: str) -> None:
    pass


def make(path=None, gistnet: str = "mean", **shape):
    kind = "ram" if path is None else "disk"
    return create_store(kind, path, **{**SMALL, **functions(gistnet), **shape})


def reopen(path, gistnet: str = "mean", say=quiet, **more):
    return open_store(path, **functions(gistnet), say=say, **more)


def content(tree) -> list[np.ndarray]:
    return [tree.tokens().copy()] + [tree.gists(level).copy() for level in range(1, tree.levels + 1)]


def rebuilt(tokens: np.ndarray, spec) -> list[np.ndarray]:
    """The tree over `tokens`, from its definition."""
    levels, encode = [tokens], GISTNETS[spec.gistnet]
    for level in range(1, spec.max_levels + 1):
        children = embed(tokens) if level == 1 else levels[-1].astype(np.float32)
        nodes = len(tokens) // spec.block**level
        if nodes == 0:
            break
        blocks = [children[i * spec.block : (i + 1) * spec.block] for i in range(nodes)]
        levels.append(np.stack([encode(block[None])[0] for block in blocks]).astype(spec.dtype))
    return levels


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert [x.shape for x in a] == [x.shape for x in b]
    for level, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=f"level {level}")


@settings(max_examples=25, deadline=None)
@given(
    block=st.integers(2, 5),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    max_levels=st.integers(1, 4),
    chunk=st.integers(1, 40),
    sizes=st.lists(st.integers(0, 70), max_size=8),
    close_after=st.integers(0, 8),
)
def test_appends_of_any_size_make_one_tree(block, dtype, max_levels, chunk, sizes, close_after):
    shape = {"block": block, "dtype": dtype, "max_levels": max_levels, "chunk": chunk}
    tokens = stream(0, sum(sizes))
    bulk, single, late = make(**shape), make(**shape), make(**shape)
    bulk.append(tokens)
    for size in sizes:  # tokens first, their gists in the end
        late.append(tokens[len(late) : len(late) + size], gists=False)
    assert late.levels == 0
    for _ in late.complete():
        pass
    for token in tokens:
        single.append(int(token))
    with tempfile.TemporaryDirectory() as folder:
        path, done = Path(folder, "tree"), 0
        disk = make(path, **shape)
        for i, size in enumerate(sizes):
            disk.append(tokens[done : done + size])
            done += size
            if i == close_after:
                disk.close()
                disk = reopen(path, say=lambda sentence: pytest.fail(sentence))
        disk.verify()
        expected = rebuilt(tokens, bulk.spec)
        for tree in (bulk, single, late, disk):
            assert len(tree) == len(tokens)
            assert [tree.count(level) for level in range(max_levels + 2)] == [
                len(tokens) // block**level if level <= max_levels else 0 for level in range(max_levels + 2)
            ]
            assert_same(content(tree), expected)
        disk.close()


def test_views(tmp_path):
    for tree in (make(), make(tmp_path / "tree")):
        tree.append(stream(0, 40))
        before = tree.tokens(3, 6), tree.gists(2, 1, 4), tree.gists(1, 5, 5)
        held = [x.copy() for x in before]
        assert before[2].shape == (0, 4)
        assert tree.levels == 3
        for view in before:
            assert not view.flags.writeable
            assert not view.flags.owndata
        tree.append(stream(40, 4000))
        for view, copy in zip(before, held, strict=True):
            np.testing.assert_array_equal(view, copy)
        np.testing.assert_array_equal(tree.gists(1, 1990), tree.gists(1)[1990:])
        for level, start, stop in ((1, 0, 2001), (1, -1, 5), (1, 5, 4), (4, 0, 0), (0, 0, 1)):
            with pytest.raises(IndexError):
                tree.gists(level, start, stop)
        tree.close()


def test_calls_of_encode_and_their_shapes():
    calls = []

    @jax.jit
    def mean(blocks_NKD):
        return blocks_NKD.mean(axis=1)

    def encode(blocks_NKD):
        calls.append(blocks_NKD.shape)
        return mean(blocks_NKD)

    def embed_in_jax(ids_n):
        assert len(ids_n) & (len(ids_n) - 1) == 0
        return jnp.sin(jnp.asarray(ids_n)[:, None] * jnp.arange(1.0, 5.0))

    tree = make(encode=encode, embed=embed_in_jax, dtype=jnp.bfloat16)
    tree.append(stream(0, 1))
    assert calls == []
    tree.append(stream(1, 27))  # 13 + 6 + 3 nodes
    assert calls == [(16, 2, 4), (8, 2, 4), (4, 2, 4)]
    assert tree.gists(1).dtype == jnp.bfloat16
    for i in range(27, 300):
        tree.append(stream(i, i + 1))
    assert {shape[0] for shape in calls[3:]} == {1}
    assert len(calls) - 3 == (150 - 13) + (75 - 6) + (37 - 3)  # each node once


def test_appends_are_amortised_constant(tmp_path, monkeypatch):
    """Bytes read and written by an append do not depend on the history."""
    moved = []
    pwrite, pread = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda d, x, at: (moved.append(len(x)), pwrite(d, x, at))[1])
    monkeypatch.setattr(os, "pread", lambda d, n, at: (moved.append(n), pread(d, n, at))[1])
    tree = make(tmp_path / "tree", chunk=4096)
    costs = []
    for history in (1 << 10, 1 << 18):
        tree.append(stream(len(tree), history))
        moved.clear()
        for i in range(history, history + 64):
            tree.append(stream(i, i + 1))
        costs.append((len(moved), sum(moved)))
    assert costs[0] == costs[1]
    assert sum(moved) < 64 * 300
    tree.close()


def test_sync(tmp_path, synced):
    tree = make(tmp_path / "tree")
    tree.append(stream(0, 2))
    synced.clear()
    tree.append(stream(2, 4))
    assert synced == []
    tree.sync()
    assert synced == [f"LOD{level}.{end}" for level in range(3) for end in ("ctx", "sum")]
    synced.clear()
    tree.append(stream(4, 5), sync=True)
    assert synced == ["LOD0.ctx", "LOD0.sum"]
    tree.sync()
    assert len(synced) == 2
    tree.verify()
    tree.close()


def test_ram_capacity_doubles(monkeypatch):
    moves = []
    empty = np.empty
    monkeypatch.setattr(store_base.np, "empty", lambda *a: (moves.append(a[0][0]), empty(*a))[1])
    rows = store_base.RamRows(np.dtype("uint32"), ())
    for i in range(5000):
        rows.append([i])
    assert moves == [64, 128, 256, 512, 1024, 2048, 4096, 8192]
    np.testing.assert_array_equal(rows.read(0, 5000), np.arange(5000))


class Killed(BaseException):
    """From here on the process does nothing any more."""


def torn(descriptor: int, data, offset: int) -> bytes:
    """Half of a write. What lies within a page is written as a whole, so checksums and counts are never torn."""
    half = len(data) // 2
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".sum"):
        half -= half % 16
    return bytes(data)[:half] if offset >= 32 else b""


class Fuse:
    """Lets `left` changes of the file system happen, half does the next, and nothing after it."""

    CALLS = ("pwrite", "ftruncate", "rename", "replace", "unlink", "rmdir", "mkdir", "fsync")

    def __init__(self, monkeypatch, left: int):
        self.left, self.blown = left, False
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._guard(name, getattr(os, name)))

    def _guard(self, name: str, call):
        def guarded(*args, **named):
            self.left -= 1
            if self.left < 0:
                if name == "pwrite" and not self.blown:
                    call(args[0], torn(*args), args[2])
                self.blown = True
                raise Killed
            return call(*args, **named)

        return guarded


def killed_after(steps: int, work) -> bool:
    """Do `work`, killed after so many changes; whether it was (it ran out otherwise)."""
    with pytest.MonkeyPatch.context() as patch:
        fuse = Fuse(patch, steps)
        with contextlib.suppress(Killed):
            work()
        return fuse.blown


def abandon(tree) -> None:
    """What the kernel does with the files and the lock of a dead process."""
    tree.close()


@pytest.mark.parametrize("size", [1, 3, 40])
def test_killed_at_each_write_of_an_append(tmp_path, size):
    before, steps = 29, 0
    tokens = stream(0, before + size + 10)
    while True:
        path = tmp_path / str(steps)
        tree = make(path)
        tree.append(tokens[:before])
        killed = killed_after(steps, lambda tree=tree: tree.append(tokens[before : before + size]))
        abandon(tree)
        with reopen(path, verify=True) as tree:
            got = len(tree)
            assert before <= got <= before + size
            assert killed or got == before + size
            assert_same(content(tree), rebuilt(tokens[:got], tree.spec))
            tree.append(tokens[got:])
            tree.verify()
            assert_same(content(tree), rebuilt(tokens, tree.spec))
        if not killed:
            break
        steps += 1
    assert steps >= (1 + 3 * (size > 1)) * 3


@pytest.mark.parametrize("levels", [2, 4])
def test_killed_at_each_step_of_a_refresh(tmp_path, levels):
    """`levels`: the new tree has fewer levels than the old one, or more."""
    tokens, seen, steps = stream(0, 50), set(), 0
    original = tmp_path / "original"
    with make(original) as tree:
        tree.append(tokens)
    while True:
        path = tmp_path / str(steps)
        shutil.copytree(original, path)
        killed = killed_after(
            steps,
            lambda path=path: refresh_store(path, **functions("max"), max_levels=levels, say=quiet).close(),
        )
        disk_store.WriterLock._held.discard(path.resolve() / "lock")
        gistnet = "max"
        try:
            tree = reopen(path, "max", verify=True)
        except UserError as refused:
            assert "gists of the GistNet mean and this one is max" in str(refused)  # noqa: PT017
            gistnet, tree = "mean", reopen(path, verify=True)
        with tree:
            assert tree.spec.max_levels == (levels if gistnet == "max" else 3)
            assert_same(content(tree), rebuilt(tokens, tree.spec))
        files = {f"LOD{level}.{end}" for level in range(tree.spec.max_levels + 1) for end in ("ctx", "sum")}
        assert {p.name for p in path.iterdir()} == files | {"lock", "metadata.json"}
        seen.add(gistnet)
        if not killed:
            break
        steps += 1
    assert seen == {"mean", "max"}
    assert steps > 30


def test_killed_while_creating(tmp_path):
    steps = 0
    while killed_after(steps, lambda: make(tmp_path / "tree").close()):
        if (tmp_path / "tree").exists():
            disk_store.WriterLock._held.clear()
            reopen(tmp_path / "tree", verify=True).close()
            shutil.rmtree(tmp_path / "tree")
        for scratch in tmp_path.iterdir():  # cleared by the next process
            shutil.rmtree(scratch)
        steps += 1
    assert steps > 10


def test_refresh_keeps_the_tree_open(tmp_path):
    for tree in (make(), make(tmp_path / "tree")):
        tree.append(stream(0, 33))
        old = tree.gists(1)
        held = old.copy()

        def broken(blocks_NKD):
            raise RuntimeError("no memory")

        with pytest.raises(RuntimeError, match="no memory"):
            tree.refresh(gistnet="max", encode=broken, embed=embed)
        assert tree.spec.gistnet == "mean"
        tree.append(stream(33, 40))
        assert_same(content(tree), rebuilt(stream(0, 40), tree.spec))
        tree.refresh(**functions("max"))
        np.testing.assert_array_equal(old, held)
        tree.append(stream(40, 55))
        tree.verify()
        assert tree.spec.gistnet == "max"
        assert_same(content(tree), rebuilt(stream(0, 55), tree.spec))
        tree.close()
    with reopen(tmp_path / "tree", "max") as tree:
        assert len(tree) == 55


def test_another_gistnet_is_refused_by_name(tmp_path):
    path = tmp_path / "tree"
    make(path).close()
    with pytest.raises(UserError, match=r"GistNet mean and this one is max.*refresh_store"):
        reopen(path, "max")
    for name, value in {"block": 4, "width": 8, "dtype": "float16"}.items():
        with pytest.raises(UserError, match=rf"has {name} \w+ and {value} is asked for.*refresh_store"):
            reopen(path, **{name: value})
        with refresh_store(path, **functions("mean"), **{name: value}) as tree:
            assert getattr(tree.spec, name) == value
        reopen(path, **{name: value}).close()


@pytest.mark.parametrize("fails", [0, 1, 4, 7])
def test_full_disk(tmp_path, monkeypatch, fails):
    path, room = tmp_path / "tree", [10**9]
    tree = make(path)
    tree.append(stream(0, 45))
    before, size = content(tree), {p.name: p.stat().st_size for p in path.iterdir()}
    pwrite = os.pwrite

    def limited(descriptor, data, offset):
        if offset + len(data) > os.fstat(descriptor).st_size:  # only what grows needs room
            if room[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            room[0] -= 1
            if room[0] == 0:
                return pwrite(descriptor, bytes(data)[:3], offset)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", limited)
    room[0] = fails
    with pytest.raises(UserError, match=r"LOD\d.ctx cannot be written \(No space left on device\).*intact"):
        tree.append(stream(45, 200))
    assert_same(content(tree), before)
    assert {p.name: p.stat().st_size for p in path.iterdir()} == size
    tree.verify()
    room[0] = 10**9
    tree.append(stream(45, 200))
    tree.verify()
    tree.close()
    with reopen(path, verify=True) as tree:
        assert_same(content(tree), rebuilt(stream(0, 200), tree.spec))


def test_a_failing_encode_leaves_the_tree_as_it_was(tmp_path):
    def encode(blocks_NKD):
        if fail:
            raise KeyboardInterrupt
        return blocks_NKD.mean(axis=1)

    for tree in (make(encode=encode), make(tmp_path / "tree", encode=encode)):
        fail = False
        tree.append(stream(0, 13))
        fail = True
        with pytest.raises(KeyboardInterrupt):
            tree.append(stream(13, 40))
        assert len(tree) == 13
        fail = False
        tree.append(stream(13, 40))
        tree.verify()
        assert_same(content(tree), rebuilt(stream(0, 40), tree.spec))
        tree.close()


@pytest.fixture
def saved(tmp_path):
    """A closed tree of 45 tokens, of which 41 are synced."""
    path = tmp_path / "tree"
    with make(path, model_name="d4") as tree:
        tree.append(stream(0, 41), sync=True)
        tree.append(stream(41, 45))
    return path


def level_files(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.name != "lock")


def test_any_flipped_byte_is_found(saved):
    with reopen(saved) as tree:
        for path in level_files(saved):
            for at in range(path.stat().st_size):
                with open(path, "r+b") as file:
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ 1 << at % 8]))
                    file.flush()
                    with pytest.raises(UserError, match=rf"{path.stem}.*damaged"):
                        tree.verify()
                    file.seek(at)
                    file.write(bytes([byte]))
        tree.verify()


def test_a_flipped_byte_in_a_closed_tree(saved, tmp_path):
    """Refused when opened, or without effect (the count in the header follows from the file)."""
    rng = random.Random(0)
    for path in level_files(saved):
        for at in rng.sample(range(path.stat().st_size), 32):
            copy = tmp_path / "copy"
            shutil.copytree(saved, copy)
            data = bytearray((copy / path.name).read_bytes())
            data[at] ^= 1 << at % 8
            (copy / path.name).write_bytes(data)
            try:
                with reopen(copy, verify=True) as tree:
                    assert_same(content(tree), rebuilt(stream(0, 45), tree.spec))
            except UserError as refused:
                assert path.stem in str(refused)  # noqa: PT017
            shutil.rmtree(copy)


def test_damage_names_file_and_entries(saved):
    path = saved / "LOD1.ctx"
    with open(path, "r+b") as file:
        file.seek(64 + 16 * 9)
        file.write(b"\xff")
    reopen(saved).close()  # not in the last chunk
    sentence = r"LOD1.ctx is damaged in the entries 8 to 15 \(or LOD1.sum is\); rebuild .* refresh_store"
    with pytest.raises(UserError, match=sentence):
        reopen(saved, verify=True)
    refresh_store(saved, **functions("mean")).close()
    with reopen(saved, verify=True) as tree:
        assert_same(content(tree), rebuilt(stream(0, 45), tree.spec))


@pytest.mark.parametrize(("entry", "kept"), [(44, 41), (40, 40), (13, 8)])
def test_repair_keeps_what_comes_before(saved, entry, kept):
    """At least what was synced, after a power cut: in the last chunk (40 to 44), 41 were."""
    with open(saved / "LOD0.ctx", "r+b") as file:
        file.seek(64 + 4 * entry)
        file.write(b"\xff")
    if entry >= 40:
        with pytest.raises(UserError, match=r"entries 40 to 44.*repair=True"):
            reopen(saved)
    with pytest.raises(UserError, match="damaged in the entries"):
        refresh_store(saved, **functions("mean"))
    said = []
    with reopen(saved, repair=True, say=said.append) as tree:
        tree.verify()
        assert_same(content(tree), rebuilt(stream(0, kept), tree.spec))
    assert f"Repaired: {kept} entries are kept" in said[0]
    reopen(saved, verify=True, say=pytest.fail).close()


@pytest.mark.parametrize("name", ["LOD0", "LOD1", "LOD2", "LOD3"])
@pytest.mark.parametrize("end", ["ctx", "sum"])
def test_a_file_cut_anywhere(saved, tmp_path, name, end):
    """The length decides: what whole entries are left is a tree; gists come back, tokens do not."""
    whole = (saved / f"{name}.{end}").read_bytes()
    row = 4 if name == "LOD0" else 16
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        copy = tmp_path / "copy"
        shutil.copytree(saved, copy)
        (copy / f"{name}.{end}").write_bytes(whole[:size])
        if size < (64 if end == "ctx" else 32):
            with pytest.raises(UserError, match=rf"{name}.{end} is (cut off in its header|damaged)"):
                reopen(copy)
        else:
            with reopen(copy, verify=True) as tree:
                left = 45
                if name == "LOD0":
                    left = (size - 64) // row if end == "ctx" else (size - 32) // 16 * 8
                assert_same(content(tree), rebuilt(stream(0, left), tree.spec))
        shutil.rmtree(copy)


def test_what_opening_says(saved):
    with open(saved / "LOD0.ctx", "ab") as file:
        file.write(b"12345")
    os.truncate(saved / "LOD2.ctx", 64 + 16 * 3 + 1)
    said = []
    reopen(saved, say=said.append).close()
    assert said == [
        f"{saved}/LOD0.ctx ended in an unfinished append: 5 bytes are cut.",
        f"{saved}/LOD2.ctx ends before its last 8 entries (a power cut?): they are gone.",
    ]
    reopen(saved, verify=True, say=pytest.fail).close()


def header(version: int = 1, magic: int = disk_rows.MAGIC) -> bytes:
    return disk_rows._HEADER.pack(magic, version, 1, 2, 4, 3, 22, b"d4", b"")


def test_refusals_of_open(saved, tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder with a tree"):
        reopen(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is no tree \(it has no metadata.json\)"):
        reopen(tmp_path)
    path = saved / "LOD1.ctx"
    intact = path.read_bytes()
    assert intact[:64] == header()
    for start, sentence in (
        (header(magic=0x4D434355), "LOD1.ctx is no level of a tree .*0x4d434355"),
        (header(version=2), "LOD1.ctx has version 2 .* reads up to 1; update megacontext-jax"),
    ):
        path.write_bytes(start + intact[64:])
        with pytest.raises(UserError, match=sentence):
            reopen(saved)
    path.write_bytes((saved / "LOD2.ctx").read_bytes())
    with pytest.raises(UserError, match=r"has a header that does not fit metadata.json"):
        reopen(saved)
    path.unlink()
    with pytest.raises(UserError, match=r"LOD1.ctx is missing; rebuild the gists .* refresh_store"):
        reopen(saved)
    refresh_store(saved, **functions("mean")).close()
    (saved / "LOD0.sum").unlink()
    with pytest.raises(UserError, match=r"LOD0.sum is missing; restore"):
        reopen(saved)
    metadata = json.loads((saved / "metadata.json").read_bytes())
    metadata.pop("self")
    (saved / "metadata.json").write_bytes(disk_store._sealed(metadata | {"version": 2, "more": 1}))
    with pytest.raises(UserError, match=r"metadata.json has version 2"):
        reopen(saved)
    for text in (b"", b"[]", b"{}", b"\xff"):
        (saved / "metadata.json").write_bytes(text)
        with pytest.raises(UserError, match=r"metadata.json is damaged"):
            reopen(saved)


def test_refusals_of_create(saved, tmp_path):
    with pytest.raises(UserError, match="holds a tree already"):
        make(saved)
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    for path in (other, other / "letter.txt"):
        with pytest.raises(UserError, match="exists and is no tree"):
            make(path)
    assert (other / "letter.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty").close()
    for bad, sentence in (
        ({"block": 1}, "block 1"),
        ({"width": 1 << 16}, "width 65536"),
        ({"max_levels": -1}, "max_levels -1"),
        ({"dtype": "float64"}, "cannot be stored as 'float64'"),
        ({"dtype": "gist"}, "cannot be stored as 'gist'"),
        ({"model_name": "ü" * 17}, "longer than 32 bytes"),
    ):
        with pytest.raises(UserError, match=sentence):
            make(**bad)
    with pytest.raises(UserError, match="no store of kind 'tape'"):
        create_store("tape", **SMALL, **functions("mean"))
    with pytest.raises(UserError, match="needs a folder"):
        create_store("disk", **SMALL, **functions("mean"))
    with pytest.raises(UserError, match="has no folder"):
        create_store("ram", tmp_path / "x", **SMALL, **functions("mean"))


def test_refused_tokens(tmp_path):
    for tree in (make(), make(tmp_path / "tree")):
        for bad, sentence in (
            ([5, -3], "Token 1 of this append is -3.*0 to 4294967295"),
            ([1 << 32], "is 4294967296"),
            ([1 << 70], "no token id"),
            ([0.5], "is 0.5"),
            ([True], "is True"),
            ([[1, 2]], "one history"),
        ):
            with pytest.raises(UserError, match=sentence):
                tree.append(bad)
        assert len(tree) == 0
        tree.append([])
        tree.append([0, (1 << 32) - 1])
        assert tree.tokens().tolist() == [0, (1 << 32) - 1]
        tree.close()
    with pytest.raises(UserError, match="is closed; open it again"):
        tree.append([1])


def run(*args) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(HERE.parent.parent)}
    command = [sys.executable, str(HERE / "store_kill.py"), *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "tree"
    with run(path, "append", 0) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match=rf"is open in another process \({process.pid}\)"):
            reopen(path)
        process.kill()
    with (
        reopen(path),
        pytest.raises(UserError, match="already open in this process"),
    ):
        reopen(path)
    reopen(path).close()


def kill_at(process: subprocess.Popen, after: float) -> list[str]:
    """Kill it `after` seconds from when it is ready; what it had acknowledged."""
    with process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        return process.stdout.read().split("\n")[:-1]


def storm(path: Path, kills: int) -> None:
    rng, interrupted = random.Random(kills), 0
    for kill in range(kills):
        acknowledged = kill_at(run(path, "append", kill), rng.uniform(0.0, 0.3))
        said = []
        with reopen(path, verify=True, say=said.append) as tree:
            length = int(acknowledged[-1]) if acknowledged else 0
            assert len(tree) >= length, (kill, said)
            interrupted += len(said) > 0 or len(tree) > length
            fresh = make(**SHAPE)
            fresh.append(stream(0, len(tree)))
            assert_same(content(tree), content(fresh))
    print(f"{kills} kills, {interrupted} within an append, {len(tree):,} tokens in the end")
    assert interrupted > 0, "no kill hit an append: the storm shows nothing"


def refresh_storm(path: Path, kills: int) -> None:
    rng, tokens, seen = random.Random(kills), stream(0, 20_000), set()
    make(path, **SHAPE).close()
    with reopen(path) as tree:
        tree.append(tokens)
    for kill in range(kills):
        kill_at(run(path, "refresh", kill), rng.uniform(0.0, 0.2))
        gistnet = "mean"
        try:
            tree = reopen(path, verify=True)
        except UserError:
            gistnet = "max"
            tree = reopen(path, "max", verify=True)
        with tree:
            fresh = make(gistnet=gistnet, **SHAPE)
            fresh.append(tokens)
            assert_same(content(tree), content(fresh))
        seen.add(gistnet)
    assert kills < 10 or seen == {"mean", "max"}


def test_small_kill_storm(tmp_path):
    storm(tmp_path / "tree", 6)
    refresh_storm(tmp_path / "refreshed", 2)


@pytest.mark.slow
def test_kill_storm(tmp_path):
    storm(tmp_path / "tree", 50)
    refresh_storm(tmp_path / "refreshed", 20)
