"""Generated demo data in OC20's on-disk layout: IS2RE and S2EF, with honest validation splits.

Fields, dtypes and names are those of OC20's files: energies are relative to the clean slab and the gas phase (eV),
edge_index[0] is the neighbour, edge_index[1] the centre. A task is one clean slab with up to four adsorbate placements.
Everything random in it comes from (seed, split, number of the slab): the number of processes has no influence.

No clean slab is in two splits: a strained one is drawn anew every time, and the unstrained ones of one composition and
facet belong to one split. Training never sees `OOD_ADSORBATES` (val_ood_ads, val_ood_both) nor `OOD_COMPOSITIONS`
(val_ood_cat, val_ood_both).
"""

import csv
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data
from tqdm import tqdm

from faenet_ocp.common.files import made_whole, write_json
from faenet_ocp.common.pool import ordered_map
from faenet_ocp.prepare.demo import systems
from faenet_ocp.prepare.demo.systems import ADSORBATES, COMPOSITIONS, METALS, Array, SlabSpec, System
from faenet_ocp.prepare.lmdb_writer import LmdbShardWriter, encode_record, write_metadata
from faenet_ocp.prepare.s2ef import MAX_NEIGHBORS, stored_edges

logger = logging.getLogger(__name__)

SPLITS = ("train", "val_id", "val_ood_ads", "val_ood_cat", "val_ood_both")
OOD_ADSORBATES = ("CH3", "NH3", "COH", "NOH")
OOD_COMPOSITIONS = tuple(name for name in COMPOSITIONS if name not in METALS)[2::5]
SUMMARY_NAME = "summary.json"

_SYSTEMS_PER_SLAB = 4
_SLABS_PER_SHARD = 125
_MAX_FAILURES_ON_SLAB = 8  # about 3 % of the systems cannot be used; a slab with more is unstable
_LAYOUT = 3  # to be raised when the same settings begin to give other data
_NOTE = (
    "Generated demonstration data in OC20's formats. Energies and forces are effective-medium theory (ASE's EMT) with "
    "springs on the adsorbates' bonds; not DFT, not OC20. Energies in eV. S2EF frames are rattled (normal, "
    f"{systems.RATTLE} A along each axis)."
)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo data depends on.

    Attributes:
        num_train: training systems.
        num_val: systems in each of the four validation splits.
        frames_per_system: S2EF frames taken from each relaxation, at most; they are rattled.
        seed: of everything random.
    """

    num_train: int = 1500
    num_val: int = 200
    frames_per_system: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            lowest = int(name != "seed")
            if not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} must be a whole number >= {lowest}, got {value!r}")


def make_demo_data(root: str | Path, settings: DemoSettings, *, num_workers: int = 1) -> dict[str, Any]:
    """Generate the demo data; its folder appears when all of it is there.

    Writes `is2re/all/{split}/data.lmdb`, `s2ef/2M/train/data.NNNN.lmdb` (with edges), `s2ef/all/val_*/data.NNNN.lmdb`
    (without), a `metadata.npz` in each of these folders, `systems.csv` and `summary.json`.

    Args:
        root: output folder, new or empty; with demo data of the same settings nothing is done.
        settings: sizes and seed.
        num_workers: processes; 1 works in this one.

    Returns:
        The summary: settings, and the number of systems and frames of each split.

    Raises:
        FileExistsError: `root` holds something else.
        ValueError: `num_workers` is not positive.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
    root = Path(root).resolve()
    made_from = {"layout": _LAYOUT, **asdict(settings)}
    if (root / SUMMARY_NAME).exists():
        known: dict[str, Any] = json.loads((root / SUMMARY_NAME).read_text())
        if known.get("settings") != made_from:
            raise FileExistsError(f"{root} holds demo data of other settings, {known.get('settings')}, not {made_from}")
        logger.info("%s is complete already", root)
        return known
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} holds other files: choose another folder")
    with made_whole(root) as folder:
        return _write(folder, settings, made_from, num_workers)


