"""QM9 (Ramakrishnan et al. 2014) to one packed file with its 12 targets, and the splits of the FAENet paper.

Read from the package `qm9pack`, from `gdb9.sdf` with `gdb9.sdf.csv`, or from the original `dsgdb9nsd_*.xyz`. Energies
become eV, the rest keeps its unit (`targets.QM9`). The 3,054 molecules whose geometry is not that of their name are
left out: 130,831 remain.
"""

import csv
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ase.data import atomic_numbers
from ase.units import Hartree
from tqdm import tqdm

from faenet_ocp.common.checks import RecordError
from faenet_ocp.common.files import exclusive, write_array
from faenet_ocp.prepare.lmdb_writer import write_metadata
from faenet_ocp.prepare.pack import LOCK_NAME, pack_file

logger = logging.getLogger(__name__)

FILE = "qm9.lmdb"
NUM_MOLECULES = 130_831
SPLITS = {"train": 110_000, "val": 10_000, "test": 10_831}
SUBSETS = {"train_1k": 1_000, "train_10k": 10_000}
"""The first molecules of `train`, for learning curves."""
SEED = 123
"""Of the authors' permutation, by PyTorch's generator."""
LABELS = ("mu", "alpha", "homo", "lumo", "gap", "R2", "ZPVE", "U0", "U", "H", "G", "Cv")
_IN_HARTREE = ("homo", "lumo", "gap", "ZPVE", "U0", "U", "H", "G")
_PACKAGE_COLUMNS = dict(
    zip(
        LABELS,
        (
            "Dipole_debye Polarizability_bohr3 HOMO_au LUMO_au HOMO_LUMO_gap_au R2_bohr2 ZPVE_au InternalEnergy_0K_au "
            "InternalEnergy_298K_au Enthalphy_298K_au GibbsFreeEnergy_298K_au Heatcapacity_Cv_cal_mol_K"
        ).split(),
        strict=True,
    )
)
_SDF_COLUMNS = dict(zip(LABELS, "mu alpha homo lumo gap r2 zpve u0 u298 h298 g298 cv".split(), strict=True))
_UNCHARACTERIZED = "uncharacterized.txt"


class Molecule(NamedTuple):
    """One row: the number in QM9 (1 to 133,885), atoms, positions in Angstrom, labels in the files' units."""

    number: int
    symbols: list[str]
    pos: Any
    labels: dict[str, float]


class Qm9File:
    """All molecules in memory, as a file of records for `pack.pack_file`."""

    item = "molecule"

    def __init__(self, path: Path, molecules: Iterable[Molecule]):
        self.path = path
        self.records = [_record(molecule) for molecule in molecules]
        self.numbers = [int(record["sid"]) for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def read(self, position: int) -> dict[str, Any]:
        """Return the fields of a record."""
        return self.records[position]


def prepare(out_path: Path, raw_path: Path | None = None) -> int:
    """Writes `qm9.lmdb` and the index files of `SPLITS` and `SUBSETS`; goes on where it was interrupted.

    Args:
        out_path: folder for them.
        raw_path: folder of `gdb9.sdf` and `gdb9.sdf.csv`, or of `dsgdb9nsd_*.xyz`, with `uncharacterized.txt`; None:
            the package `qm9pack`.

    Returns:
        the number of molecules.

    Raises:
        ValueError: files that are missing, cut short or others; names file and row, and what was expected.
    """
    out_path.mkdir(parents=True, exist_ok=True)
    with exclusive(out_path / LOCK_NAME, out_path):
        source = _open(raw_path)
        check_facts(source)
        natoms, _ = pack_file(source, out_path / FILE, 1)
        write_metadata(out_path, natoms=natoms, neighbors=None)
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(SEED)).numpy()
        for name, part in zip(SPLITS, np.split(order, np.cumsum(list(SPLITS.values()))[:-1]), strict=True):
            write_array(out_path / f"{name}.npy", part)
        for name, size in SUBSETS.items():
            write_array(out_path / f"{name}.npy", order[:size])
    return len(source)


def check_facts(source: Qm9File) -> None:
    """Compares with what is known of QM9.

    Raises:
        ValueError: these are other data, or other units.
    """
    by_number = dict(zip(source.numbers, source.records, strict=True))
    energies = np.array([record["U0"] for record in source.records])
    facts = {
        "molecules": (len(source), NUM_MOLECULES, 0),
        "U0 of methane [eV]": (by_number.get(1, {}).get("U0", np.nan), -40.47893 * Hartree, 1e-6),
        "gap of methane [eV]": (by_number.get(1, {}).get("gap", np.nan), 0.5048 * Hartree, 1e-6),
        "mean U0 [eV]": (energies.mean(), -11178.9667, 0.01),
        "standard deviation of U0 [eV]": (energies.std(), 1085.579, 0.01),
        "atoms of the largest": (max(len(record["pos"]) for record in source.records), 29, 0),
    }
    wrong = []
    for what, (found, right, tolerance) in facts.items():
        if not abs(found - right) <= tolerance:
            wrong.append(f"{what}: {found}, expected {right}")
    if wrong:
        raise ValueError(f"{source.path}: is not QM9 as it was published: {'; '.join(wrong)}")


