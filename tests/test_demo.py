"""The demo data: physics against ASE's own EMT, OC20's formats, honest splits, same data always."""

import csv
import itertools
import json
import lzma
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ase.io
import lmdb
import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.emt import EMT
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
from faenet_ocp.demo_emt import PairEMT, Spring
from faenet_ocp.demo_systems import (
    ADSORBATES,
    COMPOSITIONS,
    FACETS,
    METALS,
    SlabSpec,
    Trajectory,
    bond_springs,
    build_slab,
    bulk,
    draw_slab,
    place,
    relax,
    why_unusable,
)
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


def clean_slab(composition: str = "Cu", facet: str = "111") -> ase.Atoms:
    options = FACETS[facet]
    no_strain = (0.0, 0.0, 0.0)
    spec = SlabSpec(composition, facet, options.layers[0], options.repeats[0], 0, no_strain)
    return build_slab(spec)


def test_springs_hold_what_emt_alone_would_break() -> None:
    slab = clean_slab()
    relax(slab)
    outcomes: dict[str, list[str | None]] = {"springs": [], "no springs": []}
    for name, seed in itertools.product(("OH", "CH2", "NH2"), range(3)):
        initial = place(slab, name, np.random.default_rng(seed))
        for kind, springs in (("springs", bond_springs(name, len(slab))), ("no springs", ())):
            relaxed = initial.copy()
            outcomes[kind].append(why_unusable(initial, relaxed, relax(relaxed, springs)))
    assert outcomes["springs"] == [None] * 9
    assert outcomes["no springs"].count("bonds changed") >= 6


def test_pair_emt_is_ases_emt() -> None:
    """On what it is used for and beyond: after moves, changed cells, elements and periodicity."""
    rng = np.random.default_rng(0)
    atoms = place(clean_slab("Cu3Pt", "211"), "CHOH", rng)
    atoms.set_constraint()
    atoms.calc = PairEMT()

    def compare() -> None:
        reference = atoms.copy()
        reference.calc = EMT()
        assert atoms.get_potential_energy() == pytest.approx(
            reference.get_potential_energy(), abs=1e-9
        )
        assert atoms.get_forces() == pytest.approx(reference.get_forces(), abs=1e-9)

    compare()
    for step in (0.01, 0.01, 0.1, 0.5):  # below and above the skin of the neighbour list
        atoms.positions += rng.normal(scale=step, size=atoms.positions.shape)
        compare()
    atoms.set_cell(atoms.cell.array @ [[1.02, 0, 0], [0.01, 0.97, 0], [0, 0, 1]])
    compare()
    atoms.pbc = (True, False, False)
    compare()
    atoms.numbers[:5] = 47
    compare()
    atoms = bulk("AlNi").copy()  # every atom has images of itself for neighbours
    atoms.rattle(0.05, seed=1)
    atoms.calc = PairEMT()
    compare()
    atoms = ase.Atoms("CuO", positions=[(0, 0, 0), (0, 0, 30)])  # no neighbours at all
    atoms.calc = PairEMT()
    compare()


def test_springs_of_pair_emt_are_hookean() -> None:
    atoms = ase.Atoms("OH", positions=[(0, 0, 0), (0.3, 0.4, 1.2)])
    for start in (1.0, 2.0):  # pulling, not pulling
        atoms.set_constraint()
        atoms.calc = PairEMT([Spring(0, 1, start)])
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = EMT()
        plain = atoms.get_potential_energy()
        atoms.set_constraint(Hookean(0, 1, 15.0, start))
        assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        assert forces == pytest.approx(atoms.get_forces(), abs=1e-9)
        assert (energy > plain + 0.1) == (start == 1.0)


