"""A run killed at any moment resumes from its last finished step with exactly what it had there."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from checkpoint_kill import KEEP, MOMENTS  # noqa: E402


class Server:
    """Starts runs in forked children of one process that has the libraries loaded."""

    def __init__(self, base: Path):
        env = os.environ | {
            "NANOCHAT_BASE_DIR": str(base),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "PYTHONPATH": str(HERE.parent.parent),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "checkpoint_kill.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def run(self, *args, kill_after: float | None = None) -> tuple[int, list[str]]:
        """Exit status and lines of one run, killed `kill_after` seconds after its second save has begun."""
        self.process.stdin.write(json.dumps([str(a) if isinstance(a, Path) else a for a in args]) + "\n")
        self.process.stdin.flush()
        lines: list[str] = []
        pid = int(self._until("pid ", lines).split()[1])
        if kill_after is not None:
            for _ in range(2):
                self._until("saving ", lines)
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        return int(self._until("exit ", lines).split()[1]), lines

    def _until(self, start: str, lines: list[str]) -> str:
        while line := self.process.stdout.readline():
            lines.append(line.strip())
            if line.startswith(start):
                return line
        raise AssertionError(lines)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("base"))
    yield started
    started.process.stdin.close()
    started.process.wait(timeout=60)


def resumed_at(lines: list[str]) -> int:
    return next(int(line.split()[1]) for line in lines if line.startswith("at "))


def test_kill_at_each_moment_of_a_save(server, tmp_path):
    folder = tmp_path / "megacontext_base_kill"
    finished, dropped = 0, False
    for moment in (*MOMENTS, None):
        at = max(finished, KEEP) + 1
        if moment is not None:
            status, lines = server.run(folder, at, moment, at)
            assert status == -signal.SIGKILL, (moment, lines)
        else:
            status, lines = server.run(folder, 0)
            assert status == 0, lines
        assert resumed_at(lines) == finished, (moment, lines)
        said = any("was interrupted and is dropped" in line for line in lines)
        assert said == dropped, (moment, lines)
        if moment is not None:
            visible = moment in MOMENTS[4:]
            finished, dropped = at - (not visible), not visible
            extra = moment == "after the rename"  # the oldest goes with the next save
            kept = range(finished - KEEP + 1 - extra, finished + 1)
            assert sorted(p.name for p in folder.glob("0*")) == [f"{step:06d}" for step in kept], moment
    assert not list((folder / "unfinished").iterdir())


def storm(server, folder: Path, kills: int) -> None:
    """Kill at times that a seed chose; every start verifies what the one before has left."""
    rng = random.Random(kills)
    before, interrupted = 0, 0
    for kill in range(kills):
        status, lines = server.run(folder, 10**6, kill_after=rng.uniform(0.0, 0.3))
        assert status == -signal.SIGKILL, (kill, lines)
        step = resumed_at(lines)
        assert step > before or kill == 0, (kill, lines)
        before = step
        interrupted += any("was interrupted and is dropped" in line for line in lines)
    status, lines = server.run(folder, 0)
    assert status == 0, lines
    assert resumed_at(lines) > before
    assert interrupted > 0, "no kill hit a save: the storm shows nothing"


def test_small_kill_storm(server, tmp_path):
    storm(server, tmp_path / "megacontext_base_storm", 5)


@pytest.mark.slow
def test_kill_storm(server, tmp_path):
    storm(server, tmp_path / "megacontext_base_storm", 50)
