"""Least squares of a label on element counts, from sums that are collected batch by batch.

One pass over the training set gives

- the baselines ``mean predictor`` and ``linear in composition`` of every results table,
- element references (one energy per atom of an element, as in OCP, no intercept),
- mean and standard deviation of the labels, and of what the references leave over, for the target normaliser.

Legend: composition (B, 119) atom counts, column = atomic number, column 0 unused; label (B,), energies in eV.
All sums are float64. Counts are whole numbers, so A^T A is exact below 2**53.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fairchem.core.common import distutils
from fairchem.core.datasets.atomic_data import AtomicData
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from faenet_ocp.data.fields import NUM_ELEMENTS, exact_label

Labels = tuple[Tensor, dict[str, Tensor]]
"""Composition (B, 119) and labels (B,) by target of some systems."""

_ONE, _LABEL, _REST = range(NUM_ELEMENTS, NUM_ELEMENTS + 3)  # columns beside the elements in the sums
_LARGEST_SAMPLE = 1_000_000
# Eigenvalues of A^T A below this share of the largest are rounding noise (about 1e-15 of it). The
# rarest element of a set of 1e8 frames still lies above.
_RANK_TOLERANCE = 1e-13


@dataclass(frozen=True, kw_only=True)
class CompositionFit:
    """Solution of a `CompositionRegression`; plain numbers, see `to_dict` and `from_dict`.

    Attributes:
        coefficients: per atom by atomic number (119 entries); None for an element that no system of the fit holds.
        mean, stdev: of the labels. The mean is the ``mean predictor`` baseline (the best constant for the squared
            error; for the absolute error it would be the median).
        residual_mean, residual_stdev: of label minus prediction. The fit has no intercept, so the residual mean is not
            zero in general.
        num_systems: systems in the fit.
        rank: independent directions among the compositions; below the number of elements seen, the coefficients are
            the minimum-norm ones of many equally good.

    Standard deviations divide by the number of systems (as `numpy.std`).
    """

    coefficients: tuple[float | None, ...]
    mean: float
    stdev: float
    residual_mean: float
    residual_stdev: float
    num_systems: int
    rank: int

    def __post_init__(self) -> None:
        if len(self.coefficients) != NUM_ELEMENTS:
            raise ValueError(f"coefficients must have {NUM_ELEMENTS} entries, got {len(self.coefficients)}")
        numbers = [self.mean, self.stdev, self.residual_mean, self.residual_stdev]
        numbers += [c for c in self.coefficients if c is not None]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("a composition fit must hold finite numbers")

    def element_references(self) -> Tensor:
        """Share of each atom by atomic number, (119,) float64; 0 for elements never seen."""
        return torch.tensor([c or 0.0 for c in self.coefficients], dtype=torch.float64)

    def predict(self, composition: Tensor) -> Tensor:
        """Label linear in composition, (B,) float64 on the CPU.

        Atoms of elements never seen contribute 0; `unseen` says which systems have some.

        Raises:
            ValueError: composition is not (B, 119) counts.
        """
        return _check_composition(composition) @ self.element_references()

    def unseen(self, composition: Tensor) -> Tensor:
        """True for systems that hold an element never seen in the fit, (B,) bool on the CPU."""
        return (_check_composition(composition)[:, self.unseen_elements()] > 0).any(dim=1)

    def unseen_elements(self) -> Tensor:
        """True for elements never seen in the fit, by atomic number, (119,) bool."""
        return torch.tensor([c is None for c in self.coefficients])

    def to_dict(self) -> dict[str, Any]:
        """The fit as JSON-ready data (never seen = null)."""
        return asdict(self) | {"coefficients": list(self.coefficients)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "CompositionFit":
        """Inverse of `to_dict`. Raises ValueError if keys are missing, unknown or not finite."""
        expected = {field.name for field in fields(cls)}
        if set(data) != expected:
            raise ValueError(
                f"composition fit: missing {sorted(expected - set(data))}, unknown {sorted(set(data) - expected)}"
            )
        return cls(**{**data, "coefficients": tuple(data["coefficients"])})


class CompositionRegression:
    """Streaming least squares of labels on element counts.

    Args:
        around: a first fit of the same systems. Sums are of what it leaves over, so that nothing is lost where labels
            are large and what matters of them is not.

    Attributes:
        sums: (122, 122) float64, M^T M over the systems, M = [composition | 1 | label - its first mean | label - its
            first prediction] (both 0 without a first fit): every sum that the fit needs. Parts add up, so ranks
            all-reduce it.
    """

    def __init__(self, around: CompositionFit | None = None) -> None:
        self.mean = around.mean if around else 0.0
        self.references = around.element_references() if around else torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
        self.sums = torch.zeros(NUM_ELEMENTS + 3, NUM_ELEMENTS + 3, dtype=torch.float64)

    def update(self, composition: Tensor, label: Tensor) -> None:
        """Adds systems.

        Args:
            composition: (B, 119) atom counts.
            label: (B,).

        Raises:
            ValueError: wrong shape, counts that are none, or labels that are not finite.
        """
        counts = _check_composition(composition)
        if label.shape != counts.shape[:1]:
            raise ValueError(f"labels must have shape ({counts.shape[0]},), got {tuple(label.shape)}")
        values = label.detach().to(device="cpu", dtype=torch.float64)
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise ValueError(f"{bad} of {values.shape[0]} labels are not finite")
        others = [torch.ones_like(values), values - self.mean, values - counts @ self.references]
        rows = torch.cat([counts, torch.stack(others, dim=1)], dim=1)
        self.sums += rows.T @ rows

    def solve(self) -> CompositionFit:
        """Minimum-norm least-squares coefficients with the statistics around them.

        The statistics come from the same sums, so the standard deviations carry a rounding error of about 1e-8 of the
        root mean square label, or of what the first fit leaves over.

        Raises:
            ValueError: no system was added.
        """
        n = int(self.sums[_ONE, _ONE])
        if n == 0:
            raise ValueError("cannot fit element references: no system was given")
        seen = self.sums[_ONE, :NUM_ELEMENTS] > 0
        gram = self.sums[:NUM_ELEMENTS, :NUM_ELEMENTS][seen][:, seen]
        moment, counts = self.sums[_REST, :NUM_ELEMENTS][seen], self.sums[_ONE, :NUM_ELEMENTS][seen]
        solution, rank = _solve_gram(gram, moment)
        shift, sumsq = float(self.sums[_ONE, _LABEL]) / n, float(self.sums[_LABEL, _LABEL])
        residual_mean = float(self.sums[_ONE, _REST] - solution @ counts) / n
        residual_sumsq = float(self.sums[_REST, _REST] + solution @ (gram @ solution - 2.0 * moment))
        coefficients: list[float | None] = [None] * NUM_ELEMENTS
        for number, value in zip(seen.nonzero().flatten().tolist(), solution.tolist(), strict=True):
            coefficients[number] = float(self.references[number]) + value
        return CompositionFit(
            coefficients=tuple(coefficients),
            mean=self.mean + shift,
            stdev=math.sqrt(max(sumsq / n - shift**2, 0.0)),
            residual_mean=residual_mean,
            residual_stdev=math.sqrt(max(residual_sumsq / n - residual_mean**2, 0.0)),
            num_systems=n,
            rank=rank,
        )


class CompositionReferences(nn.Module):
    """Label of a composition, one coefficient for each element: subtracted from targets, added to predictions.

    The composition is that of the whole system, before sub-surface atoms are removed (`data.composition`, (B, 119)).

    Args:
        coefficients: per atom by atomic number, (119,).
    """

    def __init__(self, coefficients: Tensor):
        super().__init__()
        self.coefficients: Tensor
        self.register_buffer("coefficients", coefficients.double())

    def energy(self, batch: AtomicData) -> Tensor:
        """Reference of each system, (B,) float64."""
        self.to(batch.atomic_numbers.device)  # those of a checkpoint come on the CPU
        if "composition" in batch:
            return batch.composition.double() @ self.coefficients
        per_atom = self.coefficients[batch.atomic_numbers]
        return per_atom.new_zeros(len(batch.natoms)).index_add(0, batch.batch, per_atom)

    def apply_refs(self, batch: AtomicData, tensor: Tensor) -> Tensor:
        """Labels (B,) to labels relative to the references, float64."""
        return tensor.double() - self.energy(batch)

    def undo_refs(self, batch: AtomicData, tensor: Tensor) -> Tensor:
        """The inverse of `apply_refs`."""
        return tensor.double() + self.energy(batch)


def statistics_sample(total: int) -> NDArray[np.int64]:
    """Training systems whose labels this rank sums up: its share of all, above a million of a million spread evenly."""
    used = min(total, _LARGEST_SAMPLE)
    if used < total:
        logging.warning("baselines and fits use %d of %d training systems, spread evenly", used, total)
    chosen = (np.arange(used) * total) // used
    return np.array_split(chosen, distutils.get_world_size())[distutils.get_rank()]


def labels_of(batches: Sequence[AtomicData], *, names: Sequence[str]) -> Labels:
    """What `fit_labels` takes of each batch; made where it is loaded."""
    (batch,) = batches
    return batch.composition, {name: exact_label(batch, name) for name in names}


def fit_labels(parts: Iterable[Labels], names: Sequence[str]) -> dict[str, CompositionFit]:
    """Fits of labels by target over the systems of all ranks.

    Element counts and labels are kept (about 100 bytes a system) and gone through twice: the second fit is of what the
    first leaves over, so that an offset of the labels, however large, changes none of the statistics but the mean.

    Args:
        parts: this rank's share of the training set.
        names: of targets that are scalars of systems.

    Raises:
        ValueError: no systems, or labels that are not finite.
    """
    regressions = {name: CompositionRegression() for name in names}
    hidden, kept = None if distutils.is_master() else True, []
    for composition, labels in tqdm(parts, desc="label statistics", unit="batch", leave=False, disable=hidden):
        for name, regression in regressions.items():
            regression.update(composition, labels[name])
        # Copies: what comes from the loader's processes holds a file open for each tensor.
        kept.append((composition.to_sparse(), {name: labels[name].clone() for name in names}))
    fits = _solve_all(regressions)
    regressions = {name: CompositionRegression(fit) for name, fit in fits.items()}
    for composition, labels in kept:
        for name, regression in regressions.items():
            regression.update(composition.to_dense(), labels[name])
    return _solve_all(regressions)


def _solve_all(regressions: Mapping[str, CompositionRegression]) -> dict[str, CompositionFit]:
    """The fits of the systems of all ranks."""
    if distutils.get_world_size() > 1:
        for regression in regressions.values():
            sums = regression.sums.to(distutils.get_device_for_local_rank())
            dist.all_reduce(sums)
            regression.sums = sums.cpu()
    return {name: regression.solve() for name, regression in regressions.items()}


def fits_to_dict(fits: Mapping[str, CompositionFit]) -> dict[str, Any] | None:
    """Fits as checkpoints and `statistics.json` hold them: the energy's, and what else there is in `others` by name."""
    others = {name: fit.to_dict() for name, fit in fits.items()}
    if not others:
        return None
    return others.pop("energy", {}) | ({"others": others} if others else {})


