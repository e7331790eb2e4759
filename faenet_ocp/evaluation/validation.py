"""Runs a model over batches: THE evaluation loop, and with it metrics, baselines and throughput of a split.

Exact on any number of ranks.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from fairchem.core.common import distutils
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from faenet_ocp.common.transfer import Fetched
from faenet_ocp.data.fields import exact_label, shallow_copy
from faenet_ocp.evaluation.by_atoms import ADSORBATE, ByAtoms
from faenet_ocp.evaluation.metrics import (
    BaselineMetrics,
    JointThreshold,
    ScalarMetrics,
    UnseenElements,
    Values,
    VectorMetrics,
)
from faenet_ocp.tasks.references import CompositionFit
from faenet_ocp.tasks.tasks import (
    TargetTask,
    conservative_outputs,
    has_no_forces_of_its_own,
    to_physical,
    unseen_elements,
)

_PLOTTED_ATOMS = 20_000


@torch.no_grad()
def predict(
    model: nn.Module,
    tasks: Sequence[TargetTask],
    batches: Iterable[AtomicData],
    *,
    amp: bool = False,
    conservative: bool = False,
) -> Iterator[tuple[AtomicData, dict[str, Tensor], float]]:
    """Predictions in physical units, batch by batch, on the device that the model is on.

    Args:
        model: returns outputs by task; not wrapped in DDP, so ranks may have different numbers of batches.
        tasks: see `tasks.make_tasks`; they turn outputs into eV and eV/Angstrom.
        batches: with all that the model needs; labels are not looked at.
        amp: bfloat16 autocast.
        conservative: forces are -dE/dX, also of a model that predicts others.

    Yields:
        a batch as it was given, its predictions by target, on the CPU, and the seconds of the forward pass. A GPU has
        the next batch to work on by then.
    """
    device = next(model.parameters()).device
    training = model.training
    conservative = conservative or has_no_forces_of_its_own(model, tasks)
    model.eval()
    launched: deque[_Launched] = deque()
    try:
        for batch in batches:
            # A copy: fairchem's `to` moves the batch itself, whose labels are to stay where they are.
            on_device, clock = shallow_copy(batch).to(device, non_blocking=True), _Clock(device)
            with torch.autocast(device_type=device.type, dtype=torch.bfloat16, enabled=amp):
                outputs = conservative_outputs(model, tasks, on_device) if conservative else model(on_device)
            clock.stop()
            launched.append(_Launched(batch, Fetched(to_physical(tasks, outputs, on_device)), clock))
            if device.type == "cpu" or len(launched) > 1:
                yield launched.popleft().arrived()
        while launched:
            yield launched.popleft().arrived()
    finally:
        model.train(training)


class _Clock:
    """Time from its making to `stop`, on the device that does the work and without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._times = [self._now(0)]

    def _now(self, place: int) -> float:
        if self._events:
            self._events[place].record()
        return time.perf_counter()

    def stop(self) -> None:
        self._times.append(self._now(1))

    def seconds(self) -> float:
        if not self._events:
            return self._times[1] - self._times[0]
        start, end = self._events
        end.synchronize()
        return start.elapsed_time(end) / 1000


class _Launched(NamedTuple):
    """A batch whose predictions are being made, and fetched."""

    batch: AtomicData
    predictions: Fetched
    clock: _Clock

    def arrived(self) -> tuple[AtomicData, dict[str, Tensor], float]:
        return self.batch, self.predictions.wait(), self.clock.seconds()


@dataclass
class SplitOutcome:
    """What one split gave.

    Attributes:
        metrics: by name. `frames_per_system` is 1 plus what canonical frames that were not unique (or full frames) add.
        baselines: by row and name; empty without training statistics.
        by_atoms: for each vector what `by_atoms.ByAtoms` computes.
        pairs: by target, prediction and label for a plot: on the first rank all scalars, in the order of the data set,
            and on each rank the vectors (M, 3) of its first atoms that count.
        adsorbate: which of these atoms are an adsorbate's, (M,) bool.
        unseen: systems by symbol of an element that the training set lacks, and in "all" those with any such element.
        num_systems: over all ranks.
        forward_seconds: in the model's forward pass, the slowest rank's; without the first batch where there are more.
        forward_systems: systems that `forward_seconds` stands for, over all ranks.
        seconds: wall time with loading.
    """

    metrics: Values = field(default_factory=dict)
    baselines: dict[str, Values] = field(default_factory=dict)
    by_atoms: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    adsorbate: np.ndarray | None = None
    unseen: dict[str, int] = field(default_factory=dict)
    num_systems: int = 0
    forward_seconds: float = 0.0
    forward_systems: int = 0
    seconds: float = 0.0


def run_split(
    model: nn.Module,
    tasks: Sequence[TargetTask],
    loader: DataLoader,
    *,
    split: str,
    fits: Mapping[str, CompositionFit] | None = None,
    amp: bool = False,
    conservative: bool = False,
) -> SplitOutcome:
    """Predicts every system of a labelled split once, and compares.

    Args:
        model, tasks, amp, conservative: see `predict`.
        loader: this rank's share (`loader.EvalBatchSampler`).
        split: name, for messages and the progress bar.
        fits: statistics of the training set by target, for the baselines.

    Raises:
        ValueError: no systems, a sample that cannot be used, or predictions or labels that are not finite.
    """
    collector = _Collector(tasks, fits or {})
    start = time.perf_counter()
    bar = tqdm(loader, desc=split, unit="batch", leave=False, disable=None if distutils.is_master() else True)
    for predicted in predict(model, tasks, chain.from_iterable(bar), amp=amp, conservative=conservative):
        collector.add(*predicted)
    return collector.outcome(split, time.perf_counter() - start)


