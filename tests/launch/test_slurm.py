"""Handing runs to SLURM, without a SLURM: requests, scripts, signals. `tests/slurm` uses a real one."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fairchem.core.launchers.api import DistributedInitMethod, JobConfig, SchedulerType
from fairchem.core.launchers.slurm_launch import SlurmSPMDProgram
from omegaconf import DictConfig, OmegaConf
from submitit.core.utils import DelayedSubmission

from faenet_ocp.config.schema import Config, build_config
from faenet_ocp.launch.cli import main
from faenet_ocp.launch.slurm import job as slurm_job
from faenet_ocp.launch.slurm.job import OCPProgram
from faenet_ocp.launch.slurm.submit import Submission, check_same_request, for_slurm, minutes_of

ROOT = Path(__file__).resolve().parents[2]


def _config(**sections: object) -> Config:
    raw = {
        "trainer": "faenet",
        "task": "is2re",
        "dataset": {},
        "model": {"name": "faenet"},
        "optim": {"lr_initial": 1e-3, "batch_size": 2, "max_epochs": 1},
    }
    return build_config(raw | sections)


def _script(folder: Path, config: Config, count: int = 1) -> list[str]:
    return Submission(config, name="name", folder=folder).script(count).splitlines()


# ------------------------------------------------------------------------------------ what is asked for
def test_time_limits() -> None:
    texts = ["90", "1:30", "0:30", "12:00:00", "2-00", "1-01:30", "1-00:00:01"]
    assert [minutes_of(text) for text in texts] == [90, 2, 1, 720, 2880, 1530, 1441]
    for text, message in (("12h", "'12h' is not a time limit"), ("0:00", "'0:00' is no time at all")):
        with pytest.raises(ValueError, match=f"slurm.time: {message}"):
            minutes_of(text)


def test_wrong_requests() -> None:
    for given, message in (
        ({"time": 43200}, "slurm.time: write SLURM's format in quotes"),
        ({"mem": 80}, "slurm.mem: unknown key"),
        ({"mem_gb": 0}, "slurm.mem_gb"),
        ({"rendezvous": "udp"}, "slurm.rendezvous"),
    ):
        with pytest.raises(ValueError, match="not valid") as caught:
            _config(slurm=given)
        assert message in str(caught.value)


def test_the_script_holds_the_request(tmp_path: Path) -> None:
    request = {
        **{"partition": "gpu", "account": "me", "qos": "long", "time": "1-12:00:00", "mem_gb": 1.5, "cpus_per_task": 3},
        "additional_parameters": {"constraint": "h100", "exclusive": True, "nice": 5, "overcommit": False},
    }
    lines = _script(tmp_path / "slurm", _config(slurm=request, job={"num_gpus": 4, "num_nodes": 2}))
    options = (
        "partition=gpu account=me qos=long time=2160 mem=1536M cpus-per-task=3 nodes=2 ntasks-per-node=4 "
        "gpus-per-node=4 constraint=h100 exclusive nice=5 requeue signal=USR2@120 job-name=name"
    )
    for option in (*options.split(), f"output={tmp_path / 'slurm'}/%j_0_log.out"):
        assert f"#SBATCH --{option}" in lines
    assert not any("overcommit" in line or "array" in line for line in lines)
    assert not (tmp_path / "slurm").exists()


def test_defaults_can_be_left_out(tmp_path: Path) -> None:
    lines = _script(tmp_path, _config(slurm={"additional_parameters": {"requeue": False}}, job={"cpu": True}))
    assert not any("requeue" in line or "gpus" in line or "partition" in line for line in lines)


def test_an_array(tmp_path: Path) -> None:
    assert "#SBATCH --array=0-6%7" in _script(tmp_path, _config(), count=7)


@pytest.mark.parametrize(
    "given",
    [
        {"partition": "a\nrm -r x"},
        {"additional_parameters": {"comment": "a\nrm -r x"}},
        {"additional_parameters": {"comment\nrm": "a"}},
        {"additional_parameters": {"wrap x": "a"}},
    ],
)
def test_a_request_runs_no_commands(tmp_path: Path, given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"slurm\."):
        Submission(_config(slurm=given), name="name", folder=tmp_path)


def test_a_request_is_data_to_the_shell(tmp_path: Path) -> None:
    """The script, run by a shell, does nothing with hostile values but start srun."""
    given = {"partition": "$(touch a)", "additional_parameters": {"comment": "'; touch b; '"}}
    script = "\n".join(_script(tmp_path / "it's; touch c", _config(slurm=given)))
    subprocess.run([shutil.which("bash"), "-c", script], cwd=tmp_path, env={"PATH": "/nonexistent"}, check=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["100%j", "a\nb"])
def test_folders_that_slurm_would_misread(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ValueError, match="run_dir"):
        Submission(_config(), name="name", folder=tmp_path / folder)


def test_fairchem_gets_the_same_request(tmp_path: Path) -> None:
    config = _config(slurm={"mem_gb": 1.5, "time": "90"}, job={"num_gpus": 2, "num_nodes": 3})
    built = {"job": {"run_name": "x", "scheduler": {"ranks_per_node": 1}}, "runner": {}}
    merged = OmegaConf.merge({"job": OmegaConf.structured(JobConfig)}, for_slurm(built, config))
    scheduler = OmegaConf.to_object(merged.job).scheduler
    assert scheduler.mode == SchedulerType.SLURM
    assert scheduler.distributed_init_method == DistributedInitMethod.FILE
    assert (scheduler.ranks_per_node, scheduler.num_nodes) == (2, 3)
    assert (scheduler.slurm.mem_gb, scheduler.slurm.timeout_hr) == (2, 2)
    over_tcp = for_slurm(built, _config(slurm={"rendezvous": "tcp"}))
    assert over_tcp["job"]["scheduler"]["distributed_init_method"] == "TCP"
    assert built["job"]["scheduler"] == {"ranks_per_node": 1}


def test_an_array_asks_once() -> None:
    check_same_request(_config(job={"seed": 1}), _config(job={"seed": 2}))
    for other in ({"slurm": {"time": "5"}}, {"job": {"num_gpus": 2}}, {"job": {"cpu": True}}):
        with pytest.raises(ValueError, match="cannot differ between runs"):
            check_same_request(_config(), _config(**other))


# ------------------------------------------------------------------------------------ the command line
@pytest.fixture
def command(small_is2re: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line with a SLURM of shell scripts; `bin/` holds them, `seen/` what they were given."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in ("bin", "seen"):
        (tmp_path / name).mkdir()
    scripts = {
        "sbatch": f'[ "$1" = --test-only ] && echo "would start" && exit; cp "$1" {tmp_path}/seen; '
        "echo Submitted batch job 17",
        "srun": "true",
        "squeue": "true",
    }
    for name, text in scripts.items():
        _fake(tmp_path, name, text)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    base = ["--config", str(ROOT / "configs/is2re/faenet.yml"), f"--dataset.root={small_is2re}"]
    folder = ["--run-dir", str(tmp_path / "runs"), "--identifier", "x"]
    return lambda *arguments: main([*base, *folder, "--submit", *arguments])


def _fake(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_submission(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command("--cpu", "--num-gpus", "2", "--slurm-partition", "p", "--slurm-timeout", "3") == 0
    folder = tmp_path / "runs" / "x"
    log = folder / "slurm" / "17_0_log.out"
    assert capsys.readouterr().out == f"job 17\n  run folder: {folder}\n  follow: tail -F {log}\n"
    (script,) = (tmp_path / "seen").iterdir()
    text = script.read_text()
    assert "#SBATCH --partition=p\n" in text and "#SBATCH --time=180\n" in text
    assert (folder / "config.yml").is_file() and (folder / "canonical_config.yaml").is_file()
    with open(folder / "slurm" / "17_submitted.pkl", "rb") as file:
        delayed = pickle.load(file)
    assert isinstance(delayed.function, OCPProgram)
    job = delayed.args[0].job
    assert job.scheduler.mode == SchedulerType.SLURM and job.scheduler.ranks_per_node == 2
    assert Path(job.run_dir) / job.timestamp_id == folder
    assert delayed._timeout_countdown == 100 and delayed._timeout_min == 180


def test_a_sweep_becomes_an_array(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    grid = tmp_path / "grid.yml"
    grid.write_text("optim.lr_initial: [1e-3, 2e-3]\n")
    assert command("--cpu", "--sweep-yml", str(grid)) == 0
    printed, runs = capsys.readouterr().out, tmp_path / "runs"
    for number in (0, 1):
        assert f"job 17_{number}\n  run folder: {runs / f'x_run{number}'}\n" in printed
        assert f"tail -F {runs}/x_sweep/slurm/17_{number}_0_log.out" in printed
        with open(runs / "x_sweep" / "slurm" / f"17_{number}_submitted.pkl", "rb") as file:
            assert pickle.load(file).args[0].job.timestamp_id == f"x_run{number}"
    grid.write_text("job.num_gpus: [1, 2]\n")
    assert command("--cpu", "--sweep-yml", str(grid)) == 2


def test_a_dry_run_writes_nothing(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert (
        command("--dry-run", "--num-gpus", "2", "--slurm-extra", "constraint=h100", "--slurm-extra", "exclusive") == 0
    )
    printed = capsys.readouterr().out
    # A login node has no GPU; the job asks for them all the same.
    for text in ("--gpus-per-node=2", "--constraint=h100", "--exclusive", "SLURM says: would start", "nothing was sub"):
        assert text in printed
    assert f"run folder: {tmp_path / 'runs' / 'x'}\n" in printed
    assert not (tmp_path / "runs").exists() and not list((tmp_path / "seen").iterdir())


def test_a_dry_run_without_slurm(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command("--cpu", "--dry-run") == 0
    assert "SLURM says" not in capsys.readouterr().out
    assert command("--cpu") == 2
    assert "there is no SLURM here" in capsys.readouterr().err


def test_what_sbatch_refuses(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _fake(tmp_path, "sbatch", "echo 'sbatch: error: Invalid generic resource (gres) specification' >&2; exit 1")
    assert command() == 2
    message = capsys.readouterr().err
    assert "Invalid generic resource" in message and "--cpu asks for none" in message


def test_a_run_is_submitted_once(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command("--cpu") == 0
    assert command("--cpu") == 0  # the first job has left the queue: the run goes on
    _fake(tmp_path, "squeue", "echo a job")
    assert command("--cpu") == 2
    assert "is in the queue already, as job 17" in capsys.readouterr().err


def test_mistakes(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert command("--cpu", "--slurm-time", "soon") == 2
    assert "slurm.time: 'soon' is not a time limit" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    assert command("--cpu") == 2
    assert "this is a SLURM job already (3)" in capsys.readouterr().err
    assert not (tmp_path / "seen").glob("*.sh") or not list((tmp_path / "seen").iterdir())


# ------------------------------------------------------------------------------------ the start of a rank
def _start(tmp_path: Path, code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-IS", str(ROOT / "faenet_ocp/launch/slurm/start.py"), "-c", code, str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


_SIGNAL_ITSELF = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print(signal.sigpending())"


def test_signals_wait_from_the_start(tmp_path: Path) -> None:
    done = _start(tmp_path, _SIGNAL_ITSELF)
    assert done.returncode == 0 and "SIGUSR2" in done.stdout
    without = subprocess.run([sys.executable, "-c", _SIGNAL_ITSELF], capture_output=True, check=False)
    assert without.returncode == -signal.SIGUSR2


def test_what_the_rank_starts_is_left_in_peace(tmp_path: Path) -> None:
    code = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {_SIGNAL_ITSELF!r}]).returncode)"
    assert _start(tmp_path, code).returncode == 0


# ------------------------------------------------------------------------------------ a rank
def _job_config(folder: Path) -> DictConfig:
    job = {
        "run_dir": str(folder.parent),
        "timestamp_id": folder.name,
        "runner_state_path": "old",
        "metadata": {"array_job_num": 0, "preemption_checkpoint_dir": str(folder / "state")},
    }
    return OmegaConf.create({"job": job})


def test_every_start_has_its_own_rendezvous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, numbers = _job_config(tmp_path), set()
    for job, restarts in (("41", None), ("41", "1"), ("41", "12"), ("410", "1"), ("42", None)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        if restarts:
            monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        number = slurm_job._own_rendezvous(config)
        assert not list(tmp_path.iterdir())  # what the start before has left is gone
        (tmp_path / f".distributed-shared-file-{number}").touch()
        monkeypatch.setenv("SLURM_PROCID", "1")
        assert slurm_job._own_rendezvous(config) == number
        assert len(list(tmp_path.iterdir())) == 1  # another rank, or one that comes later, removes nothing in use
        monkeypatch.setenv("SLURM_PROCID", "0")
        assert slurm_job._own_rendezvous(config) == number
        assert len(list(tmp_path.iterdir())) == 1
        numbers.add(number)
    assert len(numbers) == 5


class _Runner:
    """A training whose steps take 0.1 s, and which notes what happens to it."""

    def __init__(self, folder: Path, *, stoppable: bool):
        self.folder, self.stoppable, self.asked = folder, stoppable, False

    def stop_soon(self) -> bool:
        self.asked = True
        return True

    def save_state(self, path: str, is_preemption: bool) -> bool:
        return False

    def run(self) -> None:
        (self.folder / "running").touch()
        while not (self.folder / "end").exists():
            time.sleep(0.1)
            if self.asked and self.stoppable:
                note(self.folder, "saved")
                raise SystemExit(143)


def note(folder: Path, what: str) -> None:
    with (folder / "notes").open("a") as file:
        file.write(what + " ")


def _notes(folder: Path) -> list[str]:
    return (folder / "notes").read_text().split() if (folder / "notes").exists() else []


class _Rank:
    """A process that runs the program, as submitit would: with a handler for SIGUSR2 that requeues."""

    def __init__(self, folder: Path, *, runner: _Runner | None, requeue: Callable[[], None], grace: float = 30.0):
        self.folder = folder
        # Blocked before there are threads, as by slurm_start.py: libraries start theirs in a forked process.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, slurm_job._SIGNALS)
        self.pid = os.fork()
        if self.pid == 0:
            self._run(runner, requeue, grace)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _run(self, runner: _Runner | None, requeue: Callable[[], None], grace: float) -> None:
        def call(program: SlurmSPMDProgram, config: DictConfig, run_type: object) -> None:
            if runner is None:  # imports, rendezvous: there is no runner yet
                (self.folder / "running").touch()
                time.sleep(60)
            program.runner = runner
            runner.run()

        def handler(signum: int, frame: object) -> None:
            requeue()

        status = 99
        try:
            SlurmSPMDProgram.__call__ = call
            slurm_job.GRACE, slurm_job._UNTIL_KILLED = grace, 3.0
            os.environ |= {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}
            signal.signal(signal.SIGUSR2, handler)
            program = OCPProgram()
            program(_job_config(self.folder))
            status = 0
        except SystemExit:
            status = 98
        finally:
            os._exit(status)

    def send(self, signum: int) -> None:
        deadline = time.monotonic() + 30
        while not (self.folder / "running").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(self.pid, signum)

    def status(self, seconds: float = 20.0) -> int | None:
        """How it ended; None if it lives."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        return None


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Callable[..., _Rank]]:
    """Makes a rank; ends it after the test."""
    made: list[_Rank] = []

    def make(*, training: bool = True, stoppable: bool = True, first: bool = True, grace: float = 30.0) -> _Rank:
        def requeue() -> None:
            if first:
                note(tmp_path, "requeued")
                raise SystemExit(-1)

        runner = _Runner(tmp_path, stoppable=stoppable) if training else None
        made.append(_Rank(tmp_path, runner=runner, requeue=requeue, grace=grace))
        return made[-1]

    yield make
    for process in made:
        try:
            os.kill(process.pid, signal.SIGKILL)
            os.waitpid(process.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            continue


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({}, ["saved", "requeued"]),
        ({"training": False}, ["requeued"]),  # there is no runner yet
        ({"stoppable": False, "grace": 0.5}, ["requeued"]),  # it does not wait for ever
    ],
)
def test_preemption_saves_and_requeues(
    rank: Callable[..., _Rank], tmp_path: Path, options: dict[str, object], notes: list[str]
) -> None:
    process = rank(**options)
    process.send(signal.SIGUSR2)
    assert process.status() == 255
    assert _notes(tmp_path) == notes


