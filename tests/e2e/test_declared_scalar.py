"""A scalar that only the configuration knows, from the records of a data set to results and predictions."""

import json
from pathlib import Path

import numpy as np
import pytest

import processes
import small_data
from faenet_ocp.launch.cli import main


def _write(path: Path, count: int, *, seed: int) -> np.ndarray:
    """Slabs of 1 to 4 layers with a gap that grows with their number of atoms; returns the gaps."""
    records = [small_data.make_fields(i, task="s2ef", edges=False, seed=seed, layers=1 + i % 4) for i in range(count)]
    for record in records:
        record["gap"] = 0.5 + 0.1 * record["natoms"]
    small_data.write_lmdb(path, [small_data.dump_record(record, layout="pyg2") for record in records])
    return np.array([record["gap"] for record in records])


@pytest.mark.parametrize("task", ["is2re", "s2ef"])
def test_a_declared_scalar_is_trained_evaluated_and_predicted(task: str, tmp_path: Path) -> None:
    _write(tmp_path / "train.lmdb", 12, seed=0)
    labels = _write(tmp_path / "val.lmdb", 5, seed=1)
    config = processes.write_config(
        tmp_path / "c.yml",
        tmp_path,
        task=task,
        frames={"method": "canonical"},
        outputs={"gap": {"unit": "eV", "normalizer": "fit"}},
        evaluation_metrics={"primary_metric": {"split": "v", "metric": "gap_mae"}, "metrics": {"gap": ["mae", "mse"]}},
        optim={"lr_initial": 0.01, "batch_size": 12, "max_epochs": 25, "eval_every_epochs": 25, "num_workers": 0},
    )
    assert main(["--config", str(config), "--identifier", "run"]) == 0
    run, results = tmp_path / "run", tmp_path / "run" / "results"
    losses = [record["train/loss_gap"] for record in processes.records(run) if "train/loss_gap" in record]
    assert len(losses) == 25 and losses[-1] < 0.5 * losses[0]

    predict = ["--mode", "predict", "--checkpoint", str(run / "checkpoints" / "best.pt"), "--run-dir", str(tmp_path)]
    assert main([*predict, "--identifier", "predicted"]) == 0
    with np.load(tmp_path / "predicted" / "results" / "predictions" / "v.npz") as content:
        predictions = content["gap"]
    document = json.loads((results / "metrics.json").read_text())
    found, error = document["splits"]["v"], predictions - labels
    assert (document["units"]["gap_mae"], document["units"]["gap_mse"]) == ("eV", "eV^2")
    assert found["gap_mae"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert found["gap_mse"] == pytest.approx((error**2).mean(), rel=1e-4)
    mean = document["baselines"]["mean_predictor"]["splits"]["v"]
    assert mean["gap_mae"] == pytest.approx(np.abs(labels - (0.5 + 0.1 * _mean_natoms())).mean(), rel=1e-4)

    assert f"{found['gap_mae']:.4f}" in (results / "table.md").read_text()
    drawn = {path.name for path in results.glob("*.png")}
    forces = {"parity_forces.png"} if task == "s2ef" else set()
    assert drawn == {"parity_energy.png", "parity_gap.png", "learning_curve.png"} | forces


def _mean_natoms() -> float:
    return float(np.mean([len(small_data.make_slab(i, layers=1 + i % 4)) for i in range(12)]))
