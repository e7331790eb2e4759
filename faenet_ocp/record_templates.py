"""Reads a record by comparing it with an earlier one that was written by the same code.

Such records are the same instructions with other numbers. ``record_tracing`` says which bytes of a record may differ:
numbers that are fields; size and stride of tensors; length, key and elements of their storages; sizes of frames.
Between the elements of two tensors everything has a fixed width: one ``struct`` takes it apart, all other bytes have to
be equal, and what a number declares is checked. A record that matches would be read, instruction by instruction, into
exactly the fields that are built here. Whatever does not match, damaged records included, is left to that reader.
"""

from collections.abc import Sequence
from struct import Struct
from typing import Any

import numpy as np

from faenet_ocp.record_objects import extent, rebuild_tensor
from faenet_ocp.record_tracing import STORAGE_NUMBERS, Layout, Part, trace
from faenet_ocp.restricted_pickle import DAMAGE

_MAX_RECORD, _MAX_BYTES = 1 << 16, 1 << 21  # bytes to compare: of one record, of all
_MAX_WAYS = 16  # in which records may go on from one segment
_PRICE = 32  # learning is allowed once in so many records: it takes as long as reading three of them without template
_FIRST = 16  # but so often at once


class _Segment:
    """The bytes from the elements of one tensor to those of the next, and what may follow these."""

    def __init__(self, part: Part):
        layout = Struct(part.form)
        self.part, self.size, self.unpack = part, layout.size, layout.unpack_from
        self.constants, self.head, self.itemsize = part.constants, part.head, part.itemsize
        self.next: list[_Segment] = []
        self.layout: Layout | None = None  # of a record that ends here


class Templates:
    """A tree of the records read so far, by segments: 2 MB at most. It has no influence on any result."""

    def __init__(self) -> None:
        self._root: list[_Segment] = []
        self._bytes = 0
        self._credit = _FIRST * _PRICE

    def read(self, value: bytes) -> dict[str, Any] | None:
        """Return the fields of a record, as ``lmdb_records.decode_record`` does; None if it is like no earlier one."""
        self._credit += 1
        numbers: list[tuple[Any, ...]] = []
        starts: list[int] = []
        known, pos, total = self._root, 0, len(value)
        while True:
            for segment in known:
                if pos + segment.size <= total:
                    items = segment.unpack(value, pos)
                    if items[::2] == segment.constants:
                        break
            else:
                return None
            pos += segment.size
            numbers.append(items[1::2])
            if segment.layout is not None:
                break
            length, key, declared, again, elements = numbers[-1][-STORAGE_NUMBERS:]
            size = elements * segment.itemsize
            if elements != declared or elements < 0 or length != segment.head + size or key != again:
                return None
            if not key.isdigit():  # as text it could be damaged
                return None
            starts.append(pos)
            pos += size
            known = segment.next
        if pos != total:
            return None
        try:
            return _build(value, segment.layout, numbers, starts)
        except DAMAGE:  # a shape that does not fit its storage
            return None

    def learn(self, value: bytes) -> None:
        """Remember a record that has been read without fault, if it has the usual form."""
        if self._credit < _PRICE:
            return
        self._credit -= _PRICE
        try:
            parts, layout = trace(value)
        except DAMAGE:
            return
        size = sum(len(constant) for part in parts for constant in part.constants)
        if size > _MAX_RECORD:
            return
        if self._bytes + size > _MAX_BYTES:
            self._root, self._bytes = [], 0
        self._bytes += size
        known = self._root
        for part in parts:
            node = next((segment for segment in known if segment.part == part), None) or _Segment(part)
            if node not in known:
                known.insert(0, node)
                del known[_MAX_WAYS:]
            known = node.next
        node.layout = layout


def _build(value: bytes, layout: Layout, numbers: Sequence[tuple[Any, ...]], starts: Sequence[int]) -> dict[str, Any]:
    """The fields; `numbers` of each segment, `starts` of the elements in `value`."""
    fields = layout.fields.copy()
    for name, segment, place, convert in layout.numbers:
        fields[name] = convert(numbers[segment][place])
    for name, storage, dtype, (offset_in, one), (size_in, size), (stride_in, stride) in layout.tensors:
        (offset,), shape, steps = numbers[offset_in][one], numbers[size_in][size], numbers[stride_in][stride]
        count, start = numbers[storage][-1], starts[storage]
        _, last, is_contiguous = extent(offset, shape, steps)
        if is_contiguous and last < count:
            fields[name] = np.ndarray(shape, dtype, value, start + offset * dtype.itemsize)
        else:
            fields[name] = rebuild_tensor(np.frombuffer(value, dtype, count, start), offset, shape, steps)
    return fields
