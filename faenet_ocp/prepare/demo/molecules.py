"""Generated molecules in QM7-X's files: geometries made here, energies and forces of GFN2-xTB (tblite, Bannwarth 2019).

A molecule is one of ASE's G2 collection, with up to two hydrogens exchanged for small groups, relaxed; its structures
are that minimum (`opt`) and copies of it whose atoms are moved at random (`d1`, `d2`, ...). Everything random in it
comes from (seed, number of the molecule). The molecules with an idmol of ``qm7x.UNKNOWN`` are in no other split; of
two molecules with one formula and energy, one is kept.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ase
import numpy as np
from ase.build import molecule
from ase.collections import g2
from ase.data import covalent_radii
from ase.optimize import BFGS
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from faenet_ocp.common.files import made_whole
from faenet_ocp.common.pool import ordered_map
from faenet_ocp.prepare.qm7x import ELEMENTS, FILES, UNKNOWN

logger = logging.getLogger(__name__)

RATTLE = 0.06
"""Angstrom along each axis: forces of some eV/A, as QM7-X's displaced structures have."""
_GROUPS = ("CH4", "NH3", "H2O", "SH2", "HCl", "HCN", "H2CO")  # without one H
_MAX_HEAVY, _MAX_ATOMS = 7, 23
_MAX_FORCE = 0.02  # eV/A, of a relaxed molecule
_SAME_ENERGY = 0.005  # eV
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MoleculeSettings:
    """What the molecules depend on.

    Attributes:
        num_molecules: to be tried; some are twins of others, or do not relax, and are left out.
        num_frames: structures of each, the relaxed one among them.
        seed: of everything random.
    """

    num_molecules: int = 360
    num_frames: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in {"num_molecules": (16, 7000), "num_frames": (1, 101), "seed": (0, 2**31)}.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be in {low} to {high}, got {getattr(self, name)}")


def make_molecules(root: str | Path, settings: MoleculeSettings, *, num_workers: int = 1) -> dict[str, int]:
    """Write `1000.hdf5` to `8000.hdf5`; the folder appears when all of it is there.

    Args:
        root: a folder that does not exist.
        settings: sizes and seed; stand in each file's attributes.
        num_workers: processes; what is written does not depend on it.

    Returns:
        The number of molecules and of structures.

    Raises:
        ValueError: the folder exists, or h5py or tblite is missing.
    """
    try:
        import h5py
        import tblite.interface  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"molecules need h5py and tblite: pip install 'faenet-ocp[demo-molecules]' ({error})"
        ) from error
    root = Path(root).resolve()
    if root.exists():
        raise ValueError(f"{root} exists: choose another folder")
    with made_whole(root) as folder:
        files = {name: h5py.File(folder / name, "w") for name in FILES}
        try:
            return _write(files, settings, num_workers)
        finally:
            for file in files.values():
                file.close()


def _write(files: Mapping[str, Any], settings: MoleculeSettings, num_workers: int) -> dict[str, int]:
    """Molecules as groups of the files; counts of them and of their structures."""
    tasks = [(number, settings) for number in range(settings.num_molecules)]
    known: set[tuple[str, int]] = set()
    counts = {"molecules": 0, "structures": 0}
    for file in files.values():
        file.attrs.update({"note": "generated, labels of GFN2-xTB; not QM7-X", **asdict(settings)})
    results = ordered_map(_make_structures, tasks, num_workers)
    for idmol, result in zip(_idmols(len(tasks)), tqdm(results, total=len(tasks), unit="molecule"), strict=True):
        numbers, frames = result
        if not frames or _is_known(numbers, frames[0][1], known):
            continue
        group = files[f"{-(-idmol // 1000) * 1000}.hdf5"].create_group(str(idmol))
        for number, labels in enumerate(frames):
            conformation = group.create_group(f"Geom-m{idmol}-i1-c1-{f'd{number}' if number else 'opt'}")
            for name, value in zip(("atNUM", "atXYZ", "ePBE0+MBD", "totFOR"), (numbers, *labels), strict=True):
                conformation[name] = value
        counts["molecules"] += 1
        counts["structures"] += len(frames)
    return counts


