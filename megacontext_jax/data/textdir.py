"""A user's own folder of .parquet, .jsonl and .txt files as standard shards.

Sub-folders are read too, hidden files are not. A .txt file is one document; a .jsonl line is one
(`{"text": ...}`); a parquet file has them in its column `text`. Documents stay whole. Every twentieth is held
out for validation (the last one if there are fewer; the last tenth of the text if there is only one).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from megacontext_jax.data.rowgroups import ShardWriter, check_shard, check_shards
from megacontext_jax.errors import UserError
from megacontext_jax.files import friendly_os_errors, remove_stale_scratch, scratch_path, write_bytes
from megacontext_jax.telemetry.progress import Progress

KINDS = (".parquet", ".jsonl", ".txt")
HOLD_OUT_EVERY = 20
MANIFEST = "manifest.json"
_DOCS_PER_GROUP = 256  # small folders should still have several records to shuffle and share
_HELD_OUT_DOCS_PER_GROUP = 16  # few documents, and each process of a run takes whole row groups
_LARGEST_GROUP = 8192  # a parquet file with larger row groups is written anew
_LARGEST_TXT = 1 << 30
_VERSION = 1


def prepare_text_dir(data_dir: str | Path, out_dir: str | Path) -> Path:
    """Returns a folder of standard shards (last file = validation) with the text of `data_dir`.

    That is `data_dir` itself if it holds nothing but two or more parquet shards of the right form, otherwise
    `out_dir/<fingerprint>`, written once and found again as long as names, sizes and times of the files stay
    the same. `data_dir` itself is never written to, and its relative and absolute spelling are the same.
    Raises UserError naming the file (and line) that cannot be used.
    """
    data_dir, out_dir = _absolute(data_dir), _absolute(out_dir)
    files = _find(data_dir, out_dir)
    if _usable_in_place(files, data_dir):
        return data_dir
    fingerprint = _fingerprint(files, data_dir)
    target = _folder(out_dir, fingerprint)
    if target.exists():
        _check_prepared(target, fingerprint)
        return target
    remove_stale_scratch(out_dir)
    scratch = scratch_path(target)
    try:
        with friendly_os_errors(target):
            scratch.mkdir(parents=True)
            summary = _write(_documents(files), scratch, data_dir)
            manifest = {"fingerprint": fingerprint, "files": len(files), **summary}
            write_bytes(scratch / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
            try:
                os.rename(scratch, target)
            except OSError:
                if not target.exists():  # else another process was first, with the same content
                    raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def own_folder(data_dir: str | Path, out_dir: str | Path) -> Path:
    """Where to keep what is made from `data_dir`, such as a tokenizer: `out_dir/<fingerprint>`, which is also
    the folder of its prepared shards, if it needs any. It may not exist yet."""
    data_dir, out_dir = _absolute(data_dir), _absolute(out_dir)
    return _folder(out_dir, _fingerprint(_find(data_dir, out_dir), data_dir))


def _absolute(folder: str | Path) -> Path:
    return Path(folder).expanduser().resolve()


def _folder(out_dir: Path, fingerprint: str) -> Path:
    return out_dir / fingerprint[:16]


def _find(data_dir: Path, out_dir: Path) -> list[Path]:
    if not data_dir.is_dir():
        raise UserError(f"The data folder {data_dir} does not exist; check --data-dir.")

    def wanted(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(data_dir).parts)
        own = out_dir in path.parents
        return path.suffix.lower() in KINDS and not hidden and not own and path.is_file()

    files = sorted(path for path in data_dir.rglob("*") if wanted(path))
    if not files:
        raise UserError(f"The data folder {data_dir} holds no .parquet, .jsonl or .txt file; add some text.")
    return files


def _usable_in_place(files: list[Path], data_dir: Path) -> bool:
    if len(files) < 2 or any(path.suffix != ".parquet" or path.parent != data_dir for path in files):
        return False
    return all(info.largest_group <= _LARGEST_GROUP for info in check_shards(files))


def _fingerprint(files: list[Path], data_dir: Path) -> str:
    stats = [(str(path.relative_to(data_dir)), path.stat()) for path in files]
    content = [_VERSION, HOLD_OUT_EVERY, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check_prepared(folder: Path, fingerprint: str) -> None:
    """A finished folder must still be what its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.parquet")}
        named = manifest["shards"]
        odd = sorted(name for name in named.keys() | sizes.keys() if named.get(name) != sizes.get(name))
        if manifest["fingerprint"] != fingerprint:
            odd = [MANIFEST]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        odd = [MANIFEST]
    if odd:
        raise UserError(
            f"The prepared data in {folder} is damaged ({odd[0]} is missing or not what was written); delete "
            "that folder and run again."
        )


