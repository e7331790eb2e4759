"""Runs as jobs of a real SLURM: to the end, in arrays, two on one node, refused, failed, and interrupted in every way.

What a job must not lose is compared with an unbroken run, bit for bit.
"""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from slurm_cluster import Cluster, Job, kill_node, results, run_cli, start_node, wait_for

import faenet_ocp.launch.cli
from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.prepare.qm7x import prepare
from qm7x_files import write_files
from shipped import CONFIGS

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

SLOW = 1.5
"""Seconds for each sample of a run that is to be interrupted; it does two in a step."""
NUM_STEPS = 120


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster) -> Path:
    """The same run as the interrupted ones, here and in one piece."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the jobs: sums of several threads round differently
    run_cli("--config", str(cluster.config("unbroken", seconds=0)))
    torch.set_num_threads(threads)
    return cluster.folder / "runs" / "unbroken"


@pytest.fixture(scope="module")
def pair(cluster: Cluster) -> Path:
    """Two jobs of two ranks on one node at the same time; the folder of the first."""
    jobs = [cluster.submit(name, "--num-gpus", "2") for name in ("pair-a", "pair-b")]
    for job in jobs:
        job.wait_for_state("COMPLETED")
    return jobs[0].folder


@pytest.fixture(scope="module")
def waiting(cluster: Cluster) -> Iterator[dict[str, Job]]:
    """Jobs that start together, because starting takes long, and wait for their tests at slow steps.

    "early" has got SIGUSR2 already, while it was importing.
    """
    jobs = {name: cluster.submit(name, seconds=SLOW * (name != "early")) for name in ("early", "limit", "requeued")}
    jobs["limited"] = cluster.submit("limited", seconds=SLOW, changes={"slurm": {"max_timeouts": 0}})
    cluster.jobs.clear()
    early = jobs["early"]
    wait_for("the job to start", lambda: "Starting with JobEnvironment" in early.text)
    early.signal("USR2")
    assert not early.steps
    yield jobs
    subprocess.run(["scancel", *[job.id for job in jobs.values()]], check=False)


def same_weights(one: Path, two: Path) -> bool:
    first, second = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (one, two))
    assert first["progress"]["num_steps_completed"] == second["progress"]["num_steps_completed"] == NUM_STEPS
    return all(torch.equal(weight, second["model"][name]) for name, weight in first["model"].items())


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def assert_nothing_lost(job: Job, interrupted_at: int) -> None:
    """The second start goes on from the very step that the first one ended with."""
    assert job.resumed_at() == [interrupted_at]
    assert job.steps == list(range(1, NUM_STEPS + 1))


# ------------------------------------------------------------------------------------ without interruptions
def test_two_jobs_on_one_node_do_not_meet(cluster: Cluster, pair: Path, unbroken: Path) -> None:
    other = pair.with_name("pair-b")
    assert same_weights(pair, other)
    assert losses(pair)[:10] == pytest.approx(losses(unbroken)[:10], rel=1e-3)
    for folder in (pair, other):
        ranks = {path.name[-9] for path in (folder / "slurm").glob("*_log.out")}
        assert ranks == {"0", "1"}
        assert len(list(folder.glob(".distributed-shared-file-*"))) == 1
        assert results(folder)["splits"].keys() == results(unbroken)["splits"].keys()


def test_molecules_are_trained_by_a_job(cluster: Cluster) -> None:
    """Two ranks, forces and energies, no tags and no cell."""
    root = cluster.folder / "molecules"
    root.mkdir()
    prepare(write_files(root / "hdf5"), root / "data")
    content = yaml.safe_load(cluster.config("qm7x", seconds=0).read_text())
    small = {"hidden_channels": 32, "num_filters": 16, "num_interactions": 1, "num_gaussians": 8}
    content["includes"] = [str(CONFIGS / "demo" / "qm7x.yml")]
    content["dataset"] = {"root": str(root / "data"), "val": {"val_known": None, "val_unknown": {"src": "val_unknown"}}}
    content["model"] = small | {"pg_hidden_channels": 4, "force_hidden_channels": 32}
    content["evaluation_metrics"] = {"primary_metric": {"split": "val_unknown"}}
    content["optim"] |= {"batch_size": 8, "max_epochs": 1, "warmup_steps": 2, "eval_every_epochs": 1}
    config = cluster.folder / "qm7x.yml"
    config.write_text(yaml.safe_dump(content))
    (job,) = cluster.found(run_cli("--config", str(config), "--submit", "--num-gpus", "2"))
    job.wait_for_state("COMPLETED")
    found = results(job.folder)
    assert found["task"] == "qm7x" and found["splits"]["val_unknown"]["forces_mae"] > 0


def test_a_sweep_is_an_array(cluster: Cluster) -> None:
    config = cluster.config("grid", seconds=0)
    sweep = cluster.folder / "sweep.yml"
    sweep.write_text("optim.lr_initial: [1.0e-3, 3.0e-3]\noptim.max_epochs: [1]\n")
    output = run_cli("--config", str(config), "--sweep-yml", str(sweep), "--submit")
    jobs = cluster.found(output)
    assert [job.folder.name for job in jobs] == ["grid_run0", "grid_run1"]
    assert len({job.id.partition("_")[0] for job in jobs}) == 1
    for job in jobs:
        job.wait_for_state("COMPLETED")
    for job, rate in zip(jobs, (1e-3, 3e-3), strict=True):
        assert yaml.safe_load((job.folder / "config.yml").read_text())["optim"]["lr_initial"] == rate
        assert load_checkpoint(job.folder / "checkpoints" / "last.pt")["config"]["optim"]["lr_initial"] == rate
        assert results(job.folder)["run"]["config"] == job.folder.name
        assert job.text.count("Job completed successfully") > 0
    weights = [load_checkpoint(job.folder / "checkpoints" / "last.pt")["model"] for job in jobs]
    assert any(not torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_dry_run_submits_nothing(cluster: Cluster) -> None:
    before = _queue()
    config = cluster.config("dry", seconds=0)
    output = run_cli("--config", str(config), "--submit", "--dry-run", "--slurm-time", "1-00", "--slurm-mem", "3")
    assert "#SBATCH --time=1440\n" in output and "#SBATCH --mem=3072M\n" in output
    assert re.search(r"SLURM says: .* to start at .* in partition main", output)
    refused = run_cli("--config", str(config), "--submit", "--dry-run", "--slurm-cpus", "5000")
    assert "Requested node configuration is not available" in refused
    assert _queue() == before
    assert not (cluster.folder / "runs" / "dry").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slurm-partition", "nowhere"], "invalid partition specified: nowhere"),
        (["--slurm-mem", "9000"], "Memory specification can not be satisfied"),
        (["--slurm-extra", "constraint=gold"], "Invalid feature specification"),
        (["--slurm-extra", "gres=gpu:1"], "Invalid generic resource"),
    ],
)
def test_what_slurm_refuses_is_told(
    cluster: Cluster, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    config = cluster.config("refused", seconds=0)
    assert faenet_ocp.launch.cli.main(["--config", str(config), "--submit", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not _queue()


def test_one_run_is_one_job(cluster: Cluster, capsys: pytest.CaptureFixture) -> None:
    job = cluster.submit("once", "--slurm-extra", "begin=now+1hour")
    assert faenet_ocp.launch.cli.main(["--config", str(cluster.folder / "once.yml"), "--submit"]) == 2
    assert f"is in the queue already, as job {job.id}" in capsys.readouterr().err
    subprocess.run(["scancel", job.id], check=True)
    wait_for("the job to be cancelled", lambda: not _queue())
    assert cluster.submit("once", "--slurm-extra", "begin=now+1hour").id != job.id


def test_a_failed_job_says_why(cluster: Cluster) -> None:
    """The data goes away between submission and start: one rank fails, the job ends, and stays out of the queue."""
    hidden = cluster.folder / "moved.lmdb"
    data = cluster.data / "is2re" / "all" / "val_id" / "data.lmdb"
    job = cluster.submit("fails", "--slurm-extra", "begin=now+5", changes={"optim": {"max_epochs": 1}})
    data.rename(hidden)
    try:
        assert job.wait_for_state("FAILED") == "FAILED"
    finally:
        hidden.rename(data)
    assert job.show("ExitCode") == "1:0" and job.show("Restarts") == "0"
    assert "val_id" in job.text


# ------------------------------------------------------------------------------------ interruptions
def test_a_signal_before_the_start_is_not_lost(waiting: dict[str, Job], unbroken: Path) -> None:
    """SIGUSR2 during imports would kill submitit's process, and with it the job."""
    job = waiting["early"]
    job.wait_for_restart()
    job.wait_for_state("COMPLETED")
    assert job.resumed_at() == []
    assert same_weights(job.folder, unbroken)


