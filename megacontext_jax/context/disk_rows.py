"""One level of a tree on disk: `LODl.ctx` with the entries and `LODl.sum` with their checksums.

LODl.ctx, little-endian: a header of 64 bytes, then the entries, nothing else.

    magic uint32 0x4D434354 | version uint16 | level uint16 | block size uint16 | width uint16 | dtype uint16
    (0 uint32, 1 fp16, 2 bf16, 3 fp32) | entries uint64 | model name, 32 bytes utf-8 | 10 bytes zero

The width is the numbers per entry: D for gists, 1 for level 0, whose entries are token ids (uint32).

LODl.sum: 32 bytes (entries at the last sync, xxh3-64 of the chunk they end in up to there, xxh3-64 of those 16
bytes, 8 bytes zero), then 16 bytes per chunk of entries: where the chunk ends (uint64, an entry number) and the
xxh3-64 of its bytes. The last chunk may be partial; a running hash carries it on, so an append never reads.

An append writes the entries, then the checksums, then the count in the header, so that a process killed between
leaves entries without checksum, which are cut when the file is opened. Without a kill or a power cut the three
agree; when they do not, what the checksums and the file's length both cover is kept. A checksum is aligned, so it
never straddles a page and is not torn.
"""

import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash

from megacontext_jax.context.store_base import DTYPES, TreeSpec
from megacontext_jax.errors import UserError

MAGIC, VERSION = 0x4D434354, 1
_HEADER = struct.Struct("<IHHHHHQ32s10s")
_COUNT_AT = 14  # of the header
_SMALL_READ = 1 << 18  # bytes
_SYNCED = struct.Struct("<QQQQ")
_SLOT = struct.Struct("<QQ")


def pack_header(spec: TreeSpec, level: int, count: int) -> bytes:
    dtype, shape = spec.row(level)
    width = shape[0] if shape else 1
    name = spec.model_name.encode()
    return _HEADER.pack(MAGIC, VERSION, level, spec.block, width, DTYPES[dtype.name], count, name, b"")


