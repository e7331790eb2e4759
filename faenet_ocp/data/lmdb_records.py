"""Reads the records of OC20's LMDB files, pickled PyG ``Data`` objects, without being able to run anything.

Layouts: PyG 1.x stores the attribute dict as the state of ``Data``; PyG 2.x stores a ``GlobalStorage`` with a
``_mapping`` in it. What a record may name is in ``record_objects``; reading instruction by instruction is
``restricted_pickle``.
"""

from typing import Any

import numpy as np

from faenet_ocp.data.records import fields_of, find
from faenet_ocp.data.restricted_pickle import RecordError, load, type_name

__all__ = ["RecordError", "decode_count", "decode_record"]


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
    return fields_of(load(value, find))


def decode_count(value: bytes) -> int:
    """Return the number stored under the key ``length``.

    Raises:
        RecordError: it is no whole number, at least 0.
    """
    count = load(value, find)
    if isinstance(count, np.ndarray) and count.size == 1:
        count = count.item()
    if type(count) is not int or count < 0:
        raise RecordError(f"is no number of records but {count if type(count) is int else type_name(count)}")
    return count
