"""Packed OC20 files (``scripts/pack.py``), registered as ``oc20_packed``: nothing in them could run.

A record is its fields as flat typed arrays behind a checksum:

    checksum uint32 | bytes of layout uint16 | number of sizes uint16 | layout | sizes uint32 ... | arrays ...

The checksum is the CRC-32 of all that follows it. The layout is a text, `name:type:shape;...`, for example
`pos:<f4:-1,3;tags:|u1:-1;y:<f8:`, where -1 stands for a length that is listed among the sizes, in order. Arrays follow
each other in the order of the layout, the widest types first. All numbers are little-endian.

Nothing is lost of what a data set yields: positions, forces and energies keep their type; whole numbers (also those
that OC20 stores as floats) get the smallest type that holds them. Stored distances are left out, as they are not read.
"""

import json
import re
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import lmdb
import numpy as np
import torch
from fairchem.core.common.registry import registry

from faenet_ocp.common.checks import RecordError
from faenet_ocp.data.batch import read_geometry
from faenet_ocp.data.edges import SHELL_EDGES, SHELL_OFFSETS
from faenet_ocp.data.fields import Array, Fields, all_whole, array_of
from faenet_ocp.data.lmdb_files import PACKED_KEY, LmdbFile
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.data.restricted_pickle import check
from faenet_ocp.graph.lists import RESOLUTION, ROUNDING, SHELL_TOLERANCE
from faenet_ocp.graph.neighbors import find_edges
from faenet_ocp.graph.vectors import edge_lengths

VERSION = 1
LEFT_OUT = ("distances",)
_WHOLE = ("atomic_numbers", "tags", "fixed", "edge_index", "cell_offsets", SHELL_EDGES, SHELL_OFFSETS)
_INTEGERS = tuple(np.dtype(code) for code in ("|u1", "|i1", "<u2", "<i2", "<i4", "<i8"))
_HEAD = struct.Struct("<IHH")
_ENTRY = re.compile(r"(\w+):(text|[<|][iuf][1248]|\|b1):((?:-?\d+(?:,\d+|,-1)*)?)")
_TEXT = "text"


# Records


