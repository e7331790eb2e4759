"""docs/molecules.md shows what the committed results of its runs say."""

from pathlib import Path

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
    for document in results:
        assert document["dataset"] == "QM9" and document["splits"]["test"]["num_systems"] == 10_831
        name = document["run"]["config"]
        rate = round(110_000 / document["training"]["seconds_per_epoch"])
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} | ") and "min |" in line]
        assert row.endswith(f" {rate} |")