def _write(folder: Path, settings: DemoSettings, made_from: dict[str, Any], num_workers: int) -> dict[str, Any]:
    tasks = list(_tasks(settings))
    logger.info("relaxing adsorbates on %d slabs", len(tasks))
    results = ordered_map(_make_records, tasks, num_workers)
    # disable=None: a bar on terminals only.
    progress = iter(tqdm(results, total=len(tasks), unit="slab", desc="demo data", disable=None))
    rows = {split: _write_split(folder, split, [t[0] for t in tasks].count(split), progress) for split in SPLITS}
    with (folder / "systems.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows["train"][0]), lineterminator="\n")
        writer.writeheader()
        for split in SPLITS:
            writer.writerows(rows[split])
    sizes = {
        split: {"num_systems": len(found), "num_frames": sum(row["num_frames"] for row in found)}
        for split, found in rows.items()
    }
    summary = {"note": _NOTE, "settings": made_from, "splits": sizes}
    write_json(folder / SUMMARY_NAME, summary)
    return summary


def _tasks(settings: DemoSettings) -> Iterator[tuple[str, int, range, DemoSettings]]:
    """Split, number and sids of each slab; sids count up within a split from its own million."""
    for position, split in enumerate(SPLITS, start=1):
        total = settings.num_train if split == "train" else settings.num_val
        sids = range(1_000_000 * position, 1_000_000 * position + total)
        for number, start in enumerate(range(0, total, _SYSTEMS_PER_SLAB)):
            yield split, number, sids[start : start + _SYSTEMS_PER_SLAB], settings


def _write_split(root: Path, split: str, num_slabs: int, results: Iterator[Any]) -> list[dict[str, Any]]:
    """Write the next `num_slabs` results as a split, and return its rows of systems.csv."""
    is2re = root / "is2re" / "all" / split
    s2ef = root / "s2ef" / ("2M" if split == "train" else "all") / split
    rows: list[dict[str, Any]] = []
    with LmdbShardWriter(is2re / "data.lmdb") as relaxations:
        for number, start in enumerate(range(0, num_slabs, _SLABS_PER_SHARD)):
            with LmdbShardWriter(s2ef / f"data.{number:04d}.lmdb") as frames:
                for described, encoded in islice(results, min(_SLABS_PER_SHARD, num_slabs - start)):
                    rows += described
                    for relaxation, *others in encoded:
                        relaxations.append(relaxation)
                        for frame in others:
                            frames.append(frame)
    natoms = [row["natoms"] for row in rows]
    write_metadata(is2re, natoms=natoms, neighbors=[row["num_edges"] for row in rows])
    write_metadata(s2ef, natoms=np.repeat(natoms, [row["num_frames"] for row in rows]))
    return rows


# One slab


def _make_records(
    split: str, number: int, sids: range, settings: DemoSettings
) -> tuple[list[dict[str, Any]], list[list[bytes]]]:
    """Of each system on a slab: its row of systems.csv; its IS2RE record and its S2EF records, encoded."""
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), number])
    rows, records = [], []
    for sid, system in zip(sids, _draw_systems(split, rng), strict=False):
        positions, energies, forces = system.trajectory
        first = Data(
            **_structure(system, positions[0], sid, edges=True),
            y_init=float(energies[0] - system.reference),
            y_relaxed=float(energies[-1] - system.reference),
            pos_relaxed=_float_tensor(positions[-1]),
            force=_float_tensor(forces[0]),
        )
        frames = [
            Data(
                **_structure(system, pos, sid, edges=split == "train"),
                y=energy - system.reference,
                force=_float_tensor(force),
                fid=step,
            )
            for step, pos, energy, force in systems.rattled_frames(system, settings.frames_per_system, rng)
        ]
        row = {"sid": sid, "split": split, "adsorbate": system.adsorbate, **system.spec._asdict()}
        row |= {"rotation": system.rotation, "natoms": first.natoms, "num_edges": len(first.distances)}
        row |= {"num_frames": len(frames), "y_init": first.y_init, "y_relaxed": first.y_relaxed}
        rows.append(row | {"reference": system.reference})
        records.append([encode_record(record) for record in (first, *frames)])
    return rows, records


def _draw_systems(split: str, rng: np.random.Generator) -> Iterator[System]:
    """Systems on one slab; on another if that is unstable."""
    adsorbates = [name for name in ADSORBATES if (name in OOD_ADSORBATES) == (split in ("val_ood_ads", "val_ood_both"))]
    ood_compositions = split in ("val_ood_cat", "val_ood_both")
    compositions = [name for name in COMPOSITIONS if (name in OOD_COMPOSITIONS) == ood_compositions]
    slab, failures = None, 0
    while True:
        if slab is None or failures == _MAX_FAILURES_ON_SLAB:
            spec = systems.draw_slab(rng, compositions)
            slab, failures = systems.relaxed_slab(spec) if _belongs_to(spec, split) else None, 0
            continue
        system = systems.make_system(spec, *slab, str(rng.choice(adsorbates)), rng)
        if system is None:
            failures += 1
        else:
            yield system


def _belongs_to(spec: SlabSpec, split: str) -> bool:
    """Whether a split may use a slab: one of ten owners by composition and facet if unstrained."""
    if any(spec.strain):
        return True
    owner = hashlib.sha256(f"{spec.composition} {spec.facet}".encode()).digest()[0] % 10
    if spec.composition in OOD_COMPOSITIONS:
        return split == ("val_ood_cat" if owner < 5 else "val_ood_both")
    return split == ("train" if owner < 8 else "val_id" if owner == 8 else "val_ood_ads")


def _structure(system: System, positions: Array, sid: int, *, edges: bool) -> dict[str, Any]:
    """The fields of a structure; of its edges at most 50 per atom, cut strictly as in OC20's files."""
    tags = torch.from_numpy(system.atoms.get_tags().astype(np.int64))
    record: dict[str, Any] = {
        "atomic_numbers": _float_tensor(system.atoms.numbers),
        "pos": _float_tensor(positions),
        "cell": _float_tensor(system.atoms.cell.array[None]),
        "natoms": len(positions),
        "tags": tags,
        "fixed": (tags == 0).float(),
        "sid": sid,
    }
    if edges:
        found = stored_edges(record["pos"], record["cell"])  # by centre, then by distance; whole shells
        centre = found["edge_index"][1]
        kept = torch.arange(len(centre)) - torch.searchsorted(centre, centre) < MAX_NEIGHBORS
        record |= {name: value[..., kept] if name == "edge_index" else value[kept] for name, value in found.items()}
    return record


def _float_tensor(values: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float32)