def test_the_time_limit_loses_no_step(cluster: Cluster, waiting: dict[str, Job], unbroken: Path) -> None:
    job = waiting["limit"]
    job.wait_for_steps(2)
    _set_limit(job, minutes=1 + int(_minutes(job.show("RunTime"))))  # less than what SLURM warns before
    job.wait_for_restart()
    reached = job.steps[-1]
    _set_limit(job, minutes=10)
    cluster.release("limit")
    job.wait_for_state("COMPLETED")
    assert "this job is timed-out" in job.text and "remaining timeouts" in job.text
    assert_nothing_lost(job, reached)
    assert same_weights(job.folder, unbroken)


def test_requeue_loses_no_step(cluster: Cluster, waiting: dict[str, Job], unbroken: Path) -> None:
    """`scontrol requeue` sends SIGTERM, and SIGKILL soon after; fairchem saves nothing then."""
    job = waiting["requeued"]
    job.wait_for_steps(2)
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    job.wait_for_restart()
    wait_for("the job to wait", lambda: job.show("JobState") == "PENDING")
    reached = job.steps[-1]
    cluster.release("requeued")
    job.wait_for_state("COMPLETED")
    assert_nothing_lost(job, reached)
    assert same_weights(job.folder, unbroken)


def test_too_many_timeouts_end_the_run(waiting: dict[str, Job]) -> None:
    job = waiting["limited"]
    job.wait_for_steps(1)
    job.signal("USR2")  # submitit takes the last ten minutes of a time limit for its end
    assert job.wait_for_state("FAILED", "PENDING", "COMPLETED") == "FAILED"
    assert "timed-out too many times" in job.text


