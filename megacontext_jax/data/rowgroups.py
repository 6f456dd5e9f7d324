"""Text in parquet: row groups as records for Grain, the split by file, and the writer.

A data set is a folder of parquet files in name order, with a column `text`; the last file is the validation
split, as in nanochat. One row group (about 1,024 documents) is one record: the unit of shuffling, of sharding
over processes and of resuming.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from megacontext_jax.errors import UserError
from megacontext_jax.files import atomic_path, remove_stale_scratch

DOCS_PER_GROUP = 1024
DOCS_PER_SHARD = 52 * DOCS_PER_GROUP  # about 250 million characters of web text, as nanochat's shards
_CHARS_PER_GROUP = 32_000_000  # bounds memory when documents are books
_SCHEMA = pa.schema([("text", pa.string())])
_BROKEN = (pa.ArrowException, OSError, ValueError)  # what pyarrow raises on bytes that make no sense


class ShardInfo(NamedTuple):
    """What the footer of a parquet file says."""

    groups: int
    rows: int
    largest_group: int


def check_shard(path: str | Path, column: str | None = "text") -> ShardInfo:
    """Reads the footer of one parquet file.

    Raises UserError naming the file if it is missing, truncated, foreign, empty or without `column`
    (which has to hold strings when it is `text`; None accepts any columns).
    """
    path = Path(path)
    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except FileNotFoundError:
        raise UserError(f"The data file {path} is missing; restore it or download it again.") from None
    except _BROKEN as error:
        raise UserError(
            f"{path} is not a complete parquet file ({_first_line(error)}); delete it and fetch it again."
        ) from error
    if column is not None and column not in schema.names:
        raise UserError(
            f"{path} has no column {column!r} (it has {', '.join(schema.names)}); use other data."
        )
    if column == "text":
        kind = schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"The column 'text' of {path} holds {kind}, not strings; use other data.")
    if metadata.num_rows == 0:
        raise UserError(f"{path} holds no rows; delete it.")
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return ShardInfo(metadata.num_row_groups, metadata.num_rows, max(sizes))


def check_shards(paths: Sequence[str | Path], column: str = "text") -> list[ShardInfo]:
    """`check_shard` of every file, several at a time."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda path: check_shard(path, column), paths))


class RowGroupSource:
    """Random access to the row groups of many parquet files: `source[i]` is a list of column values.

    All footers are checked at once; data is read on demand and no file stays open, so that the source can be
    pickled and shared by threads. Nulls in a text column read as empty strings.
    """

    def __init__(self, paths: Iterable[str | Path], column: str = "text"):
        self.paths = [Path(path) for path in paths]
        self.column = column
        if not self.paths:
            raise UserError("There are no data files to read; check the data folder.")
        infos = check_shards(self.paths, column)
        self.num_rows = sum(info.rows for info in infos)
        self._ends = list(accumulate(info.groups for info in infos))  # row groups up to and with each file

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:
        return f"RowGroupSource(files={len(self.paths)}, groups={len(self)}, column={self.column!r})"

    def locate(self, index: int) -> tuple[int, int]:
        """(index of the file, row group within it) of record `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row group {index} of {len(self)}")
        file = bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    def __getitem__(self, index: int) -> list[Any]:
        file, group = self.locate(int(index))
        path = self.paths[file]
        try:
            with pq.ParquetFile(path) as parquet:
                table = parquet.read_row_group(group, columns=[self.column], use_threads=False)
            values = table.column(self.column).to_pylist()
        except _BROKEN as error:
            raise UserError(
                f"Row group {group} of {path} cannot be read ({_first_line(error)}); the file is damaged or "
                f"was changed during the run: fetch it again."
            ) from error
        return ["" if value is None else value for value in values] if self.column == "text" else values


def list_shards(folder: str | Path, pattern: str = "*.parquet") -> list[Path]:
    """The parquet files of `folder` in name order, hidden ones aside. Raises UserError if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"The data folder {folder} does not exist; check the path or make the data first.")
    paths = sorted(path for path in folder.glob(pattern) if path.is_file() and path.name[0] != ".")
    if not paths:
        raise UserError(f"The data folder {folder} holds no file {pattern}; make or download the data first.")
    return paths


