"""Learning rates by step and by metric, and runs that end early: straight through, and interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

import processes
from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.config.optim import OptimConfig
from faenet_ocp.launch.cli import main
from faenet_ocp.training.optim import Plateau, learning_rate_schedule

PLATEAU = {"scheduler": "reduce_on_plateau", "lr_initial": 0.1, "warmup_steps": 3, "eval_every_epochs": 1}
PLATEAU |= {"plateau": {"factor": 0.5, "patience": 0, "min_lr": 1e-4}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.write_data(tmp_path_factory.mktemp("data"))


def _arguments(folder: Path, data: Path, **optim: Any) -> list[str]:
    config = processes.write_config(folder / "config.yml", data, optim=optim, model={"num_interactions": 1})
    return ["--config", str(config), "--identifier", "run"]


def _last(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "run" / "checkpoints" / "last.pt")


def _rates(folder: Path) -> list[float]:
    lines = (folder / "run" / "logs" / "metrics.jsonl").read_text().splitlines()
    found = {record["step"]: record["train/lr"] for record in map(json.loads, lines) if "train/lr" in record}
    return [found[step] for step in sorted(found)]


def test_milestones() -> None:
    optim = OptimConfig(
        lr_initial=1.0,
        batch_size=1,
        max_epochs=1,
        scheduler="multistep",
        warmup_steps=2,
        warmup_factor=0.5,
        multistep={"milestones": [4, 7], "gamma": 0.1},
    )
    schedule = learning_rate_schedule(optim, 9)
    assert [schedule(step) for step in range(9)] == pytest.approx([0.5, 0.75, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_a_plateau_is_that_of_torch() -> None:
    optim = OptimConfig(lr_initial=0.02, batch_size=1, max_epochs=1, scheduler="reduce_on_plateau")
    optim = optim.model_validate(optim.model_dump() | {"plateau": {"factor": 0.3, "patience": 1, "min_lr": 1e-3}})
    plateau = Plateau(optim, higher_is_better=False)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.02)
    torchs = ReduceLROnPlateau(optimizer, factor=0.3, patience=1, min_lr=1e-3)
    for value in (1.0, 0.9, 0.95, 0.92, 0.91, 0.8, 0.85, 0.9, 0.9, 0.9, 0.9, 0.9):
        plateau.step(value)
        torchs.step(value)
        assert 0.02 * plateau.factor == pytest.approx(optimizer.param_groups[0]["lr"])
    assert 0.02 * plateau.factor == pytest.approx(1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interrupted_run_follows_its_metric_as_an_unbroken_one(data: Path, tmp_path: Path, ranks: int) -> None:
    for name, parts in (("whole", [8]), ("parts", [3, 8])):
        for epochs in parts:
            arguments = _arguments(tmp_path / name, data, max_epochs=epochs, **PLATEAU)
            assert set(processes.finish(processes.forked(arguments, tmp_path / f"log{name}", ranks=ranks))) == {0}
    whole, parts = (_last(tmp_path / name) for name in ("whole", "parts"))
    assert whole["plateau"] == parts["plateau"] and whole["plateau"]["factor"] < 0.5
    assert _rates(tmp_path / "whole") == _rates(tmp_path / "parts")
    assert len(set(_rates(tmp_path / "whole")[4:])) > 1
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())


def test_a_run_ends_early_and_is_then_only_reported(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"lr_initial": 3.0, "warmup_steps": 0, "scheduler": "constant", "max_epochs": 50, "eval_every_epochs": 1}
    arguments = _arguments(tmp_path, data, **settings, early_stopping={"patience": 2, "min_epochs": 4})
    assert main(arguments) == 0
    state = _last(tmp_path)
    epochs = state["progress"]["num_epochs_completed"]
    assert 4 <= epochs < 50 and state["best"]["evaluations_since"] >= 2
    ended = json.loads((tmp_path / "run" / "results" / "metrics.json").read_text())["training"]["ended"]
    assert ended.startswith("early stopping: no better energy_mae on v in")
    caplog.clear()
    assert main(arguments) == 0
    assert "the run is finished and reported" in caplog.text
    assert _last(tmp_path)["progress"]["num_epochs_completed"] == epochs
    more = _arguments(tmp_path, data, **settings | {"max_epochs": epochs + 1}, early_stopping={"patience": 99})
    assert main(more) == 0
    assert _last(tmp_path)["progress"]["num_epochs_completed"] == epochs + 1


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"scheduler": "multistep"}, "optim.multistep: missing"),
        ({"multistep": {"milestones": [3]}}, "optim.multistep: has no effect with scheduler linear_warmup_cosine"),
        ({"plateau": {}}, "optim.plateau: has no effect"),
        ({"scheduler": "constant", "lr_min_factor": 0.1}, "optim.lr_min_factor: has no effect with scheduler constant"),
        (PLATEAU | {"plateau": {"metric": "energy_mea"}}, "optim.plateau.metric: unknown metric 'energy_mea'; did you"),
    ],
)
def test_a_setting_is_applied_or_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], optim: dict[str, Any], message: str
) -> None:
    assert main(_arguments(tmp_path, data, **optim)) == 2
    assert message in capsys.readouterr().err
