"""Adsorbates on metal slabs, relaxed with effective-medium theory: the physics of the demo data.

Energies are ASE's EMT potential plus, for each bond of an adsorbate, a one-sided ("Hookean") spring
that acts only beyond 1.1 times the bond's usual length. EMT knows metallic bonds only: without the
springs nine of ten OH, CH2, NH2, ... fall apart while they relax. Adsorption energies are relative
to the relaxed clean slab and to H2, N2, H2O and CO in the gas phase, as in OC20.

Legend: N atoms, T steps of a relaxation. Angstrom, eV, eV/A.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, permutations
from typing import NamedTuple

import ase
import numpy as np
from ase.build import molecule, surface
from ase.constraints import FixAtoms
from ase.data import covalent_radii
from ase.optimize import LBFGS
from scipy.optimize import minimize_scalar

from faenet_ocp.prepare.demo.emt import Array, PairEMT, Spring

SPRING_START = 1.1
RATTLE = 0.05
"""Standard deviation of the displacements in S2EF frames along each axis (A)."""
_BOND_FACTOR = 1.25  # atoms are bonded up to this multiple of the sum of their covalent radii
_DESORBED_FACTOR = 1.5
_MAX_SLAB_MOVE = 1.0
_MAX_DEPTH = 0.5
_FORCE_MAX = 0.04
_MAX_STEPS = 150
_VACUUM = 18.0

METALS = ("Al", "Cu", "Ag", "Au", "Ni", "Pd", "Pt")
_FCC_SITES = ((0.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0))


class Facet(NamedTuple):
    """A surface of an fcc crystal and the slab sizes to draw from.

    Attributes:
        miller: indices of the surface.
        layers: numbers of atomic planes.
        surface_layers: how many planes, from the top, are the surface (free, tag 1).
        repeats: in-plane repetitions of the smallest cell that holds every ordered alloy.
    """

    miller: tuple[int, int, int]
    layers: tuple[int, ...]
    surface_layers: int
    repeats: tuple[tuple[int, int], ...]


FACETS = {
    "111": Facet((1, 1, 1), (3, 4), 1, ((2, 1), (2, 2))),
    "100": Facet((1, 0, 0), (3, 4), 1, ((2, 2), (3, 2))),
    "110": Facet((1, 1, 0), (5, 6), 2, ((1, 2), (2, 2))),
    "211": Facet((2, 1, 1), (9, 12), 3, ((1, 1), (1, 2))),
}


def _umbrella(radius: float, height: float) -> list[tuple[float, float, float]]:
    angles = 2 * np.pi * np.arange(3) / 3
    return [(radius * np.cos(a), radius * np.sin(a), height) for a in angles]


_ATOP = (0.0, 0.0, 0.0)
ADSORBATES: dict[str, tuple[str, list[tuple[float, float, float]]]] = {
    "H": ("H", [_ATOP]),
    "C": ("C", [_ATOP]),
    "N": ("N", [_ATOP]),
    "O": ("O", [_ATOP]),
    "CH": ("CH", [_ATOP, (0, 0, 1.09)]),
    "CH2": ("CHH", [_ATOP, (0.9, 0, 0.6), (-0.9, 0, 0.6)]),
    "CH3": ("CHHH", [_ATOP, *_umbrella(1.03, 0.37)]),
    "NH": ("NH", [_ATOP, (0, 0, 1.04)]),
    "NH2": ("NHH", [_ATOP, (0.83, 0, 0.6), (-0.83, 0, 0.6)]),
    "NH3": ("NHHH", [_ATOP, *_umbrella(0.95, 0.37)]),
    "OH": ("OH", [_ATOP, (0.6, 0, 0.76)]),
    "H2O": ("OHH", [_ATOP, (0.77, 0, 0.58), (-0.77, 0, 0.58)]),
    "CO": ("CO", [_ATOP, (0, 0, 1.14)]),
    "NO": ("NO", [_ATOP, (0, 0, 1.14)]),
    "CN": ("CN", [_ATOP, (0, 0, 1.14)]),
    "N2": ("NN", [_ATOP, (0, 0, 1.08)]),
    "CHO": ("COH", [_ATOP, (0.6, 0, 1.02), (-0.95, 0, 0.52)]),
    "COH": ("COH", [_ATOP, (0, 0, 1.26), (0.82, 0, 1.74)]),
    "NOH": ("NOH", [_ATOP, (0, 0, 1.28), (0.82, 0, 1.76)]),
    "CHOH": ("COHH", [_ATOP, (0.55, 0, 1.15), (1.4, 0, 1.56), (-0.95, 0, 0.5)]),
}
"""Name -> symbols and rough positions; the first atom points down to the surface."""


def _compositions() -> dict[str, tuple[str, str, str, str]]:
    """Pure metals, A3B (L1_2) and AB (L1_0): the symbols on the four sites of the cubic cell."""
    pure = {a: (a, a, a, a) for a in METALS}
    a3b = {f"{a}3{b}": (b, a, a, a) for a, b in permutations(METALS, 2)}
    ab = {f"{a}{b}": (a, b, b, a) for a, b in combinations(METALS, 2)}
    return pure | a3b | ab


COMPOSITIONS = _compositions()


class SlabSpec(NamedTuple):
    """What defines a clean slab; `strain` holds the in-plane strains xx, yy and xy."""

    composition: str
    facet: str
    layers: int
    repeat: tuple[int, int]
    termination: int
    strain: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A relaxation: positions (T, N, 3), energies (T,), forces (T, N, 3), also on fixed atoms."""

    positions: Array
    energies: Array
    forces: Array
    converged: bool


