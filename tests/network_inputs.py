"""Inputs of the networks for tests: periodic slabs, graphs from ASE's neighbour list."""

from typing import NamedTuple

import ase
import numpy as np
import torch
from ase.neighborlist import neighbor_list
from small_data import make_slab

CUTOFF = 4.0


class Inputs(NamedTuple):
    """Arguments of `FAENet.forward`, and the structures they come from."""

    atoms: list[ase.Atoms]
    atomic_numbers: torch.Tensor
    tags: torch.Tensor
    batch: torch.Tensor
    edge_index: torch.Tensor
    offsets: torch.Tensor
    edge_vec: torch.Tensor

    @property
    def arguments(self) -> dict:
        names = ("atomic_numbers", "tags", "batch", "edge_index", "edge_vec")
        return {name: getattr(self, name) for name in names} | {"num_systems": len(self.atoms)}


def slabs(count: int, *, layers: int = 2) -> list[ase.Atoms]:
    """Slabs of 8 atoms with an adsorbate of 1 or 2; tags 0, 1 and 2."""
    return [make_slab(index, seed=7, layers=layers) for index in range(count)]


def make_inputs(systems: list[ase.Atoms], dtype: torch.dtype = torch.float32) -> Inputs:
    """Batch of systems; edges in order of their target, vectors pos[j] - pos[i] + image."""
    edges, offsets, vectors, first = [], [], [], 0
    for atoms in systems:
        target, source, shift, vector = neighbor_list("ijSD", atoms, CUTOFF)
        edges.append(np.stack([source, target]) + first)
        offsets.append(shift)
        vectors.append(vector)
        first += len(atoms)
    return Inputs(
        atoms=systems,
        atomic_numbers=torch.from_numpy(np.concatenate([a.numbers for a in systems])),
        tags=torch.from_numpy(np.concatenate([a.get_tags() for a in systems])),
        batch=torch.arange(len(systems)).repeat_interleave(torch.tensor([len(a) for a in systems])),
        edge_index=torch.from_numpy(np.concatenate(edges, axis=1)).long(),
        offsets=torch.from_numpy(np.concatenate(offsets)).to(dtype),
        edge_vec=torch.from_numpy(np.concatenate(vectors)).to(dtype),
    )
