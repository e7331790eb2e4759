"""QM9 from its three kinds of files: the same records; what is not QM9 is named by file and row."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.units import Hartree

from faenet_ocp.data.packed import OC20PackedDataset
from faenet_ocp.launch.cli import main
from faenet_ocp.prepare import qm9

NAMES = ("CH4", "NH3", "H2O", "CH3CH2OH", "C6H6", "HCN", "CO", "C2H4", "C2H2", "H2CO", "CH3OH", "C2H6")


def _labels(number: int) -> dict[str, float]:
    rng = np.random.default_rng(number)
    return {name: round(float(value), 6) for name, value in zip(qm9.LABELS, rng.normal(-40, 1, 12), strict=True)}


def write_package(folder: Path) -> list[Path]:
    """CSV as in the package, in three files."""
    paths = [folder / f"qm9_part{part}.csv" for part in (1, 2, 3)]
    columns = ["XYZ_file", "Index", "Elements", "XYZ_Ang", *qm9._PACKAGE_COLUMNS.values()]
    for part, path in enumerate(paths):
        with path.open("w", newline="") as file:
            rows = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
            rows.writerow(columns)
            for number in range(part, len(NAMES), 3):
                atoms = molecule(NAMES[number])
                pos = json.dumps(atoms.positions.round(10).tolist())
                elements = str(atoms.get_chemical_symbols()).replace(" ", "")
                rows.writerow(["x.xyz", number + 1, elements, pos, *_labels(number).values()])
    return paths


def write_raw(folder: Path, kind: str) -> Path:
    """`gdb9.sdf` and its table, or single files; molecule 13 is uncharacterised."""
    (folder / "uncharacterized.txt").write_text("".join(f"  {number} x\n" for number in range(13, 13 + 3054)))
    numbers = [*range(len(NAMES)), 0]
    if kind == "xyz":
        for place, number in enumerate(numbers, start=1):
            atoms, labels = molecule(NAMES[number]), _labels(number)
            values = "\t".join(f"{value:.9e}".replace("e", "*^") for value in labels.values())
            lines = [str(len(atoms)), f"gdb {place}\t1.0\t1.0\t1.0\t{values}"]
            lines += [
                "\t".join([symbol, *(f"{x:.10f}".replace("0.0000000000", "0.*^-6") for x in pos), "0.1"])
                for symbol, pos in zip(atoms.get_chemical_symbols(), atoms.positions, strict=True)
            ]
            (folder / f"dsgdb9nsd_{place:06d}.xyz").write_text("\n".join([*lines, "1 2 3", "C C", "InChI"]))
        return folder
    with (folder / "gdb9.sdf").open("w") as sdf, (folder / "gdb9.sdf.csv").open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["mol_id", "A", "B", "C", *qm9._SDF_COLUMNS.values()])
        for place, number in enumerate(numbers, start=1):
            atoms = molecule(NAMES[number])
            rows.writerow([f"gdb_{place}", 1, 1, 1, *_labels(number).values()])
            sdf.write(f"gdb_{place}\n -OEChem\n\n{len(atoms):3d}  0  0     0  0  0  0  0  0999 V2000\n")
            for symbol, pos in zip(atoms.get_chemical_symbols(), atoms.positions, strict=True):
                sdf.write("".join(f"{x:10.4f}" for x in pos) + f" {symbol:3s} 0  0  0\n")
            sdf.write("M  END\n$$$$\n")
    return folder


@pytest.fixture
def no_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve molecules are not QM9."""
    monkeypatch.setattr(qm9, "check_facts", lambda source: None)
    monkeypatch.setattr(qm9, "SPLITS", {"train": 7, "val": 3, "test": 2})


