"""The demo data: physics against ASE's own EMT, OC20's formats, honest splits."""

import ast
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase
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

from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.prepare.demo import generate, systems
from faenet_ocp.prepare.demo.emt import PairEMT
from faenet_ocp.prepare.demo.generate import OOD_ADSORBATES, OOD_COMPOSITIONS, SPLITS, make_demo_data
from faenet_ocp.prepare.demo.systems import ADSORBATES, COMPOSITIONS, FACETS, METALS, SlabSpec
from prepare.demo_reading import SETTINGS, is2re, s2ef, s2ef_folder, table
from small_data import read_records, stored_edges

CU = SlabSpec("Cu", "111", 3, (2, 1), 0, (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small demo data made in this process, with several shards a split."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_SLABS_PER_SHARD", 4)
        make_demo_data(folder, SETTINGS)
    return folder


def atoms_of(record: Data, pos: torch.Tensor) -> ase.Atoms:
    cell, tags = record.cell[0].double().numpy(), record.tags.tolist()
    return ase.Atoms(record.atomic_numbers.int(), pos.double().numpy(), cell=cell, pbc=True, tags=tags)


def ase_energy_and_forces(atoms: ase.Atoms, adsorbate: str) -> tuple[float, np.ndarray]:
    """EMT and springs on the adsorbate's bonds from 1.1 times their length, both ASE's own."""
    free = ase.Atoms(*ADSORBATES[adsorbate])
    radii, first = covalent_radii[free.numbers], len(atoms) - len(free)
    pairs = [(a, b, free.get_distance(a, b)) for a, b in itertools.combinations(range(len(free)), 2)]
    bonds = [(a, b, length) for a, b, length in pairs if length < 1.25 * (radii[a] + radii[b])]
    atoms = atoms.copy()
    atoms.calc = EMT()
    atoms.set_constraint([Hookean(first + a, first + b, 15.0, 1.1 * length) for a, b, length in bonds])
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
    return {"H": energies["H2"] / 2, "N": energies["N2"] / 2, "O": oxygen, "C": energies["CO"] - oxygen}


def all_systems(root: Path) -> Iterator[tuple[str, Data, dict[str, str]]]:
    rows = table(root)
    for split in SPLITS:
        for record in is2re(root, split):
            yield split, record, rows[record.sid]


# Physics


def test_energies_and_forces_are_those_of_ase(root: Path, gas: dict[str, float]) -> None:
    """y_init, y_relaxed, force and the references, recomputed from the stored float32 positions."""
    for _, record, row in all_systems(root):
        initial, relaxed = atoms_of(record, record.pos), atoms_of(record, record.pos_relaxed)
        # The adsorbate was placed on the relaxed clean slab: without it, that slab is left.
        slab = initial[[atom.index for atom in initial if atom.tag != 2]]
        slab.calc = EMT()
        reference = slab.get_potential_energy()
        reference += sum(gas[atom.symbol] for atom in initial if atom.tag == 2)
        assert reference == pytest.approx(float(row["reference"]), abs=5e-4)
        assert np.linalg.norm(slab.get_forces()[slab.get_tags() == 1], axis=1).max() < 0.041

        energy, forces = ase_energy_and_forces(relaxed, row["adsorbate"])
        assert record.y_relaxed == pytest.approx(energy - float(row["reference"]), abs=1e-4)
        assert np.linalg.norm(forces[record.tags != 0], axis=1).max() < 0.041
        energy, forces = ase_energy_and_forces(initial, row["adsorbate"])
        assert record.y_init == pytest.approx(energy - float(row["reference"]), abs=1e-4)
        assert record.force.numpy() == pytest.approx(forces, abs=1e-3)
        assert record.y_relaxed < record.y_init


def test_frames_are_rattled_steps_with_labels_of_ase(root: Path) -> None:
    rows = table(root)
    initial = {record.sid: record for split in SPLITS for record in is2re(root, split)}
    moves = []
    for record in s2ef(root, "val_ood_ads") + s2ef(root, "train")[:20]:
        row = rows[record.sid]
        energy, forces = ase_energy_and_forces(atoms_of(record, record.pos), row["adsorbate"])
        assert record.y == pytest.approx(energy - float(row["reference"]), abs=1e-4)
        assert record.force.numpy() == pytest.approx(forces, abs=1e-3)
        start, free = initial[record.sid], record.fixed == 0
        assert torch.equal(record.pos[~free], start.pos[~free])
        moves.append(record.pos[free] - start.pos[free])
        assert record.force[free].norm(dim=1).mean() > 0.1  # also where the relaxation is at its end
    # At least the rattling, and a relaxation on top.
    assert 0.05 < torch.cat(moves).abs().quantile(0.68) < 1.0


def test_pair_emt_is_ases_emt() -> None:
    """On what it is used for and beyond: after moves, changed cells, elements and periodicity."""
    rng = np.random.default_rng(0)
    slab = systems.build_slab(SlabSpec("Cu3Pt", "211", 9, (1, 1), 0, (0.0, 0.0, 0.0)))
    atoms = systems.place(slab, "CHOH", rng)
    atoms.set_constraint()

    def compare(atoms: ase.Atoms) -> None:
        reference = atoms.copy()
        reference.calc = EMT()
        atoms.calc = atoms.calc or PairEMT()
        assert atoms.get_potential_energy() == pytest.approx(reference.get_potential_energy(), abs=1e-9)
        assert atoms.get_forces() == pytest.approx(reference.get_forces(), abs=1e-9)

    compare(atoms)
    atoms.positions += rng.normal(scale=0.3, size=atoms.positions.shape)
    compare(atoms)
    atoms.set_cell(atoms.cell.array @ [[1.02, 0, 0], [0.01, 0.97, 0], [0, 0, 1]])
    compare(atoms)
    atoms.pbc = (True, False, False)
    compare(atoms)
    atoms.numbers[:5] = 47
    compare(atoms)
    crystal = systems.bulk("AlNi").copy()  # every atom has images of itself for neighbours
    assert abs(EMT().get_stress(crystal)[:3].mean()) < 1e-3  # and the lattice is at its minimum
    crystal.rattle(0.05, seed=1)
    compare(crystal)
    compare(ase.Atoms("CuO", positions=[(0, 0, 0), (0, 0, 30)]))  # no neighbours at all


def test_springs_hold_what_emt_alone_would_break() -> None:
    slab, _ = systems.relaxed_slab(CU)
    usable: dict[str, int] = defaultdict(int)
    for name, seed in itertools.product(("OH", "CH2", "NH2"), range(3)):
        initial = systems.place(slab, name, np.random.default_rng(seed))
        for kind, springs in (("springs", systems.bond_springs(name, len(slab))), ("none", ())):
            relaxed = initial.copy()
            converged = systems.relax(relaxed, springs) is not None
            usable[kind] += converged and systems.is_usable(initial, relaxed)
    assert usable["springs"] == 9 and usable["none"] <= 3


def test_unusable_systems_are_recognised() -> None:
    slab, _ = systems.relaxed_slab(CU)
    initial = systems.place(slab, "OH", np.random.default_rng(0))
    relaxed = initial.copy()
    systems.relax(relaxed, systems.bond_springs("OH", len(slab)))
    assert systems.is_usable(initial, relaxed)
    surface, oxygen, hydrogen = int(np.flatnonzero(relaxed.get_tags() == 1)[0]), len(slab), len(slab) + 1
    for moved, by in (
        ([oxygen, hydrogen], (0, 0, 4)),  # desorbed
        ([hydrogen], (0, 0, 1)),  # bond broken
        ([oxygen, hydrogen], (0, 0, -3)),  # below the surface
        ([surface], (1.2, 0, 0)),  # slab reconstructed
    ):
        broken = relaxed.copy()
        broken.positions[moved] += by
        assert not systems.is_usable(initial, broken)


def test_slabs() -> None:
    """Planes, tags, fixed atoms, stoichiometry, bond lengths and strain of every kind of slab."""
    for composition, (facet, options) in itertools.product(("Pd", "Cu3Au", "AlCu"), FACETS.items()):
        for layers, repeat in itertools.product(options.layers, options.repeats):
            spec = SlabSpec(composition, facet, layers, repeat, 1, (0.0, 0.0, 0.0))
            slab = systems.build_slab(spec)
            heights = np.unique(slab.positions[:, 2].round(3))
            assert len(heights) == layers
            assert slab.pbc.all() and 15 < len(slab) < 70
            top = slab.positions[:, 2] > heights[-options.surface_layers] - 1e-2
            assert np.array_equal(slab.get_tags(), top.astype(int))
            assert np.array_equal(np.sort(slab.constraints[0].index), np.flatnonzero(~top))
            nearest = systems.bulk(composition).cell[0, 0] / np.sqrt(2)
            assert neighbor_list("d", slab, nearest + 0.1) == pytest.approx(nearest, abs=1e-3)
            strained = systems.build_slab(spec._replace(strain=(0.04, -0.03, 0.01)))
            strain = np.linalg.solve(slab.cell.array[:2, :2], strained.cell.array[:2, :2])
            assert strain == pytest.approx(np.array([[1.04, 0.01], [0.01, 0.97]]))
            if layers % 4 == 0:  # whole periods of every ordered alloy
                symbols = COMPOSITIONS[composition]
                assert {s: 4 * list(slab.symbols).count(s) / len(slab) for s in symbols} == {
                    s: symbols.count(s) for s in symbols
                }


def test_an_unstable_slab_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    specs: list[SlabSpec] = []
    monkeypatch.setattr(systems, "relaxed_slab", lambda spec: specs.append(spec) or (None if len(specs) == 1 else ()))
    monkeypatch.setattr(systems, "make_system", lambda spec, *_: spec if len(specs) == 4 else None)
    assert next(generate._draw_systems("train", np.random.default_rng(0))) == specs[3]
    assert len(set(specs)) == 4


# Formats


def kinds(record: Data) -> dict[str, Any]:
    return {
        name: (value.dtype, value.dim()) if isinstance(value, torch.Tensor) else type(value)
        for name, value in record.__dict__.get("_store", record.__dict__).items()
        if value is not None
    }


def test_fields_are_those_of_oc20(root: Path, oc20_sample: Path) -> None:
    """Names, dtypes and dimensions of the official layout; it has PyG 1's empty fields besides."""
    for split in SPLITS:
        s2ef_file = "s2ef/2M/train/data.0000.lmdb" if split == "train" else "s2ef/all/val_id/data.0000.lmdb"
        for path, ours in ((f"is2re/all/{split}/data.lmdb", is2re), (s2ef_file, s2ef)):
            expected = kinds(read_records(oc20_sample / path)[0])
            for record in ours(root, split):
                assert kinds(record) == expected
                assert record.cell.shape == (1, 3, 3)
                assert record.pos.shape == record.force.shape == (record.natoms, 3)


def test_tags_fixed_atoms_and_order(root: Path) -> None:
    for split, record, row in all_systems(root):
        assert row["split"] == split and int(row["natoms"]) == record.natoms
        assert torch.equal(record.fixed, (record.tags == 0).float())
        assert torch.equal(record.pos[record.tags == 0], record.pos_relaxed[record.tags == 0])
        heights = [record.pos_relaxed[record.tags == tag, 2].mean() for tag in (0, 1, 2)]
        assert heights == sorted(heights)
        symbols = np.array(list(atoms_of(record, record.pos).symbols))
        adsorbate = record.tags.numpy() == 2
        assert "".join(symbols[adsorbate]) == ADSORBATES[row["adsorbate"]][0]
        assert set(symbols[~adsorbate]) <= set(COMPOSITIONS[row["composition"]])


def test_edges_are_the_nearest_neighbours(root: Path) -> None:
    """As many as OC20 stores, ordered by centre and distance; of equal distances any."""
    most = 0
    for record in is2re(root, "val_id") + s2ef(root, "train")[:8]:
        source, target = record.edge_index
        vectors = record.pos[source] - record.pos[target] + record.cell_offsets @ record.cell[0]
        assert torch.allclose(vectors.norm(dim=1), record.distances, atol=1e-4)
        (_, centres), _, distances = stored_edges(atoms_of(record, record.pos))
        assert np.array_equal(target, centres)
        most = max(most, int(target.bincount().max()))
        assert record.distances.numpy() == pytest.approx(distances, abs=1e-4)
        edges = torch.cat([record.edge_index, record.cell_offsets.long().T])
        assert edges.unique(dim=1).shape == edges.shape
    assert most == 50


def test_metadata_ids_frames_and_our_data_set(root: Path) -> None:
    rows, sizes = table(root), {}
    for split in SPLITS:
        records, frames = is2re(root, split), s2ef(root, split)
        sizes[split] = {"num_systems": len(records), "num_frames": len(frames)}
        assert [record.sid for record in records] == [sid for sid, row in rows.items() if row["split"] == split]
        with np.load(root / "is2re" / "all" / split / "metadata.npz") as metadata:
            assert metadata["natoms"].tolist() == [record.natoms for record in records]
            assert metadata["neighbors"].tolist() == [len(record.distances) for record in records]
        with np.load(s2ef_folder(root, split) / "metadata.npz") as metadata:
            assert metadata["natoms"].tolist() == [record.natoms for record in frames]
        ids = [(frame.sid, frame.fid) for frame in frames]
        assert ids == sorted(set(ids))
        counts = [sum(sid == record.sid for sid, _ in ids) for record in records]
        assert counts == [int(rows[record.sid]["num_frames"]) for record in records]
        assert max(counts) == SETTINGS.frames_per_system
        config = {"key_mapping": {"y_relaxed": "energy"}, "labels": ["energy"], "edges": "stored", "cutoff": 6.0}
        source = str(root / "is2re" / "all" / split / "data.lmdb")
        dataset = OC20LmdbDataset({"src": source, "max_neighbors": 40, **config})
        assert dataset[1].energy.item() == pytest.approx(records[1].y_relaxed, abs=1e-6)
    assert json.loads((root / "summary.json").read_text())["splits"] == sizes
    assert len(rows) == 24 + 4 * 8
    assert len(list(s2ef_folder(root, "train").glob("*.lmdb"))) == 2
    assert sorted(path.name for path in root.iterdir()) == ["is2re", "s2ef", "summary.json", "systems.csv"]
    assert [p for p in root.rglob("*") if p.name.startswith(".") or p.name.endswith("lock")] == []


# Honest splits


def test_adsorbates_and_compositions_of_the_splits(root: Path) -> None:
    assert set(OOD_ADSORBATES) < set(ADSORBATES) and set(OOD_COMPOSITIONS) < set(COMPOSITIONS)
    assert len(COMPOSITIONS) == 70 and not set(METALS) & set(OOD_COMPOSITIONS)
    rows = table(root).values()
    for row in rows:
        ood_both = row["split"] == "val_ood_both"
        assert (row["adsorbate"] in OOD_ADSORBATES) == (ood_both or row["split"] == "val_ood_ads")
        assert (row["composition"] in OOD_COMPOSITIONS) == (ood_both or row["split"] == "val_ood_cat")
    turned = [float(row["rotation"]) != 0 for row in rows]
    strained = [any(ast.literal_eval(row["strain"])) for row in rows]
    assert 0.2 < np.mean(turned) < 0.8 and 0.4 < np.mean(strained) < 1.0
    assert len({row["facet"] for row in rows}) == 4


def fingerprint(atoms: ase.Atoms) -> tuple[Any, ...]:
    """Elements and distances: the same for turned or shifted copies."""
    first, second, distances = neighbor_list("ijd", atoms, 4.0)
    numbers = np.sort([atoms.numbers[first], atoms.numbers[second]], axis=0)
    return tuple(sorted(zip(*numbers.tolist(), distances.round(2).tolist(), strict=True)))


def test_no_clean_slab_is_in_two_splits_and_no_system_twice(root: Path) -> None:
    owners, found = defaultdict(set), []
    for split, record, _ in all_systems(root):
        atoms = atoms_of(record, record.pos)
        owners[fingerprint(atoms[record.tags.numpy() != 2])].add(split)
        found.append(fingerprint(atoms))
    assert all(len(splits) == 1 for splits in owners.values())
    assert len(owners) < len(found) / 2  # it does recognise a slab: up to four systems share one
    assert len(set(found)) == len(found)


def test_unstrained_slabs_belong_to_one_split() -> None:
    for name, facet in itertools.product(COMPOSITIONS, FACETS):
        spec = SlabSpec(name, facet, 3, (1, 1), 0, (0.0, 0.0, 0.0))
        splits = SPLITS[3:] if name in OOD_COMPOSITIONS else SPLITS[:3]
        assert sum(generate._belongs_to(spec, split) for split in splits) == 1
        assert all(generate._belongs_to(spec._replace(strain=(0.01, 0.0, 0.0)), split) for split in splits)
