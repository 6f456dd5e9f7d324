"""The interpreted kernels, in a process of their own: their threads may keep those that XLA compiles with."""

import os
import subprocess
import sys

import pytest

from tests.test_recipe import ROOT


@pytest.mark.timeout(900)
def test_interpreted_kernels_are_the_reference():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/kernels/interpreted_kernels.py"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
