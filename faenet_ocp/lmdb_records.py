"""Reads the records of OC20's LMDB files (pickled PyG ``Data``) without being able to run anything.

``pickle.loads`` runs whatever a record asks for, and ``torch.storage._load_from_bytes``, which every pickled tensor
calls, is a hidden ``torch.load``. Narrowing ``pickle.Unpickler.find_class`` does not cure that: before Python 3.14 a
ten-byte record can make it allocate 64 GB (the memo index of ``LONG_BINPUT``), and ``BUILD`` can write attributes of
whatever was found. This module therefore reads the pickle opcodes itself: a machine that knows those that PyG records
consist of (protocols 2 to 5), in which classes are inert marks, only the dozen functions of ``_FUNCTIONS`` can be
called, and every declared size is compared with the bytes that are there. A tensor is a view of its record's bytes.

Record layouts: PyG 1.x stores the attribute dict as the state of ``Data``; PyG 2.x stores a ``GlobalStorage`` with a
``_mapping`` in it. Tensors hold their data as the stream of ``torch.save`` before its zip format: five pickles (magic
number, protocol, system, storage, keys), the number of elements, the raw elements.
"""

import io
import math
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_PROTOCOL = 1001
# The five pickles as torch writes them for a tensor in CPU memory of a little-endian machine. Most of the time of a
# record goes into these, so they are matched as a whole; any other way to write the same is read pickle by pickle.
_USUAL_STREAM = re.compile(
    rb"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.\x80\x02M\xe9\x03\."  # magic number, protocol
    rb"\x80\x02\}q\x00\(X\x10\x00\x00\x00protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00little_endianq\x02\x88"
    rb"X\n\x00\x00\x00type_sizesq\x03\}q\x04\(X\x05\x00\x00\x00shortq\x05K\x02X\x03\x00\x00\x00intq\x06K\x04"
    rb"X\x04\x00\x00\x00longq\x07K[\x04\x08]uu\."
    rb"\x80\x02\(X\x07\x00\x00\x00storageq\x00ctorch\n(?P<type>[A-Za-z]+)\nq\x01"
    rb"(?P<key>X[\x01-\x40]\x00\x00\x00[0-9]+)q\x02X\x03\x00\x00\x00cpuq\x03"
    rb"(?:K(?P<n1>.)|M(?P<n2>..)|J(?P<n4>.{4}))Ntq\x04Q\."
    rb"\x80\x02\]q\x00(?P=key)q\x01a\.",
    re.DOTALL,
)
_STORAGE_DTYPES = {
    name.encode() + b"Storage": np.dtype(code)
    for name, code in {
        "Double": "<f8",
        "Float": "<f4",
        "Half": "<f2",
        "Long": "<i8",
        "Int": "<i4",
        "Short": "<i2",
        "Char": "<i1",
        "Byte": "<u1",
        "Bool": "?",
    }.items()
}
_NUMPY_KINDS = "biuf"
_MAX_DIMS = 8


class RecordError(ValueError):
    """A record that cannot be read, or that asks for something a record has no business with."""


class _Class(NamedTuple):
    """The name of a class; never the class."""

    module: str
    name: str


class _StorageType(NamedTuple):
    dtype: np.dtype[Any]


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype[Any]
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class _Function:
    """One of ours that stands for a function named in a pickle."""

    call: Callable[..., Any]


@dataclass(slots=True, eq=False)
class _Object:
    """An instance of a class named in a pickle: its name and its state, no behaviour."""

    cls: _Class
    state: dict[str, Any] | None = None


@dataclass(slots=True, eq=False)
class _NumpyType:
    """numpy.dtype as it is pickled: first the code ("f8"), then by BUILD the byte order."""

    code: str
    order: str = "="

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


@dataclass(slots=True, eq=False)
class _NumpyArray:
    """numpy.ndarray as it is pickled: empty at first, filled by BUILD."""

    value: NDArray[Any] | None = None


