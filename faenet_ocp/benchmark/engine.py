"""What a training step of the real trainer takes beside forward pass, backward pass and optimiser."""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from fairchem.core.common.utils import recursive_dict_merge
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor
from torch_geometric.data import Data
from torchtnt.framework import State

from faenet_ocp import local_ranks
from faenet_ocp.backbone import FrameAveragedModel
from faenet_ocp.benchmark.systems import make_systems, slab_sizes
from faenet_ocp.config import Config, build_config, find_config, load_yaml
from faenet_ocp.lmdb_writer import LmdbShardWriter
from faenet_ocp.loader import Batches
from faenet_ocp.trainer import FAENetTrainer
from faenet_ocp.unit import OCPTrainUnit

_TIMED: dict[str, tuple[type, str]] = {
    "forward": (FrameAveragedModel, "forward"),
    "backward": (Tensor, "backward"),
    "optimiser": (torch.optim.AdamW, "step"),
}
PARTS = tuple(_TIMED)


def engine(
    model: dict[str, Any], *, batch_size: int, num_steps: int, remove_subsurface: bool, device: torch.device
) -> list[dict[str, float]]:
    """Train on generated slabs in an LMDB with the configuration of IS2RE, loaded by one process beside the trainer.

    A step lasts from its beginning to that of the next: fetching the batch, moments, losses, norm of the gradient,
    schedule, progress, callbacks are in it. The first and the last step of the run are left out.

    Args:
        model: options of the model, where they are not those of `configs/is2re/faenet.yml`.
        batch_size: systems in a step.
        num_steps: steps to report.
        remove_subsurface: without the atoms of tag 0.
        device: of the training.

    Returns:
        for each step the seconds (as in `measure`) of `step`, `forward`, `backward` and `optimiser`, and its `systems`.
    """
    clock = _Clock(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_slabs(folder / "data.lmdb", batch_size * (num_steps + 2))
        config = _config(folder, model, batch_size, remove_subsurface=remove_subsurface, device=device)
        run = folder / "run"
        run.mkdir()
        (run / "config.yml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # a sign to the trainer to leave them as they are
        with clock.running(), patch.dict(os.environ, threads):
            local_ranks.launch(local_ranks.fairchem_config(FAENetTrainer(config).build(run)))
    for step, following in pairwise(clock.steps):
        step["step"] = following["begin"] - step["begin"]
    return [{name: step[name] for name in ("systems", "step", *PARTS)} for step in clock.steps[1:-1]]


class _Clock:
    """Notes when steps begin and how long their parts take, in seconds: of this process on a CPU, else wall time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[dict[str, float]] = []

    def now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Meanwhile the trainer, the model and the optimiser are timed."""
        with ExitStack() as stack:
            stack.enter_context(patch.object(OCPTrainUnit, "train_step", self._step(OCPTrainUnit.train_step)))
            for part, (cls, method) in _TIMED.items():
                stack.enter_context(patch.object(cls, method, self._timed(part, getattr(cls, method))))
            yield

    def _step(self, train_step: Callable[..., None]) -> Callable[..., None]:
        def noting(unit: OCPTrainUnit, state: State, data: Batches) -> None:
            systems = sum(len(batch.natoms) for batch in data)
            self.steps.append({"begin": self.now(), "systems": systems, **dict.fromkeys(PARTS, 0.0)})
            train_step(unit, state, data)

        return noting

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            start = self.now()
            try:
                return function(*arguments, **named)
            finally:
                self.steps[-1][part] += self.now() - start

        return timed


def _config(
    folder: Path, model: dict[str, Any], batch_size: int, *, remove_subsurface: bool, device: torch.device
) -> Config:
    changes = {
        "model": model,
        "dataset": {"name": "generated slabs", "root": str(folder), "train": {"src": "data.lmdb"}},
        "optim": {"batch_size": batch_size, "max_epochs": 1, "num_workers": 1},
        "logger": "none",
        "job": {"cpu": device.type == "cpu"},
    }
    config = recursive_dict_merge(load_yaml(find_config("configs/is2re/faenet.yml")), changes)
    config["dataset"]["val"] = {}
    if not remove_subsurface:
        config["dataset"]["transforms"] = {}
    return build_config(config)


def _write_slabs(path: Path, count: int) -> None:
    systems = make_systems(slab_sizes(count), cutoff=6.0, max_neighbors=40, remove_subsurface=False)
    with LmdbShardWriter(path) as writer:
        for sid, system in enumerate(systems):
            writer.append(_record(system, sid))


def _record(system: AtomicData, sid: int) -> Data:
    names = ("pos", "cell", "tags", "edge_index", "cell_offsets")
    tensors = {name: getattr(system, name) for name in names}
    numbers, fixed = system.atomic_numbers.float(), system.fixed.float()
    energy = float(system.energy)
    return Data(**tensors, atomic_numbers=numbers, fixed=fixed, natoms=len(system.pos), y_relaxed=energy, sid=sid)
