"""ASE's Atoms to samples, with the fields that the data sets give."""

import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from fairchem.core.datasets.atomic_data import AtomicData
from numpy.typing import NDArray

from faenet_ocp.data.fields import NUM_ELEMENTS
from faenet_ocp.graph.neighbors import build_graph


def atoms_to_data(
    atoms: Atoms, *, cutoff: float, max_neighbors: int, dtype: torch.dtype = torch.float32, dataset: str = "oc20"
) -> AtomicData:
    """Atoms to a sample with the fields of `oc20.OC20LmdbDataset`, before transforms.

    Args:
        atoms: any structure; positions are taken as they are. Atoms in a FixAtoms constraint are `fixed`.
        cutoff, max_neighbors: see `graph.neighbors.build_graph`.
        dtype: of positions; the graph is that of the positions in this precision.
        dataset: name of the data set.

    Returns:
        the sample; `atom_id` (n,) numbers its atoms.
    """
    pos = torch.tensor(atoms.positions, dtype=dtype)
    cell = torch.tensor(atoms.cell.array, dtype=dtype).view(1, 3, 3)
    pbc = torch.tensor(atoms.pbc).view(1, 3)
    edge_index, cell_offsets = build_graph(pos, cell, pbc, cutoff=cutoff, max_neighbors=max_neighbors)
    atomic_numbers = torch.tensor(atoms.numbers, dtype=torch.long)
    data = AtomicData(
        pos=pos,
        atomic_numbers=atomic_numbers,
        cell=cell,
        pbc=pbc,
        natoms=torch.tensor([len(atoms)]),
        edge_index=edge_index,
        cell_offsets=cell_offsets,
        nedges=torch.tensor([edge_index.shape[1]]),
        charge=torch.zeros(1, dtype=torch.long),
        spin=torch.zeros(1, dtype=torch.long),
        tags=torch.tensor(atoms.get_tags(), dtype=torch.long),
        fixed=torch.tensor(fixed_atoms(atoms), dtype=torch.long),
        sid=[str(atoms.info.get("sid", ""))],
    )
    data.fid = torch.tensor([-1])
    data.dataset = dataset  # the constructor would make a list of it
    data.composition = torch.bincount(atomic_numbers, minlength=NUM_ELEMENTS).view(1, -1).float()
    data.atom_id = torch.arange(len(atoms))
    return data


def fixed_atoms(atoms: Atoms) -> NDArray[np.bool_]:
    """Which atoms a FixAtoms constraint holds, (n,) bool."""
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            fixed[constraint.index] = True
    return fixed
