"""Units, references and the loss: against sums written out; the energy gradient against finite differences."""

import pytest
import test_backbone
import torch
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch

from faenet_ocp.config.schema import build_config
from faenet_ocp.tasks.references import NUM_ELEMENTS, CompositionRegression
from faenet_ocp.tasks.tasks import (
    CompositionReferences,
    conservative_outputs,
    energy_gradient_forces,
    load_tasks_state,
    loss_mask,
    make_tasks,
    task_loss,
    tasks_state,
    to_physical,
)

CONFIG = {
    "trainer": "faenet",
    "task": "s2ef",
    "dataset": {},
    "model": {"name": "faenet"},
    "optim": {"lr_initial": 0.001, "batch_size": 1, "max_epochs": 1},
    "outputs": {"energy": {"normalizer": {"mean": -3.0, "stdev": 4.0}}, "forces": {"normalizer": {"stdev": 2.0}}},
    "loss_functions": [{"energy": {"coefficient": 3.0}}, {"forces": {"fn": "l2mae", "coefficient": 5.0}}],
    "job": {"precision": "float64"},
}


def _batch(count: int = 3) -> AtomicData:
    samples = []
    for index in range(count):
        sample = test_backbone._sample(index)
        generator = torch.Generator().manual_seed(index)
        sample.energy = torch.randn(1, generator=generator, dtype=torch.float64)
        sample.forces = torch.randn(len(sample.pos), 3, generator=generator, dtype=torch.float64)
        sample.fixed = (torch.arange(len(sample.pos)) % 3 == 0).long()
        sample.composition = torch.bincount(sample.atomic_numbers, minlength=NUM_ELEMENTS)[None].float()
        samples.append(sample)
    return atomicdata_list_to_batch(samples)


def _outputs(batch: AtomicData) -> dict:
    generator = torch.Generator().manual_seed(7)
    energy = torch.randn(len(batch.natoms), generator=generator, dtype=torch.float64)
    forces = torch.randn(len(batch.pos), 3, generator=generator, dtype=torch.float64)
    return {"energy": {"energy": energy}, "forces": {"forces": forces}}


def test_predictions_come_out_in_physical_units() -> None:
    batch, tasks = _batch(), make_tasks(build_config(CONFIG), None)
    outputs = _outputs(batch)
    physical = to_physical(tasks, outputs, batch)
    torch.testing.assert_close(physical["energy"], outputs["energy"]["energy"] * 4.0 - 3.0)
    torch.testing.assert_close(physical["forces"], outputs["forces"]["forces"] * 2.0)


def test_losses_are_the_sums_of_equation_9() -> None:
    batch, tasks = _batch(), make_tasks(build_config(CONFIG), None)
    outputs = _outputs(batch)
    energy, forces = (float(task_loss(task, outputs, batch)) for task in tasks)
    expected_energy = expected_forces = 0.0
    for b in range(3):
        target = (float(batch.energy[b]) + 3.0) / 4.0
        expected_energy += 3.0 * abs(float(outputs["energy"]["energy"][b]) - target)
    for i in range(len(batch.pos)):
        if batch.fixed[i] == 0:
            difference = outputs["forces"]["forces"][i] - batch.forces[i] / 2.0
            expected_forces += 5.0 * float(difference.square().sum().sqrt())
    assert energy == pytest.approx(expected_energy, rel=1e-12)
    assert forces == pytest.approx(expected_forces, rel=1e-12)
    counts = [float(task.loss_fn.num_terms(batch[task.name], loss_mask(task, batch))) for task in tasks]
    assert counts == [3, int((batch.fixed == 0).sum())]


@pytest.mark.parametrize(("fn", "expected"), [("mae", 3), ("mse", 3), ("l2mae", 1)])
def test_force_losses_count_components_or_atoms(fn: str, expected: int) -> None:
    raw = CONFIG | {"loss_functions": [{"forces": {"fn": fn}}], "outputs": {"forces": {"train_on_free_atoms": False}}}
    batch = _batch()
    energy, forces = make_tasks(build_config(raw), None)
    assert energy.loss_fn is None
    mask = loss_mask(forces, batch)
    assert int(forces.loss_fn.num_terms(batch.forces, mask)) == expected * len(batch.pos)
    difference = _outputs(batch)["forces"]["forces"] - batch.forces
    values = {"mae": difference.abs(), "mse": difference**2, "l2mae": difference.norm(dim=1)}[fn]
    torch.testing.assert_close(task_loss(forces, _outputs(batch), batch), values.sum())


