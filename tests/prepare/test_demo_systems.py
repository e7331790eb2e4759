"""Slabs, adsorbates and the potential behind the demo data, against ASE's own EMT."""

import itertools
from collections import Counter

import ase
import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.constraints import Hookean
from ase.neighborlist import neighbor_list

from faenet_ocp.prepare.demo.emt import PairEMT, Spring
from faenet_ocp.prepare.demo.files import pick_frames
from faenet_ocp.prepare.demo.systems import (
    ADSORBATES,
    COMPOSITIONS,
    FACETS,
    SlabSpec,
    Trajectory,
    bond_springs,
    build_slab,
    bulk,
    draw_slab,
    make_system,
    place,
    rattled,
    relax,
    relaxed_slab,
    why_unusable,
)


def clean_slab(composition: str = "Cu", facet: str = "111") -> ase.Atoms:
    options = FACETS[facet]
    no_strain = (0.0, 0.0, 0.0)
    spec = SlabSpec(composition, facet, options.layers[0], options.repeats[0], 0, no_strain)
    return build_slab(spec)


def test_springs_hold_what_emt_alone_would_break() -> None:
    slab = clean_slab()
    relax(slab)
    outcomes: dict[str, list[str | None]] = {"springs": [], "no springs": []}
    for name, seed in itertools.product(("OH", "CH2", "NH2"), range(3)):
        initial = place(slab, name, np.random.default_rng(seed))
        for kind, springs in (("springs", bond_springs(name, len(slab))), ("no springs", ())):
            relaxed = initial.copy()
            outcomes[kind].append(why_unusable(initial, relaxed, relax(relaxed, springs)))
    assert outcomes["springs"] == [None] * 9
    assert outcomes["no springs"].count("bonds changed") >= 6


def test_pair_emt_is_ases_emt() -> None:
    """On what it is used for and beyond: after moves, changed cells, elements and periodicity."""
    rng = np.random.default_rng(0)
    atoms = place(clean_slab("Cu3Pt", "211"), "CHOH", rng)
    atoms.set_constraint()
    atoms.calc = PairEMT()

    def compare() -> None:
        reference = atoms.copy()
        reference.calc = EMT()
        assert atoms.get_potential_energy() == pytest.approx(reference.get_potential_energy(), abs=1e-9)
        assert atoms.get_forces() == pytest.approx(reference.get_forces(), abs=1e-9)

    compare()
    for step in (0.01, 0.01, 0.1, 0.5):  # below and above the skin of the neighbour list
        atoms.positions += rng.normal(scale=step, size=atoms.positions.shape)
        compare()
    atoms.set_cell(atoms.cell.array @ [[1.02, 0, 0], [0.01, 0.97, 0], [0, 0, 1]])
    compare()
    atoms.pbc = (True, False, False)
    compare()
    atoms.numbers[:5] = 47
    compare()
    atoms = bulk("AlNi").copy()  # every atom has images of itself for neighbours
    atoms.rattle(0.05, seed=1)
    atoms.calc = PairEMT()
    compare()
    atoms = ase.Atoms("CuO", positions=[(0, 0, 0), (0, 0, 30)])  # no neighbours at all
    atoms.calc = PairEMT()
    compare()


def test_springs_of_pair_emt_are_hookean() -> None:
    atoms = ase.Atoms("OH", positions=[(0, 0, 0), (0.3, 0.4, 1.2)])
    for start in (1.0, 2.0):  # pulling, not pulling
        atoms.set_constraint()
        atoms.calc = PairEMT([Spring(0, 1, start)])
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = EMT()
        plain = atoms.get_potential_energy()
        atoms.set_constraint(Hookean(0, 1, 15.0, start))
        assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        assert forces == pytest.approx(atoms.get_forces(), abs=1e-9)
        assert (energy > plain + 0.1) == (start == 1.0)


def test_slabs() -> None:
    """Planes, tags, fixed atoms, stoichiometry, bond lengths and strain of every kind of slab."""
    for composition, facet in itertools.product(("Pd", "Cu3Au", "AlCu"), FACETS):
        options = FACETS[facet]
        for layers, repeat in itertools.product(options.layers, options.repeats):
            spec = SlabSpec(composition, facet, layers, repeat, 1, (0.0, 0.0, 0.0))
            slab = build_slab(spec)
            heights = np.unique(slab.positions[:, 2].round(3))
            assert len(heights) == layers
            assert slab.pbc.all() and 15 < len(slab) < 70
            top = slab.positions[:, 2] > heights[-options.surface_layers] - 1e-2
            assert np.array_equal(slab.get_tags(), top.astype(int))
            fixed = slab.constraints[0].index
            assert np.array_equal(np.sort(fixed), np.flatnonzero(~top))
            nearest = bulk(composition).cell[0, 0] / np.sqrt(2)
            distances = neighbor_list("d", slab, nearest + 0.1)
            assert distances == pytest.approx(nearest, abs=1e-3)
            lengths = np.linalg.norm(slab.cell.array[:2], axis=1)
            assert lengths.min() > 4.9
            strained = build_slab(spec._replace(strain=(0.04, -0.03, 0.01)))
            strain = np.linalg.solve(slab.cell.array[:2, :2], strained.cell.array[:2, :2])
            assert strain == pytest.approx(np.array([[1.04, 0.01], [0.01, 0.97]]))
            assert strained.positions[:, 2] == pytest.approx(slab.positions[:, 2])
            if layers % 4 == 0:  # whole periods of every ordered alloy
                shares = {symbol: 4 * n / len(slab) for symbol, n in Counter(slab.symbols).items()}
                assert shares == Counter(COMPOSITIONS[composition])


