"""The demo data: physics against ASE's own EMT, OC20's formats, honest splits, same data always."""

import itertools
import json
import lzma
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ase.io
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

from demo_reading import SETTINGS, is2re, read_records, read_values, s2ef, s2ef_folder, table
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.prepare.demo import files as demo_files
from faenet_ocp.prepare.demo import generate as demo
from faenet_ocp.prepare.demo.generate import (
    OOD_ADSORBATES,
    OOD_COMPOSITIONS,
    SPLITS,
    make_demo_data,
)
from faenet_ocp.prepare.demo.systems import (
    ADSORBATES,
    COMPOSITIONS,
    METALS,
    draw_slab,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small demo data made in this process."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data(folder, SETTINGS)
    return folder


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
    atoms.set_constraint([Hookean(first + a, first + b, 15.0, start) for a, b, start in spring_bonds(adsorbate)])
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
        assert record.force[free].norm(dim=1).mean() > 0.1  # rattled: also where the relaxation is at its end
    # At least the rattling, and a relaxation on top.
    assert 0.05 < torch.cat(moves).abs().quantile(0.68) < 1.0


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
        assert [record.sid for record in records] == [sid for sid, row in rows.items() if row["split"] == split]
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


def test_raw_frames_are_the_s2ef_frames(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert (row["composition"] in OOD_COMPOSITIONS) == (ood_both or row["split"] == "val_ood_cat")


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