def test_references_and_fitted_normaliser() -> None:
    """Targets that are linear in composition plus a small rest become that rest, scaled to unit deviation."""
    batch = _batch(12)
    slope = torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch.energy = batch.composition.double() @ slope + 0.01 * batch.energy
    regression = CompositionRegression()
    regression.update(batch.composition, batch.energy)
    fit = regression.solve()
    raw = CONFIG | {"outputs": {"energy": {"normalizer": "fit", "element_references": "fit"}}}
    task = make_tasks(build_config(raw), fit)[0]
    left = batch.energy - batch.composition.double() @ fit.element_references()
    normalised = task.normalizer.norm(task.element_references.apply_refs(batch, batch.energy))
    torch.testing.assert_close(normalised, (left - left.mean()) / left.std(unbiased=False), rtol=1e-4, atol=1e-4)
    physical = to_physical([task], {"energy": {"energy": normalised}}, batch)["energy"]
    torch.testing.assert_close(physical, batch.energy, rtol=0, atol=1e-6)


def test_composition_is_counted_where_the_data_has_none() -> None:
    batch = _batch()
    references = CompositionReferences(torch.arange(NUM_ELEMENTS).double())
    expected = references.energy(batch)
    del batch["composition"]
    torch.testing.assert_close(references.energy(batch), expected)


def test_state_round_trip_and_mismatch() -> None:
    raw = CONFIG | {"outputs": {"energy": {"normalizer": {"mean": 1.5, "stdev": 2.5}}}}
    first, second = make_tasks(build_config(raw), None), make_tasks(build_config(CONFIG), None)
    first[0].element_references = CompositionReferences(torch.arange(NUM_ELEMENTS).double())
    load_tasks_state(second, tasks_state(first))
    assert tasks_state(second) == tasks_state(first)
    with pytest.raises(ValueError, match="the checkpoint predicts energy, not forces"):
        load_tasks_state(second, {"energy": tasks_state(first)["energy"]})


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"energy": {"level": "atom"}}, "outputs.energy.level: energy is a property of the system, got 'atom'"),
        ({"forces": {"normalizer": "fit"}}, "outputs.forces: only energies have references and a fitted normaliser"),
        ({"energy": {"normalizer": "fit"}}, "no statistics of a training set"),
    ],
)
def test_wrong_outputs_are_refused(outputs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tasks(build_config(CONFIG | {"outputs": outputs}), None)


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
def test_conservative_forces_are_the_derivative_of_the_energy(method: str) -> None:
    """Differentiated through the frames; the graph is constant in both."""
    tasks, batch = make_tasks(build_config(CONFIG), None), _batch(2)
    model = test_backbone._model("faenet", method)
    forces = to_physical(tasks, conservative_outputs(model, tasks, batch.clone()), batch)["forces"]
    for atom in (0, 5, 12, 20):
        numerical = _numerical_forces(model, batch, atom, through_frames=True)
        torch.testing.assert_close(forces[atom], numerical, rtol=1e-5, atol=1e-7)


def test_the_training_gradient_holds_frames_constant() -> None:
    """With the frames in the batch the derivative is that at fixed frames, and differs from the one through them."""
    tasks, batch = make_tasks(build_config(CONFIG), None), _batch(2)
    model = test_backbone._model("faenet", "canonical")
    frames = model.frames_of(batch)
    batch.frame_rot, batch.frame_weight = frames.rot, frames.weight
    given = batch.clone()
    given.pos.requires_grad_(True)
    forces = 2.0 * energy_gradient_forces(tasks, model(given), given.pos)
    through = to_physical(tasks, conservative_outputs(model, tasks, batch.clone()), batch)["forces"]
    assert (forces - through).abs().max() > 1e-4
    for atom in (0, 12, 20):
        torch.testing.assert_close(forces[atom], _numerical_forces(model, batch, atom), rtol=1e-5, atol=1e-7)
