"""THE table of what a batch holds; a new field is a row of it (`register_field`).

Reading of records, collating, transforms, views of frames and structures of ASE take level, dtype, shape and default
from here instead of guessing them. Sizes: N atoms, E edges, B systems of a batch. A field of level "atom" has shape
(N, *shape), of level "edge" (E, *shape) and of level "system" (B, *shape). `edge_index` is (2, E) and counts atoms;
text and what stays on the host are lists (B,).

Conventions: edge_index[0] is the source (neighbour) j, edge_index[1] the target (centre) i; the vector of an edge is
pos[j] - pos[i] + cell_offsets @ cell, lattice vectors in rows. Lengths in Angstrom.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faenet_ocp.common.checks import RecordError, nearest
from faenet_ocp.common.elements import MAX_ATOMIC_NUMBER
from faenet_ocp.targets import TARGETS

NUM_ELEMENTS = MAX_ATOMIC_NUMBER + 1
"""Atomic numbers 0 (none) to 118: columns of `composition`."""

REQUIRED = object()
"""The default of a field that every record must have, or that is computed."""


@dataclass(frozen=True)
class Field:
    """One field of a batch.

    Attributes:
        name: attribute of the batch.
        level: what it has one value for.
        dtype: None: the precision of the data set; str: text; tuple: whole numbers that stay on the host.
        shape: of one value; None: any (the number of frames differs).
        default: of a record that does not have it, or REQUIRED.
        allowed: the whole numbers that a record may have; None: any values.
    """

    name: str
    level: Literal["atom", "edge", "system"]
    dtype: torch.dtype | type[str | tuple[int, ...]] | None = None
    shape: tuple[int, ...] | None = ()
    default: Any = REQUIRED
    allowed: range | None = None


REMAINDER = "_remainder"
"""Ends the name of what float32 leaves of a label of systems: `exact_label`."""


def _labels(name: str, level: Literal["atom", "system"] = "system", rank: int = 0) -> list[Field]:
    """A label, and the field of its remainder if it has one."""
    label = Field(name, level, shape=(3,) if rank else ())
    return [label, Field(name + REMAINDER, level)] if level == "system" else [label]


FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        Field("pos", "atom", shape=(3,)),
        Field("atomic_numbers", "atom", torch.long, allowed=range(1, NUM_ELEMENTS)),
        Field("tags", "atom", torch.long, default=0, allowed=range(3)),
        Field("fixed", "atom", torch.long, default=0, allowed=range(2)),
        Field("batch", "atom", torch.long),
        Field("atom_id", "atom", torch.long),
        Field("edge_index", "edge", torch.long),
        Field("cell_offsets", "edge", shape=(3,)),
        Field("cell", "system", shape=(3, 3), default=0),
        Field("pbc", "system", torch.bool, shape=(3,)),
        Field("natoms", "system", torch.long),
        Field("nedges", "system", torch.long),
        Field("charge", "system", torch.long, default=0),
        Field("spin", "system", torch.long, default=0),
        Field("sid", "system", str),
        Field("fid", "system", torch.long, default=-1),
        Field("dataset", "system", str),
        Field("composition", "system", torch.float32, shape=(NUM_ELEMENTS,)),
        Field("removed_free", "system", torch.long),
        Field("frame_rot", "system", shape=None),
        Field("frame_weight", "system", shape=None),
        Field("frame_sizes", "system", tuple),
        *(field for target in TARGETS.values() for field in _labels(target.name, target.level, target.rank)),
    )
}
"""By name. A record without `pbc` is periodic if it has a cell, and a molecule if it has none or one of zeros."""

NOT_LABELS = FIELDS.keys() - TARGETS.keys()


def register_field(field: Field) -> None:
    """Makes a field known, e.g. one that a transform of your own adds.

    Call it where that transform is defined: processes that load data import that module, and no other.

    Raises:
        ValueError: the name is taken by a different field.
    """
    if FIELDS.setdefault(field.name, field) != field:
        raise ValueError(f"field {field.name!r} is already {FIELDS[field.name]}")


def declare_labels(names: Iterable[str]) -> None:
    """Makes labels known; those that are no row of the table are scalars of systems.

    Raises:
        ValueError: a name is that of a field that says what the system is.
    """
    for name in names:
        if name in NOT_LABELS:
            raise ValueError(f"labels: {name!r} is a field of every sample and no label")
        for field in _labels(name):
            FIELDS.setdefault(field.name, field)


def field_of(name: str) -> Field:
    """The row of a field.

    Raises:
        ValueError: it is not known.
    """
    try:
        return FIELDS[name]
    except KeyError:
        hint = nearest(name, FIELDS).partition("; allowed")[0]
        raise ValueError(
            f"a batch has a field {name!r} that is not known{hint}; say what it is with faenet_ocp.register_field"
        ) from None


def level_of(name: str) -> str:
    """The level of a field: atom, edge or system.

    Raises:
        ValueError: the field is not known.
    """
    return field_of(name).level


def exact_label(batch: Any, name: str) -> Tensor:
    """A label of systems in float64, (B,), as exact as the record has it; one of atoms as it is.

    Total energies are large, and what is learned of them is not; fairchem wants them in the positions' precision.
    """
    label = batch[name]
    return label.double() + batch[name + REMAINDER] if name + REMAINDER in batch else label


def shallow_copy(batch: Any) -> Any:
    """Another AtomicData with the same tensors, whose fields can be replaced."""
    result = copy.copy(batch)
    result.__keys__ = set(batch.__keys__)
    return result


# Reading a field of records


Fields = Mapping[str, Any]
"""What a record holds, by name: numpy arrays, numbers, text."""
Array = NDArray[Any]


class Reading(NamedTuple):
    """How records are read.

    Attributes:
        labels: each label to the names that it may have in a record.
        edges: stored, recompute or none.
        dtype: of what is not a whole number.
        cutoff, max_neighbors: of the edges.
    """

    labels: Mapping[str, Sequence[str]]
    edges: str
    dtype: torch.dtype
    cutoff: float = 0.0
    max_neighbors: int = 0


def read_field(
    field: Field,
    records: Sequence[Fields],
    counts: Sequence[int],
    dtype: torch.dtype,
    names: Sequence[str] | None = None,
) -> Tensor:
    """A field of all records: (N, *shape) or (B, *shape).

    Args:
        field: of atoms or systems.
        records: B.
        counts: atoms of each.
        dtype: of a field that has none of its own.
        names: what the field is called in each record; default: its name.

    Raises:
        RecordError: a record lacks it, or has something else under its name.
    """
    of_atoms, shape = field.level == "atom", field.shape or ()
    dtype = field.dtype if isinstance(field.dtype, torch.dtype) else dtype
    is_optional = field.default is not REQUIRED
    if is_optional and not any(field.name in fields for fields in records):
        return torch.full((sum(counts) if of_atoms else len(records), *shape), field.default, dtype=dtype)
    arrays = []
    for fields, count, name in zip(records, counts, names or repeat(field.name), strict=False):
        expected = (count if of_atoms else 1, *shape)
        if is_optional and name not in fields:
            arrays.append(np.full(expected, field.default))
        else:
            arrays.append(array_of(fields, name, expected))
    return converted(np.concatenate(arrays), field, dtype, names[0] if names else None)


def array_of(fields: Fields, name: str, shape: tuple[int | None, ...]) -> Array:
    """A field as an array of this shape (None: any length); RecordError if it is missing or of another one."""
    value = fields.get(name)
    if isinstance(value, np.ndarray) and value.shape == shape:
        return value
    if not isinstance(value, np.ndarray | int | float):
        raise RecordError(f"has no field {name!r}" if value is None else f"has no numbers in the field {name!r}")
    array = np.asarray(value)
    if array.ndim == len(shape) - 1 and shape[0] == 1:
        array = array[None]  # a system's cell may be (3, 3), its energy a number
    if array.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise RecordError(f"has {name} of shape {array.shape}, not ({expected})")
    return array


def converted(array: Array, field: Field, dtype: torch.dtype, name: str | None = None) -> Tensor:
    """An array as a tensor; RecordError if it has numbers that are not finite, not whole or not allowed."""
    name = name or field.name
    if array.dtype.kind not in "biuf":
        raise RecordError(f"has values in {name} that are no numbers of 64 bits")
    if array.dtype.kind == "f" and not dtype.is_floating_point and not all_whole(array):
        raise RecordError(f"has values in {name} that are no whole numbers")
    result = torch.from_numpy(array).to(dtype)
    if dtype.is_floating_point and not bool(torch.isfinite(result).all()):
        raise RecordError(f"has values in {name} that are not finite")
    if (
        field.allowed is not None
        and not field.allowed[0] <= int(result.min()) <= int(result.max()) <= field.allowed[-1]
    ):
        raise RecordError(f"has values in {name} outside {field.allowed[0]} to {field.allowed[-1]}")
    return result


def all_whole(array: Array) -> bool:
    """Whether numbers are whole, and not absurdly large."""
    return bool((np.abs(array) < 2**31).all()) and bool((array == np.rint(array)).all())


def number_of(fields: Fields, name: str, *, default: int) -> int:
    """A field that is one whole number; RecordError if it is something else."""
    value = fields.get(name, default)
    if type(value) is int:
        return value
    value = np.asarray(value if isinstance(value, float | np.ndarray | np.generic) else "")
    if value.size != 1 or value.dtype.kind not in "iuf" or not float(value.item()).is_integer():
        raise RecordError(f"has a {name} that is no whole number")
    return int(value.item())