def test_slabs() -> None:
    """Planes, tags, fixed atoms, stoichiometry, bond lengths and strain of every kind of slab."""
    for composition, facet in itertools.product(("Pd", "Cu3Au", "AlCu"), FACETS):
        options = FACETS[facet]
        for layers, repeat in itertools.product(options.layers, options.repeats):
            spec = SlabSpec(composition, facet, layers, repeat, 1, (0.0, 0.0, 0.0))
            slab = build_slab(spec)
            heights = np.unique(slab.positions[:, 2].round(3))
            assert len(heights) == layers
            assert slab.pbc.all() and 15 < len(slab) < 70
            top = slab.positions[:, 2] > heights[-options.surface_layers] - 1e-2
            assert np.array_equal(slab.get_tags(), top.astype(int))
            fixed = slab.constraints[0].index
            assert np.array_equal(np.sort(fixed), np.flatnonzero(~top))
            nearest = bulk(composition).cell[0, 0] / np.sqrt(2)
            distances = neighbor_list("d", slab, nearest + 0.1)
            assert distances == pytest.approx(nearest, abs=1e-3)
            lengths = np.linalg.norm(slab.cell.array[:2], axis=1)
            assert lengths.min() > 4.9
            strained = build_slab(spec._replace(strain=(0.04, -0.03, 0.01)))
            strain = np.linalg.solve(slab.cell.array[:2, :2], strained.cell.array[:2, :2])
            assert strain == pytest.approx(np.array([[1.04, 0.01], [0.01, 0.97]]))
            assert strained.positions[:, 2] == pytest.approx(slab.positions[:, 2])
            if layers % 4 == 0:  # whole periods of every ordered alloy
                shares = {symbol: 4 * n / len(slab) for symbol, n in Counter(slab.symbols).items()}
                assert shares == Counter(COMPOSITIONS[composition])


def test_bulk_is_at_its_minimum() -> None:
    for composition in ("Cu", "Pt3Al", "AgPd"):
        crystal = bulk(composition).copy()
        crystal.calc = EMT()
        assert abs(crystal.get_stress()[:3].mean()) < 1e-3


def test_adsorbate_starts_in_contact_and_upright() -> None:
    for facet, name, seed in itertools.product(FACETS, ("H", "CO", "NH2"), range(3)):
        slab = clean_slab("Ag", facet)
        system = place(slab, name, np.random.default_rng(seed))
        adsorbate = np.flatnonzero(system.get_tags() == 2)
        assert len(adsorbate) == len(ADSORBATES[name][0]) and adsorbate[0] == len(slab)
        distances = system.get_all_distances(mic=True)[adsorbate][:, : len(slab)]
        assert 1.5 < distances.min() < 3.0
        assert system.positions[adsorbate, 2].argmin() == 0


def test_unusable_systems_are_recognised() -> None:
    slab = clean_slab()
    initial = place(slab, "OH", np.random.default_rng(0))
    relaxed = initial.copy()
    trajectory = relax(relaxed, bond_springs("OH", len(slab)))
    oxygen, hydrogen = len(slab), len(slab) + 1
    assert why_unusable(initial, relaxed, trajectory) is None

    def moved(atoms: list[int], by: tuple[float, float, float]) -> ase.Atoms:
        copy = relaxed.copy()
        copy.positions[atoms] += by
        return copy

    surface_atom = int(np.flatnonzero(relaxed.get_tags() == 1)[0])
    for broken, reason in (
        (moved([oxygen, hydrogen], (0, 0, 4)), "desorbed"),
        (moved([hydrogen], (0, 0, 1)), "bonds changed"),
        (moved([oxygen, hydrogen], (0, 0, -3)), "below the surface"),
        (moved([surface_atom], (1.2, 0, 0)), "slab reconstructed"),
    ):
        assert why_unusable(initial, broken, trajectory) == reason
    unfinished = Trajectory(
        positions=trajectory.positions,
        energies=trajectory.energies,
        forces=trajectory.forces,
        converged=False,
    )
    assert why_unusable(initial, relaxed, unfinished) == "not converged"


# --- formats ---


def test_records_have_oc20s_fields(root: Path) -> None:
    common = {
        "atomic_numbers": torch.float32,
        "pos": torch.float32,
        "cell": torch.float32,
        "natoms": int,
        "tags": torch.int64,
        "fixed": torch.float32,
        "sid": int,
        "force": torch.float32,
    }
    edges = {
        "edge_index": torch.int64,
        "cell_offsets": torch.float32,
        "distances": torch.float32,
    }
    relaxed = {"y_init": float, "y_relaxed": float, "pos_relaxed": torch.float32}
    frame = {"y": float, "fid": int}
    for split in SPLITS:
        frame_edges = edges if split == "train" else {}
        for records, fields in (
            (is2re(root, split), common | edges | relaxed),
            (s2ef(root, split), common | frame_edges | frame),
        ):
            for record in records:
                kinds = {
                    name: value.dtype if isinstance(value, torch.Tensor) else type(value)
                    for name, value in record.to_dict().items()
                }
                assert kinds == fields
                assert record.cell.shape == (1, 3, 3)
                for name in ("pos", "force"):
                    assert record[name].shape == (record.natoms, 3)


