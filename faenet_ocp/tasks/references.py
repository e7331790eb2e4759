"""Least squares of the energy on element counts, from sums that are collected batch by batch.

One pass over the training set gives, without keeping it in memory,

- the baselines ``mean predictor`` and ``linear in composition`` of every results table,
- element references (one energy per atom of an element, as in OCP, no intercept),
- mean and standard deviation of the energies, and of what the references leave over, for the
  target normaliser.

Legend: composition (B, 119) atom counts, column = atomic number, column 0 unused; energy (B,) eV.
All sums are float64. Counts are whole numbers, so A^T A is exact below 2**53.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

NUM_ELEMENTS = 119
_ONE, _ENERGY = NUM_ELEMENTS, NUM_ELEMENTS + 1  # columns beside the elements in the sums
# Eigenvalues of A^T A below this share of the largest are rounding noise (about 1e-15 of it). The
# rarest element of a set of 1e8 frames still lies above.
_RANK_TOLERANCE = 1e-13


def _check_composition(composition: Tensor) -> Tensor:
    """Returns composition (B, 119) as float64 on the CPU; ValueError for anything else."""
    if composition.ndim != 2 or composition.shape[1] != NUM_ELEMENTS:
        raise ValueError(f"composition must have shape (systems, {NUM_ELEMENTS}), got {tuple(composition.shape)}")
    counts = composition.detach().to(device="cpu", dtype=torch.float64)
    if not bool((torch.isfinite(counts) & (counts >= 0)).all()):
        raise ValueError("composition must hold atom counts: finite and not negative")
    return counts


@dataclass(frozen=True, kw_only=True)
class CompositionFit:
    """Solution of a `CompositionRegression`; plain numbers, see `to_dict` and `from_dict`.

    Attributes:
        coefficients: eV per atom by atomic number (119 entries); None for an element that no
            system of the fit holds.
        mean, stdev: of the energies, eV. The mean is the ``mean predictor`` baseline (the best
            constant for the squared error; for the absolute error it would be the median).
        residual_mean, residual_stdev: of energy minus prediction, eV. The fit has no intercept, so
            the residual mean is not zero in general.
        num_systems: systems in the fit.
        rank: independent directions among the compositions; below the number of elements seen, the
            coefficients are the minimum-norm ones of many equally good.

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
        """Energy per atom by atomic number, (119,) float64, eV; 0 for elements never seen."""
        return torch.tensor([c or 0.0 for c in self.coefficients], dtype=torch.float64)

    def predict(self, composition: Tensor) -> Tensor:
        """Energy linear in composition, (B,) float64 on the CPU, eV.

        Atoms of elements never seen contribute 0; `unseen` says which systems have some.

        Raises:
            ValueError: composition is not (B, 119) counts.
        """
        return _check_composition(composition) @ self.element_references()

    def unseen(self, composition: Tensor) -> Tensor:
        """True for systems that hold an element never seen in the fit, (B,) bool on the CPU."""
        missing = torch.tensor([c is None for c in self.coefficients])
        return (_check_composition(composition)[:, missing] > 0).any(dim=1)

    def to_dict(self) -> dict[str, Any]:
        """The fit as JSON-ready data (never seen = null)."""
        return asdict(self) | {"coefficients": list(self.coefficients)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "CompositionFit":
        """Inverse of `to_dict`. Raises ValueError if keys are missing, unknown or not finite."""
        _check_keys(data, {field.name for field in fields(cls)}, "composition fit")
        return cls(**{**data, "coefficients": tuple(data["coefficients"])})


class CompositionRegression:
    """Streaming least squares of energies on element counts; parts of a set can be merged.

    Attributes:
        sums: (121, 121) float64, M^T M over the systems, M = [composition | 1 | energy]: every sum
            that the fit needs. Parts add up, so ranks may also all-reduce it.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(NUM_ELEMENTS + 2, NUM_ELEMENTS + 2, dtype=torch.float64)

    def update(self, composition: Tensor, energy: Tensor) -> None:
        """Adds systems.

        Args:
            composition: (B, 119) atom counts.
            energy: (B,) eV.

        Raises:
            ValueError: wrong shape, counts that are none, or energies that are not finite.
        """
        counts = _check_composition(composition)
        if energy.shape != counts.shape[:1]:
            raise ValueError(f"energy must have shape ({counts.shape[0]},), got {tuple(energy.shape)}")
        target = energy.detach().to(device="cpu", dtype=torch.float64)
        bad = int((~torch.isfinite(target)).sum())
        if bad:
            raise ValueError(f"{bad} of {target.shape[0]} energies are not finite")
        rows = torch.cat([counts, torch.ones(len(counts), 1).double(), target[:, None]], dim=1)
        self.sums += rows.T @ rows

    def merge(self, other: "CompositionRegression") -> None:
        """Adds the systems that another one (another process or rank) has seen."""
        self.sums += other.sums

    def solve(self) -> CompositionFit:
        """Minimum-norm least-squares coefficients with the statistics around them.

        The statistics come from the same sums, so the standard deviations carry a rounding error of
        about 1e-8 of the root mean square energy.

        Raises:
            ValueError: no system was added.
        """
        n = int(self.sums[_ONE, _ONE])
        if n == 0:
            raise ValueError("cannot fit element references: no system was given")
        seen = self.sums[_ONE, :NUM_ELEMENTS] > 0
        gram = self.sums[:NUM_ELEMENTS, :NUM_ELEMENTS][seen][:, seen]
        moment, counts = self.sums[_ENERGY, :NUM_ELEMENTS][seen], self.sums[_ONE, :-2][seen]
        solution, rank = _solve_gram(gram, moment)
        mean = float(self.sums[_ONE, _ENERGY]) / n
        energy_sumsq = float(self.sums[_ENERGY, _ENERGY])
        residual_mean = mean - float(solution @ counts) / n
        residual_sumsq = energy_sumsq + float(solution @ (gram @ solution - 2.0 * moment))
        coefficients: list[float | None] = [None] * NUM_ELEMENTS
        for number, value in zip(seen.nonzero().flatten().tolist(), solution.tolist(), strict=True):
            coefficients[number] = value
        return CompositionFit(
            coefficients=tuple(coefficients),
            mean=mean,
            stdev=math.sqrt(max(energy_sumsq / n - mean**2, 0.0)),
            residual_mean=residual_mean,
            residual_stdev=math.sqrt(max(residual_sumsq / n - residual_mean**2, 0.0)),
            num_systems=n,
            rank=rank,
        )

    def to_dict(self) -> dict[str, Any]:
        """The sums as JSON-ready data, without the rows and columns of elements never seen."""
        used = self.sums.diagonal().nonzero().flatten()
        return {"columns": used.tolist(), "sums": self.sums[used[:, None], used].tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "CompositionRegression":
        """Inverse of `to_dict`. Raises ValueError if keys or shapes do not fit."""
        _check_keys(data, {"columns", "sums"}, "composition regression")
        used = torch.tensor(data["columns"], dtype=torch.long)
        values = torch.tensor(data["sums"], dtype=torch.float64).view(-1)
        if values.numel() != used.numel() ** 2 or bool(((used < 0) | (used > _ENERGY)).any()):
            raise ValueError(
                f"composition regression: 'columns' must be numbers in 0..{_ENERGY} and 'sums' a "
                f"square matrix over them, got {used.numel()} columns and {values.numel()} sums"
            )
        regression = cls()
        regression.sums[used[:, None], used] = values.view(used.numel(), used.numel())
        return regression


def _solve_gram(gram: Tensor, moment: Tensor) -> tuple[Tensor, int]:
    """pinv(A^T A) A^T y, which is pinv(A) y, the minimum-norm solution; and the rank of A."""
    if gram.shape[0] == 0:
        return moment, 0
    values, vectors = torch.linalg.eigh(gram)
    keep = values > _RANK_TOLERANCE * values[-1]
    basis = vectors[:, keep]
    return basis @ ((basis.T @ moment) / values[keep]), int(keep.sum())


def _check_keys(data: Mapping[str, Any], expected: set[str], what: str) -> None:
    if set(data) != expected:
        raise ValueError(
            f"{what}: expected the keys {sorted(expected)}, "
            f"missing {sorted(expected - set(data))}, unknown {sorted(set(data) - expected)}"
        )