def fits_from_dict(data: Mapping[str, Any] | None) -> dict[str, CompositionFit]:
    """Inverse of `fits_to_dict`."""
    if not data:
        return {}
    energy = {key: value for key, value in data.items() if key != "others"}
    found = ({"energy": energy} if energy else {}) | data.get("others", {})
    return {name: CompositionFit.from_dict(fit) for name, fit in found.items()}


def _check_composition(composition: Tensor) -> Tensor:
    """Returns composition (B, 119) as float64 on the CPU; ValueError for anything else."""
    if composition.ndim != 2 or composition.shape[1] != NUM_ELEMENTS:
        raise ValueError(f"composition must have shape (systems, {NUM_ELEMENTS}), got {tuple(composition.shape)}")
    counts = composition.detach().to(device="cpu", dtype=torch.float64)
    if not bool((torch.isfinite(counts) & (counts >= 0)).all()):
        raise ValueError("composition must hold atom counts: finite and not negative")
    return counts


def _solve_gram(gram: Tensor, moment: Tensor) -> tuple[Tensor, int]:
    """pinv(A^T A) A^T y, which is pinv(A) y, the minimum-norm solution; and the rank of A."""
    if gram.shape[0] == 0:
        return moment, 0
    values, vectors = torch.linalg.eigh(gram)
    keep = values > _RANK_TOLERANCE * values[-1]
    basis = vectors[:, keep]
    return basis @ ((basis.T @ moment) / values[keep]), int(keep.sum())
