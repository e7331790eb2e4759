"""Begins each rank of a SLURM job; run by its path, so that nothing is imported before it has done its work.

    python -IS slurm_start.py -m submitit.core._submit FOLDER

Until submitit has its handler in place, which takes seconds of imports, SIGUSR2 would kill the rank and with it the
job, for good. From here on SIGUSR2 and SIGTERM are blocked: they wait until `slurm_job.py` looks for them. SLURM sends
them to every process of a job; blocked, they also leave in peace what the rank starts itself, above all its loader
workers, without which it could not reach the end of a step.
"""

import os
import signal
import sys


def main() -> None:
    """Blocks the signals, repairs submitit's files after a kill, and becomes `python` with the given arguments."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
    repair(sys.argv[-1], _job(), os.environ.get("SLURM_PROCID", "0"))
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


def repair(folder: str, job: str, rank: str) -> None:
    """Ends what a rank that was killed while it wrote left half done.

    submitit writes `X.save_tmp`, removes `X` and renames: a killed rank leaves the first without the second, or both,
    and the next writer refuses to overwrite `X.save_tmp`. All ranks do this at once; each operation is atomic.
    """
    for name in (f"{job}_submitted.pkl", f"{job}_{rank}_result.pkl"):
        path = os.path.join(folder, name)
        try:
            if os.path.exists(path):
                os.unlink(path + ".save_tmp")
            else:
                os.rename(path + ".save_tmp", path)
        except FileNotFoundError:
            continue


def _job() -> str:
    """The job's name in submitit's files."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


if __name__ == "__main__":
    main()