@dataclass(frozen=True, kw_only=True)
class System:
    """An adsorbate relaxed on a slab.

    Attributes:
        spec: the slab.
        adsorbate: name in `ADSORBATES`; its atoms are the last ones.
        atoms: the initial structure with tags and constraints.
        trajectory: the relaxation.
        reference: energy of the relaxed clean slab and of the adsorbate's elements in the gas
            phase; the adsorption energy is relative to it.
        rotation: angle about z by which the system has been turned.
    """

    spec: SlabSpec
    adsorbate: str
    atoms: ase.Atoms
    trajectory: Trajectory
    reference: float
    rotation: float = 0.0


@cache
def gas_references() -> dict[str, float]:
    """Energy per atom (eV) of H, C, N and O taken from relaxed H2, N2, H2O and CO."""
    energies = {}
    for name in ("H2", "N2", "H2O", "CO"):
        gas = molecule(name, vacuum=8.0)
        gas.calc = PairEMT()
        LBFGS(gas, logfile=None).run(fmax=0.005)
        energies[name] = float(gas.get_potential_energy())
    hydrogen = energies["H2"] / 2
    oxygen = energies["H2O"] - 2 * hydrogen
    return {"H": hydrogen, "N": energies["N2"] / 2, "O": oxygen, "C": energies["CO"] - oxygen}


@cache
def bulk(composition: str) -> ase.Atoms:
    """The cubic four-atom cell of a composition at the lattice constant of lowest EMT energy."""
    crystal = ase.Atoms(COMPOSITIONS[composition], scaled_positions=_FCC_SITES, cell=[4.0] * 3, pbc=True)

    def energy(lattice_constant: float) -> float:
        crystal.set_cell([lattice_constant] * 3, scale_atoms=True)
        crystal.calc = PairEMT()
        return crystal.get_potential_energy()

    best = minimize_scalar(energy, bounds=(3.2, 4.5), method="bounded", options={"xatol": 1e-5})
    crystal.set_cell([float(best.x)] * 3, scale_atoms=True)
    crystal.calc = None
    return crystal


def draw_slab(
    rng: np.random.Generator,
    compositions: Sequence[str],
    is_allowed: Callable[[SlabSpec], bool],
) -> SlabSpec:
    """Draw what defines a slab; one in four is not strained."""
    while True:
        composition = str(rng.choice(compositions))
        facet = str(rng.choice(list(FACETS)))
        options = FACETS[facet]
        strained = rng.random() < 0.75
        strain = rng.uniform(-1, 1, size=3) * (0.05, 0.05, 0.02) * strained
        spec = SlabSpec(
            composition=composition,
            facet=facet,
            layers=int(rng.choice(options.layers)),
            repeat=options.repeats[int(rng.integers(len(options.repeats)))],
            termination=int(rng.integers(4)),
            strain=tuple(strain.tolist()),
        )
        if is_allowed(spec):
            return spec


def build_slab(spec: SlabSpec) -> ase.Atoms:
    """Cut a slab out of the relaxed bulk: tag 1 on the surface, tag 0 and fixed below."""
    facet = FACETS[spec.facet]
    slab = surface(bulk(spec.composition), facet.miller, 8, vacuum=_VACUUM / 2, periodic=True)
    heights = slab.positions[:, 2]
    ordered = np.sort(heights)
    levels = ordered[np.diff(ordered, prepend=-np.inf) > 0.3]
    plane = np.abs(heights[:, None] - levels).argmin(axis=1)
    depth = len(levels) - 1 - spec.termination - plane  # 0: the topmost plane that is kept
    keep = (depth >= 0) & (depth < spec.layers)
    slab = slab[keep]
    slab.set_tags((depth[keep] < facet.surface_layers).astype(int))

    cell = slab.cell.array.copy()
    slab.positions[:, 2] -= slab.positions[:, 2].min()
    cell[2] = (0, 0, np.ptp(slab.positions[:, 2]) + _VACUUM)
    slab.set_cell(cell)
    slab = slab.repeat((*spec.repeat, 1))
    xx, yy, xy = spec.strain
    slab.set_cell(slab.cell.array @ [[1 + xx, xy, 0], [xy, 1 + yy, 0], [0, 0, 1]], scale_atoms=True)
    slab.set_constraint(FixAtoms(mask=slab.get_tags() == 0))
    slab.pbc = True
    return slab


