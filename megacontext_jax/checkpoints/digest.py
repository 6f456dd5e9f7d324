"""Digests that make a checkpoint folder tamper-evident.

Orbax restores a data file with a flipped bit without complaint, so every file of a step folder is listed
with its size and its xxh3_128 in `digests.json`. That manifest protects itself: it carries a digest of its
own content and is only accepted when its bytes are exactly what we would write for that content, so a
flipped bit anywhere in it shows too. xxh3 finds accidents, not forgery.

No JAX here: the functions work on folders and run in any thread.
"""

import json
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

MANIFEST = "digests.json"
_CHUNK = 1 << 22


class Damage(Exception):
    """A file that is not what was saved. `path` is the file, `reason` completes the sentence "PATH ..."."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} {reason}")
        self.path = path
        self.reason = reason


def seal(folder: Path, about: dict) -> int:
    """Write the manifest of every file under `folder` and force all of it to the disk.

    `about` (JSON-able) is stored in the manifest and protected with it. Returns the bytes of the files.
    Errors of the file system pass through as `OSError`.
    """
    files = {}
    for name, path in sorted(_files(folder).items()):
        files[name] = list(_digest(path, sync=True))
    body = {"about": about, "files": files}
    path = folder / MANIFEST
    partial = folder / (MANIFEST + ".partial")
    with open(partial, "wb") as stream:
        stream.write(_text({**body, "self": _self_digest(body)}))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
    for directory in {path.parent for path in _files(folder).values()} | {folder}:
        sync_folder(directory)
    return sum(size for size, _ in files.values())


def read_manifest(folder: Path) -> dict:
    """The manifest `{"about": ..., "files": {name: [size, xxh3_128]}}`; raises `Damage`."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Damage(path, "is missing") from None
    try:
        manifest = json.loads(raw)
        digest = manifest.pop("self")
        intact = _text({**manifest, "self": digest}) == raw and _self_digest(manifest) == digest
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise Damage(path, "is damaged (its digest differs)")
    return manifest


def verify(folder: Path, manifest: dict, items: Collection[str] | None = None, threads: int = 4) -> None:
    """Compare `folder` with its manifest, file by file; raises `Damage` for the first that differs.

    With `items`, sub-folders that are not named there are left alone (they will not be read either).
    """

    def wanted(name: str) -> bool:
        return items is None or "/" not in name or name.split("/", 1)[0] in items

    listed = {name: entry for name, entry in manifest["files"].items() if wanted(name)}
    found = {name: path for name, path in _files(folder).items() if wanted(name) and name != MANIFEST}
    for name, (size, _) in sorted(listed.items()):
        if name not in found:
            raise Damage(folder / name, "is missing")
        actual = found[name].stat().st_size
        if actual != size:
            what = "is truncated" if actual < size else "has grown"
            raise Damage(found[name], f"{what} ({actual} bytes where {size} were saved)")
    for name in sorted(found):
        if name not in listed:
            raise Damage(found[name], "was not saved with this checkpoint")

    def check(name: str) -> bool:
        return list(_digest(found[name])) == listed[name]

    names = sorted(listed)
    with ThreadPoolExecutor(max(1, min(threads, os.cpu_count() or 1))) as pool:
        for name, same in zip(names, pool.map(check, names), strict=True):
            if not same:
                raise Damage(found[name], "is damaged (its digest differs)")


def sync_folder(folder: Path) -> None:
    """Force the entries of a folder to the disk, so that a rename outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> dict[str, Path]:
    """Relative name (with "/") -> path of everything under `folder` that is not a folder."""
    found = {}
    for root, folders, names in os.walk(folder):
        names += [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in names:
            path = Path(root, name)
            found[path.relative_to(folder).as_posix()] = path
    return found


def _digest(path: Path, sync: bool = False) -> tuple[int, str]:
    hasher = xxhash.xxh3_128()
    size = 0
    buffer = memoryview(bytearray(_CHUNK))
    try:
        with open(path, "rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                hasher.update(buffer[:count])
                size += count
            if sync:
                os.fsync(stream.fileno())
    except (FileNotFoundError, IsADirectoryError):
        raise Damage(path, "is missing") from None
    return size, hasher.hexdigest()


def _text(value: dict) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _self_digest(body: dict) -> str:
    return xxhash.xxh3_128_hexdigest(_text(body))
