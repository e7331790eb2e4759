"""Reads the records of OC20's LMDB files, pickled PyG ``Data`` objects, without being able to run anything.

Layouts: PyG 1.x stores the attribute dict as the state of ``Data``; PyG 2.x stores a ``GlobalStorage`` with a
``_mapping`` in it. A tensor is a call of ``_rebuild_tensor_v2`` on a storage, and a storage a call of
``_load_from_bytes``, which in torch is a hidden ``torch.load``. Here both are functions of this module, and the payload
is read as data: five pickles (magic number, protocol, system, storage, keys), the number of elements, the raw elements.
Tensors come out as numpy views of the record's bytes. (No torch pickles a storage in its newer zip format.)
"""

import math
import re
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from faenet_ocp.restricted_pickle import (
    ClassMark,
    Function,
    Instance,
    PickleReader,
    RecordError,
    Stateful,
    check,
    load,
    type_name,
)

__all__ = ["RecordError", "decode_count", "decode_record"]

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_PROTOCOL = 1001
_MAX_DIMS = 8
_INT64 = struct.Struct("<q")
_STORAGE_DTYPES = {
    f"{name}Storage": np.dtype(code)
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
# The five pickles as torch writes them for a tensor in the memory of a little-endian machine. Reading these one by one
# takes half of a record's time, so they are matched as a whole; anything else is read pickle by pickle.
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


def decode_record(value: bytes) -> dict[str, Any]:
    """Return the fields of a pickled ``Data`` of PyG 1.x or 2.x.

    Args:
        value: the bytes stored under a key.

    Returns:
        Field name to value: tensors and arrays as read-only numpy arrays (views of `value`), numbers and strings as
        they are. Fields that are None or private are left out.

    Raises:
        RecordError: `value` is cut short, damaged, not a ``Data``, or names a class or function that no OC20 record
            needs; nothing it names has been run or imported.
    """
    root = load(value, _find, _mark)
    if not isinstance(root, Instance) or root.cls.name != "Data":
        raise RecordError(f"is no pickled torch_geometric Data but a {type_name(root)}")
    fields: Any = root.attributes
    store = fields.get("_store")
    if isinstance(store, Instance):
        fields = store.attributes.get("_mapping")
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
        RecordError: it is no whole number, at least 0.
    """
    count = load(value, _find)
    if isinstance(count, np.ndarray) and count.size == 1:
        count = count.item()
    if type(count) is not int or count < 0:
        raise RecordError(f"is no number of records but {count if type(count) is int else type_name(count)}")
    return count


# Tensors


class _StorageType(NamedTuple):
    dtype: np.dtype[Any]


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype[Any]
    elements: int


def _storage_from_id(identifier: Any) -> _Storage:
    kind, storage_type, key, _location, elements, view = identifier
    check(kind == "storage" and view is None, "a tensor storage of unknown layout")
    check(type(storage_type) is _StorageType and type(key) is str and type(elements) is int, "a damaged storage")
    return _Storage(key, storage_type.dtype, elements)


def _load_from_bytes(payload: Any) -> NDArray[Any]:
    """Stands for ``torch.storage._load_from_bytes``: the elements (n,) of a storage, as a view of `payload`."""
    check(type(payload) is bytes, "a tensor storage that is no bytes")
    usual = _USUAL_STREAM.match(payload)
    if usual is None:
        return _read_stream(payload)
    dtype = _STORAGE_DTYPES.get(usual["type"].decode())
    if dtype is None:
        raise RecordError(f"holds a tensor storage of type {usual['type']!r:.80}")
    elements = usual["n1"] or usual["n2"] or usual["n4"]
    return _read_elements(payload, usual.end(), dtype, int.from_bytes(elements, "little"))


def _read_stream(payload: bytes) -> NDArray[Any]:
    reader = PickleReader(payload, _find, _storage_from_id)
    check(reader.load() == _TORCH_MAGIC, "a tensor storage that is no torch.save stream")
    check(reader.load() == _TORCH_PROTOCOL, "a torch.save stream of unknown protocol")
    system = reader.load()
    check(type(system) is dict and system.get("little_endian") is True, "big-endian tensors")
    storage, keys = reader.load(), reader.load()
    check(type(storage) is _Storage and keys == [storage.key], "a torch.save stream that is no single storage")
    return _read_elements(payload, reader.pos, storage.dtype, storage.elements)


def _read_elements(payload: bytes, start: int, dtype: np.dtype[Any], declared: int) -> NDArray[Any]:
    (elements,) = _INT64.unpack_from(payload, start)
    start += _INT64.size
    available = len(payload) - start
    if elements != declared or elements < 0 or elements * dtype.itemsize != available:
        raise RecordError(f"holds a storage of {declared} elements of {dtype}, with {available} bytes for them")
    return np.frombuffer(payload, dtype, elements, start)


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, extra: Any = None
) -> NDArray[Any]:
    """Stands for ``torch._utils._rebuild_tensor_v2``: an array of that shape in the storage.

    A shape with more elements than the storage (an expanded tensor) is refused: its copy could be of any size.
    """
    check(type(storage) is np.ndarray and storage.ndim == 1, "a tensor without storage")
    elements, last, is_contiguous = _extent(offset, size, stride)
    if elements > len(storage) or last >= len(storage):
        raise RecordError(f"holds a tensor of shape {size} in a storage of {len(storage)} elements")
    if is_contiguous:
        return storage[offset : offset + elements].reshape(size)
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


@lru_cache(maxsize=4096)
def _extent(offset: Any, size: Any, stride: Any) -> tuple[int, int, bool]:
    """Number of elements of a tensor, place of the last one in its storage, whether they lie one after the other."""
    numbers = (offset, *size, *stride)
    plausible = len(size) == len(stride) <= _MAX_DIMS and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    check(plausible, "a tensor of impossible shape")
    elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if elements else -1
    return elements, last, stride == tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))


# A whole tensor at once. After its first tensor, a record of PyG holds the others as the sequence of 30 instructions
# below; read one by one they take most of the time of a record. Anything else is read one by one.

_NUMBER = rb"(?:K.|M..|J....)"
_FRAME = rb"(?:\x95.{8})?"  # the pickler begins a new one after much data
_TENSOR_HEAD = re.compile(rb"h(?P<load>.)" + _FRAME + rb"(?:B(?P<long>....)|C(?P<short>.))", re.DOTALL)
_TENSOR_TAIL = re.compile(
    _FRAME + rb"\x94\x85\x94R\x94K\x00"  # (bytes,), the call for the storage, offset 0
    rb"(?P<size>" + _NUMBER + rb"{1,3})(?P<size_end>[\x85-\x87])\x94"
    rb"(?P<stride>" + _NUMBER + rb"{1,3})(?P<stride_end>[\x85-\x87])\x94"
    rb"\x89h(?P<hooks>.)\)R\x94t\x94R\x94",  # False, OrderedDict(), the call for the tensor
    re.DOTALL,
)


def _mark(reader: PickleReader) -> None:
    """The instruction MARK, and where it begins the usual sequence for a tensor, all of that."""
    if not (reader.stack and reader.stack[-1] is _REBUILD_TENSOR and _read_tensor(reader)):
        reader.mark()


def _read_tensor(reader: PickleReader) -> bool:
    """Does what the instructions of a tensor would do one by one; False: it is not the usual sequence."""
    data, memo = reader.data, reader.memo
    head = _TENSOR_HEAD.match(data, reader.pos)
    if head is None or memo.get(head["load"][0]) is not _LOAD_FROM_BYTES:
        return False
    end = head.end() + int.from_bytes(head["long"] or head["short"], "little")
    tail = _TENSOR_TAIL.match(data, end)
    if tail is None or memo.get(tail["hooks"][0]) is not _NO_HOOKS:
        return False
    size, stride = _tuple(tail["size"], tail["size_end"]), _tuple(tail["stride"], tail["stride_end"])
    if size is None or stride is None:
        return False
    payload = data[head.end() : end]
    storage, hooks = _load_from_bytes(payload), _NO_HOOKS.call()
    tensor = _rebuild_tensor(storage, 0, size, stride, False, hooks)
    arguments = (storage, 0, size, stride, False, hooks)
    for item in (payload, (payload,), storage, size, stride, hooks, arguments, tensor):
        memo[len(memo)] = item
    reader.stack[-1] = tensor
    reader.pos = tail.end()
    return True


@lru_cache(maxsize=4096)
def _tuple(numbers: bytes, end: bytes) -> tuple[int, ...] | None:
    """The tuple made by the instructions for some numbers and TUPLE1, 2 or 3; None if these are not as many."""
    result, place = [], 0
    while place < len(numbers):
        width = {ord("K"): 1, ord("M"): 2, ord("J"): 4}[numbers[place]]
        number = numbers[place + 1 : place + 1 + width]
        result.append(int.from_bytes(number, "little", signed=width == 4))
        place += 1 + width
    return tuple(result) if len(result) == end[0] - 0x84 else None


# Numbers and arrays of numpy


class _NumpyType(Stateful):
    """numpy.dtype as it is pickled: first its code ("f8"), then, as a state, the byte order."""

    __slots__ = ("dtype",)

    def __init__(self, code: str):
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        check(type(state) is tuple and state[1] in ("<", ">", "|", "="), "a numpy type of unknown byte order")
        self.dtype = self.dtype.newbyteorder(state[1])


class _NumpyArray(Stateful):
    """numpy.ndarray as it is pickled: empty at first, filled by its state."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: NDArray[Any] | None = None

    def build(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, raw = state
        self.value = _numpy_from_buffer(raw, dtype, shape, "F" if is_fortran else "C")


def _numpy_type(code: Any, *_flags: Any) -> _NumpyType:
    check(type(code) is str and re.fullmatch("b1|[iu][1248]|f[248]", code) is not None, "a numpy type of no numbers")
    return _NumpyType(code)


def _numpy_scalar(dtype: Any, raw: Any) -> int | float | bool:
    check(type(dtype) is _NumpyType and type(raw) is bytes and len(raw) == dtype.dtype.itemsize, "a damaged number")
    return np.frombuffer(raw, dtype.dtype)[0].item()


def _numpy_from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    check(type(raw) is bytes and type(dtype) is _NumpyType and type(shape) is tuple, "a numpy array of unknown kind")
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)


# All that a record may name

_NUMPY_FUNCTIONS = {
    "multiarray.scalar": Function(_numpy_scalar),
    "multiarray._reconstruct": Function(lambda *_: _NumpyArray()),
    "numeric._frombuffer": Function(_numpy_from_buffer),
}
_REBUILD_TENSOR, _LOAD_FROM_BYTES = Function(_rebuild_tensor), Function(_load_from_bytes)
_NO_HOOKS = Function(lambda: {})  # backward hooks: empty
_KNOWN: dict[str, Function | ClassMark | _StorageType] = {
    "torch._utils._rebuild_tensor_v2": _REBUILD_TENSOR,
    "torch.storage._load_from_bytes": _LOAD_FROM_BYTES,
    "collections.OrderedDict": _NO_HOOKS,
    "numpy.dtype": Function(_numpy_type),
    "numpy.ndarray": ClassMark("numpy", "ndarray"),
    **{f"numpy.{core}.{name}": function for core in ("core", "_core") for name, function in _NUMPY_FUNCTIONS.items()},
    **{f"torch.{name}": _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
}


def _find(module: str, name: str) -> Function | ClassMark | _StorageType:
    known = _KNOWN.get(f"{module}.{name}")
    if known is None:
        if not module.startswith("torch_geometric.data."):
            raise RecordError(f"names {module}.{name}"[:200] + ", which no OC20 record needs: refused")
        known = ClassMark(module, name)  # PyG's classes have moved between its versions; they are marks only
    return known
