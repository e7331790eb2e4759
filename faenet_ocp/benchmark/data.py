"""From records on disk to batches: stock unpickling and PyG's collate beside this package's ways, on one core."""

import math
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch
from torch_geometric.data import Batch, Data

from faenet_ocp.benchmark.measure import measure
from faenet_ocp.benchmark.systems import make_systems, slab_sizes
from faenet_ocp.data.lmdb_files import LmdbFile
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.data.packed import OC20PackedDataset
from faenet_ocp.prepare.lmdb_writer import LmdbShardWriter
from faenet_ocp.prepare.pack import pack

_BATCHES = 8
_STORED_NEIGHBORS = 50
_RATES = (5_000, 10_000, 20_000)
"""Systems a second that a fast GPU may ask for."""
_FRAMES = {"dim": 2, "group": "SE", "method": "stochastic"}


def load_in_each_way(
    *, lmdb: Path | None, batch_size: int, rounds: int, cutoff: float, max_neighbors: int, remove_subsurface: bool
) -> list[dict[str, Any]]:
    """Load the same shuffled systems in each way, in turn.

    The first way gives what is in the file; the others also cut the graph (to `max_neighbors`, whole shells), remove
    sub-surface atoms and attach a stochastic frame to each system.

    Args:
        lmdb: the file, whose pickles the first way loads as such; None: generated slabs with OC20's 50 neighbours.
        batch_size: systems in a batch; eight batches are loaded.
        rounds: how often each way is timed.
        cutoff, max_neighbors: of the graph.
        remove_subsurface: without the atoms of tag 0.

    Returns:
        a row for each way: `model` (what it is), `systems` loaded in a round, `atoms` and `edges` of these in the file,
        `bytes` of them on disk, what `measure` gives, and `processes`: how many make 5,000 systems a second, and more.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = lmdb or write_slabs(folder / "slabs.lmdb", _BATCHES * batch_size, cutoff)
        pack(source, folder / "packed")
        packed = folder / "packed" / source.name
        settings = {"cutoff": cutoff, "max_neighbors": max_neighbors, "labels": ["energy"]}
        transforms: dict[str, Any] = {"remove_subsurface": {}} if remove_subsurface else {}
        settings |= {"transforms": transforms | {"frame_averaging": _FRAMES}}
        ours = OC20LmdbDataset({"src": str(source), **settings})
        theirs, flat = LmdbFile(source), OC20PackedDataset({"src": str(packed), **settings})
        order = np.random.default_rng(0).permutation(max(len(ours), _BATCHES * batch_size)) % len(ours)
        batches = order[: _BATCHES * batch_size].reshape(_BATCHES, batch_size).tolist()
        ways: dict[str, tuple[Callable[[list[int]], Any], Path]] = {
            "pickle and PyG's collate, nothing else": (lambda keys: _stock(theirs, keys), source),
            "ours, sample by sample": (lambda keys: atomicdata_list_to_batch([ours[key] for key in keys]), source),
            "ours, whole batches (oc20_lmdb)": (ours.load_batch, source),
            "packed, whole batches (oc20_packed)": (flat.load_batch, packed),
        }
        times = measure([_over(batches, way) for way, _ in ways.values()], torch.device("cpu"), rounds)
        stock = [_stock(theirs, keys) for keys in batches]
        sizes = {"systems": _BATCHES * batch_size, "atoms": sum(batch.num_nodes for batch in stock)}
        sizes["edges"] = sum(batch.num_edges for batch in stock)
        return [
            {
                "model": model,
                **sizes,
                "bytes": path.stat().st_size * sizes["systems"] / len(ours),
                **row,
                "processes": {
                    f"{rate:,}": math.ceil(rate * median(row["seconds"]) / sizes["systems"]) for rate in _RATES
                },
            }
            for (model, (_, path)), row in zip(ways.items(), times, strict=True)
        ]


def _over(batches: Sequence[list[int]], way: Callable[[list[int]], Any]) -> Callable[[], None]:
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


def write_slabs(path: Path, count: int, cutoff: float) -> Path:
    """An LMDB of IS2RE of generated slabs."""
    with LmdbShardWriter(path) as writer:
        for record in slab_records(slab_sizes(count), cutoff=cutoff, max_neighbors=_STORED_NEIGHBORS):
            writer.append(record)
    return path


def slab_records(sizes: Sequence[int], *, cutoff: float, max_neighbors: int) -> Iterator[Data]:
    """Records of IS2RE as OC20 has them, of generated slabs of these numbers of atoms."""
    for data in make_systems(sizes, cutoff=cutoff, max_neighbors=max_neighbors, remove_subsurface=False):
        names = ("edge_index", "pos", "cell", "tags", "cell_offsets")
        fields: dict[str, Any] = {name: data[name] for name in names} | {"pos_relaxed": data.pos.clone()}
        fields |= {"atomic_numbers": data.atomic_numbers.float(), "fixed": data.fixed.float()}
        fields |= {"distances": torch.zeros(len(data.cell_offsets)), "force": torch.zeros_like(data.pos)}
        fields |= {"natoms": len(data.pos), "sid": int(data.sid[0]), "y_init": 0.0}
        yield Data(**fields, y_relaxed=float(data.energy))
