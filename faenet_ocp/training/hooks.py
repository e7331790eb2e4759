"""When a run evaluates, saves and stops."""

import logging
import time
from typing import Any

from fairchem.core.common import distutils
from torchtnt.framework import State
from torchtnt.framework.callback import Callback


class Hooks(Callback):
    """Callback of the training loop.

    Args:
        run: the `run.TrainingRun`.
    """

    def __init__(self, run: Any):
        self.run, self.optim = run, run.config.optim
        self.epoch_start: float | None = None
        self.paused = 0.0

    def on_train_epoch_start(self, state: State, unit: Any) -> None:
        self.epoch_start, self.paused = time.perf_counter(), 0.0

    def on_train_step_end(self, state: State, unit: Any) -> None:
        before, step = time.perf_counter(), unit.train_progress.num_steps_completed
        if unit.train_progress.num_steps_completed_in_epoch == unit.steps_per_epoch:
            return  # the end of the epoch does it
        if self.optim.eval_every and step % self.optim.eval_every == 0:
            self.run.evaluate_and_save()
        elif unit.stopping or (self.optim.checkpoint_every and step % self.optim.checkpoint_every == 0):
            self.run.save()
        self.paused += time.perf_counter() - before
        self._stop_if_asked(state, unit)

    def on_train_epoch_end(self, state: State, unit: Any) -> None:
        if state.should_stop:
            return  # within the epoch, after an evaluation
        if self.epoch_start is not None:  # an epoch that a resumed run only finished is not timed
            self.run.epoch_seconds.append(time.perf_counter() - self.epoch_start - self.paused)
            self.epoch_start = None
        progress = unit.train_progress
        every, done = self.optim.eval_every_epochs, progress.num_epochs_completed >= self.optim.max_epochs
        stopped = self.optim.max_steps is not None and progress.num_steps_completed >= self.optim.max_steps
        due = self.optim.eval_every and progress.num_steps_completed % self.optim.eval_every == 0
        if done or stopped or due or (every and progress.num_epochs_completed % every == 0):
            self.run.evaluate_and_save()
        else:
            self.run.save()
        self._stop_if_asked(state, unit)

    def _stop_if_asked(self, state: State, unit: Any) -> None:
        if self.run.ends_early():
            state.stop()
        if unit.stopping:
            if distutils.is_master():
                logging.warning("stopped; the same command goes on from %s", self.run.checkpoints / "last.pt")
            raise SystemExit(self.run.stop_code)
