"""Runs that are killed, stopped or cannot write: nothing is lost, and what went wrong is said."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import processes
from faenet_ocp import checkpoint
from faenet_ocp.checkpoint import load_checkpoint, step_checkpoints
from faenet_ocp.common import files
from faenet_ocp.evaluation import evaluator
from faenet_ocp.launch.cli import main
from faenet_ocp.training.loggers import MetricLogger
from faenet_ocp.training.unit import OCPTrainUnit

STEPS = 24
_TIMED = ("epoch_seconds", "versions", "config")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.write_data(tmp_path_factory.mktemp("data"))


def _config(folder: Path, data: Path, **optim: object) -> list[str]:
    """Stochastic frames, EMA, warm-up; 2 steps an epoch, saved after 3 steps, evaluated after 4 epochs."""
    settings = {"max_epochs": STEPS // 2, "warmup_steps": 5, "ema_decay": 0.95, "checkpoint_every": 3}
    settings |= {"eval_every_epochs": 4, **optim}
    config = processes.write_config(folder / "config.yml", data, optim=settings, model={"num_interactions": 1})
    return ["--config", str(config), "--identifier", "run"]


def _forked(arguments: list[str], folder: Path, prepare: Callable[[], None] | None = None) -> int | None:
    """Exit status of a run in a process of its own; it writes to `folder / "log"`."""
    (status,) = processes.finish(processes.forked(arguments, folder / "log", prepare=prepare))
    return status


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a run without interruption, by number of ranks."""
    done: dict[int, Path] = {}

    def get(ranks: int) -> Path:
        if ranks not in done:
            folder = tmp_path_factory.mktemp(f"unbroken{ranks}")
            assert set(processes.finish(processes.forked(_config(folder, data), folder / "log", ranks=ranks))) == {0}
            done[ranks] = folder
        return done[ranks]

    return get


def _checkpoints(folder: Path) -> Path:
    return folder / "run" / "checkpoints"


def _reached(folder: Path) -> int:
    return load_checkpoint(_checkpoints(folder) / "last.pt")["progress"]["num_steps_completed"]


def _assert_same_end(one: Path, two: Path) -> None:
    for name in ("last.pt", "best.pt"):
        states = [load_checkpoint(_checkpoints(folder) / name) for folder in (one, two)]
        for state in states:
            for key in _TIMED:
                state.pop(key)
        assert processes.differences(*states) == []
        assert states[0]["model"]
    assert processes.records(one / "run") == processes.records(two / "run")
    assert len(processes.records(one / "run")) == STEPS + 3
    assert not list(_checkpoints(two).glob(".*"))


# ------------------------------------------------------------------------------------------ kills


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after_steps(steps: int, delay: float) -> Callable[[], None]:
    """SIGKILL some time after so many steps, wherever the process is by then."""

    def prepare() -> None:
        done, step = [0], OCPTrainUnit.train_step

        def counting(self: OCPTrainUnit, state: Any, data: Any) -> None:
            step(self, state, data)
            done[0] += 1
            if done[0] == steps:
                threading.Timer(delay, _die).start()

        OCPTrainUnit.train_step = counting  # type: ignore[method-assign]

    return prepare


def _at_rename(name: str, number: int, *, before: bool) -> Callable[[], None]:
    """SIGKILL before or after the n-th rename to a checkpoint called `name...`."""

    def prepare() -> None:
        publish, count = files.publish, [0]

        def dying(temporary: Path, path: Path) -> None:
            count[0] += path.suffix == ".pt" and path.name.startswith(name)
            if before and count[0] == number:
                _die()
            publish(temporary, path)
            if count[0] == number:
                _die()

        files.publish = checkpoint.publish = dying  # type: ignore[attr-defined]

    return prepare


def _in_half_a_line() -> None:
    def half(self: MetricLogger, step: int, epoch: float, values: object) -> None:
        self.file.write(b'{"step": 1, "ep')
        _die()

    MetricLogger.log = half  # type: ignore[method-assign, assignment]


