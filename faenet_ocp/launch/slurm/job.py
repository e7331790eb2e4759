"""What each rank of a SLURM job runs: fairchem's program, made to lose nothing when the job is interrupted.

| what happens | what the job does |
| --- | --- |
| SIGUSR2 (preemption, time limit) | saves after the present step and goes back to the queue |
| the same before or after training, or in a step that takes longer than `GRACE` | goes back to the queue at once |
| SIGTERM (`scontrol requeue`, `scancel`) | saves after the present step and waits to be killed |
| SIGKILL (node failure) | nothing; SLURM puts the job back into the queue |

However it ended, the job begins again in the same folder, from the newest whole checkpoint.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fairchem.core.launchers.api import RunType
from fairchem.core.launchers.slurm_launch import SlurmSPMDProgram
from omegaconf import DictConfig
from submitit.helpers import DelayedSubmission

from faenet_ocp.common.log_setup import set_up_logging

GRACE = 60.0
"""Seconds that training has to reach the end of a step and save, before the job goes back to the queue without it."""
_UNTIL_KILLED = 300.0
_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class OCPProgram(SlurmSPMDProgram):
    """fairchem's program with a rendezvous of its own for every start, and preemption that saves.

    fairchem and submitit act on SIGUSR2 in a signal handler: it can only point at a checkpoint that exists already,
    breaks off what the main thread does, is run by forked loader workers too, and fails before there is a runner.
    Here the signals stay blocked, from `start.py` on, and a thread waits for them.
    """

    def __call__(self, dict_config: DictConfig, run_type: RunType = RunType.RUN) -> None:
        """Runs to the end, or until the job is preempted; see the module."""
        self.config, self.run_type = dict_config, run_type
        self._leaving, self._stopped = threading.Event(), threading.Event()
        dict_config.job.metadata.array_job_num = _own_rendezvous(dict_config)
        set_up_logging(dates=True, force=True)
        logging.getLogger("submitit").propagate = False  # it writes by itself
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        threading.Thread(target=self._watch_signals, name="signals", daemon=True).start()
        try:
            super().__call__(dict_config, run_type)
        except SystemExit:
            # Training saved and stopped, on every rank; one that left now would make the others fail.
            self._leaving.set()
            self._stopped.set()
            time.sleep(_UNTIL_KILLED)
            self._go_back_to_the_queue()
            raise
        finally:
            for child in multiprocessing.active_children():  # SIGTERM is blocked in them
                child.kill()

    def checkpoint(self, *args: Any, **kwargs: Any) -> DelayedSubmission:
        """What submitit stores for the next start: this program, whose runner finds its newest checkpoint by itself.

        A runner that has a state of its own to save is given the chance, as by fairchem.
        """
        config = self.config.copy()
        path = config.job.metadata.preemption_checkpoint_dir
        saved = self.runner is not None and self.runner.save_state(path, is_preemption=True)
        config.job.runner_state_path = path if saved else None
        return DelayedSubmission(OCPProgram(), config)

    def _watch_signals(self) -> None:
        while True:
            if signal.sigwait(_SIGNALS) == signal.SIGUSR2:
                logging.warning("SIGUSR2: this job has to make room and goes back to the queue")
                self._leaving.set()
                if self._stop_training() and not self._stopped.wait(GRACE):
                    logging.warning("training did not reach the end of a step within %g s", GRACE)
                self._go_back_to_the_queue()
            elif self._leaving.is_set():
                _exit(128 + signal.SIGTERM)
            elif self._stop_training():
                logging.warning("SIGTERM: saving after this step")

    def _stop_training(self) -> bool:
        """Asks training to save and stop; False when there is no training under way."""
        stop = getattr(self.runner, "stop_soon", None)
        return stop is not None and stop()

    def _go_back_to_the_queue(self) -> None:
        """submitit's own way: the first rank stores what to run next, counts timeouts and calls `scontrol requeue`."""
        handler: Any = signal.getsignal(signal.SIGUSR2)
        try:
            handler(signal.SIGUSR2, None)
        except SystemExit:
            _exit(255)
        except Exception:
            logging.exception("this job does not go back to the queue")
            _exit(1)


def _exit(status: int) -> None:
    """Ends the process from any thread, whatever the main thread is waiting for."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def _own_rendezvous(config: DictConfig) -> int:
    """A number for fairchem's rendezvous file that no other start of this run has; removes the files of earlier ones.

    A killed start leaves its file behind, and ranks that find it look for ranks that are gone.
    """
    job, restarts = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    number = job * 10_000 + restarts
    if os.environ.get("SLURM_PROCID", "0") == "0":
        folder = Path(config.job.run_dir) / config.job.timestamp_id
        for path in folder.glob(".distributed-shared-file-*"):
            if path.name.rpartition("-")[2] != str(number):
                path.unlink(missing_ok=True)
    return number