def test_fields_agree_with_the_sample(root: Path, oc20_sample: Path) -> None:
    """Names, dtypes and dimensions of the official layout; it has PyG 1's empty fields besides."""

    def kinds(fields: dict[str, Any]) -> dict[str, Any]:
        return {
            name: (value.dtype, value.dim()) if isinstance(value, torch.Tensor) else type(value)
            for name, value in fields.items()
            if value is not None
        }

    for path in ("is2re/all/train/data.lmdb", "s2ef/2M/train/data.0000.lmdb"):
        for split_path in (path, path.replace("2M/train", "all/val_id").replace("train", "val_id")):
            theirs = pickle.loads(read_values(oc20_sample / split_path)[0]).__dict__
            ours = read_records(root / split_path)[0].to_dict()
            assert kinds(ours) == kinds(theirs)


def test_tags_fixed_atoms_and_order(root: Path) -> None:
    for split, record, row in systems(root):
        assert row["split"] == split and int(row["natoms"]) == record.natoms
        assert set(record.tags.tolist()) == {0, 1, 2}
        assert torch.equal(record.fixed, (record.tags == 0).float())
        assert torch.equal(record.pos[record.tags == 0], record.pos_relaxed[record.tags == 0])
        heights = [record.pos_relaxed[record.tags == tag, 2].mean() for tag in (0, 1, 2)]
        assert heights == sorted(heights)
        symbols = atoms_of(record, record.pos).symbols[record.tags.numpy() == 2]
        assert str(symbols) == str(ase.Atoms(ADSORBATES[row["adsorbate"]][0]).symbols)
        metals = set(atoms_of(record, record.pos).symbols[record.tags.numpy() != 2])
        assert metals <= set(COMPOSITIONS[row["composition"]])


def test_edges_are_the_nearest_neighbours(root: Path) -> None:
    records = is2re(root, "val_id") + s2ef(root, "train")[:8]
    cut = 0
    for record in records:
        source, target = record.edge_index
        vectors = record.pos[source] - record.pos[target] + record.cell_offsets @ record.cell[0]
        assert torch.allclose(vectors.norm(dim=1), record.distances, atol=1e-4)
        centres, distances = neighbor_list("id", atoms_of(record, record.pos), 6.0)
        for atom in range(record.natoms):
            expected = np.sort(distances[centres == atom])
            cut += len(expected) > 50
            found = record.distances[target == atom].numpy()
            assert len(found) == min(len(expected), 50)
            assert found == pytest.approx(expected[:50], abs=1e-4)
        edges = torch.cat([record.edge_index, record.cell_offsets.long().T])
        assert edges.unique(dim=1).shape == edges.shape
    assert cut > 0


def test_metadata_ids_and_frames(root: Path) -> None:
    rows = table(root)
    for split in SPLITS:
        records, frames = is2re(root, split), s2ef(root, split)
        assert [record.sid for record in records] == [
            sid for sid, row in rows.items() if row["split"] == split
        ]
        with np.load(root / "is2re" / "all" / split / "metadata.npz") as metadata:
            assert metadata["natoms"].tolist() == [record.natoms for record in records]
            assert metadata["neighbors"].tolist() == [len(record.distances) for record in records]
        with np.load(s2ef_folder(root, split) / "metadata.npz") as metadata:
            assert metadata["natoms"].tolist() == [record.natoms for record in frames]
        ids = [(frame.sid, frame.fid) for frame in frames]
        assert ids == sorted(set(ids))
        counts = Counter(sid for sid, _ in ids)
        assert {sid: int(rows[sid]["num_frames"]) for sid in counts} == counts
        assert max(counts.values()) == SETTINGS.frames_per_system
    assert len(rows) == 24 + 4 * 8
    assert sorted(p.name for p in root.iterdir()) == [
        "is2re",
        "s2ef",
        "s2ef_raw",
        "summary.json",
        "systems.csv",
    ]
    assert [p for p in root.rglob("*") if p.name.startswith(".") or p.name.endswith("lock")] == []


