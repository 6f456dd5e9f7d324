"""Arrow, parquet, JSON lines and pre-tokenised data as training shards, with documents whole.

    files -> rows -> documents -> every k-th held out -> [spool, for --shuffle and --shards] -> shards -> OUT

All is written in a scratch folder beside OUT that gets its name when complete. Memory holds a row group, a batch of
rows and, when shuffling, the shuffle buffer; never the data set. `manifest.json` says what OUT was made from.
"""

import glob
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megacontext_jax.data.bridge_documents import ROWS, Check, Counts, read_documents
from megacontext_jax.data.bridge_files import find_files
from megacontext_jax.data.bridge_sources import Source, open_sources
from megacontext_jax.data.rowgroups import DOCS_PER_GROUP, RowGroupSource, ShardWriter, write_shards
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError
from megacontext_jax.files import friendly_os_errors, remove_stale_scratch, scratch_path, write_bytes
from megacontext_jax.telemetry.progress import Progress

MANIFEST = "manifest.json"
FORMAT, VERSION = "megacontext-dataset", 1
_HELD_OUT_DOCS_PER_GROUP = 16  # few documents, and each process of a run takes whole row groups
_LARGEST_GROUP = 8192  # larger ones are written anew by --data-dir
_SPOOL_DOCS_PER_GROUP = 64  # the unit of the coarse shuffle
_BUFFER_CHARS = 64_000_000  # the fine shuffle