def relax(atoms: ase.Atoms, springs: Sequence[Spring] = ()) -> Trajectory:
    """Relax in place and return every step."""
    atoms.calc = PairEMT(springs)
    positions, energies, forces = [], [], []
    converged = False
    for done in LBFGS(atoms, logfile=None, memory=30).irun(fmax=_FORCE_MAX, steps=_MAX_STEPS):
        converged = bool(done)
        positions.append(atoms.get_positions())
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces(apply_constraint=False))
    atoms.calc = None
    return Trajectory(
        positions=np.array(positions),
        energies=np.array(energies),
        forces=np.array(forces),
        converged=converged,
    )


def bond_springs(name: str, first_atom: int = 0) -> tuple[Spring, ...]:
    """The springs on the bonds of an adsorbate whose atoms are numbered from `first_atom`."""
    adsorbate = _adsorbate(name)
    return tuple(
        Spring(first_atom + a, first_atom + b, SPRING_START * float(adsorbate.get_distance(a, b)))
        for a, b in sorted(bonds(adsorbate))
    )


def _adsorbate(name: str) -> ase.Atoms:
    symbols, positions = ADSORBATES[name]
    return ase.Atoms(symbols, positions, tags=[2] * len(positions))


@cache
def free_adsorbate(name: str) -> ase.Atoms:
    """An adsorbate relaxed on its own (one atom: as it is), its first atom at the origin."""
    adsorbate = _adsorbate(name)
    if len(adsorbate) > 1:
        relax(adsorbate, bond_springs(name))
        adsorbate.positions -= adsorbate.positions[0]
    return adsorbate


def place(slab: ase.Atoms, name: str, rng: np.random.Generator) -> ase.Atoms:
    """Put an adsorbate on a site of the slab, randomly turned and slightly tilted."""
    adsorbate = free_adsorbate(name).copy()
    adsorbate.rotate(rng.uniform(0, 360), "z")
    adsorbate.rotate(rng.uniform(0, 10), "x")
    adsorbate.rotate(rng.uniform(0, 360), "z")
    adsorbate.positions[:, :2] += _draw_site(slab, rng)
    adsorbate.positions[:, 2] += _touching_height(slab, adsorbate) + rng.uniform(0.0, 0.3)
    system = slab + adsorbate
    system.set_constraint(FixAtoms(mask=system.get_tags() == 0))
    return system


def _draw_site(slab: ase.Atoms, rng: np.random.Generator) -> Array:
    """Near an atop, bridge or hollow site: the centre of 1 to 4 neighbouring surface atoms."""
    surface_atoms = slab.positions[slab.get_tags() == 1, :2]
    images = np.array([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]) @ slab.cell.array[:2, :2]
    points = (surface_atoms + images[:, None]).reshape(-1, 2)
    somewhere = rng.random(2) @ slab.cell.array[:2, :2]
    nearest = np.square(points - somewhere).sum(axis=1).argsort()
    number = int(rng.integers(1, 5))
    return points[nearest[:number]].mean(axis=0) + rng.normal(scale=0.05, size=2)


def _touching_height(slab: ase.Atoms, adsorbate: ase.Atoms) -> float:
    """How far up the adsorbate must go for all its atoms to touch, not overlap, the slab's."""
    images = np.array([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]) @ slab.cell.array[:2]
    points = (slab.positions + images[:, None]).reshape(-1, 3)
    radii = np.tile(_contact_radii(slab), len(images))
    height = -np.inf
    for position, radius in zip(adsorbate.positions, _contact_radii(adsorbate), strict=True):
        aside = np.square(points[:, :2] - position[:2]).sum(axis=1)
        below = aside < 2.2**2
        up = np.square(radii[below] + radius) - aside[below]
        # At least 0.5 A above its neighbours, or a small atom would start inside a hollow.
        tops = points[below, 2] + np.sqrt(np.maximum(up, 0.25))
        height = max(height, float(tops.max()) - position[2])
    return height


def _contact_radii(atoms: ase.Atoms) -> Array:
    """Covalent radii, with 0.7 A for hydrogen, which EMT keeps 2 A away from metals."""
    return np.where(atoms.numbers == 1, 0.7, covalent_radii[atoms.numbers])


