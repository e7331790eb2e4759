"""Handing runs to SLURM: what is asked for, a dry run, the submission.

fairchem runs a job through submitit; this module fills in fairchem's scheduler section and submitit's parameters and
adds what `job.py` and `start.py` do on each rank. A job's own files lie in `<run>/slurm/`.
"""

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from faenet_ocp.config.schema import Config
from faenet_ocp.launch.slurm.job import OCPProgram

SIGNAL_DELAY = 120
"""Seconds before the time limit at which SLURM sends SIGUSR2 (it may be a minute early)."""
_JOBS = "jobs.txt"
"""In a run's `slurm/`: the ids of its jobs."""


def for_slurm(job_and_runner: dict[str, Any], config: Config) -> dict[str, Any]:
    """What a trainer built, with SLURM as the scheduler; times and memory are rounded up here, not in the script."""
    asked, job = config.slurm, config.job
    scheduler = {
        "mode": "SLURM",
        "distributed_init_method": asked.rendezvous.upper(),
        "ranks_per_node": job.num_gpus,
        "num_nodes": job.num_nodes,
        "slurm": {
            "mem_gb": -int(-asked.mem_gb // 1),
            "timeout_hr": -(-minutes_of(asked.time) // 60),
            "cpus_per_task": asked.cpus_per_task,
            "partition": asked.partition,
            "qos": asked.qos,
            "account": asked.account,
            "additional_parameters": dict(asked.additional_parameters) or None,
        },
    }
    return {**job_and_runner, "job": {**job_and_runner["job"], "scheduler": scheduler}}


def check_same_request(first: Config, other: Config) -> None:
    """The jobs of an array ask for the same.

    Raises:
        ValueError: two runs of a sweep need something different from SLURM.
    """
    asked = [(c.slurm, c.job.num_gpus, c.job.num_nodes, c.job.cpu) for c in (first, other)]
    if asked[0] != asked[1]:
        raise ValueError("a sweep is one array of jobs: slurm, num_gpus, num_nodes and cpu cannot differ between runs")


class Submission:
    """A job, or an array of jobs that ask for the same.

    Args:
        config: whose `slurm:` and `job:` sections say what to ask for.
        name: name of the job.
        folder: for the job's files; made when submitting.

    Raises:
        ValueError: a value that cannot be put into a job's script.
    """

    def __init__(self, config: Config, *, name: str, folder: Path):
        self.config, self.name, self.folder = config, name, folder
        asked, job = config.slurm, config.job
        start = shlex.join([sys.executable, "-IS", str(Path(__file__).with_name("start.py"))])
        self.executor = _Executor(folder, max_num_timeout=asked.max_timeouts, python=start)
        parameters: dict[str, Any] = {
            "job_name": name,
            "partition": asked.partition,
            "account": asked.account,
            "qos": asked.qos,
            "time": minutes_of(asked.time),
            "mem": f"{round(asked.mem_gb * 1024)}M",
            "cpus_per_task": asked.cpus_per_task,
            "nodes": job.num_nodes,
            "ntasks_per_node": job.num_gpus,
            "gpus_per_node": None if job.cpu else job.num_gpus,
            "signal_delay_s": SIGNAL_DELAY,
            "stderr_to_stdout": True,
            "srun_args": ["--kill-on-bad-exit=1"],  # or the others wait for a rank that has failed
            "setup": _setup(),
            "additional_parameters": {
                key: value
                for key, value in ({"requeue": True} | asked.additional_parameters).items()
                if value is not False
            },
        }
        _check(parameters, folder)
        self.executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})

    def script(self, count: int = 1) -> str:
        """The script that sbatch gets for this many runs."""
        return self.executor.script(count)

    def submit(self, runs: Mapping[Path, DictConfig]) -> list[str]:
        """Submits the runs, as an array if there are several.

        Args:
            runs: fairchem's configuration of each run, by the run's folder.

        Returns:
            each run's job id.

        Raises:
            ValueError: SLURM is not there, or refuses, with its words.
        """
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise ValueError("--submit: there is no SLURM here (sbatch and srun are not found)")
        if "SLURM_JOB_ID" in os.environ:
            raise ValueError(
                f"--submit: this is a SLURM job already ({os.environ['SLURM_JOB_ID']}), whose settings the new one "
                "would inherit; submit from a login node"
            )
        try:
            with self.executor.batch():
                submitted = [self.executor.submit(OCPProgram(), job) for job in runs.values()]
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            no_gpus = "generic resource" in str(error) and not self.config.job.cpu
            hint = " (GPUs are asked for; --cpu asks for none)" if no_gpus else ""
            raise ValueError(f"--submit: SLURM does not take the job: {error}{hint}") from error
        jobs = [str(job.job_id) for job in submitted]
        for run, job in zip(runs, jobs, strict=True):
            (run / "slurm").mkdir(exist_ok=True)
            with (run / "slurm" / _JOBS).open("a", encoding="utf-8") as file:
                file.write(f"{job}\n")
        return jobs

    def log(self, job: str) -> Path:
        """Where the first rank of a job writes."""
        return self.folder / f"{job}_0_log.out"

    def test(self, count: int) -> str:
        """What SLURM says to the script without taking it; empty where there is no SLURM."""
        if shutil.which("sbatch") is None:
            return ""
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(self.script(count))
            file.flush()
            done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True, check=False)
        return (done.stdout + done.stderr).strip()


