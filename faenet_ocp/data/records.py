"""Reads the records of OC20's LMDB files, pickled PyG ``Data`` objects, without being able to run anything.

Layouts: PyG 1.x stores the attribute dict as the state of ``Data``; PyG 2.x stores a ``GlobalStorage`` with a
``_mapping`` in it. Instruction by instruction they are read by ``restricted_pickle``; here is what they may name, and
what stands for it.

A tensor is pickled as a call of ``_rebuild_tensor_v2`` on a storage, and a storage as a call of ``_load_from_bytes``,
which in torch is a hidden ``torch.load``. Here both are functions of this module, and the payload is read as data: five
pickles (magic number, protocol, system, storage, keys), the number of elements, the raw elements. Tensors come out as
numpy views of the payload. (No torch pickles a storage in its newer zip format.)
"""

import math
import re
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from faenet_ocp.common.checks import RecordError
from faenet_ocp.data.restricted_pickle import (
    ClassMark,
    Function,
    Instance,
    PickleReader,
    Stateful,
    check,
    load,
    type_name,
)

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_PROTOCOL = 1001
_MAX_DIMS = 8
# The first three pickles as torch writes them on a little-endian machine, where most instructions of a storage are.
_USUAL_START = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    b"\x80\x02}q\x00(X\x10\x00\x00\x00protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00little_endianq\x02\x88"
    b"X\n\x00\x00\x00type_sizesq\x03}q\x04(X\x05\x00\x00\x00shortq\x05K\x02X\x03\x00\x00\x00intq\x06K\x04"
    b"X\x04\x00\x00\x00longq\x07K\x04uu."
)
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


def decode_record(value: bytes) -> dict[str, Any]:
    """Return the fields of a pickled ``Data`` of PyG 1.x or 2.x.

    Args:
        value: the bytes stored under a key.

    Returns:
        Field name to value: tensors and arrays as read-only numpy arrays (views of `value` or of parts of it), numbers
        and strings as they are. Fields that are None or private are left out.

    Raises:
        RecordError: `value` is cut short, damaged, not a ``Data``, or names a class or function that no OC20 record
            needs; nothing it names has been run or imported.
    """
    root = load(value, _find)
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
    """Return the number stored under the key ``length``, pickled or as text.

    Raises:
        RecordError: it is no whole number, at least 0.
    """
    count = value.strip() if value.strip().isdigit() else load(value, _find)
    if isinstance(count, str | bytes) and count.isdigit():
        count = int(count)
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
    reader = PickleReader(payload, _find, _storage_from_id)
    if payload.startswith(_USUAL_START):
        reader.pos = len(_USUAL_START)
    else:
        check(reader.load() == _TORCH_MAGIC, "a tensor storage that is no torch.save stream")
        check(reader.load() == _TORCH_PROTOCOL, "a torch.save stream of unknown protocol")
        system = reader.load()
        check(type(system) is dict and system.get("little_endian") is True, "big-endian tensors")
    storage, keys = reader.load(), reader.load()
    check(type(storage) is _Storage and keys == [storage.key], "a torch.save stream that is no single storage")
    (elements,), start = _INT64.unpack_from(payload, reader.pos), reader.pos + _INT64.size
    available = len(payload) - start
    if elements != storage.elements or elements < 0 or elements * storage.dtype.itemsize != available:
        raise RecordError(
            f"holds a storage of {storage.elements} elements of {storage.dtype}, with {available} bytes for them"
        )
    return np.frombuffer(payload, storage.dtype, elements, start)


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, extra: Any = None
) -> NDArray[Any]:
    """Stands for ``torch._utils._rebuild_tensor_v2``: an array of that shape in the storage.

    A shape with more elements than the storage (an expanded tensor) is refused: its copy could be of any size.
    """
    check(type(storage) is np.ndarray and storage.ndim == 1, "a tensor without storage")
    # Before they are hashed: nested tuples would take for ever.
    plain = type(size) is tuple and type(stride) is tuple and all(type(n) is int for n in (offset, *size, *stride))
    check(plain, "a tensor of impossible shape")
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
    plausible = len(size) == len(stride) <= _MAX_DIMS and all(0 <= n < 2**63 for n in numbers)
    check(plausible, "a tensor of impossible shape")
    elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if elements else -1
    return elements, last, stride == tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))


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
    check(
        isinstance(code, str) and re.fullmatch("b1|[iu][1248]|f[248]", code) is not None, "a numpy type of no numbers"
    )
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
_KNOWN: dict[str, Function | ClassMark | _StorageType] = {
    "torch._utils._rebuild_tensor_v2": Function(_rebuild_tensor),
    "torch.storage._load_from_bytes": Function(_load_from_bytes),
    "collections.OrderedDict": Function(lambda: {}),  # backward hooks: empty
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
