"""Units, references and the loss: against sums written out; the energy gradient against finite differences."""

import math
from pathlib import Path

import pytest
import torch
from fairchem.core.datasets.atomic_data import AtomicData

import processes
from faenet_ocp import build
from faenet_ocp.config.schema import build_config
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.frames import compute_frames
from faenet_ocp.tasks.losses import loss_mask, task_loss
from faenet_ocp.tasks.references import NUM_ELEMENTS, CompositionReferences, fit_labels
from faenet_ocp.tasks.tasks import (
    conservative_outputs,
    energy_gradient_forces,
    load_tasks_state,
    make_tasks,
    restore_tasks,
    tasks_state,
    to_physical,
)

CONFIG = {
    "trainer": "faenet",
    "task": "s2ef",
    "dataset": {},
    "model": processes.MODEL,
    "optim": {"lr_initial": 0.001, "batch_size": 1, "max_epochs": 1},
    "outputs": {"energy": {"normalizer": {"mean": -3.0, "stdev": 4.0}}, "forces": {"normalizer": {"stdev": 2.0}}},
    "loss_functions": [{"energy": {"coefficient": 3.0}}, {"forces": {"fn": "l2mae", "coefficient": 5.0}}],
    "job": {"precision": "float64"},
}


def _labelled(root: Path, count: int) -> AtomicData:
    """Labelled systems, of which every third atom is fixed."""
    settings = {"src": str(root / "s2ef" / "2M" / "train"), "labels": ["energy", "forces"], "dtype": "float64"}
    batch = OC20LmdbDataset(settings | {"cutoff": 5.0, "max_neighbors": 12}).load_batch([(0, i) for i in range(count)])
    batch.fixed = (torch.arange(len(batch.pos)) % 3 == 0).long()
    return batch


@pytest.fixture
def batch(small_s2ef: Path) -> AtomicData:
    return _labelled(small_s2ef, 12)


@pytest.fixture
def pair(small_s2ef: Path) -> AtomicData:
    return _labelled(small_s2ef, 2)


def _tasks(fits: dict | None = None, **sections: object) -> list:
    return make_tasks(build_config(CONFIG | sections), fits or {})


def _outputs(batch: AtomicData) -> dict:
    generator = torch.Generator().manual_seed(7)
    energy = torch.randn(len(batch.natoms), generator=generator, dtype=torch.float64)
    forces = torch.randn(len(batch.pos), 3, generator=generator, dtype=torch.float64)
    return {"energy": {"energy": energy}, "forces": {"forces": forces}}


def test_predictions_come_out_in_physical_units(batch: AtomicData) -> None:
    outputs = _outputs(batch)
    physical = to_physical(_tasks(), outputs, batch)
    torch.testing.assert_close(physical["energy"], outputs["energy"]["energy"] * 4.0 - 3.0)
    torch.testing.assert_close(physical["forces"], outputs["forces"]["forces"] * 2.0)


def test_losses_are_the_sums_of_equation_9(batch: AtomicData) -> None:
    tasks, outputs = _tasks(), _outputs(batch)
    energy, forces = (float(task_loss(task, outputs, batch)) for task in tasks)
    predicted, labels = outputs["energy"]["energy"].tolist(), batch.energy.tolist()
    expected_energy = sum(3.0 * abs(e - (label + 3.0) / 4.0) for e, label in zip(predicted, labels, strict=True))
    differences = (outputs["forces"]["forces"] - batch.forces / 2.0)[batch.fixed == 0].tolist()
    expected_forces = sum(5.0 * math.hypot(*difference) for difference in differences)
    assert energy == pytest.approx(expected_energy, rel=1e-12)
    assert forces == pytest.approx(expected_forces, rel=1e-12)
    counts = [float(task.loss_fn.num_terms(batch[task.name], loss_mask(task, batch))) for task in tasks]
    assert counts == [12, int((batch.fixed == 0).sum())]


@pytest.mark.parametrize(("fn", "expected"), [("mae", 3), ("mse", 3), ("l2mae", 1)])
def test_force_losses_count_components_or_atoms(batch: AtomicData, fn: str, expected: int) -> None:
    energy, forces = _tasks(loss_functions=[{"forces": {"fn": fn}}], outputs={"forces": {"train_on_free_atoms": False}})
    assert energy.loss_fn is None
    assert int(forces.loss_fn.num_terms(batch.forces, loss_mask(forces, batch))) == expected * len(batch.pos)
    difference = _outputs(batch)["forces"]["forces"] - batch.forces
    values = {"mae": difference.abs(), "mse": difference**2, "l2mae": difference.norm(dim=1)}[fn]
    torch.testing.assert_close(task_loss(forces, _outputs(batch), batch), values.sum())


