"""Runs a model over splits: metrics, baselines, predictions and throughput, exact on any number of ranks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fairchem.core.common import distutils
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.units.mlip_unit.mlip_unit import Task
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from faenet_ocp.evaluation.metrics import BaselineMetrics, EnergyMetrics, ForceMetrics
from faenet_ocp.tasks.references import CompositionFit
from faenet_ocp.tasks.tasks import conservative_outputs, to_physical

_PLOTTED_ATOMS = 20_000


@dataclass
class SplitOutcome:
    """What one split gave.

    Attributes:
        metrics: by name; empty for a split without labels. `frames_per_system` is 1 plus what canonical frames that
            were not unique (or full frames) add.
        baselines: by row and name; empty without training statistics.
        predictions: on the first rank, in the order of the data set: `ids` (str), `energy` (eV), `energy_target`.
        forces: pairs of predicted and labelled forces (M, 3) of the first free atoms, for a plot; empty without forces.
        num_systems: over all ranks.
        forward_seconds: in the model's forward pass, the slowest rank's; without the first batch where there are more.
        forward_systems: systems that `forward_seconds` stands for, over all ranks.
        seconds: wall time with loading.
    """

    metrics: dict[str, float | int] = field(default_factory=dict)
    baselines: dict[str, dict[str, float | int]] = field(default_factory=dict)
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    forces: tuple[np.ndarray, np.ndarray] | None = None
    num_systems: int = 0
    forward_seconds: float = 0.0
    forward_systems: int = 0
    seconds: float = 0.0


@torch.no_grad()
def run_split(
    model: nn.Module,
    tasks: Sequence[Task],
    loader: DataLoader,
    *,
    split: str,
    labelled: bool = True,
    fit: CompositionFit | None = None,
    amp: bool = False,
    conservative: bool = False,
) -> SplitOutcome:
    """Predicts every system of a split once.

    Args:
        model: returns outputs by task; not wrapped in DDP, so ranks may have different numbers of batches.
        tasks: see `tasks.make_tasks`; they turn outputs into eV and eV/Angstrom.
        loader: this rank's share (`loader.EvalBatchSampler`).
        split: name, for messages and the progress bar.
        labelled: whether there are labels to compare with.
        fit: statistics of the training set, for the baselines.
        amp: bfloat16 autocast.
        conservative: forces are -dE/dX instead of the predicted ones.

    Raises:
        ValueError: no systems, a sample that cannot be used, or predictions or labels that are not finite.
    """
    device = torch.device(distutils.get_device_for_local_rank())
    collected = _Collector(tasks, labelled, fit)
    training = model.training
    model.eval()
    start = time.perf_counter()
    try:
        bar = tqdm(loader, desc=split, unit="batch", leave=False, disable=None if distutils.is_master() else True)
        for batches in bar:
            for batch in batches:
                batch = batch.to(device)
                _synchronize(device)
                before = time.perf_counter()
                with torch.autocast(device_type=device.type, dtype=torch.bfloat16, enabled=amp):
                    outputs = conservative_outputs(model, tasks, batch) if conservative else model(batch)
                _synchronize(device)
                collected.add(batch, to_physical(tasks, outputs, batch), time.perf_counter() - before)
    finally:
        model.train(training)
    return collected.outcome(split, time.perf_counter() - start)


class _Collector:
    """One rank's sums and predictions, joined over the ranks at the end."""

    def __init__(self, tasks: Sequence[Task], labelled: bool, fit: CompositionFit | None):
        self.labelled = labelled
        self.energy = EnergyMetrics()
        self.forces = ForceMetrics() if any(task.name == "forces" for task in tasks) else None
        self.baselines = BaselineMetrics(fit) if fit is not None else None
        self.eval_free = all(task.eval_on_free_atoms for task in tasks if task.level == "atom")
        self.rows: list[tuple[list[str], np.ndarray, np.ndarray | None]] = []
        self.forward: list[tuple[float, int]] = []
        self.plotted: list[tuple[Tensor, Tensor]] = []
        self.num_plotted = 0
        self.num_frames = 0

    def add(self, batch: AtomicData, predictions: dict[str, Tensor], seconds: float) -> None:
        energy = predictions["energy"].double().cpu()
        target = batch.energy.double().cpu() if self.labelled else None
        self.rows.append((list(batch.sid), energy.numpy(), None if target is None else target.numpy()))
        self.forward.append((seconds, len(energy)))
        self.num_frames += int((batch.frame_weight > 0).sum()) if "frame_weight" in batch else len(energy)
        if target is None:
            return
        self.energy.update(energy, target)
        if self.baselines is not None:
            self.baselines.update(batch.composition, target)
        if self.forces is not None:
            free = batch.fixed == 0 if self.eval_free else torch.ones_like(batch.fixed, dtype=torch.bool)
            self.forces.update(
                forces_pred=predictions["forces"],
                forces_target=batch.forces,
                free=free,
                batch=batch.batch,
                energy_pred=energy.to(batch.forces.device),
                energy_target=target,
            )
            if self.num_plotted < _PLOTTED_ATOMS:
                self.plotted.append((predictions["forces"][free].cpu(), batch.forces[free].cpu()))
                self.num_plotted += len(self.plotted[-1][0])

    def outcome(self, split: str, seconds: float) -> SplitOutcome:
        for collector in (self.energy, self.forces, self.baselines):
            if collector is not None and self.labelled:
                collector.sums = _reduce(collector.sums, "sum")
        counted = self.forward[1:] if len(self.forward) > 1 else self.forward
        sums = [sum(n for _, n in self.forward), sum(n for _, n in counted), self.num_frames]
        totals = _reduce(torch.tensor(sums).double(), "sum")
        times = _reduce(torch.tensor([sum(s for s, _ in counted), seconds]).double(), "max")
        result = SplitOutcome(
            predictions=_gather(self.rows),
            num_systems=int(totals[0]),
            forward_systems=int(totals[1]),
            forward_seconds=float(times[0]),
            seconds=float(times[1]),
        )
        if self.labelled:
            result.metrics = self.energy.compute(split) | {"frames_per_system": float(totals[2] / totals[0])}
            if self.forces is not None:
                result.metrics |= self.forces.compute(split)
                if self.plotted:
                    pred, target = (torch.cat(part).numpy() for part in zip(*self.plotted, strict=True))
                    result.forces = (pred[:_PLOTTED_ATOMS], target[:_PLOTTED_ATOMS])
            if self.baselines is not None:
                result.baselines = self.baselines.compute(split)
                if self.forces is not None:
                    result.baselines["mean_predictor"] |= self.forces.zero_baseline()
        return result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reduce(values: Tensor, how: str) -> Tensor:
    """Sum or maximum over ranks, in float64 on the device that the backend needs; back on the CPU."""
    if distutils.get_world_size() == 1:
        return values.cpu()
    values = values.to(distutils.get_device_for_local_rank())
    dist.all_reduce(values, op=dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return values.cpu()


def _gather(rows: list[tuple[list[str], np.ndarray, np.ndarray | None]]) -> dict[str, np.ndarray]:
    """Predictions of all ranks on the first one, in the order of the data (rank r has the samples r, r + w, ...)."""
    mine: dict[str, Any] = {"ids": np.array([sid for sids, _, _ in rows for sid in sids])}
    mine["place"] = np.arange(len(mine["ids"])) * distutils.get_world_size() + distutils.get_rank()
    mine["energy"] = np.concatenate([energy for _, energy, _ in rows]) if rows else np.empty(0)
    targets = [target for _, _, target in rows if target is not None]
    if targets:
        mine["energy_target"] = np.concatenate(targets)
    parts = [part for part in distutils.gather_objects(mine) or [] if len(part["ids"])]
    if not parts:
        return {}
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(joined.pop("place"))
    return {name: values[order] for name, values in joined.items()}
