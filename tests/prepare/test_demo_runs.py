"""The demo data is the same however it was made: interrupted, by more processes, by the command line."""

import json
import runpy
import sys
from pathlib import Path

import pytest

import processes
from faenet_ocp.launch.cli import main
from faenet_ocp.prepare.demo.generate import SPLITS, DemoSettings, make_demo_data
from prepare.demo_reading import SETTINGS, is2re
from small_data import read_records

SCRIPT = processes.ROOT / "scripts" / "make_demo_data.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small demo data made in this process."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data(folder, SETTINGS)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_learns_forces_in_every_direction(tmp_path: Path) -> None:
    """As `make demo` does it: correlation of at least 0.9 on val_id, for surface and adsorbate atoms apart."""
    make_demo_data(tmp_path / "data", DemoSettings(), num_workers=2)
    arguments = ["--config", "configs/demo/s2ef.yml", f"--dataset.root={tmp_path / 'data'}", "--run-dir", str(tmp_path)]
    assert main([*arguments, "--identifier", "run"]) == 0
    results = json.loads((tmp_path / "run" / "results" / "metrics.json").read_text())
    groups = results["by_atoms"]["forces"]["val_id"]
    assert set(groups) == {"surface", "adsorbate"}
    for values in groups.values():
        assert min(values["correlation"]) >= 0.9, groups


def test_settings_are_checked(tmp_path: Path) -> None:
    for name, value in {"num_train": 0, "num_val": -1, "frames_per_system": 0, "seed": 0.5}.items():
        with pytest.raises(ValueError, match=name):
            DemoSettings(**{name: value})
    with pytest.raises(ValueError, match="num_workers"):
        make_demo_data(tmp_path / "data", DemoSettings(), num_workers=0)


def test_what_is_there_is_left_alone(root: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert make_demo_data(root, SETTINGS) == json.loads((root / "summary.json").read_text())
    with pytest.raises(FileExistsError, match="other settings"):
        make_demo_data(root, DemoSettings(num_train=25))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    (tmp_path / "is2re").mkdir()
    with pytest.raises(FileExistsError, match="other files"):
        make_demo_data(tmp_path, SETTINGS)


def test_another_seed_gives_other_data(root: Path, tmp_path: Path) -> None:
    make_demo_data(tmp_path / "data", DemoSettings(num_train=4, num_val=1, seed=SETTINGS.seed + 1))
    ours, others = (
        {tuple(record.pos.flatten().tolist()) for record in is2re(folder, "train")}
        for folder in (root, tmp_path / "data")
    )
    assert len(others) == 4 and not ours & others


@pytest.mark.slow
def test_killed_and_made_anew_by_two_processes(root: Path, tmp_path: Path) -> None:
    """Its records are compared: the bytes themselves hold memory addresses."""
    folder, names = tmp_path / "data", ("num_train", "num_val", "frames_per_system", "seed")
    options = [f"--{name.replace('_', '-')}={getattr(SETTINGS, name)}" for name in names]
    arguments = ["--output", str(folder), "--num-workers", "1", *options]
    process = processes.start(arguments, program=[sys.executable, str(SCRIPT)])
    processes.wait_for(lambda: process.poll() is not None or list(tmp_path.rglob("*.lmdb*")))
    process.kill()
    assert process.wait() < 0 and not folder.exists()
    make_demo_data(folder, SETTINGS, num_workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    files = [path.relative_to(root) for path in root.rglob("*.lmdb")]
    assert len(files) == 10
    for file in files:
        first, second = ([record.to_dict() for record in read_records(place / file)] for place in (root, folder))
        assert not processes.differences(first, second)
    for name in ("systems.csv", "summary.json"):
        assert (root / name).read_text() == (folder / name).read_text()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    options = ["--output", str(tmp_path / "data"), "--num-train", "2", "--num-val", "1", "--num-workers", "1"]
    main(options)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SPLITS)
    assert len(is2re(tmp_path / "data", "train")) == 2
    for wrong, message in ((["--seed", "9"], "other settings"), (["--num-val", "0"], "num_val")):
        with pytest.raises(SystemExit, match=message):
            main([*options, *wrong])
