"""The registered trainer: a configuration is checked, and becomes the job and runner of fairchem's launchers."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common.registry import registry
from torch import nn
from torch.utils.data import Dataset

from faenet_ocp import build
from faenet_ocp.checkpoint import load_checkpoint, load_weights
from faenet_ocp.config.schema import Config, SourceConfig
from faenet_ocp.data.fields import NUM_ELEMENTS
from faenet_ocp.data.loader import TrainBatchSampler
from faenet_ocp.tasks.references import CompositionFit
from faenet_ocp.tasks.tasks import make_tasks
from faenet_ocp.training.loggers import check_logger
from faenet_ocp.training.optim import make_optimizer, total_steps, warn_of_long_warmup
from faenet_ocp.training.samples import check_samples
from faenet_ocp.training.start import check_held_out, check_resumption

_STATISTICS = {"mean": 0.0, "stdev": 1.0, "residual_mean": 0.0, "residual_stdev": 1.0}
_ANY_FIT = CompositionFit(coefficients=(0.0,) * NUM_ELEMENTS, num_systems=1, rank=1, **_STATISTICS)


@registry.register_trainer("faenet")
class FAENetTrainer:
    """Turns a configuration into fairchem's job and runner; `trainer: faenet`.

    A trainer of one's own subclasses this one and names another runner class.

    Args:
        config: validated configuration.
        mode: train, validate, predict, symmetry or check.
        checkpoint: weights to validate or predict with, or to begin training with.
    """

    runner = "faenet_ocp.launch.runner.OCPRunner"

    def __init__(self, config: Config, *, mode: str = "train", checkpoint: str | None = None):
        self.config, self.mode, self.checkpoint = config, mode, checkpoint

    def check(self) -> None:
        """Builds what can be built without ranks and opens the data, so that mistakes show at once.

        Raises:
            ValueError: what is wrong, with its key.
        """
        if self.checkpoint is None and self.mode in ("validate", "predict", "symmetry"):
            raise ValueError(f"--checkpoint: --mode {self.mode} needs the weights to use")
        state = None if self.checkpoint is None else load_checkpoint(self.checkpoint)
        if self.mode == "train":
            if self.config.dataset.train is None:
                raise ValueError("dataset.train: missing; it says where the training set lies")
            make_optimizer(self.config.optim)([nn.Parameter(torch.zeros(1))])
        model = build.make_model(self.config)
        if state is not None:
            load_weights(model, state, heads_may_differ=self.mode == "train")
        datasets = self.datasets()
        if not datasets:
            raise ValueError("dataset: no splits are given")
        if state is not None:
            check_held_out(self.config, state)
        check_samples(self.config, self._sources(), mode=self.mode)
        if self.mode == "predict" and not self.config.dataset.test:
            logging.info("dataset.test is not given: predicting the validation splits (%s)", ", ".join(datasets))
        if self.mode == "train":
            sizes = {split: len(dataset) for split, dataset in datasets.items()}  # type: ignore[arg-type]
            self._announce_held_out(sizes)
            self._check_training(sizes["train"])

    def _announce_held_out(self, sizes: Mapping[str, int]) -> None:
        """How many a share comes to: whole systems, and at least one."""
        shares = [split for split, source in self.config.dataset.val.items() if source.from_train is not None]
        total = sizes["train"] + sum(sizes[split] for split in shares)
        for split in shares:
            logging.info("dataset.val.%s: %d of %d samples of dataset.train, held out", split, sizes[split], total)

    def _check_training(self, num_systems: int) -> None:
        """What would otherwise end a run after its label statistics."""
        config, optim, job = self.config, self.config.optim, self.config.job
        fits = {target.name: _ANY_FIT for target in config.targets}
        make_tasks(config, fits)
        world, chunks = job.num_gpus * job.num_nodes, optim.grad_accumulation
        sampler = TrainBatchSampler(num_systems, optim.batch_size, seed=0, world_size=world, num_chunks=chunks)
        warn_of_long_warmup(optim, total_steps(optim, len(sampler)))
        check_logger(config.logger)

    def check_resumption(self, folder: Path) -> list[str]:
        """Where the folder holds a run already: whether it can go on with this configuration, and what changes then.

        Raises:
            ValueError: what cannot change.
        """
        return check_resumption(self.config, folder, self.checkpoint) if self.mode == "train" else []

    def datasets(self) -> dict[str, Dataset]:
        """Data sets of the splits that the mode uses, by the name of the split.

        Raises:
            ValueError: one cannot be opened; names the split.
        """
        opened = {}
        for split, source in self._sources().items():
            labelled = self.mode != "predict" and not split.startswith("test ")
            try:
                opened[split] = build.make_dataset(
                    self.config, source, training=source is self.config.dataset.train, labelled=labelled
                )
            except (ValueError, OSError) as error:
                raise ValueError(f"dataset, split {split}: {error}") from error
        return opened

    def _sources(self) -> dict[str, SourceConfig]:
        given = self.config.dataset
        sources = {"train": given.train} if given.train is not None and self.mode in ("train", "check") else {}
        sources |= given.test if self.mode == "predict" and given.test else given.val
        if self.mode == "check":
            sources |= {f"test {split}": source for split, source in given.test.items()}
        return sources

    def unusable_records(self) -> dict[str, list[str]]:
        """Reads every record of every split in several processes: for each split, what cannot be used and why."""
        from faenet_ocp.data.check import check

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found = check(self.datasets(), self.config.optim.num_workers or cores)
        return {split: [problem.reason for problem in problems] for split, problems in found.items()}

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
