"""Finds out which bytes of a record may differ in the next one, and what they mean.

The record is read a second time, with numbers, texts and bytes that know their place, and with descriptions for tensors
and storages. Only the bytes of what is then found in a field, in one of the roles known here, may differ; a value that
has, or could have, a second use keeps the record from becoming a template.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from faenet_ocp.record_objects import (
    LOAD_FROM_BYTES,
    NO_HOOKS,
    NUMPY_SCALAR,
    NUMPY_TYPE,
    REBUILD_TENSOR,
    fields_of,
    find,
)
from faenet_ocp.restricted_pickle import Function, PickleReader, check

STORAGE_NUMBERS = 5
"""The last numbers before the elements of a storage: bytes of its stream, key, elements, key again, elements again."""
_Run = tuple[int, slice]  # a part of the record and some of its numbers


class Part(NamedTuple):
    """The bytes from the elements of one tensor to those of the next.

    Attributes:
        form: for ``struct``: constant bytes and numbers by turns.
        constants: the bytes between the numbers.
        head, itemsize: of the storage that follows: bytes of its stream before the elements, of an element.
    """

    form: str
    constants: tuple[bytes, ...]
    head: int = 0
    itemsize: int = 0


class Layout(NamedTuple):
    """What the numbers of a record mean.

    Attributes:
        fields: all of them in their order, with the values of those that are always the same.
        numbers: of a field: name, part, number of the part, what makes the value of it.
        tensors: name, storage, dtype, where the offset in the storage, size and stride are.
    """

    fields: dict[str, Any]
    numbers: list[tuple[str, int, int, Callable[[Any], Any]]]
    tensors: list[tuple[str, int, np.dtype[Any], _Run, _Run, _Run]]


def trace(value: bytes) -> tuple[list[Part], Layout]:
    """Return the parts of a record that can be read, and where its fields are in them.

    Raises:
        one of restricted_pickle.DAMAGE: it has not the usual form.
    """
    reader = _Tracer(value, 0)
    fields = fields_of(reader.load())
    forms = dict.fromkeys(reader.frames, "8s")
    storages: dict[int, _Storage] = {}
    for item in fields.values():
        if isinstance(item, _Number):
            forms[item.start] = item.form
        elif isinstance(item, _Tensor):
            storages[item.storage.start] = item.storage
            for number in (*item.storage.numbers, item.offset, *item.size, *item.stride):
                forms[number.start] = number.form
        else:
            check(isinstance(item, str | int), "a field of another kind")
    starts = sorted(storages)
    parts, places = _cut(value, forms, [storages[start] for start in starts])
    layout = _locate(fields, places, starts)
    check(len(reader.tensors) == len({id(fields[name]) for name, *_ in layout.tensors}), "a tensor that is no field")
    return parts, layout


def _cut(
    value: bytes, forms: dict[int, str], storages: Sequence["_Storage"]
) -> tuple[list[Part], dict[int, tuple[int, int]]]:
    """The parts of a record, and byte to part and number."""
    parts: list[Part] = []
    places = {}
    begin = 0
    for storage in (*storages, None):
        end = len(value) if storage is None else storage.start
        starts = sorted(start for start in forms if begin <= start < end)
        layout, pos = "<", begin
        for index, start in enumerate(starts):
            layout += f"{start - pos}s{forms[start]}"
            pos = start + struct.calcsize("<" + forms[start])
            places[start] = len(parts), index
        if storage is None:
            layout, head, itemsize = layout + f"{end - pos}s", 0, 0
        else:
            last = [number.start for number in storage.numbers]
            check(starts[-STORAGE_NUMBERS:] == last, "a storage in another order")
            head, itemsize = storage.head, storage.dtype.itemsize
        parts.append(Part(layout, struct.unpack_from(layout, value, begin)[::2], head, itemsize))
        begin = end if storage is None else storage.end
    return parts, places


def _locate(fields: dict[str, Any], places: dict[int, tuple[int, int]], starts: list[int]) -> Layout:
    """Where the fields are, with the `starts` of all storages."""

    def run(numbers: tuple[_Number, ...]) -> _Run:
        if not numbers:
            return 0, slice(0, 0)
        part, first = places[numbers[0].start]
        there = [(part, first + index) for index in range(len(numbers))]
        check([places[number.start] for number in numbers] == there, "a shape of scattered numbers")
        return part, slice(first, first + len(numbers))

    layout = Layout(dict.fromkeys(fields), [], [])
    for name, item in fields.items():
        if isinstance(item, _Number):
            layout.numbers.append((name, *places[item.start], item.convert))
        elif isinstance(item, _Tensor):
            storage = starts.index(item.storage.start)
            shape = (run((item.offset,)), run(item.size), run(item.stride))
            layout.tensors.append((name, storage, item.storage.dtype, *shape))
        else:
            layout.fields[name] = str(item) if isinstance(item, str) else item
    return layout


# What stands for the things in a record


@dataclass(frozen=True, slots=True, eq=False)
class _Number:
    """From byte `start`, read by ``struct`` as `form`; `convert` makes the value of what that gives."""

    start: int
    form: str
    convert: Callable[[Any], Any] = int


class _Text(str):
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class _Bytes:
    start: int
    data: bytes
    length: _Number


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    start: int  # of the elements
    end: int
    head: int
    dtype: np.dtype[Any]
    numbers: tuple[_Number, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    storage: _Storage
    offset: _Number
    size: tuple[_Number, ...]
    stride: tuple[_Number, ...]


class _Tracer(PickleReader):
    """Reads what begins at byte `base` of a record."""

    __slots__ = ("base", "frames", "tensors")

    def __init__(self, data: bytes, base: int):
        super().__init__(data, self._find, tuple)
        self.base = base
        self.frames: list[int] = []
        self.tensors: list[_Tensor] = []

    @property
    def place(self) -> int:
        return self.base + self.pos

    # Instructions

    def traced_frame(self) -> None:
        self.frames.append(self.place)
        self.take(8)

    def traced_number(self, form: str, convert: Callable[[Any], Any] = int) -> None:
        self.stack.append(_Number(self.place, form, convert))
        self.take(struct.calcsize("<" + form))

    def traced_bytes(self, form: str) -> None:
        length = _Number(self.place, form)
        data = self.take(self.number(struct.Struct("<" + form)))
        self.stack.append(_Bytes(self.place - len(data), data, length))

    def traced_text(self) -> None:
        text = _Text(self.take(self.number(struct.Struct("<I"))).decode())
        text.end = self.place
        self.stack.append(text)

    # Functions

    def _find(self, module: str, name: str) -> Any:
        known = find(module, name)
        if not isinstance(known, Function) or known in (NO_HOOKS, NUMPY_TYPE):
            return known
        functions: dict[Function, Callable[..., Any]] = {
            LOAD_FROM_BYTES: self._storage,
            REBUILD_TENSOR: self._tensor,
            NUMPY_SCALAR: _scalar,
        }
        return Function(functions[known])

    def _storage(self, payload: _Bytes) -> _Storage:
        reader = _Tracer(payload.data, payload.start)
        for _ in range(3):
            reader.load()
        (_, kind, key, _, elements, _), (again,) = reader.load(), reader.load()
        check(key.isascii() and key.isdigit(), "a storage with an unusual key")
        keys = [_Number(text.end - len(key), f"{len(key)}s") for text in (key, again)]
        start = reader.place + 8
        numbers = (payload.length, keys[0], elements, keys[1], _Number(start - 8, "q"))
        return _Storage(start, payload.start + len(payload.data), start - payload.start, kind.dtype, numbers)

    def _tensor(self, storage: _Storage, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
        self.tensors.append(_Tensor(storage, offset, size, stride))
        return self.tensors[-1]


def _scalar(kind: Any, raw: _Bytes) -> _Number:
    dtype = kind.dtype
    return _Number(raw.start, f"{len(raw.data)}s", lambda data: np.frombuffer(data, dtype)[0].item())


def _float(data: bytes) -> float:
    (number,) = struct.unpack(">d", data)
    return float(number)


_Tracer.instructions = {
    **PickleReader.instructions,
    ord("K"): lambda reader: reader.traced_number("B"),
    ord("M"): lambda reader: reader.traced_number("H"),
    ord("J"): lambda reader: reader.traced_number("i"),
    ord("G"): lambda reader: reader.traced_number("8s", _float),
    ord("C"): lambda reader: reader.traced_bytes("B"),
    ord("B"): lambda reader: reader.traced_bytes("I"),
    ord("X"): _Tracer.traced_text,
    0x95: _Tracer.traced_frame,
}
