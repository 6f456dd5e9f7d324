"""Writes the built-in corpus to disk: parquet shards, conversations, and a manifest that is written last."""

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megacontext_jax.data.corpus import mixture
from megacontext_jax.data.corpus.world import stream
from megacontext_jax.errors import UserError

GENERATOR_VERSION = 5
MANIFEST = "manifest.json"
_ROW_GROUP = 1024
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
    is part of the text). A finished folder is returned at once, an unfinished one is completed file by file,
    and another set of arguments gets another folder. Raises UserError for impossible arguments and for a
    disk that refuses the files.
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
    manifest = folder / MANIFEST
    if manifest.exists():
        return folder
    try:
        _write_all(folder, settings, echo or (lambda line: None))
    except OSError as error:
        raise UserError(
            f"Cannot write the built-in corpus to {folder}: {error.strerror or error}; free some space or"
            " choose another folder, then run the same command again."
        ) from None
    return folder


def _fingerprint(settings: dict[str, Any]) -> str:
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=6).hexdigest()
    return f"corpus-v{settings['generator']}-{digest}"


def _write_all(folder: Path, s: dict[str, Any], echo: Callable[[str], None]) -> None:
    seed, shards = s["seed"], s["shards"]
    chars = int(s["pretrain_mchars"] * 1e6 / shards)
    files: dict[str, dict] = {}

    def text_file(name: str, make: Callable[[], Iterable[tuple[str, str]]]) -> None:
        files[name] = _write(folder / name, _TEXT, make)
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
    )
    english = mixture.English("val", seed)
    text_file("python_val.parquet", lambda: (("english", english.next()) for _ in range(len(english))))
    for stage in mixture.CHATS:
        for split, count in (("train", s[f"{stage}_conversations"]), ("val", s["val_conversations"])):
            name = f"{stage}/{split}-00000.parquet"
            files[name] = _write(
                folder / name,
                _CHAT,
                lambda stage=stage, split=split, count=count: mixture.chats(
                    stream(split, seed, stage), split, stage, count
                ),
            )
            echo(f"{name}: {files[name]['rows']:,} conversations, {files[name]['characters']:,} characters")
    _replace(folder / MANIFEST, json.dumps({"settings": s, "files": files}, indent=1).encode())


def _write(path: Path, schema: pa.Schema, make: Callable[[], Iterable[tuple[str, Any]]]) -> dict:
    """Writes rows of (kind, value) as one parquet file in row groups; a file that is there already is kept.

    The counts of a file stand in its own metadata, so that a resumed build can put them into the manifest.
    """
    if path.exists():
        return json.loads(pq.read_metadata(path).metadata[b"corpus"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    kinds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    column = schema.names[0]
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for group in _groups(make()):
            for kind, value in group:
                kinds[kind] += 1
                sizes[kind] += len(value) if isinstance(value, str) else sum(len(m["content"]) for m in value)
            values = pa.array([value for _, value in group], type=schema.field(0).type)
            writer.write_table(pa.table({column: values}, schema=schema))
        facts = {"rows": kinds.total(), "characters": sizes.total(), "documents": dict(sorted(kinds.items()))}
        facts["characters_by_kind"] = dict(sorted(sizes.items()))
        writer.add_key_value_metadata({"corpus": json.dumps(facts)})
    with open(partial, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(partial, path)
    return facts


def _groups(rows: Iterable) -> Iterator[list]:
    group = []
    for row in rows:
        group.append(row)
        if len(group) == _ROW_GROUP:
            yield group
            group = []
    if group:
        yield group


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)
