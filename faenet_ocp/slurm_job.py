"""What each rank of a SLURM job runs: fairchem's program, made to lose nothing when the job is interrupted.

| what happens | what the job does |
| --- | --- |
| SIGUSR2 (preemption, time limit) | saves after the present step, and goes back to the queue |
| the same before or after training, or when the step takes longer than `GRACE` | goes back to the queue at once |
| SIGTERM (`scontrol requeue`, `scancel`) | saves after the present step and waits to be killed |
| SIGKILL (node failure) | nothing; SLURM puts the job back into the queue |

However it ended, the job begins again in the same folder from the newest whole checkpoint.
"""

import logging
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

GRACE = 60.0
"""Seconds that training has to reach the end of a step and save, before the job goes back to the queue without it."""
_UNTIL_KILLED = 300.0


class OCPProgram(SlurmSPMDProgram):
    """fairchem's program with a rendezvous of its own for every start, and preemption that saves.

    fairchem and submitit act on SIGUSR2 in a signal handler: it can only refer to a checkpoint that exists already,
    breaks off what the main thread does, is run by forked loader workers too, and fails before the runner is there.
    Here the signal stays blocked, and a thread waits for it.
    """

    def __call__(self, dict_config: DictConfig, run_type: RunType = RunType.RUN) -> None:
        """Runs to the end, or until the job is preempted; see the module."""
        self.config, self.run_type = dict_config, run_type
        self._stopped = threading.Event()
        dict_config.job.metadata.array_job_num = _own_rendezvous(dict_config)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        signal.signal(signal.SIGTERM, self._on_sigterm)
        threading.Thread(target=self._await_preemption, name="preemption", daemon=True).start()
        try:
            super().__call__(dict_config, run_type)
        except SystemExit:
            # Training saved and stopped, on every rank. One that left now would make the others fail.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._stopped.set()
            time.sleep(_UNTIL_KILLED)
            self._go_back_to_the_queue()
            raise

    def checkpoint(self, *args: Any, **kwargs: Any) -> DelayedSubmission:
        """What submitit stores for the next start: the same program, whose runner finds its newest checkpoint."""
        config = self.config.copy()
        if self.runner is not None:
            config = super().checkpoint(*args, **kwargs).args[0]
        return DelayedSubmission(OCPProgram(), config)

    def _stop_training(self) -> bool:
        """Asks training to save and stop; False when there is no training under way."""
        stop = getattr(self.runner, "stop_soon", None)
        return stop is not None and stop()

    def _await_preemption(self) -> None:
        signal.sigwait({signal.SIGUSR2})
        logging.warning("SIGUSR2: the job has to make room, and goes back to the queue")
        if self._stop_training() and not self._stopped.wait(GRACE):
            logging.warning("training did not come to the end of a step within %g s", GRACE)
        self._go_back_to_the_queue()

    def _go_back_to_the_queue(self) -> None:
        """submitit's own way (first rank only): stores what to run next, counts timeouts, calls `scontrol requeue`."""
        handler = signal.getsignal(signal.SIGUSR2)
        try:
            handler(signal.SIGUSR2, None)  # type: ignore[operator,misc]
            return  # another rank than the first
        except SystemExit:
            status = 255
        except Exception:
            logging.exception("the job does not go back to the queue")
            status = 1
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)  # from whatever the main thread is waiting for

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        """SIGKILL follows; by then there may be a checkpoint of this step."""
        if self._stop_training():
            logging.warning("SIGTERM: saving after this step")


def _own_rendezvous(config: DictConfig) -> int:
    """A number for fairchem's rendezvous file that no other start of this run has; removes the files of earlier ones.

    A killed start leaves its file behind, and whoever finds it waits for ranks that are gone.
    """
    job, restarts = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    number = job * 10_000 + restarts
    if os.environ.get("SLURM_PROCID", "0") == "0":
        folder = Path(config.job.run_dir) / config.job.timestamp_id
        for path in folder.glob(".distributed-shared-file-*"):
            if path.name.rpartition("-")[2] != str(number):
                path.unlink(missing_ok=True)
    return number
