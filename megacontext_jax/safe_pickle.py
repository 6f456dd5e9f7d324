"""Reading pickles of strangers: a machine that can build containers and what the caller names, nothing else.

A pickle is a program. Python's own reader lets it import and call anything, and even with `find_class`
restricted a short file can make it reserve gigabytes (its memo is an array indexed by the file). This machine
knows the instructions that plain data needs, refuses the others by name, and builds nothing larger than a
fixed multiple of the file.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

MAX_BYTES = 1 << 25  # of a pickle; a tokenizer of 65,536 tokens needs one megabyte
MAX_STEPS = 1 << 20  # instructions; each builds at most one object beside its own bytes
_MAX_KEY = 1 << 22  # of the integer keys of a dict; larger ones could be chosen to collide
_MAX_ARGUMENTS = 16  # of a call, which copies them


class Refused(ValueError):
    """Why a pickle is not read; completes the sentence "FILE is not read: ..."."""


class Global:
    """A name that the file asks for and the caller permits."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Callable):
        self.name = name
        self.call = call


class Instance:
    """An object of a permitted class, as its state alone."""

    __slots__ = ("name", "state")

    def __init__(self, name: str):
        self.name = name
        self.state: Any = None


class Attributes(dict):
    """A dict that takes and drops the attributes which torch hangs on its ordered dicts."""


