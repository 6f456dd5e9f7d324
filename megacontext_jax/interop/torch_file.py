"""`torch.save` files without torch: read safely and piece by piece, written so that torch reads them.

The format (torch 1.6 and later): a zip archive, nothing compressed, with a pickle `<root>/data.pkl` that
describes tensors, and their bytes in `<root>/data/<key>`. Nothing in the pickle is executed
(`safe_pickle`), sizes are believed only as far as the file has the bytes, and tensors are read straight into
the caller's arrays, with their checksums.
"""

import itertools
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from megacontext_jax import safe_pickle
from megacontext_jax.errors import UserError
from megacontext_jax.files import atomic_path, friendly_os_errors
from megacontext_jax.safe_pickle import Refused

_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_STORAGES = {dtype: name for name, dtype in _DTYPES.items()}
_CHUNK = 1 << 23
_MAX_TENSORS = 100_000
_MAX_DIRECTORY = 1 << 22  # bytes; some 50,000 entries
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Storage:
    """The bytes of one entry of the archive."""

    key: str
    dtype: np.dtype
    start: int  # in the file
    count: int  # elements
    checksum: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in an open file; `read` fetches it."""

    file: "TorchFile"
    storage: _Storage
    offset: int  # elements, like the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self, out: np.ndarray | None = None) -> np.ndarray:
        """The values, into `out` (same shape, C-contiguous; converted to its dtype) or a new array.

        Raises UserError when the bytes do not match their checksum.
        """
        if out is None:
            out = np.empty(self.shape, self.dtype)
        assert out.shape == self.shape
        assert out.flags.c_contiguous
        contiguous = self.size == self.storage.count and self.strides == _c_strides(self.shape)
        if contiguous and out.dtype == self.dtype:
            self.file._read_storage(self.storage, out.reshape(-1).view(np.uint8))
            return out
        whole = np.empty(self.storage.count, self.dtype)
        self.file._read_storage(self.storage, whole.view(np.uint8))
        view = np.lib.stride_tricks.as_strided(
            whole[self.offset :], self.shape, [s * self.dtype.itemsize for s in self.strides], writeable=False
        )
        np.copyto(out, view, casting="unsafe")
        return out


class TorchFile:
    """A `torch.save` file opened for reading; `tree` is its content with `StoredTensor` leaves."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115, closed by __exit__
        except OSError as error:
            raise UserError(
                f"Cannot read {path} ({error.strerror}); check the path and its permissions."
            ) from None
        self._tensors = self._references = 0
        try:
            with self._named():
                self._open()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *exc) -> None:
        self._file.close()

    def _open(self) -> None:
        self._length = os.fstat(self._file.fileno()).st_size
        head = self._file.read(4)
        if head[:2] == b"\x80\x02" or head[:1] == b"\x80":
            raise Refused("it is in the format of PyTorch before 1.6; save it again with a newer PyTorch")
        if self._directory_size() > _MAX_DIRECTORY:
            raise Refused("the directory of its archive is far larger than such files need")
        archive = zipfile.ZipFile(self._file)
        names = [entry.filename for entry in archive.infolist()]
        if not all(name.isprintable() and len(name) <= 300 for name in names):
            raise Refused("an entry of its archive has a name that such files do not use")
        if len(set(names)) != len(names):
            raise Refused("an entry of its archive occurs twice")
        pickles = [name for name in names if re.fullmatch(r"[^/\\]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise Refused(f"its archive holds {len(pickles)} entries <name>/data.pkl, not one")
        self._entries = {entry.filename: entry for entry in archive.infolist()}
        places = sorted((e.header_offset, e.header_offset + 30 + e.compress_size) for e in archive.infolist())
        if any(end > start for (_, end), (start, _) in itertools.pairwise(places)):
            raise Refused("entries of its archive overlap")
        self._root = pickles[0].split("/")[0]
        order = self._small(f"{self._root}/byteorder", b"little")
        if order.strip() != b"little":
            raise Refused(f"its byte order is {order[:20]!r}; only little-endian files are read")
        data = self._small(pickles[0], None)
        self.tree = safe_pickle.loads(data, permitted=self._permitted(), persistent=self._storage)

    def _directory_size(self) -> int:
        """The length of the archive's directory as announced at its end; 0 when there is no such end."""
        start = max(0, self._length - (1 << 16) - 22 - 76)
        tail = os.pread(self._file.fileno(), self._length - start, start)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or at + 22 > len(tail):
            return 0
        if at >= 76 and tail[at - 76 : at - 72] == b"PK\x06\x06":
            return struct.unpack("<Q", tail[at - 36 : at - 28])[0]
        return struct.unpack("<I", tail[at + 12 : at + 16])[0]

    def _permitted(self) -> dict:
        storages = {f"torch.{name}": _StorageType(dtype) for name, dtype in _DTYPES.items()}
        return storages | {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "collections.OrderedDict": lambda: safe_pickle.Attributes(),
        }

    def _small(self, name: str, default: bytes | None) -> bytes:
        """An entry that is not a tensor."""
        if name not in self._entries:
            if default is None:
                raise Refused(f"its archive lacks {name}")
            return default
        start, size = self._extent(name)
        if size > safe_pickle.MAX_BYTES:
            raise Refused(f"its {name} is {size:,} bytes long, far more than such files need")
        data = os.pread(self._file.fileno(), size, start)
        if len(data) != size or zlib.crc32(data) != self._entries[name].CRC:
            raise Refused(f"its {name} is damaged (its checksum differs)")
        return data

    def _extent(self, name: str) -> tuple[int, int]:
        """(first byte in the file, length) of an entry; checked against the file's own size."""
        entry = self._entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Refused(f"its {name} is compressed, which torch.save never does")
        if entry.flag_bits & 1:
            raise Refused(f"its {name} is encrypted")
        if not 0 <= entry.header_offset <= self._length:
            raise Refused(f"its {name} lies outside of the file")
        header = os.pread(self._file.fileno(), 30, entry.header_offset)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise Refused(f"the header of its {name} is damaged")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = entry.header_offset + 30 + name_length + extra_length
        if start + entry.file_size > self._length:
            raise Refused(f"its {name} reaches beyond the end of the file")
        return start, entry.file_size

    def _storage(self, reference) -> _Storage:
        """What a persistent id ("storage", type, key, device, elements) stands for."""
        self._references += 1
        if self._references > _MAX_TENSORS:
            raise Refused(f"it refers to storages more than {_MAX_TENSORS:,} times")
        if type(reference) is not tuple or len(reference) != 5 or reference[0] != "storage":
            raise Refused("it refers to something that is not a storage")
        _, kind, key, _, count = reference
        dtype = (
            kind.call.dtype
            if type(kind) is safe_pickle.Global and isinstance(kind.call, _StorageType)
            else None
        )
        if dtype is None or type(key) is not str or not re.fullmatch(r"[0-9A-Za-z_]{1,64}", key):
            raise Refused("the description of a storage in it is not well-formed")
        start, size = self._extent_of(key)
        if type(count) is not int or not 0 <= count < 2**48:
            raise Refused("the description of a storage in it is not well-formed")
        if count * dtype.itemsize != size:
            raise Refused(f"storage {key} has {size:,} bytes where {count:,} {dtype.name} are announced")
        return _Storage(key, dtype, start, count, self._entries[f"{self._root}/data/{key}"].CRC)

    def _extent_of(self, key: str) -> tuple[int, int]:
        name = f"{self._root}/data/{key}"
        if name not in self._entries:
            raise Refused(f"its archive lacks {name}")
        return self._extent(name)

    def _tensor(self, *arguments) -> StoredTensor:
        """`torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, ...)`."""
        if len(arguments) not in (6, 7) or not isinstance(arguments[0], _Storage):
            raise Refused("the description of a tensor in it is not well-formed")
        if len(arguments) == 7 and arguments[6]:
            raise Refused("a tensor in it is negated or conjugated")
        storage, offset, shape, strides = arguments[:4]
        numbers = (offset, *shape, *strides) if type(shape) is type(strides) is tuple else (None,)
        if (
            any(type(n) is not int or not 0 <= n < 2**48 for n in numbers)
            or len(shape) != len(strides)
            or len(shape) > 8
        ):
            raise Refused("the description of a tensor in it is not well-formed")
        if math.prod(max(1, n) for n in shape) >= 2**48:
            raise Refused(f"a tensor in it has the shape {list(shape)}")
        size = math.prod(shape)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if size else 0
        if last >= max(1, storage.count) or size > storage.count:
            raise Refused(
                f"a tensor of shape {list(shape)} does not fit into storage {storage.key} of {storage.count:,}"
            )
        self._tensors += 1
        if self._tensors > _MAX_TENSORS:
            raise Refused(f"it describes more than {_MAX_TENSORS:,} tensors")
        return StoredTensor(self, storage, offset, shape, strides)

    def _parameter(self, *arguments) -> StoredTensor:
        if len(arguments) != 3 or not isinstance(arguments[0], StoredTensor):
            raise Refused("the description of a parameter in it is not well-formed")
        return arguments[0]

    def _read_storage(self, storage: _Storage, out: np.ndarray) -> None:
        """The bytes of a storage into `out` (uint8), checked."""
        view, at, checksum = memoryview(out), 0, 0
        with self._named():
            while at < len(view):
                n = os.preadv(self._file.fileno(), [view[at : at + _CHUNK]], storage.start + at)
                if not n:
                    raise Refused(f"storage {storage.key} breaks off")
                checksum = zlib.crc32(view[at : at + n], checksum)
                at += n
            if checksum != storage.checksum:
                raise Refused(f"storage {storage.key} is damaged (its checksum differs)")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Whatever is wrong with the file becomes one sentence that names it."""
        try:
            yield
        except Refused as reason:
            raise UserError(
                f"{self.path} is not read: {reason}; take an intact copy of a torch.save file."
            ) from None
        except (
            zipfile.BadZipFile,
            zipfile.LargeZipFile,
            NotImplementedError,
            ValueError,
            EOFError,
            struct.error,
        ) as e:
            raise UserError(
                f"{self.path} is truncated or not a torch.save file ({e}); copy or download it again."
            ) from None
        except OSError as error:
            raise UserError(f"Cannot read {self.path} ({error.strerror}); check the disk it is on.") from None


class _StorageType:
    """Stands for `torch.FloatStorage` and its like, which a file names and never calls."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype

    def __call__(self, *arguments):
        raise Refused("it calls a storage type")


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


# --------------------------------------------------------------------------------------------------------
# Writing


def write_torch_file(path: Path, tree: Any) -> None:
    """Write `tree` (dicts, lists, tuples, strings, numbers, None and numpy arrays) as `torch.save` would.

    `torch.load(path, weights_only=True)` gives it back with tensors in place of the arrays. The file appears
    complete or not at all.
    """
    arrays: list = []
    pickled = _Emitter(arrays).emit(tree)
    root = Path(path).stem
    with atomic_path(path) as scratch, friendly_os_errors(path), zipfile.ZipFile(scratch, "w") as archive:
        _store(archive, f"{root}/data.pkl", pickled)
        _store(archive, f"{root}/byteorder", b"little")
        for key, array in enumerate(arrays):
            _store(archive, f"{root}/data/{key}", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        _store(archive, f"{root}/version", b"3\n")


def _store(archive: zipfile.ZipFile, name: str, data) -> None:
    """One entry, its bytes on a multiple of 64 so that the file can be mapped into memory."""
    entry = zipfile.ZipInfo(name)  # a fixed date: equal content, equal file
    start = archive.fp.tell() + 30 + len(name) + 4
    padding = -start % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(entry, data)


class _Emitter:
    """Pickle protocol 2 as torch writes it; the classes are names here, since torch is not imported."""

    def __init__(self, arrays: list):
        self.arrays = arrays

    def emit(self, tree) -> bytes:
        return b"\x80\x02" + self._value(tree) + b"."

    def _value(self, value) -> bytes:
        if isinstance(value, np.ndarray):
            return self._tensor(value)
        if isinstance(value, dict):
            items = b"".join(self._value(k) + self._value(v) for k, v in value.items())
            return b"}(" + items + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(self._value, value)) + b"e"
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self._value, value)) + b"t"
        if value is None or type(value) in (bool, int, float, str):
            return pickle.dumps(value, protocol=2)[2:-1]  # without the first and the last instruction
        raise TypeError(f"{type(value).__name__} has no place in a torch file")

    def _tensor(self, array: np.ndarray) -> bytes:
        key = str(len(self.arrays))
        self.arrays.append(array)
        kind = _STORAGES[array.dtype]
        storage = b"(" + self._value("storage") + f"ctorch\n{kind}\n".encode()
        storage += self._value(key) + self._value("cpu") + self._value(array.size) + b"tQ"
        shape = self._value(tuple(array.shape)) + self._value(_c_strides(array.shape))
        hooks = b"ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + b"\x89" + hooks + b"tR"