class DiskRows:
    """The entries of one level in two files of `folder`; append-only, mapped for reading.

    Opening cuts a torn tail and says so. Raises UserError for files that are missing, foreign, newer or damaged;
    with `repair` the entries before the damage are kept instead.
    """

    def __init__(
        self, folder: Path, level: int, spec: TreeSpec, say: Callable[[str], None], repair: bool = False
    ):
        self.path, self._sum_path = level_paths(folder, level)
        self._spec, self._level = spec, level
        self._dtype, self._shape = spec.row(level)
        self._row_bytes = self._dtype.itemsize * (self._shape[0] if self._shape else 1)
        self._view: np.ndarray | None = None
        self._count = 0
        self._synced = (0, 0)  # entries at the last sync, hash of their last chunk
        self._data = self._sums = -1
        try:
            self._data, self._sums = self._open(self.path), self._open(self._sum_path)
            self._check_header()
            self._recover(say, repair)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def create(folder: Path, level: int, spec: TreeSpec) -> None:
        """Write the two files of an empty level."""
        for path, content in zip(
            level_paths(folder, level),
            (pack_header(spec, level, 0), _pack_synced(0, _hash(b""))),
            strict=True,
        ):
            with open(path, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def __len__(self) -> int:
        return self._count

    def append(self, rows) -> None:
        """Add rows [n, ...]; UserError when the disk refuses (then `cut` puts the files right)."""
        if not len(rows):
            return
        data = memoryview(np.ascontiguousarray(rows, self._dtype).reshape(-1).view(np.uint8))
        first_chunk = self._count // self._spec.chunk
        with self._refusals():
            _write(self._data, data, self._offset(self._count))
            _write(self._sums, self._hash_on(data), self._slot_offset(first_chunk))
            self._count += len(rows)
            self._write_count()

    def read(self, start: int, stop: int) -> np.ndarray:
        if self._view is None or stop > len(self._view):
            self._view = self._map()
        return self._view[start:stop]

    def load(self, start: int, stop: int) -> np.ndarray:
        """`read` without a new mapping for a few entries: mapping a long file costs more than copying them."""
        if (stop - start) * self._row_bytes > _SMALL_READ:
            return self.read(start, stop)
        self._check_open()
        return np.frombuffer(self._bytes(start, stop), self._dtype).reshape(stop - start, *self._shape)

    def cut(self, count: int) -> None:
        """Forget the entries from `count` on; also mends what a failed append left behind `count`."""
        self._count = min(self._count, count)
        self._view = None
        chunk = self._spec.chunk
        full = self._count // chunk
        tail = self._bytes(full * chunk, self._count)
        self._hasher = xxhash.xxh3_64(tail)
        with self._refusals():
            # Checksums before entries, surplus ones before the last: a kill between leaves a readable file.
            partial = len(tail) > 0
            size = self._slot_offset(full + partial)
            if os.fstat(self._sums).st_size > size:
                os.ftruncate(self._sums, size)
            if partial:
                _write(self._sums, _SLOT.pack(self._count, self._hasher.intdigest()), self._slot_offset(full))
            if self._synced[0] > self._count:
                self._write_synced()
            os.ftruncate(self._data, self._offset(self._count))
            self._write_count()

    def sync(self) -> None:
        """Force the entries to the disk, then note how many they are: what `repair` can go back to."""
        if self._synced[0] == self._count:
            return
        with self._refusals():
            os.fsync(self._data)
            self._write_synced()
            os.fsync(self._sums)

    def verify(self) -> None:
        """Compare every byte of both files with what they must be; UserError names the file and the entries."""
        header = os.pread(self._data, _HEADER.size, 0)
        if header != pack_header(self._spec, self._level, self._count):
            raise self._damage(self.path, "is damaged in its header")
        for descriptor, path, size in (
            (self._data, self.path, self._offset(self._count)),
            (self._sums, self._sum_path, self._slot_offset(self._chunks())),
        ):
            if (actual := os.fstat(descriptor).st_size) != size:
                raise self._damage(path, f"has {actual} bytes instead of {size}")
        if os.pread(self._sums, _SYNCED.size, 0) != _pack_synced(*self._synced) or not self._synced_holds():
            raise self._damage(self._sum_path, "is damaged in its first 32 bytes")
        self._check_chunks(0, self._chunks())

    def close(self) -> None:
        for descriptor in (self._data, self._sums):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._sums = -1
        self._view = None

    def _open(self, path: Path) -> int:
        try:
            return os.open(path, os.O_RDWR)
        except FileNotFoundError:
            raise self._damage(path, "is missing") from None

    def _check_header(self) -> None:
        header = os.pread(self._data, _HEADER.size, 0)
        if len(header) < _HEADER.size:
            raise self._damage(self.path, f"is cut off in its header ({len(header)} bytes of {_HEADER.size})")
        magic, version, *_, count, _, _ = _HEADER.unpack(header)
        if magic != MAGIC:
            raise self._damage(
                self.path, f"is no level of a tree (it begins with {magic:#x}, not {MAGIC:#x})"
            )
        if version > VERSION:
            raise UserError(
                f"{self.path} has version {version} of the format and this program reads up to {VERSION}; update "
                "megacontext-jax."
            )
        if header != pack_header(self._spec, self._level, count):
            raise self._damage(self.path, "has a header that does not fit metadata.json")

    def _recover(self, say: Callable[[str], None], repair: bool) -> None:
        """Find how many entries stand, check the last chunk and cut the rest."""
        size = os.fstat(self._data).st_size
        whole = (size - _HEADER.size) // self._row_bytes
        slots = max(0, os.fstat(self._sums).st_size - _SYNCED.size) // _SLOT.size
        covered = self._slot(slots - 1)[0] if slots else 0
        self._count = min(whole, covered)
        chunk = self._spec.chunk
        # A chunk whose end is gone has lost its checksum with it: the file's length decides there.
        checkable = slots if covered <= whole else whole // chunk
        try:
            self._read_synced()
            if slots and not (slots - 1) * chunk < covered <= slots * chunk:
                raise self._damage(self._sum_path, f"is damaged (its last chunk ends at entry {covered})")
            self._check_chunks(0 if repair else checkable - 1, checkable)
        except UserError as error:
            if not repair:
                raise
            self._count = min(whole, slots * chunk)
            self._count = self._good_entries()
            say(f"{error} Repaired: {self._count:,} entries are kept.")
        if covered > whole:
            say(
                f"{self.path} ends before its last {covered - whole:,} entries (a power cut?): they are gone."
            )
        elif size > self._offset(self._count):
            say(
                f"{self.path} ended in an unfinished append: {size - self._offset(self._count)} bytes are cut."
            )
        self.cut(self._count)

    def _read_synced(self) -> None:
        record = os.pread(self._sums, _SYNCED.size, 0)
        if len(record) < _SYNCED.size or record != _pack_synced(*_SYNCED.unpack(record)[:2]):
            self._synced = (0, _hash(b""))
            raise self._damage(self._sum_path, "is damaged in its first 32 bytes")
        self._synced = _SYNCED.unpack(record)[:2]

    def _good_entries(self) -> int:
        """Entries before the first damage: whole chunks, and of the damaged one what was synced."""
        chunk = self._spec.chunk
        good = next((k for k in range(self._chunks()) if not self._same(k)), None)
        if good is None:
            return self._count
        within = good * chunk < self._synced[0] <= min((good + 1) * chunk, self._count)
        return self._synced[0] if within and self._synced_holds() else good * chunk

    def _check_chunks(self, first: int, stop: int) -> None:
        """Raises UserError for the first of the chunks [first, stop) that differs from its checksum."""
        chunk = self._spec.chunk
        for k in range(max(0, first), stop):
            if not self._same(k):
                entries = f"{k * chunk} to {min((k + 1) * chunk, self._count) - 1}"
                raise self._damage(
                    self.path, f"is damaged in the entries {entries} (or {self._sum_path.name} is)"
                )

    def _same(self, k: int) -> bool:
        """Whether a chunk is what its checksum says."""
        start, stop = k * self._spec.chunk, min((k + 1) * self._spec.chunk, self._count)
        return self._slot(k) == (stop, _hash(self._bytes(start, stop)))

    def _synced_holds(self) -> bool:
        count, digest = self._synced
        start = max(0, count - 1) // self._spec.chunk * self._spec.chunk
        return count <= self._count and digest == _hash(self._bytes(start, count))

    def _hash_on(self, data: memoryview) -> bytes:
        """Carry the running hash over the bytes of new entries; the slots of the chunks they touch."""
        slots, chunk = b"", self._spec.chunk
        end, left = self._count, len(data) // self._row_bytes
        while left:
            taken = min(left, chunk - end % chunk)
            self._hasher.update(data[: taken * self._row_bytes])
            data, end, left = data[taken * self._row_bytes :], end + taken, left - taken
            slots += _SLOT.pack(end, self._hasher.intdigest())
            if end % chunk == 0:
                self._hasher.reset()
        return slots

    def _write_synced(self) -> None:
        self._synced = self._slot(self._chunks() - 1) if self._count else (0, _hash(b""))
        _write(self._sums, _pack_synced(*self._synced), 0)

    def _write_count(self) -> None:
        _write(self._data, struct.pack("<Q", self._count), _COUNT_AT)

    def _chunks(self) -> int:
        return -(-self._count // self._spec.chunk)

    def _slot(self, k: int) -> tuple[int, int]:
        return _SLOT.unpack(os.pread(self._sums, _SLOT.size, self._slot_offset(k)))

    def _slot_offset(self, k: int) -> int:
        return _SYNCED.size + k * _SLOT.size

    def _offset(self, entry: int) -> int:
        return _HEADER.size + entry * self._row_bytes

    def _bytes(self, start: int, stop: int) -> bytes:
        return os.pread(self._data, (stop - start) * self._row_bytes, self._offset(start))

    def _map(self) -> np.ndarray:
        """All entries as a read-only array over the mapped file; it keeps the mapping alive."""
        self._check_open()
        if not self._count:
            return np.empty((0, *self._shape), self._dtype)
        mapped = mmap.mmap(self._data, self._offset(self._count), access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, self._dtype, offset=_HEADER.size).reshape(self._count, *self._shape)

    def _check_open(self) -> None:
        if self._data < 0:
            raise ValueError(f"{self.path} is closed")

    def _damage(self, path: Path, what: str) -> UserError:
        if self._level:
            remedy = "rebuild the gists from the tokens with refresh_store"
        else:
            remedy = "restore the file from a copy, or keep the entries before the damage with repair=True"
        return UserError(f"{path} {what}; {remedy}.")

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turns an error of the file system into one sentence."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); free some space or make it writable and append "
                f"again: what was appended before is intact."
            ) from error


def level_paths(folder: Path, level: int) -> tuple[Path, Path]:
    return folder / f"LOD{level}.ctx", folder / f"LOD{level}.sum"


def _write(descriptor: int, data, offset: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _hash(data) -> int:
    return xxhash.xxh3_64_intdigest(data)


def _pack_synced(count: int, digest: int) -> bytes:
    return _SYNCED.pack(count, digest, _hash(struct.pack("<QQ", count, digest)), 0)
