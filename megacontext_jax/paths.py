"""Where things live on disk.

Two roots. The *base directory* (`NANOCHAT_BASE_DIR`, default `~/.cache/nanochat`) is nanochat's: tokenizers,
shards, downloaded task data, the compile cache. The *artifacts directory* (`MEGACONTEXT_ARTIFACTS`, default
`./artifacts`) holds what a run makes: checkpoints `megacontext_<stage>_<tag>/<step>` and the report.
"""

import os
from pathlib import Path

from megacontext_jax.errors import UserError


def base_dir() -> Path:
    """The nanochat base directory; created if missing, the environment's value is never replaced."""
    return _ensure(Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat"), "NANOCHAT_BASE_DIR")


def artifacts_dir() -> Path:
    """The folder for checkpoints and the report; created if missing."""
    return _ensure(Path(os.environ.get("MEGACONTEXT_ARTIFACTS") or "artifacts"), "MEGACONTEXT_ARTIFACTS")


def report_dir() -> Path:
    return _ensure(artifacts_dir() / "report", "MEGACONTEXT_ARTIFACTS")


def _ensure(path: Path, variable: str) -> Path:
    path = path.expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot create the folder {path} ({error.strerror}); set {variable} to a writable place."
        ) from None
    return path
