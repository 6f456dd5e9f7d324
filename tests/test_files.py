"""Writing files: whole or not at all, one way for everyone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megacontext_jax.errors import UserError
from megacontext_jax.files import atomic_path, scratch_path, write_bytes
from megacontext_jax.telemetry.sinks import write_atomic


@pytest.mark.parametrize("write", [write_bytes, write_atomic])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(write, tmp_path, monkeypatch):
    path = tmp_path / "sub" / "file"
    write(path, b"old")

    def refused(old, new):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(UserError, match=r"Cannot write .*file \(Input/output error\)"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_two_processes_never_share_a_scratch_file(tmp_path):
    code = (
        "import sys; from pathlib import Path; from megacontext_jax.files import scratch_path;"
        "print(scratch_path(Path(sys.argv[1])))"
    )
    path = tmp_path / "file"
    other = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert Path(other.stdout.strip()).parent == tmp_path
    assert Path(other.stdout.strip()) != scratch_path(path)


def test_an_interrupted_block_changes_nothing(tmp_path):
    path = tmp_path / "file"

    def interrupted():
        with atomic_path(path) as scratch:
            scratch.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
