"""Next to symmetry: energies without jumps, finite derivatives that are the slopes, in frames and in the norm."""

from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch
from ase.build import add_adsorbate, bulk, fcc100, fcc111, molecule
from ase.constraints import FixAtoms

from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.inference.calculator import Predictor

CHECKPOINT = Path(__file__).resolve().parents[1] / "golden" / "s2ef.pt"


def _slab(build: Any = fcc100, adsorbate: tuple[float, float] | None = None) -> ase.Atoms:
    """3 x 3, visible top layer; O on the central atom, or beside it by an offset in Angstrom."""
    atoms = build("Cu", (3, 3, 4), a=3.61, vacuum=8, periodic=True)
    atoms.set_tags(np.where(atoms.positions[:, 2] > atoms.positions[:, 2].max() - 0.5, 1, 0))
    if adsorbate is not None:
        top = np.flatnonzero(atoms.get_tags())
        centre = top[np.linalg.norm((atoms.positions - atoms.positions[top].mean(0))[top], axis=1).argmin()]
        add_adsorbate(atoms, "O", 1.9, position=tuple(atoms.positions[centre, :2] + adsorbate))
        atoms.set_tags([*atoms.get_tags()[:-1], 2])
    atoms.set_constraint(FixAtoms(np.flatnonzero(atoms.get_tags() == 0)))
    return atoms


def _structures() -> dict[str, ase.Atoms]:
    molecules = {name: molecule(name, tags=2) for name in ("CO", "N2", "CO2", "CH4", "NH3", "C6H6", "H2O")}
    lying = molecule("CO", tags=2)
    lying.rotate(90, "x")
    slabs = {"clean": _slab(), "top": _slab(adsorbate=(0, 0)), "beside": _slab(adsorbate=(1e-3, 4e-4))}
    return {**molecules, "lying CO": lying, "atom": ase.Atoms("O", tags=[2]), **slabs}


def _predictor(dim: int = 2, group: str = "SE", **options: Any) -> Predictor:
    """The golden checkpoint, without sub-surface atoms; its weights made larger, for forces of 0.1 to 1 eV/Angstrom."""
    state = load_checkpoint(CHECKPOINT)
    state["config"]["frames"] |= {"dim": dim, "group": group, "method": "canonical"}
    state["config"]["dataset"]["transforms"] = {"remove_subsurface": {}}
    predictor = Predictor(state, **{"forces": "energy_gradient", "precision": "float64", "device": "cpu", **options})
    for name, parameter in predictor.model.named_parameters():
        if name.endswith("weight") and parameter.dim() == 2:
            parameter.data *= 1.4
    return predictor


def _energies(predictor: Predictor, structures: list[ase.Atoms]) -> np.ndarray:
    return np.array([prediction.energy for prediction in predictor(structures)])


@pytest.mark.parametrize(("dim", "group"), [(2, "SE"), (2, "E"), (3, "SE")])
def test_gradient_forces_of_symmetric_structures_are_central_differences(dim: int, group: str) -> None:
    """Where axes are undefined the second derivative has no value, so the differences take a small step."""
    predictor, step = _predictor(dim, group), 1e-6
    structures = {name: atoms for name, atoms in _structures().items() if group == "SE" or len(atoms) < 6}
    for (name, atoms), prediction in zip(structures.items(), predictor(list(structures.values())), strict=True):
        assert np.isfinite(prediction.forces).all() and np.abs(prediction.forces).max() < 5, name
        moved = []
        for axis in range(2):
            for sign in (1, -1):
                moved.append(atoms.copy())
                moved[-1].positions[-1, axis] += sign * step
        energies = _energies(predictor, moved).reshape(2, 2)
        slope = (energies[:, 1] - energies[:, 0]) / (2 * step)
        np.testing.assert_allclose(prediction.forces[-1, :2], slope, rtol=0, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("method", ["canonical", "full", "det"])
def test_the_energy_does_not_follow_axes_that_turn_quickly(method: str) -> None:
    """O goes round the centre of a square slab, where principal axes turn by 180 degrees on a way of 6e-4 Angstrom."""
    predictor = _predictor(frames=method, forces="prediction")
    angles = np.linspace(0, 2 * np.pi, 7)
    circle = [_slab(adsorbate=(1e-4 * np.cos(angle), 1e-4 * np.sin(angle))) for angle in angles]
    assert np.ptp(_energies(predictor, circle)) < 1e-7


def test_the_training_gradient_of_symmetric_structures_is_finite() -> None:
    """Frames are constants there; the loss on -dE/dX is differentiated by the weights."""
    predictor = _predictor()
    predictor.model.train().requires_grad_(True)
    for name in ("CO", "NH3", "atom", "clean"):
        atoms = _structures()[name]
        batch = predictor.sample(atoms)
        batch.pos.requires_grad_(True)
        (energy,) = predictor.model(batch)["energy"]["energy"]
        (gradient,) = torch.autograd.grad(energy, batch.pos, create_graph=True)
        predictor.model.zero_grad()
        (gradient.square().sum() + energy).backward()
        assert gradient.isfinite().all()
        assert all(p.grad.isfinite().all() for p in predictor.model.parameters() if p.grad is not None)


def _equivalent() -> dict[str, ase.Atoms]:
    crystal = bulk("Cu", a=3.61, cubic=True)
    crystal.set_tags(1)
    return {"(111)": _slab(fcc111), "(100)": _slab(), "crystal": crystal, "dimer": molecule("N2", tags=2)}


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-5), ("float32", 1e-4)])
@pytest.mark.parametrize("name", _equivalent())
def test_equivalent_atoms_have_an_energy(name: str, precision: str, tolerance: float) -> None:
    """Permuted, shifted, and displaced by 1e-6 Angstrom; published GraphNorm makes 1 to 100 meV of it."""
    predictor, rng = _predictor(precision=precision), np.random.default_rng(0)
    atoms = _equivalent()[name]
    copies = [atoms]
    for _ in range(2):
        shifted, noisy = atoms.copy(), atoms.copy()
        shifted.positions += [*rng.uniform(-3, 3, size=2), 0]
        noisy.positions += rng.normal(size=noisy.positions.shape) * 1e-6
        copies += [atoms[rng.permutation(len(atoms))], shifted, noisy]
    predictions = predictor(copies)
    assert np.ptp([prediction.energy for prediction in predictions]) < tolerance
    assert max(np.abs(prediction.forces).max() for prediction in predictions) < 2


def test_forces_of_a_rattled_clean_slab_are_finite_and_sane() -> None:
    predictor, rng = _predictor(), np.random.default_rng(0)
    for amplitude in np.geomspace(1e-6, 0.1, 6):
        atoms = _slab(fcc111)
        atoms.positions += rng.normal(size=atoms.positions.shape) * amplitude
        (prediction,) = predictor([atoms])
        assert np.abs(prediction.forces).max() < 5, amplitude
