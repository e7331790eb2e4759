"""Batches to measure on: generated slabs with adsorbates, or systems of an LMDB.

Legend: N atoms, E edges, B systems. Angstrom.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch

from faenet_ocp.data.atoms import atoms_to_data
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.data.transforms import RemoveSubsurface

SMALLEST, LARGEST = 5, 225
"""Atoms of OC20's systems."""

_METALS = (13, 22, 26, 28, 29, 40, 45, 46, 47, 74, 77, 78, 79)
_ADSORBATE = (1, 6, 7, 8)


def make_slab(num_atoms: int, seed: int, *, cutoff: float, max_neighbors: int) -> AtomicData:
    """A generated slab of an alloy with an adsorbate on it, like OC20's in size, density, tags and number of edges.

    Args:
        num_atoms: N, at least 3.
        seed: everything random follows from it.
        cutoff, max_neighbors: of the graph.

    Returns:
        AtomicData with edges, tags, energy and forces (random numbers).

    Raises:
        ValueError: too few atoms.
    """
    if num_atoms < 3:
        raise ValueError(f"num_atoms: a slab with an adsorbate has at least 3 atoms, not {num_atoms}")
    rng = np.random.default_rng(seed)
    adsorbate = int(rng.integers(1, min(6, num_atoms - 1)))
    metals = num_atoms - adsorbate
    layers = int(np.clip(round(0.8 * metals ** (1 / 3)), 1, 12))
    side = int(np.ceil(np.sqrt(metals / layers)))
    rows = int(np.ceil(metals / (layers * side)))
    spacing = rng.uniform(2.5, 2.9)
    height = spacing / np.sqrt(2)
    sites = np.array(list(product(range(layers), range(rows), range(side))), dtype=float)[-metals:]
    pos = np.stack([sites[:, 2] + sites[:, 0] % 2 / 2, sites[:, 1] + sites[:, 0] % 2 / 2, sites[:, 0]], axis=1)
    pos *= (spacing, spacing, height)
    above = pos[-1] + rng.uniform(-1, 1, (adsorbate, 3)) * (1.2, 1.2, 0.5) + (0, 0, 2.2)
    above[:, 2] += 0.6 * np.arange(adsorbate)
    tags = np.concatenate([np.where(sites[:, 0] > layers - 1 - max(1, layers / 2), 1, 0), np.full(adsorbate, 2)])
    atoms = Atoms(
        positions=np.concatenate([pos, above]) + rng.normal(0, 0.05, (num_atoms, 3)),
        numbers=np.concatenate([rng.choice(rng.choice(_METALS, 3), metals), rng.choice(_ADSORBATE, adsorbate)]),
        cell=[side * spacing, rows * spacing, layers * height + 18.0],
        pbc=True,
        tags=tags,
        constraint=FixAtoms(mask=tags == 0),
        info={"sid": seed},
    )
    data = atoms_to_data(atoms, cutoff=cutoff, max_neighbors=max_neighbors, dataset="benchmark")
    data.energy = torch.from_numpy(rng.normal(size=1)).float()
    data.forces = torch.from_numpy(rng.normal(size=(num_atoms, 3))).float()
    return data


def slab_sizes(count: int, seed: int = 0) -> list[int]:
    """Numbers of atoms of `count` slabs from 5 to 225, with OC20's mean of about 78."""
    drawn = np.random.default_rng(seed).gamma(3.6, 21.0, count)
    return [int(size) for size in np.clip(drawn, SMALLEST, LARGEST)]


def make_systems(
    sizes: Sequence[int], *, cutoff: float, max_neighbors: int, remove_subsurface: bool
) -> list[AtomicData]:
    """Generated slabs of these numbers of atoms, with or without the atoms of tag 0."""
    systems = [make_slab(size, seed, cutoff=cutoff, max_neighbors=max_neighbors) for seed, size in enumerate(sizes)]
    transform = RemoveSubsurface()
    return [transform(data, torch.Generator()) for data in systems] if remove_subsurface else systems


def read_systems(
    path: Path, count: int, *, cutoff: float, max_neighbors: int, remove_subsurface: bool, labels: Sequence[str]
) -> list[AtomicData]:
    """The first `count` systems of an LMDB, and from the beginning again if it has fewer."""
    graph = {"cutoff": cutoff, "max_neighbors": max_neighbors}
    transforms: dict[str, Any] = {"remove_subsurface": {}} if remove_subsurface else {}
    dataset = OC20LmdbDataset({"src": str(path), "labels": list(labels), "transforms": transforms, **graph})
    return [dataset[place % len(dataset)] for place in range(count)]


def make_batch(systems: Sequence[AtomicData], device: torch.device) -> AtomicData:
    """One batch of all systems."""
    return atomicdata_list_to_batch(list(systems)).to(device)
