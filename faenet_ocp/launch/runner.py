"""The runner that fairchem starts on every rank: train, validate, predict, or compare with moved copies.

A run lives in one folder: `config.yml` (resolved), `checkpoints/`, `logs/`, `results/`, `statistics.json`.
"""

import logging
import os
import signal
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from fairchem.core.common import distutils
from fairchem.core.components.runner import Runner
from fairchem.core.launchers.api import SchedulerConfig, SchedulerType

from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.common.files import exclusive
from faenet_ocp.config.schema import Config, build_config
from faenet_ocp.evaluation.evaluator import Evaluator
from faenet_ocp.evidence.symmetry_mode import compare_with_copies
from faenet_ocp.launch.local_ranks import LOCK, rank_errors, say, stop_signals
from faenet_ocp.training.run import TrainingRun

_PATIENCE = 300.0
"""Seconds that a job waits for the lock of its predecessor: a file server learns late that a node has died."""


class OCPRunner(Runner):
    """What happens on each rank.

    Args:
        config_path: resolved configuration in the run's folder.
        mode: train, validate, predict or symmetry.
        checkpoint: weights for all but train.
    """

    def __init__(self, config_path: str, mode: str, checkpoint: str | None = None):
        self.folder = Path(config_path).parent
        self.config = build_config(yaml.safe_load(Path(config_path).read_text()))
        self.mode, self.checkpoint = mode, checkpoint
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
                with self._folder_lock(patience=_PATIENCE):
                    self._run()
                return
            with self._folder_lock(), stop_signals(self._stop):
                self._run()

    def _folder_lock(self, *, patience: float = 0.0) -> AbstractContextManager[None]:
        if not distutils.is_master():
            return nullcontext()
        return exclusive(self.folder / LOCK, self.folder, patience=patience)

    def _stop(self, status: int) -> None:
        if self._training is None or not self._training.request_stop(status):
            say("stopped")
            raise SystemExit(status)
        if distutils.is_master():
            say("stopping after this step; the same signal again stops at once")

    def _run(self) -> None:
        _share_cores(self.config, self.job_config.scheduler)
        if self.config.job.cpu and self.config.job.amp and distutils.is_master():
            _warn_of_slow_bfloat16()
        evaluator = Evaluator(self.config, self.folder)
        if self.mode == "train":
            self._training = TrainingRun(
                self.config, self.folder, job_config=self.job_config, evaluator=evaluator, checkpoint=self.checkpoint
            )
            self._training.run()
            return
        path = str(self.checkpoint)
        state = load_checkpoint(path)
        if self.mode == "predict":
            evaluator.predict(state, path)
        elif self.mode == "symmetry":
            compare_with_copies(self.config, self.folder, state, path)
        else:
            evaluator.validate(state, path)


def _share_cores(config: Config, scheduler: SchedulerConfig) -> None:
    """On a CPU, threads that wait for a core of another rank or of a loader worker make every step wait, up to tenfold.

    Unless the user has chosen with OMP_NUM_THREADS, a rank takes its share of this machine's cores less its workers.
    """
    if not config.job.cpu or "OMP_NUM_THREADS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return
    cores = len(os.sched_getaffinity(0))
    if scheduler.mode == SchedulerType.LOCAL:
        share = cores // scheduler.ranks_per_node
    else:  # not every cluster binds a task to the cores that it asked for
        share = min(cores, scheduler.slurm.cpus_per_task)
    torch.set_num_threads(max(1, share - config.optim.num_workers))


def _warn_of_slow_bfloat16() -> None:
    """On a processor whose vectors know no bfloat16, products of it are ten times as slow as those of float32."""
    features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell
    if features.get("architecture") == "x86_64" and not (features.get("avx512_bf16") or features.get("amx_bf16")):
        logging.warning(
            "job.amp: this processor (%s) has no instructions for bfloat16, and every step takes several times as long"
            " as without amp",
            features.get("cpu_name", "x86_64"),
        )
