"""The registered trainer and the runner that fairchem starts on every rank: train, validate, predict.

A run lives in one folder: `config.yml` (resolved), `checkpoints/`, `logs/`, `results/`, `statistics.json`.
"""

import hashlib
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fairchem.core.common import distutils
from fairchem.core.common.registry import registry
from fairchem.core.components.runner import Runner
from fairchem.core.launchers.api import SchedulerType
from torch import nn
from torch.utils.data import Dataset

from faenet_ocp import build
from faenet_ocp.checkpoint import load_checkpoint, load_weights
from faenet_ocp.common.files import write_json, write_text
from faenet_ocp.config.schema import Config, SourceConfig, build_config, nearest
from faenet_ocp.data.loader import EvalBatchSampler, make_loader
from faenet_ocp.evaluation.metrics import UNITS, RunInfo, build_results
from faenet_ocp.evaluation.plots import plot_learning_curve, plot_parity
from faenet_ocp.evaluation.prediction import predict_split
from faenet_ocp.evaluation.report import render_table
from faenet_ocp.evaluation.validation import SplitOutcome, run_split
from faenet_ocp.launch.local_ranks import rank_errors, say, stop_signals
from faenet_ocp.tasks.references import CompositionFit
from faenet_ocp.tasks.tasks import load_tasks_state, make_tasks
from faenet_ocp.training.run import TrainingRun
from faenet_ocp.training.unit import make_optimizer

MODES = ("train", "validate", "predict")
OFFICIAL_SIZES = {
    "is2re": {"val_id": 24943, "val_ood_ads": 24961, "val_ood_cat": 24963, "val_ood_both": 24987},
    "s2ef": {"val_id": 999866, "val_ood_ads": 999838, "val_ood_cat": 999809, "val_ood_both": 999944},
}
"""Systems in OC20's own validation splits: what else is evaluated is never called OC20."""


@registry.register_trainer("faenet")
class FAENetTrainer:
    """Turns a configuration into fairchem's job and runner; `trainer: faenet`.

    A trainer of one's own subclasses this one and names another runner class.

    Args:
        config: validated configuration.
        mode: train, validate or predict.
        checkpoint: weights to validate or predict with.
    """

    runner = "faenet_ocp.training.trainer.OCPRunner"

    def __init__(self, config: Config, *, mode: str = "train", checkpoint: str | None = None):
        self.config, self.mode, self.checkpoint = config, mode, checkpoint

    def check(self) -> None:
        """Builds what can be built without data or ranks and looks at the paths, so that mistakes show at once.

        Raises:
            ValueError: what is wrong, with its key.
        """
        config = self.config
        if self.checkpoint is not None:
            load_checkpoint(self.checkpoint)
        splits = dict(config.dataset.val)
        if self.mode == "train":
            if config.dataset.train is None:
                raise ValueError("dataset.train: missing; it says where the training set lies")
            splits["train"] = config.dataset.train
            make_optimizer(config.optim)([nn.Parameter(torch.zeros(1))])
        elif self.checkpoint is None:
            raise ValueError(f"--checkpoint: --mode {self.mode} needs the weights to use")
        if self.mode == "predict":
            splits = dict(config.dataset.test) or splits
        if not splits:
            raise ValueError("dataset: no splits are given")
        known = UNITS[config.task]
        metric = config.evaluation_metrics.primary_metric.metric
        for name in [metric, *self._metric_names()]:
            if name not in known:
                raise ValueError(f"evaluation_metrics: unknown metric {name!r}{nearest(name, list(known))}")
        build.make_model(config)
        for split, source in splits.items():
            try:
                build.make_dataset(config, source, training=split == "train", labelled=self.mode != "predict")
            except (ValueError, OSError) as error:
                raise ValueError(f"dataset, split {split}: {error}") from error

    def _metric_names(self) -> list[str]:
        """Metrics that the config lists, in this package's names (`energy: [mae]` is `energy_mae`)."""
        return [
            name if "within_threshold" in name else f"{target}_{name}"
            for target, names in self.config.evaluation_metrics.metrics.items()
            for name in names
        ]

    def build(self, folder: Path) -> dict[str, Any]:
        """The `job` and `runner` mappings for fairchem's launchers; the run's folder holds its config already."""
        job, config = self.config.job, f"config_{self.mode}.yml" if self.mode != "train" else "config.yml"
        return {
            "job": {
                "run_name": folder.name,
                "timestamp_id": folder.name,
                "run_dir": str(folder.parent),
                "device_type": "CPU" if job.cpu else "CUDA",
                "debug": job.debug,
                "seed": job.seed,
                "scheduler": {"ranks_per_node": job.num_gpus, "num_nodes": job.num_nodes},
            },
            "runner": {
                "_target_": self.runner,
                "config_path": str(folder / config),
                "mode": self.mode,
                "checkpoint": self.checkpoint,
            },
        }


