"""THE table of what a batch holds; a new field is a row of it (`register_field`).

Collating, transforms, views of frames and structures of ASE read level, dtype, shape and default from here instead of
guessing them. Sizes: N atoms, E edges, B systems of a batch. A field of level "atom" has shape (N, *shape), of level
"edge" (E, *shape) and of level "system" (B, *shape); `edge_index` is (2, E) and counts atoms, text is a list (B,).

Conventions: edge_index[0] is the source (neighbour) j, edge_index[1] the target (centre) i; the vector of an edge is
pos[j] - pos[i] + cell_offsets @ cell, lattice vectors in rows. Lengths in Angstrom.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

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
        dtype: None: the precision of the data set; str: text.
        shape: of one value; None: any (the number of frames differs).
        default: of a record that does not have it, or REQUIRED.
        allowed: the values that a record may have; None: any.
    """

    name: str
    level: Literal["atom", "edge", "system"]
    dtype: torch.dtype | type[str] | None = None
    shape: tuple[int, ...] | None = ()
    default: Any = REQUIRED
    allowed: tuple[int, ...] | None = None


FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        Field("pos", "atom", shape=(3,)),
        Field("atomic_numbers", "atom", torch.long),
        Field("tags", "atom", torch.long, default=0, allowed=(0, 1, 2)),
        Field("fixed", "atom", torch.long, default=0, allowed=(0, 1)),
        Field("batch", "atom", torch.long),
        Field("atom_id", "atom", torch.long),
        Field("edge_index", "edge", torch.long),
        Field("cell_offsets", "edge", shape=(3,)),
        Field("cell", "system", shape=(3, 3), default=0.0),
        Field("pbc", "system", torch.bool, shape=(3,)),
        Field("natoms", "system", torch.long),
        Field("nedges", "system", torch.long),
        Field("charge", "system", torch.long, default=0),
        Field("spin", "system", torch.long, default=0),
        Field("sid", "system", str),
        Field("fid", "system", torch.long, default=-1),
        Field("dataset", "system", str),
        Field("composition", "system", shape=(NUM_ELEMENTS,)),
        Field("removed_free", "system", torch.long),
        Field("frame_rot", "system", shape=None),
        Field("frame_weight", "system", shape=None),
        *(Field(target.name, target.level, shape=(3,) if target.rank else ()) for target in TARGETS.values()),
    )
}
"""By name. A record without `pbc` is periodic if it has a cell, and a molecule if it has none (cell and offsets 0)."""


def register_field(field: Field) -> None:
    """Makes a field known, e.g. one that a transform of your own adds.

    Raises:
        ValueError: the name is taken by a different field.
    """
    if FIELDS.setdefault(field.name, field) != field:
        raise ValueError(f"field {field.name!r} is already {FIELDS[field.name]}")


def level_of(name: str) -> str:
    """The level of a field.

    Raises:
        ValueError: the field is not known.
    """
    try:
        return FIELDS[name].level
    except KeyError:
        raise ValueError(
            f"a batch has a field {name!r} that is not known; say what it is with faenet_ocp.data.fields.register_field"
        ) from None
