"""Hostile and damaged `torch.save` files and tokenizers: a clear error each time, nothing run, little memory."""

import builtins
import codecs
import copyreg
import importlib
import io
import json
import os
import pickle
import posix
import random
import runpy
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from megacontext_jax import safe_pickle
from megacontext_jax.data import tokenizer_files
from megacontext_jax.errors import UserError
from megacontext_jax.interop.torch_file import TorchFile, write_torch_file
from megacontext_jax.safe_pickle import Refused
from tests.interop import hostile
from tests.interop.hostile import (
    ORDERED_DICT,
    Entry,
    archive,
    call,
    many,
    memo,
    named,
    named_on_stack,
    plain,
    program,
    read_torch,
    storage,
    tensor,
    tokenizer_bytes,
    tokenizer_state,
    torch_bytes,
    torch_entries,
    visit_torch,
)

MIB = 1 << 20
ZEROS = ("float32", (12,), bytes(48))  # what the builders' usual tensor holds
PERMITTED = {"collections.OrderedDict": lambda: safe_pickle.Attributes()}
RANKS, SPECIALS = tokenizer_state()["mergeable_ranks"], tokenizer_state()["special_tokens"]
TOKENIZER_PKL = Path(__file__).parents[1] / "golden/pipeline_classic/base_dir/tokenizer/tokenizer.pkl"


@pytest.fixture
def save(tmp_path):
    """Writes bytes to a file."""

    def write(data: bytes, name: str = "model_000001.pt") -> Path:
        path = tmp_path / name
        path.unlink(missing_ok=True)  # writing over an old file is slow
        path.write_bytes(data)
        return path

    return write


def refusal(path: Path, read=read_torch) -> str:
    """What the user is told about a file that must not be read."""
    with pytest.raises(UserError) as caught:
        read(path)
    return checked_message(str(caught.value), path)


def checked_message(message: str, path: Path) -> str:
    assert str(path) in message
    assert message.isprintable(), ascii(message)
    assert len(message) - len(str(path)) < 400
    assert message.endswith(".")
    assert " ()" not in message, "the reason is missing"
    return message


def value_or_refusal(path: Path, read=read_torch):
    """What is read, or None where the file is refused in good form."""
    try:
        return read(path)
    except UserError as error:
        checked_message(str(error), path)
        return None


