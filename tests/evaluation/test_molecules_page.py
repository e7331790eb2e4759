"""docs/molecules.md shows what the committed results of its runs say."""

from pathlib import Path

import pytest

from faenet_ocp.evaluation.qm9_table import render_curve, render_qm9_table
from faenet_ocp.evaluation.results import read_results

DOCS = Path(__file__).resolve().parents[2] / "docs"
CURVE = {1_000: "1k", 10_000: "10k", 110_000: "110k"}


def test_tables_are_those_of_the_results() -> None:
    text = (DOCS / "molecules.md").read_text()
    results = [read_results(DOCS / "benchmarks" / f"qm9_{target}.json") for target in ("U0", "gap", "mu")]
    curve = {size: read_results(DOCS / "benchmarks" / f"curve_{name}.json") for size, name in CURVE.items()}
    for marker, table in {"table 8": render_qm9_table(results), "curve": render_curve(curve)}.items():
        shown = text.split(f"<!-- {marker} -->\n")[1].split("<!-- end -->")[0]
        assert shown.strip() == table.strip()


@pytest.mark.parametrize("name", ["U0", "U0_9_epochs", "U0_12_epochs", "gap", "mu"])
def test_runs_are_those_of_the_results(name: str) -> None:
    document = read_results(DOCS / "benchmarks" / f"qm9_{name}.json")
    assert document["dataset"] == "QM9" and document["splits"]["test"]["num_systems"] == 10_831
    target, training = name.partition("_")[0], document["training"]
    error = document["splits"]["test"][f"{target}_mae"]
    shown = f"{error:.4f} D" if target == "mu" else f"{1000 * error:.1f} meV"
    rows = (DOCS / "molecules.md").read_text().splitlines()
    (row,) = [line for line in rows if line.startswith(f"| {target} | {training['epochs']} | {shown} | ")]
    assert row.endswith(f" {round(110_000 / training['seconds_per_epoch'])} |")
