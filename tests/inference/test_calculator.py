"""The ASE calculator: the numbers of validation, any Atoms, no stale state, clear errors."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.constraints import FixAtoms
from torch.utils.data import DataLoader

import small_runs
from faenet_ocp import build
from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.config.schema import SourceConfig
from faenet_ocp.data.loader import collate
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.evaluation.validation import run_split
from faenet_ocp.inference.calculator import FAENetCalculator, Predictor, atoms_to_data
from faenet_ocp.launch.cli import main

SPLITS = {"is2re": "is2re/all/val_id", "s2ef": "s2ef/all/val_id"}
slab = small_runs.slab


@pytest.fixture(scope="module")
def checkpoints(small_is2re: Path, small_s2ef: Path) -> dict[str, Path]:
    return {task: small_runs.train(task, root) for task, root in (("is2re", small_is2re), ("s2ef", small_s2ef))}


@pytest.fixture
def is2re(checkpoints: dict[str, Path]) -> dict[str, Any]:
    return load_checkpoint(checkpoints["is2re"])


@pytest.fixture
def s2ef(checkpoints: dict[str, Path]) -> dict[str, Any]:
    return load_checkpoint(checkpoints["s2ef"])


@pytest.fixture
def s2ef_without_subsurface(s2ef: dict[str, Any]) -> dict[str, Any]:
    s2ef["config"]["dataset"]["transforms"] = {"remove_subsurface": {}}
    return s2ef


def _structures(source: Path) -> list[ase.Atoms]:
    """The records of an LMDB as Atoms, without the code under test."""
    samples = OC20LmdbDataset({"src": str(source), "edges": "none", "labels": []})
    return [
        ase.Atoms(
            numbers=sample.atomic_numbers.numpy(),
            positions=sample.pos.numpy(),
            cell=sample.cell[0].numpy(),
            pbc=True,
            tags=sample.tags.numpy(),
            constraint=FixAtoms(np.flatnonzero(sample.fixed.numpy())),
        )
        for sample in samples
    ]


def _validated(predictor: Predictor, root: Path, source: str, *, edges: str) -> np.ndarray:
    """Energies by way of data set, loader and validation."""
    dataset = predictor.config.dataset.model_copy(update={"root": str(root), "edges": edges})
    samples = build.make_dataset(predictor.config.model_copy(update={"dataset": dataset}), SourceConfig(src=source))
    loader = DataLoader(samples, batch_size=3, collate_fn=collate)
    return run_split(predictor.model, predictor.tasks, loader, split="test").predictions["energy"]


# ------------------------------------------------------------------------------------ same numbers
@pytest.mark.parametrize("frames", ["canonical", "full", "det"])
@pytest.mark.parametrize("task", ["is2re", "s2ef"])
def test_energies_of_validation(
    checkpoints: dict[str, Path], small_is2re: Path, small_s2ef: Path, task: str, frames: str
) -> None:
    root = {"is2re": small_is2re, "s2ef": small_s2ef}[task]
    calculator = FAENetCalculator.from_checkpoint(checkpoints[task], device="cpu", frames=frames)
    energies = [calculator.get_potential_energy(atoms) for atoms in _structures(root / SPLITS[task])]
    expected = _validated(calculator.predictor, root, SPLITS[task], edges="stored")
    np.testing.assert_allclose(energies, expected, rtol=0, atol=1e-5)
    assert np.std(energies) > 1e-3


@pytest.mark.parametrize("frames", ["canonical", "full"])
def test_metrics_of_the_command_line(
    checkpoints: dict[str, Path], small_s2ef: Path, tmp_path: Path, frames: str
) -> None:
    """Energy and force errors by `--mode validate`, and by hand from the calculator."""
    arguments = ["--mode", "validate", "--checkpoint", str(checkpoints["s2ef"]), "--run-dir", str(tmp_path)]
    assert main([*arguments, "--identifier", "check", f"--frames.eval_method={frames}"]) == 0
    reported = json.loads((tmp_path / "check" / "results" / "metrics.json").read_text())["splits"]["val_id"]
    calculator = FAENetCalculator.from_checkpoint(checkpoints["s2ef"], frames=frames)
    labels = OC20LmdbDataset({"src": str(small_s2ef / SPLITS["s2ef"]), "edges": "none", "labels": ["energy", "forces"]})
    energy_errors, force_errors = [], []
    for atoms, label in zip(_structures(small_s2ef / SPLITS["s2ef"]), labels, strict=True):
        atoms.calc = calculator
        energy_errors.append(abs(atoms.get_potential_energy() - float(label.energy)))
        free = label.fixed.numpy() == 0
        force_errors.append(np.abs(atoms.get_forces(apply_constraint=False) - label.forces.numpy())[free])
    assert np.mean(energy_errors) == pytest.approx(reported["energy_mae"], abs=1e-5)
    assert np.concatenate(force_errors).mean() == pytest.approx(reported["forces_mae"], abs=1e-5)


@pytest.mark.parametrize("task", ["is2re", "s2ef"])
def test_energies_of_validation_on_the_sample(checkpoints: dict[str, Path], oc20_sample: Path, task: str) -> None:
    """With edges that are recomputed all energies agree; stored ones have shells cut at 50 neighbours."""
    predictor = Predictor(load_checkpoint(checkpoints[task]), frames="full")
    energies = np.array([prediction.energy for prediction in predictor(_structures(oc20_sample / SPLITS[task]))])
    recomputed = _validated(predictor, oc20_sample, SPLITS[task], edges="recompute")
    np.testing.assert_allclose(energies, recomputed, rtol=0, atol=1e-5)
    stored = _validated(predictor, oc20_sample, SPLITS[task], edges="stored")
    limits = {"src": str(oc20_sample / SPLITS[task]), "cutoff": 6.0, "max_neighbors": 40, "labels": []}
    pairs = zip(
        OC20LmdbDataset(limits | {"edges": "stored"}), OC20LmdbDataset(limits | {"edges": "recompute"}), strict=True
    )
    same = np.array([int(a.nedges) == int(b.nedges) for a, b in pairs])
    assert same.any()
    np.testing.assert_allclose(energies[same], stored[same], rtol=0, atol=1e-5)


def test_structures_do_not_depend_on_each_other(s2ef: dict[str, Any]) -> None:
    predictor = Predictor(s2ef, precision="float64")
    structures = [slab(0), molecule("H2O"), slab(1), slab(2, layers=4), ase.Atoms("O")]
    for together, atoms in zip(predictor(structures), structures, strict=True):
        (alone,) = predictor([atoms])
        assert together.energy == pytest.approx(alone.energy, abs=1e-10)
        np.testing.assert_allclose(together.forces, alone.forces, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------ any Atoms
def test_a_slab_in_vacuum_needs_no_third_periodic_direction(s2ef: dict[str, Any]) -> None:
    predictor = Predictor(s2ef)
    whole, partly, flat = slab(), slab(), slab()
    partly.pbc = (True, True, False)
    flat.pbc = (True, True, False)
    flat.cell[2] = 0
    energies = [predictor([atoms])[0].energy for atoms in (whole, partly, flat)]
    np.testing.assert_allclose(energies, energies[0], rtol=0, atol=1e-6)
    other = slab()
    other.pbc = (True, False, False)
    assert abs(predictor([other])[0].energy - energies[0]) > 1e-4


def test_molecules_need_no_cell(s2ef: dict[str, Any]) -> None:
    calculator = FAENetCalculator(Predictor(s2ef))
    free = molecule("CH3OH", tags=2)
    boxed = molecule("CH3OH", tags=2, cell=[40, 40, 40], pbc=True)
    energies, forces = [], []
    for atoms in (free, boxed):
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
    assert energies[0] == pytest.approx(energies[1], abs=1e-6)
    np.testing.assert_allclose(forces[0], forces[1], rtol=0, atol=1e-6)
    assert forces[0].shape == (6, 3)


@pytest.mark.parametrize("task", ["is2re", "s2ef"])
@pytest.mark.parametrize("cell", [None, [3.0, 3.0, 3.0]])
def test_one_atom(checkpoints: dict[str, Path], task: str, cell: list[float] | None) -> None:
    atoms = ase.Atoms("Cu", cell=cell, pbc=cell is not None, tags=[2])
    atoms.calc = FAENetCalculator.from_checkpoint(checkpoints[task])
    assert np.isfinite(atoms.get_potential_energy())
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    if task == "s2ef":
        assert np.isfinite(atoms.get_forces()).all()


def test_positions_are_not_wrapped(s2ef: dict[str, Any]) -> None:
    """Frames follow the positions: the sample is what the data set would make of them."""
    atoms = slab()
    atoms.positions[-1] += atoms.cell[0]
    data = atoms_to_data(atoms, cutoff=6.0, max_neighbors=40)
    np.testing.assert_allclose(data.pos.numpy(), atoms.positions, rtol=0, atol=1e-5)
    vectors = data.pos[data.edge_index[0]] - data.pos[data.edge_index[1]] + data.cell_offsets @ data.cell[0]
    assert vectors.norm(dim=1).max() < 6.001


def test_energy_is_invariant_in_double_precision(s2ef: dict[str, Any]) -> None:
    angle = 0.7
    rotation = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    errors = {}
    for frames in ("canonical", "full", "none"):
        predictor = Predictor(s2ef, frames=frames, precision="float64")
        atoms, turned = slab(3), slab(3)
        turned.set_cell(atoms.cell.array @ rotation)
        turned.positions = atoms.positions @ rotation
        before, after = predictor([atoms, turned])
        difference = np.abs(after.forces - before.forces @ rotation).max()
        errors[frames] = max(abs(before.energy - after.energy), difference)
    assert errors["canonical"] < 1e-9
    assert errors["full"] < 1e-9
    assert errors["none"] > 1e-4


def test_precision(s2ef: dict[str, Any]) -> None:
    single, double = (Predictor(s2ef, precision=name)([slab()])[0] for name in ("float32", "float64"))
    assert 0 < abs(single.energy - double.energy) < 1e-4
    np.testing.assert_allclose(single.forces, double.forces, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------ forces
def test_energy_checkpoints_say_why_they_have_no_forces(checkpoints: dict[str, Path]) -> None:
    atoms = slab()
    atoms.calc = FAENetCalculator.from_checkpoint(checkpoints["is2re"])
    assert np.isfinite(atoms.get_potential_energy())
    with pytest.raises(PropertyNotImplementedError, match="trained for IS2RE and predicts energy only"):
        atoms.get_forces()
    with pytest.raises(ValueError, match="predicts no forces"):
        FAENetCalculator.from_checkpoint(checkpoints["is2re"], forces="energy_gradient")


@pytest.mark.parametrize("transforms", [{}, {"remove_subsurface": {}}])
@pytest.mark.parametrize("frames", ["canonical", "full"])
def test_gradient_forces_are_the_slope_of_the_energy(s2ef: dict[str, Any], transforms: dict, frames: str) -> None:
    s2ef["config"]["dataset"]["transforms"] = transforms
    predictor = Predictor(s2ef, frames=frames, forces="energy_gradient", precision="float64")
    atoms, step = slab(1), 1e-4
    forces = predictor([atoms])[0].forces
    for atom, axis in ((len(atoms) - 1, 0), (len(atoms) - 1, 2), (9, 1)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * step
            energies.append(predictor([moved])[0].energy)
        slope = (energies[0] - energies[1]) / (2 * step)
        assert forces[atom, axis] == pytest.approx(-slope, abs=1e-6)
    direct = Predictor(s2ef, frames=frames, precision="float64")([atoms])[0].forces
    assert np.abs(direct - forces).max() > 1e-3


def test_atoms_that_the_model_does_not_see(
    s2ef_without_subsurface: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    atoms = slab(1)
    removed = atoms.get_tags() == 0
    atoms.calc = FAENetCalculator(Predictor(s2ef_without_subsurface))
    forces = atoms.get_forces(apply_constraint=False)
    assert (forces[removed] == 0).all()
    assert (np.abs(forces[~removed]).max(axis=1) > 0).all()
    assert "not all of these atoms are fixed" not in caplog.text
    atoms.set_constraint()
    for shift in (0.01, 0.02):
        atoms.positions[-1, 2] += shift
        atoms.get_forces()
    assert caplog.text.count("not all of these atoms are fixed") == 1


def test_the_net_force_is_taken_out_where_no_fixed_atom_is_seen(
    s2ef: dict[str, Any], s2ef_without_subsurface: dict[str, Any]
) -> None:
    held, free = slab(1), slab(2)
    held.set_constraint(FixAtoms(np.flatnonzero(held.get_tags() < 2)))
    kept, removed = (
        Predictor(s2ef_without_subsurface, precision="float64", keep_net_force=keep)([held, free, slab(3)])
        for keep in (True, False)
    )
    np.testing.assert_array_equal(removed[0].forces, kept[0].forces)
    for before, after in zip(kept[1:], removed[1:], strict=True):
        mean = before.forces[before.seen].mean(axis=0)
        assert np.abs(mean).max() > 1e-3
        np.testing.assert_allclose(after.forces[after.seen], before.forces[before.seen] - mean, rtol=0, atol=1e-12)
        assert not after.forces[~after.seen].any()


# ------------------------------------------------------------------------------------ state
def test_nothing_is_stale_along_a_path(s2ef: dict[str, Any]) -> None:
    """One calculator through every kind of change gives what a new one gives."""

    def move(atoms: ase.Atoms) -> None:
        atoms.positions[-1] += (0.3, -0.2, 0.9)

    def strain(atoms: ase.Atoms) -> None:
        atoms.set_cell(atoms.cell.array * 1.05, scale_atoms=True)

    def open_boundary(atoms: ase.Atoms) -> None:
        atoms.pbc = (True, True, False)

    def exchange(atoms: ase.Atoms) -> None:
        atoms.numbers[0] = 46

    def retag(atoms: ase.Atoms) -> None:
        atoms.set_tags([2] * len(atoms))

    calculator, atoms = FAENetCalculator(Predictor(s2ef)), slab(2)
    before = calculator.get_potential_energy(atoms)
    changes: list[Callable[[ase.Atoms], None]] = [move, move, strain, open_boundary, exchange, retag, move]
    for change in changes:
        change(atoms)
        expected = FAENetCalculator(Predictor(s2ef)).get_potential_energy(atoms)
        energy = calculator.get_potential_energy(atoms)
        assert energy == pytest.approx(expected, abs=1e-6)
        assert change is open_boundary or abs(energy - before) > 1e-6
        before = energy


def test_nothing_is_computed_twice(s2ef: dict[str, Any]) -> None:
    calculator, atoms, calls = FAENetCalculator(Predictor(s2ef)), slab(), []
    calculator.predictor.model.register_forward_pre_hook(lambda *_: calls.append(1))
    atoms.calc = calculator
    atoms.get_potential_energy()
    atoms.get_forces()
    assert len(calls) == 1
    atoms.set_tags(2)
    atoms.get_potential_energy()
    assert len(calls) == 2


def test_stochastic_frames_have_their_own_generator(s2ef: dict[str, Any]) -> None:
    structures = [slab(i) for i in range(3)]

    def path(seed: int) -> list[float]:
        predictor = Predictor(s2ef, frames="stochastic", seed=seed)
        return [prediction.energy for _ in range(4) for prediction in predictor(structures)]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = path(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert path(1) == first
    assert path(2) != first
    assert len(set(first)) > len(structures)


def test_stochastic_checkpoints_are_used_with_canonical_frames(s2ef: dict[str, Any]) -> None:
    assert s2ef["config"]["frames"]["method"] == "stochastic"
    assert Predictor(s2ef).config.frames.evaluation_method == "canonical"
    s2ef["config"]["frames"]["eval_method"] = "full"
    assert Predictor(s2ef).config.frames.evaluation_method == "full"


# ------------------------------------------------------------------------------------ errors
def _nan() -> ase.Atoms:
    atoms = slab()
    atoms.positions[4, 1] = np.nan
    return atoms


def _flat_cell() -> ase.Atoms:
    return ase.Atoms("Cu", cell=[3, 3, 0], pbc=True, tags=[1])


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (ase.Atoms(), "no atoms"),
        (_nan(), r"positions of atoms \[4\] are not finite"),
        (ase.Atoms("XH", positions=[[0, 0, 0], [1, 0, 0]], tags=[2, 2]), "does not know element 0"),
        (ase.Atoms(numbers=[8, 121], positions=[[0, 0, 0], [1, 0, 0]], tags=[2, 2]), "does not know element 121"),
        (ase.build.fcc111("Cu", (1, 1, 4), vacuum=5), r"tags \[3, 4\] are not among OC20's; set OC20's tags"),
        (_flat_cell(), "span no cell"),
    ],
)
def test_structures_that_no_model_can_take(s2ef: dict[str, Any], atoms: ase.Atoms, message: str) -> None:
    atoms.info["sid"] = "17"
    with pytest.raises(ValueError, match=rf"^structure of {len(atoms)} atoms \(sid 17\): .*{message}"):
        Predictor(s2ef)([slab(), atoms])


def test_elements_that_the_model_does_not_know(s2ef: dict[str, Any]) -> None:
    (name,) = (name for name in s2ef["model"] if name.endswith("known_elements"))
    s2ef["model"][name][[29, 78]] = False
    with pytest.raises(ValueError, match=r"does not know element 29 \(Cu\), element 78 \(Pt\)"):
        Predictor(s2ef)([ase.Atoms("OPtCu", positions=np.eye(3) * 2, tags=[2, 1, 1])])


def test_a_slab_without_tags(s2ef: dict[str, Any], is2re: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    atoms = slab()
    atoms.set_tags(0)
    with pytest.raises(ValueError, match=r"all tags are 0 .*remove_subsurface.*atoms\.set_tags"):
        Predictor(is2re)([atoms])
    predictor = Predictor(s2ef)
    predictor([atoms])
    predictor([atoms])
    assert caplog.text.count("all tags are 0, so the model takes every atom for one below the surface") == 1


def test_elements_outside_the_training_set_are_said(s2ef: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    predictor = Predictor(s2ef)
    with caplog.at_level(logging.WARNING):
        predictor([slab()])
        assert "training set" not in caplog.text
        predictor([molecule("N2", tags=2)])
        predictor([molecule("N2", tags=2)])
    assert caplog.text.count("N2: has elements that the training set did not have") == 1


def test_transforms_that_move_atoms_are_refused(s2ef: dict[str, Any]) -> None:
    s2ef["config"]["dataset"]["transforms"] = {"data_augmentation": {"dim": 3}}
    with pytest.raises(ValueError, match="moves atoms"):
        Predictor(s2ef)([slab()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": "canonicle"}, "frames: 'canonicle' is not known; did you mean canonical"),
        ({"precision": "float16"}, "precision: 'float16' is not known"),
        ({"forces": "gradient"}, "forces: 'gradient' is not known; did you mean energy_gradient"),
        ({"forces": "energy_gradient", "frames": "stochastic"}, "change from call to call"),
    ],
)
def test_options(s2ef: dict[str, Any], options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(copy.deepcopy(s2ef), **options)
