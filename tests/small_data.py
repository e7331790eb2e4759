"""Small adsorbate/slab systems in OC20's on-disk layout, made on the fly for the tests.

Independent of the package: structures from ASE, labels from ASE's EMT potential, edges from ASE's
neighbour list, files written with lmdb and pickle only. The same (seed, index) always gives the
same system.
"""

import copyreg
import io
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ase
import lmdb
import numpy as np
import torch
from ase.build import add_adsorbate, fcc100, fcc111
from ase.calculators.emt import EMT
from ase.neighborlist import neighbor_list
from torch_geometric.data import Data

SPLITS = ("train", "val_id", "val_ood_ads", "val_ood_cat", "val_ood_both")
CUTOFF = 6.0
STORED_NEIGHBORS = 50
METALS = ("Cu", "Pd", "Pt", "Ag")
ADSORBATES = ("O", "H", "CO", "OH")
LAYOUTS = ("pyg1", "pyg2")


def make_slab(index: int, *, seed: int = 0, layers: int = 3) -> ase.Atoms:
    """Return a rattled 2x2 slab with one adsorbate: 13 or 14 atoms for 3 layers.

    Tags are 0 (below the surface), 1 (top layer) and 2 (adsorbate); tag-0 atoms are fixed.
    """
    rng = np.random.default_rng([seed, index])
    build = (fcc111, fcc100)[int(rng.integers(2))]
    slab = build(METALS[int(rng.integers(len(METALS)))], size=(2, 2, layers), vacuum=8.0)
    slab.pbc = True
    if rng.random() < 0.5:  # an alloy
        slab.numbers[rng.integers(len(slab), size=2)] = ase.data.atomic_numbers["Au"]
    slab.set_tags(np.where(slab.get_tags() == 1, 1, 0))
    name = ADSORBATES[int(rng.integers(len(ADSORBATES)))]
    adsorbate = ase.Atoms(name, positions=[(0.0, 0.0, 1.1 * i) for i in range(1 + (len(name) > 1))])
    adsorbate.set_tags(2)
    add_adsorbate(slab, adsorbate, height=1.3 + 0.4 * rng.random(), position=rng.random(2))
    slab.positions += rng.normal(scale=0.05, size=(len(slab), 3))
    return slab


