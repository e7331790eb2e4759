"""Metrics from predictions, and the results JSON of a run.

`EnergyMetrics`, `ForceMetrics` and `BaselineMetrics` collect sums batch by batch, `build_results`
puts their numbers into one document, `common.files.write_json` stores it. Tables are made from that document in
`report.py`, plots in `plots.py`.

Metrics are OC20's, under OCP's names (units in `UNITS`; thresholds are strict):

- energy_within_threshold (EwT): share of systems with |energy error| < 0.02 eV;
- forces_mae, forces_cosine_similarity, forces_magnitude_error: over free atoms, the first over their
  components;
- energy_forces_within_threshold (EFwT): share of systems with |energy error| < 0.02 eV and every
  force component of every free atom off by less than 0.03 eV/A. Without free atoms only the energy
  counts.

Legend: N atoms, B systems; energies (B,) eV; forces (N, 3) eV/A; arrays are numpy or torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from faenet_ocp.common.files import plain, software_versions
from faenet_ocp.tasks.references import CompositionFit

FORMAT = 1
SPLITS = {
    "val_id": "ID",
    "val_ood_ads": "OOD Ads",
    "val_ood_cat": "OOD Cat",
    "val_ood_both": "OOD Both",
}
BASELINES = {
    "mean_predictor": "mean predictor",
    "linear_in_composition": "linear in composition",
}
ENERGY_THRESHOLD = 0.02
FORCE_THRESHOLD = 0.03
ENERGY_UNITS = {"energy_mae": "eV", "energy_mse": "eV^2", "energy_within_threshold": "%"}
FORCE_UNITS = {
    "forces_mae": "eV/A",
    "forces_cosine_similarity": "1",
    "forces_magnitude_error": "eV/A",
    "energy_forces_within_threshold": "%",
}
UNITS = {"is2re": ENERGY_UNITS, "s2ef": ENERGY_UNITS | FORCE_UNITS}

Array = Tensor | np.ndarray


# ---------------------------------------------------------------------------------------- metrics
class _Sums:
    """Sums over systems, all a metric needs; they add up over batches and ranks.

    Attributes:
        sums: float64 vector on the device of the predictions (nothing waits for the device before
            `compute`). Ranks may all-reduce it; `merge` adds another collector's.
    """

    size: ClassVar[int]

    def __init__(self) -> None:
        self.sums = torch.zeros(self.size, dtype=torch.float64)

    def merge(self, other: "_Sums") -> None:
        """Adds what another collector of the same class has seen."""
        self.sums = self.sums + other.sums.to(self.sums.device)

    def _add(self, *values: Tensor) -> None:
        added = torch.cat([value.to(torch.float64).reshape(-1) for value in values])
        self.sums = self.sums.to(added.device) + added


class EnergyMetrics(_Sums):
    """Energy MAE, MSE and EwT, streaming."""

    size = 6

    def update(self, pred: Array, target: Array) -> None:
        """Adds systems. Raises ValueError unless pred and target are both (B,)."""
        self._add(_energy_sums(pred, target))

    def compute(self, split: str) -> dict[str, float | int]:
        """Metrics of the systems seen; `split` is for the error messages.

        Raises:
            ValueError: no systems, or predictions or labels that are not finite.
        """
        return _energy_values(self.sums.tolist(), split)


class ForceMetrics(_Sums):
    """Force MAE, cosine, magnitude error and EFwT over free atoms, streaming."""

    size = 9

    def update(
        self,
        *,
        forces_pred: Array,
        forces_target: Array,
        free: Array,
        batch: Array,
        energy_pred: Array,
        energy_target: Array,
    ) -> None:
        """Adds systems.

        Args:
            forces_pred, forces_target: (N, 3) eV/A.
            free: (N,) bool, True for the atoms that count (OC20: ``fixed == 0``).
            batch: (N,) index of each atom's system among the B systems.
            energy_pred, energy_target: (B,) eV.

        Raises:
            ValueError: shapes that do not fit.
        """
        pred, target = _pair(forces_pred, forces_target, "forces", 2)
        energy, energy_label = _pair(energy_pred, energy_target, "energy", 1)
        free = torch.as_tensor(free, device=pred.device)
        batch = torch.as_tensor(batch, device=pred.device)
        shapes = (tuple(free.shape), tuple(batch.shape), pred.shape[1])
        if shapes != ((len(pred),), (len(pred),), 3) or free.dtype != torch.bool:
            raise ValueError(
                f"forces must be (N, 3), free (N,) bool and batch (N,), got "
                f"{tuple(pred.shape)}, {shapes[0]} {free.dtype} and {shapes[1]}"
            )
        error = (pred - target).abs()
        worst = torch.zeros_like(energy).scatter_reduce(0, batch.long(), error.amax(dim=1).where(free, 0.0), "amax")
        within = ((energy - energy_label).abs() < ENERGY_THRESHOLD) & (worst < FORCE_THRESHOLD)
        per_atom = torch.stack(
            [
                torch.ones_like(error[:, 0]),
                (~pred.isfinite()).any(dim=1).double(),
                (~target.isfinite()).any(dim=1).double(),
                error.sum(dim=1),
                torch.cosine_similarity(pred, target, dim=1),
                (pred.norm(dim=1) - target.norm(dim=1)).abs(),
                target.abs().sum(dim=1),
            ]
        )
        self._add(per_atom.where(free, 0.0).sum(dim=1), within.sum(), energy.new_tensor(len(energy)))

    def compute(self, split: str) -> dict[str, float | int]:
        """Metrics of the systems seen; num_atoms counts the free atoms.

        Raises:
            ValueError: no free atoms, or predictions or labels that are not finite.
        """
        atoms, bad, bad_labels, error, cosine, magnitude, _, within, systems = self.sums.tolist()
        _check_counts(atoms, bad, bad_labels, "forces of free atoms", split)
        return {
            "forces_mae": error / (3 * atoms),
            "forces_cosine_similarity": cosine / atoms,
            "forces_magnitude_error": magnitude / atoms,
            "energy_forces_within_threshold": 100 * within / systems,
            "num_atoms": int(atoms),
        }

    def zero_baseline(self) -> dict[str, float]:
        """What a model without forces would get (they have no mean direction)."""
        return {"forces_mae": float(self.sums[6] / (3 * self.sums[0]))}


class BaselineMetrics(_Sums):
    """Energy metrics of the two predictors that know nothing but the training set's energies."""

    size = 2 * EnergyMetrics.size + 1

    def __init__(self, fit: CompositionFit) -> None:
        super().__init__()
        self.fit = fit

    def update(self, composition: Tensor, target: Array) -> None:
        """Adds systems: composition (B, 119), target (B,) eV."""
        target = torch.as_tensor(target).cpu()
        linear = self.fit.predict(composition)
        self._add(
            _energy_sums(torch.full_like(linear, self.fit.mean), target),
            _energy_sums(linear, target),
            self.fit.unseen(composition).sum(),
        )

    def compute(self, split: str) -> dict[str, dict[str, float | int]]:
        """Metrics by row name; the linear row also says how many systems hold an element that was
        not in the training set (its atoms count as 0 eV). Raises ValueError as `EnergyMetrics`."""
        values, half = self.sums.tolist(), EnergyMetrics.size
        linear = _energy_values(values[half : 2 * half], split)
        return {
            "mean_predictor": _energy_values(values[:half], split),
            "linear_in_composition": linear | {"num_systems_unseen_elements": int(values[-1])},
        }


