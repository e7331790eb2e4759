"""Structures of ASE as samples: ``Atoms`` become a record, and that a sample as in a data set."""

import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian, FixScaled
from fairchem.core.datasets.atomic_data import AtomicData
from numpy.typing import NDArray

from faenet_ocp.data.batch import make_batch
from faenet_ocp.data.fields import Reading
from faenet_ocp.graph.lists import NO_LIMIT


def atoms_to_data(
    atoms: Atoms, *, cutoff: float, max_neighbors: int | None, dtype: torch.dtype = torch.float32, dataset: str = "oc20"
) -> AtomicData:
    """Atoms to a sample with the fields of ``oc20.OC20LmdbDataset``, before transforms.

    Args:
        atoms: any structure; positions are taken as they are. `fixed` are those of `fixed_atoms`.
        cutoff, max_neighbors: see ``graph.build_graph``.
        dtype: of positions; the graph is that of the positions in this precision.
        dataset: name of the data set.

    Returns:
        the sample; `atom_id` (n,) numbers its atoms.

    Raises:
        ValueError: the structure is none that a record could hold.
    """
    record = {
        "pos": atoms.positions,
        "cell": atoms.cell.array,
        "pbc": atoms.pbc,
        "atomic_numbers": atoms.numbers,
        "tags": atoms.get_tags(),
        "fixed": fixed_atoms(atoms),
    }
    limit = NO_LIMIT if max_neighbors is None else max_neighbors
    reading = Reading({}, "recompute", dtype, cutoff, limit)
    data = make_batch([record], [str(atoms.info.get("sid", ""))], reading)
    data.dataset = dataset
    data.atom_id = torch.arange(len(atoms))
    return data


def fixed_atoms(atoms: Atoms) -> NDArray[np.bool_]:
    """Which atoms FixAtoms, FixCartesian and FixScaled, alone or together, hold in all directions, (n,) bool."""
    fixed = np.zeros((len(atoms), 3), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            fixed[constraint.index] = True
        elif isinstance(constraint, FixCartesian) or (isinstance(constraint, FixScaled) and constraint.mask.all()):
            fixed[constraint.index] |= constraint.mask
    return np.all(fixed, axis=1)
