"""Adsorbates on metal slabs, relaxed with effective-medium theory: the physics of the demo data.

Energies are ASE's EMT potential plus, for each bond of an adsorbate, a one-sided ("Hookean") spring that acts only
beyond 1.1 times the bond's usual length. EMT knows metallic bonds only: without the springs nine of ten OH, CH2, NH2,
... fall apart while they relax. Adsorption energies are relative to the relaxed clean slab and to H2, N2, H2O and CO in
the gas phase, as in OC20.

Legend: N atoms, T steps of a relaxation. Angstrom, eV, eV/A.
"""

from collections.abc import Iterator, Sequence
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
from scipy.spatial.distance import cdist

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
_FCC_SITES = ((0.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0))

METALS = ("Al", "Cu", "Ag", "Au", "Ni", "Pd", "Pt")
COMPOSITIONS = (
    {a: (a, a, a, a) for a in METALS}
    | {f"{a}3{b}": (b, a, a, a) for a, b in permutations(METALS, 2)}
    | {f"{a}{b}": (a, b, b, a) for a, b in combinations(METALS, 2)}
)
"""Pure metals, A3B (L1_2) and AB (L1_0): the symbols on the four sites of the cubic cell."""


class Facet(NamedTuple):
    """A surface of an fcc crystal and the slab sizes to draw from."""

    miller: tuple[int, int, int]
    layers: tuple[int, ...]  # numbers of atomic planes
    surface_layers: int  # how many planes, from the top, are the surface (free, tag 1)
    repeats: tuple[tuple[int, int], ...]  # of the smallest cell that holds every ordered alloy


FACETS = {
    "111": Facet((1, 1, 1), (3, 4), 1, ((2, 1), (2, 2))),
    "100": Facet((1, 0, 0), (3, 4), 1, ((2, 2), (3, 2))),
    "110": Facet((1, 1, 0), (5, 6), 2, ((1, 2), (2, 2))),
    "211": Facet((2, 1, 1), (9, 12), 3, ((1, 1), (1, 2))),
}

