"""Files of text or of token ids, row by row: Arrow (both IPC formats), parquet, JSON lines, plain text.

Nothing is read whole but a .txt file, which is one document: Arrow files are mapped, batches are taken 64 rows at
a time. Rows and lines are numbered from 1.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megacontext_jax.data.bridge_files import kind_of
from megacontext_jax.errors import UserError

IDS_COLUMNS = ("input_ids", "tokens")  # looked for where there is no text column
_ROWS = 64  # rows in memory at a time; they may be books
_READ_BYTES = 1 << 20  # of a parquet column at a time, however large its row groups are
_LARGEST_TXT = 1 << 30


class Source(NamedTuple):
    """A file, and which of its columns is read as what."""

    path: Path
    kind: str
    column: str
    ids: bool

    def place(self, number: int) -> str:
        return f"{self.path}, {'line' if self.kind == 'json' else 'row'} {number}"


# Which column


def open_sources(paths: Sequence[Path], column: str | None, ids_column: str | None) -> list[Source]:
    """Decides from each file's schema (or first line) what is read from it; `column` None means "text".

    Raises UserError naming the file, and the columns it has, when it has no such column, or is damaged.
    """
    return [_open(path, kind_of(path), column, ids_column) for path in paths]


def _open(path: Path, kind: str, column: str | None, ids_column: str | None) -> Source:
    if kind == "txt":
        if path.stat().st_size > _LARGEST_TXT:
            raise UserError(
                f"{path} is larger than 1 GiB; a .txt file is one document: split it, or use .jsonl."
            )
        return Source(path, kind, "", False)
    if kind == "json":
        _, first = next(_lines(path, lambda _: None), (0, None))
        if first is None:
            return Source(path, kind, column or "text", False)  # an empty file
        fields = {name: _json_type(value) for name, value in first.items()}
    elif kind == "arrow":
        with _arrow(path) as (reader, _):
            fields = {field.name: field.type for field in reader.schema}
    else:
        with _parquet(path) as file:
            fields = {field.name: field.type for field in file.schema_arrow}
    name = ids_column or column or "text"
    wants_ids = bool(ids_column)
    if name not in fields and not (column or ids_column):
        name = next((c for c in IDS_COLUMNS if c in fields and _holds(fields[c], ids=True)), name)
        wants_ids = name in IDS_COLUMNS
    if name not in fields:
        raise UserError(
            f"{path} has no column {name!r} (it has {', '.join(map(repr, fields)) or 'none'}); name the one with the "
            "text with --column, or the one with token ids with --ids-column."
        )
    if not _holds(fields[name], ids=wants_ids):
        wanted = "lists of integers" if wants_ids else "strings"
        raise UserError(
            f"The column {name!r} of {path} holds {fields[name]}, not {wanted}; name another one with "
            f"{'--ids-column' if wants_ids else '--column'}."
        )
    return Source(path, kind, name, wants_ids)


def _holds(kind: pa.DataType, *, ids: bool) -> bool:
    types = pa.types
    if types.is_null(kind):
        return True
    if ids:
        lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return lists and types.is_integer(kind.value_type)
    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
    )
    return any(test(kind) for test in tests)


def _json_type(value: Any) -> pa.DataType:
    if value == []:
        return pa.list_(pa.int64())
    try:
        return pa.infer_type([value])
    except (pa.ArrowException, ValueError, TypeError):
        return pa.struct([])


# Rows


def read_rows(
    source: Source, advance: Callable[[float], None]
) -> Iterator[tuple[int, str | np.ndarray | None]]:
    """(number, text | ids [n] of any integer type | None for a null) of each row.

    `advance` is told the bytes of the file that were read. Raises UserError naming file and row for bytes that
    are not UTF-8, a value of another type, or a damaged file.
    """
    if source.kind == "txt":
        yield 1, _read_txt(source.path, advance)
    elif source.kind == "json":
        yield from _read_json(source, advance)
    else:
        batches = _arrow_columns if source.kind == "arrow" else _parquet_columns
        number = 0
        for column in batches(source, advance):
            for start in range(0, len(column), _ROWS):
                values = (_ids if source.ids else _texts)(column.slice(start, _ROWS), source, number)
                for value in values:
                    number += 1
                    yield number, value


def _texts(column: pa.Array, source: Source, before: int) -> Iterator[str | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not pa.types.is_null(column.type):
        column = column.cast(pa.large_binary())  # no copy; so that broken bytes can be named
    for number, value in enumerate(column.to_pylist(), before + 1):
        try:
            yield None if value is None else value.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{source.place(number)}, is not UTF-8 text ({error}); mend or remove it."
            ) from error


def _ids(column: pa.Array, source: Source, before: int) -> Iterator[np.ndarray | None]:
    for number, value in enumerate(column, before + 1):
        if not value.is_valid:
            yield None
            continue
        if value.values.null_count:
            raise UserError(f"{source.place(number)}, has a null among its token ids; mend or remove it.")
        yield value.values.to_numpy(zero_copy_only=False)


@contextmanager
def _arrow(path: Path, column: str | None = None) -> Iterator[tuple[Any, pa.MemoryMappedFile]]:
    """(reader, file) of either IPC format; `datasets` writes streams, Feather is the file format."""
    with _readable(path, "Arrow file"), pa.memory_map(str(path)) as file:
        magic = file.read(6)
        file.seek(0)
        if magic[:4] == b"FEA1":
            raise UserError(f"{path} is Feather version 1; write it anew with pyarrow.feather.write_feather.")
        opened = pa.ipc.open_file if magic == b"ARROW1" else pa.ipc.open_stream
        options = None
        if column is not None:
            schema = opened(file).schema
            file.seek(0)
            options = pa.ipc.IpcReadOptions(
                included_fields=[schema.get_field_index(column)], use_threads=False
            )
        yield opened(file, options=options), file


def _arrow_columns(source: Source, advance: Callable[[float], None]) -> Iterator[pa.Array]:
    with _arrow(source.path, source.column) as (reader, file):
        batches, share, done = reader, None, 0
        if isinstance(reader, pa.RecordBatchFileReader):
            count = reader.num_record_batches
            batches, share = map(reader.get_batch, range(count)), source.path.stat().st_size / max(1, count)
        for batch in batches:
            yield batch.column(source.column)
            advance(file.tell() - done if share is None else share)
            done = file.tell()


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    with _readable(path, "parquet file"), pq.ParquetFile(path, buffer_size=_READ_BYTES) as file:
        yield file


def _parquet_columns(source: Source, advance: Callable[[float], None]) -> Iterator[pa.Array]:
    with _parquet(source.path) as file:
        share = source.path.stat().st_size / max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=_ROWS, columns=[source.column], use_threads=False):
            yield batch.column(0)
            advance(share * batch.num_rows)


def _lines(path: Path, advance: Callable[[float], None]) -> Iterator[tuple[int, dict]]:
    """(line number, object) of JSON lines, blank ones left out."""
    zipped, done = path.name.lower().endswith(".gz"), 0
    with _readable(path, "gzip file" if zipped else "file"), open(path, "rb") as raw:
        for number, line in enumerate(gzip.GzipFile(fileobj=raw) if zipped else raw, 1):
            if not zipped:
                advance(len(line))
            elif raw.tell() > done:
                advance(raw.tell() - done)
                done = raw.tell()
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number}, is not JSON in UTF-8 ({error}); every line has to be one object."
                ) from error
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}, is not a JSON object; every line has to be one.")
            yield number, record


def _read_json(source: Source, advance: Callable[[float], None]) -> Iterator[tuple[int, Any]]:
    for number, record in _lines(source.path, advance):
        if source.column not in record:
            raise UserError(
                f"{source.place(number)}, has no {source.column!r} (it has {', '.join(map(repr, record))}); "
                "mend or remove it."
            )
        value = record[source.column]
        if value is not None and source.ids:
            try:
                value = np.asarray(value, None if value else np.int64)
            except ValueError:
                value = np.zeros((1, 1))
            if value.dtype.kind not in "iu" or value.ndim != 1:
                raise UserError(
                    f"{source.place(number)}, holds no list of integers in {source.column!r}; mend it."
                )
        elif value is not None and not isinstance(value, str):
            raise UserError(
                f"{source.place(number)}, holds {type(value).__name__} in {source.column!r}, not a string; mend it."
            )
        yield number, value


def _read_txt(path: Path, advance: Callable[[float], None]) -> str:
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}, is not UTF-8 text; convert or remove the file.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}); mend or remove it.") from error
    advance(len(data))
    return text


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """What goes wrong in the block, but not in who reads from it, is about the file."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{path} is not a complete {what} ({reason}); fetch or write it again.") from error
