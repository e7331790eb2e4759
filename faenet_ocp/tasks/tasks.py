"""What is predicted: fairchem tasks, the only owners of normalised <-> physical units (eV and eV/Angstrom)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.modules.loss import L2NormLoss, MAELoss, MSELoss
from fairchem.core.modules.normalization.normalizer import Normalizer
from fairchem.core.units.mlip_unit.mlip_unit import OutputSpec, Task
from torch import Tensor, nn

from faenet_ocp.config.schema import Config, LossConfig
from faenet_ocp.tasks.references import NUM_ELEMENTS, CompositionFit

_LOSSES = {"mae": MAELoss, "mse": MSELoss, "l2mae": L2NormLoss}
_LEVELS = {"energy": "system", "forces": "atom"}


class CompositionReferences(nn.Module):
    """Energy of a composition, one coefficient for each element: subtracted from targets, added to predictions.

    The composition is that of the whole system, before sub-surface atoms are removed (`data.composition`, (B, 119)).

    Args:
        coefficients: eV per atom by atomic number, (119,).
    """

    def __init__(self, coefficients: Tensor):
        super().__init__()
        self.coefficients: Tensor
        self.register_buffer("coefficients", coefficients.double())

    def energy(self, batch: AtomicData) -> Tensor:
        """Reference energy of each system, (B,) float64, eV."""
        if "composition" in batch:
            return batch.composition.double() @ self.coefficients
        per_atom = self.coefficients[batch.atomic_numbers]
        return per_atom.new_zeros(len(batch.natoms)).index_add(0, batch.batch, per_atom)

    def apply_refs(self, batch: AtomicData, tensor: Tensor) -> Tensor:
        """Energies (B,) to energies relative to the references."""
        return (tensor.double() - self.energy(batch)).to(tensor.dtype)

    def undo_refs(self, batch: AtomicData, tensor: Tensor) -> Tensor:
        """The inverse of `apply_refs`."""
        return (tensor.double() + self.energy(batch)).to(tensor.dtype)


class SummedLoss(nn.Module):
    """One term of the loss, eq. (9), summed over what counts; the mean is taken over the global batch by the unit.

    Args:
        term: function and coefficient.
    """

    def __init__(self, term: LossConfig):
        super().__init__()
        self.fn, self.coefficient, self.start_epoch = _LOSSES[term.fn](), term.coefficient, term.start_epoch
        self.by_component = term.fn != "l2mae"

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor, natoms: Tensor) -> Tensor:
        """Sum over the rows where mask is true; pred and target (B,) or (N, 3), mask (B,) or (N,)."""
        values = self.fn(pred, target, natoms)
        return self.coefficient * values[mask].sum()

    def num_terms(self, target: Tensor, mask: Tensor) -> Tensor:
        """How many terms the sum has: systems, atoms (l2mae) or force components."""
        per_row = target.shape[1:].numel() if self.by_component else 1
        return mask.sum() * per_row


def loss_mask(task: Task, batch: AtomicData) -> Tensor:
    """Rows that a task is trained on: all systems; all atoms or the free ones."""
    if task.level == "atom" and task.train_on_free_atoms:
        return batch.fixed == 0
    return torch.ones(len(batch[task.name]), dtype=torch.bool, device=batch.pos.device)


def task_loss(task: Task, outputs: Mapping[str, Any], batch: AtomicData) -> Tensor:
    """A task's loss in normalised units, summed over this batch."""
    target = batch[task.name]
    if task.element_references is not None:
        target = task.element_references.apply_refs(batch, target)
    target = task.normalizer.norm(target)
    return task.loss_fn(outputs[task.name][task.property], target, loss_mask(task, batch), batch.natoms)


def energy_gradient_forces(
    tasks: Sequence[Task], outputs: Mapping[str, Any], pos: Tensor, *, keep_graph: bool = False
) -> Tensor:
    """-dE/dX in the units of the normalised forces, (N, 3), without a graph of its own.

    Args:
        tasks: energy and forces among them.
        outputs: of the model, for a batch whose `pos` required gradients.
        pos: (N, 3).
        keep_graph: the outputs will be differentiated again.
    """
    scale = {task.name: task.normalizer.rmsd for task in tasks}
    energy = outputs["energy"]["energy"].sum()
    (gradient,) = torch.autograd.grad(energy, pos, retain_graph=keep_graph)
    return -gradient * (scale["energy"] / scale["forces"]).to(gradient)


