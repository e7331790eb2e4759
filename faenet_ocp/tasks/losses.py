"""Terms of the loss, eq. (9), as sums over a batch; the training step takes the mean over the global batch."""

from collections.abc import Mapping
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.modules.loss import L2NormLoss, MAELoss, MSELoss
from fairchem.core.units.mlip_unit.mlip_unit import Task
from torch import Tensor, nn

from faenet_ocp.config.schema import LossConfig
from faenet_ocp.data.fields import exact_label

_LOSSES = {"mae": MAELoss, "mse": MSELoss, "l2mae": L2NormLoss}


class SummedLoss(nn.Module):
    """One term, summed over what counts.

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
        counted = mask.view(-1, *[1] * (values.dim() - 1))
        return self.coefficient * values.where(counted, 0.0).sum()  # values[mask] would wait for a GPU

    def num_terms(self, target: Tensor, mask: Tensor) -> Tensor:
        """How many terms the sum has: systems, atoms (l2mae) or components."""
        per_row = target.shape[1:].numel() if self.by_component else 1
        return mask.sum() * per_row


def loss_mask(task: Task, batch: AtomicData) -> Tensor:
    """Rows that a task is trained on: all systems; all atoms or the free ones."""
    if task.level == "atom" and task.train_on_free_atoms:
        return batch.fixed == 0
    return torch.ones(len(batch[task.name]), dtype=torch.bool, device=batch.pos.device)


def normalised_label(task: Task, batch: AtomicData) -> Tensor:
    """What a task's outputs are compared with: labels without references, normalised; of systems in float64."""
    label = exact_label(batch, task.name)
    if task.element_references is not None:
        label = task.element_references.apply_refs(batch, label)
    return task.normalizer.norm(label)


def task_loss(task: Task, outputs: Mapping[str, Any], batch: AtomicData) -> Tensor:
    """A task's loss in normalised units, summed over this batch."""
    target = normalised_label(task, batch).to(batch.pos.dtype)
    return task.loss_fn(outputs[task.name][task.property], target, loss_mask(task, batch), batch.natoms)
