"""Files that ASE reads as data sets: the same samples whatever the format, against ASE; bad files are named."""

import bz2
import gzip
import lzma
import os
import pickle
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLength, FixCartesian

import small_data
from faenet_ocp.data import ase_files
from faenet_ocp.data.ase_files import AseDataset, find_files
from faenet_ocp.data.atoms import atoms_to_data, fixed_atoms, record_of
from faenet_ocp.data.check import check
from faenet_ocp.data.fields import exact_label
from faenet_ocp.data.loader import make_loader
from faenet_ocp.prepare.pack import pack

SETTINGS = {"labels": ["energy", "forces"], "cutoff": 5.0, "max_neighbors": 20, "tags": "fixed"}


def structures(count: int = 5) -> list[Atoms]:
    """Slabs and molecules with mixed periodicity, energies near -1e6 eV and forces, as results of a calculator."""
    found = []
    for number in range(count):
        atoms = small_data.make_slab(number) if number % 2 == 0 else molecule("CH3CH2OH")
        atoms.info = {}
        atoms.rattle(0.05, seed=number)
        if number % 2 == 0:
            atoms.pbc = (True, True, False)
            atoms.set_constraint(FixAtoms([0, 1]))
        atoms.set_tags(0)
        rng = np.random.default_rng(number)
        forces = rng.normal(size=(len(atoms), 3)).round(6)
        atoms.calc = SinglePointCalculator(atoms, energy=-1e6 - number - 0.123456789, forces=forces)
        found.append(atoms)
    return found


def write(path: Path, given: list[Atoms]) -> Path:
    """A file of the kind that its name says."""
    if path.suffix == ".aselmdb" or path.suffix == ".db":
        with ase.db.connect(path) as database:
            for atoms in given:
                database.write(atoms)
        return path
    if path.suffix in (".gz", ".xz", ".bz2"):
        plain = write(path.with_suffix(""), given)
        path.write_bytes({".gz": gzip, ".xz": lzma, ".bz2": bz2}[path.suffix].compress(plain.read_bytes()))
        plain.unlink()
        return path
    ase.io.write(path, given)
    return path


@pytest.mark.parametrize(
    "name", ["a.extxyz", "a.traj", "a.db", "a.json", "a.aselmdb", "a.xyz.xz", "a.traj.gz", "a.extxyz.bz2"]
)
def test_every_format_gives_what_ase_has(tmp_path: Path, name: str) -> None:
    given = structures()
    dataset = AseDataset({"src": str(write(tmp_path / name, given)), **SETTINGS})
    assert len(dataset) == len(given)
    again = pickle.loads(pickle.dumps(dataset))  # as for workers that are started afresh
    for index, atoms in enumerate(given):
        for sample in (dataset[index], again[0, index]):
            np.testing.assert_allclose(sample.pos, atoms.positions, atol=1e-5)
            assert sample.atomic_numbers.tolist() == atoms.numbers.tolist()
            assert sample.pbc[0].tolist() == atoms.pbc.tolist()
            assert sample.fixed.nonzero().flatten().tolist() == ([0, 1] if index % 2 == 0 else [])
            assert sample.tags.tolist() == [int(fixed == 0) for fixed in sample.fixed]
            assert float(exact_label(sample, "energy")) == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
            np.testing.assert_allclose(sample.forces, atoms.get_forces(apply_constraint=False), atol=1e-5)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in before if "lock" not in name] == [name]  # nothing is left in the data folder


def test_the_adsorbate_of_a_metal_gets_its_tag(tmp_path: Path) -> None:
    path = write(tmp_path / "a.traj", structures(3)[::2])
    dataset = AseDataset({"src": str(path), **SETTINGS, "adsorbate": "metal"})
    for sample in (dataset[0], dataset[1]):
        is_adsorbate = (sample.atomic_numbers < 20) & (sample.fixed == 0)
        assert torch.equal(sample.tags == 2, is_adsorbate) and is_adsorbate.any()
        assert torch.equal(sample.tags == 0, sample.fixed == 1)


def test_frames_of_a_sid_belong_together_also_in_several_files(tmp_path: Path) -> None:
    """Without a sid those of one file do. What could not be read is looked at again: other tags may do."""
    given = structures(8)
    for atoms, sid in zip(given, ("a", "b", None, None, "b", "a", None, "c"), strict=True):
        atoms.info |= {} if sid is None else {"sid": sid}
        del atoms.arrays["tags"]
    for number in (0, 1):
        write(tmp_path / f"{number}.extxyz", given[4 * number : 4 * number + 4])
    settings = SETTINGS | {"src": str(tmp_path), "labels": [], "cache_dir": str(tmp_path / "cache")}
    assert len(set(AseDataset(settings | {"tags": "file"}).groups().tolist())) == 8  # none has tags
    for _ in range(2):  # at last from the cache
        assert AseDataset(settings).groups().tolist() == [0, 1, 2, 2, 1, 0, 3, 4]


