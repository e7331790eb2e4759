"""Short words for what the tests do with a cluster and its jobs."""

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

import faenet_ocp.launch.cli

HERE = Path(__file__).resolve().parent
PATIENCE = float(os.environ.get("FAENET_OCP_SLURM_PATIENCE", "240"))
"""Seconds that a test waits for one thing to happen; then it fails, and its jobs are cancelled."""


def wait_for(what: str, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds} s: {what}")


class Job:
    """One job of the cluster; `id` as SLURM prints it."""

    def __init__(self, job: str, log: Path, folder: Path):
        self.id, self.log, self.folder = job, log, folder

    def show(self, field: str) -> str:
        """One field of `scontrol show job`."""
        text = _call("scontrol", "--oneliner", "show", "job", self.id)
        found = re.search(rf"(?:^|\s){field}=(\S*)", text)
        if found is None:
            raise AssertionError(f"{field} of job {self.id}: {text!r}")
        return found[1]

    @property
    def text(self) -> str:
        """What the first rank has written so far, all starts together."""
        return self.log.read_text() if self.log.is_file() else ""

    @property
    def steps(self) -> list[int]:
        """Steps that the first rank has reported, in the order in which it did them."""
        return [int(step) for step in re.findall(r" step (\d+) of \d+: loss", self.text)]

    def wait_for_state(self, *states: str) -> str:
        def state() -> str | None:
            now = self.show("JobState")
            if now in ("FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL") and now not in states:
                raise AssertionError(f"job {self.id} is {now}:\n{self.text[-5000:]}")
            return now if now in states else None

        try:
            return wait_for(f"job {self.id} to become {states}", state)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.show('JobState')}:\n{self.text[-5000:]}") from None

    def wait_for_steps(self, number: int) -> None:
        """Until so many steps are done, in all starts together."""
        try:
            wait_for(f"{number} steps of job {self.id}", lambda: len(self.steps) >= number)
        except AssertionError as error:
            raise AssertionError(f"{error}; the job is {self.show('JobState')}:\n{self.text[-5000:]}") from None

    def wait_for_restart(self) -> None:
        wait_for(f"job {self.id} to go back to the queue", lambda: self.show("Restarts") != "0")

    def resumed_at(self) -> list[int]:
        """The steps of the checkpoints that the starts went on from."""
        return [int(step) for step in re.findall(r"going on from \S*/step_(\d+)\.pt", self.text)]

    def signal(self, name: str) -> None:
        _call("scancel", f"--signal={name}", self.id)


class Cluster:
    """The cluster, and a folder for the runs of the session."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.data = folder, data
        self.jobs: list[Job] = []

    def config(self, name: str, *, seconds: float, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
        """Writes a small configuration whose steps are slow until `release` is called."""
        model = dict.fromkeys(("tag_hidden_channels", "pg_hidden_channels"), 8)
        content = {
            "includes": [str(HERE.parents[1] / "configs" / "is2re" / "faenet.yml")],
            "dataset": {
                "root": str(self.data),
                "transforms": {"slow_steps.Slow": {"seconds": seconds, "until": str(self.folder / f"{name}.go")}},
            },
            "model": {
                "hidden_channels": 64,
                "num_filters": 16,
                "num_interactions": 1,
                "num_gaussians": 8,
                **model,
            },
            "optim": {
                "batch_size": 2,
                "max_epochs": 20,
                "eval_every_epochs": None,
                "warmup_steps": 5,
                "num_workers": 0,
            },
            "logger": "none",
            "job": {"cpu": True, "print_every": 1, "run_dir": str(self.folder / "runs"), "identifier": name},
            "slurm": {"time": "10", "mem_gb": 2, "cpus_per_task": 1},
        }
        for section, values in (changes or {}).items():
            before = content.get(section)
            content[section] = {**before, **values} if isinstance(before, dict) else values
        path = self.folder / f"{name}.yml"
        path.write_text(yaml.safe_dump(content))
        return path

    def release(self, name: str) -> None:
        """Lets a slow run go on at full speed."""
        (self.folder / f"{name}.go").touch()

    def submit(
        self, name: str, *arguments: str, seconds: float = 0.0, changes: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Job:
        """Submits one run through the command line."""
        config = self.config(name, seconds=seconds, changes=changes)
        output = run_cli("--config", str(config), "--submit", *arguments)
        return self.found(output)[0]

    def found(self, output: str) -> list[Job]:
        """The jobs that the command line has told of."""
        told = re.findall(r"^job (\S+)\n  run folder: (.*)\n  follow: tail -F (.*)$", output, re.MULTILINE)
        jobs = [Job(job, Path(log), Path(folder)) for job, folder, log in told]
        assert jobs, output
        self.jobs += jobs
        return jobs


def run_cli(*arguments: str) -> str:
    """Runs the command line in this process; what it printed."""
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115
    with output, contextlib.redirect_stdout(output):
        status = faenet_ocp.launch.cli.main(arguments)
        output.seek(0)
        text = output.read()
    assert status == 0, text
    return text


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results" / "metrics.json").read_text())


def _call(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def kill_node(folder: Path, job: Job) -> None:
    """SIGKILL to the node's daemon and to all processes of a job, as if the node had lost its power."""
    processes = [int(line.split()[0]) for line in _call("scontrol", "listpids", job.id).splitlines()[1:]]
    parents = {int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1]) for pid in processes}
    managers = {pid for pid in parents if _name(pid).startswith("slurmstepd")}
    daemon = int((folder / "slurmd.pid").read_text())
    assert _name(daemon).startswith("slurmd") and processes and managers
    for pid in (daemon, *managers, *processes):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start_node(folder: Path) -> None:
    """The node comes back, empty."""
    subprocess.run(
        ["slurmd", "-f", str(folder / "slurm.conf")],
        check=True,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
    )


def _name(pid: int) -> str:
    return (Path("/proc") / str(pid) / "comm").read_text().strip()
