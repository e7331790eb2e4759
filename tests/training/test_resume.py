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
from faenet_ocp.evaluation.evaluator import Evaluator
from faenet_ocp.launch import cli
from faenet_ocp.launch.cli import main
from faenet_ocp.training.loggers import MetricLogger
from faenet_ocp.training.unit import OCPTrainUnit

STEPS = 36
_TIMED = ("epoch_seconds", "versions", "config")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.write_data(tmp_path_factory.mktemp("data"))


def _config(folder: Path, data: Path, **optim: object) -> list[str]:
    """Stochastic frames, EMA, warm-up, BatchNorm; 2 steps an epoch, saved after 3 steps, evaluated after 6 epochs."""
    settings = {"lr_initial": 0.002, "batch_size": 6, "max_epochs": STEPS // 2, "warmup_steps": 5, "num_workers": 0}
    settings |= {"ema_decay": 0.95, "checkpoint_every": 3, "eval_every_epochs": 6, **optim}
    model = processes.MODEL | {"num_interactions": 1}
    config = processes.write_config(folder / "config.yml", data, optim=settings, model=model)
    return ["--config", str(config), "--identifier", "run"]


def _assert_same_end(one: Path, two: Path) -> None:
    for name in ("last.pt", "best.pt"):
        states = [load_checkpoint(folder / "run" / "checkpoints" / name) for folder in (one, two)]
        for state in states:
            for key in _TIMED:
                state.pop(key)
        assert processes.differences(*states) == []
        assert states[0]["model"]
    assert processes.records(one / "run") == processes.records(two / "run")
    assert len(processes.records(one / "run")) == STEPS + 3


# ------------------------------------------------------------------------------------------ kills


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after_steps(steps: int, delay: float) -> Callable[[], None]:
    """SIGKILL some time after so many steps, wherever the process is by then."""

    def prepare() -> None:
        done, step = [0], OCPTrainUnit.train_step

        def counting(self, state, data):  # type: ignore[no-untyped-def]
            step(self, state, data)
            done[0] += 1
            if done[0] == steps:
                threading.Timer(delay, _die).start()

        OCPTrainUnit.train_step = counting  # type: ignore[method-assign]

    return prepare


def _at_call(module: object, name: str, number: int, *, before: bool) -> Callable[[], None]:
    """SIGKILL before or after the n-th call of a function, in the processes that make it."""

    def prepare() -> None:
        original, count = getattr(module, name), [0]

        def dying(*args: object, **kwargs: object) -> object:
            count[0] += 1
            if before and count[0] == number:
                _die()
            result = original(*args, **kwargs)
            if count[0] == number:
                _die()
            return result

        setattr(module, name, dying)

    return prepare


def _in_half_a_line() -> None:
    def half(self: MetricLogger, step: int, epoch: float, values: object) -> None:
        self.file.write(b'{"step": 1, "ep')
        _die()

    MetricLogger.log = half  # type: ignore[method-assign, assignment]


class _Os:
    """The module os for `checkpoint`, with functions that can be replaced there only."""

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)


def _in_checkpoint(name: str, number: int, *, before: bool) -> Callable[[], None]:
    def prepare() -> None:
        checkpoint.os = _Os()  # type: ignore[assignment]
        _at_call(checkpoint.os, name, number, before=before)()

    return prepare


def _kills(seed: int, count: int) -> list[tuple[str, Callable[[], None]]]:
    rng = random.Random(seed)
    places = {
        "before the data are on disk": lambda n: _in_checkpoint("fsync", n, before=True),
        "before the rename": lambda n: _in_checkpoint("replace", 2 * n - 1, before=True),
        "between the rename and last.pt": lambda n: _in_checkpoint("replace", 2 * n - 1, before=False),
        "after last.pt, before old ones go": lambda n: _in_checkpoint("replace", 2 * n, before=False),
        "in half a line of metrics": lambda n: _in_half_a_line,
    }
    kills = [(name, make(rng.randint(1, 2))) for name, make in places.items()]
    for _ in range(count - len(kills)):
        steps, delay = rng.randint(1, 9), rng.random() * 0.1
        kills.append((f"{delay:.3f} s after step {steps}", _after_steps(steps, delay)))
    rng.shuffle(kills)
    return kills


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


@pytest.mark.parametrize(
    ("workers", "ranks", "count"),
    [
        (0, 1, 6),
        pytest.param(0, 1, 12, marks=pytest.mark.slow),
        pytest.param(2, 1, 10, marks=pytest.mark.slow),
        pytest.param(0, 2, 8, marks=pytest.mark.slow),
        pytest.param(2, 2, 8, marks=pytest.mark.slow),
    ],
)
def test_kills_at_random_points_change_nothing(
    unbroken: Callable[[int], Path], data: Path, tmp_path: Path, workers: int, ranks: int, count: int
) -> None:
    """One run, killed again and again, ends bit for bit where an unbroken one ends: see `_assert_same_end`."""
    arguments = _config(tmp_path, data, num_workers=workers)
    survived = 0
    for place, prepare in _kills(seed=100 * workers + 10 * ranks + count, count=count):
        started = processes.forked(arguments, tmp_path / "log", prepare=prepare, ranks=ranks)
        processes.wait_for(lambda started=started: any(process.exitcode is not None for process in started))
        codes = {process.exitcode for process in started}
        assert codes <= {None, -signal.SIGKILL, 0}, (place, codes, (tmp_path / "log").read_text()[-3000:])
        for process in started:  # a node dies as a whole
            process.kill()
        processes.finish(started)
        survived += -signal.SIGKILL in codes
    assert survived >= count - 2  # one may have reached the end first
    assert set(processes.finish(processes.forked(arguments, tmp_path / "log", ranks=ranks))) == {0}
    _assert_same_end(unbroken(ranks), tmp_path)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


