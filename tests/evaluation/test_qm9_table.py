"""Table 8: the right cells, improvements by hand, and what does not belong there is named."""

from typing import Any

import pytest

from faenet_ocp.evaluation.qm9_table import PAPER, PAPER_MODELS, errors_by_model, mean_improvement, render_qm9_table
from faenet_ocp.targets import QM9


def run(model: str, target: str, mae: float, *, linear: float = 1.0, **changes: Any) -> dict[str, Any]:
    metric = QM9[target].metrics[0]
    return {
        "task": "qm9",
        "units": {metric.name: metric.unit},
        "run": {"model": model, "config": f"{model}_{target}"},
        "splits": {"val": {metric.name: 9.0}, "test": {metric.name: mae}},
        "baselines": {"linear_in_composition": {"splits": {"test": {metric.name: linear}}}},
    } | changes


def rows(table: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {line[0]: [cell.strip() for cell in line[1:]] for line in lines}


def test_errors_stand_in_their_rows_in_the_tables_units() -> None:
    results = [run("faenet", "U0", 0.0214, linear=0.867), run("faenet", "mu", 0.25, linear=1.25)]
    found = rows(render_qm9_table([*results, run("schnet", "U0", 0.0428, linear=0.867)]))
    assert "Target" in found and list(found)[2:14] == list(QM9)
    assert found["Target"][:5] == ["Unit", "linear in composition", "faenet", "schnet", "SchNet, paper"]
    assert found["U0"][:4] == ["meV", "867.0", "21.4", "42.8"] and found["U0"][-1] == "6.79"
    assert found["mu"][:4] == ["D", "1.2500", "0.2500", ""]
    assert found["gap"][:4] == ["meV", "", "", ""] and found["R2"][-4] == ""  # SE(3)-T
    assert found["mean improvement over SchNet"][2] == "0.500"


def test_improvements_of_the_paper_are_its_own_times_twelve_elevenths() -> None:
    """Its table prints 0.247, 0.366, 0.419, 0.445, 0.423 and 0.395: sums over eleven targets, divided by twelve."""
    printed = {"PhysNet": 0.247, "MGCN": -0.021, "DimeNet": 0.366, "DimeNet++": 0.419, "SphereNet": 0.445}
    printed |= {"ComENet": 0.423, "FAENet": 0.395}
    found = rows(render_qm9_table([]))
    means = dict(zip(PAPER_MODELS, found["mean improvement over SchNet"][2:], strict=True))
    for model, value in printed.items():
        assert float(means[model]) * 11 / 12 == pytest.approx(value, abs=0.004), model
    assert means["SchNet"] == ""


def test_r2_is_no_part_of_the_mean() -> None:
    assert mean_improvement({"U0": 0.5, "R2": -9.0, "mu": 0.1}) == (pytest.approx(0.3), pytest.approx(0.2))
    assert mean_improvement({"R2": 1.0}) is None
    assert all(len(row) == len(PAPER_MODELS) for row in PAPER.values()) and list(PAPER) == list(QM9)


def test_what_does_not_belong_there_is_named() -> None:
    with pytest.raises(ValueError, match="faenet_U0: is the second run of faenet on U0"):
        errors_by_model([run("faenet", "U0", 1.0)] * 2)
    with pytest.raises(ValueError, match="task is2re on val, test; expected task qm9 with a split 'test'"):
        errors_by_model([run("faenet", "U0", 1.0, task="is2re")])
    with pytest.raises(ValueError, match="expected task qm9 with a split 'far'"):
        errors_by_model([run("faenet", "U0", 1.0)], "far")
