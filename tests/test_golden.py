"""Files written by version 0.1.0 as of commit 24d2a12: they load, and give the numbers that it gave.

`golden/` holds two checkpoints (32 channels, two steps on `small_data`), their validation sets as packed files, and
`numbers.json`: predictions for `small_runs.slab(index, seed=7)` in float64 with canonical frames, and the metrics that
ended the training. Nothing here is made anew when code changes: that is what it is for.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import small_runs
from faenet_ocp import FAENetCalculator
from faenet_ocp.launch.cli import main

GOLDEN = Path(__file__).resolve().parent / "golden"
NUMBERS = json.loads((GOLDEN / "numbers.json").read_text())


@pytest.mark.parametrize("task", ["is2re", "s2ef"])
def test_old_checkpoints_predict_what_they_predicted(task: str) -> None:
    for expected in NUMBERS[task]["structures"]:
        options = {"forces": expected["forces_from"]} if expected["forces_from"] else {}
        calculator = FAENetCalculator.from_checkpoint(
            GOLDEN / f"{task}.pt", device="cpu", precision="float64", **options
        )
        atoms = small_runs.slab(expected["index"], seed=expected["seed"])
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(expected["energy"], abs=1e-9)
        if task == "s2ef":
            forces = atoms.get_forces(apply_constraint=False)
            np.testing.assert_allclose(forces, expected["forces"], atol=1e-8)


@pytest.mark.parametrize("task", ["is2re", "s2ef"])
def test_old_packed_files_and_checkpoints_give_the_old_metrics(task: str, tmp_path: Path) -> None:
    arguments = ["--mode", "validate", "--checkpoint", str(GOLDEN / f"{task}.pt"), "--cpu"]
    arguments += ["--run-dir", str(tmp_path), "--identifier", "again", "--dataset.format=oc20_packed"]
    arguments += [f"--dataset.root={GOLDEN / 'packed' / task}", "--dataset.val={val_id: {src: val_id}}"]
    assert main(arguments) == 0
    metrics = json.loads((tmp_path / "again" / "results" / "metrics.json").read_text())["splits"]["val_id"]
    for name, value in NUMBERS[task]["splits"]["val_id"].items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
