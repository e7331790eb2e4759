"""Evaluation and prediction of a run's splits, and the files in its `results/`."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairchem.core.common import distutils
from torch import nn
from torch.utils.data import Dataset

from faenet_ocp import build
from faenet_ocp.checkpoint import load_weights
from faenet_ocp.common.files import write_json, write_text
from faenet_ocp.config.schema import Config, SourceConfig
from faenet_ocp.data.loader import EvalBatchSampler, make_loader
from faenet_ocp.evaluation.by_atoms import not_learnt
from faenet_ocp.evaluation.metrics import UnseenElements
from faenet_ocp.evaluation.plots import plot_learning_curve, plot_parity
from faenet_ocp.evaluation.predicted_structures import write_extxyz
from faenet_ocp.evaluation.prediction import predict_split
from faenet_ocp.evaluation.report import render_table
from faenet_ocp.evaluation.results import RunInfo, build_results, dataset_label, unseen_in_words
from faenet_ocp.evaluation.validation import SplitOutcome, run_split
from faenet_ocp.tasks.references import CompositionFit, fits_from_dict
from faenet_ocp.tasks.tasks import TargetTask, restore_tasks, unseen_elements


def load_model(
    state: Mapping[str, Any], config: Config, device: torch.device | str
) -> tuple[build.FrameAveragedModel, list[TargetTask]]:
    """Model and tasks of a checkpoint (its EMA weights where it has them), on a device.

    Args:
        state: content of a checkpoint.
        config: what to build; the checkpoint's own, or one that differs in what weights do not depend on.
        device: of the model.

    Raises:
        ValueError: the weights do not fit the configured model.
    """
    with torch.random.fork_rng(devices=[]):  # the initial weights, replaced below, are drawn after seeding
        model = build.make_model(config, device=device)
    load_weights(model, state)
    return model.to(device), restore_tasks(config, state["tasks"])


class Evaluator:
    """What is done with a model and the evaluation splits of a configuration, on every rank.

    Args:
        config: of the run.
        folder: of the run; results go to `results/` in it.
    """

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder, optim = config, folder, config.optim
        self.batch_size = optim.eval_batch_size or optim.batch_size  # over all ranks
        self._loader = partial(
            make_loader, num_workers=optim.num_workers, context=optim.worker_context, pin_memory=not config.job.cpu
        )
        conservative = config.output("forces").eval_from == "energy_gradient"
        self._forward = {"amp": config.job.amp, "conservative": conservative}
        self._datasets: dict[str, Dataset] = {}
        self._warned: set[str] = set()

    def evaluate(
        self,
        model: nn.Module,
        tasks: Sequence[TargetTask],
        fits: Mapping[str, CompositionFit],
        *,
        max_systems: int | None = None,
    ) -> dict[str, SplitOutcome]:
        """Every validation split, in the order of the config.

        Args:
            model, tasks: of the run, in training or from `load_model`.
            fits: statistics of the training set by target, for the baselines.
            max_systems: a fixed random subset of each split of this size; None: all.
        """
        rank, world, outcomes = distutils.get_rank(), distutils.get_world_size(), {}
        for split, source in self.config.dataset.val.items():
            dataset = self._dataset(split, source, labelled=True)
            indices: Sequence[int] = range(len(dataset))  # type: ignore[arg-type]
            if max_systems is not None and max_systems < len(indices):
                generator = np.random.default_rng(self.config.job.seed)
                indices = np.sort(generator.choice(len(indices), max_systems, replace=False)).tolist()
            loader = self._loader(dataset, EvalBatchSampler(indices, self.batch_size, rank=rank, world_size=world))
            outcomes[split] = run_split(model, tasks, loader, split=split, fits=fits, **self._forward)
            self._warn_of_unseen(split, outcomes[split].unseen)
            if max_systems is None:
                self._warn_of_holes(split, outcomes[split], tasks)
        return outcomes

    def _warn_of_unseen(self, split: str, counts: Mapping[str, int]) -> None:
        """Once for the systems of a split, which is evaluated again and again."""
        message = unseen_in_words(split, counts) if counts else ""
        if message and message not in self._warned and distutils.is_master():
            logging.warning(message)
        self._warned.add(message)

    def _warn_of_holes(self, split: str, outcome: SplitOutcome, tasks: Sequence[TargetTask]) -> None:
        for task in tasks:
            for reason in not_learnt(task.target, outcome.by_atoms.get(task.name, {})):
                if distutils.is_master():
                    logging.warning("%s: %s", split, reason)

    def validate(self, state: Mapping[str, Any], checkpoint: str) -> None:
        """Evaluates a checkpoint on the validation splits and writes `results/`; arguments as for `predict`."""
        model, tasks = self._load(state)
        self.report(model, self.evaluate(model, tasks, fits_from_dict(state.get("statistics"))), state, checkpoint)

    def predict(self, state: Mapping[str, Any], checkpoint: str) -> None:
        """Predicts the test splits (or, without any, the validation splits) to `results/predictions/<split>.npz`.

        Args:
            state: content of a checkpoint.
            checkpoint: its file; parts of a prediction with other weights or of other data are not taken over.

        Raises:
            ValueError: the file of a split is there already.
        """
        model, tasks = self._load(state)
        unseen = unseen_elements(tasks, fits_from_dict(state.get("statistics")))
        settings = self.config.model_dump_json(
            exclude={"slurm": True, "job": {"num_gpus", "num_nodes", "cpu", "run_dir", "identifier", "output_format"}}
        )
        digest = hashlib.sha256(Path(checkpoint).read_bytes() + settings.encode()).hexdigest()
        for split, source in (self.config.dataset.test or self.config.dataset.val).items():
            dataset = self._dataset(split, source, labelled=False)
            data = [dataset.fingerprint() if hasattr(dataset, "fingerprint") else len(dataset)]  # type: ignore[arg-type]
            distutils.broadcast_object_list(data, src=0)  # a node's own copy of the files has another state
            key = hashlib.sha256(f"{digest} {data}".encode()).hexdigest()[:12]
            path = self.folder / "results" / "predictions" / f"{split}.npz"
            count = predict_split(
                model,
                tasks,
                dataset,
                path,
                key=key,
                unseen=UnseenElements(unseen),
                make_loader=partial(self._loader, dataset),
                batch_size=max(1, self.batch_size // distutils.get_world_size()),
                **self._forward,
            )
            if distutils.is_master():
                logging.info("%s: %d predictions in %s", split, count, path)
                if self.config.job.output_format == "extxyz":
                    write_extxyz(dataset, tasks, path)

    def _load(self, state: Mapping[str, Any]) -> tuple[nn.Module, list[TargetTask]]:
        return load_model(state, self.config, distutils.get_device_for_local_rank())

    def _dataset(self, split: str, source: SourceConfig, *, labelled: bool) -> Dataset:
        """The data set of a split, opened once."""
        if split not in self._datasets:
            self._datasets[split] = build.make_dataset(
                self.config, source, labelled=labelled, cache_dir=self.folder / "cache"
            )
        return self._datasets[split]

    def report(
        self, model: nn.Module, outcomes: Mapping[str, SplitOutcome], state: Mapping[str, Any], checkpoint: str
    ) -> None:
        """Writes `results/`: metrics.json, table.md, parity and learning-curve plots (first rank)."""
        if not distutils.is_master() or not outcomes:
            return
        folder, targets = self.folder / "results", self.config.targets
        document = self._results(model, outcomes, state, checkpoint)
        dataset = document["dataset"]
        write_json(folder / "metrics.json", document)
        write_text(folder / "table.md", render_table(document))
        for target in targets:
            pairs = {split: outcome.pairs[target.name] for split, outcome in outcomes.items()}
            marked = {split: outcome.adsorbate for split, outcome in outcomes.items()} if target.rank else {}
            plot_parity(pairs, folder / f"parity_{target.name}.png", dataset=dataset, target=target, marked=marked)
        log = self.folder / "logs" / "metrics.jsonl"
        if log.is_file():
            plot_learning_curve(log, folder / "learning_curve.png", dataset=dataset, targets=targets)

    def _results(
        self, model: nn.Module, outcomes: Mapping[str, SplitOutcome], state: Mapping[str, Any], checkpoint: str
    ) -> dict[str, Any]:
        config, progress = self.config, state["progress"]
        sizes = {split: outcome.num_systems for split, outcome in outcomes.items()}
        dataset, official = dataset_label(config.dataset.name, config.task, sizes)
        systems = sum(outcome.forward_systems for outcome in outcomes.values())
        forward = sum(outcome.forward_seconds for outcome in outcomes.values())
        seconds = sum(outcome.seconds for outcome in outcomes.values())
        return build_results(
            task=config.task,
            targets=config.targets,
            dataset=dataset,
            official=official,
            run=RunInfo(
                model=str(config.model["name"]),
                config=str(self.folder.name),
                parameters=build.count_parameters(model),
                checkpoint=checkpoint,
                step=progress["num_steps_completed"],
                epoch=progress["num_epochs_completed"],
                device=device_words(),
                frames=build.frame_settings(config, config.frames.evaluation_method),
                seed=config.job.seed,
            ),
            splits={split: outcome.metrics for split, outcome in outcomes.items()},
            unseen={split: outcome.unseen for split, outcome in outcomes.items()},
            by_atoms={
                target.name: {split: outcome.by_atoms[target.name] for split, outcome in outcomes.items()}
                for target in config.targets
                if target.rank
            },
            baselines={split: outcome.baselines for split, outcome in outcomes.items() if outcome.baselines},
            forward_samples_per_s=systems / forward if forward else None,
            end_to_end_samples_per_s=sum(sizes.values()) / seconds if seconds else None,
            seconds_per_epoch=float(np.mean(state["epoch_seconds"])) if state["epoch_seconds"] else None,
            epochs=len(state["epoch_seconds"]) or None,
            ended=state.get("ended"),
        )


def device_words() -> str:
    """The device of this rank, and how many ranks there are."""
    device, world = torch.device(distutils.get_device_for_local_rank()), distutils.get_world_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return name if world == 1 else f"{world} x {name}"
