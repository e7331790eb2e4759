"""docs/models.md shows what the committed results of its runs say."""

import json
from pathlib import Path

import pytest

from faenet_ocp.evaluation.comparison import render_comparison

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", ["models_qm9"])
def test_tables_are_those_of_the_results(name: str) -> None:
    runs = json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())
    shown = (DOCS / "models.md").read_text().split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0]
    assert shown.strip() == render_comparison(runs).strip()
    for documents in runs.values():
        assert {document["dataset"] for document in documents} == {"QM9"}