def _after_the_metrics_of_an_evaluation() -> None:
    """Written to the log and to best.pt, before the periodic checkpoint says so."""
    evaluate = evaluator.Evaluator.evaluate

    def dying(self: evaluator.Evaluator, *args: Any, **kwargs: Any) -> Any:
        _at_rename("step", 1, before=True)()
        return evaluate(self, *args, **kwargs)

    evaluator.Evaluator.evaluate = dying  # type: ignore[method-assign]


_PLACES = {
    "before the rename": _at_rename("step", 2, before=True),
    "between the rename and last.pt": _at_rename("step", 2, before=False),
    "after last.pt, before old ones go": _at_rename("last", 2, before=False),
    "in half a line of metrics": _in_half_a_line,
    "after the metrics of an evaluation": _after_the_metrics_of_an_evaluation,
    "between steps": _after_steps(2, 0.001),
}


def _random_kills(seed: int, count: int) -> dict[str, Callable[[], None]]:
    rng = random.Random(seed)
    kills = [(rng.randint(1, 3), rng.random() * 0.05) for _ in range(count)]
    return {f"{delay:.3f} s after step {steps}": _after_steps(steps, delay) for steps, delay in kills}


@pytest.mark.parametrize(
    ("workers", "ranks", "count"),
    [
        (0, 1, 0),
        pytest.param(0, 1, 8, marks=pytest.mark.slow),
        pytest.param(2, 1, 6, marks=pytest.mark.slow),
        pytest.param(0, 2, 4, marks=pytest.mark.slow),
        pytest.param(2, 2, 4, marks=pytest.mark.slow),
    ],
)
def test_kills_change_nothing(
    unbroken: Callable[[int], Path], data: Path, tmp_path: Path, workers: int, ranks: int, count: int
) -> None:
    """One run, killed again and again, ends bit for bit where an unbroken one ends: see `_assert_same_end`."""
    arguments = _config(tmp_path, data, num_workers=workers)
    kills = _random_kills(100 * workers + 10 * ranks + count, count) if count else _PLACES
    survived = 0
    for place, prepare in kills.items():
        started = processes.forked(arguments, tmp_path / "log", prepare=prepare, ranks=ranks)
        processes.wait_for(lambda started=started: any(process.exitcode is not None for process in started))
        codes = {process.exitcode for process in started}
        assert codes <= {None, -signal.SIGKILL, 0}, (place, codes, (tmp_path / "log").read_text()[-3000:])
        for process in started:  # a node dies as a whole
            process.kill()
        processes.finish(started)
        survived += -signal.SIGKILL in codes
    assert survived >= min(4, len(kills) - 1)  # then it may have reached the end
    assert set(processes.finish(processes.forked(arguments, tmp_path / "log", ranks=ranks))) == {0}
    _assert_same_end(unbroken(ranks), tmp_path)


# ------------------------------------------------------------------------------------------ signals


def _slow_steps(seconds: float, since: int = 3) -> Callable[[], None]:
    def prepare() -> None:
        step = OCPTrainUnit.train_step

        def slow(self: OCPTrainUnit, state: Any, data: Any) -> None:
            step(self, state, data)
            if self.train_progress.num_steps_completed >= since:
                time.sleep(seconds)

        OCPTrainUnit.train_step = slow  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize(("signum", "status", "workers"), [(signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 0)])
def test_a_signal_saves_and_ends_with_its_status(
    unbroken: Callable[[int], Path], data: Path, tmp_path: Path, signum: int, status: int, workers: int
) -> None:
    """To the whole process group, as a terminal and `timeout` do it: workers have to go on until the step is done."""
    arguments = _config(tmp_path, data, num_workers=workers)
    (process,) = processes.forked(arguments, tmp_path / "log", prepare=_slow_steps(0.1))
    processes.wait_for(lambda: step_checkpoints(_checkpoints(tmp_path)) or process.exitcode is not None)
    os.killpg(process.pid, signum)
    log = (tmp_path / "log").read_text
    assert processes.finish([process]) == [status], log()[-3000:]
    assert f"goes on from {_checkpoints(tmp_path) / 'last.pt'}" in log()
    assert "Traceback" not in log()
    assert _reached(tmp_path) == processes.records(tmp_path / "run")[-1]["step"] < STEPS
    assert _forked(arguments, tmp_path) == 0
    _assert_same_end(unbroken(1), tmp_path)