def test_few_files_are_open_at_once(tmp_path: Path) -> None:
    """And each frame is that of its file, also where a file has been written anew."""
    for number in range(80):
        write(tmp_path / f"{number}.traj", structures(1))
    energies = []
    for place in (0, 2):
        ase.io.write(tmp_path / "79.traj", structures(3)[place])
        dataset = AseDataset(SETTINGS | {"src": str(tmp_path)})
        energies.append([float(exact_label(dataset[index], "energy")) for index in (79, *range(80))])
        opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        assert len([name for name in opened if name.endswith(".traj")]) <= 64
    assert energies[0][0] == energies[0][80] and energies[0][0] - energies[1][0] == pytest.approx(2.0, abs=1e-6)
    assert energies[0][1:80] == energies[1][1:80]


def test_charge_and_spin_of_a_structure() -> None:
    atoms = molecule("OH")
    atoms.info = {"charge": -1, "spin": 2}
    assert record_of(atoms)["charge"] == -1
    sample = atoms_to_data(atoms, cutoff=5.0, max_neighbors=None, tags="none")
    assert (sample.charge.tolist(), sample.spin.tolist()) == ([-1], [2])
    atoms.info["spin"] = 1.5
    with pytest.raises(ValueError, match="spin that are no whole numbers"):
        atoms_to_data(atoms, cutoff=5.0, max_neighbors=None, tags="none")


def test_folders_globs_and_lists_in_natural_order(tmp_path: Path) -> None:
    given = structures(5)[::2]
    for number, atoms in zip((2, 10, 1), given, strict=True):
        ase.io.write(tmp_path / f"POSCAR_{number}.vasp", atoms, format="vasp")
    names = ["POSCAR_1.vasp", "POSCAR_2.vasp", "POSCAR_10.vasp"]
    for source in (tmp_path, str(tmp_path / "*.vasp"), [tmp_path / name for name in names]):
        assert [path.name for path in find_files(source)] == names
    dataset = AseDataset({"src": str(tmp_path), **SETTINGS, "labels": []})
    heights = [float(dataset[index].pos[:, 2].max()) for index in range(3)]
    assert heights == pytest.approx([given[place].positions[:, 2].max() for place in (2, 0, 1)], abs=1e-4)
    assert dataset.groups().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="twice"):
        find_files([tmp_path, tmp_path / ".." / tmp_path.name / names[0]])
    with pytest.raises(FileNotFoundError, match="no file, folder or match"):
        find_files(tmp_path / "none*")


def test_labels_of_other_names_and_declared_ones(tmp_path: Path) -> None:
    given = structures(2)
    for atoms in given:
        atoms.info |= {"REF_energy": atoms.calc.results["energy"] + 3, "gap": 0.5, "note": "text", "sid": "007"}
        atoms.arrays["REF_forces"] = 2 * atoms.calc.results["forces"]
    mapping = {"REF_energy": "energy", "REF_forces": "forces"}
    settings = SETTINGS | {"key_mapping": mapping, "labels": ["energy", "forces", "gap"]}
    sample = AseDataset({"src": str(write(tmp_path / "a.extxyz", given)), **settings})[0]
    assert float(exact_label(sample, "energy")) == pytest.approx(given[0].get_potential_energy() + 3, abs=1e-7)
    np.testing.assert_allclose(sample.forces, 2 * given[0].get_forces(apply_constraint=False), atol=1e-5)
    assert float(sample.gap) == 0.5 and sample.sid == ["007"]


def test_other_constraints_leave_atoms_free_and_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = structures(3)
    for atoms in given:
        atoms.set_constraint(FixBondLength(0, 1))
    ase_files.record_of.__globals__["_warn_of"].cache_clear()
    dataset = AseDataset({"src": str(write(tmp_path / "a.traj", given)), **SETTINGS})
    assert not any(dataset[index].fixed.any() for index in range(3))
    assert caplog.text.count("FixBondLength") == 1
    atoms = given[0]
    atoms.set_constraint(FixCartesian([0, 1], mask=[True, True, False]))
    assert not fixed_atoms(atoms).any()
    assert "FixCartesian or FixScaled of some directions count as free" in caplog.text
    atoms.set_constraint([*atoms.constraints, FixCartesian([1], mask=[False, False, True])])
    assert fixed_atoms(atoms).nonzero()[0].tolist() == [1]