class OCPRunner(Runner):
    """What happens on each rank.

    Args:
        config_path: resolved configuration in the run's folder.
        mode: train, validate or predict.
        checkpoint: weights for validate and predict.
    """

    def __init__(self, config_path: str, mode: str, checkpoint: str | None = None):
        self.folder = Path(config_path).parent
        self.config = build_config(yaml.safe_load(Path(config_path).read_text()))
        self.mode, self.checkpoint = mode, checkpoint
        self._datasets: dict[str, Dataset] = {}
        self._training: TrainingRun | None = None

    def load_state(self, checkpoint_location: str | None) -> None:
        """Nothing to do: a run goes on from the newest checkpoint in its folder."""

    def save_state(self, checkpoint_location: str, is_preemption: bool = False) -> bool:
        """False: there is no state beside the run's checkpoints, which `run` finds itself."""
        return False

    def stop_soon(self) -> bool:
        """What a SLURM job calls, from any thread: asks training to save and to stop after the present step.

        Returns:
            False when no steps are being done, and there is nothing to save.
        """
        return self._training is not None and self._training.request_stop(128 + signal.SIGTERM)

    def run(self) -> None:
        """Trains if asked to, then evaluates or predicts and writes the results."""
        with rank_errors():
            if self.job_config.scheduler.mode != SchedulerType.LOCAL:  # SLURM has its own way of asking for an end
                self._run()
                return
            with stop_signals(self._stop):
                self._run()

    def _stop(self, status: int) -> None:
        if self._training is None or not self._training.request_stop(status):
            say("stopped")
            raise SystemExit(status)
        if distutils.is_master():
            say("stopping after this step; the same signal again stops at once")

    def _run(self) -> None:
        _leave_cores_to_the_loader(self.config)
        if self.mode == "train":
            self._training = TrainingRun(self)
            self._training.run()
            return
        state = load_checkpoint(str(self.checkpoint))
        model, tasks = self.load_model(state)
        if self.mode == "predict":
            self.predict(model, tasks)
            return
        fit = CompositionFit.from_dict(state["statistics"]) if state.get("statistics") else None
        self.report(model, self.evaluate(model, tasks, fit), state, str(self.checkpoint))

    # ---------------------------------------------------------------------------------- evaluation
    def load_model(self, state: Mapping[str, Any]) -> tuple[nn.Module, list[Any]]:
        """Model and tasks of a checkpoint (its EMA weights where it has them), on this rank's device.

        Raises:
            ValueError: the weights do not fit the configured model.
        """
        model = build.make_model(self.config)
        load_weights(model, state)
        tasks = make_tasks(self.config.model_copy(update={"outputs": {}}), None)
        load_tasks_state(tasks, state["tasks"])
        return model.to(distutils.get_device_for_local_rank()), tasks

    def split_dataset(self, split: str, source: SourceConfig, *, labelled: bool = True) -> Dataset:
        """The evaluation data set of a split, opened once."""
        if split not in self._datasets:
            self._datasets[split] = build.make_dataset(
                self.config, source, labelled=labelled, cache_dir=self.folder / "cache"
            )
        return self._datasets[split]

    def evaluate(
        self, model: nn.Module, tasks: list[Any], fit: CompositionFit | None, *, max_systems: int | None = None
    ) -> dict[str, SplitOutcome]:
        """Every validation split, in the order of the config; with `max_systems`, a fixed random subset of each."""
        return {
            split: self._run_split(model, tasks, split, source, fit=fit, max_systems=max_systems)
            for split, source in self.config.dataset.val.items()
        }

    def _run_split(
        self,
        model: nn.Module,
        tasks: list[Any],
        split: str,
        source: SourceConfig,
        *,
        labelled: bool = True,
        fit: CompositionFit | None = None,
        max_systems: int | None = None,
    ) -> SplitOutcome:
        optim = self.config.optim
        dataset = self.split_dataset(split, source, labelled=labelled)
        indices: Sequence[int] = range(len(dataset))  # type: ignore[arg-type]
        if max_systems is not None and max_systems < len(indices):
            generator = np.random.default_rng(self.config.job.seed)
            indices = np.sort(generator.choice(len(indices), max_systems, replace=False)).tolist()
        sampler = EvalBatchSampler(
            indices,
            optim.eval_batch_size or optim.batch_size,
            rank=distutils.get_rank(),
            world_size=distutils.get_world_size(),
        )
        loader = make_loader(dataset, sampler, num_workers=optim.num_workers, context=optim.worker_context)
        return run_split(
            model,
            tasks,
            loader,
            split=split,
            labelled=labelled,
            fit=fit,
            amp=self.config.job.amp,
            conservative=self._conservative,
        )

    def predict(self, model: nn.Module, tasks: list[Any]) -> None:
        """Predicts the test splits (or, without any, the validation splits) to `results/predictions/<split>.npz`.

        Raises:
            ValueError: the file of a split is there already.
        """
        optim, world = self.config.optim, distutils.get_world_size()
        settings = self.config.model_dump_json(
            exclude={"slurm": True, "job": {"num_gpus", "num_nodes", "cpu", "run_dir", "identifier"}}
        )
        digest = hashlib.sha256(Path(str(self.checkpoint)).read_bytes() + settings.encode()).hexdigest()
        for split, source in (self.config.dataset.test or self.config.dataset.val).items():
            dataset = self.split_dataset(split, source, labelled=False)
            path = self.folder / "results" / "predictions" / f"{split}.npz"
            count = predict_split(
                model,
                tasks,
                dataset,
                path,
                key=digest[:12],
                make_loader=partial(make_loader, dataset, num_workers=optim.num_workers, context=optim.worker_context),
                batch_size=max(1, (optim.eval_batch_size or optim.batch_size) // world),
                amp=self.config.job.amp,
                conservative=self._conservative,
            )
            if distutils.is_master():
                logging.info("%s: %d predictions in %s", split, count, path)

    @property
    def _conservative(self) -> bool:
        return self.config.output("forces").eval_from == "energy_gradient"

    def report(
        self,
        model: nn.Module,
        outcomes: Mapping[str, SplitOutcome],
        state: Mapping[str, Any],
        checkpoint: str,
    ) -> None:
        """Writes `results/`: metrics.json, table.md, parity and learning-curve plots (first rank)."""
        if not distutils.is_master() or not outcomes:
            return
        config, results = self.config, self.folder / "results"
        sizes = {split: outcome.num_systems for split, outcome in outcomes.items()}
        official = config.dataset.name == "OC20" and all(
            OFFICIAL_SIZES[config.task].get(split) == size for split, size in sizes.items()
        )
        label = config.dataset.name
        if config.dataset.name == "OC20":
            label = f"OC20 {config.task.upper()}" if official else "OC20's formats, not its validation splits"
        systems = sum(outcome.forward_systems for outcome in outcomes.values())
        forward = sum(outcome.forward_seconds for outcome in outcomes.values())
        seconds = sum(outcome.seconds for outcome in outcomes.values())
        progress = state["progress"]
        document = build_results(
            task=config.task,
            dataset=label,
            oc20=official,
            run=RunInfo(
                model=str(config.model["name"]),
                config=str(self.folder.name),
                parameters=build.count_parameters(model),
                checkpoint=checkpoint,
                step=progress["num_steps_completed"],
                epoch=progress["num_epochs_completed"],
                device=_device_words(),
                frames=build.frame_settings(config, config.frames.evaluation_method),
                seed=config.job.seed,
            ),
            splits={split: outcome.metrics for split, outcome in outcomes.items()},
            baselines={split: outcome.baselines for split, outcome in outcomes.items() if outcome.baselines},
            forward_samples_per_s=systems / forward if forward else None,
            end_to_end_samples_per_s=sum(sizes.values()) / seconds if seconds else None,
            seconds_per_epoch=float(np.mean(state["epoch_seconds"])) if state["epoch_seconds"] else None,
            epochs=len(state["epoch_seconds"]) or None,
        )
        write_json(results / "metrics.json", document)
        write_text(results / "table.md", render_table(document))
        pairs = {s: (o.predictions["energy"], o.predictions["energy_target"]) for s, o in outcomes.items()}
        plot_parity(pairs, results / "parity_energy.png", dataset=label)
        forces = {split: outcome.forces for split, outcome in outcomes.items() if outcome.forces is not None}
        if forces:
            plot_parity(forces, results / "parity_forces.png", dataset=label, quantity="forces")
        if (self.folder / "logs" / "metrics.jsonl").is_file():
            plot_learning_curve(self.folder / "logs" / "metrics.jsonl", results / "learning_curve.png", dataset=label)


def _leave_cores_to_the_loader(config: Config) -> None:
    """On a CPU, threads that wait for a core that a loader worker has make every step wait."""
    alone = config.job.cpu and distutils.get_world_size() == 1
    if alone and "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - config.optim.num_workers))


def _device_words() -> str:
    device, world = torch.device(distutils.get_device_for_local_rank()), distutils.get_world_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return name if world == 1 else f"{world} x {name}"
