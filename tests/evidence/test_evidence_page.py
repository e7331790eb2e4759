"""docs/evidence.md shows what the committed results say, in its tables and in its claims."""

import json
from pathlib import Path
from typing import Any

from faenet_ocp.evaluation.comparison import render_comparison
from faenet_ocp.evidence.expressivity_table import summary
from faenet_ocp.evidence.symmetry_runs import SymmetryOfRun, render_runs

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _json(name: str) -> dict[str, Any]:
    return json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())


def test_tables_are_those_of_the_results() -> None:
    text = (DOCS / "evidence.md").read_text()
    tables = {
        "symmetry_demo": render_runs([SymmetryOfRun(name, **run) for name, run in _json("symmetry_demo").items()]),
        "expressivity": summary(_json("expressivity")),
        "table6_demo": render_comparison(_json("table6_demo"), ablations=True),
    }
    for name, table in tables.items():
        assert text.split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0].strip() == table.strip(), name