@contextmanager
def traced(limit: int):
    """Within, Python and numpy hold no more than `limit` further bytes at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


READERS = {
    "torch": (read_torch, torch_bytes),
    "tokenizer": (tokenizer_files.from_pickle, bytes),
}

_TRAPS = [
    (os, "system"),
    (posix, "system"),
    (subprocess, "Popen"),
    (builtins, "eval"),
    (builtins, "exec"),
    (pickle, "loads"),
    (pickle, "Unpickler"),
    (runpy, "run_path"),
    (importlib, "import_module"),
    (codecs, "encode"),
]


@contextmanager
def nothing_runs(folder: Path, monkeypatch):
    """Within, whatever a payload could call is a trap, and `canary_module` leaves a file when imported."""
    canary, ran = folder / "canary", []
    modules = folder / "modules"
    modules.mkdir()
    (modules / "canary_module.py").write_text(f"open({str(canary)!r}, 'w')\ndef run(*_): pass\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(modules)
        for module, name in _TRAPS:
            patch.setattr(module, name, lambda *a, _n=name, **k: ran.append(_n))
        yield canary
    assert ran == []
    assert not canary.exists()
    assert "canary_module" not in sys.modules


@pytest.mark.parametrize("module", ["os", "canary_module"])
def test_the_traps_notice_what_runs(tmp_path, monkeypatch, module):
    name = {"os": "system", "canary_module": "run"}[module]
    with pytest.raises(AssertionError), nothing_runs(tmp_path, monkeypatch), suppress(AttributeError):
        pickle._loads(program(call(module, name, plain("true"))))
    sys.modules.pop("canary_module", None)


# --------------------------------------------------------------------------------------------------------
# Running code

FOREIGN_NAMES = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("__builtin__", "eval"),
    ("subprocess", "Popen"),
    ("subprocess", "check_output"),
    ("functools", "partial"),
    ("functools", "reduce"),
    ("operator", "attrgetter"),
    ("operator", "methodcaller"),
    ("itertools", "starmap"),
    ("importlib", "import_module"),
    ("runpy", "run_path"),
    ("pickle", "loads"),
    ("_pickle", "Unpickler"),
    ("copyreg", "_reconstructor"),
    ("copyreg", "add_extension"),
    ("codecs", "encode"),
    ("_codecs", "encode"),
    ("types", "FunctionType"),
    ("webbrowser", "open"),
    ("shutil", "rmtree"),
    ("pathlib", "Path.unlink"),
    ("sys", "modules"),
    ("__main__", "run"),
    ("canary_module", "run"),
    ("numpy", "load"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("torch", "load"),
    ("torch", "Tensor"),
    ("torch.hub", "load"),
    ("torch.serialization", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch._dynamo.guards", "GuardBuilder.get"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("torch", "FloatStorage.from_file"),
    ("tiktoken", "get_encoding"),
    ("tiktoken.registry", "get_encoding"),
    ("tiktoken_ext.openai_public", "gpt2"),
    ("tiktoken.core", "Encoding.__init__"),
    ("tiktoken.core", "Encoding.__class__"),
    ("megacontext_jax.safe_pickle", "loads"),
    ("megacontext_jax.safe_pickle", "Global"),
    ("collections", "OrderedDict.fromkeys"),
    ("collections", "OrderedDict.__init__.__globals__"),
    ("collections.OrderedDict", "fromkeys"),
    ("collections", "orderedDict"),
    ("collections", "OrderedDict "),
    ("collections", "\N{GREEK CAPITAL LETTER OMICRON}rderedDict"),
    ("collections", "OrderedDic\N{MATHEMATICAL BOLD SMALL T}"),
    ("", "collections.OrderedDict"),
    ("collections.", "OrderedDict"),
]
UNSPEAKABLE_NAMES = [
    ("os\nsystem", "run"),
    ("collections", "OrderedDict\n"),
    ("collections", "OrderedDict\0"),
    ("os", "\x1b[2J\x07system"),
    ("os", "\N{RIGHT-TO-LEFT OVERRIDE}metsys"),
    ("os", "\N{ZERO WIDTH SPACE}system"),
    ("os", "\ud800"),
    ("os", "s" * 100_000),
    ("\x1b" * 100_000, "system"),
]


def shown(module: str, name: str) -> set[str]:
    """Ways to show a name to a user."""
    full = f"{module}.{name}"
    return {form(full)[1:-1][:60] for form in (repr, ascii)}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("spell", [named, named_on_stack], ids=["GLOBAL", "STACK_GLOBAL"])
@pytest.mark.parametrize(("module", "name"), FOREIGN_NAMES, ids=lambda part: ascii(part)[1:-1])
def test_a_foreign_name_is_neither_found_nor_called(save, tmp_path, monkeypatch, kind, spell, module, name):
    read, pack = READERS[kind]
    known = module in sys.modules
    with nothing_runs(tmp_path, monkeypatch) as canary:
        payload = spell(module, name) + many(plain(f"touch {canary}")) + b"R"
        message = refusal(save(pack(program(payload))), read)
    assert any(form in message for form in shown(module, name))
    assert (module in sys.modules) == known


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(("module", "name"), UNSPEAKABLE_NAMES, ids=range(len(UNSPEAKABLE_NAMES)))
def test_a_name_that_cannot_be_printed_is_refused_in_print(save, kind, module, name):
    read, pack = READERS[kind]
    stacked = b"".join(
        b"X" + struct.pack("<I", len(raw)) + raw
        for raw in (part.encode("utf-8", "surrogatepass") for part in (module, name))
    )
    message = refusal(save(pack(program(stacked, b"\x93)R"))), read)
    assert any(form[:30] in message for form in shown(module, name))


@pytest.mark.parametrize("spell", [named, named_on_stack], ids=["GLOBAL", "STACK_GLOBAL"])
def test_a_foreign_name_is_refused_even_when_unused(spell):
    with pytest.raises(Refused, match=r"os\.system"):
        safe_pickle.loads(program(spell("os", "system"), b"0N"), permitted=PERMITTED)


OTHER_WAYS_TO_CALL = {
    "INST": (b"(" + plain("true") + b"ios\nsystem\n", "INST"),
    "INST permitted": (b"(icollections\nOrderedDict\n", "INST"),
    "OBJ": (b"(" + named("os", "system") + plain("true") + b"o", "os.system"),
    "OBJ permitted": (b"(" + named("collections", "OrderedDict") + b"o", "OBJ"),
    "NEWOBJ": (named("os", "system") + many(plain("true")) + b"\x81", "os.system"),
    "NEWOBJ_EX": (named("collections", "OrderedDict") + b")}\x92", "NEWOBJ_EX"),
    "EXT1": (b"\x82\x01" + many(plain("true")) + b"R", "EXT1"),
    "EXT2": (b"\x83\x01\x00)R", "EXT2"),
    "EXT4": (b"\x84\x01\x00\x00\x00)R", "EXT4"),
    "PERSID": (b"Pos.system\n", "PERSID"),
    "BINPERSID of a name": (named("os", "system") + b"Q", "os.system"),
    "BINPERSID of text": (plain("os.system") + b"Q", "refers to"),
    "REDUCE of text": (plain("os.system") + many(plain("true")) + b"R", "not a permitted name"),
    "REDUCE of a result": (ORDERED_DICT + b")R", "not a permitted name"),
    "REDUCE with a list": (named("collections", "OrderedDict") + b"]R", "not a permitted name"),
    "REDUCE with a name": (named("collections", "OrderedDict") * 2 + b"R", "not a permitted name"),
    "NEXT_BUFFER": (b"\x97", "NEXT_BUFFER"),
    "READONLY_BUFFER": (plain("x") + b"\x98", "READONLY_BUFFER"),
}


@pytest.mark.parametrize(("payload", "word"), OTHER_WAYS_TO_CALL.values(), ids=OTHER_WAYS_TO_CALL)
def test_other_ways_to_call_are_refused(save, tmp_path, monkeypatch, payload, word):
    copyreg.add_extension("os", "system", 1)
    try:
        with nothing_runs(tmp_path, monkeypatch):
            assert word in refusal(save(torch_bytes(program(payload))))
    finally:
        copyreg.remove_extension("os", "system", 1)


STATE = b"}(" + b"".join(
    plain(key) + plain(value)
    for key, value in {"find": 1, "permitted": {}, "call": 2, "__setstate__": 3, "__class__": 4, "__dict__": {}}.items()
) + b"u"  # fmt: skip


STATES = {
    "dict": STATE,
    "slots": many(b"N", STATE),
    "dict and slots": many(STATE, STATE),
    "None": b"N",
    "text": plain("text"),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize(
    "target",
    [
        named("collections", "OrderedDict"),
        named("torch", "FloatStorage"),
        storage(),
        tensor(),
        b"}",
        b"]",
        b")",
        b"N",
        plain("text"),
    ],
    ids=["name", "storage type", "storage", "tensor", "dict", "list", "tuple", "None", "text"],
)
def test_state_is_set_on_nothing_of_ours(save, target, state):
    assert "sets the state" in refusal(save(torch_bytes(program(target, state, b"b"))))


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_state_of_an_ordered_dict_is_dropped(save, state):
    with TorchFile(save(torch_bytes(program(ORDERED_DICT, plain("a"), b"K\x01s", state, b"b")))) as file:
        assert file.tree == {"a": 1}
        assert not any(key in vars(file.tree) for key in ("find", "permitted", "call", "__setstate__"))
        assert file.tree.__class__ is safe_pickle.Attributes


def test_loading_leaves_the_reader_as_it_was(save):
    before = dict(safe_pickle._HANDLERS)
    value_or_refusal(save(torch_bytes(program(ORDERED_DICT, STATE, b"b"))))
    assert before == safe_pickle._HANDLERS


# --------------------------------------------------------------------------------------------------------
# Permitted names with arguments they do not have

V2, PARAMETER = ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")
NUMBERS = (plain(0), plain((12,)), plain((1,)), plain(False), ORDERED_DICT)

BAD_CALLS = {
    "tensor of nothing": call(*V2),
    "tensor of a storage alone": call(*V2, storage()),
    "tensor with 5 arguments": call(*V2, storage(), *NUMBERS[:-1]),
    "tensor with metadata that negates": tensor(0, (12,), (1,), b"}" + plain("neg") + b"\x88s"),
    "tensor with metadata that conjugates": tensor(0, (12,), (1,), b"}" + plain("conj") + b"\x88s"),
    "tensor with 8 arguments": tensor(0, (12,), (1,), b"N", b"N"),
    "tensor with 50 arguments": tensor(0, (12,), (1,), *[b"N"] * 44),
    "tensor of None": tensor(of=b"N"),
    "tensor of text": tensor(of=plain("0")),
    "tensor of a dict": tensor(of=b"}"),
    "tensor of a storage type": tensor(of=named("torch", "FloatStorage")),
    "tensor of a tensor": tensor(of=tensor()),
    "tensor of a storage reference": tensor(of=storage()[:-1]),
    **{
        f"offset {value!r}": tensor(value, (1,), (1,))
        for value in (-1, 12, 13, True, 1.5, "0", None, (0,), 2**31, 2**48, 2**63, 2**64, -(2**63), 2**200)
    },
    "offset of 126 bytes": tensor(2**1000, (1,), (1,)),
    **{
        f"shape {shape!r} strides {strides!r}": tensor(0, shape, strides)
        for shape, strides in [
            ([12], [1]),
            ((12,), [1]),
            ([12], (1,)),
            (12, 1),
            (None, None),
            ("12", "1"),
            ({12: 1}, {1: 1}),
            ((12,), ()),
            ((), (1,)),
            ((3, 4), (1,)),
            ((True,), (1,)),
            ((12,), (True,)),
            ((12.0,), (1,)),
            (("12",), (1,)),
            ((None,), (None,)),
            (((12,),), (1,)),
            ((-12,), (1,)),
            ((-1, -12), (12, 1)),
            ((12,), (-1,)),
            ((2,), (-(2**62),)),
            ((13,), (1,)),
            ((12,), (2,)),
            ((4, 4), (4, 1)),
            ((10**6, 10**6), (0, 0)),
            ((10**12,), (0,)),
            ((13,), (0,)),
            ((2**40,), (1,)),
            ((2**24, 2**24, 2**24), (1, 1, 1)),
            ((2**47,) * 8, (0,) * 8),
            ((2**63,), (1,)),
            ((2,), (2**47,)),
            ((1,) * 9, (1,) * 9),
            ((1,) * 30, (1,) * 30),
        ]
    },
    "parameter of nothing": call(*PARAMETER),
    "parameter of None": call(*PARAMETER, b"N", b"\x88", ORDERED_DICT),
    "parameter of a storage": call(*PARAMETER, storage(), b"\x88", ORDERED_DICT),
    "parameter of a list": call(*PARAMETER, b"]", b"\x88", ORDERED_DICT),
    "parameter of a name": call(*PARAMETER, named(*PARAMETER), b"\x88", ORDERED_DICT),
    "storage type called": call("torch", "FloatStorage"),
    "storage type called with a size": call("torch", "FloatStorage", plain(10**12)),
    "storage type as a new object": named("torch", "FloatStorage") + many(plain(10**12)) + b"\x81",
    "ordered dict of a number": call("collections", "OrderedDict", plain(1)),
    "ordered dict of text": call("collections", "OrderedDict", plain("text")),
    "ordered dict of a list in a list": call("collections", "OrderedDict", plain([[[], 1]])),
    "ordered dict of two": call("collections", "OrderedDict", plain({}), plain({})),
    "ordered dict of a name": call("collections", "OrderedDict", named("torch", "FloatStorage")),
    "ordered dict of a tensor": call("collections", "OrderedDict", tensor()),
}


@pytest.mark.parametrize("payload", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments_are_refused(save, tmp_path, monkeypatch, payload):
    with nothing_runs(tmp_path, monkeypatch):
        refusal(save(torch_bytes(program(payload))))


def reference(*parts: bytes) -> bytes:
    return many(*parts) + b"Q"


FLOAT = named("torch", "FloatStorage")
BAD_STORAGES = {
    "empty reference": reference(),
    "short reference": reference(plain("storage"), FLOAT, plain("0"), plain("cpu")),
    "long reference": reference(plain("storage"), FLOAT, plain("0"), plain("cpu"), plain(12), plain(None)),
    "list": plain(["storage"]) + b"Q",
    "None": b"NQ",
    "another tag": reference(plain("module"), FLOAT, plain("0"), plain("cpu"), plain(12)),
    "type as text": reference(plain("storage"), plain("FloatStorage"), plain("0"), plain("cpu"), plain(12)),
    "type that is a function": reference(plain("storage"), named(*V2), plain("0"), plain("cpu"), plain(12)),
    **{
        f"key {key!r}": storage(key)
        for key in (
            0, None, b"0", ["0"], "", "1", "00", "../0", "../../../etc/passwd", "/etc/passwd", "..", "0/../0", "0/",
            "./0", "0\\", "..\\0", "0\0", "0\n", " 0", "0.", "C:0", "a" * 65, "a" * 10**6, "\x1b[2J",
            "\N{ARABIC-INDIC DIGIT ZERO}", "\N{FULLWIDTH DIGIT ZERO}", "data.pkl",
        )
    },
    **{
        f"count {count!r}": storage(count=count)
        for count in (11, 13, 48, 0, -12, 12.0, "12", None, True, [12], 2**31, 2**62, 2**64, 10**150, -(10**150))
    },
    **{
        f"type {module}.{kind}": storage(kind=kind, module=module)
        for module, kind in [
            ("torch", "ComplexFloatStorage"),
            ("torch", "ComplexDoubleStorage"),
            ("torch", "QUInt8Storage"),
            ("torch", "QInt32Storage"),
            ("torch", "Float8_e4m3fnStorage"),
            ("torch", "UntypedStorage"),
            ("torch.storage", "UntypedStorage"),
            ("torch.storage", "TypedStorage"),
            ("torch.cuda", "FloatStorage"),
            ("torch", "float32"),
            ("torch", "DoubleStorage"),
            ("torch", "HalfStorage"),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("payload", BAD_STORAGES.values(), ids=[ascii(name)[1:60] for name in BAD_STORAGES])
def test_bad_storages_are_refused(save, payload):
    refusal(save(torch_bytes(program(tensor(of=payload)))))


def test_a_float8_tensor_is_refused_by_name(save):
    untyped = storage(kind="UntypedStorage", module="torch.storage", count=48)
    numbers = (plain(0), plain((48,)), plain((1,)), plain(False), ORDERED_DICT)
    payload = call("torch._utils", "_rebuild_tensor_v3", untyped, *numbers, named("torch", "float8_e4m3fn"))
    message = refusal(save(torch_bytes(program(payload))))
    assert "_rebuild_tensor_v3" in message


def test_a_module_split_at_another_dot_names_the_same(save):
    payload = tensor().replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\n_utils._rebuild_tensor_v2\n")
    value = value_or_refusal(save(torch_bytes(program(payload))))
    assert value in (None, ZEROS)


# --------------------------------------------------------------------------------------------------------
# Damaged pickles


def loaded(data: bytes):
    return safe_pickle.loads(data, permitted=PERMITTED)


VALUE = {
    "numbers": [0, -1, 255, 65536, -(2**31), 2**31, 2**400, 1.5, float("inf"), True, False, None],
    "text": ["", "plain", "\N{GREEK SMALL LETTER ALPHA}\N{PILE OF POO}", "long" * 100],
    "bytes": [b"", b"\0\xff", bytes(300)],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, (4,))],
    7: {b"key": {}, "empty": []},
}
SMALL = program(
    b"}(" + plain("a") + b"](K\x01M\x00\x01J\x00\x00\x01\x00G" + struct.pack(">d", 2.5) + b"e",
    plain("b") + ORDERED_DICT + b"q\x05}" + plain("_metadata") + b"Nsb" + plain("c") + b"h\x05u",
)  # fmt: skip


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values_are_read(protocol):
    assert loaded(pickle.dumps(VALUE, protocol)) == VALUE


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_old_protocols_are_read_or_refused(protocol):
    value = {"a": [1, 2.5, None, True, "text", (1, 2)], "b": {"c": 7}}
    try:
        assert loaded(pickle.dumps(value, protocol)) == value
    except Refused:
        assert protocol < 2


@pytest.mark.parametrize("protocol", [6, 7, 128, 255])
def test_a_future_protocol_is_refused(protocol):
    with pytest.raises(Refused, match=f"protocol is {protocol}"):
        loaded(b"\x80" + bytes([protocol]) + b"N.")


def test_a_small_pickle_cut_anywhere_is_refused():
    assert loaded(SMALL)["a"] == [1, 256, 65536, 2.5]
    for length in range(len(SMALL)):
        with pytest.raises(Refused):
            loaded(SMALL[:length])


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_big_pickle_cut_at_every_percent_is_refused(protocol):
    data = pickle.dumps({f"layer.{i}": [i, i / 7, "x" * (i % 50)] for i in range(1000)}, protocol)
    for percent in range(100):
        with pytest.raises(Refused):
            loaded(data[: len(data) * percent // 100])


def test_a_pickle_with_any_bit_flipped_is_read_or_refused():
    for at in range(len(SMALL)):
        for mask in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            data = bytearray(SMALL)
            data[at] ^= mask
            with suppress(Refused):
                loaded(bytes(data))


LONG_LENGTHS = [2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
BAD_PICKLES = {
    "empty": b"",
    "only a protocol": b"\x80\x02",
    "no STOP": b"\x80\x02N",
    "STOP on an empty stack": b"\x80\x02.",
    "two values at STOP": b"\x80\x02NN.",
    "open MARK at STOP": b"\x80\x02(N.",
    "name without an end": b"\x80\x02c" + b"a" * 100_000,
    "name that is not UTF-8": b"\x80\x02c\xff\xfe\nx\n.",
    "text that is not UTF-8": b"\x80\x02X\x02\0\0\0\xff\xfe.",
    "name on an empty stack": b"\x80\x04\x93.",
    **{
        f"underflow {code!r}": b"\x80\x04" + code + b"."
        for code in (b"0", b"1", b"a", b"e", b"t", b"s", b"u", b"R", b"b", b"\x81", b"\x93", b"\x85", b"\x87", b"Q",
                     b"q\0", b"r\0\0\0\0", b"\x94", b"Na", b"Ns", b"NNs", b"Nb", b"NR", b"N\x86", b"NN\x87", b"(a")
    },
    "unknown memo": b"\x80\x02h\x00.",
    "unknown long memo": b"\x80\x02j\xff\xff\xff\xff.",
    "APPEND to a tuple": b"\x80\x02)Na.",
    "APPEND to a dict": b"\x80\x02}Na.",
    "APPENDS to None": b"\x80\x02N(Ne.",
    "SETITEM of a list": b"\x80\x02]K\x00Ns.",
    "SETITEMS of a key alone": b"\x80\x02}(Nu.",
    "list as key": b"\x80\x02}]Ns.",
    "dict as key": b"\x80\x02}}Ns.",
    "list in a tuple as key": b"\x80\x02}]\x85Ns.",
    "ordered dict as key": b"\x80\x02}" + ORDERED_DICT + b"Ns.",
    "name as key": b"\x80\x02}" + named("collections", "OrderedDict") + b"Ns.",
    "LONG1 of 255 bytes": b"\x80\x02\x8a\xff" + bytes(255) + b".",
    "integer as digits": b"\x80\x02I" + b"9" * 5000 + b"\n.",
    **{
        f"{name} of {length} bytes": b"\x80\x04" + code + struct.pack(layout, length) + b"xyz."
        for name, code, layout in [
            ("BINUNICODE", b"X", "<I"), ("BINUNICODE8", b"\x8d", "<Q"), ("BINBYTES", b"B", "<I"),
            ("BINBYTES8", b"\x8e", "<Q"), ("BYTEARRAY8", b"\x96", "<Q"), ("LONG4", b"\x8b", "<I"),
            ("BINSTRING", b"T", "<I"),
        ]
        for length in LONG_LENGTHS
        if length < 2 ** (8 * struct.calcsize(layout))
    },
}  # fmt: skip


@pytest.mark.parametrize("data", BAD_PICKLES.values(), ids=BAD_PICKLES)
def test_a_malformed_pickle_is_refused(save, data):
    with traced(MIB), pytest.raises(Refused):
        loaded(data)
    refusal(save(torch_bytes(data)))


UNUSED_INSTRUCTIONS = {
    "DUP": b"N2", "FLOAT": b"F1.5\n", "INT": b"I1\n", "LONG": b"L1L\n", "STRING": b"S'a'\n", "UNICODE": b"Va\n",
    "BINSTRING": b"T\0\0\0\0", "SHORT_BINSTRING": b"U\0", "PUT": b"Np0\n", "GET": b"g0\n", "LIST": b"(l",
    "DICT": b"(d", "LONG4": b"\x8b\0\0\0\0", "EMPTY_SET": b"\x8f", "ADDITEMS": b"\x8f(K\1\x90", "FROZENSET": b"(\x91",
    "BYTEARRAY8": b"\x96" + bytes(8), "none such": b"\xff", "NUL": b"\0",
}  # fmt: skip


@pytest.mark.parametrize("payload", UNUSED_INSTRUCTIONS.values(), ids=UNUSED_INSTRUCTIONS)
def test_an_instruction_without_use_is_refused(payload):
    with pytest.raises(Refused, match="instruction"):
        loaded(program(payload))


@pytest.mark.parametrize("length", [0, 1, *LONG_LENGTHS])
def test_a_frame_of_any_length_is_harmless(length):
    assert loaded(b"\x80\x04\x95" + struct.pack("<Q", length) + b"K\x07.") == 7


@pytest.mark.parametrize("index", [255, 2**31, 2**32 - 1])
def test_a_huge_memo_index_costs_nothing(index):
    packed = struct.pack("<I", index)
    with traced(MIB):
        assert loaded(program(b"K\x07r" + packed + b"0j" + packed)) == 7


def test_bytes_after_the_end_change_nothing():
    first = program(plain({"a": 1}))
    for rest in (b"\0", b"garbage", program(plain({"b": 2})), program(named("os", "system"))):
        assert loaded(first + rest) == {"a": 1}


def test_a_structure_that_contains_itself_is_read():
    itself = loaded(program(b"]q\0h\0a"))
    assert itself[0] is itself
    itself = loaded(program(b"}q\0K\x01h\0s"))
    assert itself[1] is itself


# --------------------------------------------------------------------------------------------------------
# Mutations with honest checksums


def test_a_description_with_any_bit_flipped_is_read_or_refused(save):
    good = program(many(tensor(2, (2, 5), (5, 1)), call(*PARAMETER, tensor(), b"\x88", ORDERED_DICT)))
    for at in range(len(good)):
        for mask in (1, 4, 32, 128, 255):
            data = bytearray(good)
            data[at] ^= mask
            value_or_refusal(save(torch_bytes(bytes(data))), visit_torch)


@pytest.mark.parametrize("seed", range(4))
def test_random_instructions_are_read_or_refused(save, seed):
    choose = random.Random(seed)
    pieces = [
        *(bytes([code]) for code in safe_pickle._HANDLERS),
        *(bytes([code]) for code in range(256)),
        *b"h\0 h\1 q\0 q\1 ( t ) } ] u e a s R b .".split() * 8,
        *[plain(value) for value in (0, 1, -1, 12, 2**40, 1.5, "0", "storage", (12,), (1,), None, True)] * 4,
        *[storage(), tensor(), tensor()[:-1], ORDERED_DICT, named(*V2), named(*PARAMETER), FLOAT] * 4,
    ]
    for _ in range(500):
        data = program(*choose.choices(pieces, k=choose.randrange(1, 40)))
        value_or_refusal(save(torch_bytes(data)), visit_torch)


# --------------------------------------------------------------------------------------------------------
# Damaged archives

DTYPES = [
    np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_,
]  # fmt: skip


def every_bit_pattern(dtype, count: int = 1 << 16) -> np.ndarray:
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return np.arange(count) % 3 == 0
    bits = np.random.default_rng(0).integers(0, 256, count * dtype.itemsize, np.uint8)
    if dtype.itemsize == 2:
        bits = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)[: len(bits)]
    return bits.view(dtype)


def sample_tree() -> dict:
    return {
        "model": {f"w.{np.dtype(d).name}": every_bit_pattern(d, 24).reshape(2, 12) for d in DTYPES},
        "step": 7,
        "nested": [
            {"lr": 0.5, "betas": (0.9, 0.95), "name": "\N{GREEK SMALL LETTER ETA}", "none": None, "on": True}
        ],
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }


def test_a_file_cut_at_every_percent_is_refused(tmp_path, save):
    write_torch_file(tmp_path / "whole.pt", sample_tree())
    data = (tmp_path / "whole.pt").read_bytes()
    for length in (
        *(len(data) * percent // 100 for percent in range(100)),
        *range(len(data) - 40, len(data)),
    ):
        refusal(save(data[:length]))


def test_a_file_with_any_byte_changed_is_refused_or_equal(tmp_path, save):
    path = tmp_path / "model_000001.pt"
    write_torch_file(
        path, {"a": np.arange(7, dtype=np.float32), "b": [every_bit_pattern(np.int8, 5), "text", 1]}
    )
    data, expected, refused = path.read_bytes(), read_torch(path), set()
    for at in range(len(data)):
        for mask in (1, 0xFF):
            changed = bytearray(data)
            changed[at] ^= mask
            value = value_or_refusal(save(bytes(changed)))
            assert value in (None, expected), at
            if value is None:
                refused.add((at, mask))
    with zipfile.ZipFile(io.BytesIO(data)) as whole:
        for entry in whole.infolist():
            if entry.filename.endswith((".pkl", "/0", "/1")):
                start = data.index(whole.read(entry), entry.header_offset)
                assert {(at, 1) for at in range(start, start + entry.file_size)} <= refused


def test_a_file_with_several_fields_overwritten_is_refused_or_equal(tmp_path, save):
    path = tmp_path / "model_000001.pt"
    write_torch_file(path, {"a": np.arange(7, dtype=np.float32)})
    data, expected, choose = path.read_bytes(), read_torch(path), random.Random(0)
    for _ in range(1000):
        changed = bytearray(data)
        for _ in range(choose.choice((1, 2, 4))):
            at = choose.choice((choose.randrange(len(data)), len(data) - choose.randrange(1, 400)))
            byte = choose.choice((0, 0x7F, 0x80, 0xFF, choose.randrange(256)))
            field = bytes([byte]) * choose.choice((1, 2, 4, 8))
            changed[at : at + len(field)] = field[: len(data) - at]
        assert value_or_refusal(save(bytes(changed))) in (None, expected)


GOOD = program(tensor())
DEFLATED = zlib.compress(bytes(1 << 20))[2:-4]
BIG = 2**64 - 1


def entries(**changes) -> list[Entry]:
    """A good file's entries; `changes` go to the one of the storage."""
    result = torch_entries(GOOD)
    for field, value in changes.items():
        setattr(result[2], field, value)
    return result


