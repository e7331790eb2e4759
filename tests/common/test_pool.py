"""The process pool: results in order, errors at their place, processes that die or whose parent dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from faenet_ocp.common.pool import ordered_map

ROOT = Path(__file__).resolve().parents[2]


def work(folder: Path, number: int) -> tuple[int, int, int]:
    """Says that it was begun; the first task takes longest, the number -1 fails, -2 dies, -3 never ends."""
    (folder / str(number)).write_text(str(os.getpid()))
    if number == -1:
        raise FileNotFoundError(2, "is not there", "name")
    if number == -2:
        os._exit(3)
    time.sleep(600 if number == -3 else 0.3 if number == 0 else 0.01)
    return number, os.getpid(), torch.get_num_threads()


def tasks(folder: Path, *numbers: int) -> list[tuple[Path, int]]:
    return [(folder, number) for number in numbers]


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(tmp_path: Path, workers: int) -> None:
    found = list(ordered_map(work, tasks(tmp_path, *range(20)), workers))
    assert [number for number, _, _ in found] == list(range(20))
    assert len({process for _, process, _ in found}) == workers
    assert (found[0][1] == os.getpid()) == (workers == 1)
    assert workers == 1 or {threads for _, _, threads in found} == {1}
    assert list(ordered_map(work, [], workers)) == []


def test_nothing_runs_far_ahead(tmp_path: Path) -> None:
    results = ordered_map(work, tasks(tmp_path, *range(20)), 2)
    assert next(results)[0] == 0
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) <= 4
    results.close()
    assert not is_running(int((tmp_path / "1").read_text()))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_arrives_at_its_place(tmp_path: Path, workers: int) -> None:
    results = ordered_map(work, tasks(tmp_path, 0, 1, -1, 3), workers)
    assert [next(results)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(FileNotFoundError, match="is not there: 'name'"):
        next(results)


def interrupts_are_blocked(_number: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_an_interrupt_is_for_the_parent() -> None:
    """From the first moment: the seconds of imports would end in a traceback of each process."""
    assert list(ordered_map(interrupts_are_blocked, [(0,), (1,)], 2)) == [True, True]
    assert not interrupts_are_blocked(0)


def test_a_process_that_dies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a process ended with exit code 3"):
        list(ordered_map(work, tasks(tmp_path, 0, 1, -2, 3), 2))


def test_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    """Also in the middle of a task."""
    from processes import wait_for  # not where the child imports this file

    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path\n"
        "from test_pool import *\n"
        f"list(ordered_map(work, tasks(Path({str(tmp_path)!r}), -3, 1, 2), 2))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as parent:
        wait_for(lambda: len([path for path in tmp_path.iterdir() if path.stat().st_size]) == 3)
        parent.send_signal(signal.SIGKILL)
    processes = {int(path.read_text()) for path in tmp_path.iterdir()}
    assert len(processes) == 2
    wait_for(lambda: not any(map(is_running, processes)))


def is_running(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
