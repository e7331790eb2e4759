"""What is predicted: fairchem tasks, the only owners of normalised <-> physical units (eV and eV/Angstrom)."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.modules.normalization.normalizer import Normalizer
from fairchem.core.units.mlip_unit.mlip_unit import OutputSpec, Task
from torch import Tensor, nn

from faenet_ocp.config.schema import Config
from faenet_ocp.data.fields import NUM_ELEMENTS
from faenet_ocp.targets import Target
from faenet_ocp.tasks.losses import SummedLoss
from faenet_ocp.tasks.references import CompositionFit, CompositionReferences

Units = tuple[Normalizer, CompositionReferences | None]

_ROUNDING = 1e-10
"""A standard deviation below this share of the labels' size is rounding noise of the fit."""


@dataclass(kw_only=True)
class TargetTask(Task):
    """fairchem's task with its row of the table of targets."""

    target: Target


def needs_fit(config: Config) -> bool:
    """Whether a normaliser or element references have to be fitted before training."""
    outputs = [config.output(name) for name in config.properties]
    return any(output.normalizer == "fit" or output.element_references == "fit" for output in outputs)


def make_tasks(config: Config, fits: Mapping[str, CompositionFit]) -> list[TargetTask]:
    """The tasks of a configuration, in the order of `config.targets`.

    Args:
        config: validated configuration.
        fits: statistics of the training set by target, needed where something is to be fitted.

    Raises:
        ValueError: something is to be fitted that cannot be, or a loss that does not fit its target; names the key.
    """
    return [_make_task(config, target, _configured_units(config, target, fits)) for target in config.targets]


def restore_tasks(config: Config, state: Mapping[str, Any]) -> list[TargetTask]:
    """The tasks of a configuration with the units of a checkpoint; see `load_tasks_state`."""
    tasks = [_make_task(config, target, (_normalizer(0.0, 1.0), None)) for target in config.targets]
    load_tasks_state(tasks, state)
    return tasks


def _make_task(config: Config, target: Target, units: Units) -> TargetTask:
    output, loss = config.output(target.name), config.losses.get(target.name)
    if loss is not None and loss.fn == "l2mae" and target.rank == 0:
        raise ValueError(f"loss_functions.{target.name}.fn: l2mae is for vectors; {target.name} can have mae or mse")
    return TargetTask(
        name=target.name,
        level=target.level,
        property=target.name,
        out_spec=OutputSpec(dim=[target.dimension], dtype=config.job.precision),
        normalizer=units[0],
        datasets=[config.dataset.name],
        loss_fn=SummedLoss(loss) if loss else None,
        element_references=units[1],
        metrics=[],
        train_on_free_atoms=output.train_on_free_atoms,
        eval_on_free_atoms=output.eval_on_free_atoms,
        target=target,
    )


def _configured_units(config: Config, target: Target, fits: Mapping[str, CompositionFit]) -> Units:
    output, key = config.output(target.name), f"outputs.{target.name}"
    if output.element_references and not target.extensive:
        raise ValueError(f"{key}.element_references: only for what grows with the system, as energies do")
    if output.normalizer == "fit" and not target.has_statistics:
        raise ValueError(f"{key}.normalizer: fit: only for scalars of systems; give mean and stdev")
    references = None
    if output.element_references == "fit":
        references = CompositionReferences(fits[target.name].element_references())
    if output.normalizer == "fit":
        fit = fits[target.name]
        mean, stdev = (fit.residual_mean, fit.residual_stdev) if references else (fit.mean, fit.stdev)
        if stdev <= _ROUNDING * math.hypot(fit.mean, fit.stdev):
            raise ValueError(f"{key}.normalizer: fit: {_nothing_to_scale_by(fit, references)}")
    else:
        mean, stdev = output.normalizer.mean, output.normalizer.stdev
    return _normalizer(mean, stdev), references


def _normalizer(mean: float, stdev: float) -> Normalizer:
    """In float64: from numbers alone it would have float32."""
    return Normalizer(*torch.tensor([mean, stdev], dtype=torch.float64))