def of_pickle(**changes) -> list[Entry]:
    result = torch_entries(GOOD)
    for field, value in changes.items():
        setattr(result[0], field, value)
    return result


def zip64_extra(*values: int) -> bytes:
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)


ALL_FAR = {"size": 2**32 - 1, "packed": 2**32 - 1, "offset": 2**32 - 1}
BAD_ARCHIVES = {
    "no entries": [],
    "no data.pkl": torch_entries(GOOD)[1:],
    "data.pkl without a folder": [Entry("data.pkl", GOOD)],
    "data.pkl in two folders": torch_entries(GOOD) + torch_entries(GOOD, root="n"),
    "data.pkl two folders deep": torch_entries(GOOD, root="a/m"),
    "data.pkl at an absolute path": torch_entries(GOOD, root="/m"),
    "data.pkl behind backslashes": [Entry("m\\data.pkl", GOOD)],
    "a drive": torch_entries(GOOD, root="C:\\m"),
    "data.pkl in capitals": [Entry("m/DATA.PKL", GOOD)],
    "data.pkl twice": [*torch_entries(GOOD), Entry("m/data.pkl", GOOD)],
    "a storage twice": [*torch_entries(GOOD), Entry("m/data/0", bytes(48))],
    "a storage twice behind NUL": [*torch_entries(GOOD), Entry("m/data/0\0x", bytes(48))],
    "no storage": torch_entries(GOOD, {}),
    "a storage of another root": [*torch_entries(GOOD, {}), Entry("n/data/0", bytes(48))],
    "a storage with a backslash": [*torch_entries(GOOD, {}), Entry("m\\data\\0", bytes(48))],
    "a storage too short": torch_entries(GOOD, {"0": bytes(47)}),
    "a storage too long": torch_entries(GOOD, {"0": bytes(49)}),
    "an empty storage": torch_entries(GOOD, {"0": b""}),
    "big-endian": torch_entries(GOOD, order=b"big"),
    "an unknown byte order": torch_entries(GOOD, order=b"\x1b[2J\n" * 1000),
    "no byte order": torch_entries(GOOD, order=b""),
    "a wrong checksum of the pickle": of_pickle(crc=1),
    "a wrong checksum of a storage": entries(crc=1),
    "a compressed pickle": of_pickle(data=zlib.compress(GOOD)[2:-4], method=8, size=len(GOOD)),
    "a compressed storage": entries(data=zlib.compress(bytes(48))[2:-4], method=8, size=48),
    "a zip bomb": entries(data=DEFLATED, method=8, size=2**32 - 2, packed=len(DEFLATED)),
    "a zip64 bomb": entries(data=DEFLATED, method=8, size=2**32 - 1, extra=zip64_extra(10**15)),
    "bzip2": entries(method=12),
    "lzma": entries(method=14),
    "an unknown method": entries(method=99),
    "an encrypted pickle": of_pickle(flags=1),
    "an encrypted storage": entries(flags=1),
    "a stored entry that shrank": entries(packed=10, size=48),
    "a stored entry that grew": entries(packed=48, size=2**31),
    "a storage beyond the file": entries(size=10**6),
    "a storage of 4 GB": entries(size=2**32 - 2),
    "a storage of 2**64 bytes": entries(size=2**32 - 1, packed=2**32 - 1, extra=zip64_extra(BIG, BIG)),
    "a pickle beyond the file": of_pickle(size=10**6),
    "a pickle of 2**64 bytes": of_pickle(size=2**32 - 1, packed=2**32 - 1, extra=zip64_extra(BIG, BIG)),
    "a header beyond the file": entries(offset=10**6),
    "a header at the end": entries(offset=300),
    "a header in the middle": entries(offset=5),
    **{
        f"a header at {offset:#x}": entries(**ALL_FAR, extra=zip64_extra(48, 48, offset))
        for offset in (2**31, 2**62, 2**63 - 1, 2**63, BIG)
    },
    "a pickle's header at 2**64": of_pickle(**ALL_FAR, extra=zip64_extra(len(GOOD), len(GOOD), BIG)),
    "a cut zip64 field": entries(**ALL_FAR, extra=zip64_extra(48)),
    "a broken extra field": entries(extra=b"\1\0\xff\xff"),
    "a name that is not UTF-8": [*torch_entries(GOOD), Entry(b"m/\xff\xfe")],
    "a control character as root": torch_entries(GOOD, {}, root="\x1b[2J\x07m"),
    "a newline as root": torch_entries(GOOD, {}, root="m\nis read"),
    "a reversed root": torch_entries(GOOD, {}, root="\N{RIGHT-TO-LEFT OVERRIDE}m"),
    "a root of 60,000 letters": torch_entries(GOOD, {}, root="m" * 60_000),
    "a compressed root of controls": [Entry("\x1b[2J/data.pkl", GOOD, method=8)],
    "a cut root of controls": [Entry("\x1b[2J/data.pkl", GOOD, size=10**6)],
    "a storage in another's place": [
        *torch_entries(program(many(tensor(), tensor(of=storage("1")))), {"0": b"a" * 48, "1": b"b" * 48})[:3],
        Entry("m/data/1", b"b" * 48, offset=0),
    ],
}  # fmt: skip