def test_frames_lie_all_along_the_way() -> None:
    """Most steps of a relaxation hardly move an atom; evenly drawn steps would be nearly alike."""
    way = np.concatenate([np.linspace(0, 1, 11), 1 + 0.001 * np.arange(1, 100)])
    trajectory = Trajectory(
        positions=way[:, None, None] * np.ones((1, 5, 3)),
        energies=-way,
        forces=np.zeros((len(way), 5, 3)),
        converged=True,
    )
    picks = [
        demo_files.pick_frames(trajectory, 4, np.random.default_rng(seed)) for seed in range(50)
    ]
    assert all(pick == sorted(set(pick)) and len(pick) <= 4 for pick in picks)
    assert np.mean([step <= 10 for pick in picks for step in pick]) > 0.8
    assert len({tuple(pick) for pick in picks}) > 10
    assert 0 in {pick[0] for pick in picks}
    still = Trajectory(
        positions=np.zeros((1, 5, 3)),
        energies=np.zeros(1),
        forces=np.zeros((1, 5, 3)),
        converged=True,
    )
    assert demo_files.pick_frames(still, 4, np.random.default_rng(0)) == [0]


def test_shards_of_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_files, "FRAMES_PER_SHARD", 3)
    with demo_files.ShardedWriter(tmp_path) as writer:
        for i in range(7):
            writer.append(b"%d" % i)
    shards = sorted(tmp_path.iterdir())
    assert [shard.name for shard in shards] == [f"data.000{i}.lmdb" for i in range(3)]
    assert [read_values(shard) for shard in shards] == [
        [b"0", b"1", b"2"],
        [b"3", b"4", b"5"],
        [b"6"],
    ]
    with pytest.raises(KeyError), demo_files.ShardedWriter(tmp_path / "failed") as writer:
        writer.append(b"0")
        raise KeyError
    assert list((tmp_path / "failed").iterdir()) == []


