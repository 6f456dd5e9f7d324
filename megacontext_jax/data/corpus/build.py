"""Writes the built-in corpus to disk: parquet shards, conversations, and a manifest that is written last."""

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megacontext_jax.data.corpus import mixture
from megacontext_jax.data.corpus.world import stream
from megacontext_jax.errors import UserError
from megacontext_jax.files import atomic_path, remove_stale_scratch, write_bytes

GENERATOR_VERSION = 7
MANIFEST = "manifest.json"
_ROW_GROUP = 1024
_HELD_OUT_ROW_GROUP = 32  # small sets, and each process of a run takes whole row groups
_TEXT = pa.schema([("text", pa.string())])
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_CHAT = pa.schema([("messages", pa.list_(_MESSAGE))])


def build(
    out_dir: str | os.PathLike,
    *,
    seed: int = 0,
    pretrain_mchars: float = 20.0,
    mid_conversations: int = 44_000,
    sft_conversations: int = 16_000,
    val_mchars: float = 0.25,
    val_conversations: int = 400,
    shards: int = 8,
    max_doc_tokens: int = 20_000,
    echo: Callable[[str], None] | None = None,
) -> Path:
    """Generates the corpus and returns its folder, `out_dir/<fingerprint>`.

    Layout: `pretrain/shard_XXXXX.parquet` (column `text`; in curriculum order; the last shard is the
    validation set of the same mix), `python_val.parquet` (held-out real English), `mid/` and `sft/` with
    `train-00000.parquet` and `val-00000.parquet` (column `messages`), `manifest.json`.

    The folder's name comes from the arguments, the generator's version and the Python version (whose English
    is part of the text). A finished folder is returned once every file of its manifest is found with its size;
    an unfinished one is completed file by file, by several processes at once if need be, for each writes the
    same bytes; another set of arguments gets another folder. Raises UserError for impossible arguments, for a
    disk that refuses the files, and naming the file for one that is missing or changed.
    """
    settings = {
        "generator": GENERATOR_VERSION,
        "python": platform.python_version(),
        "seed": seed,
        "pretrain_mchars": float(pretrain_mchars),
        "mid_conversations": mid_conversations,
        "sft_conversations": sft_conversations,
        "val_mchars": float(val_mchars),
        "val_conversations": val_conversations,
        "shards": shards,
        "max_doc_tokens": max_doc_tokens,
    }
    for name in ("pretrain_mchars", "val_mchars"):
        if not settings[name] > 0:
            raise UserError(f"The built-in corpus needs {name} above 0, got {settings[name]}.")
    for name in ("mid_conversations", "sft_conversations", "val_conversations", "shards"):
        if settings[name] < 1:
            raise UserError(f"The built-in corpus needs {name} of at least 1, got {settings[name]}.")
    if max_doc_tokens < 400:
        raise UserError(f"The built-in corpus needs max_doc_tokens of at least 400, got {max_doc_tokens}.")

    folder = Path(out_dir) / _fingerprint(settings)
    if _is_finished(folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_all(folder, settings, echo or (lambda line: None))
    except OSError as error:
        raise UserError(
            f"Cannot write the built-in corpus to {folder}: {error.strerror or error}; free some space or"
            " choose another folder, then run the same command again."
        ) from None
    return folder


def built_files(folder: Path, pattern: str) -> list[Path]:
    """The files of a finished corpus that match `pattern`, such as "mid/train-*", by its manifest, not by what
    else may lie there."""
    return [folder / name for name in sorted(_manifest(folder)["files"]) if fnmatchcase(name, pattern)]


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if not all(isinstance(facts, dict) for facts in content["files"].values()):
            raise ValueError("its list of files is none")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it and run the same command to make it again."
        ) from error
    return content


def _is_finished(folder: Path) -> bool:
    """Raises UserError for a file that the manifest lists and that is missing or has another size."""
    path = folder / MANIFEST
    if not path.exists():
        return False
    files = _manifest(folder)["files"]
    for name, facts in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(
                f"{file} of the built-in corpus is missing; delete {path} and run the same command to make it again."
            )
        if file.stat().st_size != facts["bytes"]:
            raise UserError(
                f"{file} of the built-in corpus has {file.stat().st_size:,} bytes instead of {facts['bytes']:,}; "
                f"delete it and {path}, and run the same command to make both again."
            )
    return True


