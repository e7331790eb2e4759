"""Metrics from predictions and labels: sums that are collected batch by batch and add up over ranks.

Metrics are OC20's, under OCP's names; `targets.py` says which ones a target has, in which unit. Thresholds are strict:

- energy_within_threshold (EwT): share of systems with |energy error| < 0.02 eV;
- forces_mae, forces_cosine_similarity, forces_magnitude_error: over free atoms, the first over their components;
- energy_forces_within_threshold (EFwT): share of systems with |energy error| < 0.02 eV and every force component of
  every free atom off by less than 0.03 eV/A. Without free atoms only the energy counts.

Legend: N atoms, B systems; scalars (B,), vectors of atoms (N, 3), both in the target's unit; arrays are numpy or torch.
"""

from typing import ClassVar

import numpy as np
import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor

from faenet_ocp.common.elements import element_table
from faenet_ocp.data.fields import NUM_ELEMENTS
from faenet_ocp.targets import TARGETS, Target
from faenet_ocp.tasks.references import CompositionFit

Array = Tensor | np.ndarray
Values = dict[str, float | int]


class Sums:
    """Sums over systems or atoms, all that a metric needs.

    Attributes:
        sums: float64 vector on the device of the predictions (nothing waits for the device before `compute`). Ranks
            all-reduce it.
    """

    size: ClassVar[int]

    def __init__(self) -> None:
        self.sums = torch.zeros(self.size, dtype=torch.float64)

    def _add(self, *values: Tensor) -> None:
        added = torch.cat([value.to(torch.float64).reshape(-1) for value in values])
        self.sums = self.sums.to(added.device) + added


class ScalarMetrics(Sums):
    """MAE, MSE and, where the target has a threshold, the share within it.

    Args:
        target: of rank 0.
    """

    size = 6

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def update(self, pred: Array, label: Array) -> None:
        """Adds systems. Raises ValueError unless pred and label are both (B,)."""
        self._add(_scalar_sums(self.target, pred, label))

    def compute(self, split: str) -> Values:
        """Metrics of the systems seen; `split` is for the error messages.

        Raises:
            ValueError: no systems, or predictions or labels that are not finite.
        """
        return _scalar_values(self.target, self.sums.tolist(), split)


class VectorMetrics(Sums):
    """MAE over components, cosine and magnitude error over the atoms that count.

    Args:
        target: of rank 1.
    """

    size = 7

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def update(self, pred: Array, label: Array, counted: Array) -> None:
        """Adds atoms.

        Args:
            pred, label: (N, 3).
            counted: (N,) bool, True for the atoms that count (OC20: ``fixed == 0``).

        Raises:
            ValueError: shapes that do not fit.
        """
        pred, label = pair_of(self.target, pred, label)
        counted = torch.as_tensor(counted, device=pred.device)
        if counted.shape != pred.shape[:1] or pred.shape[1] != 3 or counted.dtype != torch.bool:
            raise ValueError(
                f"{self.target.name} must be (N, 3) and what counts (N,) bool, got {tuple(pred.shape)} and "
                f"{tuple(counted.shape)} {counted.dtype}"
            )
        per_atom = torch.stack(
            [
                torch.ones_like(pred[:, 0]),
                (~pred.isfinite()).any(dim=1).double(),
                (~label.isfinite()).any(dim=1).double(),
                (pred - label).abs().sum(dim=1),
                torch.cosine_similarity(pred, label, dim=1),
                (pred.norm(dim=1) - label.norm(dim=1)).abs(),
                label.abs().sum(dim=1),
            ]
        )
        self._add(per_atom.where(counted, 0.0).sum(dim=1))

    def compute(self, split: str) -> Values:
        """Metrics of the atoms seen; num_atoms counts them.

        Raises:
            ValueError: no atoms that count, or predictions or labels that are not finite.
        """
        count, bad, bad_labels, error, cosine, magnitude, _ = self.sums.tolist()
        name = self.target.name
        hint = f": all atoms are fixed; outputs.{name}.eval_on_free_atoms: false counts them, too"
        _check_counts(self.target, count, bad, bad_labels, split, hint)
        return {
            f"{name}_mae": error / (3 * count),
            f"{name}_cosine_similarity": cosine / count,
            f"{name}_magnitude_error": magnitude / count,
            "num_atoms": int(count),
        }

    def zero_baseline(self) -> Values:
        """What predicting zero would get (vectors have no mean direction)."""
        return {f"{self.target.name}_mae": float(self.sums[6] / (3 * self.sums[0]))}