def _open(raw_path: Path | None) -> Qm9File:
    if raw_path is None:
        paths = _package_files()
        return Qm9File(paths[0].parent, _progress(_of_package(paths)))
    left_out = _uncharacterized(raw_path)
    if (raw_path / "gdb9.sdf").is_file():
        molecules = _of_sdf(raw_path / "gdb9.sdf", raw_path / "gdb9.sdf.csv")
    elif any(raw_path.glob("dsgdb9nsd_*.xyz")):
        molecules = _of_xyz(sorted(raw_path.glob("dsgdb9nsd_*.xyz")))
    else:
        raise ValueError(f"{raw_path}: has neither gdb9.sdf (with gdb9.sdf.csv) nor dsgdb9nsd_*.xyz")
    return Qm9File(raw_path, (one for one in _progress(molecules) if one.number not in left_out))


def _progress(molecules: Iterator[Molecule]) -> Iterable[Molecule]:
    return tqdm(molecules, desc="reading QM9", unit="molecule", delay=2.0)


def _package_files() -> list[Path]:
    try:
        found = [path for path in files("qm9pack") or [] if re.fullmatch(r"qm9_part\d\.csv", path.name)]
    except PackageNotFoundError:
        found = []
    paths = sorted(Path(str(path.locate())) for path in found)
    if len(paths) != 3:
        raise ValueError(
            "the package qm9pack is not installed, or not whole: pip install 'faenet-ocp[qm9]'; or --raw-path"
        )
    return paths


def _of_package(paths: Iterable[Path]) -> Iterator[Molecule]:
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                with _row(path, number):
                    pos = np.array(re.sub(r"[\[\]]", "", row["XYZ_Ang"]).split(","), dtype=np.float64).reshape(-1, 3)
                    labels = {name: float(row[column]) for name, column in _PACKAGE_COLUMNS.items()}
                    symbols = re.findall(r"[A-Z][a-z]?", row["Elements"])
                    yield Molecule(int(row["Index"]), symbols, pos, labels)


def _of_sdf(sdf: Path, table: Path) -> Iterator[Molecule]:
    if not table.is_file():
        raise ValueError(f"{table}: missing; it has the labels of {sdf.name}")
    with sdf.open() as file, table.open(newline="") as labels:
        for number, row in enumerate(csv.DictReader(labels), start=2):
            with _row(table, number):
                values = {name: float(row[column]) for name, column in _SDF_COLUMNS.items()}
                index = int(row["mol_id"].removeprefix("gdb_"))
            with _row(sdf, index):
                lines = list(takewhile(lambda line: line.strip() != "$$$$", file))
                if not lines or lines[0].strip() != row["mol_id"]:
                    raise ValueError(f"{row['mol_id']} expected, {lines[0].strip() if lines else 'the end'} found")
                count = int(lines[3][:3])
                atoms = [line.split() for line in lines[4 : 4 + count]]
                pos = np.array([atom[:3] for atom in atoms], dtype=np.float64)
                yield Molecule(index, [atom[3] for atom in atoms], pos, values)


def _of_xyz(paths: Iterable[Path]) -> Iterator[Molecule]:
    for path in paths:
        with _row(path, 1):
            lines = path.read_text().replace("*^", "e").splitlines()
            count, values = int(lines[0]), lines[1].split()
            atoms = [line.split() for line in lines[2 : 2 + count]]
            labels = dict(zip(LABELS, map(float, values[5:17]), strict=True))
            pos = np.array([atom[1:4] for atom in atoms], dtype=np.float64)
            yield Molecule(int(values[1]), [atom[0] for atom in atoms], pos, labels)


def _uncharacterized(raw_path: Path) -> set[int]:
    path = raw_path / _UNCHARACTERIZED
    if not path.is_file():
        raise ValueError(f"{path}: missing; QM9's list of the 3,054 molecules that are to be left out")
    found = {int(match[1]) for line in path.read_text().splitlines() if (match := re.match(r"\s*(\d+)\s", line))}
    if len(found) != 3054:
        raise ValueError(f"{path}: lists {len(found)} molecules, not 3,054")
    return found


@contextmanager
def _row(path: Path, number: int) -> Iterator[None]:
    """Whatever goes wrong with a row, said with its file and number."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path}: row {number} is not one of QM9 ({type(error).__name__}: {error})") from error


def _record(molecule: Molecule) -> dict[str, Any]:
    numbers = [atomic_numbers.get(symbol, 0) for symbol in molecule.symbols]
    labels = molecule.labels
    if len(numbers) != len(molecule.pos) or 0 in numbers or not np.isfinite([*labels.values()]).all():
        raise RecordError(f"molecule {molecule.number} of QM9: {len(numbers)} atoms and {len(molecule.pos)} positions")
    energies = {name: labels[name] * Hartree for name in _IN_HARTREE}
    pos = molecule.pos.astype(np.float32)  # 1e-7 A of 10 A: a file of 117 MB in place of 145
    return {"sid": molecule.number, "pos": pos, "atomic_numbers": np.array(numbers)} | labels | energies
