"""From records on disk to batches: stock unpickling and PyG's collate beside this package's ways, on one core."""

import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from torch_geometric.data import Batch, Data

from faenet_ocp.benchmark.measure import measure, ratio
from faenet_ocp.benchmark.systems import make_systems, slab_sizes
from faenet_ocp.data.lmdb_files import LmdbFile
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.data.packed import OC20PackedDataset
from faenet_ocp.prepare.lmdb_writer import LmdbShardWriter
from faenet_ocp.prepare.pack import pack

_BATCHES = 8
_STORED_NEIGHBORS = 50
_CUTOFF = 6.0
_FRAMES = {"dim": 2, "group": "SE", "method": "stochastic"}


def data_paths(
    *, lmdb: Path | None, batch_size: int, rounds: int, max_neighbors: int, remove_subsurface: bool
) -> dict[str, Any]:
    """Load the same shuffled systems in each way, in turn.

    The first way gives what is in the file; the others also cut the graph (to `max_neighbors`, whole shells), remove
    sub-surface atoms and attach a stochastic frame to each system.

    Args:
        lmdb: the file; None: slabs generated with 50 neighbours, as OC20 stores them.
        batch_size: systems in a batch; eight batches are loaded.
        rounds: how often each way is timed.
        max_neighbors: of the graph.
        remove_subsurface: without the atoms of tag 0.

    Returns:
        `systems` loaded in a round, mean `atoms` and `edges` of a record, and the `paths`, each with `model` (what it
        is), times as in `measure`, `bytes` of a system on disk, and `speed_up` and `speed_up_wall` against the first.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = lmdb or _write_slabs(folder / "slabs.lmdb", _BATCHES * batch_size)
        pack(source, folder / "packed")
        packed = folder / "packed" / source.name
        transforms: dict[str, Any] = {"remove_subsurface": {}} if remove_subsurface else {}
        settings = {"cutoff": _CUTOFF, "max_neighbors": max_neighbors, "labels": ["energy"]}
        settings |= {"transforms": transforms | {"frame_averaging": _FRAMES}}
        ours = OC20LmdbDataset({"src": str(source), **settings})
        theirs, flat = LmdbFile(source), OC20PackedDataset({"src": str(packed), **settings})
        order = np.random.default_rng(0).permutation(max(len(ours), _BATCHES * batch_size)) % len(ours)
        batches = [order[start : start + batch_size].tolist() for start in range(0, _BATCHES * batch_size, batch_size)]
        ways: dict[str, tuple[Callable[[list[int]], Any], Path]] = {
            "pickle and PyG's collate, nothing else": (lambda keys: _stock(theirs, keys), source),
            "ours, sample by sample": (lambda keys: _one_by_one(ours, keys), source),
            "ours, whole batches (oc20_lmdb)": (ours.load_batch, source),
            "packed, whole batches (oc20_packed)": (flat.load_batch, packed),
        }
        times = measure([_repeat(way, batches) for way, _ in ways.values()], torch.device("cpu"), rounds)
        paths = [
            {"model": model, "bytes": path.stat().st_size / len(ours), **row}
            for (model, (_, path)), row in zip(ways.items(), times, strict=True)
        ]
        for row in paths:
            row |= {"speed_up": ratio(paths[0], row), "speed_up_wall": ratio(paths[0], row, "wall_seconds")}
        stock = _stock(theirs, batches[0])
        means = {"atoms": stock.num_nodes / batch_size, "edges": stock.num_edges / batch_size}
    return {"systems": _BATCHES * batch_size, "batch_size": batch_size, **means, "paths": paths}


def table(group: dict[str, Any]) -> list[list[str]]:
    """The rows of a Markdown table, the first of them its heads."""
    rows = [["records to batches of " + str(group["batch_size"]), "systems/s", "speed-up", "(wall)", "kB/system"]]
    for path in group["paths"]:
        speeds = [f"{path['speed_up']:.2f}", f"{path['speed_up_wall']:.2f}", f"{path['bytes'] / 1000:.1f}"]
        rows.append([path["model"], f"{group['systems'] / median(path['seconds']):.0f}", *speeds])
    return rows


def _repeat(way: Callable[[list[int]], Any], batches: Sequence[list[int]]) -> Callable[[], None]:
    def function() -> None:
        for keys in batches:
            way(keys)

    return function


def _stock(file: LmdbFile, keys: list[int]) -> Batch:
    """What OCP did: objects of PyG 1.x become those of 2.x by way of their attributes."""
    samples = [pickle.loads(file.read(key)) for key in keys]
    return Batch.from_data_list([one if "_store" in one.__dict__ else _renewed(one) for one in samples])


def _renewed(sample: Data) -> Data:
    return Data.from_dict({name: value for name, value in sample.__dict__.items() if value is not None})


def _one_by_one(dataset: OC20LmdbDataset, keys: list[int]) -> AtomicData:
    return atomicdata_list_to_batch([dataset[key] for key in keys])


def _write_slabs(path: Path, count: int) -> Path:
    systems = make_systems(slab_sizes(count), cutoff=_CUTOFF, max_neighbors=_STORED_NEIGHBORS, remove_subsurface=False)
    with LmdbShardWriter(path) as writer:
        for number, data in enumerate(systems):
            zeros = torch.zeros_like(data.pos)
            fields = {
                "edge_index": data.edge_index,
                "pos": data.pos,
                "cell": data.cell,
                "atomic_numbers": data.atomic_numbers.float(),
                "natoms": len(data.pos),
                "tags": data.tags,
                "fixed": data.fixed.float(),
                "sid": number,
                "cell_offsets": data.cell_offsets,
                "distances": torch.zeros(len(data.cell_offsets)),
                "y_init": 0.0,
                "y_relaxed": float(data.energy),
                "pos_relaxed": data.pos.clone(),
                "force": zeros,
            }
            writer.append(Data(**fields))
    return path