def energy_metrics(pred: Array, target: Array, *, split: str) -> dict[str, float | int]:
    """`EnergyMetrics` of whole arrays, (B,) eV each."""
    metrics = EnergyMetrics()
    metrics.update(pred, target)
    return metrics.compute(split)


def force_metrics(
    *,
    forces_pred: Array,
    forces_target: Array,
    free: Array,
    batch: Array,
    energy_pred: Array,
    energy_target: Array,
    split: str,
) -> dict[str, float | int]:
    """`ForceMetrics` of whole arrays; arguments as in its `update`."""
    metrics = ForceMetrics()
    metrics.update(
        forces_pred=forces_pred,
        forces_target=forces_target,
        free=free,
        batch=batch,
        energy_pred=energy_pred,
        energy_target=energy_target,
    )
    return metrics.compute(split)


def _pair(pred: Array, target: Array, what: str, ndim: int) -> tuple[Tensor, Tensor]:
    """Both as float64 tensors on the prediction's device; ValueError if shapes differ."""
    pred = torch.as_tensor(pred).detach().to(torch.float64)
    target = torch.as_tensor(target).detach().to(device=pred.device, dtype=torch.float64)
    if pred.shape != target.shape or pred.ndim != ndim:
        raise ValueError(
            f"{what}: prediction and target must have the same {ndim}-dimensional shape, "
            f"got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
    return pred, target


def _energy_sums(pred: Array, target: Array) -> Tensor:
    pred, target = _pair(pred, target, "energy", 1)
    error = (pred - target).abs()
    per_system = [
        torch.ones_like(error),
        (~pred.isfinite()).double(),
        (~target.isfinite()).double(),
        error,
        error.square(),
        (error < ENERGY_THRESHOLD).double(),
    ]
    return torch.stack(per_system).sum(dim=1)


def _energy_values(sums: list[float], split: str) -> dict[str, float | int]:
    systems, bad, bad_labels, error, square, within = sums
    _check_counts(systems, bad, bad_labels, "energies", split)
    return {
        "energy_mae": error / systems,
        "energy_mse": square / systems,
        "energy_within_threshold": 100 * within / systems,
        "num_systems": int(systems),
    }


def _check_counts(count: float, bad: float, bad_labels: float, what: str, split: str) -> None:
    if count == 0:
        raise ValueError(f"split {split!r}: no {what} to evaluate")
    for number, kind in ((bad, "predicted"), (bad_labels, "labelled")):
        if number:
            raise ValueError(f"split {split!r}: {number:.0f} of {count:.0f} {kind} {what} are not finite")


# ----------------------------------------------------------------------------------- results JSON
@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What was evaluated, where and how; goes into the results JSON as it is.

    Attributes:
        model: name for the table's row.
        config: path or name of the YAML.
        parameters: trainable parameters.
        checkpoint: path, None for weights that were never saved.
        step, epoch: of the weights.
        device: in words, with the number of ranks if more than one.
        frames: ``{"method": ..., "dim": ..., "group": ...}`` used in this evaluation.
        seed: of the frames and of a split's subset.
    """

    model: str
    config: str
    parameters: int
    checkpoint: str | None
    step: int | None
    epoch: float | None
    device: str
    frames: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str | None] = field(default_factory=software_versions)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def build_results(
    *,
    task: str,
    dataset: str,
    oc20: bool,
    run: RunInfo,
    splits: Mapping[str, Mapping[str, float | int]],
    baselines: Mapping[str, Mapping[str, Mapping[str, float | int]]],
    forward_samples_per_s: float | None = None,
    end_to_end_samples_per_s: float | None = None,
    seconds_per_epoch: float | None = None,
    epochs: float | None = None,
) -> dict[str, Any]:
    """The document that `write_json` stores and the tables are rendered from.

    Args:
        task: is2re or s2ef.
        dataset: what data this is, in words, for tables and plots ("OC20 IS2RE all").
        oc20: True only for evaluation on OC20's own validation splits; elsewhere the paper's row is
            marked as not comparable.
        run: see `RunInfo`.
        splits: split name to metrics (`EnergyMetrics.compute`, for s2ef with `ForceMetrics.compute`
            merged in).
        baselines: split name to `BaselineMetrics.compute`.
        forward_samples_per_s: model forward passes only (the paper's footnote 6).
        end_to_end_samples_per_s: with loading and collecting.
        seconds_per_epoch, epochs: of training.

    Raises:
        ValueError: unknown task or baseline, no split, a split that lacks a metric.
    """
    if task not in UNITS:
        raise ValueError(f"task must be one of {sorted(UNITS)}, got {task!r}")
    if not splits:
        raise ValueError("results need at least one split")
    for split, metrics in splits.items():
        missing = {*UNITS[task], "num_systems"} - set(metrics)
        if missing:
            raise ValueError(f"split {split!r}: metrics lack {sorted(missing)}")
    unknown = {name for rows in baselines.values() for name in rows} - set(BASELINES)
    if unknown:
        raise ValueError(f"unknown baselines {sorted(unknown)}, allowed: {sorted(BASELINES)}")
    by_row = {name: {split: rows[name] for split, rows in baselines.items() if name in rows} for name in BASELINES}
    results = {
        "format": FORMAT,
        "task": task,
        "dataset": dataset,
        "oc20": oc20,
        "run": asdict(run),
        "units": UNITS[task],
        "splits": splits,
        "average": _average(splits),
        "baselines": {name: {"splits": rows, "average": _average(rows)} for name, rows in by_row.items()},
        "throughput": {
            "forward_samples_per_s": forward_samples_per_s,
            "end_to_end_samples_per_s": end_to_end_samples_per_s,
        },
        "training": {"seconds_per_epoch": seconds_per_epoch, "epochs": epochs},
    }
    return plain(results, "results")


def _average(splits: Mapping[str, Mapping[str, float | int]]) -> dict[str, float] | None:
    """Mean over OC20's four validation splits, None unless all four are there."""
    if not all(split in splits for split in SPLITS):
        return None
    shared = set.intersection(*(set(splits[split]) for split in SPLITS))
    return {
        key: sum(splits[split][key] for split in SPLITS) / len(SPLITS)
        for key in (ENERGY_UNITS | FORCE_UNITS)
        if key in shared
    }


def load_results(path: str | Path) -> dict[str, Any]:
    """Reads what `write_json` stored from `build_results`.

    Raises:
        ValueError: not JSON, NaN or Infinity in it, another format version, or keys missing; names
            the file.
    """
    path = Path(path)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        results = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{path}: not a results file: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        found = results.get("format") if isinstance(results, dict) else type(results).__name__
        raise ValueError(f"{path}: results format {found!r}, this version reads {FORMAT}")
    keys = {"task", "dataset", "oc20", "run", "splits", "average", "baselines"}
    missing = (keys | {"throughput", "training"}) - set(results)
    if missing or results["task"] not in UNITS:
        raise ValueError(f"{path}: incomplete results, missing {sorted(missing)} or unknown task")
    return results
