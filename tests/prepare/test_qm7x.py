"""QM7-X's files to packed ones: every structure once and exactly, in its split; whatever is wrong is named."""

import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest

from faenet_ocp.data.lmdb_files import resolve_files
from faenet_ocp.data.packed import PackedFile, decode_packed
from faenet_ocp.prepare import qm7x
from faenet_ocp.prepare.qm7x import SPLITS, UNKNOWN, prepare, split_of
from qm7x_files import read_store, write_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_files(tmp_path / "hdf5")


def contents(folder: Path) -> dict[str, list[bytes]]:
    """The records of each split, in order."""
    found = {}
    for split in SPLITS:
        files = [PackedFile(path) for path in resolve_files(folder / split)] if (folder / split).exists() else []
        found[split] = [file.read(position) for file in files for position in range(len(file))]
    return found


def test_every_structure_once_in_its_split_with_its_labels(source: Path, tmp_path: Path) -> None:
    counts = prepare(source, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert counts == {split: len(records) for split, records in found.items()}
    assert sum(counts.values()) == len(read_store())
    assert counts["val_unknown"] > 0
    by_id = {}
    for split, records in found.items():
        natoms = []
        for record in map(decode_packed, records):
            assert (str(record["sid"]) in UNKNOWN) == (split == "val_unknown")
            by_id[record["sid"], record["fid"]] = record
            natoms.append(len(record["pos"]))
        if natoms:
            with np.load(tmp_path / "out" / split / "metadata.npz") as metadata:
                assert metadata["natoms"].tolist() == natoms
    for (idmol, idconf), (numbers, pos, energy, forces) in read_store().items():
        end = 0 if idconf.endswith("opt") else int(idconf.rpartition("-d")[2])
        record = by_id.pop((int(idmol), (int(idmol) * 10**6 + 1001) * 1000 + end))
        assert record["energy"] == energy[0]  # all digits of float64
        np.testing.assert_array_equal(record["atomic_numbers"], numbers)
        np.testing.assert_array_equal(record["pos"], pos.astype(np.float32))
        np.testing.assert_array_equal(record["forces"], forces.astype(np.float32))
    assert not by_id


def test_labels_are_consistent() -> None:
    """The forces in the tests' data are minus the gradient of its energies: units, signs and order are right.

    Along the way between two structures of a molecule: the trapezium of the forces is the energy, to third order.
    """
    store = read_store()
    errors, spreads = [], []
    for (idmol, idconf), (_, pos, energy, forces) in store.items():
        _, start, lowest, at_rest = store[idmol, idconf.rpartition("-")[0] + "-opt"]
        work = -0.5 * ((forces + at_rest) * (pos - start)).sum()
        errors.append(abs(energy[0] - lowest[0] - work))
        spreads.append(energy[0] - lowest[0])
    assert np.mean(errors) < 0.15 * np.mean(spreads)


def test_shares_and_seed() -> None:
    names = [("12", f"Geom-m12-i1-c1-d{number}") for number in range(40_000)]
    counts = Counter(split_of(*name, 0) for name in names)
    assert abs(counts["val_known"] - 1000) < 4 * 31  # four standard deviations
    assert set(counts) == {"train", "val_known"}
    assert [split_of(*name, 0) for name in names] != [split_of(*name, 1) for name in names]


@pytest.mark.slow
def test_a_killed_call_is_finished_by_the_next(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is that of a call of two processes that was not killed, and finished shards are left alone."""
    prepare(source, tmp_path / "whole", num_workers=2)
    command = [sys.executable, "scripts/prepare_qm7x.py", "--data-path", source, "--out-path", tmp_path / "out"]
    process = subprocess.Popen(command, cwd=ROOT)
    state = tmp_path / "out" / qm7x.STATE_FOLDER
    while process.poll() is None and not list(state.glob("*.npz")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in state.glob("*.npz")}
    assert done
    prepare(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert not list((tmp_path / "out").rglob("*.tmp"))
    monkeypatch.setattr(qm7x, "_write_shards", None)  # nothing is left to do
    prepare(source, tmp_path / "out")
    with pytest.raises(ValueError, match="another seed"):
        prepare(source, tmp_path / "out", seed=1)


def test_shards_of_molecules_that_are_gone_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qm7x, "MOLECULES_PER_TASK", 1)
    prepare(source, tmp_path / "out")
    with h5py.File(next(path for path in source.glob("*.hdf5") if len(h5py.File(path)) > 1), "a") as file:
        del file[next(iter(file))]
    with pytest.raises(ValueError, match=r"data\.\d+\.lmdb: is made from more molecules than there are now"):
        prepare(source, tmp_path / "out")


def test_duplicates_are_left_out_with_what_was_displaced_from_them(source: Path, tmp_path: Path) -> None:
    idmol = next(iter(read_store()))[0]
    (tmp_path / "DupMols.dat").write_text(f"Geom-m{idmol}-i1-c1-opt\n")
    prepare(source, tmp_path / "out", duplicates=tmp_path / "DupMols.dat")
    sids = [decode_packed(record)["sid"] for records in contents(tmp_path / "out").values() for record in records]
    assert len(sids) == len(read_store()) - 4
    assert int(idmol) not in sids
    (tmp_path / "DupMols.dat").write_text(f"Geom-m{idmol}-i1-c1-opt\nGeom\n")
    with pytest.raises(ValueError, match=r"DupMols.dat:2: expected an idconf such as Geom-m1-i1-c1-opt, got 'Geom'"):
        prepare(source, tmp_path / "other", duplicates=tmp_path / "DupMols.dat")


def _replace(group: h5py.Group, name: str, value: object) -> None:
    del group[name]
    if value is not None:
        group[name] = value


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("atXYZ", np.zeros((2, 3)), r"atXYZ has shape \(2, 3\), expected \(n, 3\) with n = 4"),
        ("totFOR", np.full((4, 3), np.nan), "totFOR holds what is no finite number"),
        ("ePBE0+MBD", np.zeros(()), r"ePBE0\+MBD has shape \(\), expected \(1,\)"),
        ("atNUM", np.array([26, 1, 1, 1]), r"atNUM holds \[26\]; the elements of QM7-X are"),
        ("totFOR", None, "has no totFOR"),
    ],
)
def test_a_wrong_structure_is_named(source: Path, tmp_path: Path, name: str, value: object, message: str) -> None:
    """With file, idmol and idconf; the shards of other files are finished, and a mended file costs its own shards."""
    with h5py.File(source / "3000.hdf5", "a") as file:
        conformation = file.create_group("2500/Geom-m2500-i1-c1-d1")
        for key, good in zip(("atNUM", "atXYZ", "ePBE0+MBD", "totFOR"), _good(), strict=True):
            conformation[key] = good
        _replace(conformation, name, value)
    with pytest.raises(ValueError, match=rf"3000.hdf5: 2500/Geom-m2500-i1-c1-d1: {message}"):
        prepare(source, tmp_path / "out")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / qm7x.STATE_FOLDER).glob("*.npz")}
    assert len(done) >= 5
    with h5py.File(source / "3000.hdf5", "a") as file:
        del file["2500"]
    prepare(source, tmp_path / "out")
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert sum(map(len, contents(tmp_path / "out").values())) == len(read_store())


def _good() -> tuple[np.ndarray, ...]:
    return np.array([7, 1, 1, 1]), np.eye(4)[:, :3], np.zeros(1), np.zeros((4, 3))


def test_missing_foreign_and_damaged_files(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = (source / "2000.hdf5").read_bytes()
    (source / "2000.hdf5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"2000.hdf5: is no whole HDF5 file; load it down again"):
        prepare(source, out)
    (source / "2000.hdf5").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match=r"2000.hdf5: is no whole HDF5 file"):
        prepare(source, out)
    (source / "2000.hdf5").unlink()
    with pytest.raises(ValueError, match=r"2000.hdf5 missing; expected 1000.hdf5 to 8000.hdf5 of QM7-X"):
        prepare(source, out)
    with h5py.File(source / "2000.hdf5", "w") as file:
        file["positions"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"2000.hdf5: is no file of QM7-X: expected .* found positions"):
        prepare(source, out)
    shutil.copy(source / "1000.hdf5", source / "9000.hdf5")
    with pytest.raises(ValueError, match=r"9000.hdf5 is no file of QM7-X"):
        prepare(source, out)
    assert not out.exists()