def test_preemption_loses_no_step(cluster: Cluster, pair: Path) -> None:
    """Another job takes the node from one of two ranks, each with a loader worker."""
    wandb = {"name": "wandb", "project": "test", "mode": "offline"}
    changes = {"logger": wandb, "optim": {"num_workers": 1}}
    job = cluster.submit("preempted", "--num-gpus", "2", seconds=SLOW, changes=changes)
    job.wait_for_steps(3)
    started = time.monotonic()
    high = ["sbatch", "--parsable", "--partition=high", "--cpus-per-task=16", "--mem=1G", "--wrap=sleep 1"]
    other = subprocess.run(high, capture_output=True, text=True, check=True, cwd=cluster.folder).stdout.strip()
    job.wait_for_restart()
    seconds = time.monotonic() - started
    reached = job.steps[-1]
    cluster.release("preempted")
    job.wait_for_state("COMPLETED")
    assert Job(other, job.log, job.folder).show("JobState") == "COMPLETED"
    assert seconds < 60  # the grace time: nobody had to be killed
    assert_nothing_lost(job, reached)
    assert same_weights(job.folder, pair)
    logs = sorted((job.folder / "logs" / "wandb").glob("offline-run-*"))
    assert len(logs) == 2 and all(path.name.endswith("-preempted") for path in logs)


def test_a_node_failure_loses_no_more_than_an_epoch(slurm_folder: Path, cluster: Cluster, pair: Path) -> None:
    """Everything on the node dies at once; the rendezvous of the dead ranks is left behind."""
    job = cluster.submit("lost", "--num-gpus", "2", seconds=SLOW)
    job.wait_for_steps(8)
    kill_node(slurm_folder, job)
    reached = job.steps[-1]
    assert list(job.folder.glob(".distributed-shared-file-*"))
    time.sleep(1)
    start_node(slurm_folder)
    job.wait_for_restart()
    cluster.release("lost")
    job.wait_for_state("COMPLETED")
    (resumed,) = job.resumed_at()
    assert resumed == 6 * (reached // 6) > 0
    assert len(list(job.folder.glob(".distributed-shared-file-*"))) <= 1
    assert same_weights(job.folder, pair)


def _queue() -> list[str]:
    return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout.splitlines()


def _set_limit(job: Job, *, minutes: int) -> None:
    subprocess.run(["scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}"], check=True)


def _minutes(text: str) -> float:
    hours, minutes, seconds = (int(part) for part in text.rpartition("-")[2].split(":"))
    return 60 * hours + minutes + seconds / 60
