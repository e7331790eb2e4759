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
from faenet_ocp.evaluation.metrics import RunInfo, build_results
from faenet_ocp.evaluation.plots import plot_learning_curve, plot_parity
from faenet_ocp.evaluation.prediction import predict_split
from faenet_ocp.evaluation.report import render_table
from faenet_ocp.evaluation.validation import SplitOutcome, run_split
from faenet_ocp.tasks.references import CompositionFit
from faenet_ocp.tasks.tasks import load_tasks_state, make_tasks

OFFICIAL_SIZES = {
    "is2re": {"val_id": 24943, "val_ood_ads": 24961, "val_ood_cat": 24963, "val_ood_both": 24987},
    "s2ef": {"val_id": 999866, "val_ood_ads": 999838, "val_ood_cat": 999809, "val_ood_both": 999944},
}
"""Systems in OC20's own validation splits: what else is evaluated is never called OC20."""


class Evaluator:
    """What is done with a model and the evaluation splits of a configuration, on every rank.

    Args:
        config: of the run.
        folder: of the run; results go to `results/` in it.
    """

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        self._datasets: dict[str, Dataset] = {}

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

    def predict(self, model: nn.Module, tasks: list[Any], checkpoint: str) -> None:
        """Predicts the test splits (or, without any, the validation splits) to `results/predictions/<split>.npz`.

        Args:
            model, tasks: see `load_model`.
            checkpoint: file that they come from; parts of a prediction with other weights are not taken over.

        Raises:
            ValueError: the file of a split is there already.
        """
        optim, world = self.config.optim, distutils.get_world_size()
        settings = self.config.model_dump_json(
            exclude={"slurm": True, "job": {"num_gpus", "num_nodes", "cpu", "run_dir", "identifier"}}
        )
        digest = hashlib.sha256(Path(checkpoint).read_bytes() + settings.encode()).hexdigest()
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


def _device_words() -> str:
    device, world = torch.device(distutils.get_device_for_local_rank()), distutils.get_world_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return name if world == 1 else f"{world} x {name}"
