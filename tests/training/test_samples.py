"""What is looked at before a run begins: tags of another convention, splits whose atoms are all fixed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import processes
import small_data
from data_sets import dataset_of
from faenet_ocp.data.check import sample_of, suspicious_tags
from faenet_ocp.launch.cli import main

Change = Callable[[dict[str, Any]], dict[str, Any]]


def _reversed(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"tags": 2 - record["tags"]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda record: record, []),
        (
            _reversed,
            [
                "in 12 of 12 systems no atom of tag 2 (adsorbate) lies above the surface (tag 1)",
                "in 12 of 12 systems all atoms of tag 2 (adsorbate) are fixed",
                "in 12 of 12 systems atoms of tag 0 (below the surface) lie above the others",
            ],
        ),
        (
            lambda record: record | {"tags": (record["tags"] + 1) % 3},
            ["in 12 of 12 systems atoms of tag 0 (below the surface) lie above the others"],
        ),
        (lambda record: record | {"tags": 0 * record["tags"]}, ["all atoms have tag 0, or none: "]),
        (lambda record: record | {"tags": record["tags"].clamp(max=1)}, []),  # a clean slab
        (lambda record: record | {"tags": 0 * record["tags"] + 2}, []),  # a molecule
        (
            lambda record: record | {"fixed": torch.ones_like(record["fixed"])},
            ["in 12 of 12 systems all atoms of tag 2 (adsorbate) are fixed"],
        ),
    ],
    ids=["OC20's", "reversed", "shifted", "none", "clean", "molecule", "fixed"],
)
def test_tags_that_cannot_be_meant(tmp_path: Path, change: Change, expected: list[str]) -> None:
    records = [change(small_data.make_fields(i)) for i in range(12)]
    for record in records[6:]:  # wherever up is
        record["pos"], record["cell"] = record["pos"].flip(1), record["cell"].flip(2)
    found = list(suspicious_tags(sample_of(dataset_of(tmp_path, *records, labels=[], edges="none"), 64)))
    assert len(found) == len(expected)
    assert all(reason.startswith(start) for reason, start in zip(found, expected, strict=True))


def test_a_sample_is_spread_evenly_and_few_odd_systems_are_no_matter(tmp_path: Path) -> None:
    records = [small_data.make_fields(i) for i in range(12)]
    records[3:5] = map(_reversed, records[3:5])
    dataset = dataset_of(tmp_path, *records, labels=[], edges="none")
    assert sample_of(dataset, 4).sid == ["0", "3", "6", "9"]
    assert not list(suspicious_tags(sample_of(dataset, 12)))


def _write(root: Path, **changes: Change) -> Path:
    for number, split in enumerate(("train", "val")):
        change = changes.get(split, lambda record: record)
        records = [change(small_data.make_fields(i, task="s2ef", edges=False, seed=number)) for i in range(4)]
        small_data.write_lmdb(root / f"{split}.lmdb", [small_data.dump_record(record) for record in records])
    return root


def _all_fixed(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"fixed": torch.ones_like(record["fixed"])}


def _only_subsurface_free(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"fixed": 1.0 - record["fixed"]}


def _arguments(root: Path) -> list[str]:
    settings = {"optim": {"max_epochs": 1, "warmup_steps": 0}, "outputs": {"energy": {}}}
    config = processes.write_config(root / "c.yml", root, **settings)
    return ["--config", str(config), "--identifier", "r"]


@pytest.mark.parametrize(("split", "name"), [("train", "train"), ("val", "v")])
def test_a_split_without_a_force_that_counts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, split: str, name: str
) -> None:
    """Before any work; `--mode check` says so and goes on to the list."""
    arguments = _arguments(_write(tmp_path, **{split: _all_fixed}))
    key = "train_on_free_atoms" if split == "train" else "eval_on_free_atoms"
    assert main(arguments) == 2
    message = f"dataset, split {name}: no atom of 4 systems looked at is free (`fixed` is 1 for all)"
    error = capsys.readouterr().err
    assert message in error and f"outputs.forces.{key}: false" in error
    assert not (tmp_path / "r").exists()
    assert main([*arguments, "--mode", "check", "--optim.num_workers=1"]) == 0
    assert message in caplog.text
    assert main([*arguments, f"--outputs.forces.{key}=false"]) == 0


def test_free_atoms_that_are_taken_out_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = _arguments(_write(tmp_path, train=_only_subsurface_free))
    assert main([*arguments, "--dataset.transforms={remove_subsurface: {}}"]) == 2
    assert "is free and left by remove_subsurface: all free atoms have tag 0" in capsys.readouterr().err
    assert main(arguments) == 0


def test_a_run_on_reversed_tags_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = _arguments(_write(tmp_path, train=_reversed, val=_reversed))
    assert main(arguments) == 0
    for split in ("train", "v"):
        assert f"dataset, split {split}: in 4 of 4 systems no atom of tag 2 (adsorbate) lies above" in caplog.text
    caplog.clear()
    assert main([*arguments, "--identifier=n", "--model.tag_hidden_channels=0"]) == 0
    assert "tag 2" not in caplog.text
