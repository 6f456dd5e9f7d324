"""The interpreted kernels, in a process of their own.

The interpreter blocks a thread of XLA's pool for each warpgroup, and some it keeps: where none is left, the next
program is never compiled. So the process gets many threads, and shares them with no other test.
"""

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT


@pytest.mark.timeout(900)
def test_interpreted_kernels_are_the_reference():
    here = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "tests/kernels/interpreted_kernels.py"],
        cwd=ROOT,
        env=here | {"NPROC": "64"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "[100%]" in done.stdout
