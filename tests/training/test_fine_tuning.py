"""Beginning with the weights of another run: its weights, this run's settings, and what is said about both."""

import shutil
from pathlib import Path

import pytest
import torch

import processes
import small_data
from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.launch.cli import main

OUTPUTS = {"energy": {"normalizer": "fit"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.lmdb` and `val.lmdb`; in `shifted/` the same with energies 700 eV lower."""
    root = processes.write_data(tmp_path_factory.mktemp("data"))
    for seed, (name, count) in enumerate((("train", 12), ("val", 5))):
        fields = [
            small_data.make_fields(i, task="s2ef", edges=False, seed=seed, layers=1 + i % 4) for i in range(count)
        ]
        values = [small_data.dump_record(f | {"y": f["y"] - 700.0}, layout="pyg2") for f in fields]
        small_data.write_lmdb(root / "shifted" / f"{name}.lmdb", values)
    return root


def _train(folder: Path, root: Path, *more: str, task: str = "s2ef", rate: float = 1e-12, status: int = 0) -> Path:
    """A run that hardly moves its weights; its newest checkpoint."""
    config = processes.write_config(
        folder / "config.yml",
        root,
        task=task,
        model={"num_interactions": 1},
        outputs=OUTPUTS,
        optim={"max_steps": 1, "lr_initial": rate, "weight_decay": 0.0},
    )
    assert main(["--config", str(config), "--identifier", "run", *more]) == status
    return folder / "run" / "checkpoints" / "last.pt"


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(tmp_path_factory.mktemp("start"), data, rate=0.002)


def test_targets_are_those_of_the_new_configuration(
    data: Path, start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = load_checkpoint(_train(tmp_path / "same", data, "--checkpoint", str(start)))
    assert same["tasks"] == load_checkpoint(start)["tasks"]
    assert "normalised, as this configuration says" not in caplog.text
    other = load_checkpoint(_train(tmp_path / "other", data / "shifted", "--checkpoint", str(start)))
    before, after = same["tasks"]["energy"], other["tasks"]["energy"]
    assert after["mean"] == pytest.approx(before["mean"] - 700.0, abs=1e-3)
    assert after["stdev"] == pytest.approx(before["stdev"], rel=1e-3)
    (record,) = [r for r in caplog.records if "normalised, as this configuration says" in r.getMessage()]
    task, mean, stdev, _, old_mean, old_stdev = record.args
    assert (task, record.levelname) == ("energy", "WARNING")
    assert (mean, stdev, old_stdev) == pytest.approx((0.0, 1.0, 1.0), abs=1e-3)
    assert old_mean == pytest.approx(-700.0 / before["stdev"], rel=1e-3)
    for name, weight in load_checkpoint(start)["model"].items():
        if name.endswith("weight"):
            torch.testing.assert_close(other["model"][name], weight)
    assert f"# beginning with the weights of {start.resolve()}" in (tmp_path / "other/run/config.yml").read_text()


def test_the_own_checkpoints_of_a_run_win(
    data: Path, start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = _train(tmp_path, data)
    before = load_checkpoint(own)["model"]
    _train(tmp_path, data, "--checkpoint", str(start))
    assert processes.differences(load_checkpoint(own)["model"], before) == []
    assert f"--checkpoint {start.resolve()} is not used: the run goes on from its own, {own.resolve()}" in caplog.text


def test_heads_may_be_new_or_left_out(
    data: Path, start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    """An energy model begins as one of energies and forces, and the other way round; another backbone does not."""
    energy = _train(tmp_path / "energy", data, task="is2re", rate=0.002)
    forces = _train(tmp_path / "forces", data, "--checkpoint", str(energy))
    assert "the backbone and the heads energy; new, with random weights: forces; left out: none" in caplog.text
    back = _train(tmp_path / "back", data, "--checkpoint", str(start), task="is2re")
    assert "the backbone and the heads energy; new, with random weights: none; left out: forces" in caplog.text
    for old, new in ((energy, forces), (start, back)):
        old_weights, new_weights = load_checkpoint(old)["model"], load_checkpoint(new)["model"]
        shared = {name for name in {*old_weights} & {*new_weights} if name.endswith("weight")}
        assert len(shared) > 10
        for name in shared:
            torch.testing.assert_close(new_weights[name], old_weights[name])
    _train(tmp_path / "wider", data, "--checkpoint", str(energy), "--model.hidden_channels=40", status=2)
    assert "does not fit the configured model" in capsys.readouterr().err
    assert not (tmp_path / "wider" / "run").exists()
    shutil.rmtree(tmp_path / "energy")
