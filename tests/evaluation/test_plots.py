"""What is drawn: pairs of a split, and the log that a real run wrote."""

import json
import logging

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

import small_runs
from faenet_ocp.evaluation.plots import plot_learning_curve, plot_parity
from faenet_ocp.targets import TARGETS, scalar

ENERGY, FORCES = TARGETS["energy"], TARGETS["forces"]
DECLARED = [*TARGETS.values(), scalar("gap", "eV")]


def points(size, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.normal(-1.5, 2.0, size)
    return label + rng.normal(0.0, 0.3, size), label


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


def panels(drawn):
    return [args[0] for args, _ in drawn["set_ylabel"]]


def curves(drawn):
    """Steps and values by the first line of the label."""
    return {kwargs.get("label", "").split("\n")[0]: args for args, kwargs in drawn["plot"]}


def learning_curve(tmp_path, records, targets=(ENERGY,)):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    return plot_learning_curve(log, tmp_path / "curve.png", dataset="test data", targets=targets)


def test_parity_of_four_splits(tmp_path, drawn):
    splits = {f"val_{i}": points(50 + i, seed=i) for i in range(4)}
    path = plot_parity(splits, tmp_path / "plots" / "parity.png", dataset="test data", target=ENERGY)
    assert [p.name for p in path.parent.iterdir()] == ["parity.png"]
    assert min(imread(path).shape[:2]) > 700
    assert len(drawn["scatter"]) == 4 and not drawn["hexbin"]
    for (args, _), (pred, label) in zip(drawn["scatter"], splits.values(), strict=True):
        np.testing.assert_array_equal(args[0], label)  # label on x
        np.testing.assert_array_equal(args[1], pred)
    mae = np.abs(np.subtract(*splits["val_2"])).mean()
    assert f"val_2: MAE {mae:#.3g} eV, 52 systems" in [args[0] for args, _ in drawn["set_title"]]


def test_many_points_become_hexagons_in_every_panel(tmp_path, drawn):
    splits = {"val_id": points(200_000), "val_ood_ads": points(20)}
    plot_parity(splits, tmp_path / "parity.png", dataset="test data", target=ENERGY)
    assert len(drawn["hexbin"]) == 2 and not drawn["scatter"]


@pytest.mark.parametrize(
    ("target", "pair", "end"),
    [
        (FORCES, tuple(values.reshape(-1, 3) for values in points(30)), "eV/A, 30 components"),
        (scalar("gap", "meV"), (np.array([1.0]), np.array([1.0])), "meV, 1 systems"),
    ],
)
def test_parity_follows_the_table_of_targets(tmp_path, drawn, target, pair, end):
    plot_parity({"val_id": pair}, tmp_path / "p.png", dataset="test data", target=target)
    assert drawn["set_title"][-1][0][0].endswith(end)


def test_the_learning_curve_of_a_real_run(small_s2ef, tmp_path, drawn):
    run = small_runs.train("s2ef", small_s2ef).parent.parent
    drawn["plot"].clear(), drawn["set_ylabel"].clear()
    log = run / "logs" / "metrics.jsonl"
    path = plot_learning_curve(log, tmp_path / "curve.png", dataset="d", targets=list(TARGETS.values()))
    assert panels(drawn) == ["training loss", "Energy MAE [eV]", "Force MAE [meV/A]", "learning rate"]
    assert imread(path).shape[0] > 900
    records = map(json.loads, log.read_text().splitlines())
    logged = {record["step"]: record["train/lr"] for record in records if "train/lr" in record}
    (steps, values), _ = drawn["plot"][-1]
    assert logged and dict(zip(steps.tolist(), values.tolist(), strict=True)) == logged
    metrics = json.loads((run / "results" / "metrics.json").read_text())["splits"]["val_id"]
    steps, values = curves(drawn)["val_id"]  # forces, drawn last
    assert (list(steps), list(values)) == ([2], [pytest.approx(1e3 * metrics["forces_mae"], rel=1e-5)])


def test_learning_curve_shows_what_was_logged(tmp_path, drawn):
    records = [{"step": s, "epoch": s / 50, "train/loss": 20 / s, "train/lr": 1e-3 / s} for s in range(1, 201)]
    for step in (50, 100, 150, 200):
        records.append({"step": step, "val_mine/energy_mae": 0.5, "val_id/energy_mae": 1 / step, "val_id/gap_mae": 2})
    learning_curve(tmp_path, records, DECLARED)
    assert panels(drawn) == ["training loss", "Energy MAE [eV]", "gap MAE [eV]", "learning rate"]
    found = curves(drawn)
    assert [label for label in found if label.startswith("val")] == ["val_id", "val_mine"]  # OC20's first
    assert list(found["val_mine"][0]) == [50, 100, 150, 200]
    steps, smooth = found["mean of 4 records"]
    assert (steps[0], len(smooth)) == (4, 197)
    assert smooth[0] == pytest.approx(np.mean([20, 10, 20 / 3, 5]))


def test_values_that_are_not_finite_are_counted(tmp_path, drawn):
    records = [{"step": 1, "train/loss": 1.0, "val_id/energy_mae": 0.5}, {"step": 2, "train/loss": float("nan")}]
    learning_curve(tmp_path, [*records, {"step": 3, "train/loss": float("inf"), "val_id/energy_mae": float("nan")}])
    assert {"as logged (2 not finite)", "val_id (1 not finite)"} <= set(curves(drawn))


def test_panels_without_records_are_left_out(tmp_path, drawn):
    learning_curve(tmp_path, [{"step": 1, "train/loss": 0.0, "train/lr": None}])
    assert panels(drawn) == ["training loss"]


def test_a_step_logged_twice_counts_as_logged_last(tmp_path, drawn):
    logged = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    learning_curve(tmp_path, [{"step": step, "train/loss": loss} for step, loss in logged])
    ((steps, values), _) = drawn["plot"][0]
    assert (list(steps), list(values)) == ([1, 2, 3, 4, 5], [1, 1, 2, 2, 2])


def test_damaged_lines_of_a_log_are_counted_and_skipped(tmp_path, drawn, caplog):
    log = tmp_path / "m.jsonl"
    lines = [b'{"step": 1, "train/lr": 0.1}', b'{"step": 2, "t', b"", b"[1]", b"\xff\xfe", b'{"train/lr": 1}']
    log.write_bytes(b"\n".join([*lines, b'{"step": 3, "train/lr": 0.2}']))
    with caplog.at_level(logging.WARNING):
        plot_learning_curve(log, tmp_path / "curve.png", dataset="d", targets=[ENERGY])
    assert list(drawn["plot"][0][0][0]) == [1, 3]
    assert "skipped 4 lines" in caplog.text


def test_nothing_to_plot_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no training loss"):
        learning_curve(tmp_path, [{"step": 1, "train/lr": float("nan"), "other": 3}])
    assert not (tmp_path / "curve.png").exists()