def decode_record(value: bytes) -> dict[str, Any]:
    """Return the fields of a pickled PyG ``Data`` of PyG 1.x or 2.x.

    Args:
        value: the bytes stored under a key.

    Returns:
        Field name to value: tensors and arrays as read-only numpy arrays (views of `value`), numbers and strings as
        they are. Fields that are None or private are left out.

    Raises:
        RecordError: `value` is cut short, damaged, not a ``Data``, or names a class or function outside the list of
            this module; nothing it names has been run or imported.
    """
    root = _read(value)
    if not isinstance(root, _Object) or root.cls.name != "Data" or root.state is None:
        raise RecordError("is no pickled torch_geometric Data")
    fields: Any = root.state
    store = fields.get("_store")
    if isinstance(store, _Object):
        fields = (store.state or {}).get("_mapping")
    if not isinstance(fields, Mapping):
        raise RecordError("holds a Data without fields")
    return {
        name: item.value if isinstance(item, _NumpyArray) else item
        for name, item in fields.items()
        if item is not None and not name.startswith("_")
    }


def decode_count(value: bytes) -> int:
    """Return the number stored under the key ``length``.

    Raises:
        RecordError: it is not a whole number, at least 0.
    """
    count = _read(value)
    if isinstance(count, np.ndarray) and count.size == 1:
        count = count.item()
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise RecordError(f"is no number of records, but {count if type(count) is int else _name(count)}")
    return count


def _read(value: bytes) -> Any:
    reader = _PickleReader(value)
    try:
        result = reader.load()
    except RecordError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
        raise RecordError(f"is damaged at byte {reader.pos} of {len(value)} ({type(error).__name__})") from error
    if reader.pos != len(value):
        raise RecordError(f"goes on after its end ({len(value) - reader.pos} bytes)")
    return result