def test_references_and_fitted_normalisers(batch: AtomicData) -> None:
    """Labels that are linear in composition plus a small rest become that rest, scaled to unit deviation.

    A declared scalar has no references, as it need not grow with the system: its own deviation is what is scaled to 1.
    """
    slope = torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch.energy = batch.composition.double() @ slope + 0.01 * batch.energy
    batch.gap = batch.pos.new_tensor([float(n) ** 2 for n in range(12)])
    fits = fit_labels([(batch.composition, {"energy": batch.energy, "gap": batch.gap})], ["energy", "gap"])
    outputs = {"energy": {"normalizer": "fit", "element_references": "fit"}, "gap": {"unit": "eV", "normalizer": "fit"}}
    config = build_config(CONFIG | {"outputs": outputs, "loss_functions": []})
    tasks = {task.name: task for task in make_tasks(config, fits)}
    left = batch.energy - batch.composition.double() @ fits["energy"].element_references()
    normalised = tasks["energy"].normalizer.norm(tasks["energy"].element_references.apply_refs(batch, batch.energy))
    gap = tasks["gap"].normalizer.norm(batch.gap)
    for found, values in ((normalised, left), (gap, batch.gap)):
        expected = (values - values.mean()) / values.std(unbiased=False)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    outputs = _outputs(batch) | {"energy": {"energy": normalised}, "gap": {"gap": gap}}
    for restored in (list(tasks.values()), restore_tasks(config, tasks_state(list(tasks.values())))):
        physical = to_physical(restored, outputs, batch)
        torch.testing.assert_close(physical["energy"], batch.energy, rtol=0, atol=1e-6)
        torch.testing.assert_close(physical["gap"], batch.gap, rtol=0, atol=1e-5)


def test_composition_is_counted_where_the_data_has_none(batch: AtomicData) -> None:
    references = CompositionReferences(torch.arange(NUM_ELEMENTS).double())
    expected = references.energy(batch)
    del batch["composition"]
    torch.testing.assert_close(references.energy(batch), expected)


def test_state_round_trip_and_mismatch() -> None:
    first, second = _tasks(outputs={"energy": {"normalizer": {"mean": 1.5, "stdev": 2.5}}}), _tasks()
    first[0].element_references = CompositionReferences(torch.arange(NUM_ELEMENTS).double())
    load_tasks_state(second, tasks_state(first))
    assert tasks_state(second) == tasks_state(first)
    with pytest.raises(ValueError, match="the checkpoint predicts energy, not forces"):
        load_tasks_state(second, {"energy": tasks_state(first)["energy"]})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"outputs": {"energy": {"level": "atom"}}}, "energy.level: energy is a property of the system"),
        ({"outputs": {"forces": {"normalizer": "fit"}}}, "forces.normalizer: fit: only for scalars of systems"),
        ({"outputs": {"gap": {"unit": "eV", "element_references": "fit"}}}, "only for what grows with the system"),
        ({"loss_functions": [{"energy": {"fn": "l2mae"}}]}, "loss_functions.energy.fn: l2mae is for vectors"),
    ],
)
def test_wrong_outputs_are_refused(sections: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _tasks(**sections)


@pytest.mark.parametrize("size", [1.0, -1e6])
def test_nothing_is_scaled_by_rounding_errors(batch: AtomicData, size: float) -> None:
    """Equal labels, or references that leave nothing over: few systems, or labels that are linear in composition."""
    for count, labels in (12, torch.ones(12)), (3, torch.tensor([1.0, 0.3, 0.7])), (12, batch.composition.sum(dim=1)):
        fits = fit_labels([(batch.composition[:count], {"energy": size * labels.double()})], ["energy"])
        output = {"normalizer": "fit"} if labels.std() == 0 else {"normalizer": "fit", "element_references": "fit"}
        message = f"all {count} training labels are equal" if labels.std() == 0 else "references reproduce all"
        with pytest.raises(ValueError, match=f"outputs.energy.normalizer: fit: .*{message}"):
            _tasks(fits, outputs={"energy": output})


# ------------------------------------------------------------------------------- energy conservation
def _model(method: str) -> torch.nn.Module:
    return build.make_model(build_config(CONFIG | {"frames": {"method": method}})).eval()


def _numerical_forces(model: torch.nn.Module, batch: AtomicData, atom: int, **options: bool) -> torch.Tensor:
    """-dE/dX of one atom by central differences, in eV/Angstrom units of the energy's normaliser (4 eV)."""
    step, forces = 1e-5, []
    for axis in range(3):
        energies = []
        for sign in (1, -1):
            moved = batch.clone()
            moved.pos[atom, axis] += sign * step
            with torch.no_grad():
                energies.append(model(moved, **options)["energy"]["energy"].sum() * 4.0)
        forces.append(-(energies[0] - energies[1]) / (2 * step))
    return torch.stack(forces)


@pytest.mark.parametrize("method", ["full", "canonical", "none"])
def test_conservative_forces_are_the_derivative_of_the_energy(pair: AtomicData, method: str) -> None:
    """Differentiated through the frames; the graph is constant in both."""
    tasks, model = _tasks(), _model(method)
    forces = to_physical(tasks, conservative_outputs(model, tasks, pair.clone()), pair)["forces"]
    for atom in (0, 5, 12, 20):
        numerical = _numerical_forces(model, pair, atom, through_frames=True)
        torch.testing.assert_close(forces[atom], numerical, rtol=1e-5, atol=1e-7)


def test_the_training_gradient_holds_frames_constant(pair: AtomicData) -> None:
    """With the frames in the batch the derivative is that at fixed frames, and differs from the one through them."""
    tasks, model = _tasks(), _model("canonical")
    frames = compute_frames(pair.pos, pair.batch, 2, atomic_numbers=pair.atomic_numbers, **model.frames)
    pair.frame_rot, pair.frame_weight = frames.rot, frames.weight
    given = pair.clone()
    given.pos.requires_grad_(True)
    forces = 2.0 * energy_gradient_forces(tasks, model(given), given.pos)
    through = to_physical(tasks, conservative_outputs(model, tasks, pair.clone()), pair)["forces"]
    assert (forces - through).abs().max() > 1e-4
    for atom in (0, 12, 20):
        torch.testing.assert_close(forces[atom], _numerical_forces(model, pair, atom), rtol=1e-5, atol=1e-7)
