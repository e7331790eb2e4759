"""Relaxing the structures of a file into a folder: input, results that survive a crash, metrics.

`energy` metrics are IS2RE by relaxation, `positions` IS2RS: average distance within threshold (ADwT), as in OCP.

Energies in eV, forces in eV/Angstrom, positions in Angstrom; n atoms of one structure.
"""

import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.geometry import find_mic
from fairchem.core.datasets.atomic_data import AtomicData
from numpy.typing import NDArray
from tqdm import tqdm

from faenet_ocp.common.files import write_json
from faenet_ocp.data.atoms import fixed_atoms
from faenet_ocp.data.fields import Fields
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.evaluation.metrics import energy_metrics
from faenet_ocp.inference.relaxation import Evaluate, Relaxed, relax

RESULTS = "relaxed.extxyz"
SETTINGS = "settings.json"
METRICS = "metrics.json"
DISTANCE_THRESHOLDS = np.arange(0.01, 0.5, 0.001)
"""Of ADwT, as in OCP's evaluator, Angstrom."""
_INDEX = re.compile(r"(?:^| )input_index=(\d+)(?: |$)")


# ------------------------------------------------------------------------------------------ input
def open_structures(source: str | Path) -> Sequence[Atoms]:
    """The structures of an LMDB (file, folder or glob) or of any file that ASE reads.

    `info["sid"]` names each. Where the relaxed structure is known, `info["y_relaxed"]` is its energy and the array
    `pos_relaxed` its positions (n, 3): IS2RE's names.

    Raises:
        ValueError, FileNotFoundError: nothing is there, or nothing that can be read.
    """
    path = Path(source)
    if path.is_dir() or path.suffix == ".lmdb":
        return LmdbStructures(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        structures = list(ase.io.iread(path, ":"))
    except Exception as error:  # ASE's readers fail in many ways
        raise ValueError(f"{path}: ASE cannot read it ({type(error).__name__}: {error})") from error
    for index, atoms in enumerate(structures):
        atoms.info["sid"] = str(atoms.info.get("sid", index))
    return structures


class LmdbStructures(Sequence[Atoms]):
    """The records of OC20 LMDBs as Atoms: fixed atoms in a FixAtoms constraint, periodic as OC20's systems are.

    Args:
        source: file, folder or glob.
    """

    def __init__(self, source: str | Path):
        self.dataset = _RecordsWithReference({"src": str(source), "edges": "none", "labels": []})

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        data = self.dataset[index]
        atoms = Atoms(
            numbers=data.atomic_numbers.numpy(),
            positions=data.pos.double().numpy(),
            cell=data.cell[0].double().numpy(),
            pbc=data.pbc[0].numpy(),
            tags=data.tags.numpy(),
            info={"sid": data.sid[0]},
        )
        if bool(data.fixed.any()):
            atoms.set_constraint(FixAtoms(mask=data.fixed.bool().numpy()))
        if "y_relaxed" in data:
            atoms.info["y_relaxed"] = float(data.y_relaxed)
        if "pos_relaxed" in data:
            atoms.set_array("pos_relaxed", data.pos_relaxed.double().numpy())
        return atoms


class _RecordsWithReference(OC20LmdbDataset):
    """Samples that keep the relaxed energy and positions that IS2RE records have."""

    def _make(self, records: Sequence[Fields], sids: list[str]) -> AtomicData:
        data = super()._make(records, sids)
        (fields,) = records
        if "y_relaxed" in fields:
            data.y_relaxed = torch.tensor([float(np.asarray(fields["y_relaxed"]).item())])
        if "pos_relaxed" in fields:
            data.pos_relaxed = torch.tensor(np.asarray(fields["pos_relaxed"]), dtype=data.pos.dtype)
            if data.pos_relaxed.shape != data.pos.shape:
                raise ValueError(f"has pos_relaxed of shape {tuple(data.pos_relaxed.shape)}")
        return data


# --------------------------------------------------------------------------------------------- a whole job
def run(
    structures: Sequence[Atoms],
    evaluate: Evaluate,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    batch_size: int = 32,
    keep_trajectories: bool = False,
) -> dict[str, Any]:
    """Relaxes all structures into a folder, going on where an earlier run of the same settings stopped.

    The folder gets `relaxed.extxyz` (a frame for each finished structure, in the order of finishing, synced to disk
    one by one), `metrics.json` when all are finished, `settings.json`, and `trajectories/` if asked for.

    Args:
        structures: see `open_structures`.
        evaluate: energies and forces.
        folder: created if absent.
        settings: what the results depend on, as JSON: `fmax`, `max_steps` and `max_step` of `relax`, and anything that
            identifies checkpoint and input.
        batch_size: structures in a model call; does not change results.
        keep_trajectories: whether to write trajectories.

    Returns:
        the metrics, see `relaxation_metrics`.

    Raises:
        ValueError: the folder holds results of other settings, or as in `relax`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / RESULTS
    done = _finished(results)
    _check_settings(folder / SETTINGS, {**settings, "num_structures": len(structures)}, begun=bool(done))
    waiting = ((index, structures[index]) for index in range(len(structures)) if index not in done)
    limits = {name: settings[name] for name in ("fmax", "max_steps", "max_step")}
    trajectories = folder / "trajectories" if keep_trajectories else None
    with (
        results.open("a", encoding="utf-8") as file,
        tqdm(total=len(structures), initial=len(done), desc="relax", unit="structure", disable=None) as bar,
    ):
        for relaxed in relax(waiting, evaluate, batch_size=batch_size, trajectories=trajectories, **limits):
            file.write(_frame(relaxed))
            file.flush()
            os.fsync(file.fileno())
            bar.update()
    metrics = relaxation_metrics(ase.io.iread(results, format="extxyz"))
    write_json(folder / METRICS, metrics)
    return metrics


def _check_settings(path: Path, settings: Mapping[str, Any], *, begun: bool) -> None:
    if begun and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        if other:
            raise ValueError(
                f"{path.parent} holds relaxations with other settings ("
                + "; ".join(f"{key}: {before.get(key)!r}, now {settings.get(key)!r}" for key in other)
                + "); choose another folder"
            )
    else:
        write_json(path, settings)


def _frame(relaxed: Relaxed) -> str:
    """The text of one result in extended XYZ."""
    given = relaxed.atoms
    atoms = Atoms(given.numbers, given.positions, cell=given.cell, pbc=given.pbc, tags=given.get_tags())
    atoms.set_constraint(FixAtoms(mask=fixed_atoms(given)) if fixed_atoms(given).any() else None)
    atoms.info = {
        "input_index": relaxed.index,
        "sid": given.info["sid"],
        "status": relaxed.status,
        "steps": relaxed.steps,
        "fmax": relaxed.fmax,
        "initial_energy": relaxed.initial_energy,
        "common_displacement": relaxed.common_displacement,
    }
    if "y_relaxed" in given.info:
        atoms.info["y_relaxed"] = given.info["y_relaxed"]
    if given.has("pos_relaxed"):
        atoms.set_array("pos_relaxed", given.get_array("pos_relaxed"))
    atoms.calc = SinglePointCalculator(atoms, **given.calc.results)
    text = io.StringIO()
    ase.io.write(text, atoms, format="extxyz")
    return text.getvalue()


def _finished(path: Path) -> set[int]:
    """Indices of the whole frames in a results file; what a crash left of a last one is cut off."""
    if not path.exists():
        return set()
    indices: set[int] = set()
    end = 0
    with path.open("rb+") as file:
        while head := file.readline():
            lines = [file.readline() for _ in range(1 + (int(head) if head.strip().isdigit() else 0))]
            match = _INDEX.search(lines[0].decode("utf-8", errors="replace"))
            if not lines[-1].endswith(b"\n") or len(lines) < 2 or match is None:
                break
            indices.add(int(match[1]))
            end = file.tell()
        file.truncate(end)
    return indices


# --------------------------------------------------------------------------------------------- metrics
def relaxation_metrics(results: Iterable[Atoms]) -> dict[str, Any]:
    """Metrics of finished relaxations, the frames of `relaxed.extxyz`.

    Returns:
        num_structures, num_converged, num_failed, mean_steps, mean and max of the common displacement (see
        `relaxation.Relaxed`); where relaxed energies are known (IS2RE by relaxation)
        `energy` with `evaluation.energy_metrics`; where relaxed positions are known (IS2RS) `positions` with
        average_distance_within_threshold (ADwT, %), mean_distance (Angstrom) and num_systems.
    """
    status: list[str] = []
    steps: list[int] = []
    displacements: list[float] = []
    energies: list[tuple[float, float]] = []
    distances: list[float] = []
    for atoms in results:
        status.append(atoms.info["status"])
        steps.append(int(atoms.info["steps"]))
        displacements.append(float(atoms.info["common_displacement"]))
        if "y_relaxed" in atoms.info:
            energies.append((atoms.get_potential_energy(), float(atoms.info["y_relaxed"])))
        if atoms.has("pos_relaxed"):
            distances.append(mean_distance(atoms, atoms.get_array("pos_relaxed")))
    metrics: dict[str, Any] = {
        "num_structures": len(status),
        "num_converged": status.count("converged"),
        "num_failed": status.count("failed"),
        "mean_steps": float(np.mean(steps)) if steps else None,
        "mean_common_displacement": float(np.mean(displacements)) if steps else None,
        "max_common_displacement": max(displacements, default=None),
    }
    if energies:
        pred, target = np.array(energies).T
        metrics["energy"] = energy_metrics(pred, target, split="relaxed structures")
    if distances:
        metrics["positions"] = {
            "average_distance_within_threshold": average_distance_within_threshold(distances),
            "mean_distance": float(np.mean(distances)),
            "num_systems": len(distances),
        }
    return metrics


def mean_distance(atoms: Atoms, positions: NDArray[np.float64]) -> float:
    """Mean distance of the free atoms (all, if none is free) to other positions (n, 3), minimum image, Angstrom."""
    free = ~fixed_atoms(atoms)
    chosen = free if free.any() else ~free
    _, lengths = find_mic((atoms.positions - positions)[chosen], atoms.cell, atoms.pbc)
    return float(np.mean(lengths))


def average_distance_within_threshold(distances: Sequence[float]) -> float:
    """ADwT, %: share of systems whose mean distance is below a threshold, averaged over `DISTANCE_THRESHOLDS`."""
    return float(100 * np.mean(np.array(distances)[:, None] < DISTANCE_THRESHOLDS))
