"""Handing runs to SLURM: what is asked for, a dry run, the submission and what is said about it.

fairchem runs a job through submitit; this module fills in fairchem's scheduler section and submitit's parameters and
adds what `slurm_job.py` and `slurm_start.py` do on each rank. A job's own files lie in `<run>/slurm/`.
"""

import logging
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
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
_WAITING = ("Resources", "Priority", "BeginTime", "Dependency", "JobArrayTaskLimit")
"""Reasons for which any job may wait; another one may last for ever."""


def scheduler_section(config: Config) -> dict[str, Any]:
    """fairchem's `job.scheduler`; times and memory are rounded up there, and exact in the job's script."""
    asked, job = config.slurm, config.job
    return {
        "mode": "SLURM",
        "distributed_init_method": asked.rendezvous.upper(),
        "ranks_per_node": job.num_gpus,
        "num_nodes": job.num_nodes,
        "slurm": {
            "mem_gb": -int(-asked.mem_gb // 1),
            "timeout_hr": -(-asked.minutes // 60),
            "cpus_per_task": asked.cpus_per_task,
            "partition": asked.partition,
            "qos": asked.qos,
            "account": asked.account,
            "additional_parameters": dict(asked.additional_parameters) or None,
        },
    }


def for_slurm(job_and_runner: dict[str, Any], config: Config) -> dict[str, Any]:
    """What a trainer built, with SLURM as the scheduler."""
    return {**job_and_runner, "job": {**job_and_runner["job"], "scheduler": scheduler_section(config)}}


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
            "time": asked.minutes,
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

    def script(self, count: int) -> str:
        """The script that sbatch gets for this many runs."""
        return self.executor.script(count)

    def submit(self, jobs: Sequence[DictConfig]) -> list[str]:
        """Submits the runs, as an array if there are several.

        Args:
            jobs: fairchem's configuration of each run.

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
                submitted = [self.executor.submit(OCPProgram(), job) for job in jobs]
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            raise ValueError(f"--submit: SLURM does not take the job: {error}{self._hint(str(error))}") from error
        return [str(job.job_id) for job in submitted]

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

    def _hint(self, message: str) -> str:
        if "generic resource" in message and not self.config.job.cpu:
            return " (GPUs are asked for; --cpu asks for none)"
        return ""


def active_jobs(folder: Path) -> list[str]:
    """Jobs of a run that are in the queue now, running or waiting; `folder` is the run's."""
    path = folder / "slurm" / _JOBS
    if not path.is_file() or shutil.which("squeue") is None:
        return []
    return [job for job in path.read_text().split() if _squeue(job)]


def note_job(folder: Path, job: str) -> None:
    """Remembers a run's job, for `active_jobs`."""
    path = folder / "slurm" / _JOBS
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{job}\n")


def describe(submission: Submission, runs: Mapping[Path, Mapping[str, Any]]) -> str:
    """What a dry run prints: the script, the runs' folders and values, and what SLURM says to it."""
    lines = [f"would submit {_count(len(runs))} as {submission.name}:", "", submission.script(len(runs)), ""]
    lines += [f"run folder: {folder}" + (f"  {dict(values)}" if values else "") for folder, values in runs.items()]
    if answer := submission.test(len(runs)):
        lines.append(f"SLURM says: {answer}")
    return "\n".join([*lines, "nothing was submitted", ""])


def report(submission: Submission, jobs: Mapping[Path, str]) -> str:
    """What is printed after a submission: ids, folders, logs and the commands to follow and to end the jobs."""
    main = next(iter(jobs.values())).partition("_")[0]
    lines = [f"submitted {_count(len(jobs))} as job {main} ({submission.name})"]
    for folder, job in jobs.items():
        lines += [f"job {job}", f"  run folder: {folder}", f"  follow: tail -F {shlex.quote(str(submission.log(job)))}"]
    return "\n".join([*lines, f"queue: squeue -j {main}", f"cancel: scancel {main}", ""])


def warn_of_wait(job: str, *, seconds: float = 8.0) -> None:
    """Looks for some seconds at a new job, and warns if it waits for another reason than that others come first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done = _squeue(job, "--format=%T|%r")
        state, _, reason = (done.splitlines() or [""])[0].partition("|")
        if state != "PENDING" or reason in _WAITING:
            return
        if reason not in ("None", ""):
            logging.warning(
                "job %s waits, and SLURM's reason is %s: perhaps no node can ever give what it asks for (scontrol show "
                "job %s; scancel %s)",
                *(job, reason, job, job),
            )
            return
        time.sleep(0.5)


def _squeue(job: str, *options: str) -> str:
    """SLURM's answer; empty for a job that it does not know (any more)."""
    command = ["squeue", "--noheader", f"--jobs={job}", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _count(number: int) -> str:
    return "one run" if number == 1 else f"{number} runs"


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
