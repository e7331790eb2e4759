"""Molecular dynamics at constant energy: steps of the energy with a cut graph, none with an envelope."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from faenet_ocp.launch.cli import main

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "energy_drift.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("energy_drift", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("frames", ["none", "canonical"])
def test_an_envelope_conserves_energy(script: ModuleType, frames: str) -> None:
    plain, smooth = (script.drift(model, frames, 1.0, 30) for model in script.MODELS.values())
    assert plain["largest_step_meV"] > 1  # the negative control: neighbours come and go
    assert smooth["largest_step_meV"] < 0.01 and abs(smooth["drift_meV"]) < 0.01


def test_the_page_shows_what_was_measured(script: ModuleType) -> None:
    docs = SCRIPT.parents[1] / "docs"
    rows = json.loads((docs / "benchmarks" / "energy_drift.json").read_text())["rows"]
    assert script.table(rows) in (docs / "dynamics.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.envelope=polynomial"], "model.max_neighbors: 40"),
        (["--model.envelope=polynomial", "--model.max_neighbors=null"], "edges"),
        (["--model.max_neighbors=null"], "edges"),
        (["--model.envelope=polynomal", "--model.max_neighbors=null", "--dataset.edges=recompute"], "'polynomal'"),
    ],
)
def test_what_would_not_be_smooth_is_refused(
    small_is2re: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    data = [f"--dataset.root={small_is2re}", "--dataset.val={val_id: {src: is2re/all/val_id}}", "--cpu"]
    assert main(["--config", "configs/is2re/faenet.yml", *data, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_smooth_model_trains(small_is2re: Path, tmp_path: Path) -> None:
    data = [f"--dataset.root={small_is2re}", "--dataset.val={val_id: {src: is2re/all/val_id}}", "--cpu"]
    small = ["--model.hidden_channels=224", "--model.num_filters=16", "--model.num_interactions=1", "--logger=none"]
    smooth = ["--model.envelope=polynomial", "--model.max_neighbors=null", "--dataset.edges=recompute"]
    optim = ["--optim.max_steps=2", "--optim.batch_size=4", "--optim.num_workers=0", "--run-dir", str(tmp_path)]
    assert main(["--config", "configs/is2re/faenet.yml", *data, *small, *smooth, *optim]) == 0
