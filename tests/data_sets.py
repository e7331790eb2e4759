"""Data sets of a few records, and comparisons to the last bit, for the tests of `faenet_ocp.data`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import fcc111
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch

import small_data
from faenet_ocp.data.oc20 import OC20LmdbDataset
from small_data import dump_record, make_fields, write_lmdb

FRAMES: dict[str, dict[str, Any]] = {
    "stochastic": {"dim": 2, "group": "SE", "method": "stochastic"},
    "stochastic 3D": {"dim": 3, "group": "E", "method": "stochastic"},
    "canonical": {"dim": 3, "group": "E", "method": "canonical"},
    "full": {"dim": 2, "group": "E", "method": "full"},
    "det": {"dim": 3, "group": "SE", "method": "det"},
}
TRANSFORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "no subsurface": {"remove_subsurface": {}},
    "augmented": {"remove_subsurface": {}, "data_augmentation": {"dim": 3, "reflect": True}},
    "augmented whole": {"data_augmentation": {"dim": 2}},
    **{name: {"remove_subsurface": {}, "frame_averaging": frames} for name, frames in FRAMES.items()},
}


def open_dataset(src: Any, cls: type[OC20LmdbDataset] = OC20LmdbDataset, **config: Any) -> OC20LmdbDataset:
    return cls({"src": src, "cutoff": 6.0, "max_neighbors": 40, **config})


def write(folder: Path, *records: dict[str, Any], layout: str = "pyg1") -> Path:
    return write_lmdb(folder / "data.lmdb", [dump_record(fields, layout=layout) for fields in records])


def dataset_of(folder: Path, *records: dict[str, Any], layout: str = "pyg1", **config: Any) -> OC20LmdbDataset:
    """A data set of these records, in a new file."""
    return open_dataset(write(folder, *records, layout=layout), **config)


def bare_fields() -> dict[str, Any]:
    """A record without labels."""
    return {name: item for name, item in make_fields(0).items() if not name.startswith(("y", "force", "pos_"))}


def unrelaxed_slab(order: Any) -> dict[str, Any]:
    """A slab full of equal distances, its 16 atoms in the given order, with OC20's strict cut at 50 neighbours.

    Inner atoms have 48 neighbours in four shells and 66 in five.
    """
    atoms = fcc111("Cu", size=(2, 2, 4), vacuum=8.0)
    atoms.pbc = True
    atoms = atoms[order]
    edge_index, shift, distance = small_data.stored_edges(atoms)
    fields = {"edge_index": edge_index, "cell_offsets": shift, "distances": distance, "y": 0.5}
    fields |= {"pos": atoms.positions, "cell": atoms.cell.array, "atomic_numbers": atoms.numbers}
    return {name: torch.tensor(item) for name, item in (fields | {"tags": np.arange(16) % 3}).items()}


def edge_set(edge_index: torch.Tensor, offsets: torch.Tensor) -> set[tuple[int, ...]]:
    return set(map(tuple, torch.cat([edge_index.T, offsets.long()], 1).tolist()))


def one_by_one(dataset: OC20LmdbDataset, keys: list[tuple[int, int]]) -> AtomicData:
    return atomicdata_list_to_batch([dataset[key] for key in keys])


def assert_same(data: AtomicData, expected: AtomicData) -> None:
    """Bits, types, order, and what fairchem knows about the systems of a batch."""
    assert data.keys() == expected.keys()
    for name, value in expected:
        if isinstance(value, torch.Tensor):
            assert data[name].dtype == value.dtype and torch.equal(data[name], value), name
            assert data[name].is_contiguous(), name
        else:
            assert data[name] == value, name
    assert data.get_batch_stats() == expected.get_batch_stats()
