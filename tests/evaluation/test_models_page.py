"""docs/models.md shows what the committed results of its runs say."""

import json
from pathlib import Path

import pytest

from faenet_ocp.evaluation.comparison import render_comparison
from faenet_ocp.evidence.symmetry_runs import SymmetryOfRun, render_runs

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _shown(name: str) -> str:
    return (DOCS / "models.md").read_text().split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0].strip()


@pytest.mark.parametrize(("name", "data"), [("models_demo", "demo data"), ("models_qm9", "QM9")])
def test_tables_are_those_of_the_results(name: str, data: str) -> None:
    runs = json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())
    assert _shown(name) == render_comparison(runs).strip()
    (dataset,) = {document["dataset"] for documents in runs.values() for document in documents}
    assert dataset.startswith(data)


def test_escaip_in_frames() -> None:
    found = json.loads((DOCS / "benchmarks" / "escaip_frames.json").read_text())
    assert _shown("escaip_frames") == render_runs([SymmetryOfRun(name, **run) for name, run in found.items()]).strip()