@pytest.mark.parametrize("kind", ["package", "sdf", "xyz"])
def test_records_of_all_kinds_of_files(tmp_path: Path, no_facts: None, monkeypatch: Any, kind: str) -> None:
    (tmp_path / "raw").mkdir()
    if kind == "package":
        paths = write_package(tmp_path / "raw")
        monkeypatch.setattr(qm9, "_package_files", lambda: paths)
    raw = None if kind == "package" else write_raw(tmp_path / "raw", kind)
    assert qm9.prepare(tmp_path / "out", raw) == 12
    settings = {"labels": ["U0", "mu"], "edges": "recompute", "cutoff": 5.0, "max_neighbors": 32}
    dataset = OC20PackedDataset({"src": str(tmp_path / "out" / qm9.FILE), **settings})
    assert len(dataset) == 12
    for index in range(12):
        sample = dataset[index]
        number = int(sample.sid[0]) - 1
        atoms, labels = molecule(NAMES[number]), _labels(number)
        assert sample.atomic_numbers.tolist() == atoms.numbers.tolist() and not sample.pbc.any()
        np.testing.assert_allclose(sample.pos, atoms.positions, atol=6e-5 if kind == "sdf" else 1e-6)
        assert float(sample.U0.double() + sample.U0_remainder) == pytest.approx(labels["U0"] * Hartree, abs=1e-9)
        assert float(sample.mu) == pytest.approx(labels["mu"], rel=1e-6)
    parts = [np.load(tmp_path / "out" / f"{name}.npy") for name in ("train", "val", "test")]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(123)).tolist()
    assert np.concatenate(parts).tolist() == order and [len(part) for part in parts] == [7, 3, 2]
    before = (tmp_path / "out" / qm9.FILE).stat().st_mtime_ns
    assert qm9.prepare(tmp_path / "out", raw) == 12
    assert (tmp_path / "out" / qm9.FILE).stat().st_mtime_ns == before


def test_what_is_not_qm9_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_package(tmp_path)
    monkeypatch.setattr(qm9, "_package_files", lambda: paths)
    with pytest.raises(
        ValueError, match=r"is not QM9 as it was published: molecules: 12, expected 130831; U0 of methane"
    ):
        qm9.prepare(tmp_path / "out")
    text = paths[1].read_text().splitlines(keepends=True)
    paths[1].write_text("".join([*text[:3], text[3][: len(text[3]) // 2]]))
    with pytest.raises(ValueError, match=r"qm9_part2\.csv: row 4 is not one of QM9"):
        qm9.prepare(tmp_path / "out")
    with pytest.raises(ValueError, match=r"uncharacterized\.txt: missing"):
        qm9.prepare(tmp_path / "out", tmp_path)
    (tmp_path / "raw").mkdir()
    raw = write_raw(tmp_path / "raw", "sdf")
    text = (raw / "gdb9.sdf").read_text()
    blocks = text.split("$$$$\n")
    for wrong, found in ((blocks[0] + "$$$$", "the end"), ("$$$$\n".join([blocks[0], *blocks[2:]]), "gdb_3")):
        (raw / "gdb9.sdf").write_text(wrong)
        with pytest.raises(ValueError, match=rf"gdb9\.sdf: row 2 is not .*gdb_2 expected, {found} found"):
            qm9.prepare(tmp_path / "out", raw)
    (raw / "gdb9.sdf.csv").unlink()
    with pytest.raises(ValueError, match=r"gdb9\.sdf\.csv: missing"):
        qm9.prepare(tmp_path / "out", raw)


def test_a_target_is_trained_on_its_splits(tmp_path: Path, no_facts: None, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw").mkdir()
    qm9.prepare(tmp_path / "data", write_raw(tmp_path / "raw", "xyz"))
    small = "hidden_channels=32 num_filters=16 num_interactions=1 pg_hidden_channels=4 num_gaussians=8".split()
    arguments = ["--config", "configs/qm9/faenet_cpu.yml", f"--dataset.root={tmp_path / 'data'}", "--logger=none"]
    arguments += [*(f"--model.{option}" for option in small), "--optim.max_epochs=1", "--optim.batch_size=4"]
    arguments += ["--run-dir", str(tmp_path), "--optim.num_workers=0", "--num-gpus=1"]
    assert main([*arguments, "--identifier", "gap", "--dataset.target=gap"]) == 0
    results = json.loads((tmp_path / "gap" / "results" / "metrics.json").read_text())
    assert {split: values["num_systems"] for split, values in results["splits"].items()} == {"val": 3, "test": 2}
    assert "gap MAE [meV]: val" in (tmp_path / "gap" / "results" / "table.md").read_text()
    wrong = {
        "--dataset.target=gapp": "outputs.gapp: unknown; did you mean 'gap'?",
        "--dataset.val.val.index=none.npy": "there is no such index file",
    }
    np.save(tmp_path / "data" / "far.npy", np.array([1, 12]))
    wrong["--dataset.val.val.index=far.npy"] = "lists samples 1 to 12 of 12"
    for option, message in wrong.items():
        assert main([*arguments, "--identifier", "wrong", option]) == 2
        assert message in capsys.readouterr().err