def _idmols(count: int) -> list[int]:
    """One in ten of `UNKNOWN`, while there are any; the others spread over the eight files."""
    unknown = sorted(map(int, UNKNOWN))[: count // 10]
    known = [number for number in range(1, 7166) if str(number) not in UNKNOWN]
    spread = np.linspace(0, len(known) - 1, count - len(unknown)).astype(int)
    return [known[index] for index in spread] + unknown


def _is_known(numbers: NDArray[np.int64], energy: Array, known: set[tuple[str, int]]) -> bool:
    """Whether a molecule of this formula and energy was there before; notes it."""
    formula, step = ase.Atoms(numbers).get_chemical_formula(), int(energy[0] // _SAME_ENERGY)
    is_known = any((formula, near) in known for near in (step - 1, step, step + 1))
    known.add((formula, step))
    return is_known


def _make_structures(number: int, settings: MoleculeSettings) -> tuple[NDArray[np.int64], list[tuple[Array, ...]]]:
    """Atomic numbers and, for each structure, positions, energy and forces; none if it does not relax."""
    from tblite.ase import TBLite

    rng = np.random.default_rng([settings.seed, number])
    atoms = build_molecule(rng)
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    try:
        if not BFGS(atoms, logfile=None).run(fmax=_MAX_FORCE, steps=200):
            return atoms.numbers, []
        relaxed = atoms.positions.copy()
        frames: list[tuple[Array, ...]] = []
        for index in range(settings.num_frames):
            atoms.positions = relaxed + (rng.normal(0.0, RATTLE, relaxed.shape) if index else 0.0)
            energy = np.array([atoms.get_potential_energy()])
            frames.append((atoms.positions.copy(), energy, atoms.get_forces()))
    except Exception as error:  # of tblite: no self-consistency
        logger.debug("molecule %d: %s", number, error)
        return atoms.numbers, []
    return atoms.numbers, frames


def build_molecule(rng: np.random.Generator) -> ase.Atoms:
    """A closed-shell molecule of QM7-X's elements, not relaxed, of at most its size."""
    parents = [name for name in sorted(g2.names) if _is_parent(g2[name])]
    while True:
        atoms = molecule(str(rng.choice(parents)))
        for _ in range(int(rng.integers(0, 3))):
            atoms = _join(atoms, molecule(str(rng.choice(_GROUPS))), rng)
        if len(atoms) <= _MAX_ATOMS and (atoms.numbers > 1).sum() <= _MAX_HEAVY:
            return atoms


def _is_parent(atoms: ase.Atoms) -> bool:
    is_closed = atoms.numbers.sum() % 2 == 0 and not atoms.get_initial_magnetic_moments().any()
    return is_closed and set(atoms.numbers) <= set(ELEMENTS) and 6 in atoms.numbers and 1 in atoms.numbers


def _join(parent: ase.Atoms, group: ase.Atoms, rng: np.random.Generator) -> ase.Atoms:
    """The parent with a hydrogen of it exchanged for the group without one of its own."""
    (stem, out), (root, into) = (_bond_to_hydrogen(atoms, rng) for atoms in (parent, group))
    axis = parent.positions[out] - parent.positions[stem]
    axis /= np.linalg.norm(axis)
    bond = group.positions[into] - group.positions[root]
    turn = Rotation.from_rotvec(axis * rng.uniform(0, 2 * np.pi)) * Rotation.align_vectors([-axis], [bond])[0]
    length = covalent_radii[parent.numbers[stem]] + covalent_radii[group.numbers[root]]
    group.positions = turn.apply(group.positions - group.positions[root])
    group.positions += parent.positions[stem] + length * axis
    del parent[out], group[into]
    return parent + group


def _bond_to_hydrogen(atoms: ase.Atoms, rng: np.random.Generator) -> tuple[int, int]:
    """A heavy atom and a hydrogen of it."""
    hydrogen = int(rng.choice(np.flatnonzero(atoms.numbers == 1)))
    heavy = np.flatnonzero(atoms.numbers > 1)
    distances: Any = np.linalg.norm(atoms.positions[heavy] - atoms.positions[hydrogen], axis=1)
    return int(heavy[distances.argmin()]), hydrogen
