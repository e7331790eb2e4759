"""Elements that the training set lacks are named, with the number of systems: log, table, results, predictions."""

import json
import logging
from pathlib import Path

import pytest
import torch

import processes
import small_data
from faenet_ocp.launch.cli import main

MESSAGE = "v: 2 systems have elements that the training set lacks: Ag (in 1), U (in 2)"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """No silver and no uranium in training; silver in one of five validation systems, uranium in two."""
    for number, (split, count) in enumerate((("train", 8), ("val", 5))):
        records = [small_data.make_fields(i, task="s2ef", edges=False, seed=number) for i in range(count)]
        for index, record in enumerate(records):
            numbers = record["atomic_numbers"]
            record["atomic_numbers"] = torch.where(numbers == 47, 29.0, numbers)
            if split == "val" and index in (1, 3):
                record["atomic_numbers"][:index] = 92
            if split == "val" and index == 3:
                record["atomic_numbers"][5] = 47
        small_data.write_lmdb(tmp_path / f"{split}.lmdb", [small_data.dump_record(record) for record in records])
    return tmp_path


@pytest.mark.parametrize("energy", [{"normalizer": "fit", "element_references": "fit"}, {}])
def test_unseen_elements_are_named(root: Path, caplog: pytest.LogCaptureFixture, energy: dict[str, str]) -> None:
    """Once in the log, however often a split is evaluated; also without references, where the baseline is wrong."""
    caplog.set_level(logging.WARNING)
    config = processes.write_config(root / "c.yml", root, outputs={"energy": energy})
    assert main(["--config", str(config), "--identifier", "r"]) == 0
    assert [MESSAGE in record.message for record in caplog.records].count(True) == 1
    assert f"**{MESSAGE}" in (root / "r" / "results" / "table.md").read_text()
    results = json.loads((root / "r" / "results" / "metrics.json").read_text())
    assert results["unseen_elements"] == {"v": {"Ag": 1, "U": 2, "all": 2}}
    assert results["baselines"]["linear_in_composition"]["splits"]["v"]["num_systems_unseen_elements"] == 2

    caplog.clear()
    checkpoint = str(root / "r" / "checkpoints" / "best.pt")
    assert main(["--mode", "predict", "--checkpoint", checkpoint, "--run-dir", str(root), "--identifier", "p"]) == 0
    assert MESSAGE in caplog.text