def _write(documents: Iterable[str], folder: Path, data_dir: Path) -> dict:
    """Writes training shards and, as the last one, the held-out documents; returns what they are."""
    train = ShardWriter(folder, docs_per_group=_DOCS_PER_GROUP)
    val = ShardWriter(folder, docs_per_group=_HELD_OUT_DOCS_PER_GROUP, docs_per_shard=None, prefix="val_")
    with train, val:
        for is_val, text in _hold_out(documents):
            (val if is_val else train).add(text)
    if not (train.docs and val.docs):
        raise UserError(f"The data folder {data_dir} holds too little text to train on; add some.")
    last = folder / f"shard_{len(train.paths):05d}.parquet"
    val.paths[0].rename(last)
    return {
        "shards": {path.name: path.stat().st_size for path in [*train.paths, last]},
        "train": {"documents": train.docs, "characters": train.chars},
        "val": {"documents": val.docs, "characters": val.chars},
    }


def _hold_out(documents: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """(is held out, text) for each document; see the module's rule."""
    count, waiting = 0, None
    for text in documents:
        if waiting is not None:
            yield count % HOLD_OUT_EVERY == 0, waiting
        count, waiting = count + 1, text
    if count == 1:
        cut = _paragraph_near(waiting, len(waiting) * 9 // 10)
        yield from (
            (is_val, part) for is_val, part in ((False, waiting[:cut]), (True, waiting[cut:])) if part
        )
    elif count:
        yield count % HOLD_OUT_EVERY == 0 or count < HOLD_OUT_EVERY, waiting


def _paragraph_near(text: str, position: int) -> int:
    """The end of a paragraph, else a line, else a word, in the tenth of the text before `position`."""
    for separator in ("\n\n", "\n", " "):
        found = text.rfind(separator, position - len(text) // 10, position)
        if found >= 0:
            return found + len(separator)
    return position


def _documents(files: list[Path]) -> Iterator[str]:
    """Every document that is not blank, file by file, behind a progress bar."""
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_txt}
    with Progress("preparing text", sum(path.stat().st_size for path in files), unit="B") as progress:
        for path in files:
            documents = readers[path.suffix.lower()](path)
            while True:
                try:  # around the reading alone: what the consumer raises is not about this file
                    text, size = next(documents)
                except StopIteration:
                    break
                except OSError as error:
                    reason = error.strerror or str(error).splitlines()[0]
                    raise UserError(f"Cannot read {path} ({reason}); mend or remove it.") from error
                progress.update(size)
                if text and not text.isspace():
                    yield text


# Readers yield (document, about how many bytes of the file it took).


def _read_parquet(path: Path) -> Iterator[tuple[str | None, float]]:
    share = path.stat().st_size / check_shard(path).rows
    with pq.ParquetFile(path) as file:
        try:
            for batch in file.iter_batches(batch_size=1024, columns=["text"], use_threads=False):
                yield from ((text, share) for text in batch.column(0).to_pylist())
        except ValueError as error:  # includes Arrow's own
            raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); fetch it again.") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, float]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                raise UserError(f"{path}, line {number}, is not JSON in UTF-8 ({error}); mend it.") from error
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UserError(f'{path}, line {number}, is not an object {{"text": "..."}}; mend it.')
            yield text, len(line)


def _read_txt(path: Path) -> Iterator[tuple[str, float]]:
    if path.stat().st_size > _LARGEST_TXT:
        raise UserError(f"{path} is larger than 1 GiB; a .txt file is one document: split it, or use .jsonl.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}, is not UTF-8 text; convert or remove the file.") from error
    yield text, len(data)
