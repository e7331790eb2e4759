"""Plots are written, whole, and refuse what they cannot show; the metrics log is read as told."""

import json
import logging
import os

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.image import imread

from faenet_ocp.evaluation.plots import plot_learning_curve, plot_parity, read_metrics_log


def points(size, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.normal(-1.5, 2.0, size)
    return target + rng.normal(0.0, 0.3, size), target


def write_log(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def training_log(path):
    records = [{"step": step, "epoch": step / 50, "train/loss": 20 / step, "lr": 1e-3 / step} for step in range(1, 201)]
    for step in (50, 100, 150, 200):
        records.append({"step": step, "val_id/energy_mae": 1 / step, "val_mine/energy_mae": 0.5})
        records.append({"step": step, "val_id/forces_mae": 0.05})
    return write_log(path, records)


@pytest.fixture
def drawn(monkeypatch):
    """Arguments of what is drawn, by method."""
    calls = {"plot": [], "scatter": [], "hexbin": [], "set_title": [], "set_ylabel": []}

    def recorded(name, original):
        def method(self, *args, **kwargs):
            calls[name].append((args, kwargs))
            return original(self, *args, **kwargs)

        return method

    for name in calls:
        monkeypatch.setattr(Axes, name, recorded(name, getattr(Axes, name)))
    return calls


def test_parity_of_four_splits(tmp_path, drawn):
    splits = {f"val_{i}": points(50 + i, seed=i) for i in range(4)}
    path = plot_parity(splits, tmp_path / "plots" / "parity.png", dataset="test data")
    assert [p.name for p in path.parent.iterdir()] == ["parity.png"]
    image = imread(path)
    assert image.shape[0] > 700 and image.shape[1] > 700
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50
    assert len(drawn["scatter"]) == 4 and not drawn["hexbin"]
    for (args, _), (pred, target) in zip(drawn["scatter"], splits.values(), strict=True):
        np.testing.assert_array_equal(args[0], target)  # label on x
        np.testing.assert_array_equal(args[1], pred)
    pred, target = splits["val_2"]
    mae = np.abs(pred - target).mean()
    titles = [args[0] for args, _ in drawn["set_title"]]
    assert f"val_2: MAE {mae:#.3g} eV, 52 systems" in titles


def test_many_points_become_hexagons_in_every_panel(tmp_path, drawn):
    splits = {"val_id": points(200_000), "val_ood_ads": points(20)}
    plot_parity(splits, tmp_path / "parity.png", dataset="test data")
    assert len(drawn["hexbin"]) == 2 and not drawn["scatter"]


def test_parity_of_forces_shows_components(tmp_path, drawn):
    pred, target = (torch.from_numpy(x).reshape(-1, 3) for x in points(30))
    splits = {"val_id": (pred.requires_grad_(), target)}
    plot_parity(splits, tmp_path / "p.png", dataset="test data", quantity="forces")
    title = drawn["set_title"][-1][0][0]
    assert title.endswith("eV/A, 30 components")


def test_parity_of_one_point(tmp_path):
    pair = (np.array([1.0]), np.array([1.0]))
    assert plot_parity({"s": pair}, tmp_path / "p.png", dataset="d").is_file()


@pytest.mark.parametrize(
    ("splits", "quantity", "message"),
    [
        ({}, "energy", "at least one split"),
        ({"val_id": (np.zeros(0), np.zeros(0))}, "energy", "'val_id'.*not be empty"),
        ({"val_id": (np.zeros(2), np.zeros(3))}, "energy", r"got \(2,\) and \(3,\)"),
        ({"val_id": (np.array([0, np.nan]), np.zeros(2))}, "energy", "'val_id': 1 of 2 points"),
        ({"val_id": points(3)}, "stress", "quantity must be one of"),
    ],
)
def test_parity_refuses(tmp_path, splits, quantity, message):
    with pytest.raises(ValueError, match=message):
        plot_parity(splits, tmp_path / "p.png", dataset="d", quantity=quantity)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_plot_keeps_the_old_one(tmp_path, monkeypatch):
    path = plot_parity({"s": points(5)}, tmp_path / "p.png", dataset="d")
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plot_parity({"s": points(9)}, path, dataset="d")
    assert path.read_bytes() == before


def test_learning_curve_shows_what_was_logged(tmp_path, drawn):
    path = plot_learning_curve(training_log(tmp_path / "metrics.jsonl"), tmp_path / "curve.png", dataset="test data")
    image = imread(path)
    assert image.shape[0] > 900
    assert [args[0] for args, _ in drawn["set_ylabel"]] == [
        "training loss",
        "energy MAE [eV]",
        "force MAE [meV/A]",
        "learning rate",
    ]
    curves = {kwargs.get("label", "").split("\n")[0]: args for args, kwargs in drawn["plot"]}
    np.testing.assert_array_equal(curves["val_id"][1], np.full(4, 50.0))  # meV/A, drawn last
    assert list(curves["val_mine"][0]) == [50, 100, 150, 200]
    assert "mean of 4 records" in curves
    steps, smooth = curves["mean of 4 records"]
    assert (steps[0], len(smooth)) == (4, 197)
    assert smooth[0] == pytest.approx(np.mean([20, 10, 20 / 3, 5]))


def test_panels_without_records_are_left_out(tmp_path, drawn):
    log = write_log(tmp_path / "m.jsonl", [{"step": 1, "train/loss": 0.0, "lr": None}])
    plot_learning_curve(log, tmp_path / "curve.png", dataset="d")
    assert [args[0] for args, _ in drawn["set_ylabel"]] == ["training loss"]


def test_a_step_logged_twice_counts_as_logged_last(tmp_path, drawn):
    records = [{"step": step, "train/loss": 1.0} for step in (1, 2, 3, 4)]
    records += [{"step": step, "train/loss": 2.0} for step in (3, 4, 5)]
    log = write_log(tmp_path / "m.jsonl", records)
    plot_learning_curve(log, tmp_path / "curve.png", dataset="d")
    ((steps, values), _) = drawn["plot"][0]
    assert list(steps) == [1, 2, 3, 4, 5]
    assert list(values) == [1, 1, 2, 2, 2]


def test_damaged_lines_of_a_log_are_counted_and_skipped(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1, "lr": 0.1}\n{"step": 2, "l\n\n[1]\n\xff\xfe\n{"lr": 1}\n{"step": 3, "lr": 0.2}')
    with caplog.at_level(logging.WARNING):
        records = read_metrics_log(path)
    assert [record["step"] for record in records] == [1, 3]
    assert "skipped 4 lines" in caplog.text


def test_nothing_to_plot_names_the_file(tmp_path):
    log = write_log(tmp_path / "m.jsonl", [{"step": 1, "lr": float("nan"), "other": 3}])
    with pytest.raises(ValueError, match=r"m\.jsonl: no training loss"):
        plot_learning_curve(log, tmp_path / "curve.png", dataset="d")
    with pytest.raises(FileNotFoundError):
        plot_learning_curve(tmp_path / "none.jsonl", tmp_path / "curve.png", dataset="d")