def split_shards(paths: Sequence[Path], split: str) -> list[Path]:
    """nanochat's rule: the last file is `val`, all others are `train`.

    Raises UserError for a single file, which would leave nothing to train on.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', not {split!r}")
    if len(paths) < 2:
        where = paths[0] if paths else "an empty list"
        raise UserError(
            f"One data file is not enough ({where}): the last file of a folder is the validation split; add "
            f"a second one, or give the folder as --data-dir, which holds out documents by itself."
        )
    return list(paths[:-1] if split == "train" else paths[-1:])


def iter_texts(
    paths: Iterable[str | Path], max_chars: int | None = None, doc_cap: int | None = 10_000
) -> Iterator[str]:
    """Documents in file order, cut to `doc_cap` characters; ends after the one that passes `max_chars`."""
    source, seen = RowGroupSource(paths), 0
    for index in range(len(source)):
        for text in source[index]:
            text = text[:doc_cap]
            yield text
            seen += len(text)
            if max_chars is not None and seen > max_chars:
                return


class ShardWriter:
    """Writes documents to `<prefix>00000.parquet`, ... in `folder`; each file appears only when complete.

    A context manager: leaving it closes the last file, leaving it by an exception drops the unfinished one.
    `docs_per_shard=None` puts everything into one file. `paths` lists the files written so far.
    Raises UserError when a file of that name exists, or the disk is full.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        docs_per_group: int = DOCS_PER_GROUP,
        docs_per_shard: int | None = DOCS_PER_SHARD,
        prefix: str = "shard_",
    ):
        self.paths: list[Path] = []
        self.docs = self.chars = 0
        self._folder, self._prefix = Path(folder), prefix
        self._docs_per_group, self._docs_per_shard = docs_per_group, docs_per_shard
        self._group: list[str] = []
        self._group_chars = self._shard_docs = 0
        self._stack, self._writer = ExitStack(), None
        remove_stale_scratch(self._folder, f"{prefix}*")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception) -> None:
        if exception[0] is not None:
            self._stack.__exit__(*exception)
            return
        with self._stack:  # empty afterwards, or unwound by what goes wrong
            self._end_shard()

    def add(self, text: str) -> None:
        self._group.append(text)
        self._group_chars += len(text)
        self._shard_docs += 1
        self.docs, self.chars = self.docs + 1, self.chars + len(text)
        if self._shard_docs == self._docs_per_shard:
            self._end_shard()
        elif len(self._group) >= self._docs_per_group or self._group_chars >= _CHARS_PER_GROUP:
            self._end_group()

    def _end_group(self) -> None:
        if self._writer is None:
            path = self._folder / f"{self._prefix}{len(self.paths):05d}.parquet"
            if path.exists():
                raise UserError(f"{path} exists already and is not overwritten; choose an empty folder.")
            scratch = self._stack.enter_context(atomic_path(path))
            self._writer = self._stack.enter_context(
                pq.ParquetWriter(
                    scratch,
                    _SCHEMA,
                    compression="zstd",
                    compression_level=3,
                    use_dictionary=False,
                    write_statistics=False,
                )
            )
            self._path = path
        column = pa.array(map(_without_surrogates, self._group), pa.string())
        self._writer.write_table(pa.table([column], _SCHEMA), row_group_size=len(self._group))
        self._group, self._group_chars = [], 0

    def _end_shard(self) -> None:
        if self._group:
            self._end_group()
        if self._writer is not None:
            self._stack.close()
            self.paths.append(self._path)
            self._writer, self._shard_docs = None, 0


def write_shards(
    texts: Iterable[str],
    out_dir: str | Path,
    *,
    docs_per_group: int = DOCS_PER_GROUP,
    docs_per_shard: int | None = DOCS_PER_SHARD,
    prefix: str = "shard_",
) -> list[Path]:
    """Writes `texts` as shards (zstd, one column `text`) and returns their paths; see `ShardWriter`."""
    with ShardWriter(
        out_dir, docs_per_group=docs_per_group, docs_per_shard=docs_per_shard, prefix=prefix
    ) as writer:
        for text in texts:
            writer.add(text)
    return writer.paths


def _without_surrogates(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no UTF-8 file can hold: it becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
