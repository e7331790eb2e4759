"""One training run on one rank: label statistics, the loop, checkpoints, early and final evaluation."""

import json
import logging
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from fairchem.core.common import distutils
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset
from torchtnt.framework import train

from faenet_ocp import build
from faenet_ocp.checkpoint import (
    load_checkpoint,
    load_newest,
    load_weights,
    save_checkpoint,
    save_step,
    step_checkpoints,
)
from faenet_ocp.common.files import remove_leftovers, write_json
from faenet_ocp.config.messages import without_removed
from faenet_ocp.config.schema import Config, SourceConfig, build_config
from faenet_ocp.data.check import sample_of
from faenet_ocp.data.loader import TrainBatchSampler, make_loader
from faenet_ocp.evaluation.evaluator import Evaluator
from faenet_ocp.evaluation.log_names import metric_of
from faenet_ocp.targets import metrics_of
from faenet_ocp.tasks.losses import SummedLoss
from faenet_ocp.tasks.references import (
    CompositionFit,
    fit_labels,
    fits_from_dict,
    fits_to_dict,
    labels_of,
    statistics_sample,
)
from faenet_ocp.tasks.tasks import load_tasks_state, make_tasks, needs_fit, tasks_state
from faenet_ocp.training.hooks import Hooks
from faenet_ocp.training.loggers import MetricLogger
from faenet_ocp.training.optim import Plateau
from faenet_ocp.training.start import announce_shifts, check_statistics, fingerprints, freeze_unused
from faenet_ocp.training.unit import OCPTrainUnit

_LOOKED_AT = 2
"""Systems that show which parameters are used."""