def active_jobs(run: Path) -> list[str]:
    """Jobs of a run that are in the queue now, running or waiting."""
    path = run / "slurm" / _JOBS
    if not path.is_file() or shutil.which("squeue") is None:
        return []

    def queued(job: str) -> bool:
        command = ["squeue", "--noheader", f"--jobs={job}"]  # prints nothing for a job that is not known any more
        return bool(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())

    return [job for job in path.read_text().split() if queued(job)]


def minutes_of(time: str) -> int:
    """Minutes, rounded up, of a time limit: submitit needs them to tell the limit's end from preemption.

    Raises:
        ValueError: none of SLURM's formats, or no time at all.
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        formats = "M, M:S, H:M:S, D-H, D-H:M and D-H:M:S"
        raise ValueError(f"slurm.time: {time!r} is not a time limit; SLURM's formats are {formats}")
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not days and len(parts) < 3:
        parts = [0, *parts]  # without days, one or two numbers begin with the minutes
    seconds = int(days or 0) * 86_400 + sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if seconds == 0:
        raise ValueError(f"slurm.time: {time!r} is no time at all")
    return -(-seconds // 60)


class _Executor(SlurmExecutor):
    """submitit's executor, which can also show its script, even where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, count: int) -> str:
        if count > 1:
            self.parameters["map_count"] = count
        try:
            return self._make_submission_file_text(self._submitit_command_str, "")
        finally:
            self.parameters.pop("map_count", None)


def _check(parameters: dict[str, Any], folder: Path) -> None:
    """The script is made of `#SBATCH` lines: nothing may break out of its line, or be taken for a pattern."""
    for key, value in [*parameters.items(), *parameters["additional_parameters"].items()]:
        if isinstance(value, str) and not value.isprintable():
            raise ValueError(f"slurm.{key}: {value!r} has characters that a job's script cannot hold")
    for key in parameters["additional_parameters"]:
        if not re.fullmatch(r"[a-z][a-z_-]*", key):
            raise ValueError(f"slurm.additional_parameters.{key}: not the name of an option of sbatch")
    if not str(folder).isprintable() or "%" in str(folder):
        raise ValueError(f"job.run_dir: SLURM cannot write its logs to {str(folder)!r}; no % or control characters")


def _setup() -> list[str]:
    """Lets the job find this package where it is not installed."""
    root = Path(__file__).resolve().parents[3]
    if str(root) in [*site.getsitepackages(), site.getusersitepackages()]:
        return []
    return [f"export PYTHONPATH={shlex.quote(str(root))}${{PYTHONPATH:+:$PYTHONPATH}}"]
