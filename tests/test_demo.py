"""The demo data: physics against ASE's own EMT, OC20's formats, honest splits, same data always."""

import csv
import importlib.util
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.io
import lmdb
import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import Hookean
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS
from torch_geometric.data import Data

from faenet_ocp import demo, demo_files
from faenet_ocp.demo import (
    OOD_ADSORBATES,
    OOD_COMPOSITIONS,
    SPLITS,
    DemoSettings,
    make_demo_data,
)
from faenet_ocp.demo_systems import ADSORBATES, COMPOSITIONS, METALS
from faenet_ocp.lmdb_dataset import OC20LmdbDataset

SETTINGS = DemoSettings(num_train=24, num_val=8, frames_per_system=3, raw_frames=7, seed=3)
REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "scripts" / "make_demo_data.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small demo data made in this process."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data(folder, SETTINGS)
    return folder


def read_values(path: Path) -> list[bytes]:
    with (
        lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        length = pickle.loads(transaction.get(b"length"))
        assert environment.stat()["entries"] == length + 1
        return [transaction.get(str(i).encode()) for i in range(length)]


def read_records(path: Path) -> list[Data]:
    return [pickle.loads(value) for value in read_values(path)]


def is2re(root: Path, split: str) -> list[Data]:
    return read_records(root / "is2re" / "all" / split / "data.lmdb")


def s2ef_folder(root: Path, split: str) -> Path:
    return root / "s2ef" / ("2M" if split == "train" else "all") / split


def s2ef(root: Path, split: str) -> list[Data]:
    shards = sorted(s2ef_folder(root, split).glob("*.lmdb"))
    return [record for shard in shards for record in read_records(shard)]


def table(root: Path) -> dict[int, dict[str, str]]:
    with (root / "systems.csv").open() as file:
        return {int(row["sid"]): row for row in csv.DictReader(file)}


def everything(root: Path) -> dict[str, list[dict[str, Any]]]:
    """All records of all shards; the bytes themselves hold memory addresses."""
    return {
        str(path.relative_to(root)): [record.to_dict() for record in read_records(path)]
        for path in sorted(root.rglob("*.lmdb"))
    }


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


def atoms_of(record: Data, pos: torch.Tensor) -> ase.Atoms:
    return ase.Atoms(
        record.atomic_numbers.int().tolist(),
        positions=pos.double().numpy(),
        cell=record.cell[0].double().numpy(),
        pbc=True,
        tags=record.tags.tolist(),
    )


def spring_bonds(name: str) -> list[tuple[int, int, float]]:
    """Bonds of an adsorbate with the length at which their springs begin."""
    symbols, positions = ADSORBATES[name]
    molecule_ = ase.Atoms(symbols, positions)
    radii = covalent_radii[molecule_.numbers]
    return [
        (a, b, 1.1 * molecule_.get_distance(a, b))
        for a, b in itertools.combinations(range(len(molecule_)), 2)
        if molecule_.get_distance(a, b) < 1.25 * (radii[a] + radii[b])
    ]


def ase_energy_and_forces(atoms: ase.Atoms, adsorbate: str) -> tuple[float, np.ndarray]:
    """EMT and springs, both ASE's own."""
    atoms = atoms.copy()
    atoms.calc = EMT()
    first = len(atoms) - len(ADSORBATES[adsorbate][0])
    atoms.set_constraint(
        [Hookean(first + a, first + b, 15.0, start) for a, b, start in spring_bonds(adsorbate)]
    )
    return atoms.get_potential_energy(), atoms.get_forces()


@pytest.fixture(scope="module")
def gas() -> dict[str, float]:
    """Energy per atom from gas molecules relaxed with ASE's EMT."""
    energies = {}
    for name in ("H2", "N2", "H2O", "CO"):
        atoms = molecule(name, vacuum=10.0)
        atoms.calc = EMT()
        BFGS(atoms, logfile=None).run(fmax=0.001)
        energies[name] = atoms.get_potential_energy()
    oxygen = energies["H2O"] - energies["H2"]
    return {
        "H": energies["H2"] / 2,
        "N": energies["N2"] / 2,
        "O": oxygen,
        "C": energies["CO"] - oxygen,
    }


def systems(root: Path) -> Iterator[tuple[str, Data, dict[str, str]]]:
    rows = table(root)
    for split in SPLITS:
        for record in is2re(root, split):
            yield split, record, rows[record.sid]


# --- physics ---


def test_energies_and_forces_are_those_of_ase(root: Path, gas: dict[str, float]) -> None:
    """y_init, y_relaxed, force and the references, recomputed from the stored float32 positions."""
    for _, record, row in systems(root):
        initial, relaxed = atoms_of(record, record.pos), atoms_of(record, record.pos_relaxed)
        # The adsorbate was placed on the relaxed clean slab: without it, that slab is left.
        slab = initial[[atom.index for atom in initial if atom.tag != 2]]
        slab.calc = EMT()
        reference = slab.get_potential_energy()
        reference += sum(gas[atom.symbol] for atom in initial if atom.tag == 2)
        assert reference == pytest.approx(float(row["reference"]), abs=5e-4)
        slab_forces = slab.get_forces()[slab.get_tags() == 1]
        assert np.linalg.norm(slab_forces, axis=1).max() < 0.041

        energy, forces = ase_energy_and_forces(relaxed, row["adsorbate"])
        assert record.y_relaxed == pytest.approx(energy - float(row["reference"]), abs=1e-4)
        assert np.linalg.norm(forces[record.tags != 0], axis=1).max() < 0.041
        energy, forces = ase_energy_and_forces(initial, row["adsorbate"])
        assert record.y_init == pytest.approx(energy - float(row["reference"]), abs=1e-4)
        assert record.force.numpy() == pytest.approx(forces, abs=1e-3)
        assert record.y_relaxed < record.y_init


def test_s2ef_frames_are_those_of_ase(root: Path) -> None:
    rows = table(root)
    largest = []
    for record in s2ef(root, "val_ood_ads") + s2ef(root, "train")[:20]:
        row = rows[record.sid]
        energy, forces = ase_energy_and_forces(atoms_of(record, record.pos), row["adsorbate"])
        assert record.y == pytest.approx(energy - float(row["reference"]), abs=1e-4)
        assert record.force.numpy() == pytest.approx(forces, abs=1e-3)
        largest.append(float(record.force[record.tags != 0].norm(dim=1).max()))
    assert min(largest) < 0.5 < max(largest)  # frames from the beginning and from the end


def test_springs_hold_what_emt_alone_would_break(root: Path) -> None:
    """Every adsorbate is intact; most molecules are not after relaxing without springs."""
    broken = 0
    molecules = [s for s in systems(root) if len(ADSORBATES[s[2]["adsorbate"]][0]) > 1]
    for _, record, row in molecules:
        relaxed = atoms_of(record, record.pos_relaxed)
        first = len(relaxed) - len(ADSORBATES[row["adsorbate"]][0])
        lengths = [relaxed.get_distance(first + a, first + b) for a, b, _ in spring_bonds(row["adsorbate"])]
        starts = [start for *_, start in spring_bonds(row["adsorbate"])]
        assert all(np.array(lengths) < np.array(starts) + 0.25)
        free = relaxed.copy()
        free.set_constraint(ase.constraints.FixAtoms(mask=relaxed.get_tags() == 0))
        free.calc = demo_systems_emt()
        BFGS(free, logfile=None).run(fmax=0.1, steps=60)
        now = [free.get_distance(first + a, first + b) for a, b, _ in spring_bonds(row["adsorbate"])]
        broken += any(np.array(now) > 1.3 * np.array(starts))
    assert broken > len(molecules) / 3
