"""Decoded records to one ``AtomicData``, a batch or a single sample: checks, labels, edges.

Every step works on the arrays of all records at once, and no number of a system depends on the others in its batch.
Shapes: B records, N atoms and E edges of all of them together. Energies in eV, forces in eV/A, lengths in A.
"""

from collections.abc import Sequence

import numpy as np
import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor

from faenet_ocp.common.checks import RecordError
from faenet_ocp.data.edges import Systems, check_distances, make_edges
from faenet_ocp.data.fields import (
    FIELDS,
    NUM_ELEMENTS,
    REMAINDER,
    Fields,
    Reading,
    array_of,
    converted,
    field_of,
    level_of,
    number_of,
    read_field,
)
from faenet_ocp.targets import TARGETS


def make_batch(records: Sequence[Fields], sids: list[str], reading: Reading, *, surface: bool = False) -> AtomicData:
    """Make one ``AtomicData`` of all records, as ``OC20LmdbDataset`` describes it, without the attribute `dataset`.

    Args:
        records: at least one.
        sids: of the records.
        reading: what to read.
        surface: leave out the edges from and to atoms of tag 0, because these will be removed anyway.

    Raises:
        RecordError: something is wrong with a record; what, but not with which.
        ValueError: edges have to be searched for, and the geometry is impossible.
    """
    counts, pos, cell, pbc = read_geometry(records, reading.dtype)
    systems = Systems(np.cumsum([0, *counts]), pos.double().numpy(), cell.double().numpy(), pbc.numpy())
    check_distances(systems)

    def read(name: str) -> Tensor:
        return read_field(FIELDS[name], records, counts, reading.dtype)

    size, numbers, tags = len(records), read("atomic_numbers"), read("tags")
    edge_index, cell_offsets, nedges = make_edges(records, systems, reading, (tags != 0).numpy() if surface else None)
    batch = torch.from_numpy(np.repeat(np.arange(size), counts))
    data = AtomicData(
        pos=pos,
        atomic_numbers=numbers,
        cell=cell,
        pbc=pbc,
        natoms=torch.tensor(counts),
        edge_index=edge_index,
        cell_offsets=cell_offsets,
        nedges=nedges,
        charge=read("charge"),
        spin=read("spin"),
        tags=tags,
        fixed=read("fixed"),
        batch=batch,
        sid=sids,
    )
    for label, names in reading.labels.items():
        found = [_label_name(fields, label, names) for fields in records]
        field = field_of(label)
        value = read_field(field, records, counts, reading.dtype, found)
        setattr(data, label, value)
        if field.level == "system" and reading.dtype is torch.float32:
            exact = read_field(field, records, counts, torch.float64, found)
            setattr(data, label + REMAINDER, (exact - value).float())
    data.fid = read("fid")
    elements = torch.bincount(batch * NUM_ELEMENTS + numbers, minlength=size * NUM_ELEMENTS)
    data.composition = elements.view(size, NUM_ELEMENTS).float()
    return data


def assign_batch_stats(data: AtomicData) -> None:
    """Tell a batch where its systems begin, as fairchem's ``atomicdata_list_to_batch`` does.

    Raises:
        ValueError: the batch has a field that is not in ``fields.FIELDS``.
    """
    natoms, nedges = data.natoms.tolist(), data.nedges.tolist()
    ends = {
        "atom": np.cumsum([0, *natoms]).tolist(),
        "edge": np.cumsum([0, *nedges]).tolist(),
        "system": list(range(len(natoms) + 1)),
    }
    names = list(data.keys())
    slices = {name: ends[level_of(name)] for name in names}
    cumsum = {name: ends["atom"] if name == "edge_index" else [0] * len(ends["atom"]) for name in names}
    axes = {name: -1 if name == "edge_index" else 0 for name in names}
    data.assign_batch_stats(slices, cumsum, axes, natoms)


def read_geometry(records: Sequence[Fields], dtype: torch.dtype) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Atoms of each record, pos (N, 3), cell (B, 3, 3) and pbc (B, 3), which a record with a cell may leave out.

    Raises:
        RecordError: something is wrong with a record.
    """
    counts = [_num_atoms(fields) for fields in records]
    pos, cell = (read_field(FIELDS[name], records, counts, dtype) for name in ("pos", "cell"))
    has_cell = (cell != 0).flatten(1).any(1).numpy()[:, None, None].repeat(3, axis=2)
    given = [array_of(f, "pbc", (1, 3)) if "pbc" in f else own for f, own in zip(records, has_cell, strict=True)]
    return counts, pos, cell, converted(np.concatenate(given), FIELDS["pbc"], torch.bool)


def _num_atoms(fields: Fields) -> int:
    count = len(array_of(fields, "pos", (None, 3)))
    if count == 0 or number_of(fields, "natoms", default=count) != count:
        raise RecordError(f"has {count} positions for {fields.get('natoms')} atoms")
    return count


def _label_name(fields: Fields, label: str, names: Sequence[str]) -> str:
    known = TARGETS[label].aliases if label in TARGETS else (label,)
    own = [label] if label in fields and set(names) <= set(known) else []  # never in place of a name of the user's
    present = [name for name in names if name in fields] or own
    if not present:
        listing = ", ".join(sorted(fields)[:30]) or "no fields"
        looked = f"looked for {', '.join(names)}; it has {listing}"
        raise RecordError(f"has no label {label!r} ({looked}); dataset.key_mapping: {{<its name>: {label}}} names it")
    if len(present) > 1:
        raise RecordError(f"has several candidates for {label!r}: {', '.join(present)}; choose with key_mapping")
    return present[0]
