"""Begins each rank of a SLURM job; run by its path, so that nothing is imported before it has done its work.

    python -IS start.py -m submitit.core._submit FOLDER

Until submitit has its handler in place, which takes seconds of imports, SIGUSR2 would kill the rank and with it the
job, for good. From here on SIGUSR2 and SIGTERM are blocked: they wait until `job.py` looks for them. SLURM sends them
to every process of a job; blocked, they also leave in peace what the rank starts itself, above all its loader workers,
without which it could not reach the end of a step.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