def _fingerprint(settings: dict[str, Any]) -> str:
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=6).hexdigest()
    return f"corpus-v{settings['generator']}-{digest}"


def _write_all(folder: Path, s: dict[str, Any], echo: Callable[[str], None]) -> None:
    seed, shards = s["seed"], s["shards"]
    chars = int(s["pretrain_mchars"] * 1e6 / shards)
    files: dict[str, dict] = {}

    def text_file(name: str, make: Callable[[], Iterable[tuple[str, str]]], group: int) -> None:
        files[name] = _write(folder / name, _TEXT, make, group)
        echo(f"{name}: {files[name]['rows']:,} documents, {files[name]['characters']:,} characters")

    for i in range(shards):
        # English goes on roughly where the shard before it stopped, so that no passage is favoured.
        offset = int(i * chars * 0.18 / 450)
        text_file(
            f"pretrain/shard_{i:05d}.parquet",
            lambda i=i, offset=offset: mixture.documents(
                stream("train", seed, "pretrain", i),
                "train",
                i / shards,
                (i + 1) / shards,
                chars,
                mixture.English("train", seed, offset),
                s["max_doc_tokens"],
            ),
            _ROW_GROUP,
        )
    text_file(
        f"pretrain/shard_{shards:05d}.parquet",
        lambda: mixture.documents(
            stream("val", seed, "pretrain"),
            "val",
            0.0,
            1.0,
            int(s["val_mchars"] * 1e6),
            mixture.English("val", seed),
            min(s["max_doc_tokens"], 4000),
        ),
        _HELD_OUT_ROW_GROUP,
    )
    english = mixture.English("val", seed)
    text_file(
        "python_val.parquet",
        lambda: (("english", english.next()) for _ in range(len(english))),
        _HELD_OUT_ROW_GROUP,
    )
    for stage in mixture.CHATS:
        for split, count in (("train", s[f"{stage}_conversations"]), ("val", s["val_conversations"])):
            name = f"{stage}/{split}-00000.parquet"
            files[name] = _write(
                folder / name,
                _CHAT,
                lambda stage=stage, split=split, count=count: mixture.chats(
                    stream(split, seed, stage), split, stage, count
                ),
                _ROW_GROUP,
            )
            echo(f"{name}: {files[name]['rows']:,} conversations, {files[name]['characters']:,} characters")
    write_bytes(folder / MANIFEST, json.dumps({"settings": s, "files": files}, indent=1).encode())


def _write(path: Path, schema: pa.Schema, make: Callable[[], Iterable[tuple[str, Any]]], rows: int) -> dict:
    """Writes rows of (kind, value) as one parquet file in row groups of `rows`; a file that is there already is kept.

    The counts of a file stand in its own metadata, so that a resumed build can put them into the manifest.
    """
    if path.exists():
        return _facts(path)
    remove_stale_scratch(path.parent, path.name)
    kinds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    column = schema.names[0]
    with atomic_path(path) as scratch, pq.ParquetWriter(scratch, schema, compression="zstd") as writer:
        for group in _groups(make(), rows):
            for kind, value in group:
                kinds[kind] += 1
                sizes[kind] += len(value) if isinstance(value, str) else sum(len(m["content"]) for m in value)
            values = pa.array([value for _, value in group], type=schema.field(0).type)
            writer.write_table(pa.table({column: values}, schema=schema))
        facts = {"rows": kinds.total(), "characters": sizes.total(), "documents": dict(sorted(kinds.items()))}
        facts["characters_by_kind"] = dict(sorted(sizes.items()))
        writer.add_key_value_metadata({"corpus": json.dumps(facts)})
    return _facts(path)


def _facts(path: Path) -> dict[str, Any]:
    """What the manifest says of a file. Raises UserError if it is not one that was written here."""
    try:
        return {**json.loads(pq.read_metadata(path).metadata[b"corpus"]), "bytes": path.stat().st_size}
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} of the built-in corpus is damaged; delete it and run the same command to make it again."
        ) from error


def _groups(items: Iterable, rows: int) -> Iterator[list]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == rows:
            yield group
            group = []
    if group:
        yield group