# ------------------------------------------------------------------------------------------ signals


def _started(arguments: list[str], folder: Path) -> Iterator[processes.multiprocessing.context.ForkProcess]:
    """A forked run that has trained for a few steps."""
    (process,) = processes.forked(arguments, folder / "log")
    processes.wait_for(lambda: step_checkpoints(folder / "run" / "checkpoints") or process.exitcode is not None)
    assert process.exitcode is None, (folder / "log").read_text()[-3000:]
    yield process
    process.kill()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_and_ends_with_its_status(
    unbroken: Callable[[int], Path], data: Path, tmp_path: Path, signum: int, status: int, workers: int
) -> None:
    """To the whole process group, as a terminal and `timeout` do it: workers have to go on until the step is done."""
    arguments = _config(tmp_path, data, num_workers=workers)
    for process in _started(arguments, tmp_path):
        os.killpg(process.pid, signum)
        assert processes.finish([process]) == [status]
    log = (tmp_path / "log").read_text()
    assert f"goes on from {tmp_path / 'run' / 'checkpoints' / 'last.pt'}" in log
    assert "Traceback" not in log
    step = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["progress"]["num_steps_completed"]
    assert step == processes.records(tmp_path / "run")[-1]["step"] < STEPS
    if workers == 0:
        assert processes.finish(processes.forked(arguments, tmp_path / "log")) == [0]
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
    arguments = _config(tmp_path, data)
    assert processes.finish(processes.forked(arguments, tmp_path / "log", prepare=_interrupt_a_write)) == [143]
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert "step_00000006.pt" in log
    assert "the same signal again stops at once" in log


def _slow_steps() -> None:
    step = OCPTrainUnit.train_step

    def slow(self, state, data):  # type: ignore[no-untyped-def]
        step(self, state, data)
        if self.train_progress.num_steps_completed >= 4:
            time.sleep(60)

    OCPTrainUnit.train_step = slow  # type: ignore[method-assign]


def test_a_second_ctrl_c_stops_at_once(data: Path, tmp_path: Path) -> None:
    (process,) = processes.forked(_config(tmp_path, data), tmp_path / "log", prepare=_slow_steps)
    processes.wait_for(lambda: step_checkpoints(tmp_path / "run" / "checkpoints"))
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    processes.wait_for(lambda: "the same signal again stops at once" in (tmp_path / "log").read_text())
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    assert processes.finish([process], timeout=30) == [130]
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["progress"]["num_steps_completed"] >= 3


def _stop_in_evaluation() -> None:
    from faenet_ocp.training import trainer

    run_split = trainer.run_split

    def stopped(*args, **kwargs):  # type: ignore[no-untyped-def]
        os.kill(os.getpid(), signal.SIGTERM)
        return run_split(*args, **kwargs)

    trainer.run_split = stopped


def test_a_signal_during_evaluation_does_not_wait_for_its_end(
    unbroken: Callable[[int], Path], data: Path, tmp_path: Path
) -> None:
    """The checkpoint is there already; the run goes on with the evaluation."""
    arguments = _config(tmp_path, data)
    assert processes.finish(processes.forked(arguments, tmp_path / "log", prepare=_stop_in_evaluation)) == [143]
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["pending_evaluation"] is True
    assert processes.finish(processes.forked(arguments, tmp_path / "log")) == [0]
    _assert_same_end(unbroken(1), tmp_path)


def _evaluation_takes_an_hour() -> None:
    from faenet_ocp.training import trainer

    run_split, clock, hours = trainer.run_split, time.perf_counter, []

    def slow(*args: Any, **kwargs: Any) -> Any:
        hours.append(3600.0)
        return run_split(*args, **kwargs)

    trainer.run_split = slow
    time.perf_counter = lambda: clock() + sum(hours)