@dataclass(frozen=True)
class Options:
    """How a data set is made; the defaults are those of scripts.build_dataset."""

    column: str | None = None  # None: "text", or token ids where there is none
    ids_column: str | None = None
    tokenizer: str | Path | None = None  # folder
    rows: str = "auto"
    min_chars: int = 0
    val_fraction: float = 0.01
    shard_mchars: float = 250.0
    shards: int | None = None  # training shards; instead of shard_mchars
    docs_per_group: int = DOCS_PER_GROUP
    shuffle: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raises UserError naming the flag that makes no sense."""
        for flag, value, fine, rule in (
            (
                "--column",
                self.column,
                not (self.column and self.ids_column),
                "not be given with --ids-column",
            ),
            ("--rows", self.rows, self.rows in ROWS, f"be one of {', '.join(ROWS)}"),
            ("--min-chars", self.min_chars, self.min_chars >= 0, "not be negative"),
            ("--val-fraction", self.val_fraction, 0 < self.val_fraction <= 0.5, "be above 0 and at most 0.5"),
            ("--shard-mchars", self.shard_mchars, self.shard_mchars > 0, "be above 0"),
            ("--shards", self.shards, self.shards is None or self.shards > 0, "be at least 1"),
            (
                "--docs-per-group",
                self.docs_per_group,
                1 <= self.docs_per_group <= _LARGEST_GROUP,
                f"be from 1 to {_LARGEST_GROUP}",
            ),
            ("--seed", self.seed, self.seed >= 0, "not be negative"),
        ):
            if not fine:
                raise UserError(f"{flag} {value}: it must {rule}.")


def build_dataset(
    inputs: Sequence[str | Path], out: str | Path, options: Options, *, echo: Callable[[str], None] = print
) -> tuple[dict, bool]:
    """Writes `out`/shard_XXXXX.parquet (the last one held out) and returns (its manifest, was it finished before).

    Raises UserError for what cannot be read, for an `out` with other content, or when the disk is full; `out` is
    then as it was.
    """
    options.check()
    out = Path(out).expanduser().resolve()
    files, notes = find_files(inputs, out)
    for note in notes:
        echo(f"Note: {note}")
    sources = open_sources(files, options.column, options.ids_column)
    tokenizer = _tokenizer(sources, options)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "arguments": _arguments(options, tokenizer),
        "sources": [_facts(source) for source in sources],
    }
    finished = _finished(out, manifest)
    if finished:
        return finished, True
    if out.is_mount():
        raise UserError(
            f"{out} is where a disk is mounted and cannot be replaced; give a folder in it as --out."
        )
    remove_stale_scratch(out.parent, glob.escape(out.name))
    scratch = scratch_path(out)
    try:
        with friendly_os_errors(out):
            try:
                scratch.mkdir(parents=True)
            except FileNotFoundError as error:
                raise UserError(f"{out.parent} cannot be created; give another folder as --out.") from error
            manifest |= _write(sources, tokenizer, options, scratch)
            write_bytes(scratch / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
            try:
                os.rename(scratch, out)
            except OSError:
                if not (out.is_dir() and any(out.iterdir())):
                    raise
                raise UserError(
                    f"{out} was written to by another process meanwhile; nothing in it was changed."
                ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest, False


def _tokenizer(sources: Sequence[Source], options: Options) -> Tokenizer | None:
    first = next((source for source in sources if source.ids), None)
    if first is None:
        return None
    if options.tokenizer is None:
        raise UserError(
            f"{first.path} holds token ids (column {first.column!r}); give the folder of the tokenizer that made them "
            "with --tokenizer."
        )
    return Tokenizer.load(Path(options.tokenizer).expanduser())


def _arguments(options: Options, tokenizer: Tokenizer | None) -> dict:
    # the tokenizer by its content, wherever it lies
    return {**asdict(options), "tokenizer": tokenizer and tokenizer.digest}


def _facts(source: Source) -> dict:
    stat = source.path.stat()
    read = {"column": source.column, "ids": source.ids}
    return {"path": str(source.path), "size": stat.st_size, "modified_ns": stat.st_mtime_ns, **read}


def _finished(out: Path, wanted: dict) -> dict | None:
    """The manifest of an `out` that holds just what is wanted, None if there is nothing there.

    Raises UserError if it was made otherwise, is damaged, or holds other files.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{out} is a file; give another folder as --out.")
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return None
    try:
        manifest = json.loads((out / MANIFEST).read_bytes())
        ours = manifest["format"] == FORMAT and manifest["version"] == VERSION
        shards, arguments, sources = (manifest[key] for key in ("shards", "arguments", "sources"))
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(
            f"{out} holds other files ({names[0]}, ...) and nothing is overwritten; give a new folder as --out."
        )
    for name, value in wanted["arguments"].items():
        if name not in ("column", "ids_column") and arguments.get(name) != value:  # what they led to counts
            raise UserError(
                f"{out} was made {_flag(name, arguments.get(name))}, not {_flag(name, value)}; give the same flags, "
                "another --out, or remove that folder."
            )
    if sources != wanted["sources"]:
        other = next((b for a, b in zip(sources, wanted["sources"], strict=False) if a != b), None)
        what = (
            f"{other['path']} has changed, or is read from another column"
            if other
            else "there were more or fewer files"
        )
        raise UserError(
            f"{out} was made from other data ({what}); give another --out, or remove that folder."
        )
    sizes = {path.name: path.stat().st_size for path in out.glob("*.parquet")}
    odd = sorted(name for name in shards.keys() | sizes.keys() if shards.get(name) != sizes.get(name))
    if odd:
        raise UserError(
            f"The data set {out} is damaged ({odd[0]} is missing or not what was written); remove that folder and run "
            "again."
        )
    return manifest


def _flag(name: str, value: object) -> str:
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return f"without {flag}"
    return f"with {flag}" if value is True else f"with {flag} {value}"


