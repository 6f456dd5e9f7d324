"""A tree on disk: a folder with `LOD0.ctx`, `LOD1.ctx`, ..., their checksums and `metadata.json`.

What survives: an append that returned is in the operating system's hands, so a `kill -9` of the process cannot
take it back; `sync()`, or `append(..., sync=True)`, also outlives a power cut. The tokens are the truth. Opening
cuts what an interrupted append left and encodes the blocks whose gist is missing; tokens of an append that had
not returned may be there or not, so go on from `len(tree)`.

A refresh builds a whole new tree in `refresh.tmp`, renames that to `refresh.done` (from this moment on the new
tree counts) and moves the files into place. Opening finishes such a move, or clears away what had not got so far.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import xxhash

from megacontext_jax.context.disk_rows import VERSION, DiskRows, level_paths
from megacontext_jax.context.store_base import (
    REBUILD_TOKENS,
    Embed,
    Encode,
    Rows,
    TreeSpec,
    TreeStore,
    copy_tokens,
)
from megacontext_jax.errors import UserError
from megacontext_jax.files import friendly_os_errors, remove_stale_scratch, scratch_path

METADATA = "metadata.json"
_LOCK, _BUILDING, _DONE = "lock", "refresh.tmp", "refresh.done"
_FORMAT = "megacontext-tree"


class DiskTree(TreeStore):
    """A tree in a folder; made by `create_folder`, `open_folder` and `refresh_folder`."""

    def __init__(self, folder: Path, spec: TreeSpec, rows: list[DiskRows], encode: Encode, embed: Embed):
        super().__init__(spec, rows, encode, embed)
        self.folder = folder
        self._lock: WriterLock | None = None

    def sync(self) -> None:
        for rows in self._rows:
            rows.sync()

    def verify(self) -> None:
        """Read everything; UserError names the damaged file and the entries.

        Covers every byte of the folder but the lock, whose content is only the process to name in an error.
        """
        path = self.folder / METADATA
        if path.read_bytes() != _metadata_text(self.spec):
            raise UserError(f"{path} is damaged; restore it from a copy.")
        for level, rows in enumerate(self._rows):
            rows.verify()
            if level and len(rows) != len(self._rows[level - 1]) // self.spec.block:
                raise UserError(f"{rows.path} lacks gists of complete blocks; open the tree again.")

    def refresh(self, *, gistnet: str, encode: Encode, embed: Embed) -> None:
        self._check_usable()
        spec = replace(self.spec, gistnet=gistnet)
        _build_refreshed(self.folder, self._rows[0], spec, encode, embed)
        lock, self._lock = self._lock, None
        self.close()
        self._lock = lock  # kept all the way: nobody else may write now
        finish_refresh(self.folder, print)
        self.__dict__.update(_load(self.folder, spec, encode, embed, print).__dict__ | {"_lock": lock})

    def close(self) -> None:
        self._unusable = "is closed"
        for rows in self._rows:
            rows.close()
        if self._lock is not None:
            self._lock.release()


class WriterLock:
    """One process per folder. The kernel drops the lock when the process dies, however it dies.

    A record lock, which does not tell two owners in one process apart; `_held` does.
    """

    _held: ClassVar[set[Path]] = set()

    def __init__(self, folder: Path):
        self._path = folder.resolve() / _LOCK
        if self._path in self._held:
            raise UserError(f"{folder} is already open in this process; close that tree first.")
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(self._descriptor, 20).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            if not isinstance(error, (BlockingIOError, PermissionError)):
                raise
            raise UserError(
                f"{folder} is open in another process ({owner}); close it there or use another folder."
            ) from None
        os.truncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())
        self._held.add(self._path)

    def release(self) -> None:
        if self._path in self._held:
            self._held.remove(self._path)
            os.close(self._descriptor)


def create_folder(folder: Path, spec: TreeSpec, encode: Encode, embed: Embed) -> DiskTree:
    """A new, empty tree. UserError if `folder` holds anything: nothing is ever overwritten."""
    if (folder / METADATA).exists():
        raise UserError(f"{folder} holds a tree already; open it, or choose another folder for a new one.")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no tree; choose another folder, this one is left alone.")
    scratch = scratch_path(folder)
    with friendly_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_scratch(folder.parent, folder.name)
        try:
            _write_empty(scratch, spec)
            os.rename(scratch, folder)  # an empty folder in the way is replaced, a full one is not
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        _sync_folder(folder.parent)
    return open_folder(folder, spec.gistnet, encode, embed)


def open_folder(
    folder: Path,
    gistnet: str,
    encode: Encode,
    embed: Embed,
    *,
    wanted: dict | None = None,
    verify: bool = False,
    repair: bool = False,
    gists: bool = True,
    say: Callable[[str], None] = print,
) -> DiskTree:
    """Open a tree, put right what a kill left, encode what is missing. `wanted` are fields it must have."""
    lock = _take(folder)
    try:
        with friendly_os_errors(folder):
            finish_refresh(folder, say)
            spec = read_metadata(folder)
            _check_same(folder, spec, {"gistnet": gistnet, **(wanted or {})})
            tree = _load(folder, spec, encode, embed, say, repair, gists)
        tree._lock = lock
        if verify:
            try:
                tree.verify()
            except UserError:
                tree.close()
                raise
        return tree
    except BaseException:
        lock.release()
        raise


def refresh_folder(
    folder: Path,
    gistnet: str,
    encode: Encode,
    embed: Embed,
    *,
    changes: dict | None = None,
    say: Callable[[str], None] = print,
) -> DiskTree:
    """Rebuild all gists from the tokens and open the result. `changes` are new values of the spec.

    Needs no gist level to be intact. Killed at any moment, the old tree is there or the new one.
    """
    lock = _take(folder)
    try:
        with friendly_os_errors(folder):
            finish_refresh(folder, say)
            old = read_metadata(folder)
            spec = replace(old, gistnet=gistnet, **(changes or {}))
            tokens = DiskRows(folder, 0, old, say)
            try:
                tokens.verify()
                _build_refreshed(folder, tokens, spec, encode, embed)
            finally:
                tokens.close()
            finish_refresh(folder, say)
            tree = _load(folder, spec, encode, embed, say)
        tree._lock = lock
        return tree
    except BaseException:
        lock.release()
        raise


def read_metadata(folder: Path) -> TreeSpec:
    """The spec of the tree in a folder; UserError if the file is damaged or of a newer version."""
    path = folder / METADATA
    raw = path.read_bytes()
    try:
        fields = json.loads(raw)
        fields.pop("self")
        intact = _sealed(fields) == raw and fields.pop("format") == _FORMAT
        version = fields.pop("version")
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged; restore it from a copy.")
    if version > VERSION:
        raise UserError(
            f"{path} has version {version} of the format and this program reads up to {VERSION}; update "
            "megacontext-jax."
        )
    return TreeSpec(**fields)


def finish_refresh(folder: Path, say: Callable[[str], None]) -> None:
    """Move a finished refresh into place, or clear away an unfinished one."""
    done, building = folder / _DONE, folder / _BUILDING
    if building.exists():
        say(f"A refresh of {folder} was interrupted and is dropped; the gists are those from before.")
        shutil.rmtree(building)
    if not done.exists():
        return
    for path in sorted(done.iterdir()):
        os.replace(path, folder / path.name)
    levels = range(read_metadata(folder).max_levels + 1)
    keep = {path for level in levels for path in level_paths(folder, level)}
    for path in set(folder.glob("LOD*.*")) - keep:  # the old tree may have had more levels
        path.unlink()
    _sync_folder(folder)
    os.rmdir(done)
    _sync_folder(folder)


def _take(folder: Path) -> WriterLock:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder with a tree; create one, or name another folder.")
    if not (folder / METADATA).exists():
        raise UserError(f"{folder} is no tree (it has no {METADATA}); create one, or name another folder.")
    with friendly_os_errors(folder):
        return WriterLock(folder)


def _check_same(folder: Path, spec: TreeSpec, wanted: dict) -> None:
    remedy = "or rebuild its gists with refresh_store"
    if spec.gistnet != wanted["gistnet"]:
        raise UserError(
            f"The tree in {folder} has gists of the GistNet {spec.gistnet} and this one is {wanted['gistnet']}; open "
            f"it with its own, {remedy}."
        )
    for name, value in wanted.items():
        if (own := getattr(spec, name)) != value:
            raise UserError(
                f"The tree in {folder} has {name} {own} and {value} is asked for; ask for {own}, {remedy}."
            )


def _load(
    folder: Path,
    spec: TreeSpec,
    encode: Encode,
    embed: Embed,
    say: Callable[[str], None],
    repair: bool = False,
    gists: bool = True,
) -> DiskTree:
    """The tree of a folder that is locked and has no refresh pending; missing gists are encoded if `gists`."""
    tree = DiskTree(folder, spec, [], encode, embed)
    try:
        for level in range(spec.max_levels + 1):
            rows = DiskRows(folder, level, spec, say, repair)
            tree._rows.append(rows)
            if level:  # gists over tokens that did not survive
                complete = len(tree._rows[level - 1]) // spec.block
                if len(rows) > complete:
                    rows.cut(complete)
        if gists:
            tree._fill(limit=max(1, REBUILD_TOKENS // spec.block))
    except BaseException:
        tree.close()
        raise
    return tree


def _build_refreshed(folder: Path, tokens: Rows, spec: TreeSpec, encode: Encode, embed: Embed) -> None:
    """The tree `spec` over the same tokens, in `folder / refresh.done`; if this raises nothing has changed."""
    building = folder / _BUILDING
    try:
        _write_empty(building, spec)
        with _load(building, spec, encode, embed, print) as tree:
            copy_tokens(tokens, tree)
            tree.sync()
        _sync_folder(building)
        os.rename(building, folder / _DONE)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(building)
        raise
    _sync_folder(folder)


def _write_empty(folder: Path, spec: TreeSpec) -> None:
    folder.mkdir()
    for level in range(spec.max_levels + 1):
        DiskRows.create(folder, level, spec)
    with open(folder / METADATA, "xb") as file:
        file.write(_metadata_text(spec))
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _metadata_text(spec: TreeSpec) -> bytes:
    """What metadata.json must hold, byte for byte."""
    return _sealed({"format": _FORMAT, "version": VERSION, **asdict(spec)})


def _sealed(fields: dict) -> bytes:
    """JSON of `fields` and, as `self`, their digest."""
    digest = xxhash.xxh3_128_hexdigest(json.dumps(fields).encode())
    return (json.dumps({**fields, "self": digest}, indent=1) + "\n").encode()


def _sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
