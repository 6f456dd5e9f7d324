"""Names of runs, the rules by which one is found, links, and the lock."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megacontext_jax.checkpoints.runs import (
    FolderLock,
    find_run,
    latest_step,
    link_into_base,
    run_folder,
    steps,
    unused_tag,
)
from megacontext_jax.errors import UserError


@pytest.fixture(autouse=True)
def roots(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("MEGACONTEXT_ARTIFACTS", str(tmp_path / "art"))
    return tmp_path


def make(root: Path, name: str, *saved: int, age: int = 0) -> Path:
    folder = root / f"megacontext_{name}"
    folder.mkdir(parents=True)
    for step in saved:
        path = folder / f"{step:06d}"
        path.mkdir()
        os.utime(path, (1e9 - age, 1e9 - age))
    return folder


def test_names(roots):
    assert run_folder("base", "d4") == roots / "art" / "megacontext_base_d4"
    for bad in ("", "a/b", "../x", "-x", "."):
        with pytest.raises(UserError, match="cannot name a folder"):
            run_folder("base", bad)
    with pytest.raises(UserError, match=r"no stage 'pre'.*base, mid, sft, rl"):
        run_folder("pre", "d4")


def test_steps_are_the_folders_named_so(roots):
    folder = make(roots / "art", "base_x", 20, 100, 1_000_000)
    for other in ("unfinished", "20", "00020", "0000020", "000300.aside-1", "tokenizer"):
        (folder / other).mkdir()
    assert steps(folder) == [20, 100, 1_000_000]
    assert latest_step(folder) == 1_000_000
    assert steps(folder / "nothing") == []
    assert latest_step(folder / "nothing") is None


def test_largest_depth_wins(roots):
    make(roots / "art", "base_d4", 10)
    d12 = make(roots / "art", "base_d12_wide", 10, age=50)
    make(roots / "art", "base_zz", 99999)
    make(roots / "art", "base_d20")  # nothing saved yet
    make(roots / "art", "mid_d26", 10)  # another stage
    assert find_run("base") == d12
    make(roots / "art", "base_d12_older", 10, age=90)
    assert find_run("base") == d12
    newer = make(roots / "art", "base_d12", 10)
    assert find_run("base") == newer


def test_without_depth_the_latest_saved_wins(roots):
    make(roots / "art", "sft_old", 500, age=100)
    new = make(roots / "art", "sft_new", 5, age=1)
    assert find_run("sft") == new


def test_artifacts_come_before_the_base_directory(roots):
    there = make(roots / "base", "base_d30", 10)
    assert find_run("base") == there
    here = make(roots / "art", "base_d2", 10)
    assert find_run("base") == here
    assert find_run("base", "d30") == there
    same = make(roots / "art", "base_d30", 10)
    assert find_run("base", "d30") == same


def test_not_found_lists_what_there_is(roots):
    with pytest.raises(UserError, match="there is no run at all"):
        find_run("base")
    make(roots / "art", "base_d4", 10, 20)
    make(roots / "base", "mid_d6")
    with pytest.raises(UserError, match=r"sft run.*base 'd4' \(step 20\), mid 'd6' \(no step yet\).*--tag"):
        find_run("sft")
    with pytest.raises(UserError, match="base run 'd5'"):
        find_run("base", "d5")
    with pytest.raises(UserError, match="mid run 'd6'"):  # a folder without a finished step
        find_run("mid", "d6")


def test_unused_tag(roots):
    assert unused_tag("base", "d4") == "d4"
    make(roots / "art", "base_d4")
    make(roots / "art", "base_d4-2", 1)
    assert unused_tag("base", "d4") == "d4-3"
    assert unused_tag("mid", "d4") == "d4"


def test_link_replaces_links_only(roots):
    said: list[str] = []
    first, second = make(roots / "art", "base_a", 1), make(roots / "other", "base_a", 2)
    link = roots / "base" / "megacontext_base_a"
    for folder in (first, first, second):
        link_into_base(folder, said.append)
        assert link.is_symlink()
        assert link.resolve() == folder
    assert said == []
    assert find_run("base", "a") == first
    link.unlink()
    real = make(roots / "base", "base_a", 3)
    link_into_base(first, said.append)
    assert not link.is_symlink()
    assert steps(real) == [3]
    assert "is a folder of its own and stays" in said[0]
    assert not [p for p in (roots / "base").iterdir() if p.name.startswith(".")]


def test_link_over_a_dangling_link(roots):
    folder = make(roots / "art", "base_a", 1)
    link = roots / "base" / "megacontext_base_a"
    link.parent.mkdir()
    link.symlink_to(roots / "gone")
    link_into_base(folder)
    assert link.resolve() == folder


HOLD = """
import sys, time
from pathlib import Path
from megacontext_jax.checkpoints.runs import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_lock_between_processes_and_after_a_kill(roots):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(roots)], stdout=subprocess.PIPE, text=True, env=env
    )
    assert holder.stdout.readline().strip() == "held"
    for _ in range(2):
        with pytest.raises(UserError, match=f"written to by another run .process {holder.pid} on "):
            FolderLock(roots)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    FolderLock(roots).release()


def test_lock_within_a_process(roots):
    lock = FolderLock(roots)
    with pytest.raises(UserError, match="already open for writing in this process"):
        FolderLock(roots / "x" / "..")
    lock.release()
    again = FolderLock(roots)
    again.release()
    again.release()


FORK = """
import os, sys, time
from pathlib import Path
from megacontext_jax.checkpoints.runs import FolderLock
lock = FolderLock(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
os.kill(os.getpid(), 9)
"""


def test_lock_does_not_live_on_in_a_forked_child(roots):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    owner = subprocess.Popen(
        [sys.executable, "-c", FORK, str(roots)], stdout=subprocess.PIPE, text=True, env=env
    )
    child = int(owner.stdout.readline())
    try:
        assert owner.wait() == -signal.SIGKILL
        os.kill(child, 0)  # lives
        FolderLock(roots).release()
    finally:
        os.kill(child, signal.SIGKILL)
