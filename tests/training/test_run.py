"""A run's decisions: the learning rate of each step, and which weights are the best."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import processes
from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.config.schema import build_config
from faenet_ocp.config.yaml import find_config, load_yaml
from faenet_ocp.evaluation.evaluator import Evaluator
from faenet_ocp.launch.cli import main
from faenet_ocp.training.optim import learning_rate_schedule


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    optim = build_config(load_yaml(find_config("configs/is2re/faenet.yml"))).optim
    factor = learning_rate_schedule(optim, 21_588)
    assert factor(0) == pytest.approx(0.2)
    assert factor(3000) == pytest.approx(0.6)
    assert factor(6000) == pytest.approx(1.0)
    assert factor((6000 + 21_588) // 2) == pytest.approx(0.5)
    assert factor(21_588) == pytest.approx(0.0, abs=1e-12)
    falling = [factor(step) for step in range(6000, 21_588, 100)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(("metric", "best"), [("energy_mae", 1), ("forces_cosine_similarity", 2)])
def test_the_best_checkpoint_follows_the_direction_of_its_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, best: int
) -> None:
    values = iter((1.0, 3.0, 2.0, 2.0))  # of three epochs, and of the final report
    outcome = lambda *args, **options: {"v": SimpleNamespace(metrics={metric: next(values)})}  # noqa: E731
    monkeypatch.setattr(Evaluator, "evaluate", outcome)
    monkeypatch.setattr(Evaluator, "report", lambda *args: None)
    config = processes.write_config(
        tmp_path / "config.yml",
        processes.write_data(tmp_path / "data"),
        evaluation_metrics={"primary_metric": {"split": "v", "metric": metric}},
        optim={"batch_size": 12, "max_epochs": 3},
    )
    assert main(["--config", str(config), "--identifier", "run"]) == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")["best"] == {
        "value": [1.0, 3.0][best - 1],
        "step": best,
        "evaluations_since": 0,
    }