@pytest.mark.parametrize("parts", BAD_ARCHIVES.values(), ids=BAD_ARCHIVES)
def test_a_bad_archive_is_refused(save, parts):
    path = save(archive(parts))
    with traced(2 * MIB):
        refusal(path)


def test_a_pickle_of_33_mib_is_refused_unread(save):
    path = save(torch_bytes(GOOD + bytes(33 * MIB)))
    with traced(MIB):
        refusal(path)


def test_the_good_neighbours_of_bad_archives_are_read(save):
    far = torch_entries(GOOD)
    at = archive(far[:2]).index(b"PK\1\2")
    assert read_torch(save(archive(far))) == ZEROS
    far[2] = Entry("m/data/0", bytes(48), **ALL_FAR, extra=zip64_extra(48, 48, at))
    assert read_torch(save(archive(far))) == ZEROS


@pytest.mark.parametrize(
    "root", ["..", ".", "~", "-rf", "a b", "model_000001", "\N{GREEK SMALL LETTER ALPHA}"]
)
def test_the_name_of_the_root_reaches_nothing(save, tmp_path, root):
    before = sorted(tmp_path.iterdir())
    path = save(torch_bytes(GOOD, root=root))
    assert value_or_refusal(path) in (None, ZEROS)
    assert sorted(tmp_path.iterdir()) == [*before, path]


