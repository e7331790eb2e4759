"""What a healthy run says: our lines and nothing else; the first use says that it compiles."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import processes

pytestmark = pytest.mark.slow
OURS = re.compile(
    r"\d\d:\d\d:\d\d (INFO|WARNING) |results: |$|\| |- |Data: |Energy|Further|Forces by|Averages|Per split"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.write_data(tmp_path_factory.mktemp("data"))


def _run(folder: Path, data: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    config = processes.write_config(folder / "config.yml", data, logger={"name": "tensorboard"})
    command = [*processes.MAIN, "--config", str(config), "--identifier", "run", *more]
    usual = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # as a user's is
    return subprocess.run(command, env=usual | environment, capture_output=True, text=True, check=True)


def test_nothing_but_our_own_lines(data: Path, tmp_path: Path) -> None:
    """Of training with a worker, with two ranks, and of what comes after it."""
    done = [_run(tmp_path, data, "--optim.num_workers=1")]
    done += [_run(tmp_path / "ranks", data, "--num-gpus", "2", "--run-dir", str(tmp_path / "ranks"))]
    best = ["--checkpoint", str(tmp_path / "run/checkpoints/best.pt")]
    done += [_run(tmp_path, data, "--mode", mode, *best, "--identifier", mode) for mode in ("validate", "predict")]
    lines = [line for one in done for line in (one.stdout + one.stderr).splitlines()]
    bars = re.compile(r"^(train|v|val|checking|[\w ]+): +\d+%|\r")
    assert not [line for line in lines if not OURS.match(line) and not bars.search(line)]
    assert any("training has ended" in line for line in lines)
    results = json.loads((tmp_path / "ranks/run/results/metrics.json").read_text())
    assert results["run"]["device"] == f"2 x CPU, {max(1, len(os.sched_getaffinity(0)) // 2)} thread(s)"


def test_the_first_use_says_that_it_compiles_and_later_ones_do_not(data: Path, tmp_path: Path) -> None:
    said = "compiling functions for this machine, once"
    first, second = (_run(tmp_path, data, "--optim.max_epochs=1", NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert (first.stderr + first.stdout).count(said) == 1
    assert said not in second.stderr + second.stdout