_ATOP = (0.0, 0.0, 0.0)
ADSORBATES: dict[str, tuple[str, list[tuple[float, float, float]]]] = {
    "H": ("H", [_ATOP]),
    "C": ("C", [_ATOP]),
    "N": ("N", [_ATOP]),
    "O": ("O", [_ATOP]),
    "CH": ("CH", [_ATOP, (0, 0, 1.09)]),
    "CH2": ("CHH", [_ATOP, (0.9, 0, 0.6), (-0.9, 0, 0.6)]),
    "CH3": ("CHHH", [_ATOP, (1.03, 0, 0.37), (-0.515, 0.892, 0.37), (-0.515, -0.892, 0.37)]),
    "NH": ("NH", [_ATOP, (0, 0, 1.04)]),
    "NH2": ("NHH", [_ATOP, (0.83, 0, 0.6), (-0.83, 0, 0.6)]),
    "NH3": ("NHHH", [_ATOP, (0.95, 0, 0.37), (-0.475, 0.823, 0.37), (-0.475, -0.823, 0.37)]),
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


class SlabSpec(NamedTuple):
    """What defines a clean slab; `strain` holds the in-plane strains xx, yy and xy."""

    composition: str
    facet: str
    layers: int
    repeat: tuple[int, int]
    termination: int
    strain: tuple[float, float, float]


class Trajectory(NamedTuple):
    """A relaxation: positions (T, N, 3), energies (T,), forces (T, N, 3), also on fixed atoms."""

    positions: Array
    energies: Array
    forces: Array


class System(NamedTuple):
    """An adsorbate (the last atoms) relaxed on a slab."""

    spec: SlabSpec
    adsorbate: str  # name in `ADSORBATES`
    rotation: float  # angle about z by which all of it has been turned
    atoms: ase.Atoms  # the initial structure with tags and constraints
    trajectory: Trajectory
    reference: float  # energy of the relaxed clean slab and of the adsorbate's elements in the gas phase


@cache
def gas_references() -> dict[str, float]:
    """Energy per atom (eV) of H, C, N and O taken from relaxed H2, N2, H2O and CO."""
    energy = {}
    for name in ("H2", "N2", "H2O", "CO"):
        gas = molecule(name, vacuum=8.0)
        gas.calc = PairEMT()
        LBFGS(gas, logfile=None).run(fmax=0.005)
        energy[name] = float(gas.get_potential_energy())
    oxygen = energy["H2O"] - energy["H2"]
    return {"H": energy["H2"] / 2, "N": energy["N2"] / 2, "O": oxygen, "C": energy["CO"] - oxygen}


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


def draw_slab(rng: np.random.Generator, compositions: Sequence[str]) -> SlabSpec:
    """Draw what defines a slab; one in four is not strained."""
    composition, facet = str(rng.choice(compositions)), str(rng.choice(list(FACETS)))
    strained = rng.random() < 0.75
    strain = rng.uniform(-1, 1, size=3) * (0.05, 0.05, 0.02) * strained
    layers, repeats = FACETS[facet].layers, FACETS[facet].repeats
    return SlabSpec(
        composition=composition,
        facet=facet,
        layers=int(rng.choice(layers)),
        repeat=repeats[int(rng.integers(len(repeats)))],
        termination=int(rng.integers(4)),
        strain=tuple(strain.tolist()),
    )


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


def relax(atoms: ase.Atoms, springs: Sequence[Spring] = ()) -> Trajectory | None:
    """Relax in place and return every step; None if that does not converge."""
    atoms.calc = PairEMT(springs)
    steps, converged = [], False
    for done in LBFGS(atoms, logfile=None, memory=30).irun(fmax=_FORCE_MAX, steps=_MAX_STEPS):
        converged = bool(done)
        forces = atoms.get_forces(apply_constraint=False)
        steps.append((atoms.get_positions(), atoms.get_potential_energy(), forces))
    atoms.calc = None
    return Trajectory(*map(np.array, zip(*steps, strict=True))) if converged else None


def relaxed_slab(spec: SlabSpec) -> tuple[ase.Atoms, float] | None:
    """The relaxed clean slab and its energy, None if it does not converge."""
    slab = build_slab(spec)
    trajectory = relax(slab)
    return None if trajectory is None else (slab, float(trajectory.energies[-1]))


# Adsorbates


def bonds(adsorbate: ase.Atoms) -> list[Spring]:
    """Pairs of atoms closer than 1.25 times the sum of their radii, and their distance."""
    radii = covalent_radii[adsorbate.numbers]
    pairs = [(a, b, float(adsorbate.get_distance(a, b))) for a, b in combinations(range(len(adsorbate)), 2)]
    return [(a, b, length) for a, b, length in pairs if length < _BOND_FACTOR * (radii[a] + radii[b])]


def bond_springs(name: str, first_atom: int = 0) -> list[Spring]:
    """The springs on the bonds of an adsorbate whose atoms are numbered from `first_atom`."""
    found = bonds(ase.Atoms(*ADSORBATES[name]))
    return [(first_atom + a, first_atom + b, SPRING_START * length) for a, b, length in found]


@cache
def free_adsorbate(name: str) -> ase.Atoms:
    """An adsorbate relaxed on its own (one atom: as it is), its first atom at the origin."""
    adsorbate = ase.Atoms(*ADSORBATES[name])
    adsorbate.set_tags(2)
    if len(adsorbate) > 1:
        relax(adsorbate, bond_springs(name))
        adsorbate.positions -= adsorbate.positions[0]
    return adsorbate


def place(slab: ase.Atoms, name: str, rng: np.random.Generator) -> ase.Atoms:
    """Put an adsorbate near an atop, bridge or hollow site, randomly turned and slightly tilted, just touching it."""
    adsorbate = free_adsorbate(name).copy()
    adsorbate.rotate(rng.uniform(0, 360), "z")
    adsorbate.rotate(rng.uniform(0, 10), "x")
    adsorbate.rotate(rng.uniform(0, 360), "z")
    images = slab.repeat((3, 3, 1))
    images.positions -= slab.cell.array[:2].sum(axis=0)

    # The site is the centre of 1 to 4 neighbouring surface atoms.
    surface_atoms = images.positions[images.get_tags() == 1, :2]
    somewhere = rng.random(2) @ slab.cell.array[:2, :2]
    nearest = np.square(surface_atoms - somewhere).sum(axis=1).argsort()
    site = surface_atoms[nearest[: int(rng.integers(1, 5))]].mean(axis=0)
    adsorbate.positions[:, :2] += site + rng.normal(scale=0.05, size=2)

    # At least 0.5 A above its neighbours, or a small atom would start inside a hollow.
    aside = cdist(adsorbate.positions[:, :2], images.positions[:, :2], "sqeuclidean")
    contact = _contact_radii(adsorbate)[:, None] + _contact_radii(images)
    touching = images.positions[:, 2] + np.sqrt(np.maximum(np.square(contact) - aside, 0.25))
    heights = (touching - adsorbate.positions[:, 2:])[aside < 2.2**2]
    adsorbate.positions[:, 2] += heights.max() + rng.uniform(0.0, 0.3)
    system = slab + adsorbate
    system.set_constraint(FixAtoms(mask=system.get_tags() == 0))
    return system


def _contact_radii(atoms: ase.Atoms) -> Array:
    """Covalent radii, with 0.7 A for hydrogen, which EMT keeps 2 A away from metals."""
    return np.where(atoms.numbers == 1, 0.7, covalent_radii[atoms.numbers])


def is_usable(initial: ase.Atoms, relaxed: ase.Atoms) -> bool:
    """Whether a relaxed system has none of OC20's anomalies.

    No bond of the adsorbate broke or formed, it is still on the surface and not below it, and no atom of the slab has
    moved by more than 1 A from `initial`, where the adsorbate is placed on the **relaxed** clean slab.
    """
    tags = relaxed.get_tags()
    on_slab, adsorbed = np.flatnonzero(tags != 2), np.flatnonzero(tags == 2)
    radii = covalent_radii[relaxed.numbers]
    distances = relaxed.get_all_distances(mic=True)[np.ix_(adsorbed, on_slab)]
    touches = (distances <= _DESORBED_FACTOR * (radii[adsorbed][:, None] + radii[on_slab])).any()
    depth = initial.positions[tags == 1, 2].min() - relaxed.positions[adsorbed, 2].min()
    moves = np.linalg.norm((relaxed.positions - initial.positions)[on_slab], axis=1)
    before, after = ([bond[:2] for bond in bonds(atoms[adsorbed])] for atoms in (initial, relaxed))
    return bool(before == after and touches and depth <= _MAX_DEPTH and moves.max() <= _MAX_SLAB_MOVE)


def make_system(
    spec: SlabSpec, slab: ase.Atoms, slab_energy: float, name: str, rng: np.random.Generator
) -> System | None:
    """Place an adsorbate, turn every other system about z, and relax; None if the result cannot be used."""
    initial = place(slab, name, rng)
    rotation = float(rng.uniform(0.0, 2 * np.pi) * (rng.random() < 0.5))
    initial.rotate(np.degrees(rotation), "z", rotate_cell=True)
    relaxed = initial.copy()
    trajectory = relax(relaxed, bond_springs(name, first_atom=len(slab)))
    if trajectory is None or not is_usable(initial, relaxed):
        return None
    reference = slab_energy + sum(gas_references()[symbol] for symbol in initial.symbols[len(slab) :])
    return System(spec, name, rotation, initial, trajectory, reference)


def rattled_frames(system: System, number: int, rng: np.random.Generator) -> Iterator[tuple[int, Array, float, Array]]:
    """At most `number` steps of the relaxation that differ, with free atoms moved: step, positions, energy, forces.

    One step at random in each equal part of the way, which is the sum of all atomic displacements, so the many last
    steps that hardly move an atom do not crowd out the first ones. Rattled, as some of OC20's structures are, because
    the forces of a relaxation are small and their signs depend on hundredths of an Angstrom: too much to learn in
    minutes.
    """
    positions = system.trajectory.positions
    moves = np.linalg.norm(np.diff(positions, axis=0), axis=2).sum(axis=1)
    way = np.concatenate([[0.0], np.cumsum(moves)])
    aims = (np.arange(number) + rng.random(number)) / number * way[-1]
    atoms = system.atoms.copy()
    atoms.calc = PairEMT(bond_springs(system.adsorbate, len(atoms) - len(ADSORBATES[system.adsorbate][0])))
    free = atoms.get_tags() > 0
    for step in sorted({int(np.abs(way - aim).argmin()) for aim in aims}):
        moved = positions[step].copy()
        moved[free] += rng.normal(0.0, RATTLE, (free.sum(), 3))
        atoms.set_positions(moved, apply_constraint=False)
        yield step, moved, atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