def _nothing_to_scale_by(fit: CompositionFit, references: CompositionReferences | None) -> str:
    what = f"all {fit.num_systems} training labels are equal"
    if references is not None:
        what = f"element references reproduce all {fit.num_systems} training labels exactly (rank {fit.rank})"
    return f"{what}, nothing to scale by; give mean and stdev, or more training systems"


def to_physical(tasks: Sequence[Task], outputs: Mapping[str, Any], batch: AtomicData) -> dict[str, Tensor]:
    """Model outputs to predictions in physical units: energy (B,) in eV, float64, forces (N, 3) in eV/Angstrom."""
    physical = {}
    for task in tasks:
        value = outputs[task.name][task.property]
        value = task.normalizer.denorm(value.double() if task.level == "system" else value)
        if task.element_references is not None:
            value = task.element_references.undo_refs(batch, value)
        physical[task.name] = value
    return physical


def energy_gradient_forces(
    tasks: Sequence[Task],
    outputs: Mapping[str, Any],
    pos: Tensor,
    *,
    keep_graph: bool = False,
    differentiable: bool = False,
) -> Tensor:
    """-dE/dX in the units of the normalised forces, (N, 3).

    Args:
        tasks: energy and forces among them.
        outputs: of the model, for a batch whose `pos` required gradients.
        pos: (N, 3).
        keep_graph: the outputs will be differentiated again.
        differentiable: the forces, too, can be differentiated.
    """
    scale = {task.name: task.normalizer.rmsd for task in tasks}
    energy = outputs["energy"]["energy"].sum()
    (gradient,) = torch.autograd.grad(
        energy, pos, retain_graph=keep_graph or differentiable, create_graph=differentiable
    )
    return -gradient * (scale["energy"] / scale["forces"]).to(gradient)


def has_no_forces_of_its_own(model: nn.Module, tasks: Sequence[Task]) -> bool:
    """Whether forces are asked for that the model has no head for: they are -dE/dX."""
    heads = getattr(getattr(model, "module", model), "output_heads", {"forces": None})  # under DDP, too
    return any(task.name == "forces" for task in tasks) and "forces" not in heads


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


def training_outputs(
    model: nn.Module,
    tasks: Sequence[Task],
    batch: AtomicData,
    autocast: contextlib.AbstractContextManager[Any] | None = None,
) -> dict[str, Any]:
    """Model outputs; forces of a model without a head for them are -dE/dX, to be differentiated once more.

    Args:
        model: may be wrapped in DDP.
        tasks: energy and forces among them where the model has no forces of its own.
        batch: its `pos` is made to require gradients where these are needed.
        autocast: around the model alone.
    """
    conservative = has_no_forces_of_its_own(model, tasks)
    if conservative:
        batch.pos.requires_grad_(True)
    with autocast or contextlib.nullcontext():
        outputs = model(batch)
    if conservative:
        forces = energy_gradient_forces(tasks, outputs, batch.pos, differentiable=True)
        outputs = {**outputs, "forces": {"forces": forces}}
    return outputs


def unseen_elements(tasks: Sequence[Task], fits: Mapping[str, CompositionFit]) -> Tensor:
    """Elements that the training set lacks, as far as its statistics or fitted references tell, (119,) bool."""
    unseen = [fit.unseen_elements() for fit in fits.values()]
    unseen += [task.element_references.coefficients.cpu() == 0 for task in tasks if task.element_references is not None]
    return torch.stack([torch.zeros(NUM_ELEMENTS, dtype=torch.bool), *unseen]).any(dim=0)


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
        task.normalizer = _normalizer(values["mean"], values["stdev"])
        coefficients = values["element_references"]
        if coefficients is not None and len(coefficients) != NUM_ELEMENTS:
            raise ValueError(f"the checkpoint's element references have {len(coefficients)} of {NUM_ELEMENTS} entries")
        task.element_references = (
            None if coefficients is None else CompositionReferences(torch.tensor(coefficients, dtype=torch.float64))
        )