@pytest.mark.parametrize(
    "name", ["../evil", "/tmp/evil", "..\\evil", "m/../../evil", "m/data/../evil", "C:\\evil"]
)
def test_an_entry_that_points_elsewhere_is_left_alone(save, tmp_path, name):
    path = save(archive([*torch_entries(GOOD), Entry(name, b"evil")]))
    assert value_or_refusal(path) in (None, ZEROS)
    assert list(tmp_path.rglob("*")) == [path]
    assert not (tmp_path.parent / "evil").exists()


LIES = {
    "no length": {"length": 0},
    "a short length": {"length": 10},
    "a long length": {"length": 2**32 - 1},
    "a long length at the start": {"offset": 0, "length": 2**31},
    "a zip64 length of 2**64": {"zip64": (BIG, 0)},
    "a zip64 length of 2**62": {"zip64": (2**62, 0)},
    "no zip64 length": {"zip64": (0, 0)},
}


@pytest.mark.parametrize("lies", LIES.values(), ids=LIES)
def test_a_directory_of_another_length_is_refused(save, lies):
    refusal(save(archive(torch_entries(GOOD), **lies)))


@pytest.mark.parametrize("offset", [0, 1, 2**31, 2**32 - 1])
def test_a_directory_elsewhere_is_found_or_refused(save, offset):
    assert value_or_refusal(save(archive(torch_entries(GOOD), offset=offset))) in (None, ZEROS)


@pytest.mark.parametrize("comment", [b"c", b"PK\5\6" * 20, b"\x1b[2J\n", b"c" * 65535], ids=len)
def test_a_comment_changes_nothing(save, comment):
    assert value_or_refusal(save(archive(torch_entries(GOOD), comment=comment))) in (None, ZEROS)


@pytest.mark.parametrize(
    "extra", [b"garbage", b"<html>" * 100, b"\x89HDF\r\n", b"PK\3\4", bytes(10_000)], ids=len
)
def test_bytes_around_an_archive_are_ignored_or_refused(save, extra):
    for data in (extra + torch_bytes(GOOD), torch_bytes(GOOD) + extra):
        assert value_or_refusal(save(data)) in (None, ZEROS)


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.arange(3))
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as out:
        for name in ("storages", "tensors", "pickle"):
            out.addfile(tarfile.TarInfo(name), io.BytesIO())
    return file.getvalue()