def _write(sources: Sequence[Source], tokenizer: Tokenizer | None, options: Options, folder: Path) -> dict:
    """Writes all shards into `folder`; returns what they are."""
    counts, check = Counts(), Check()
    spool = folder / "spool"
    val = ShardWriter(
        folder, docs_per_group=_HELD_OUT_DOCS_PER_GROUP, docs_per_shard=None, prefix="held_out_"
    )
    size = sum(source.path.stat().st_size for source in sources)
    with val, Progress("reading", size, unit="B") as progress:
        documents = read_documents(sources, tokenizer, options.rows, check, progress.update)
        train = _without_held_out(counts.keep(documents, options.min_chars), options.val_fraction, val)
        if options.shuffle or options.shards:
            write_shards(train, spool, docs_per_group=_SPOOL_DOCS_PER_GROUP)
        else:
            limit = options.shard_mchars * 1e6
            paths = _write_train(
                train, folder, options.docs_per_group, lambda _, docs, chars, here: here >= limit
            )
    docs, chars = counts.documents - val.docs, counts.characters - val.chars
    if not (docs and val.docs):
        raise UserError(
            f"{sources[0].path.parent}: {counts.documents} document(s) are left (dropped: {counts.null} null, "
            f"{counts.blank} empty, {counts.short} too short); two are needed at least, one of them held out."
        )
    if options.shuffle or options.shards:
        with Progress("writing shards", docs, unit="documents") as progress:
            texts = _from_spool(spool, options, progress.update)
            paths = _write_train(texts, folder, options.docs_per_group, _ends(options, docs, chars))
        shutil.rmtree(spool)
    last = folder / _shard_name(len(paths))
    val.paths[0].rename(last)
    return {
        "shards": {path.name: path.stat().st_size for path in [*paths, last]},
        "row_groups": len(RowGroupSource(paths)),
        "train": {"documents": docs, "characters": chars},
        "val": {"documents": val.docs, "characters": val.chars},
        "counts": counts.to_json(),
        "vocab_size": tokenizer and tokenizer.vocab_size,
        "exact_tokens": all(source.ids for source in sources),
        "warnings": check.warnings(),
    }


def _without_held_out(texts: Iterable[str], fraction: float, val: ShardWriter) -> Iterator[str]:
    """Passes on the texts but every k-th, which goes to `val`; of fewer than k, the last one."""
    every, count, waiting = round(1 / fraction), 0, None
    for text in texts:
        if waiting is not None:
            if count % every == 0:
                val.add(waiting)
            else:
                yield waiting
        count, waiting = count + 1, text
    if waiting is None:
        return
    if count % every == 0 or 1 < count < every:
        val.add(waiting)
    else:
        yield waiting


def _from_spool(folder: Path, options: Options, advance: Callable[[float], None]) -> Iterator[str]:
    """The spooled texts in order, or: row groups in random order, shuffled within a buffer of bounded size."""
    source = RowGroupSource(sorted(folder.glob("*.parquet")))
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(len(source)) if options.shuffle else range(len(source))
    buffer, chars = [], 0
    for place, group in enumerate(order, 1):
        texts = source[int(group)]
        buffer += texts
        chars += sum(map(len, texts))
        if options.shuffle and chars < _BUFFER_CHARS and place < len(source):
            continue
        for i in rng.permutation(len(buffer)) if options.shuffle else range(len(buffer)):
            advance(1)
            yield buffer[i]
        buffer, chars = [], 0


Ends = Callable[[int, int, int, int], bool]
"""(finished shards, documents so far, characters so far, characters in this shard) -> is the shard full?"""


def _ends(options: Options, docs: int, chars: int) -> Ends:
    """When a shard is full, the number of documents and characters to come being known.

    Raises UserError if more shards are wanted than there are documents.
    """
    wanted = options.shards
    if wanted is None:
        return lambda _, __, ___, here: here >= options.shard_mchars * 1e6
    if docs < wanted:
        raise UserError(f"--shards {wanted} is more than the {docs} training document(s); ask for fewer.")

    def full(shards: int, docs_so_far: int, chars_so_far: int, _: int) -> bool:
        after = wanted - shards - 1  # each of them needs a document
        return after > 0 and (chars_so_far >= chars * (shards + 1) / wanted or docs - docs_so_far <= after)

    return full


def _write_train(texts: Iterable[str], folder: Path, docs_per_group: int, full: Ends) -> list[Path]:
    """Writes shard_00000.parquet, ... and returns their paths."""
    texts, paths, docs, chars = iter(texts), [], 0, 0
    while (text := next(texts, None)) is not None:
        path = folder / _shard_name(len(paths))
        writer = ShardWriter(
            folder, docs_per_group=docs_per_group, docs_per_shard=None, prefix=f"{path.stem}_part_"
        )
        with writer:
            while text is not None:
                writer.add(text)
                if full(len(paths), docs + writer.docs, chars + writer.chars, writer.chars):
                    break
                text = next(texts, None)
        writer.paths[0].rename(path)
        paths.append(path)
        docs, chars = docs + writer.docs, chars + writer.chars
    return paths


def _shard_name(number: int) -> str:
    return f"shard_{number:05d}.parquet"
