"""Before a run begins: who may write to its folder, what is missing, paths, and Ctrl-C."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import processes
from faenet_ocp import build
from faenet_ocp.common.files import exclusive
from faenet_ocp.config.schema import build_config
from faenet_ocp.config.yaml import load_yaml
from faenet_ocp.launch.cli import main
from faenet_ocp.training.unit import OCPTrainUnit


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.write_data(tmp_path_factory.mktemp("data"))


def _arguments(folder: Path, root: Path | str, *more: str, **optim: object) -> list[str]:
    config = processes.write_config(folder / "config.yml", root, model={"num_interactions": 1}, optim=optim)
    return ["--config", str(config), "--identifier", "run", *more]


# ------------------------------------------------------------------------------------------ one writer


def _hold(folder: Path, *, dead_launcher: bool = False) -> Callable[[], None]:
    """Waits in the second step, with a forked loader; or as ranks do whose launcher has been killed."""

    def prepare() -> None:
        step = OCPTrainUnit.train_step

        def waiting(self: OCPTrainUnit, state: object, data: object) -> None:
            if self.train_progress.num_steps_completed == 1:
                if dead_launcher:
                    (folder / "run" / ".lock").unlink()
                (folder / "waits").touch()
                signal.pause()
            step(self, state, data)

        OCPTrainUnit.train_step = waiting  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize("dead_launcher", [False, True])
def test_one_writer_to_a_folder(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, dead_launcher: bool) -> None:
    """The second is told so and changes nothing; the lock of a killed one, whose workers live on, is taken over."""
    arguments = _arguments(tmp_path, data, num_workers=1)
    hold = _hold(tmp_path, dead_launcher=dead_launcher)
    (first,) = processes.forked(arguments, tmp_path / "log", prepare=hold)
    processes.wait_for(lambda: (tmp_path / "waits").exists() or first.exitcode is not None)
    before = (tmp_path / "run" / "config.yml").read_text()
    assert main([*arguments, "--job.seed=5"]) == 2
    assert f"{tmp_path / 'run'}: another process is writing there" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yml").read_text() == before
    os.kill(first.pid, signal.SIGKILL)
    assert processes.finish([first]) == [-signal.SIGKILL]
    assert main(arguments) == 0


def test_a_lock_can_be_waited_for(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock", tmp_path):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with exclusive(tmp_path / "lock", tmp_path, patience=30):
                    status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ------------------------------------------------------------------------------------------ known at the start


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--logger=wandb", "logger.name: wandb: "),
        ("--logger=tensorboard", "logger.name: tensorboard cannot be imported"),
        ("--loss_functions=[{energy: {fn: l2mae}}]", "loss_functions.energy.fn: l2mae is for vectors"),
        ("--outputs.forces.normalizer=fit", "outputs.forces.normalizer: fit: only for scalars of systems"),
        ("--optim.batch_size=1", "optim.batch_size: 1 systems of 12 give batches of 1, too few for"),
    ],
)
def test_what_is_missing_is_told_before_any_work(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    change: str,
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(_arguments(tmp_path, data, change, "--optim.grad_accumulation=2")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_more_gpus_than_there_are(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(_arguments(tmp_path, data, "--job.cpu=false", "--num-gpus", "2")) == 2
    assert "job.num_gpus: 2, but 1 GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(_arguments(tmp_path, data, "--job.cpu=false", "--num-gpus", "2")) == 2
    assert "job.num_gpus: 2, but no GPU is here; --cpu: as many ranks on the CPU" in capsys.readouterr().err


def test_training_does_not_write_over_results_of_another_command(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    results = tmp_path / "runs" / "evaluated" / "results"
    results.mkdir(parents=True)
    (results / "metrics.json").write_text("{}")
    assert main(_arguments(tmp_path, data, "--run-dir", str(tmp_path / "runs"), "--identifier", "evaluated")) == 2
    assert "evaluated has results already; choose another --identifier" in capsys.readouterr().err


@pytest.mark.parametrize("scheduler", ["linear_warmup_cosine", "constant"])
def test_a_warm_up_longer_than_the_run_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, scheduler: str
) -> None:
    monkeypatch.setattr("faenet_ocp.launch.local_ranks.launch", lambda config: None)
    assert main(_arguments(tmp_path, data, warmup_steps=4, scheduler=scheduler)) == 0
    assert "optim.warmup_steps: 4, but training has only 4 steps" in caplog.text


# ------------------------------------------------------------------------------------------ paths


def test_paths_as_a_shell_reads_them(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` and variables where a shell has not put them in; a folder with brackets, and a pattern below it."""
    root = tmp_path / "set [1]*"
    shutil.copytree(data, root)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    raw = load_yaml(processes.write_config(tmp_path / "config.yml", "~/set [1]*", job={"run_dir": "$PLACE/runs"}))
    raw["dataset"]["train"]["src"] = "tr*.lmdb"
    raw["dataset"]["val"]["w"] = {"src": ["$PLACE/set [1]*/val.lmdb"]}
    config = build_config(raw)
    assert config.job.run_dir == str(tmp_path / "runs")
    assert build.make_dataset(config, config.dataset.train).paths == [root / "train.lmdb"]
    assert build.make_dataset(config, config.dataset.val["w"]).paths == [root / "val.lmdb"]


def test_a_relative_root_names_the_working_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(_arguments(tmp_path, "somewhere")) == 2
    assert f"dataset.root: 'somewhere' is a folder below the working folder, {tmp_path}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ Ctrl-C


def test_ctrl_c_during_imports(data: Path, tmp_path: Path) -> None:
    process = processes.start(_arguments(tmp_path, data))
    processes.wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "stopped\n")
