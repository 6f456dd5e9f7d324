"""Hostile and damaged files, byte by byte; run as a program, it reads one of them under tight limits."""

import gc
import json
import os
import pickle
import pickletools
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacontext_jax.data.tokenizer_files import SPECIAL_TOKENS, from_pickle
from megacontext_jax.errors import UserError
from megacontext_jax.interop.torch_file import StoredTensor, TorchFile

# --- pickles, as raw instructions


def plain(value: Any) -> bytes:
    """Instructions that push a plain value, and remember nothing."""
    return pickletools.optimize(pickle.dumps(value, protocol=3))[2:-1]


def program(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def many(*parts: bytes) -> bytes:
    """Instructions that push a tuple of what each part pushes."""
    return b"(" + b"".join(parts) + b"t"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def named_on_stack(module: str, name: str) -> bytes:
    return plain(module) + plain(name) + b"\x93"


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return named(module, name) + many(*arguments) + b"R"


def memo(index: int) -> bytes:
    return b"h" + bytes([index])


ORDERED_DICT = call("collections", "OrderedDict")


def storage(key: Any = "0", kind: str = "FloatStorage", count: Any = 12, module: str = "torch") -> bytes:
    return many(plain("storage"), named(module, kind), plain(key), plain("cpu"), plain(count)) + b"Q"


def tensor(
    offset: Any = 0, shape: Any = (12,), strides: Any = (1,), *more: bytes, of: bytes | None = None
) -> bytes:
    numbers = (plain(offset), plain(shape), plain(strides))
    of = storage() if of is None else of
    return call("torch._utils", "_rebuild_tensor_v2", of, *numbers, plain(False), ORDERED_DICT, *more)


# --- zip archives, with every field open to lies


@dataclass
class Entry:
    """One file of an archive; what is None is filled in truthfully."""

    name: str | bytes
    data: bytes = b""
    method: int = 0
    flags: int = 0
    size: int | None = None
    packed: int | None = None
    crc: int | None = None
    offset: int | None = None  # of its header, as the directory announces it
    extra: bytes = b""  # in the directory
    stored: bool = True  # False: announced in the directory, its header and bytes are not written


def archive(
    entries: Iterable[Entry], *, comment: bytes = b"", zip64: tuple[int, int] | None = None, **lies: int
) -> bytes:
    """A zip file.

    Args:
        zip64: (length, offset) of the directory, announced in a zip64 record.
        lies: "length" and "offset" of the directory in the usual record.
    """
    body, directory, count = bytearray(), bytearray(), 0
    for entry in entries:
        name = entry.name.encode() if isinstance(entry.name, str) else entry.name
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        size = len(entry.data) if entry.size is None else entry.size
        packed = size if entry.packed is None else entry.packed
        offset = len(body) if entry.offset is None else entry.offset
        flags = entry.flags | 0x800
        common = struct.pack("<5H3I2H", 20, flags, entry.method, 0, 33, crc, packed, size, len(name), 0)
        if entry.stored:
            body += b"PK\x03\x04" + common + name + entry.data
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + common[:-2]
        directory += struct.pack("<4H2I", len(entry.extra), 0, 0, 0, 0, offset) + name + entry.extra
        count += 1
    end = struct.pack("<4H", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF))
    end += struct.pack("<2I", lies.get("length", len(directory)), lies.get("offset", len(body)))
    far = b""
    if zip64:
        far = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, *zip64)
        far += b"PK\x06\x07" + struct.pack("<IQI", 0, len(body) + len(directory), 1)
    end = b"PK\x05\x06" + end + struct.pack("<H", len(comment)) + comment
    return bytes(body + directory) + far + end


def torch_entries(
    pickled: bytes, storages: Mapping[str, bytes] | None = None, *, root: str = "m", order: bytes = b"little"
) -> list[Entry]:
    storages = {"0": bytes(48)} if storages is None else storages
    entries = [Entry(f"{root}/data.pkl", pickled), Entry(f"{root}/byteorder", order)]
    entries += [Entry(f"{root}/data/{key}", data) for key, data in storages.items()]
    return [*entries, Entry(f"{root}/version", b"3\n")]


def torch_bytes(pickled: bytes, storages: Mapping[str, bytes] | None = None, **options) -> bytes:
    return archive(torch_entries(pickled, storages, **options))


# --- nanochat's tokenizer


def tokenizer_state(**changes) -> dict[str, Any]:
    """The state of a byte-level tokenizer; a change to None removes the entry."""
    state = {
        "name": "rustbpe",
        "pat_str": r"\p{L}+|\s+|.",
        "mergeable_ranks": {bytes([i]): i for i in range(256)},
        "special_tokens": {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)},
    } | changes
    return {key: value for key, value in state.items() if value is not None}


def tokenizer_bytes(state: Any) -> bytes:
    return program(named("tiktoken.core", "Encoding"), b")\x81", pickle.dumps(state, protocol=3)[2:-1], b"b")


# --- reading


def content(tree: Any) -> Any:
    """A tree with each tensor's dtype, shape and bytes in its place; for small trees."""
    if isinstance(tree, dict):
        return {key: content(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(content, tree))
    if isinstance(tree, StoredTensor):
        array = tree.read()
        return array.dtype.name, array.shape, array.tobytes()
    return tree


def read_torch(path: Path) -> Any:
    with TorchFile(path) as file:
        return content(file.tree)


def visit_torch(path: Path) -> None:
    """Reads every tensor of a tree of any depth, each object once."""
    with TorchFile(path) as file:
        waiting, seen = [file.tree], set()
        while waiting:
            value = waiting.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, StoredTensor):
                value.read()
            elif isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, list | tuple):
                waiting += value


def limited(read: Callable[[Path], Any], path: Path, memory: int, seconds: int) -> None:
    """Reads a file with at most `memory` more bytes of addresses and a small stack; prints the outcome."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for limit, amount in {
        resource.RLIMIT_AS: pages * resource.getpagesize() + memory,
        resource.RLIMIT_CPU: int(time.process_time()) + seconds + 1,
        resource.RLIMIT_STACK: 1 << 20,
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(limit, (amount, amount))
    start, message = time.process_time(), None
    try:
        read(path)
    except UserError as error:
        message = str(error)
    print(json.dumps({"message": message, "seconds": time.process_time() - start}), flush=True)


def main(kind: str, memory: int, seconds: int, paths: list[Path]) -> None:
    """Reads each file in a process of its own; prints a line of JSON for each."""
    read = {"torch": visit_torch, "tokenizer": from_pickle}[kind]
    gc.freeze()
    for path in paths:
        child = os.fork()
        if child == 0:
            limited(read, path, memory, seconds)
            gc.collect()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"ended": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [Path(path) for path in sys.argv[4:]])
