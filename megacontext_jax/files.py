"""Writing files so that a kill, a full disk or a second process never leaves half of one."""

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from megacontext_jax.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a scratch path beside `path`; after the block it is flushed to disk and renamed to `path`.

    If the block raises, the scratch file is removed and `path` is untouched. Raises UserError when the
    operating system refuses (disk full, no permission).
    """
    path = Path(path)
    scratch = scratch_path(path)
    try:
        with friendly_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield scratch
            with open(scratch, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`: a reader, or a kill, meets the old file or the new one, never a part.

    Raises UserError when it cannot be written; the old file is then untouched.
    """
    try:
        with atomic_path(path) as scratch:
            scratch.write_bytes(data)
    except OSError as error:
        raise UserError(
            f"Cannot write {path} ({error.strerror or error}); see that its folder can be written."
        ) from error


@contextmanager
def friendly_os_errors(path: Path) -> Iterator[None]:
    """Turns an operating-system refusal while writing `path` into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"The disk is full: cannot write {path} ({os.strerror(error.errno)}); free some space and run "
                "the same command again."
            ) from error
        if isinstance(error, PermissionError) or error.errno in (errno.EROFS, errno.ENOTDIR, errno.EDQUOT):
            raise UserError(
                f"Cannot write {path} ({os.strerror(error.errno)}); choose a writable folder."
            ) from error
        raise


def scratch_path(path: Path) -> Path:
    """The scratch name of this process for `path`: same folder, ends in `.tmp`, names host and process."""
    return path.with_name(f"{path.name}.{_host()}.{os.getpid()}.tmp")


def remove_stale_scratch(folder: Path, pattern: str = "*") -> None:
    """Removes scratch files and folders whose process on this host is gone (left by a kill -9)."""
    for path in folder.glob(f"{pattern}.{_host()}.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _host() -> str:
    return socket.gethostname().replace(".", "-")