class _Collector:
    """One rank's sums and predictions, joined over the ranks at the end."""

    def __init__(self, tasks: Sequence[TargetTask], fits: Mapping[str, CompositionFit]):
        targets = [task.target for task in tasks]
        self.scalars = {target.name: ScalarMetrics(target) for target in targets if target.rank == 0}
        self.vectors = {target.name: VectorMetrics(target) for target in targets if target.rank == 1}
        self.by_atoms = {name: ByAtoms(vector.target) for name, vector in self.vectors.items()}
        self.joint = [
            JointThreshold(scalar.target, vector.target)
            for scalar in self.scalars.values()
            for vector in self.vectors.values()
            if scalar.target.threshold and vector.target.threshold
        ]
        self.baselines = [BaselineMetrics(target, fits[target.name]) for target in targets if target.name in fits]
        self.unseen = UnseenElements(unseen_elements(tasks, fits))
        self.eval_free = all(task.eval_on_free_atoms for task in tasks if task.level == "atom")
        self.pairs: dict[str, list[tuple[Tensor, Tensor]]] = {target.name: [] for target in targets}
        self.adsorbate: list[Tensor] = []
        self.forward: list[tuple[float, int]] = []
        self.num_plotted = self.num_frames = 0

    def add(self, batch: AtomicData, predictions: Mapping[str, Tensor], seconds: float) -> None:
        size = len(batch.natoms)
        self.forward.append((seconds, size))
        self.num_frames += int((batch.frame_weight > 0).sum()) if "frame_weight" in batch else size
        self.unseen.update(batch)
        for name, scalar in self.scalars.items():
            pair = predictions[name].double(), exact_label(batch, name).double()
            scalar.update(*pair)
            self.pairs[name].append(pair)
        for baseline in self.baselines:
            baseline.update(batch.composition, exact_label(batch, baseline.target.name))
        if self.vectors:
            self._add_vectors(batch, predictions)

    def _add_vectors(self, batch: AtomicData, predictions: Mapping[str, Tensor]) -> None:
        counted = batch.fixed == 0 if self.eval_free else torch.ones_like(batch.fixed, dtype=torch.bool)
        pairs = {name: (predictions[name], exact_label(batch, name)) for name in self.pairs}
        for name, vector in self.vectors.items():
            vector.update(*pairs[name], counted)
            self.by_atoms[name].update(*pairs[name], counted, batch.tags)
        for joint in self.joint:
            joint.update(pairs[joint.scalar.name], pairs[joint.vector.name], counted=counted, batch=batch.batch)
        if self.num_plotted < _PLOTTED_ATOMS:
            self.num_plotted += int(counted.sum())
            self.adsorbate.append((batch.tags == ADSORBATE)[counted])
            for name in self.vectors:
                pred, label = pairs[name]
                self.pairs[name].append((pred[counted], label[counted]))

    def outcome(self, split: str, seconds: float) -> SplitOutcome:
        collectors: list[ScalarMetrics | VectorMetrics | JointThreshold] = [
            *self.scalars.values(),
            *self.vectors.values(),
            *self.joint,
        ]
        for sums in [*collectors, *self.baselines, self.unseen, *self.by_atoms.values()]:
            sums.sums = reduced(sums.sums, "sum")
        counted = self.forward[1:] if len(self.forward) > 1 else self.forward
        counts = [sum(n for _, n in self.forward), sum(n for _, n in counted), self.num_frames]
        totals = reduced(torch.tensor(counts).double(), "sum")
        times = reduced(torch.tensor([sum(s for s, _ in counted), seconds]).double(), "max")
        result = SplitOutcome(
            unseen=self.unseen.compute(),
            by_atoms={name: groups.compute() for name, groups in self.by_atoms.items()},
            num_systems=int(totals[0]),
            forward_systems=int(totals[1]),
            forward_seconds=float(times[0]),
            seconds=float(times[1]),
        )
        for collector in collectors:
            result.metrics |= collector.compute(split)
        result.metrics["num_systems"] = result.num_systems
        result.metrics["frames_per_system"] = float(totals[2] / totals[0])
        for baseline in self.baselines:
            for row, values in baseline.compute(split).items():
                result.baselines[row] = result.baselines.get(row, {}) | values
        for vector in self.vectors.values():
            if self.baselines or not self.scalars:
                zero = vector.zero_baseline()
                result.baselines["mean_predictor"] = result.baselines.get("mean_predictor", {}) | zero
        for name in self.scalars:
            result.pairs[name] = _gather(self.pairs[name])
        for name in self.vectors:
            if self.pairs[name]:  # a rank may have no systems
                pred, label = (torch.cat(part)[:_PLOTTED_ATOMS].numpy() for part in zip(*self.pairs[name], strict=True))
                result.pairs[name] = pred, label
                result.adsorbate = torch.cat(self.adsorbate)[:_PLOTTED_ATOMS].numpy()
        return result


def reduced(values: Tensor, how: str) -> Tensor:
    """Sum or maximum over ranks, in float64 on the device that the backend needs; back on the CPU."""
    if distutils.get_world_size() == 1:
        return values.cpu()
    values = values.to(distutils.get_device_for_local_rank())
    dist.all_reduce(values, op=dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return values.cpu()


def _gather(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of all ranks on the first one, in the order of the data (rank r has the samples r, r + w, ...)."""
    mine = np.concatenate([torch.stack(pair).numpy() for pair in pairs], axis=1) if pairs else np.empty((2, 0))
    place = np.arange(mine.shape[1]) * distutils.get_world_size() + distutils.get_rank()
    parts = distutils.gather_objects((place, mine)) or [(place, mine)]
    order = np.argsort(np.concatenate([place for place, _ in parts]))
    pred, label = np.concatenate([values for _, values in parts], axis=1)[:, order]
    return pred, label
