"""A pickle reader that cannot run anything but the functions it is given.

``pickle.loads`` runs whatever its input asks for, and narrowing ``pickle.Unpickler.find_class`` is no full cure: in
Python 3.11 ten bytes can make it fill 64 GB of memory (the memo index of ``LONG_BINPUT``), and ``BUILD`` can write
attributes of whatever was found. This reader knows the instructions that protocols 2 to 5 use for plain data, objects
and calls, and nothing else. Classes are marks, objects are an inert name with a state, the only calls are to a
``Function`` that the caller's `find` returned, and every declared size is compared with the bytes that are there.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from faenet_ocp.common.checks import RecordError


class ClassMark(NamedTuple):
    """The name of a class; never the class."""

    module: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """One of our own functions, standing for a function named in a pickle."""

    call: Callable[..., Any]


class Stateful:
    """What a pickle may set the state of."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        raise NotImplementedError


class Instance(Stateful):
    """An object of a class named in a pickle: its name and its attributes, no behaviour."""

    __slots__ = ("attributes", "cls")

    def __init__(self, cls: ClassMark):
        self.cls = cls
        self.attributes: dict[str, Any] = {}

    def build(self, state: Any) -> None:
        check(type(state) is dict, "an object whose state is no dict")
        self.attributes = state


Find = Callable[[str, str], Any]
"""(module, name) to what stands for it: a Function, a ClassMark, a mark of the caller's own; or RecordError."""


DAMAGE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError, struct.error)
"""What a damaged pickle can raise, apart from RecordError (a ValueError)."""


def check(condition: bool, what: str) -> None:
    """Raise RecordError("holds <what>") unless `condition`."""
    if not condition:
        raise RecordError(f"holds {what}")


def type_name(item: Any) -> str:
    """What to call an item in a message: never its repr, which a record can make endless."""
    return f"{item.module}.{item.name}"[:200] if isinstance(item, ClassMark) else type(item).__name__


def load(data: bytes, find: Find) -> Any:
    """Read `data`, one whole pickle.

    Args:
        data: the pickle.
        find: what stands for a name.

    Raises:
        RecordError: it is cut short, damaged, or asks for what is not allowed; says what and where.
    """
    reader = PickleReader(data, find)
    try:
        result = reader.load()
    except RecordError:
        raise
    except DAMAGE as error:
        raise RecordError(f"is damaged at byte {reader.pos} of {len(data)} ({type(error).__name__})") from error
    if reader.pos != len(data):
        raise RecordError(f"goes on after its end, for {len(data) - reader.pos} bytes")
    return result


