"""Structures to relax: LMDBs and any files of ASE, with their own ids; what cannot be read is said."""

from pathlib import Path

import ase.io
import numpy as np
import pytest

import small_data
import small_runs
from faenet_ocp.data.atoms import fixed_atoms
from faenet_ocp.inference.structures import open_structures

slab = small_runs.slab


def test_structures_of_an_lmdb(small_is2re: Path, small_s2ef: Path) -> None:
    structures = open_structures(small_is2re / "is2re" / "all" / "val_id")
    assert len(structures) == 4
    for index, atoms in enumerate(structures):
        expected = small_data.make_fields(index, seed=1)
        np.testing.assert_array_equal(atoms.positions, expected["pos"].double().numpy())
        np.testing.assert_array_equal(atoms.arrays["pos_relaxed"], expected["pos_relaxed"].double().numpy())
        np.testing.assert_array_equal(atoms.constraints[0].index, np.flatnonzero(expected["fixed"]))
        assert atoms.info == {"sid": str(expected["sid"]), "y_relaxed": pytest.approx(expected["y_relaxed"])}
        assert atoms.pbc.all()
    (frame,) = open_structures(small_s2ef / "s2ef" / "all" / "val_id" / "data.0000.lmdb")[:1]
    assert set(frame.info) == {"sid"}
    assert not frame.has("pos_relaxed")
    with pytest.raises(FileNotFoundError):
        open_structures(small_is2re / "nothing.xyz")
    with pytest.raises(ValueError, match="ASE cannot read it"):
        open_structures(Path(__file__))


def test_structures_of_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "all [1]"
    folder.mkdir()
    for number in (10, 2):
        ase.io.write(folder / f"{number}.vasp", slab(number), format="vasp")
    (folder / ".hidden").write_text("no structure")
    (folder / "note.txt").write_text("no structure")
    structures = open_structures(folder)
    assert len(structures) == 3
    assert [structures[i].info["sid"] for i in (0, 1)] == ["2.vasp", "10.vasp"]
    np.testing.assert_allclose(sorted(structures[1].positions[:, 2]), sorted(slab(10).positions[:, 2]), atol=1e-9)
    assert fixed_atoms(structures[1]).sum() == 8
    with pytest.raises(ValueError, match=r"note\.txt: ASE cannot read it"):
        structures[2]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(folder))
    for source in ("~/all*/*.vasp", "$DATA/*.vasp", [folder / "2.vasp", str(folder / "10.vasp")]):
        assert [atoms.info["sid"] for atoms in open_structures(source)] == ["2.vasp", "10.vasp"]
    with pytest.raises(FileNotFoundError, match=r"there is no file, folder or match of .*\*\.cif"):
        open_structures("$DATA/*.cif")
    for number in (2, 10):
        (folder / f"{number}.vasp").unlink()
    with pytest.raises(ValueError, match=r"note\.txt: ASE cannot read it"):
        open_structures(folder)
    (folder / "note.txt").unlink()
    with pytest.raises(ValueError, match="no files to read structures from"):
        open_structures(folder)


def test_sids_of_a_file_are_text_as_it_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "some.xyz"
    sids = {
        "sid=0012": "0012",
        'sid="1e5"': "1e5",
        "sid=T uid=3": "T",
        'sid=""': "",
        "sid=": "",
        'sid="_JSON \\"7\\""': "7",
        "sid=a": "a",
        'comment="x sid=4"': "7",
    }
    path.write_text("".join(f"1\n{sid} Properties=species:S:1:pos:R:3\nH 0 0 0\n" for sid in sids))
    assert [atoms.info["sid"] for atoms in open_structures(path)] == list(sids.values())


@pytest.mark.parametrize("name, text", [("a.xyz", ""), ("a.cif", "data_x\n"), ("a.json", "{}")])
def test_a_file_without_structures_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: ASE (finds no structure in|cannot read) it"):
        open_structures(tmp_path / name)


def test_structures_before_a_broken_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "some.xyz"
    path.write_text("1\nsid=a\nH 0 0 0\n1\nsid=b\nH 0 zero 0\n")
    structures = open_structures(path)
    assert structures[0].info["sid"] == "a"
    with pytest.raises(ValueError, match="cannot read structure 1 and what follows"):
        structures[1]


def test_relaxed_positions_of_another_shape_are_an_error(tmp_path: Path) -> None:
    fields = small_data.make_fields(0) | {"pos_relaxed": small_data.make_fields(0)["pos"][:-1]}
    path = small_data.write_lmdb(tmp_path / "data.lmdb", [small_data.dump_record(fields)])
    with pytest.raises(ValueError, match=r"data\.lmdb: record 0 .*pos_relaxed"):
        open_structures(path)[0]