class _InterruptedStream(io.FileIO):
    """Gets SIGTERM inside the write of a log line: a signal may come at any instruction."""

    def write(self, data: Any) -> int:
        if b"step_00000006.pt" in bytes(data):
            signal.raise_signal(signal.SIGTERM)
        return super().write(data)


def _interrupt_a_write() -> None:
    raw = _InterruptedStream(2, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(raw), line_buffering=True)


def test_a_signal_in_the_middle_of_a_log_line(data: Path, tmp_path: Path) -> None:
    """The stream is not reentrant: to log from the handler would lose both lines and print a traceback."""
    assert _forked(_config(tmp_path, data), tmp_path, _interrupt_a_write) == 143
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert "step_00000006.pt" in log
    assert "the same signal again stops at once" in log


def test_a_second_ctrl_c_stops_at_once(data: Path, tmp_path: Path) -> None:
    (process,) = processes.forked(_config(tmp_path, data), tmp_path / "log", prepare=_slow_steps(60, since=4))
    processes.wait_for((_checkpoints(tmp_path) / "step_00000003.pt").exists)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    processes.wait_for(lambda: "the same signal again stops at once" in (tmp_path / "log").read_text())
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    assert processes.finish([process], timeout=30) == [130]
    assert _reached(tmp_path) >= 3


def _before_each_evaluation(do: Callable[[], None]) -> None:
    run_split = evaluator.run_split

    def doing(*args: Any, **kwargs: Any) -> Any:
        do()
        return run_split(*args, **kwargs)

    evaluator.run_split = doing


def test_a_signal_during_evaluation_does_not_wait_for_its_end(
    unbroken: Callable[[int], Path], data: Path, tmp_path: Path
) -> None:
    """The checkpoint is there already; the run goes on with the evaluation."""
    arguments = _config(tmp_path, data)

    def prepare() -> None:
        _before_each_evaluation(lambda: os.kill(os.getpid(), signal.SIGTERM))

    assert _forked(arguments, tmp_path, prepare) == 143
    assert load_checkpoint(_checkpoints(tmp_path) / "last.pt")["pending_evaluation"] is True
    assert _forked(arguments, tmp_path) == 0
    _assert_same_end(unbroken(1), tmp_path)


def _evaluation_takes_an_hour() -> None:
    clock, hours = time.perf_counter, list[float]()
    _before_each_evaluation(lambda: hours.append(3600.0))
    time.perf_counter = lambda: clock() + sum(hours)


