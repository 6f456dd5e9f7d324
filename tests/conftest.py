"""Shared by all tests: private folders, one compile cache, strict shapes."""

import os
import tempfile
from pathlib import Path

import pytest

from tests import quick

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"megacontext-jax-test-cache-{os.getuid()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ["WANDB_MODE"] = "disabled"

MOST_MAPS = 30_000  # of a process
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def private_folders(tmp_path, monkeypatch):
    """No test reads or writes a user's folders."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("MEGACONTEXT_ARTIFACTS", str(tmp_path / "artifacts"))


@pytest.fixture(autouse=True)
def few_programs():
    """Lets go of compiled programs long before their memory mappings reach the system's limit, 65,530 of a process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="module")
def quick_to_compile():
    """Processes that the tests of a module start compile in a hurry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", quick.FLAGS)
        yield


@pytest.fixture(scope="session")
def golden():
    return GOLDEN