def test_other_ranks_stop_and_wait(rank: Callable[..., _Rank], tmp_path: Path) -> None:
    process = rank(first=False)
    process.send(signal.SIGUSR2)
    assert process.status(1.0) is None  # leaving now would look like a failure to the first rank
    assert _notes(tmp_path) == ["saved"]
    process.send(signal.SIGTERM)
    assert process.status() == 143


def test_sigterm_saves_and_leaves_the_rest_to_slurm(rank: Callable[..., _Rank], tmp_path: Path) -> None:
    process = rank()
    process.send(signal.SIGTERM)
    assert process.status(1.0) is None
    assert _notes(tmp_path) == ["saved"]
    assert process.status() == 255  # nobody killed it: it goes back to the queue by itself
    assert _notes(tmp_path) == ["saved", "requeued"]


def test_a_run_that_ends_is_not_requeued(rank: Callable[..., _Rank], tmp_path: Path) -> None:
    process = rank(stoppable=False)
    process.send(signal.SIGUSR2)
    (tmp_path / "end").touch()
    assert process.status() == 0
    assert _notes(tmp_path) == []


def test_a_refused_requeue_is_a_failure(tmp_path: Path) -> None:
    def refuse() -> None:
        raise RuntimeError("timed-out too many times")

    process = _Rank(tmp_path, runner=_Runner(tmp_path, stoppable=True), requeue=refuse)
    process.send(signal.SIGUSR2)
    assert process.status() == 1


def test_what_is_stored_for_the_next_start(tmp_path: Path) -> None:
    program = OCPProgram()
    program.config = _job_config(tmp_path)
    delayed = program.checkpoint()
    assert isinstance(delayed, DelayedSubmission) and type(delayed.function) is OCPProgram
    assert delayed.args[0].job.runner_state_path is None
    program.runner = _Runner(tmp_path, stoppable=True)
    assert program.checkpoint().args[0].job.runner_state_path is None
    program.runner.save_state = lambda path, is_preemption: True
    assert program.checkpoint().args[0].job.runner_state_path == str(tmp_path / "state")
    assert pickle.loads(pickle.dumps(delayed)).args[0] == delayed.args[0]