class PickleReader:
    """Reads one pickle after another: ``load`` leaves `pos` behind the pickle that it returns."""

    __slots__ = ("data", "find", "marks", "memo", "persistent", "pos", "stack")
    instructions: Mapping[int, Callable[[Any], Any]]
    """Code to what it does to a reader; a subclass may have its own."""

    def __init__(self, data: bytes, find: Find, persistent: Callable[[Any], Any] | None = None):
        self.data, self.find, self.persistent = data, find, persistent
        self.pos = 0

    def load(self) -> Any:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        data, instructions = self.data, self.instructions
        while True:
            opcode = data[self.pos]
            self.pos += 1
            if opcode == _MEMOIZE:  # every third instruction
                self.memo[len(self.memo)] = self.stack[-1]
                continue
            if opcode == _SHORT_TEXT:
                self.stack.append(self.take(self.byte()).decode())
                continue
            if opcode == _STOP:
                return self.stack.pop()
            instruction = instructions.get(opcode)
            if instruction is None:
                raise RecordError(f"holds the pickle instruction {bytes((opcode,))!r}, which is not allowed")
            instruction(self)

    # What instructions are made of

    def take(self, size: int) -> bytes:
        start, self.pos = self.pos, self.pos + size
        if self.pos > len(self.data):
            raise RecordError(f"is cut short: {size} bytes declared, {len(self.data) - start} left")
        return self.data[start : self.pos]

    def number(self, layout: struct.Struct) -> Any:
        (result,) = layout.unpack_from(self.data, self.pos)
        self.pos += layout.size
        return result

    def byte(self) -> int:
        self.pos += 1
        return self.data[self.pos - 1]

    def line(self) -> str:
        start, end = self.pos, self.data.index(b"\n", self.pos)
        self.pos = end + 1
        return self.data[start:end].decode()

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    # Instructions that need more than an expression

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def tuple_from_mark(self) -> None:
        items = self.pop_mark()  # before self.stack is looked up: it changes
        self.stack.append(tuple(items))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def set_item(self) -> None:
        item, name = self.stack.pop(), self.stack.pop()
        self.set_items([name, item])

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        check(type(target) is dict, f"items for a {type_name(target)}")
        for name, item in zip(items[::2], items[1::2], strict=True):
            check(isinstance(name, str), f"a dict with a key of type {type_name(name)}")  # nested tuples hash for ever
            target[name] = item

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        check(type(target) is list, f"list items for a {type_name(target)}")
        target.extend(items)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        check(isinstance(name, str) and isinstance(module, str), "a class whose name is no text")
        self.stack.append(self.find(module, name))

    def new_object(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        check(isinstance(cls, ClassMark) and args == (), f"an object of {type_name(cls)} made with arguments")
        self.stack.append(Instance(cls))

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        check(isinstance(function, Function) and type(args) is tuple, f"a call of {type_name(function)}")
        self.stack.append(function.call(*args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        check(isinstance(target, Stateful), f"a state for a {type_name(target)}")
        target.build(state)

    def persistent_id(self) -> None:
        identifier = self.stack.pop()
        if self.persistent is None:
            raise RecordError("holds a persistent id")
        self.stack.append(self.persistent(identifier))


_STOP, _MEMOIZE, _SHORT_TEXT = ord("."), 0x94, 0x8C
_UINT16, _UINT32, _UINT64 = (struct.Struct("<" + code) for code in "HIQ")
_INT32, _FLOAT64 = struct.Struct("<i"), struct.Struct(">d")

PickleReader.instructions = {
    ord(opcode): instruction
    for opcode, instruction in {
        "\x80": lambda r: r.take(1),  # PROTO
        "\x95": lambda r: r.take(8),  # FRAME
        "q": lambda r: r.memoize(r.byte()),
        "r": lambda r: r.memoize(r.number(_UINT32)),
        "h": lambda r: r.stack.append(r.memo[r.byte()]),
        "j": lambda r: r.stack.append(r.memo[r.number(_UINT32)]),
        "N": lambda r: r.stack.append(None),
        "\x88": lambda r: r.stack.append(True),
        "\x89": lambda r: r.stack.append(False),
        "K": lambda r: r.stack.append(r.byte()),
        "M": lambda r: r.stack.append(r.number(_UINT16)),
        "J": lambda r: r.stack.append(r.number(_INT32)),
        "\x8a": lambda r: r.stack.append(int.from_bytes(r.take(r.byte()), "little", signed=True)),
        "G": lambda r: r.stack.append(r.number(_FLOAT64)),
        "X": lambda r: r.stack.append(r.take(r.number(_UINT32)).decode()),
        "\x8d": lambda r: r.stack.append(r.take(r.number(_UINT64)).decode()),
        "C": lambda r: r.stack.append(r.take(r.byte())),
        "B": lambda r: r.stack.append(r.take(r.number(_UINT32))),
        "\x8e": lambda r: r.stack.append(r.take(r.number(_UINT64))),
        "\x96": lambda r: r.stack.append(r.take(r.number(_UINT64))),  # BYTEARRAY8
        "(": PickleReader.mark,
        ")": lambda r: r.stack.append(()),
        "t": PickleReader.tuple_from_mark,
        "\x85": lambda r: r.tuple_of(1),
        "\x86": lambda r: r.tuple_of(2),
        "\x87": lambda r: r.tuple_of(3),
        "]": lambda r: r.stack.append([]),
        "a": lambda r: r.extend([r.stack.pop()]),
        "e": lambda r: r.extend(r.pop_mark()),
        "}": lambda r: r.stack.append({}),
        "s": PickleReader.set_item,
        "u": lambda r: r.set_items(r.pop_mark()),
        "c": lambda r: r.stack.append(r.find(r.line(), r.line())),
        "\x93": PickleReader.stack_global,
        "\x81": PickleReader.new_object,
        "R": PickleReader.reduce,
        "b": PickleReader.build,
        "Q": PickleReader.persistent_id,
    }.items()
}