class JointThreshold(Sums):
    """Share of systems whose scalar and all components of whose counted vectors are within their thresholds (EFwT).

    Args:
        scalar, vector: with a threshold each.
    """

    size = 2

    def __init__(self, scalar: Target, vector: Target):
        super().__init__()
        self.scalar, self.vector = scalar, vector

    def update(
        self, scalars: tuple[Array, Array], vectors: tuple[Array, Array], *, counted: Array, batch: Array
    ) -> None:
        """Adds systems.

        Args:
            scalars, vectors: prediction and label, (B,) and (N, 3).
            counted: (N,) bool, the atoms that count.
            batch: (N,) index of each atom's system among the B systems.
        """
        pred, label = pair_of(self.vector, *vectors)
        value, value_label = (values.to(pred.device) for values in pair_of(self.scalar, *scalars))
        error = (pred - label).abs().amax(dim=1).where(torch.as_tensor(counted, device=pred.device), 0.0)
        index = torch.as_tensor(batch, device=pred.device).long()
        worst = torch.zeros_like(value).scatter_reduce(0, index, error, "amax")
        within = (value - value_label).abs() < (self.scalar.threshold or 0.0)
        hits = within & (worst < (self.vector.threshold or 0.0))
        self._add(hits.sum(), value.new_tensor(len(value)))

    def compute(self, split: str) -> Values:
        """The share, in %."""
        hits, systems = self.sums.tolist()
        return {f"{self.scalar.name}_{self.vector.name}_within_threshold": 100 * hits / systems}


class BaselineMetrics(Sums):
    """Metrics of the two predictors that know nothing but the training set's labels.

    Args:
        target: a scalar of systems.
        fit: of its labels in the training set.
    """

    size = 2 * ScalarMetrics.size + 1

    def __init__(self, target: Target, fit: CompositionFit):
        super().__init__()
        self.target, self.fit = target, fit

    def update(self, composition: Tensor, label: Array) -> None:
        """Adds systems: composition (B, 119), label (B,)."""
        label = torch.as_tensor(label).cpu()
        linear = self.fit.predict(composition)
        self._add(
            _scalar_sums(self.target, torch.full_like(linear, self.fit.mean), label),
            _scalar_sums(self.target, linear, label),
            self.fit.unseen(composition).sum(),
        )

    def compute(self, split: str) -> dict[str, Values]:
        """Metrics by row; the linear row also says how many systems hold an element that was not in the training set
        (its atoms count as 0). Raises ValueError as `ScalarMetrics`."""
        sums, half = self.sums.tolist(), ScalarMetrics.size
        linear = _scalar_values(self.target, sums[half : 2 * half], split)
        return {
            "mean_predictor": _scalar_values(self.target, sums[:half], split),
            "linear_in_composition": linear | {"num_systems_unseen_elements": int(sums[-1])},
        }


class UnseenElements(Sums):
    """Systems with elements that the training set lacks.

    Args:
        unseen: (119,) bool.
    """

    size = NUM_ELEMENTS + 1

    def __init__(self, unseen: Tensor):
        super().__init__()
        self.unseen = unseen

    def update(self, batch: AtomicData) -> None:
        """Adds systems."""
        if "composition" in batch:
            held = (batch.composition > 0) & self.unseen.to(batch.composition.device)
            self._add(held.sum(dim=0), held.any(dim=1).sum())

    def compute(self) -> dict[str, int]:
        """Systems with each of these elements, by symbol, and under "all" with any of them; empty if there are none."""
        *by_element, total = (int(number) for number in self.sums.tolist())
        found = {element_table().symbols[number]: count for number, count in enumerate(by_element) if count}
        return found | {"all": total} if found else {}


def energy_metrics(pred: Array, label: Array, *, split: str) -> Values:
    """`ScalarMetrics` of whole arrays of energies, (B,) eV each."""
    metrics = ScalarMetrics(TARGETS["energy"])
    metrics.update(pred, label)
    return metrics.compute(split)


def pair_of(target: Target, pred: Array, label: Array) -> tuple[Tensor, Tensor]:
    """Both as float64 tensors on the prediction's device; ValueError if shapes differ."""
    pred = torch.as_tensor(pred).detach().to(torch.float64)
    label = torch.as_tensor(label).detach().to(device=pred.device, dtype=torch.float64)
    if pred.shape != label.shape or pred.ndim != 1 + target.rank:
        raise ValueError(
            f"{target.name}: prediction and label must have the same {1 + target.rank}-dimensional shape, "
            f"got {tuple(pred.shape)} and {tuple(label.shape)}"
        )
    return pred, label


def _scalar_sums(target: Target, pred: Array, label: Array) -> Tensor:
    pred, label = pair_of(target, pred, label)
    error = (pred - label).abs()
    per_system = [
        torch.ones_like(error),
        (~pred.isfinite()).double(),
        (~label.isfinite()).double(),
        error,
        error.square(),
        (error < (target.threshold or 0.0)).double(),
    ]
    return torch.stack(per_system).sum(dim=1)


def _scalar_values(target: Target, sums: list[float], split: str) -> Values:
    systems, bad, bad_labels, error, square, within = sums
    _check_counts(target, systems, bad, bad_labels, split)
    values: Values = {f"{target.name}_mae": error / systems, f"{target.name}_mse": square / systems}
    if target.threshold is not None:
        values[f"{target.name}_within_threshold"] = 100 * within / systems
    return values | {"num_systems": int(systems)}


def _check_counts(target: Target, count: float, bad: float, bad_labels: float, split: str, hint: str = "") -> None:
    if count == 0:
        raise ValueError(f"split {split!r}: no {target.name} to evaluate{hint}")
    for number, kind in ((bad, "predicted"), (bad_labels, "labelled")):
        if number:
            raise ValueError(f"split {split!r}: {number:.0f} of {count:.0f} {kind} {target.name} are not finite")
