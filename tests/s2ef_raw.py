"""Small S2EF downloads (folders of `*.extxyz(.xz)` and `*.txt(.xz)`) in OC20's format, made and read with ASE."""

import lzma
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from small_data import make_slab

COLUMNS = ["symbols", "positions", "move_mask", "tags", "forces"]


def make_frames(number: int, count: int, *, fixed: str = "random") -> list[ase.Atoms]:
    """A trajectory of one system: skewed cells, random constraints (or, as in OC20, on tag 0), both energies."""
    rng = np.random.default_rng(number)
    slab = make_slab(number)
    slab.info.clear()
    slab.set_constraint()
    slab.set_cell(slab.cell + rng.normal(scale=0.3, size=(3, 3)), scale_atoms=True)
    held = np.flatnonzero(slab.get_tags() == 0 if fixed == "subsurface" else rng.random(len(slab)) < 0.4)
    frames = []
    for _ in range(count):
        atoms = slab.copy()
        atoms.positions += rng.normal(scale=0.1, size=(len(slab), 3))
        atoms.calc = EMT()
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.set_constraint(FixAtoms(held))
        atoms.calc = SinglePointCalculator(atoms, energy=energy, free_energy=energy - 0.25, forces=forces)
        frames.append(atoms)
    return frames


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


def read(path: Path) -> str:
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode()


def write_raw(
    folder: Path,
    files: int = 3,
    *,
    frames: int = 4,
    repeat: int = 1,
    xz: bool = True,
    log: str = "reference",
    fixed: str = "random",
) -> Path:
    """Write `0.extxyz(.xz)`, `0.txt(.xz)`, ...: each with `repeat` times the frames of a trajectory of its own.

    log: "reference" (three columns) or "ids" (two); fixed: "random" or "subsurface".
    """
    folder.mkdir(parents=True)
    suffix = ".xz" if xz else ""
    for number in range(files):
        ase.io.write(folder / "text", make_frames(number, frames, fixed=fixed), format="extxyz", columns=COLUMNS)
        write(folder / f"{number}.extxyz{suffix}", (folder / "text").read_text() * repeat)
        lines = [f"random{100 + number},frame{fid}" for fid in range(frames * repeat)]
        if log == "reference":
            lines = [f"{line},{0.1 * number - 3.3333333333333335}" for line in lines]
        write(folder / f"{number}.txt{suffix}", "\n".join(lines) + "\n")
        (folder / "text").unlink()
    return folder


def by_ase(folder: Path, tmp_path: Path) -> list[tuple[ase.Atoms, list[str]]]:
    """All frames of a folder with their log lines, read by ASE in natural order."""
    result: list[tuple[ase.Atoms, list[str]]] = []
    for path in sorted(folder.glob("*.extxyz*"), key=lambda path: int(path.name.split(".")[0])):
        (tmp_path / "text").write_text(read(path))
        log = read(Path(str(path).replace(".extxyz", ".txt"))).splitlines()
        result += zip(
            ase.io.read(tmp_path / "text", ":", format="extxyz"), (line.split(",") for line in log), strict=True
        )
    return result
