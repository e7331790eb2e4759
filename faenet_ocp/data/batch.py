"""Decoded records to one ``AtomicData``, a batch or a single sample: checks, labels, edges.

Every step works on the arrays of all records at once, and no number of a system depends on the others in its batch.
Shapes: B records, N atoms and E edges of all of them together. Energies in eV, forces in eV/A, lengths in A.
"""

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from fairchem.core.datasets.atomic_data import AtomicData
from numpy.typing import NDArray
from torch import Tensor

from faenet_ocp.data.restricted_pickle import RecordError

Fields = Mapping[str, Any]
"""What a record holds, by name: numpy arrays, numbers, text."""
Array = NDArray[Any]
NUM_ELEMENTS = 119
SHELL_EDGES, SHELL_OFFSETS = "shell_index", "shell_offsets"
"""Edges that `edge_index` and `cell_offsets` lack: the rest of the shell in which the list of an atom ends."""


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


class Systems(NamedTuple):
    """The atoms of the records: counts (B,), first atoms (B,), pos (N, 3), cell (B, 3, 3), pbc (B, 3), batch (N,)."""

    counts: list[int]
    first: Array
    pos: Tensor
    cell: Tensor
    pbc: Tensor
    batch: Tensor

    def part(self, start: int, stop: int) -> "Systems":
        """Some of the records, numbered from 0."""
        first, counts = self.first[start:stop], self.counts[start:stop]
        atoms = slice(int(first[0]), int(first[0]) + sum(counts))
        cell, pbc = self.cell[start:stop], self.pbc[start:stop]
        return Systems(counts, first - first[0], self.pos[atoms], cell, pbc, self.batch[atoms] - start)


def make_batch(records: Sequence[Fields], sids: list[str], reading: Reading, *, surface: bool = False) -> AtomicData:
    """Make one ``AtomicData`` of all records, as ``OC20LmdbDataset`` describes it, without the attribute `dataset`.

    Args:
        records: at least one.
        sids: of the records.
        reading: what to read.
        surface: leave out the edges from and to atoms of tag 0, because these will be removed anyway.

    Raises:
        RecordError: something is wrong with a record; what, but not with which.
    """
    systems = _systems(records, reading.dtype)
    numbers = _per_atom(records, "atomic_numbers", (), torch.long, systems.counts)
    if not 1 <= int(numbers.min()) <= int(numbers.max()) < NUM_ELEMENTS:
        raise RecordError(f"has atomic numbers outside 1 to {NUM_ELEMENTS - 1}")
    tags = _per_atom(records, "tags", (), torch.long, systems.counts, default=0)
    edge_index, cell_offsets, nedges = _graph(records, systems, reading, wanted=tags != 0 if surface else None)
    size = len(records)
    data = AtomicData(
        pos=systems.pos,
        atomic_numbers=numbers,
        cell=systems.cell,
        pbc=systems.pbc,
        natoms=torch.tensor(systems.counts),
        edge_index=edge_index,
        cell_offsets=cell_offsets,
        nedges=nedges,
        charge=torch.zeros(size, dtype=torch.long),
        spin=torch.zeros(size, dtype=torch.long),
        tags=tags,
        fixed=_per_atom(records, "fixed", (), torch.long, systems.counts, default=0),
        batch=systems.batch,
        sid=sids,
    )
    for label, names in reading.labels.items():
        setattr(data, label, _label(records, label, names, systems.counts, reading.dtype))
    data.fid = torch.tensor([whole_number(fields, "fid", default=-1) for fields in records])
    elements = torch.bincount(systems.batch * NUM_ELEMENTS + numbers, minlength=size * NUM_ELEMENTS)
    data.composition = elements.view(size, NUM_ELEMENTS).float()
    return data