OLD_TORCH = b"".join(
    pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
)
LOGIN = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>\x1b[2J</body></html>\n"
SCRIPT = ["version", "data.pkl", "constants.pkl", "code/__torch__.py", "code/__torch__/m.py", "data/0"]
STRANGERS = {
    "empty": b"",
    "one byte": b"P",
    "text": b"not a model\n",
    "zeros": bytes(100_000),
    "json": json.dumps({"model": [1, 2, 3]}).encode(),
    "login page": LOGIN,
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "torch before 1.6": OLD_TORCH + GOOD,
    "bare pickle": pickle.dumps({"a": 1}),
    "pickle that runs code": program(call("os", "system", plain("true"))),
    "torch of 2016 in tar": tar(),
    "npz": npz(),
    "npy": b"\x93NUMPY\x01\x00",
    "gzip": b"\x1f\x8b\x08" + bytes(20),
    "safetensors": struct.pack("<Q", 2) + b"{}",
    "TorchScript": archive(
        [
            Entry(f"m/{name}", program(named("__torch__", "M") + b")\x81}b") if "pkl" in name else b"")
            for name in SCRIPT
        ]
    ),
    "end of an archive alone": b"PK\5\6" + bytes(18),
    "headers alone": b"PK\3\4" + bytes(100),
}


@pytest.mark.parametrize("data", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_refused(save, data):
    refusal(save(data))


def test_a_folder_a_missing_file_and_a_loop_of_links_are_refused(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    for name in ("folder.pt", "loop.pt", "missing.pt"):
        for read in (read_torch, tokenizer_files.from_pickle):
            refusal(tmp_path / name, read)


def test_a_file_that_shrinks_while_it_is_open_is_refused(save):
    path = save(torch_bytes(GOOD, {"0": bytes(48)}))
    with TorchFile(path) as file:
        os.truncate(path, 250)
        with pytest.raises(UserError) as caught:
            file.tree.read()
        checked_message(str(caught.value), path)


def test_entries_that_share_bytes_are_refused(save):
    """Otherwise a small file announces any amount of tensors."""
    count, size = 1000, 30_000
    tensors = [tensor(0, (size,), (1,), of=storage(str(key), "ByteStorage", size)) for key in range(count)]
    parts = torch_entries(program(many(*tensors)), {})
    at = archive(parts).index(b"PK\1\2")
    for key in range(count):
        parts.append(Entry(f"m/data/{key}", bytes(size), offset=at, stored=key == 0))
    refusal(save(archive(parts)))


# --------------------------------------------------------------------------------------------------------
# Bounds on memory and time, in a process of its own that must end in good order


def bounded(
    kind: str, paths: Iterable[Path], *, memory: int = 300 * MIB, seconds: float = 1.0
) -> list[str | None]:
    """What is said of each file, None where it is read.

    Args:
        memory: what the reading of one may reserve.
        seconds: of a processor, for each.
    """
    paths = list(paths)
    child = subprocess.run(
        [sys.executable, "-m", hostile.__name__, kind, str(memory), str(int(seconds)), *map(str, paths)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    messages, problems = [], {}
    for path, line in zip(paths, child.stdout.splitlines(), strict=True):
        result = json.loads(line)
        if "ended" in result or result["seconds"] > seconds:
            problems[path.name] = result
        elif result["message"] is not None:
            checked_message(result["message"], path)
        messages.append(result.get("message"))
    assert not problems, child.stderr[-1000:]
    return messages


def deep(depth: int) -> dict[str, bytes]:
    return {
        "lists": b"]" * depth + b"a" * (depth - 1),
        "tuples": b")" + b"\x85" * depth,
        "dicts": b"}" + b"K\0}" * depth + b"s" * depth,
        "ordered dicts": named("collections", "OrderedDict") + b"q\0)R" + b"K\0h\0)R" * depth + b"s" * depth,
        "a list in itself": b"]q\0" + b"h\0a" * depth,
    }


MONSTERS = {
    "deep lists": deep(20_000)["lists"],
    "deep tuples": deep(20_000)["tuples"],
    "doubled lists": b"]" + b"q\x000](h\0h\0e" * 60,
    "doubled tuples": b")" + b"q\0h\0\x86" * 60,
}
CPU, TWELVE = plain("cpu"), plain(12)


def rebuilt(*arguments: bytes) -> bytes:
    return call(*V2, storage(), *arguments)


PLACES = {
    "value": lambda x: x,
    "module": lambda x: x + plain("a") + b"\x93",
    "name": lambda x: plain("os") + x + b"\x93",
    "key": lambda x: b"}" + x + b"Ns",
    "key in a tuple": lambda x: b"}" + many(plain(1), x) + b"Ns",
    "callee": lambda x: x + b")R",
    "arguments": lambda x: named("collections", "OrderedDict") + x + b"R",
    "argument": lambda x: call("collections", "OrderedDict", x),
    "state": lambda x: ORDERED_DICT + x + b"b",
    "object of a state": lambda x: x + b"}b",
    "reference": lambda x: x + b"Q",
    "tag of a storage": lambda x: reference(x, FLOAT, plain("0"), CPU, TWELVE),
    "type of a storage": lambda x: reference(plain("storage"), x, plain("0"), CPU, TWELVE),
    "key of a storage": lambda x: reference(plain("storage"), FLOAT, x, CPU, TWELVE),
    "device of a storage": lambda x: tensor(of=reference(plain("storage"), FLOAT, plain("0"), x, TWELVE)),
    "count of a storage": lambda x: reference(plain("storage"), FLOAT, plain("0"), CPU, x),
    "storage": lambda x: tensor(of=x),
    "offset": lambda x: rebuilt(x, *NUMBERS[1:]),
    "shape": lambda x: rebuilt(plain(0), x, *NUMBERS[2:]),
    "shape and strides": lambda x: rebuilt(plain(0), x + b"q\1", memo(1), *NUMBERS[3:]),
    "extent": lambda x: rebuilt(plain(0), x + b"\x85", *NUMBERS[2:]),
    "stride": lambda x: rebuilt(plain(0), plain((12,)), x + b"\x85", *NUMBERS[3:]),
    "gradient": lambda x: rebuilt(*NUMBERS[:3], x, ORDERED_DICT),
    "hooks": lambda x: rebuilt(*NUMBERS[:4], x),
    "metadata": lambda x: rebuilt(*NUMBERS, x),
    "parameter": lambda x: call(*PARAMETER, x, b"\x88", ORDERED_DICT),
}


def test_a_monster_in_any_place_is_read_or_refused(save):
    """Nested 20,000 deep, or holding itself twice 60 times over: never printed, hashed or compared."""
    programs = {
        f"{name} as {where}": program(place(monster))
        for name, monster in MONSTERS.items()
        for where, place in PLACES.items()
    }
    bounded("torch", (save(torch_bytes(data), name) for name, data in programs.items()))


def test_deep_nesting_is_read_or_refused(save):
    programs = {name: program(data) for name, data in deep(100_000).items()}
    bounded("torch", (save(torch_bytes(data), name) for name, data in programs.items()), seconds=5)


def test_a_monster_as_state_of_a_tokenizer_is_refused(save):
    start = named("tiktoken.core", "Encoding") + b"q\5)\x81"
    paths = [save(program(start, b"h\5)\x81" * 100_000, b"b" * 100_000), "deep objects.pkl")]
    for name, monster in MONSTERS.items():
        pattern, ranks = (b"}" + plain(key) + monster + b"s" for key in ("pat_str", "mergeable_ranks"))
        for place, state in {"": monster, " as pattern": pattern, " as ranks": ranks}.items():
            paths.append(save(program(start, state, b"b"), f"{name}{place}.pkl"))
    assert None not in bounded("tokenizer", paths)


def integer(value: int) -> bytes:
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little")


STEPS = 1 << 22
LONG = b"h\0h\1R" * 200_000 + b"t"  # one call after another, with the same arguments
WIDE = b"a" * (30 * MIB) + "\N{PILE OF POO}".encode()
BOMBS = {
    "memos": b"N" + b"\x94" * STEPS,
    "ordered dicts": named("collections", "OrderedDict") + b"q\0(" + b"h\0)R" * STEPS + b"t",
    "references": storage()[:-1] + b"q\0" + b"h\0Q0" * STEPS,
    "tensors": named(*V2) + b"q\0" + many(storage(), *NUMBERS) + b"q\x01(" + LONG,
    "parameters": named(*PARAMETER) + b"q\0" + many(tensor(), b"\x88", ORDERED_DICT) + b"q\x01(" + LONG,
    "tensors of many arguments":
        named(*V2) + b"q\0" + many(storage(), *NUMBERS, b"K\0" * 200_000) + b"q\x01(" + LONG,
    "parameters of many arguments": named(*PARAMETER) + b"q\0" + many(tensor(), b"K\0" * 200_000) + b"q\x01(" + LONG,
    "copies of a dict":
        named("collections", "OrderedDict") + b"q\0" + b"}(" + b"".join(b"M" + struct.pack("<H", key) + b"N" for key in range(20_000))
        + b"u\x85q\x01(" + LONG,
    "text wider than its bytes": b"X" + struct.pack("<I", len(WIDE)) + WIDE,
    "integer keys that collide": b"}(" + b"N".join(integer(key * (2**61 - 1)) for key in range(50_000)) + b"Nu",
}  # fmt: skip


def test_a_long_program_is_bounded(save):
    bounded("torch", (save(torch_bytes(program(data)), name) for name, data in BOMBS.items()), seconds=5)


def test_a_directory_of_10_mb_is_bounded(save):
    directories = {"entries": (200_000, "", b""), "names": (150, "x" * 60_000, b"")}
    directories["extra fields"] = 150, "", b"\2\0\0\0" * 16_000
    paths = []
    for name, (count, tail, extra) in directories.items():
        parts = (Entry(f"{key:x}{tail}", offset=0, stored=False, extra=extra) for key in range(count))
        paths.append(save(archive(parts), name))
    assert None not in bounded("torch", paths)


@pytest.mark.parametrize("kind", READERS)
def test_an_endless_file_is_bounded(save, kind):
    path = save(b"PK\3\4")
    os.truncate(path, 1 << 36)  # takes no room on the disk
    assert bounded(kind, [path]) != [None]


PATTERNS = {
    "deep groups": "(" * 100_000 + ")" * 100_000,
    "deep classes": "[a&&" * 20_000,
    "nested repeats": r"(?:\p{L}{1000}){1000}",
    "a huge repeat": "a{4294967295}",
    "backtracking": r"(?:(a+)+)+$|(?=(x+x+)+y)",
    "many lookaheads": r"(?=\p{L}{30})" * 1000,
    "many alternatives": "|".join(map(str, range(300_000))),
}


def test_a_tokenizer_is_bounded(save):
    states = {name: tokenizer_state(pat_str=pattern) for name, pattern in PATTERNS.items()}
    states["long special tokens"] = tokenizer_state(special_tokens=SPECIALS | {"x" * 3_000_000: 265})
    many_tokens = SPECIALS | {f"<{key}>": 265 + key for key in range(200_000)}
    states["many special tokens"] = tokenizer_state(special_tokens=many_tokens)
    bounded("tokenizer", (save(tokenizer_bytes(state), name) for name, state in states.items()), seconds=5)


# --------------------------------------------------------------------------------------------------------
# Good files

FLOATS = np.arange(12, dtype=np.float32)
STORED = {"0": FLOATS.tobytes()}
VIEWS = {
    "contiguous": ((0, (3, 4), (4, 1)), FLOATS.reshape(3, 4)),
    "transposed": ((0, (4, 3), (1, 4)), FLOATS.reshape(3, 4).T),
    "part": ((5, (7,), (1,)), FLOATS[5:]),
    "every second": ((1, (6,), (2,)), FLOATS[1::2]),
    "column": ((2, (3,), (4,)), FLOATS.reshape(3, 4)[:, 2]),
    "block": ((5, (2, 2), (4, 1)), FLOATS.reshape(3, 4)[1:, 1:3]),
    "permuted": ((0, (2, 2, 3), (3, 6, 1)), FLOATS.reshape(2, 2, 3).transpose(1, 0, 2)),
    "one number": ((7, (), ()), FLOATS[7].reshape(())),
    "extents of one": ((0, (1, 12, 1), (99, 1, 99)), FLOATS.reshape(1, 12, 1)),
    "repeated within the storage": ((3, (2, 3), (0, 1)), np.stack([FLOATS[3:6]] * 2)),
    "empty": ((0, (0, 3), (3, 1)), np.zeros((0, 3), np.float32)),
    "empty, at the end": ((12, (3, 0), (1, 1)), np.zeros((3, 0), np.float32)),
}


def parameter(tensor: bytes) -> bytes:
    return call(*PARAMETER, tensor, b"\x88", ORDERED_DICT)


@pytest.mark.parametrize("wrap", [bytes, parameter], ids=["tensor", "parameter"])
@pytest.mark.parametrize(("numbers", "expected"), VIEWS.values(), ids=VIEWS)
def test_views_are_read(save, numbers, expected, wrap):
    with TorchFile(save(torch_bytes(program(wrap(tensor(*numbers))), STORED))) as file:
        assert (file.tree.shape, file.tree.dtype, file.tree.size) == (
            expected.shape,
            np.float32,
            expected.size,
        )
        np.testing.assert_array_equal(file.tree.read(), expected)
        out = np.full(expected.shape, -1, np.float64)
        assert file.tree.read(out) is out
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "numbers", [(0, (), ()), (0, (1,), (1,)), (0, (0,), (1,)), (0, (3, 0), (1, 1))], ids=str
)
def test_an_empty_storage_holds_only_empty_tensors(save, numbers):
    path = save(torch_bytes(program(tensor(*numbers, of=storage(count=0))), {"0": b""}))
    assert value_or_refusal(path) == (("float32", numbers[1], b"") if 0 in numbers[1] else None)


@pytest.mark.parametrize("shape", [(0, 2**40, 2**40), (2**47, 2**47, 0), (0, *[2**47] * 7)], ids=str)
def test_an_empty_tensor_of_absurd_shape_is_read_or_refused(save, shape):
    path = save(torch_bytes(program(tensor(0, shape, (1,) * len(shape)))))
    assert value_or_refusal(path) in (None, ("float32", shape, b""))


def test_tensors_that_share_a_storage_are_read(save):
    data = program(many(tensor(0, (5,), (1,)), tensor(5, (7,), (1,)), tensor(0, (2, 2), (0, 1))))
    first, second, third = read_torch(save(torch_bytes(data, STORED)))
    assert first[2] + second[2] == STORED["0"]
    assert third[2] == FLOATS[[0, 1, 0, 1]].tobytes()


def test_a_state_dict_with_metadata_is_read(save):
    metadata = plain("_metadata") + ORDERED_DICT + plain("") + plain({"version": 1}) + b"s"
    data = program(ORDERED_DICT + plain("weight") + tensor() + b"s" + b"}" + metadata + b"sb")
    assert read_torch(save(torch_bytes(data, STORED))) == {"weight": ("float32", (12,), STORED["0"])}


def test_the_layout_of_current_torch_is_read(save):
    """Its further entries, and its flag for sizes that follow the data."""
    parts = torch_entries(GOOD, STORED, root="archive")
    parts[1:1] = [Entry("archive/.format_version", b"1"), Entry("archive/.storage_alignment", b"64")]
    parts.append(Entry("archive/.data/serialization_id", b"0" * 40))
    for part in parts:
        part.flags = 8
    assert read_torch(save(archive(parts))) == ("float32", (12,), STORED["0"])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_bit_pattern_survives(tmp_path, dtype):
    array = every_bit_pattern(dtype)
    view = array.reshape(256, 256).T[:, 3:7]
    write_torch_file(tmp_path / "a.pt", {"array": array, "view": view, "number": array[5:6].reshape(())})
    tree = read_torch(tmp_path / "a.pt")
    assert tree["array"] == (array.dtype.name, (1 << 16,), array.tobytes())
    assert tree["view"] == (array.dtype.name, (256, 4), view.tobytes())
    assert tree["number"] == (array.dtype.name, (), array[5].tobytes())


def test_a_tree_survives(tmp_path):
    tree = sample_tree()
    write_torch_file(tmp_path / "a.pt", tree)
    read = read_torch(tmp_path / "a.pt")
    assert {key: read[key] for key in ("step", "nested")} == {key: tree[key] for key in ("step", "nested")}
    assert read["empty"] == ("float32", (0, 3), b"")
    assert {name: value[2] for name, value in read["model"].items()} == {
        name: value.tobytes() for name, value in tree["model"].items()
    }


def test_equal_content_gives_equal_files(tmp_path):
    for folder in ("first", "second"):
        write_torch_file(tmp_path / folder / "model.pt", sample_tree())
    assert (tmp_path / "first/model.pt").read_bytes() == (tmp_path / "second/model.pt").read_bytes()


def test_a_written_file_is_a_sound_zip_with_aligned_tensors(tmp_path):
    write_torch_file(tmp_path / "model.pt", sample_tree())
    with zipfile.ZipFile(tmp_path / "model.pt") as file:
        assert file.testzip() is None
        assert {entry.compress_type for entry in file.infolist()} == {zipfile.ZIP_STORED}
    with TorchFile(tmp_path / "model.pt") as file:
        assert all(leaf.storage.start % 64 == 0 for leaf in file.tree["model"].values())


@pytest.mark.parametrize("value", [np.float64(1.5), np.str_("text")], ids=["float64", "str_"])
def test_what_is_written_can_be_read(tmp_path, value):
    try:
        write_torch_file(tmp_path / "a.pt", {"a": value})
    except TypeError:
        assert not (tmp_path / "a.pt").exists()
    else:
        assert read_torch(tmp_path / "a.pt") == {"a": value}


# --------------------------------------------------------------------------------------------------------
# Tokenizers

read_tokenizer = tokenizer_files.from_pickle


def test_good_tokenizers_are_read(save):
    vocabulary = read_tokenizer(TOKENIZER_PKL)
    assert read_tokenizer(save(tokenizer_files.to_pickle(vocabulary))) == vocabulary
    vocabulary = read_tokenizer(save(tokenizer_bytes(tokenizer_state())))
    assert vocabulary.merges == tuple(bytes([i]) for i in range(256))
    assert vocabulary.special_tokens[0] == ("<|bos|>", 256)


BAD_RANKS = {
    "as a list": list(RANKS.items()),
    "of text": {token.decode("latin1"): rank for token, rank in RANKS.items()},
    "that are text": {token: str(rank) for token, rank in RANKS.items()},
    "that are floats": {token: float(rank) for token, rank in RANKS.items()},
    "with booleans": RANKS | {b"\0": False, b"\1": True},
    "with None": RANKS | {b"\0": None},
    "with a list": RANKS | {b"\0": [0]},
    "below zero": RANKS | {b"\0": -1},
    "that are huge": RANKS | {b"\0": 2**500},
    "twice": RANKS | {b"\1": 0},
    "with a gap": RANKS | {b"ab": 300},
    "without a byte": {token: rank for token, rank in RANKS.items() if rank < 255},
    "that are none": {},
}
BAD_SPECIALS = {
    "as a list": list(SPECIALS.items()),
    "as bytes": {name.encode(): id_ for name, id_ in SPECIALS.items()},
    "that are text": {name: str(id_) for name, id_ in SPECIALS.items()},
    "with booleans": SPECIALS | {"<|bos|>": True},
    "with None": SPECIALS | {"<|bos|>": None},
    "below zero": SPECIALS | {"<|bos|>": -1},
    "over a merge": SPECIALS | {"<|bos|>": 255},
    "that are huge": SPECIALS | {"<|bos|>": 2**500},
    "twice": SPECIALS | {"<|bos|>": 257},
    "with a gap": SPECIALS | {"more": 300},
    "with half a surrogate": SPECIALS | {"\ud800": 265},
    "without bos": {name: id_ - 1 for name, id_ in SPECIALS.items() if id_ > 256},
    "without the last": {name: id_ for name, id_ in SPECIALS.items() if id_ < 264},
    "that are none": {},
}
BAD_PATTERNS = {
    "an integer": 7,
    "bytes": b"a",
    "a list": ["a"],
    "open": "(\n\x1b[2J",
    "with a long error": "(?P<\x1b[2J\n" + "x" * 5000,
    "with an unknown group": r"\7",
    "with an unknown property": r"\p{" + "\x07" * 400 + "}",
    "with a reversed class": "[z-\x1b]",
    "with half a surrogate": "\ud800",
}
BAD_STATES = {
    **{repr(value): value for value in (None, [], (), "state", b"state", 7, True, {})},
    "slots": (None, tokenizer_state()),
    **{
        f"no {key}": tokenizer_state(**{key: None})
        for key in ("pat_str", "mergeable_ranks", "special_tokens")
    },
    **{f"a pattern {name}": tokenizer_state(pat_str=value) for name, value in BAD_PATTERNS.items()},
    **{f"ranks {name}": tokenizer_state(mergeable_ranks=value) for name, value in BAD_RANKS.items()},
    **{
        f"special tokens {name}": tokenizer_state(special_tokens=value)
        for name, value in BAD_SPECIALS.items()
    },
}


@pytest.mark.parametrize("state", BAD_STATES.values(), ids=BAD_STATES)
def test_a_bad_state_is_refused(save, state):
    refusal(save(tokenizer_bytes(state), "tokenizer.pkl"), read_tokenizer)


ENCODING = named("tiktoken.core", "Encoding")
BAD_TOKENIZERS = {
    "the class alone": ENCODING,
    "no state": ENCODING + b")\x81",
    "an argument": ENCODING + many(plain("gpt2")) + b"\x81" + plain(tokenizer_state()) + b"b",
    "the state alone": plain(tokenizer_state()),
    "text": plain("tokenizer"),
    "state of the class": ENCODING + plain(tokenizer_state()) + b"b",
    "the object as its own state": ENCODING + b")\x81q\0h\0b",
    "a foreign class": named("transformers", "GPT2Tokenizer") + b")\x81}b",
    "an attribute of the class": named("tiktoken.core", "Encoding.x") + b")\x81}b",
    "tiktoken's registry": call("tiktoken.registry", "get_encoding", plain("gpt2")),
    "a storage": storage(),
    "a reference": plain("x") + b"Q",
    "INST": b"(itiktoken.core\nEncoding\n",
    "OBJ": b"(" + ENCODING + b"o",
    "NEWOBJ_EX": ENCODING + b")}\x92",
}


@pytest.mark.parametrize("payload", BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS)
def test_a_bad_tokenizer_is_refused(save, tmp_path, monkeypatch, payload):
    with nothing_runs(tmp_path, monkeypatch):
        refusal(save(program(payload), "tokenizer.pkl"), read_tokenizer)


@pytest.mark.parametrize("data", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_no_tokenizer(save, data):
    refusal(save(data, "tokenizer.pkl"), read_tokenizer)


def test_a_tokenizer_cut_anywhere_is_refused(save):
    data = TOKENIZER_PKL.read_bytes()
    for length in {len(data) * percent // 100 for percent in range(100)} | {len(data) - 1}:
        refusal(save(data[:length], "tokenizer.pkl"), read_tokenizer)


def test_a_tokenizer_with_any_byte_changed_is_refused_or_sound(save):
    data = tokenizer_bytes(tokenizer_state(pat_str="."))
    for at in range(0, len(data), 2):
        changed = bytearray(data)
        changed[at] ^= 1 << at // 2 % 8
        vocabulary = value_or_refusal(save(bytes(changed), "tokenizer.pkl"), read_tokenizer)
        assert vocabulary is None or len(set(vocabulary.merges)) == 256