def _broken(kind: str, given: list[Atoms]) -> list[Atoms]:
    atoms = given[3]
    if kind == "no labels":
        atoms.calc = None
    elif kind == "nan":
        atoms.calc.results["forces"][2, 1] = np.nan
    elif kind == "element":
        atoms.numbers[0] = 0
    elif kind == "shape":
        atoms.calc.results["forces"] = np.zeros((len(atoms), 2))
    elif kind == "layers":
        atoms.set_tags([5] * len(atoms))
    return given


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no labels", r"a\.traj: structure 3 .*has no label 'energy'"),
        ("nan", r"a\.traj: structure 3 .*has values in forces that are not finite"),
        ("element", r"a\.traj: structure 3 .*has values in atomic_numbers outside 1 to 118"),
        ("shape", r"a\.traj: structure 3 .*has forces of shape \(9, 2\), not"),
        ("layers", r"a\.traj: structure 3 .*has tags that are not OC20's .* but 5; tags: file"),
    ],
)
def test_a_bad_structure_is_named_with_file_number_and_reason(tmp_path: Path, kind: str, message: str) -> None:
    given = structures()
    for atoms in given:
        atoms.set_tags(1)
    source = write(tmp_path / "a.traj", _broken(kind, given))
    dataset = AseDataset({"src": str(source), **SETTINGS, "tags": "file"})
    with pytest.raises(ValueError, match=message):
        dataset[3]
    (problem,) = check({"train": dataset}, 1, progress=False)["train"]
    assert problem.index == 3 and problem.file == str(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.extxyz", b"", "a.extxyz: "),
        ("a.extxyz", b"2\nProperties=species:S:1:pos:R:3\nH 0 0 0\n", "cut short: structure 0 has 1 of 2 atoms"),
        ("a.extxyz", b"two\n\nH 0 0 0\n", "structure 0 does not begin with its number of atoms, but 'two'"),
        ("a.traj", b"no trajectory", "a.traj: ASE cannot read it"),
        ("a.db", b"no database", "a.db: ASE cannot read it"),
        ("note.txt", b"no structure", "note.txt: ASE cannot read it"),
        ("a.extxyz.gz", b"not compressed", "a.extxyz.gz: ASE cannot read it"),
    ],
)
def test_a_bad_file_is_named_when_it_is_opened(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        AseDataset({"src": str(tmp_path / name), **SETTINGS})


def test_a_structure_of_extxyz_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.extxyz", structures())
    lines = path.read_text().splitlines(keepends=True)
    second = int(lines[0]) + 2
    lines[second + 4] = "C 0.0 x\n"
    path.write_text("".join(lines))
    dataset = AseDataset({"src": str(path), **SETTINGS})
    assert len(dataset) == 5 and len(dataset[0].pos)
    with pytest.raises(ValueError, match=r"a\.extxyz: structure 1: ASE cannot read it \("):
        dataset[1]


def test_the_index_is_kept_beside_the_run_and_belongs_to_one_content(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "data").mkdir()
    path, cache = write(tmp_path / "data" / "a.extxyz", structures()), tmp_path / "cache"
    settings = {"src": str(path), **SETTINGS, "cache_dir": str(cache)}
    assert len(AseDataset(settings)) == 5
    assert [file.name[:6] for file in cache.iterdir()] == ["index-"]
    ase_files._index.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(ase_files, "_starts", None)  # not needed a second time
        assert len(AseDataset(settings)) == 5
    write(path, structures(3))
    assert len(AseDataset(settings)) == 3
    assert [file.name for file in path.parent.iterdir()] == ["a.extxyz"]


def test_workers_read_what_one_process_reads(tmp_path: Path) -> None:
    for name in ("a.db", "a.traj", "a.extxyz.xz"):
        dataset = AseDataset({"src": str(write(tmp_path / name, structures())), **SETTINGS})
        loader = make_loader(dataset, [[(0, 0), (0, 3)], [(0, 1)], [(0, 4), (0, 2)]], num_workers=2)
        for (batch,), indices in zip(loader, ([0, 3], [1], [4, 2]), strict=True):
            assert torch.equal(batch.pos, torch.cat([dataset[index].pos for index in indices]))


def test_packed_samples_are_those_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    given = structures()
    write(tmp_path / "in" / "a.extxyz", given[:3])
    write(tmp_path / "in" / "b.traj", given[3:])
    assert pack(tmp_path / "in", tmp_path / "out", num_workers=2, source_format="ase", tags="none") == 5
    from faenet_ocp.data.packed import OC20PackedDataset

    plain = SETTINGS | {"tags": "none"}
    ours = AseDataset({"src": str(tmp_path / "in"), **plain})
    packed = OC20PackedDataset(
        {"src": str(tmp_path / "out"), **{key: value for key, value in plain.items() if key != "tags"}}
    )
    assert len(packed) == 5
    for index in range(5):
        for name in ("pos", "atomic_numbers", "energy", "energy_remainder", "forces", "fixed", "edge_index", "pbc"):
            assert torch.equal(ours[index][name], packed[index][name]), name
