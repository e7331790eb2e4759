"""The demo data is the same however it was made: settings, interruptions, processes, command line."""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo_reading import SETTINGS, everything, is2re, s2ef, same
from faenet_ocp.prepare.demo import generate as demo
from faenet_ocp.prepare.demo.generate import (
    SPLITS,
    DemoSettings,
    make_demo_data,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "make_demo_data.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small demo data made in this process."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data(folder, SETTINGS)
    return folder


def test_settings_are_checked() -> None:
    wrong = {"num_train": 0, "num_val": -1, "frames_per_system": 0, "raw_frames": -1, "seed": 0.5}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            DemoSettings(**{name: value})
    with pytest.raises(ValueError, match="num_workers"):
        make_demo_data("unused", DemoSettings(), num_workers=0)


def test_summary(root: Path) -> None:
    summary = json.loads((root / "summary.json").read_text())
    counts, energies = {}, {}
    for split in SPLITS:
        records = is2re(root, split)
        counts[split] = np.array([np.bincount(r.atomic_numbers.int().numpy(), minlength=100) for r in records], float)
        energies[split] = np.array([record.y_relaxed for record in records])
    solution = np.linalg.lstsq(counts["train"], energies["train"])[0]
    for split, row in summary["splits"].items():
        assert row["num_systems"] == len(energies[split])
        assert row["num_frames"] == len(s2ef(root, split))
        assert row["mean"] == pytest.approx(energies[split].mean())
        assert row["stdev"] == pytest.approx(energies[split].std())
        mean_error = np.abs(energies[split] - energies["train"].mean()).mean()
        assert row["mean_predictor_mae"] == pytest.approx(mean_error)
        linear_error = np.abs(counts[split] @ solution - energies[split]).mean()
        assert row["linear_mae"] == pytest.approx(linear_error, abs=1e-3)


def test_finished_data_is_left_alone(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert make_demo_data(root, SETTINGS) == json.loads((root / "summary.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    with pytest.raises(FileExistsError, match="other settings"):
        make_demo_data(root, DemoSettings(num_train=25))


def test_a_folder_with_other_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "is2re").mkdir()
    with pytest.raises(FileExistsError, match="is2re"):
        make_demo_data(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["is2re"]


def test_discarded_systems_are_counted_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_system, calls = demo.make_system, itertools.count()

    def sometimes(*args: Any) -> Any:
        return "desorbed" if next(calls) % 3 == 0 else make_system(*args)

    monkeypatch.setattr(demo, "make_system", sometimes)
    summary = make_demo_data(tmp_path / "some", DemoSettings(num_train=6, num_val=1))
    splits = summary["splits"]
    assert [splits[split]["num_systems"] for split in SPLITS] == [6, 1, 1, 1, 1]
    assert sum(splits[split]["discarded"].get("desorbed", 0) for split in SPLITS) >= 5
    slabs = []
    monkeypatch.setattr(demo, "relaxed_slab", lambda spec: slabs.append(spec) or (None, 0.0))
    monkeypatch.setattr(demo, "make_system", lambda *args: "desorbed")
    with pytest.raises(RuntimeError, match="too many systems had to be discarded"):
        make_demo_data(tmp_path / "none", DemoSettings(num_train=1, num_val=1))
    assert len(set(slabs)) == len(slabs) > 5  # a slab on which nothing works is given up


def test_another_seed_gives_other_data(root: Path, tmp_path: Path) -> None:
    make_demo_data(tmp_path / "data", DemoSettings(num_train=4, num_val=1, seed=4))
    ours = {tuple(record.pos.flatten().tolist()) for record in is2re(root, "train")}
    others = {tuple(r.pos.flatten().tolist()) for r in is2re(tmp_path / "data", "train")}
    assert len(others) == 4 and not ours & others


@pytest.mark.parametrize(("first_workers", "then_workers"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_uninterrupted(
    root: Path, tmp_path: Path, first_workers: int, then_workers: int
) -> None:
    """With one process and two on either side; the uninterrupted data is made with one."""
    folder = tmp_path / "data"
    command = [sys.executable, str(SCRIPT), "--output", str(folder)]
    command += ["--num-workers", str(first_workers)]
    for name in ("num_train", "num_val", "frames_per_system", "raw_frames", "seed"):
        command += [f"--{name.replace('_', '-')}", str(getattr(SETTINGS, name))]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    work = folder / demo.WORK_NAME
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(work.glob("[!.]*.lmdb"))) < 2:
            time.sleep(0.01)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(workers) >= (first_workers if first_workers > 1 else 0)
    while any(is_running(int(worker)) for worker in workers):  # they end with their parent
        time.sleep(0.01)
    assert not (folder / "summary.json").exists() and not (folder / "is2re").exists()
    with pytest.raises(FileExistsError, match="beginning of demo data of other settings"):
        make_demo_data(folder, DemoSettings(num_train=25))

    done = {path.name: path.stat().st_mtime_ns for path in work.glob("[!.]*.lmdb")}
    assert 2 <= len(done) < 14
    seen: dict[str, int] = {}
    run_units = demo._run_units

    def watched(*args: Any) -> None:
        run_units(*args)
        seen.update({path.name: path.stat().st_mtime_ns for path in work.glob("[!.]*.lmdb")})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_run_units", watched)
        make_demo_data(folder, SETTINGS, num_workers=then_workers)
    assert len(seen) == 14 and done.items() <= seen.items()  # finished units were not made again
    assert not work.exists()
    first, second = everything(root), everything(folder)
    assert len(first) == 10
    assert same(first, second)
    for name in ("systems.csv", "summary.json"):
        assert (root / name).read_text() == (folder / name).read_text()
    for path in (root / "s2ef_raw").rglob("*.xz"):
        assert path.read_bytes() == (folder / path.relative_to(root)).read_bytes()


def is_running(process_id: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return False


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("make_demo_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path / "data"
    options = ["--output", str(folder), "--num-train", "2", "--num-val", "1", "--num-workers", "1"]
    script.main(options)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:6]] == list(SPLITS)
    assert len(is2re(folder, "train")) == 2 and len(is2re(folder, "val_id")) == 1
    for wrong, message in ((["--seed", "9"], "other settings"), (["--num-val", "0"], "num_val")):
        with pytest.raises(SystemExit, match=message):
            script.main([*options, *wrong])