def bonds(atoms: ase.Atoms) -> set[tuple[int, int]]:
    """Pairs of adsorbate atoms (tag 2) closer than 1.25 times the sum of their radii."""
    members = np.flatnonzero(atoms.get_tags() == 2)
    return {
        (int(a), int(b))
        for a, b in combinations(members, 2)
        if np.linalg.norm(atoms.positions[a] - atoms.positions[b])
        < _BOND_FACTOR * covalent_radii[atoms.numbers[[a, b]]].sum()
    }


def why_unusable(initial: ase.Atoms, relaxed: ase.Atoms, trajectory: Trajectory) -> str | None:
    """Say what is wrong with a relaxed system, None if nothing: OC20's anomalies.

    Args:
        initial: the adsorbate placed on the **relaxed** clean slab.
        relaxed: the same atoms after relaxation.
        trajectory: the relaxation between the two.
    """
    if not trajectory.converged or not np.isfinite(trajectory.energies).all():
        return "not converged"
    if bonds(initial) != bonds(relaxed):
        return "bonds changed"
    tags = relaxed.get_tags()
    on_slab, adsorbed = np.flatnonzero(tags != 2), np.flatnonzero(tags == 2)
    radii = covalent_radii[relaxed.numbers]
    distances = relaxed.get_all_distances(mic=True)[np.ix_(adsorbed, on_slab)]
    if (distances > _DESORBED_FACTOR * (radii[adsorbed][:, None] + radii[on_slab])).all():
        return "desorbed"
    lowest_surface = initial.positions[tags == 1, 2].min()
    if relaxed.positions[adsorbed, 2].min() < lowest_surface - _MAX_DEPTH:
        return "below the surface"
    moves = np.linalg.norm((relaxed.positions - initial.positions)[on_slab], axis=1)
    return "slab reconstructed" if moves.max() > _MAX_SLAB_MOVE else None


def relaxed_slab(spec: SlabSpec) -> tuple[ase.Atoms, float] | None:
    """The relaxed clean slab and its energy, None if it does not converge."""
    slab = build_slab(spec)
    trajectory = relax(slab)
    return (slab, float(trajectory.energies[-1])) if trajectory.converged else None


def make_system(
    spec: SlabSpec, slab: ase.Atoms, slab_energy: float, name: str, rng: np.random.Generator
) -> System | str:
    """Place an adsorbate and relax: the system, or why it cannot be used."""
    initial = place(slab, name, rng)
    relaxed = initial.copy()
    trajectory = relax(relaxed, bond_springs(name, first_atom=len(slab)))
    reason = why_unusable(initial, relaxed, trajectory)
    if reason is not None:
        return reason
    gas = gas_references()
    reference = slab_energy + sum(gas[symbol] for symbol in initial.symbols[len(slab) :])
    return System(spec=spec, adsorbate=name, atoms=initial, trajectory=trajectory, reference=reference)


def rattled(system: System, frames: Sequence[int], rng: np.random.Generator) -> System:
    """The same system with its free atoms moved by `RATTLE` in these frames; energies and forces anew.

    The forces of a relaxation are small and their signs depend on hundredths of an Angstrom: too much to learn in
    minutes. (OC20 has rattled structures too, beside the relaxations.)
    """
    old = system.trajectory
    trajectory = replace(old, positions=old.positions.copy(), energies=old.energies.copy(), forces=old.forces.copy())
    atoms = system.atoms.copy()
    first_atom = len(atoms) - len(ADSORBATES[system.adsorbate][0])
    atoms.calc = PairEMT(bond_springs(system.adsorbate, first_atom))
    free = np.setdiff1d(np.arange(len(atoms)), atoms.constraints[0].get_indices())
    for frame in frames:
        trajectory.positions[frame][free] += rng.normal(0.0, RATTLE, (len(free), 3))
        atoms.set_positions(trajectory.positions[frame], apply_constraint=False)
        trajectory.energies[frame] = atoms.get_potential_energy()
        trajectory.forces[frame] = atoms.get_forces(apply_constraint=False)
    return replace(system, trajectory=trajectory)


def rotated(system: System, angle: float) -> System:
    """The same system turned about z by an angle in radians: cell, positions and forces."""
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])  # row vectors: x @ turn
    atoms = system.atoms.copy()
    atoms.set_cell(atoms.cell.array @ turn)
    old = system.trajectory
    trajectory = replace(old, positions=old.positions @ turn, forces=old.forces @ turn)
    atoms.positions = trajectory.positions[0]
    return replace(system, atoms=atoms, trajectory=trajectory, rotation=angle)
