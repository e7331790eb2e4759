"""Several runs in one table: means over seeds, the paper's rows apart, and refusals."""

import copy
from pathlib import Path

import pytest

from faenet_ocp.evaluation.comparison import plot_comparison, render_comparison
from faenet_ocp.evaluation.results import read_results

RESULTS = read_results(Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "qm9_U0.json")


def _changed(factor: float, **fields: object) -> dict:
    """The same run with other errors."""
    document = copy.deepcopy(RESULTS)
    for metrics in [*document["splits"].values(), document["average"]]:
        metrics["U0_mae"] *= factor
    return document | fields


def _rows(table: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_runs_of_one_name_are_a_mean_and_a_deviation() -> None:
    rows = _rows(render_comparison({"one": [RESULTS], "three": [_changed(1), _changed(2), _changed(3)]}))
    error = 1e3 * RESULTS["splits"]["test"]["U0_mae"]
    header, one, three = rows["Model"], rows["one"], rows["three (3 seeds)"]
    assert header[:4] == ["Parameters", "Train", "Infer.", "U0 MAE [meV]: val"] and header[4] == "test"
    assert one[0] == "0.34 M" and one[4] == f"{error:.1f}"
    assert three[4] == f"{2 * error:.1f} +- {error:.1f}"
    assert rows["linear in composition"][4] == "868.8"


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="different tasks, data or splits"):
        render_comparison({"a": [RESULTS], "b": [_changed(1, dataset="other")]})
    with pytest.raises(ValueError, match="there are none"):
        render_comparison({})


def test_rows_of_table_6_stand_apart() -> None:
    table = render_comparison({"a": [RESULTS]}, ablations=True)
    assert _rows(table)["simple MP, the paper's"] == ["2706", "606"]
    assert "as published" in table and "paper" not in render_comparison({"a": [RESULTS]})


def test_the_plot_is_written(tmp_path: Path) -> None:
    path = plot_comparison({"a": [RESULTS], "b": [_changed(2)]}, tmp_path / "plot.png")
    assert path.stat().st_size > 10_000