def stored_edges(atoms: ase.Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return edge_index (2, E) = [neighbour; centre], cell_offsets (E, 3) and distances (E,).

    At most STORED_NEIGHBORS nearest neighbours within CUTOFF, cut strictly, as in OC20's files.
    """
    centre, neighbour, distance, shift = neighbor_list("ijdS", atoms, CUTOFF)
    order = np.lexsort((distance, centre))
    centre, neighbour, distance, shift = (x[order] for x in (centre, neighbour, distance, shift))
    rank = np.arange(len(centre)) - np.searchsorted(centre, centre)
    keep = rank < STORED_NEIGHBORS
    return np.stack([neighbour, centre])[:, keep], shift[keep], distance[keep]


def make_fields(
    index: int, *, task: str = "is2re", edges: bool = True, seed: int = 0, layers: int = 3
) -> dict[str, Any]:
    """Return the fields of one record, with OC20's names, types and shapes.

    Args:
        index: number of the system; its sid is 1000 * seed + index.
        task: "is2re" (y_init, y_relaxed, pos_relaxed), "s2ef" (y, force, fid) or "s2ef_new"
            (energy, forces, fid).
        edges: store edge_index, cell_offsets and distances.
        seed: start of the random numbers.
        layers: number of slab layers of four atoms.
    """
    atoms = make_slab(index, seed=seed, layers=layers)
    atoms.calc = EMT()
    energy = float(atoms.get_potential_energy()) / len(atoms)
    forces = torch.tensor(atoms.get_forces(), dtype=torch.float32)
    tags = torch.tensor(atoms.get_tags(), dtype=torch.long)
    fields: dict[str, Any] = {
        "atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.float32),
        "pos": torch.tensor(atoms.positions, dtype=torch.float32),
        "cell": torch.tensor(atoms.cell.array, dtype=torch.float32).view(1, 3, 3),
        "natoms": len(atoms),
        "tags": tags,
        "fixed": (tags == 0).float(),
        "sid": 1000 * seed + index,
    }
    if task == "is2re":
        fields |= {
            "y_init": energy + 0.1,
            "y_relaxed": energy,
            "pos_relaxed": fields["pos"] + 0.05,
            "force": forces,
        }
    elif task == "s2ef":
        fields |= {"y": energy, "force": forces, "fid": index}
    elif task == "s2ef_new":
        fields |= {"energy": energy, "forces": forces, "fid": index}
    else:
        raise ValueError(f"task must be is2re, s2ef or s2ef_new, not {task!r}")
    if edges:
        edge_index, shift, distance = stored_edges(atoms)
        fields |= {
            "edge_index": torch.tensor(edge_index, dtype=torch.long),
            "cell_offsets": torch.tensor(shift, dtype=torch.float32),
            "distances": torch.tensor(distance, dtype=torch.float32),
        }
    return fields


class _Pyg1Pickler(pickle.Pickler):
    """Writes a Data as PyG 1.x did: an object of class Data whose state is its attribute dict."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Data):
            state = dict.fromkeys(("x", "edge_index", "edge_attr", "y", "pos", "normal", "face"))
            state.update(obj.to_dict())
            return copyreg.__newobj__, (Data,), state  # type: ignore[attr-defined]
        return NotImplemented


def dump_record(fields: Mapping[str, Any], *, layout: str = "pyg1", protocol: int = 4) -> bytes:
    """Return the fields as a pickled PyG Data in the PyG 1.x ("pyg1") or 2.x ("pyg2") layout."""
    data = Data(**fields)
    if layout == "pyg2":
        return pickle.dumps(data, protocol=protocol)
    if layout == "pyg1":
        buffer = io.BytesIO()
        _Pyg1Pickler(buffer, protocol=protocol).dump(data)
        return buffer.getvalue()
    raise ValueError(f"layout must be one of {LAYOUTS}, not {layout!r}")


def write_lmdb(path: Path, values: Iterable[bytes], *, length: bool = True) -> Path:
    """Write the values under the keys 0, 1, ... (and ``length``) as one LMDB file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = list(values)
    items = {str(i).encode(): value for i, value in enumerate(values)}
    if length:
        items[b"length"] = pickle.dumps(len(values))
    return write_items(path, items)


def write_items(path: Path, items: Mapping[bytes, bytes]) -> Path:
    """Write any keys and values as one LMDB file, without a lock file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 30, meminit=False) as env:
        with env.begin(write=True) as txn:
            for key, value in items.items():
                txn.put(key, value)
        env.sync()
    return path


def read_records(path: Path) -> list[Data]:
    """All records of a file, as fairchem 1.x reads it: keys 0 ... length - 1, plain unpickling."""
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        length = pickle.loads(txn.get(b"length"))
        assert env.stat()["entries"] == length + 1
        return [pickle.loads(txn.get(str(key).encode())) for key in range(length)]


def write_is2re(root: Path, *, num_train: int = 12, num_val: int = 4) -> Path:
    """Write ``root/is2re/all/{train, val_*}/data.lmdb`` and return root.

    The training split uses the PyG 1.x layout (as OC20 does), the others PyG 2.x.
    """
    for number, split in enumerate(SPLITS):
        values = [
            dump_record(make_fields(i, seed=number), layout="pyg1" if split == "train" else "pyg2")
            for i in range(num_train if split == "train" else num_val)
        ]
        write_lmdb(root / "is2re" / "all" / split / "data.lmdb", values)
    return root


def write_s2ef(root: Path, *, num_train: int = 12, num_val: int = 4) -> Path:
    """Write ``root/s2ef/2M/train/data.000{0,1}.lmdb`` (first shard with edges, old label names;
    second without, new names) and ``root/s2ef/all/val_*/data.0000.lmdb`` and return root."""
    half = num_train // 2
    shards = (("s2ef", True, range(half)), ("s2ef_new", False, range(half, num_train)))
    for number, (task, edges, indices) in enumerate(shards):
        values = [dump_record(make_fields(i, task=task, edges=edges)) for i in indices]
        write_lmdb(root / "s2ef" / "2M" / "train" / f"data.{number:04d}.lmdb", values)
    for number, split in enumerate(SPLITS[1:], start=1):
        values = [
            dump_record(make_fields(i, task="s2ef", edges=False, seed=number), layout="pyg2") for i in range(num_val)
        ]
        write_lmdb(root / "s2ef" / "all" / split / "data.0000.lmdb", values)
    return root