class _Entry(NamedTuple):
    """A field: `elements`, times a size if the shape holds a -1; `is_text`: UTF-8."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    elements: int
    varies: bool
    is_text: bool


def encode_packed(fields: Fields) -> bytes:
    """Pack the fields of a record, as ``records.decode_record`` returns them.

    Raises:
        RecordError: a field is neither numbers nor text, or has a name that cannot be kept.
    """
    unusable = [name for name in fields if re.fullmatch(r"\w+", name) is None]
    if unusable:
        raise RecordError(f"has a field {unusable[0]!r}; names in packed files are of letters, digits and _")
    arrays = {name: _array(name, value) for name, value in fields.items() if name not in LEFT_OUT}
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    num_atoms = len(arrays["pos"]) if "pos" in arrays and arrays["pos"].ndim else -1
    entries, sizes = [], []
    for name in names:
        array = arrays[name]
        shape = [str(length) for length in array.shape]
        axis = _varying_axis(name, array, num_atoms)
        if axis is not None:
            sizes.append(array.shape[axis])
            shape[axis] = "-1"
        kind = _TEXT if isinstance(fields[name], str) else array.dtype.str
        entries.append(f"{name}:{kind}:{','.join(shape)}")
    layout = ";".join(entries).encode()
    layout += b";" * (-(_HEAD.size + len(layout) + 4 * len(sizes)) % 8)  # arrays begin at a multiple of 8
    body = b"".join([layout, struct.pack(f"<{len(sizes)}I", *sizes), *(arrays[name].tobytes() for name in names)])
    head = _HEAD.pack(0, len(layout), len(sizes))
    return struct.pack("<I", zlib.crc32(body, zlib.crc32(head[4:]))) + head[4:] + body


def decode_packed(value: bytes) -> dict[str, Any]:
    """Return the fields of a packed record: read-only arrays (views of `value`), numbers, text.

    Raises:
        RecordError: it is no packed record, or one of its bytes has changed.
    """
    check(len(value) > _HEAD.size, "no packed record: it is too short")
    checksum, layout_length, num_sizes = _HEAD.unpack_from(value)
    if zlib.crc32(memoryview(value)[4:]) != checksum:
        raise RecordError("is damaged: its checksum is wrong" + _hint(value))
    try:
        return _fields(value, layout_length, num_sizes)
    except (ValueError, struct.error) as error:
        raise RecordError(f"is no packed record: {error}") from error


def _fields(value: bytes, layout_length: int, num_sizes: int) -> dict[str, Any]:
    layout = _read_layout(value[_HEAD.size : _HEAD.size + layout_length])
    position = _HEAD.size + layout_length
    sizes = iter(struct.unpack_from(f"<{num_sizes}I", value, position))
    position += 4 * num_sizes
    fields: dict[str, Any] = {}
    for name, dtype, shape, elements, varies, is_text in layout:
        count = elements * next(sizes, 0) if varies else elements
        array = np.frombuffer(value, dtype, count, position)
        position += count * dtype.itemsize
        if is_text:
            fields[name] = array.tobytes().decode()
        elif shape:
            fields[name] = array if len(shape) == 1 else array.reshape(shape)
        else:
            fields[name] = array[0].item()
    check(position == len(value), "more than its layout says")
    return fields


@lru_cache(maxsize=4096)  # records of a file have a few layouts
def _read_layout(text: bytes) -> tuple[_Entry, ...]:
    entries = []
    for item in text.decode("ascii").rstrip(";").split(";"):
        match = _ENTRY.fullmatch(item)
        if match is None:
            raise ValueError(f"unknown layout {item[:80]!r}")
        name, kind, lengths = match.groups()
        shape = tuple(int(length) for length in lengths.split(",")) if lengths else ()
        fixed = [length for length in shape if length != -1]
        check(len(shape) - len(fixed) <= 1 and all(length >= 0 for length in fixed), "a damaged layout")
        dtype = np.dtype("|u1" if kind == _TEXT else kind)
        entries.append(_Entry(name, dtype, shape, int(np.prod(fixed)), len(fixed) < len(shape), kind == _TEXT))
    return tuple(entries)


def _hint(value: bytes) -> str:
    """Which system a damaged record seems to be, if that can still be read."""
    try:
        sid = _fields(value, *_HEAD.unpack_from(value)[1:])["sid"]
    except (ValueError, KeyError, struct.error, OverflowError, MemoryError):
        return ""
    return f" (it calls itself sid {str(sid)[:40]})"


def _varying_axis(name: str, array: Array, num_atoms: int) -> int | None:
    """The axis whose length is stored with the record instead of in its layout, so that layouts stay few."""
    if name in ("edge_index", SHELL_EDGES) and array.ndim == 2:
        return 1
    if name in ("cell_offsets", SHELL_OFFSETS) or (array.ndim > 0 and len(array) == num_atoms):
        return 0
    return 0 if array.ndim == 1 else None


def _array(name: str, value: Any) -> Array:
    if isinstance(value, str):
        return np.frombuffer(value.encode(), np.uint8)
    array = np.asarray(value) if isinstance(value, np.ndarray | int | float) else None
    if array is None or array.dtype.kind not in "iufb":
        raise RecordError(f"has a field {name!r} that is neither numbers nor text and cannot be packed")
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)
    is_whole = array.dtype.kind in "iu" or (name in _WHOLE and array.dtype.kind == "f" and all_whole(array))
    if array.ndim == 0 or array.size == 0 or not is_whole:
        return array
    low, high = int(array.min()), int(array.max())
    for dtype in _INTEGERS:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    return array


def prepare_edges(fields: Fields) -> dict[str, Any]:
    """The fields, with edges in the order in which a data set gives them, and more edges.

    These are what the stored list of an atom lacks of the shell in which it ends. A data set needs them where that
    shell has to be kept whole (see ``oc20``); finding them takes longer than reading the record. A record without
    edges, or whose geometry is no geometry, stays as it is.
    """
    if np.size(fields.get("edge_index", ())) == 0:
        return dict(fields)
    try:
        (num_atoms,), pos, cell, pbc = read_geometry([fields], torch.float64)
        index = torch.from_numpy(array_of(fields, "edge_index", (2, None)).astype(np.int64))
        offsets = torch.from_numpy(array_of(fields, "cell_offsets", (index.shape[1], 3)).astype(np.float64))
        if int(index.min()) < 0 or int(index.max()) >= num_atoms or not all_whole(offsets.numpy()):
            return dict(fields)
        lengths = edge_lengths(pos, cell, index, offsets)
        ends = torch.full((num_atoms,), -torch.inf, dtype=torch.float64).scatter_reduce_(0, index[1], lengths, "amax")
        ends += SHELL_TOLERANCE + ROUNDING  # a data set may have rounded positions
        found, shifts = map(
            torch.from_numpy, find_edges(pos.numpy(), cell[0].numpy(), pbc[0].numpy(), cutoff=float(ends.max()))
        )
    except ValueError:  # reading the record will say what is wrong
        return dict(fields)
    columns = [*offsets.T.flip(0), index[0], (lengths / RESOLUTION).round(), index[1]]  # the last matters most
    order = np.lexsort([column.numpy() for column in columns])
    new = edge_lengths(pos, cell, found, shifts) <= ends[found[1]]
    new &= ~torch.isin(_edge_numbers(found, shifts), _edge_numbers(index, offsets))
    return {
        **fields,
        "edge_index": fields["edge_index"][:, order],
        "cell_offsets": fields["cell_offsets"][order],
        SHELL_EDGES: found[:, new].numpy(),
        SHELL_OFFSETS: shifts[new].numpy(),
    }


def _edge_numbers(index: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """A number for each edge, equal for equal edges of systems of less than a million atoms."""
    numbers = index[0] << 20 | index[1]
    for axis in range(3):
        numbers = numbers * 128 + (offsets[:, axis].long() + 64)
    return numbers


# Files


class PackedFile(LmdbFile):
    """The packed records of one file; ``header`` says what it was made from."""

    header: dict[str, Any]

    def _find_numbers(self, txn: lmdb.Transaction) -> Sequence[int]:
        value = txn.get(PACKED_KEY)
        if value is None:
            raise ValueError(f"{self.path}: is no file of scripts/pack.py; try dataset.format: oc20_lmdb")
        self.header = read_header(value, str(self.path))
        count = self.header["count"]
        if count > 0 and txn.get(b"%d" % (count - 1)) is None:
            raise ValueError(f"{self.path}: its header says {count} records, but some are missing")
        return range(count)


@registry.register_dataset("oc20_packed")
class OC20PackedDataset(OC20LmdbDataset):
    """Like ``OC20LmdbDataset``, with the same config and the same samples to the last bit, from packed files.

    Raises:
        RecordError: (when reading) also for a record that has changed since it was packed.
    """

    _file = PackedFile

    def _decode(self, value: bytes) -> Fields:
        return decode_packed(value)


def write_header(*, count: int, source: dict[str, Any]) -> bytes:
    """The value of the header's key: a checksum and JSON."""
    text = json.dumps({"version": VERSION, "count": count, "source": source}).encode()
    return zlib.crc32(text).to_bytes(4, "little") + text


def read_header(value: bytes, path: str) -> dict[str, Any]:
    """ValueError if the header is damaged or of another version."""
    if zlib.crc32(value[4:]) != int.from_bytes(value[:4], "little"):
        raise ValueError(f"{path}: its header is damaged")
    header = json.loads(value[4:])
    if header["version"] != VERSION:
        raise ValueError(f"{path}: was packed in version {header['version']} of the format, not {VERSION}")
    return header