def test_evaluation_does_not_count_as_time_of_training(data: Path, tmp_path: Path) -> None:
    arguments = _config(tmp_path, data)
    assert processes.finish(processes.forked(arguments, tmp_path / "log", prepare=_evaluation_takes_an_hour)) == [0]
    lines = (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()
    speeds = [record["train/samples_per_s"] for line in lines if "train/samples_per_s" in (record := json.loads(line))]
    assert len(speeds) == STEPS
    assert min(speeds) > 0.1  # 6 systems an hour are 0.002


def _ranks_of(process: subprocess.Popen) -> list[int]:
    """The rank processes of a launcher: those of its children that are no resource tracker."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "group", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, True, 143), (signal.SIGTERM, False, 143)],
)
def test_two_ranks_stop_together(data: Path, tmp_path: Path, signum: int, group: bool, status: int) -> None:
    """Through torch elastic; the signal goes to all processes or to the first one only."""
    arguments = [*_config(tmp_path, data, max_epochs=4000, num_workers=1), "--num-gpus", "2"]
    process = processes.start(arguments, start_new_session=True)
    try:
        processes.wait_for(lambda: step_checkpoints(tmp_path / "run" / "checkpoints"))
        (os.killpg if group else os.kill)(process.pid, signum)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status, output[-3000:]
    assert "goes on from" in output
    assert "Traceback" not in output
    step = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["progress"]["num_steps_completed"]
    assert step == processes.records(tmp_path / "run")[-1]["step"]


@pytest.mark.slow
def test_ranks_end_when_their_launcher_is_killed(data: Path, tmp_path: Path) -> None:
    """No orphans: they save and go."""
    arguments = [*_config(tmp_path, data, max_epochs=4000), "--num-gpus", "2"]
    process = processes.start(arguments)
    processes.wait_for(lambda: step_checkpoints(tmp_path / "run" / "checkpoints"))
    ranks = _ranks_of(process)
    assert len(ranks) == 2
    process.kill()
    process.communicate(timeout=60)
    processes.wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), timeout=60)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["model"]


# ------------------------------------------------------------------------- changed settings, other files


def test_changed_settings_are_told_apart(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.local_ranks, "launch", lambda config: None)
    arguments = _config(tmp_path, data)
    assert main(arguments) == 0
    caplog.clear()
    changes = ["--optim.num_workers=1", "--logger=tensorboard", "--optim.lr_initial=0.01", "--frames.method=det"]
    with caplog.at_level("INFO"):
        assert main([*arguments, *changes, "--print-every", "7"]) == 0
    told = {r.getMessage().split(":")[0]: r for r in caplog.records if "the run began with" in r.getMessage()}
    matter = {key for key, record in told.items() if record.levelname == "WARNING"}
    assert matter == {"optim.lr_initial", "frames.method"}
    assert set(told) - matter == {"optim.num_workers", "logger.name", "job.print_every"}
    assert told["optim.lr_initial"].getMessage().endswith("began with 0.002, goes on with 0.01 (changes the results)")


def test_a_checkpoint_of_another_model_says_what_does_not_fit(
    unbroken: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    best = str(unbroken(1) / "run" / "checkpoints" / "best.pt")
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

        def breaking(path: Path, state: object) -> None:
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
            save(path, state)  # type: ignore[arg-type]

        checkpoint.save_checkpoint = breaking  # type: ignore[assignment]

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
    log = tmp_path / "log"
    assert processes.finish(processes.forked(arguments, log, prepare=_break_after_first(small_disk, how))) == [1]
    text = log.read_text()
    assert f"error: a checkpoint could not be written: {reason}" in text
    assert "Traceback" not in text
    folder = small_disk / ("moved away" if how == "gone" else "run") / "checkpoints"
    assert load_checkpoint(folder / "last.pt")["progress"]["num_steps_completed"] == 2
    assert not (small_disk / "run").exists() or how != "gone"


def test_a_full_disk_may_be_a_warning(data: Path, small_disk: Path, tmp_path: Path) -> None:
    """The run goes on without checkpoints, and says so; metrics as well."""
    arguments = _config(small_disk, data, on_write_error="warn", max_steps=9, eval_every_epochs=None)
    log = tmp_path / "log"
    process = processes.forked(arguments, log, prepare=_break_after_first(small_disk, "full"))
    processes.finish(process)
    text = log.read_text()
    assert text.count("a checkpoint could not be written: No space left on device") >= 2
    assert "step 9 of 9" in text
    assert load_checkpoint(small_disk / "run" / "checkpoints" / "step_00000002.pt")["model"]


def _in_second_save_of_an_evaluation() -> None:
    evaluate = Evaluator.evaluate

    def dying(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        checkpoint.os = _Os()  # type: ignore[assignment]
        _at_call(checkpoint.os, "fsync", 2, before=True)()  # after best.pt
        return evaluate(self, *args, **kwargs)

    Evaluator.evaluate = dying  # type: ignore[method-assign]


def test_an_evaluation_that_is_repeated_is_logged_once(
    unbroken: Callable[[int], Path], data: Path, tmp_path: Path
) -> None:
    """SIGKILL after the metrics are written, before the checkpoint says so."""
    arguments = _config(tmp_path, data)
    (code,) = processes.finish(processes.forked(arguments, tmp_path / "log", prepare=_in_second_save_of_an_evaluation))
    assert code == -signal.SIGKILL
    assert any("v/energy_mae" in record for record in processes.records(tmp_path / "run"))
    assert processes.finish(processes.forked(arguments, tmp_path / "log")) == [0]
    _assert_same_end(unbroken(1), tmp_path)