def _graph(
    records: Sequence[Fields], systems: Systems, reading: Reading, wanted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """edge_index (2, E), cell_offsets (E, 3) and the number of edges of each record (B,)."""
    if reading.edges == "none":
        edges = torch.empty(2, 0, dtype=torch.long), torch.empty(0, 3, dtype=reading.dtype)
        return *edges, torch.zeros(len(records), dtype=torch.long)
    from faenet_ocp.data.edges import make_edges  # not before it is needed: it compiles

    return make_edges(records, systems, reading, None if wanted is None else wanted.numpy())


def assign_batch_stats(data: AtomicData) -> None:
    """Tell a batch where its systems begin, as fairchem's ``atomicdata_list_to_batch`` does."""
    natoms, nedges = data.natoms.tolist(), data.nedges.tolist()
    atoms, edges = (np.cumsum([0, *counts]).tolist() for counts in (natoms, nedges))
    slices, cumsum, axes = {}, {}, {}
    for name in data.keys():  # noqa: SIM118  # it is no dict
        value = data[name]
        of_atoms = isinstance(value, Tensor) and len(value) == atoms[-1]
        systems = list(range(len(natoms) + 1))
        slices[name] = edges if name in ("edge_index", "cell_offsets") else atoms if of_atoms else systems
        cumsum[name] = atoms if name == "edge_index" else [0] * len(atoms)
        axes[name] = -1 if name == "edge_index" else 0
    data.assign_batch_stats(slices, cumsum, axes, natoms)


# Fields


def whole_number(fields: Fields, name: str, *, default: int) -> int:
    """A field that is one whole number; RecordError if it is something else."""
    value = fields.get(name, default)
    if type(value) is int:
        return value
    value = np.asarray(value)
    if value.size != 1 or value.dtype.kind not in "iuf" or value.item() != int(value.item()):
        raise RecordError(f"has a {name} that is no whole number")
    return int(value.item())


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


def _joined(arrays: Sequence[Array], name: str, dtype: torch.dtype) -> Tensor:
    return converted(np.concatenate(arrays), name, dtype)


def converted(array: Array, name: str, dtype: torch.dtype) -> Tensor:
    """An array of ours as a tensor; RecordError if numbers are not finite, or not whole where they should be."""
    if array.dtype.kind == "f" and not dtype.is_floating_point and not all_whole(array):
        raise RecordError(f"has values in {name} that are no whole numbers")
    result = torch.from_numpy(array).to(dtype)
    if dtype.is_floating_point and not bool(torch.isfinite(result).all()):
        raise RecordError(f"has values in {name} that are not finite")
    return result


def all_whole(array: Array) -> bool:
    """Whether numbers are whole, and not absurdly large."""
    return bool((np.abs(array) < 2**31).all()) and bool((array == np.rint(array)).all())


def _per_atom(
    records: Sequence[Fields],
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    counts: Sequence[int],
    *,
    default: int | None = None,
) -> Tensor:
    arrays = [
        np.full((count, *shape), default)
        if default is not None and name not in fields
        else array_of(fields, name, (count, *shape))
        for fields, count in zip(records, counts, strict=True)
    ]
    return _joined(arrays, name, dtype)


def _systems(records: Sequence[Fields], dtype: torch.dtype) -> Systems:
    positions = [array_of(fields, "pos", (None, 3)) for fields in records]
    counts = [len(array) for array in positions]
    for fields, count in zip(records, counts, strict=True):
        if count == 0 or whole_number(fields, "natoms", default=count) != count:
            raise RecordError(f"has {count} positions for {fields.get('natoms')} atoms")
    periodic = np.ones((1, 3), dtype=bool)
    return Systems(
        counts=counts,
        first=np.cumsum(counts) - counts,
        pos=_joined(positions, "pos", dtype),
        cell=_joined([array_of(fields, "cell", (1, 3, 3)) for fields in records], "cell", dtype),
        pbc=_joined([array_of(f, "pbc", (1, 3)) if "pbc" in f else periodic for f in records], "pbc", torch.bool),
        batch=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
    )


def _label(
    records: Sequence[Fields], label: str, names: Sequence[str], counts: Sequence[int], dtype: torch.dtype
) -> Tensor:
    found = [_label_name(fields, label, names) for fields in records]
    shapes = [(count, 3) for count in counts] if label == "forces" else repeat((1,))
    arrays = [array_of(fields, name, shape) for fields, name, shape in zip(records, found, shapes, strict=False)]
    return _joined(arrays, found[0], dtype)


def _label_name(fields: Fields, label: str, names: Sequence[str]) -> str:
    present = [name for name in names if name in fields] or [name for name in (label,) if name in fields]
    if not present:
        listing = ", ".join(sorted(fields)[:30]) or "no fields"
        raise RecordError(f"has no label {label!r} (looked for {', '.join(names)}; it has {listing})")
    if len(present) > 1:
        raise RecordError(f"has several candidates for {label!r}: {', '.join(present)}; choose with key_mapping")
    return present[0]