def loads(
    data: bytes | memoryview,
    *,
    permitted: Mapping[str, Callable],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The object in a pickle.

    Args:
        permitted: "module.name" -> what stands for it; called with the arguments in the file.
        persistent: turns a persistent id (torch's storages) into an object; None refuses them.

    Raises `Refused` for anything else than well-formed plain data and permitted names; whatever a permitted
    function raises passes through.
    """
    if len(data) > MAX_BYTES:
        raise Refused(f"it is {len(data):,} bytes long, far more than such files need")
    machine = _Machine(bytes(data), permitted, persistent)
    try:
        return machine.run()
    except Refused:
        raise
    except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise Refused(f"it is damaged at byte {machine.at:,} ({type(error).__name__}: {error})") from None


class _Machine:
    def __init__(self, data: bytes, permitted: Mapping[str, Callable], persistent):
        self.data = data
        self.at = 0
        self.permitted = permitted
        self.persistent = persistent
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        handlers, data = _HANDLERS, self.data
        for _ in range(MAX_STEPS):
            if self.at >= len(data):
                raise Refused("it breaks off before its end")
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                if len(self.stack) != 1 or self.marks:
                    raise Refused("its end comes too early or too late")
                return self.stack.pop()
            handler = handlers.get(code)
            if handler is None:
                name = _NAMES.get(code, f"0x{code:02x}")
                raise Refused(f"it uses the pickle instruction {name}, which such files have no use for")
            handler(self)
        raise Refused(f"it takes more than {MAX_STEPS:,} instructions")

    # --- bytes of the file

    def take(self, n: int) -> bytes:
        end = self.at + n
        if end > len(self.data):
            raise Refused("it breaks off before its end")
        start, self.at = self.at, end
        return self.data[start:end]

    def number(self, layout: struct.Struct):
        return layout.unpack(self.take(layout.size))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise Refused("a name in it does not end")
        text, self.at = self.data[self.at : end].decode(), end + 1
        return text

    # --- the stack

    def push(self, value) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def top(self, kind: type):
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise Refused(f"it treats a {type(value).__name__} as a {kind.__name__}")
        return value

    def find(self, module, name) -> None:
        if type(module) is not str or type(name) is not str:
            raise Refused(f"it asks for a name made of a {type(module).__name__} and a {type(name).__name__}")
        full = f"{module}.{name}"
        if full not in self.permitted:
            raise Refused(f"it asks for {ascii(full)[:120]}, which such files have no use for")
        self.push(Global(full, self.permitted[full]))

    def call(self, arguments, target) -> None:
        if type(target) is not Global or type(arguments) is not tuple:
            raise Refused("it calls something that is not a permitted name")
        if len(arguments) > _MAX_ARGUMENTS:
            raise Refused(f"it calls {target.name} with {len(arguments):,} arguments")
        self.push(target.call(*arguments))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Instance:
            target.state = state
        elif type(target) is not Attributes:
            raise Refused(f"it sets the state of a {type(target).__name__}")

    def set_items(self, items: list) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise Refused("a dict in it has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, bytes, int):
                raise Refused(f"a dict in it has a {type(key).__name__} as a key")
            if type(key) is int and not 0 <= key < _MAX_KEY:
                raise Refused("a dict in it has an integer key outside of the range that such files use")
            target[key] = value

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise Refused("it refers to data outside of it")
        self.push(self.persistent(self.stack.pop()))

    def long(self, n: int) -> None:
        if n > 64:
            raise Refused(f"it holds an integer of {n:,} bytes")
        self.push(int.from_bytes(self.take(n), "little", signed=True))


_U1, _U2, _U4, _U8 = (struct.Struct(layout) for layout in ("<B", "<H", "<I", "<Q"))
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")
_STOP = ord(".")


def _constant(value) -> Callable[[_Machine], None]:
    return lambda m: m.push(value)


def _text(layout: struct.Struct) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(layout)).decode("utf-8", "surrogatepass"))


def _bytes(layout: struct.Struct) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(layout)))


def _proto(m: _Machine) -> None:
    version = m.number(_U1)
    if version > 5:
        raise Refused(f"its pickle protocol is {version}; known are 2 to 5")


def _tuple(n: int) -> Callable[[_Machine], None]:
    def handler(m: _Machine) -> None:
        if len(m.stack) < n:
            raise Refused("a tuple in it lacks members")
        m.stack[-n:] = [tuple(m.stack[-n:])]

    return handler


def _reduce(m: _Machine) -> None:
    arguments = m.stack.pop()
    m.call(arguments, m.stack.pop())


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.find(module, name)


_INSTRUCTIONS: dict[str, tuple[str, Callable[[_Machine], Any]]] = {
    "PROTO": ("\x80", _proto),
    "FRAME": ("\x95", lambda m: m.number(_U8)),
    "MARK": ("(", _Machine.mark),
    "POP": ("0", lambda m: m.stack.pop()),
    "POP_MARK": ("1", lambda m: m.pop_mark()),
    "NONE": ("N", _constant(None)),
    "NEWTRUE": ("\x88", _constant(True)),
    "NEWFALSE": ("\x89", _constant(False)),
    "BININT": ("J", lambda m: m.push(m.number(_I4))),
    "BININT1": ("K", lambda m: m.push(m.number(_U1))),
    "BININT2": ("M", lambda m: m.push(m.number(_U2))),
    "LONG1": ("\x8a", lambda m: m.long(m.number(_U1))),
    "BINFLOAT": ("G", lambda m: m.push(m.number(_F8))),
    "BINUNICODE": ("X", _text(_U4)),
    "SHORT_BINUNICODE": ("\x8c", _text(_U1)),
    "BINUNICODE8": ("\x8d", _text(_U8)),
    "BINBYTES": ("B", _bytes(_U4)),
    "SHORT_BINBYTES": ("C", _bytes(_U1)),
    "BINBYTES8": ("\x8e", _bytes(_U8)),
    "EMPTY_LIST": ("]", lambda m: m.push([])),
    "APPEND": ("a", lambda m: (value := m.stack.pop(), m.top(list).append(value))),
    "APPENDS": ("e", lambda m: (items := m.pop_mark(), m.top(list).extend(items))),
    "EMPTY_TUPLE": (")", _constant(())),
    "TUPLE": ("t", lambda m: m.push(tuple(m.pop_mark()))),
    "TUPLE1": ("\x85", _tuple(1)),
    "TUPLE2": ("\x86", _tuple(2)),
    "TUPLE3": ("\x87", _tuple(3)),
    "EMPTY_DICT": ("}", lambda m: m.push({})),
    "SETITEM": ("s", lambda m: (value := m.stack.pop(), m.set_items([m.stack.pop(), value]))),
    "SETITEMS": ("u", lambda m: m.set_items(m.pop_mark())),
    "BINPUT": ("q", lambda m: m.remember(m.number(_U1))),
    "LONG_BINPUT": ("r", lambda m: m.remember(m.number(_U4))),
    "MEMOIZE": ("\x94", lambda m: m.remember(len(m.memo))),
    "BINGET": ("h", lambda m: m.push(m.memo[m.number(_U1)])),
    "LONG_BINGET": ("j", lambda m: m.push(m.memo[m.number(_U4)])),
    "GLOBAL": ("c", lambda m: m.find(m.line(), m.line())),
    "STACK_GLOBAL": ("\x93", _stack_global),
    "REDUCE": ("R", _reduce),
    "NEWOBJ": ("\x81", _reduce),
    "BUILD": ("b", _Machine.build),
    "BINPERSID": ("Q", _Machine.persistent_id),
}
_HANDLERS = {ord(code): handler for code, handler in _INSTRUCTIONS.values()}
_NAMES = {ord("i"): "INST", ord("o"): "OBJ", ord("P"): "PERSID", ord("S"): "STRING", ord("I"): "INT"} | {
    0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x92: "NEWOBJ_EX", 0x98: "READONLY_BUFFER", 0x97: "NEXT_BUFFER",
}  # fmt: skip