def test_evaluation_does_not_count_as_time_of_training(data: Path, tmp_path: Path) -> None:
    assert _forked(_config(tmp_path, data), tmp_path, _evaluation_takes_an_hour) == 0
    lines = (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()
    speeds = [record["train/samples_per_s"] for line in lines if "train/samples_per_s" in (record := json.loads(line))]
    assert len(speeds) == STEPS
    assert min(speeds) > 0.1  # 6 systems an hour are 0.002


@pytest.mark.parametrize(
    ("signum", "group", "status"),
    [
        (signal.SIGTERM, False, 143),
        pytest.param(signal.SIGINT, True, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, 143, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_stop_together(data: Path, tmp_path: Path, signum: int, group: bool, status: int) -> None:
    """Through torch elastic; the signal goes to all processes or to the first one only."""
    arguments = [*_config(tmp_path, data, max_epochs=4000, num_workers=1), "--num-gpus", "2"]
    (process,) = processes.forked(arguments, tmp_path / "log", prepare=processes.elastic)
    processes.wait_for(lambda: step_checkpoints(_checkpoints(tmp_path)) or process.exitcode is not None)
    (os.killpg if group else os.kill)(process.pid, signum)
    log = (tmp_path / "log").read_text
    assert processes.finish([process], timeout=120) == [status], log()[-3000:]
    assert "goes on from" in log()
    assert "Traceback" not in log()
    assert _reached(tmp_path) == processes.records(tmp_path / "run")[-1]["step"]


@pytest.mark.slow
def test_ranks_end_when_their_launcher_is_killed(data: Path, tmp_path: Path) -> None:
    """No orphans: they save and go. The real command, whose ranks are not forked."""
    process = processes.start([*_config(tmp_path, data, max_epochs=4000), "--num-gpus", "2"])
    processes.wait_for(lambda: step_checkpoints(_checkpoints(tmp_path)))
    ranks = processes.ranks_of(process.pid)
    assert len(ranks) == 2
    process.kill()
    process.communicate(timeout=60)
    processes.wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), timeout=60)
    assert load_checkpoint(_checkpoints(tmp_path) / "last.pt")["model"]


# ------------------------------------------------------------------------- other files


def test_a_checkpoint_of_another_model_says_what_does_not_fit(
    unbroken: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    best = str(_checkpoints(unbroken(1)) / "best.pt")
    arguments = ["--mode", "validate", "--checkpoint", best, "--run-dir", str(tmp_path), "--identifier", "v"]
    assert main([*arguments, "--model.hidden_channels=40"]) == 2
    message = capsys.readouterr().err
    assert "does not fit the configured model" in message
    assert "size mismatch" in message


# ------------------------------------------------------------------------- files that cannot be written


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = sys.platform == "linux" and os.getuid() == 0
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _break_after_first(folder: Path, how: str) -> Callable[[], None]:
    """Makes the disk of the run useless once it has a checkpoint."""

    def prepare() -> None:
        save, done = checkpoint.save_checkpoint, [0]

        def breaking(path: Path, state: Any) -> None:
            done[0] += 1
            if done[0] == 2:
                if how == "full":
                    free = os.statvfs(folder)
                    (folder / "ballast").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 20_000))
                elif how == "read-only":
                    target = str(path.parent)
                    subprocess.run(["mount", "--bind", target, target], check=True)
                    subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
                else:
                    (folder / "run").rename(folder / "moved away")
            save(path, state)

        checkpoint.save_checkpoint = breaking

    return prepare


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("full", "No space left on device"),
        ("read-only", "Read-only file system"),
        ("gone", "No such file or directory"),
    ],
)
def test_a_disk_that_fails_stops_the_run_with_the_reason(
    data: Path, small_disk: Path, tmp_path: Path, how: str, reason: str
) -> None:
    arguments = [*_config(small_disk, data), "--print-every", "1000"]
    assert _forked(arguments, tmp_path, _break_after_first(small_disk, how)) == 1
    text = (tmp_path / "log").read_text()
    assert f"error: a checkpoint could not be written: {reason}" in text
    assert "Traceback" not in text
    folder = small_disk / ("moved away" if how == "gone" else "run") / "checkpoints"
    assert load_checkpoint(folder / "last.pt")["progress"]["num_steps_completed"] == 2
    assert not (small_disk / "run").exists() or how != "gone"


def test_a_full_disk_may_be_a_warning(data: Path, small_disk: Path, tmp_path: Path) -> None:
    """The run goes on without checkpoints, and says so; metrics as well."""
    arguments = _config(small_disk, data, on_write_error="warn", max_steps=9, eval_every_epochs=None)
    _forked(arguments, tmp_path, _break_after_first(small_disk, "full"))
    text = (tmp_path / "log").read_text()
    assert text.count("a checkpoint could not be written: No space left on device") >= 2
    assert "step 9 of 9" in text
    assert load_checkpoint(_checkpoints(small_disk) / "step_00000002.pt")["model"]