class TrainingRun:
    """One training run on this rank: statistics, loop, checkpoints, early and final evaluation.

    Args:
        config: of the run.
        folder: of the run.
        job_config: fairchem's job section.
        evaluator: of its validation splits.
        checkpoint: weights to begin with; not used where the run goes on from a checkpoint of its own.
    """

    def __init__(
        self, config: Config, folder: Path, *, job_config: DictConfig, evaluator: Evaluator, checkpoint: str | None
    ):
        self.config, self.folder, self.job_config = config, folder, job_config
        self.evaluator, self.checkpoint = evaluator, checkpoint
        self.checkpoints = self.folder / "checkpoints"
        self.best: dict[str, Any] = {"value": None, "step": None}
        self.epoch_seconds: list[float] = []
        self.pending_evaluation = False
        self.stepping, self.stop_code = False, 128 + signal.SIGTERM
        self.logger: MetricLogger | None = None

    def run(self) -> None:
        """Trains to the end (from the newest checkpoint, if there is one), then evaluates the best weights."""
        optim, source = self.config.optim, self.config.dataset.train
        if source is None:
            raise ValueError("dataset.train: missing; it says where the training set lies")
        self.data = fingerprints(self.config)
        self.fits = self._statistics(source)
        self.tasks = make_tasks(self.config, self.fits)
        loader = self._make_loader(source)
        self.unit = self._make_unit(loader)
        self._resume(source)
        if distutils.is_master():
            self.logger = self.unit.metric_logger = self._make_logger()
        if self.pending_evaluation:  # the run ended between the end of an epoch and its evaluation
            self.evaluate_and_save()
        self.stepping = True
        try:
            if not self.ends_early():
                train(
                    self.unit, loader, max_epochs=optim.max_epochs, max_steps=optim.max_steps, callbacks=[Hooks(self)]
                )
        finally:
            self.stepping = False
            if self.logger is not None:
                self.logger.close()
        if distutils.is_master():
            logging.info("training has ended: %s", self._ended())
        self._final_report()

    def _make_loader(self, source: SourceConfig) -> DataLoader:
        config, optim = self.config, self.config.optim
        dataset = build.make_dataset(config, source, training=True, cache_dir=self.folder / "cache")
        sampler = TrainBatchSampler(
            len(dataset),  # type: ignore[arg-type]
            optim.batch_size,
            seed=config.job.seed,
            rank=distutils.get_rank(),
            world_size=distutils.get_world_size(),
            num_chunks=optim.grad_accumulation,
            sizes=self._sizes(dataset) if optim.balance == "atoms" else None,
        )
        return make_loader(
            dataset,
            sampler,
            num_workers=optim.num_workers,
            num_chunks=optim.grad_accumulation,
            persistent=True,
            context=optim.worker_context,
            pin_memory=not config.job.cpu,
        )

    def _sizes(self, dataset: Dataset) -> NDArray[np.integer]:
        """Atoms of every training sample: the first rank looks at all if need be, the others take it from there."""
        natoms = getattr(dataset, "natoms", None)
        if natoms is None:
            raise ValueError("optim.balance: atoms: the data set does not know its sizes (it has no method natoms)")
        for first in (True, False):
            if distutils.is_master() == first:
                sizes = natoms()
            distutils.synchronize()
        return sizes

    def _make_unit(self, loader: DataLoader) -> OCPTrainUnit:
        config, device = self.config, distutils.get_device_for_local_rank()
        model = build.make_model(config, device=device)
        freeze_unused(model, self.tasks, sample_of(loader.dataset.dataset, _LOOKED_AT))  # type: ignore[attr-defined]
        return OCPTrainUnit(
            job_config=self.job_config,
            model=model,
            tasks=self.tasks,
            optim=config.optim,
            gradient_loss=SummedLoss(config.losses["gradient"]) if "gradient" in config.losses else None,
            steps_per_epoch=len(loader),
            amp=config.job.amp,
            print_every=config.job.print_every,
            failures=self.folder / "failures",
            plateau=self._make_plateau(),
        )

    def _make_plateau(self) -> Plateau | None:
        """What makes the learning rate follow a metric, if it does."""
        if self.config.optim.scheduler != "reduce_on_plateau":
            return None
        metric = metrics_of(self.config.targets)[self._followed()]
        return Plateau(self.config.optim, higher_is_better=metric.higher_is_better)

    def _followed(self) -> str:
        given = self.config.optim.plateau
        return (given and given.metric) or self.config.evaluation_metrics.primary_metric.metric

    def _make_logger(self) -> MetricLogger:
        return MetricLogger(
            self.config.logger,
            self.folder / "logs",
            identifier=self.folder.name,
            config=self.config.model_dump(mode="json"),
            step=self.unit.train_progress.num_steps_completed,
            evaluated=not self.pending_evaluation,
            lenient=self.config.optim.on_write_error == "warn",
        )

    def request_stop(self, status: int) -> bool:
        """Asks for a checkpoint after the present step and an end with this exit status, on all ranks.

        Returns:
            False when there is no step to wait for and nothing to save: before and after training, and while it is
            interrupted by an evaluation, with which the run will go on.
        """
        if not self.stepping:
            return False
        self.unit.stop_requested, self.stop_code = True, status
        return True

    def _resume(self, source: SourceConfig) -> None:
        if distutils.is_master():
            remove_leftovers(self.checkpoints)
        found = load_newest(self.checkpoints)
        if found is None:
            if self.checkpoint is not None:
                self._fine_tune(self.checkpoint, source)
            return
        path, state = found
        check_statistics(self.fits, state)
        try:
            self.unit.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{path} does not fit this configuration: {error}") from error
        load_tasks_state(self.tasks, state["tasks"])
        self.best, self.epoch_seconds = state["best"], state["epoch_seconds"]
        ends_here = self.unit.train_progress.num_steps_completed == self.unit.total_steps
        shortened = ends_here and build_config(without_removed(state["config"])).optim != self.config.optim
        self.pending_evaluation = state["pending_evaluation"] or shortened
        logging.info("going on from %s", path)

    def _fine_tune(self, path: str, source: SourceConfig) -> None:
        """Begins with the weights of another run; targets are normalised as this one's configuration says."""
        state = load_checkpoint(path)
        load_weights(self.unit.raw_model, state, heads_may_differ=True)
        if self.unit.ema_model is not None:
            self.unit.ema_model.module.load_state_dict(self.unit.raw_model.state_dict())
        logging.info("beginning with the weights of %s", path)
        if distutils.is_master():
            announce_shifts(self.config, source, self.tasks, state["tasks"])

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds beside format and versions."""
        return {
            **self.unit.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "tasks": tasks_state(self.tasks),
            "statistics": fits_to_dict(self.fits),
            "data": self.data,
            "best": self.best,
            "epoch_seconds": self.epoch_seconds,
            "pending_evaluation": self.pending_evaluation,
        }

    def save(self) -> None:
        """Saves the periodic checkpoint of the present step (first rank; the others wait)."""
        step, keep = self.unit.train_progress.num_steps_completed, self.config.optim.keep_checkpoints
        self._write(lambda: save_step(self.checkpoints, step, self.state(), keep=keep))

    def _write(self, write: Callable[[], object]) -> None:
        """Writes on the first rank; all ranks learn whether it could.

        Raises:
            OSError: it could not, and the run is to stop then.
        """
        reason: list[str | None] = [None]
        if distutils.is_master():
            try:
                write()
            except OSError as error:
                reason[0] = f"{error.strerror or error}, {error.filename or self.checkpoints}"
        if distutils.get_world_size() > 1:
            dist.broadcast_object_list(reason, src=0, group=self.unit.cpu_group)
        if reason[0] is None:
            return
        newest = step_checkpoints(self.checkpoints)
        message = f"a checkpoint could not be written: {reason[0]}; the newest is {newest[-1] if newest else 'none'}"
        if self.config.optim.on_write_error == "stop":
            raise OSError(message)
        if distutils.is_master():
            logging.warning("%s. Going on without", message)

    def evaluate_and_save(self) -> None:
        """Saves, evaluates, and saves again: a run that ends in between evaluates first when it goes on."""
        self.pending_evaluation, stepping, start = True, self.stepping, time.perf_counter()
        self.save()
        self.stepping = False
        if self.unit.stop_requested:  # the signal came while saving
            raise SystemExit(self.stop_code)
        self.evaluate()
        self.pending_evaluation, self.stepping = False, stepping
        self.save()
        self.unit.exclude_time(time.perf_counter() - start)

    def evaluate(self) -> None:
        """Evaluates all splits with the present weights, logs the metrics, keeps the weights if they are the best."""
        if not self.config.dataset.val:
            return
        limit = self.config.evaluation_metrics.max_systems
        outcomes = self.evaluator.evaluate(self.unit.eval_model, self.tasks, self.fits, max_systems=limit)
        step = self.unit.train_progress.num_steps_completed
        if self.logger is not None:
            values = {metric_of(s, name): value for s, o in outcomes.items() for name, value in o.metrics.items()}
            self.logger.log(step, step / self.unit.steps_per_epoch, values)
        primary = self.config.evaluation_metrics.primary_metric
        value = outcomes[primary.split].metrics[primary.metric]
        shown = ", ".join(f"{s} {o.metrics[primary.metric]:.4f}" for s, o in outcomes.items())
        logging.info("step %d: %s: %s", step, primary.metric, shown)
        self.unit.follow(outcomes[primary.split].metrics[self._followed()])
        self.best["evaluations_since"] = self.best.get("evaluations_since", 0) + 1
        if self._is_best(value):
            self.best = {"value": value, "step": step, "evaluations_since": 0}
            self._write(lambda: save_checkpoint(self.checkpoints / "best.pt", self.state()))

    def ends_early(self) -> bool:
        """Whether there have been as many evaluations without a better one as `optim.early_stopping` allows."""
        given, since = self.config.optim.early_stopping, self.best.get("evaluations_since", 0)
        return (
            given is not None
            and since >= given.patience
            and self.unit.train_progress.num_epochs_completed >= given.min_epochs
        )

    def _ended(self) -> str:
        """Why training ended, in words."""
        if not self.ends_early():
            return f"all {self.unit.total_steps} steps"
        primary = self.config.evaluation_metrics.primary_metric
        return (
            f"early stopping: no better {primary.metric} on {primary.split} in {self.best['evaluations_since']} "
            f"evaluations since step {self.best['step']}"
        )

    def _is_best(self, value: float) -> bool:
        best = self.best["value"]
        metric = metrics_of(self.config.targets)[self.config.evaluation_metrics.primary_metric.metric]
        return best is None or (value > best if metric.higher_is_better else value < best)

    def _final_report(self) -> None:
        path = self.checkpoints / "best.pt"
        if not self.config.dataset.val or not path.is_file():
            return
        results, newest = self.folder / "results" / "metrics.json", step_checkpoints(self.checkpoints)[-1:]
        if results.is_file() and all(results.stat().st_mtime_ns >= saved.stat().st_mtime_ns for saved in newest):
            logging.info("the run is finished and reported")
            return
        state = load_checkpoint(path)
        load_weights(self.unit.raw_model, state)
        outcomes = self.evaluator.evaluate(self.unit.raw_model, self.tasks, self.fits)
        self.evaluator.report(
            self.unit.raw_model,
            outcomes,
            state | {"epoch_seconds": self.epoch_seconds, "ended": self._ended()},
            str(path),
        )

    def _statistics(self, source: SourceConfig) -> dict[str, CompositionFit]:
        """Least squares on compositions and label statistics of the training set, kept in `statistics.json`."""
        config, path = self.config, self.folder / "statistics.json"
        if not needs_fit(config) and not config.dataset.val:
            return {}
        names = [target.name for target in config.targets if target.has_statistics]
        dataset = build.make_label_dataset(config, source)
        total = len(dataset)  # type: ignore[arg-type]
        key = self.data["dataset.train"]
        if path.is_file():
            known = json.loads(path.read_text())
            fits = fits_from_dict(known["fit"])
            if known["training_set"] == key and set(fits) == set(names):
                return fits
            logging.info("%s belongs to other data or labels: computed again", path)
        sample = statistics_sample(total).tolist()
        loader = make_loader(
            dataset,
            [[(0, index) for index in sample[start : start + 512]] for start in range(0, len(sample), 512)],
            num_workers=config.optim.num_workers,
            context=config.optim.worker_context,
            convert=partial(labels_of, names=names),
        )
        fits = fit_labels(loader, names)
        if distutils.is_master():
            write_json(path, {"training_set": key, "fit": fits_to_dict(fits)})
        return fits