def conservative_outputs(model: nn.Module, tasks: Sequence[Task], batch: AtomicData) -> dict[str, Any]:
    """Model outputs with -dE/dX as forces, differentiated through the frames: the energy is conserved exactly.

    The graph (which atoms are neighbours) is constant in the derivative, and so are the signs of canonical frames: the
    energy makes a step where these change. Forces are finite for all positions (see `frames` on equal variances).
    """
    with torch.enable_grad():
        batch.pos.requires_grad_(True)
        outputs = dict(model(batch, through_frames=True))
        outputs["forces"] = {"forces": energy_gradient_forces(tasks, outputs, batch.pos)}
    return outputs


def needs_fit(config: Config) -> bool:
    """Whether a normaliser or element references have to be fitted before training."""
    outputs = [config.output(name) for name in config.properties]
    return any(output.normalizer == "fit" or output.element_references == "fit" for output in outputs)


def make_tasks(config: Config, fit: CompositionFit | None) -> list[Task]:
    """The tasks of a configuration, energies first.

    Args:
        config: validated configuration.
        fit: statistics of the training set, needed where something is to be fitted.
    """
    return [_make_task(config, name, fit) for name in config.properties]


def _make_task(config: Config, name: str, fit: CompositionFit | None) -> Task:
    output = config.output(name)
    if output.level not in (None, _LEVELS[name]):
        raise ValueError(f"outputs.{name}.level: {name} is a property of the {_LEVELS[name]}, got {output.level!r}")
    if name != "energy" and (output.normalizer == "fit" or output.element_references):
        raise ValueError(f"outputs.{name}: only energies have references and a fitted normaliser")
    references = None
    if output.element_references == "fit":
        references = CompositionReferences(_fitted(fit).element_references())
    if output.normalizer == "fit":
        stats = _fitted(fit)
        mean, stdev = (stats.residual_mean, stats.residual_stdev) if references else (stats.mean, stats.stdev)
        if stdev <= 0:
            raise ValueError(f"outputs.{name}.normalizer: fit: all training labels are equal, nothing to scale by")
    else:
        mean, stdev = output.normalizer.mean, output.normalizer.stdev
    loss = config.losses.get(name)
    return Task(
        name=name,
        level=_LEVELS[name],
        property=name,
        out_spec=OutputSpec(dim=[1] if name == "energy" else [3], dtype=config.job.precision),
        normalizer=Normalizer(mean=float(mean), rmsd=float(stdev)),
        datasets=[config.dataset.name],
        loss_fn=SummedLoss(loss) if loss else None,
        element_references=references,
        metrics=[],
        train_on_free_atoms=output.train_on_free_atoms,
        eval_on_free_atoms=output.eval_on_free_atoms,
    )


def _fitted(fit: CompositionFit | None) -> CompositionFit:
    if fit is None:
        raise ValueError("outputs: something is to be fitted, but there are no statistics of a training set")
    return fit


def to_physical(tasks: Sequence[Task], outputs: Mapping[str, Any], batch: AtomicData) -> dict[str, Tensor]:
    """Model outputs to predictions in eV and eV/Angstrom: energy (B,), forces (N, 3)."""
    physical = {}
    for task in tasks:
        value = task.normalizer.denorm(outputs[task.name][task.property])
        if task.element_references is not None:
            value = task.element_references.undo_refs(batch, value)
        physical[task.name] = value
    return physical


def tasks_to_device(tasks: Sequence[Task], device: torch.device | str) -> None:
    """Moves normalisers and references."""
    for task in tasks:
        task.normalizer.to(device)
        if task.element_references is not None:
            task.element_references.to(device)


def tasks_state(tasks: Sequence[Task]) -> dict[str, Any]:
    """Normalisers and references as plain data for a checkpoint."""
    return {
        task.name: {
            "mean": float(task.normalizer.mean),
            "stdev": float(task.normalizer.rmsd),
            "element_references": None
            if task.element_references is None
            else task.element_references.coefficients.tolist(),
        }
        for task in tasks
    }


def load_tasks_state(tasks: Sequence[Task], state: Mapping[str, Any]) -> None:
    """Puts a checkpoint's normalisers and references into tasks.

    Raises:
        ValueError: the checkpoint lacks a task.
    """
    for task in tasks:
        if task.name not in state:
            raise ValueError(f"the checkpoint predicts {', '.join(state)}, not {task.name}")
        values = state[task.name]
        task.normalizer = Normalizer(mean=values["mean"], rmsd=values["stdev"])
        coefficients = values["element_references"]
        if coefficients is not None and len(coefficients) != NUM_ELEMENTS:
            raise ValueError(f"the checkpoint's element references have {len(coefficients)} of {NUM_ELEMENTS} entries")
        task.element_references = (
            None if coefficients is None else CompositionReferences(torch.tensor(coefficients, dtype=torch.float64))
        )
