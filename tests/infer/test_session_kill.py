"""A session on disk is killed while it reads and speaks, and goes on with all that it had acknowledged."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests.infer.session_kill import CHATS
from tests.infer.session_models import LONGEST
from tests.runs import ROOT


def run_and_kill(kind: str, folder, seed: int, delay: float) -> tuple[list[int], bool]:
    """(tokens acknowledged, whether it was done before the kill)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.infer.session_kill", kind, str(folder), str(seed)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    acknowledged: list[int] = []
    for line in process.stdout:
        word, *ids = line.split()
        acknowledged += map(int, ids) if line.endswith("\n") else []
        if word == "ready":
            threading.Thread(target=kill_after, args=(process, delay)).start()
    errors = process.stderr.read()
    process.wait()
    assert "Traceback" not in errors, errors[-2000:]
    return acknowledged, process.returncode == 0


def kill_after(process, delay: float) -> None:
    time.sleep(delay)
    process.kill()


def storm(kind: str, folder, kills: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    chat, killed, turn, told = CHATS[kind](), 0, 0, 0
    while killed < kills:
        talk = folder / f"talk{turn}"
        done = False
        while not done and killed < kills:
            acknowledged, done = run_and_kill(kind, talk, int(rng.integers(1 << 30)), rng.exponential(1.5))
            killed += not done
            told += len(acknowledged)
            with chat.open_session(talk, say=lambda text: None) as session:
                kept = session.tree.tokens().tolist()
                assert kept[: len(acknowledged)] == acknowledged
                session.read()
                assert session.memory.tokens == len(kept) <= LONGEST
        turn += 1
    assert told > 0


@pytest.mark.parametrize("kind", CHATS)
def test_a_kill_loses_nothing_acknowledged(kind, tmp_path):
    storm(kind, tmp_path, kills=1, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", CHATS)
def test_kill_storm(kind, tmp_path):
    """50 kills each: `bash run_tests.sh -m slow tests/infer/test_session_kill.py`."""
    storm(kind, tmp_path, kills=50, seed=0)