class _PickleReader:
    """Reads one pickle after another from `data`; ``load`` leaves `pos` behind the pickle it returns."""

    __slots__ = ("data", "marks", "memo", "pos", "stack")

    def __init__(self, data: bytes, pos: int = 0):
        self.data = data
        self.pos = pos

    def load(self) -> Any:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        data, handlers = self.data, _HANDLERS
        while True:
            opcode = data[self.pos]
            self.pos += 1
            if opcode == _STOP:
                return self.stack.pop()
            handler = handlers.get(opcode)
            if handler is None:
                raise RecordError(f"holds the pickle instruction {bytes((opcode,))!r}, which is not allowed")
            handler(self)

    # What the handlers are made of

    def take(self, size: int) -> bytes:
        start, self.pos = self.pos, self.pos + size
        if self.pos > len(self.data):
            raise RecordError(f"is cut short: {size} bytes declared, {len(self.data) - start} left")
        return self.data[start : self.pos]

    def number(self, layout: struct.Struct) -> Any:
        (result,) = layout.unpack_from(self.data, self.pos)
        self.pos += layout.size
        return result

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
        items = self.pop_mark()  # changes self.stack
        self.stack.append(tuple(items))

    def top_n(self, count: int) -> None:
        if len(self.stack) < count:
            raise RecordError("is damaged: a tuple lacks items")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise RecordError("is damaged: items for something that is no dict")
        for name, item in zip(items[::2], items[1::2], strict=True):
            if type(name) is not str:  # also keeps nested tuples, slow to hash, out of dicts
                raise RecordError(f"holds a dict with a key of type {type(name).__name__}")
            target[name] = item

    def set_item(self) -> None:
        item, name = self.stack.pop(), self.stack.pop()
        self.set_items([name, item])

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise RecordError("is damaged: items for something that is no list")
        target.extend(items)

    def find(self, module: str, name: str) -> None:
        self.stack.append(_find(module, name))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise RecordError("is damaged: a class whose name is no text")
        self.find(module, name)

    def new_object(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if type(cls) is not _Class or args != ():
            raise RecordError(f"makes an object of {_name(cls)} with arguments")
        self.stack.append(_Object(cls))

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Function or type(args) is not tuple:
            raise RecordError(f"calls {_name(function)}")
        self.stack.append(function.call(*args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is _Object and type(state) is dict:
            target.state = state
        elif type(target) is _NumpyType and type(state) is tuple:
            _check(state[1] in ("<", ">", "|", "="), "a numpy type of unknown byte order")
            target.order = state[1]
        elif type(target) is _NumpyArray and type(state) is tuple:
            _, shape, dtype, is_fortran, raw = state
            target.value = _numpy_from_buffer(raw, dtype, shape, "F" if is_fortran else "C")
        else:
            raise RecordError(f"sets the state of {_name(target)}")

    def persistent(self) -> None:
        kind, storage_type, key, _location, count, view = self.stack.pop()
        _check(kind == "storage" and view is None, "a tensor storage of unknown layout")
        _check(type(storage_type) is _StorageType and type(key) is str and type(count) is int, "a damaged storage")
        self.stack.append(_Storage(key, storage_type.dtype, count))


def _name(item: Any) -> str:
    """What to call an item in a message; never its repr, which a record can make endless."""
    return f"{item.module}.{item.name}" if isinstance(item, _Class) else type(item).__name__.lstrip("_")


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise RecordError(f"holds {what}")


# Functions that a record may call


def _read_storage(payload: Any) -> NDArray[Any]:
    """Stands for ``torch.storage._load_from_bytes``: the elements (n,) of a tensor storage, as a view of `payload`."""
    _check(type(payload) is bytes, "a tensor storage that is no bytes")
    if payload.startswith(b"PK\x03\x04"):
        return _read_zip_storage(payload)
    usual = _USUAL_STREAM.match(payload)
    if usual is None:
        return _read_stream(payload)
    dtype = _STORAGE_DTYPES.get(usual["type"])
    _check(dtype is not None, f"a storage of type {usual['type']!r}")
    count = usual["n1"] or usual["n2"] or usual["n4"]
    return _read_elements(payload, usual.end(), dtype, int.from_bytes(count, "little"))


def _read_stream(payload: bytes) -> NDArray[Any]:
    reader = _PickleReader(payload)
    _check(reader.load() == _TORCH_MAGIC, "a tensor storage that is no torch.save stream")
    _check(reader.load() == _TORCH_PROTOCOL, "a torch.save stream of unknown protocol")
    system = reader.load()
    _check(type(system) is dict and system.get("little_endian") is True, "big-endian tensors")
    storage, keys = reader.load(), reader.load()
    _check(type(storage) is _Storage and keys == [storage.key], "a torch.save stream that is no single storage")
    return _read_elements(payload, reader.pos, storage.dtype, storage.count)


def _read_elements(payload: bytes, start: int, dtype: np.dtype[Any], declared: int) -> NDArray[Any]:
    (count,) = _INT64.unpack_from(payload, start)
    start += _INT64.size
    available = len(payload) - start
    if count != declared or count < 0 or count * dtype.itemsize != available:
        raise RecordError(f"holds a storage of {declared} elements of {dtype}, with {available} bytes for them")
    return np.frombuffer(payload, dtype, count, start)


def _read_zip_storage(payload: bytes) -> NDArray[Any]:
    """The same for a storage in the zip format of ``torch.save``, through torch's own restricted reader."""
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
        _check(unpacked <= len(payload), "a compressed tensor storage")
        storage = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        return torch.tensor(storage, dtype=storage.dtype).numpy()
    except RecordError:
        raise
    except Exception as error:  # zip files and torch's reader fail in many ways
        raise RecordError(f"holds a tensor storage that torch.load(weights_only=True) refuses: {error!r:.200}") from error


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, extra: Any = None
) -> NDArray[Any]:
    """Stands for ``torch._utils._rebuild_tensor_v2``: an array of that shape in the storage."""
    _check(type(storage) is np.ndarray and storage.ndim == 1, "a tensor without storage")
    numbers = (offset, *size, *stride)
    plausible = len(size) == len(stride) <= _MAX_DIMS and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    _check(plausible, "a tensor of impossible shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else -1
    if count > len(storage) or last >= len(storage):
        raise RecordError(f"holds a tensor of shape {size} in a storage of {len(storage)} elements")
    if last - offset + 1 == count and stride == _contiguous_stride(size):
        return storage[offset : offset + count].reshape(size)
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _contiguous_stride(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))


def _numpy_type(code: Any, *_flags: Any) -> _NumpyType:
    _check(type(code) is str and code[:1] in _NUMPY_KINDS and code[1:] in ("1", "2", "4", "8"), "a numpy type")
    return _NumpyType(code)


def _numpy_scalar(dtype: Any, raw: Any) -> int | float | bool:
    _check(type(dtype) is _NumpyType and type(raw) is bytes and len(raw) == dtype.dtype.itemsize, "a damaged number")
    return np.frombuffer(raw, dtype.dtype)[0].item()


def _numpy_from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    _check(type(raw) is bytes and type(dtype) is _NumpyType and order in ("C", "F"), "a numpy array of unknown kind")
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)


_NUMPY_CALLS = {
    "multiarray.scalar": _Function(_numpy_scalar),
    "multiarray._reconstruct": _Function(lambda *_: _NumpyArray()),
    "numeric._frombuffer": _Function(_numpy_from_buffer),
}
_KNOWN: dict[str, _Function | _Class | _StorageType] = {
    "torch._utils._rebuild_tensor_v2": _Function(_rebuild_tensor),
    "torch.storage._load_from_bytes": _Function(_read_storage),
    "collections.OrderedDict": _Function(lambda: {}),  # backward hooks: always empty
    "numpy.dtype": _Function(_numpy_type),
    "numpy.ndarray": _Class("numpy", "ndarray"),
    **{f"numpy.{core}.{name}": call for core in ("core", "_core") for name, call in _NUMPY_CALLS.items()},
    **{f"torch.{name.decode()}": _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
}


def _find(module: str, name: str) -> _Function | _Class | _StorageType:
    known = _KNOWN.get(f"{module}.{name}")
    if known is None:
        if not module.startswith("torch_geometric.data."):
            raise RecordError(f"names {module}.{name}"[:200] + ", which no OC20 record needs: refused")
        known = _Class(module, name)  # PyG's classes move between its versions, and are marks only
    return known


# Instructions: everything that PyG and torch write with protocols 2 to 5, and nothing else

_STOP = ord(".")
_UINT8, _UINT16, _UINT32, _UINT64 = (struct.Struct("<" + code) for code in "BHIQ")
_INT32, _INT64 = struct.Struct("<i"), struct.Struct("<q")
_FLOAT64 = struct.Struct(">d")

_HANDLERS: dict[int, Callable[[_PickleReader], Any]] = {
    ord(opcode): handler
    for opcode, handler in {
        "\x80": lambda r: r.take(1),  # PROTO
        "\x95": lambda r: r.take(8),  # FRAME
        "\x94": lambda r: r.memoize(len(r.memo)),
        "q": lambda r: r.memoize(r.number(_UINT8)),
        "r": lambda r: r.memoize(r.number(_UINT32)),
        "h": lambda r: r.stack.append(r.memo[r.number(_UINT8)]),
        "j": lambda r: r.stack.append(r.memo[r.number(_UINT32)]),
        "N": lambda r: r.stack.append(None),
        "\x88": lambda r: r.stack.append(True),
        "\x89": lambda r: r.stack.append(False),
        "K": lambda r: r.stack.append(r.number(_UINT8)),
        "M": lambda r: r.stack.append(r.number(_UINT16)),
        "J": lambda r: r.stack.append(r.number(_INT32)),
        "\x8a": lambda r: r.stack.append(int.from_bytes(r.take(r.number(_UINT8)), "little", signed=True)),
        "G": lambda r: r.stack.append(r.number(_FLOAT64)),
        "\x8c": lambda r: r.stack.append(r.take(r.number(_UINT8)).decode()),
        "X": lambda r: r.stack.append(r.take(r.number(_UINT32)).decode()),
        "\x8d": lambda r: r.stack.append(r.take(r.number(_UINT64)).decode()),
        "C": lambda r: r.stack.append(r.take(r.number(_UINT8))),
        "B": lambda r: r.stack.append(r.take(r.number(_UINT32))),
        "\x8e": lambda r: r.stack.append(r.take(r.number(_UINT64))),
        "\x96": lambda r: r.stack.append(r.take(r.number(_UINT64))),  # BYTEARRAY8
        "(": _PickleReader.mark,
        ")": lambda r: r.stack.append(()),
        "t": _PickleReader.tuple_from_mark,
        "\x85": lambda r: r.top_n(1),
        "\x86": lambda r: r.top_n(2),
        "\x87": lambda r: r.top_n(3),
        "]": lambda r: r.stack.append([]),
        "a": lambda r: r.extend([r.stack.pop()]),
        "e": lambda r: r.extend(r.pop_mark()),
        "}": lambda r: r.stack.append({}),
        "s": _PickleReader.set_item,
        "u": lambda r: r.set_items(r.pop_mark()),
        "c": lambda r: r.find(r.line(), r.line()),
        "\x93": _PickleReader.stack_global,
        "\x81": _PickleReader.new_object,
        "R": _PickleReader.reduce,
        "b": _PickleReader.build,
        "Q": _PickleReader.persistent,
    }.items()
}
