"""The registered trainer: a configuration is checked, and becomes the job and runner of fairchem's launchers."""

from pathlib import Path
from typing import Any

import torch
from fairchem.core.common.registry import registry
from torch import nn

from faenet_ocp import build
from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.config.schema import Config, nearest
from faenet_ocp.targets import metrics_of
from faenet_ocp.training.unit import make_optimizer

MODES = ("train", "validate", "predict")


@registry.register_trainer("faenet")
class FAENetTrainer:
    """Turns a configuration into fairchem's job and runner; `trainer: faenet`.

    A trainer of one's own subclasses this one and names another runner class.

    Args:
        config: validated configuration.
        mode: train, validate or predict.
        checkpoint: weights to validate or predict with.
    """

    runner = "faenet_ocp.launch.runner.OCPRunner"

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
        known = metrics_of(config.targets)
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