def test_bulk_is_at_its_minimum() -> None:
    for composition in ("Cu", "Pt3Al", "AgPd"):
        crystal = bulk(composition).copy()
        crystal.calc = EMT()
        assert abs(crystal.get_stress()[:3].mean()) < 1e-3


def test_adsorbate_starts_in_contact_and_upright() -> None:
    for facet, name, seed in itertools.product(FACETS, ("H", "CO", "NH2"), range(3)):
        slab = clean_slab("Ag", facet)
        system = place(slab, name, np.random.default_rng(seed))
        adsorbate = np.flatnonzero(system.get_tags() == 2)
        assert len(adsorbate) == len(ADSORBATES[name][0]) and adsorbate[0] == len(slab)
        distances = system.get_all_distances(mic=True)[adsorbate][:, : len(slab)]
        assert 1.5 < distances.min() < 3.0
        assert system.positions[adsorbate, 2].argmin() == 0


def test_unusable_systems_are_recognised() -> None:
    slab = clean_slab()
    initial = place(slab, "OH", np.random.default_rng(0))
    relaxed = initial.copy()
    trajectory = relax(relaxed, bond_springs("OH", len(slab)))
    oxygen, hydrogen = len(slab), len(slab) + 1
    assert why_unusable(initial, relaxed, trajectory) is None

    def moved(atoms: list[int], by: tuple[float, float, float]) -> ase.Atoms:
        copy = relaxed.copy()
        copy.positions[atoms] += by
        return copy

    surface_atom = int(np.flatnonzero(relaxed.get_tags() == 1)[0])
    for broken, reason in (
        (moved([oxygen, hydrogen], (0, 0, 4)), "desorbed"),
        (moved([hydrogen], (0, 0, 1)), "bonds changed"),
        (moved([oxygen, hydrogen], (0, 0, -3)), "below the surface"),
        (moved([surface_atom], (1.2, 0, 0)), "slab reconstructed"),
    ):
        assert why_unusable(initial, broken, trajectory) == reason
    unfinished = Trajectory(
        positions=trajectory.positions,
        energies=trajectory.energies,
        forces=trajectory.forces,
        converged=False,
    )
    assert why_unusable(initial, relaxed, unfinished) == "not converged"


def test_frames_lie_all_along_the_way() -> None:
    """Most steps of a relaxation hardly move an atom; evenly drawn steps would be nearly alike."""
    way = np.concatenate([np.linspace(0, 1, 11), 1 + 0.001 * np.arange(1, 100)])
    trajectory = Trajectory(
        positions=way[:, None, None] * np.ones((1, 5, 3)),
        energies=-way,
        forces=np.zeros((len(way), 5, 3)),
        converged=True,
    )
    picks = [pick_frames(trajectory, 4, np.random.default_rng(seed)) for seed in range(50)]
    assert all(pick == sorted(set(pick)) and len(pick) <= 4 for pick in picks)
    assert np.mean([step <= 10 for pick in picks for step in pick]) > 0.8
    assert len({tuple(pick) for pick in picks}) > 10
    assert 0 in {pick[0] for pick in picks}
    still = Trajectory(
        positions=np.zeros((1, 5, 3)),
        energies=np.zeros(1),
        forces=np.zeros((1, 5, 3)),
        converged=True,
    )
    assert pick_frames(still, 4, np.random.default_rng(0)) == [0]


def test_rattled_frames() -> None:
    """Free atoms of the named frames move, by the stated standard deviation; the rest stays as it is."""
    rng = np.random.default_rng(4)
    spec = draw_slab(rng, ["CuPd"], lambda spec: True)
    slab = relaxed_slab(spec)
    assert slab is not None
    system = make_system(spec, *slab, "O", rng)
    assert not isinstance(system, str)
    moved = rattled(system, range(1, len(system.trajectory.energies)), rng)
    moves = moved.trajectory.positions - system.trajectory.positions
    free = moved.atoms.get_tags() > 0
    assert not moves[0].any() and not moves[:, ~free].any()
    assert moves[1:, free].std() == pytest.approx(0.05, rel=0.1)
    assert moved.trajectory.energies[0] == system.trajectory.energies[0]
    step = np.zeros_like(moves[1])
    step[free] = 1e-4 * rng.normal(size=(free.sum(), 3))
    atoms = system.atoms.copy()
    atoms.calc = PairEMT(bond_springs("O", len(atoms) - 1))
    energies = []
    for sign in (1, -1):
        atoms.set_positions(moved.trajectory.positions[1] + sign * step, apply_constraint=False)
        energies.append(atoms.get_potential_energy())
    assert moved.trajectory.energies[1] == pytest.approx(np.mean(energies), abs=1e-5)
    assert energies[0] - energies[1] == pytest.approx(-2 * (moved.trajectory.forces[1] * step).sum(), rel=1e-4)