def test_raw_frames_are_the_s2ef_frames(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in SPLITS:
        name = "s2ef_train_200K" if split == "train" else f"s2ef_{split}"
        folder = root / "s2ef_raw" / name / name
        assert sorted(path.name for path in folder.iterdir()) == ["0.extxyz.xz", "0.txt.xz"]
        frames = ase.io.read(folder / "0.extxyz.xz", ":", format="extxyz")
        ids = [line.split(",") for line in read_xz(folder / "0.txt.xz").splitlines()]
        records = s2ef(root, split)[:7]
        assert len(frames) == len(ids) == len(records) == 7
        for atoms, (sid, fid, reference), record in zip(frames, ids, records, strict=True):
            assert (sid, fid) == (f"random{record.sid}", f"frame{record.fid}")
            energy = atoms.get_potential_energy() - float(reference)
            assert energy == pytest.approx(record.y, abs=1e-6)
            forces = atoms.get_forces(apply_constraint=False)
            assert forces == pytest.approx(record.force.numpy(), abs=1e-5)
            assert atoms.positions == pytest.approx(record.pos.numpy(), abs=1e-5)
            assert atoms.get_tags().tolist() == record.tags.tolist()
            assert sorted(atoms.constraints[0].index) == record.fixed.nonzero()[:, 0].tolist()

    monkeypatch.setattr(demo_files, "RAW_FRAMES_PER_FILE", 2)
    demo_files.write_raw(tmp_path, [(f"frame {i}\n", f"line {i}\n") for i in range(3)])
    assert read_xz(tmp_path / "0.extxyz.xz") == "frame 0\nframe 1\n"
    assert read_xz(tmp_path / "1.txt.xz") == "line 2\n"


def read_xz(path: Path) -> str:
    with lzma.open(path, "rt") as file:
        return file.read()


def test_the_data_set_reads_it(root: Path) -> None:
    for split in SPLITS:
        source = root / "is2re" / "all" / split / "data.lmdb"
        config = {"src": str(source), "key_mapping": {"y_relaxed": "energy"}, "labels": ["energy"]}
        dataset = OC20LmdbDataset({**config, "edges": "stored", "cutoff": 6.0, "max_neighbors": 40})
        records = is2re(root, split)
        assert len(dataset) == len(records)
        assert dataset[1].energy.item() == pytest.approx(records[1].y_relaxed, abs=1e-6)


# --- honest splits ---


def test_adsorbates_and_compositions_of_the_splits(root: Path) -> None:
    assert set(OOD_ADSORBATES) < set(ADSORBATES) and set(OOD_COMPOSITIONS) < set(COMPOSITIONS)
    assert len(ADSORBATES) >= 12 and len(COMPOSITIONS) == 70
    assert not set(METALS) & set(OOD_COMPOSITIONS)
    for _, row in table(root).items():
        ood_both = row["split"] == "val_ood_both"
        assert (row["adsorbate"] in OOD_ADSORBATES) == (ood_both or row["split"] == "val_ood_ads")
        assert (row["composition"] in OOD_COMPOSITIONS) == (
            ood_both or row["split"] == "val_ood_cat"
        )


def slab_fingerprint(record: Data) -> tuple[Any, ...]:
    """Elements and distances of the clean slab: the same for turned or shifted copies."""
    atoms = atoms_of(record, record.pos)[record.tags.numpy() != 2]
    first, second, distances = neighbor_list("ijd", atoms, 4.0)
    pairs = Counter(
        (*sorted((atoms.numbers[i], atoms.numbers[j])), round(float(d), 2))
        for i, j, d in zip(first, second, distances, strict=True)
    )
    return tuple(sorted(pairs.items()))


def test_no_clean_slab_is_in_two_splits(root: Path) -> None:
    owners: dict[Any, set[str]] = defaultdict(set)
    count = 0
    for split, record, _ in systems(root):
        owners[slab_fingerprint(record)].add(split)
        count += 1
    assert all(len(splits) == 1 for splits in owners.values())
    assert len(owners) < count / 2  # it does recognise a slab: up to four systems share one


def test_slabs_of_many_units_do_not_meet() -> None:
    """Unstrained slabs of one composition and facet would be drawn for several splits."""
    for compositions, splits in (
        ([c for c in COMPOSITIONS if c not in OOD_COMPOSITIONS], SPLITS[:3]),
        (list(OOD_COMPOSITIONS), SPLITS[3:]),
    ):
        owned, free = defaultdict(set), defaultdict(set)
        for number, split in enumerate(splits):
            rng = np.random.default_rng(number)
            for _ in range(400):
                spec = draw_slab(rng, compositions, partial(demo._belongs_to, split=split))
                other = draw_slab(rng, compositions, lambda s: True)
                for chosen, found in ((spec, owned), (other, free)):
                    key = chosen if any(chosen.strain) else (chosen.composition, chosen.facet)
                    found[key].add(split)
        assert max(map(len, owned.values())) == 1
        assert max(map(len, free.values())) > 1
        assert any(len(key) == 2 for key in owned)  # unstrained slabs do occur


def test_no_system_twice(root: Path) -> None:
    fingerprints = []
    for _, record, row in systems(root):
        atoms = atoms_of(record, record.pos)
        distances = atoms.get_all_distances(mic=True)[record.tags.numpy() == 2]
        fingerprints.append((row["adsorbate"], *np.sort(distances, axis=None).round(2)[:40]))
    assert len(set(fingerprints)) == len(fingerprints)


def test_labels_vary_with_geometry(root: Path) -> None:
    """Some systems are turned, some strained, all facets are there."""
    rows = table(root).values()
    turned = [float(row["rotation"]) != 0 for row in rows]
    strained = [any(json.loads(row["strain"])) for row in rows]
    assert 0.2 < np.mean(turned) < 0.8 and 0.4 < np.mean(strained) < 1.0
    assert len({row["facet"] for row in rows}) == 4
    for _, record, row in systems(root):
        angle = float(row["rotation"])
        along = record.cell[0, 0] / record.cell[0, 0].norm()
        if not any(json.loads(row["strain"])):  # the first lattice vector lies along x otherwise
            assert along[:2].tolist() == pytest.approx([np.cos(angle), np.sin(angle)], abs=1e-4)


# --- same data always ---


def test_settings_are_checked() -> None:
    wrong = {"num_train": 0, "num_val": -1, "frames_per_system": 0, "raw_frames": -1, "seed": 0.5}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            DemoSettings(**{name: value})
    with pytest.raises(ValueError, match="num_workers"):
        make_demo_data("unused", DemoSettings(), num_workers=0)


def test_summary(root: Path) -> None:
    summary = json.loads((root / "summary.json").read_text())
    counts, energies = {}, {}
    for split in SPLITS:
        records = is2re(root, split)
        counts[split] = np.array(
            [np.bincount(r.atomic_numbers.int().numpy(), minlength=100) for r in records], float
        )
        energies[split] = np.array([record.y_relaxed for record in records])
    solution = np.linalg.lstsq(counts["train"], energies["train"])[0]
    for split, row in summary["splits"].items():
        assert row["num_systems"] == len(energies[split])
        assert row["num_frames"] == len(s2ef(root, split))
        assert row["mean"] == pytest.approx(energies[split].mean())
        assert row["stdev"] == pytest.approx(energies[split].std())
        mean_error = np.abs(energies[split] - energies["train"].mean()).mean()
        assert row["mean_predictor_mae"] == pytest.approx(mean_error)
        linear_error = np.abs(counts[split] @ solution - energies[split]).mean()
        assert row["linear_mae"] == pytest.approx(linear_error, abs=1e-3)


def test_finished_data_is_left_alone(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert make_demo_data(root, SETTINGS) == json.loads((root / "summary.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    with pytest.raises(FileExistsError, match="other settings"):
        make_demo_data(root, DemoSettings(num_train=25))


def test_a_folder_with_other_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "is2re").mkdir()
    with pytest.raises(FileExistsError, match="is2re"):
        make_demo_data(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["is2re"]


def test_discarded_systems_are_counted_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_system, calls = demo.make_system, itertools.count()

    def sometimes(*args: Any) -> Any:
        return "desorbed" if next(calls) % 3 == 0 else make_system(*args)

    monkeypatch.setattr(demo, "make_system", sometimes)
    summary = make_demo_data(tmp_path / "some", DemoSettings(num_train=6, num_val=1))
    splits = summary["splits"]
    assert [splits[split]["num_systems"] for split in SPLITS] == [6, 1, 1, 1, 1]
    assert sum(splits[split]["discarded"].get("desorbed", 0) for split in SPLITS) >= 5
    slabs = []
    monkeypatch.setattr(demo, "relaxed_slab", lambda spec: slabs.append(spec) or (None, 0.0))
    monkeypatch.setattr(demo, "make_system", lambda *args: "desorbed")
    with pytest.raises(RuntimeError, match="too many systems had to be discarded"):
        make_demo_data(tmp_path / "none", DemoSettings(num_train=1, num_val=1))
    assert len(set(slabs)) == len(slabs) > 5  # a slab on which nothing works is given up


def test_another_seed_gives_other_data(root: Path, tmp_path: Path) -> None:
    make_demo_data(tmp_path / "data", DemoSettings(num_train=4, num_val=1, seed=4))
    ours = {tuple(record.pos.flatten().tolist()) for record in is2re(root, "train")}
    others = {tuple(r.pos.flatten().tolist()) for r in is2re(tmp_path / "data", "train")}
    assert len(others) == 4 and not ours & others


@pytest.mark.parametrize(
    ("first_workers", "then_workers"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)]
)
def test_killed_and_resumed_equals_uninterrupted(
    root: Path, tmp_path: Path, first_workers: int, then_workers: int
) -> None:
    """With one process and two on either side; the uninterrupted data is made with one."""
    folder = tmp_path / "data"
    command = [sys.executable, str(SCRIPT), "--output", str(folder)]
    command += ["--num-workers", str(first_workers)]
    for name in ("num_train", "num_val", "frames_per_system", "raw_frames", "seed"):
        command += [f"--{name.replace('_', '-')}", str(getattr(SETTINGS, name))]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    work = folder / demo.WORK_NAME
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(work.glob("[!.]*.lmdb"))) < 2:
            time.sleep(0.01)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(workers) >= (first_workers if first_workers > 1 else 0)
    while any(is_running(int(worker)) for worker in workers):  # they end with their parent
        time.sleep(0.01)
    assert not (folder / "summary.json").exists() and not (folder / "is2re").exists()
    with pytest.raises(FileExistsError, match="beginning of demo data of other settings"):
        make_demo_data(folder, DemoSettings(num_train=25))

    done = {path.name: path.stat().st_mtime_ns for path in work.glob("[!.]*.lmdb")}
    assert 2 <= len(done) < 14
    seen: dict[str, int] = {}
    run_units = demo._run_units

    def watched(*args: Any) -> None:
        run_units(*args)
        seen.update({path.name: path.stat().st_mtime_ns for path in work.glob("[!.]*.lmdb")})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_run_units", watched)
        make_demo_data(folder, SETTINGS, num_workers=then_workers)
    assert len(seen) == 14 and done.items() <= seen.items()  # finished units were not made again
    assert not work.exists()
    first, second = everything(root), everything(folder)
    assert len(first) == 10
    assert same(first, second)
    for name in ("systems.csv", "summary.json"):
        assert (root / name).read_text() == (folder / name).read_text()
    for path in (root / "s2ef_raw").rglob("*.xz"):
        assert path.read_bytes() == (folder / path.relative_to(root)).read_bytes()


def is_running(process_id: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return False
