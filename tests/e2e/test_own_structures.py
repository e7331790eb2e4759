"""The way of somebody with a file of labelled structures, by the real command line: train, validate, predict, relax."""

import json
import re
from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

import processes
import small_data
from faenet_ocp import FAENetCalculator
from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.launch.cli import main

SMALL = {
    "model.hidden_channels": 48,
    "model.num_filters": 16,
    "model.num_interactions": 1,
    "model.pg_hidden_channels": 4,
}
SMALL |= {"model.num_gaussians": 8, "model.cutoff": 4.0, "optim.batch_size": 6, "optim.max_epochs": 2}
SMALL |= {"optim.warmup_steps": 2, "optim.eval_every_epochs": 1, "optim.num_workers": 0, "logger": "none"}


def structures(count: int, seed: int = 0) -> list[Atoms]:
    found = []
    for number in range(count):
        atoms = small_data.make_slab(number)
        atoms.info, atoms.pbc = {"sid": f"slab{number // 3}"}, (True, True, False)  # three frames of each system
        atoms.rattle(0.1, seed=100 * seed + number)
        atoms.set_constraint(FixAtoms(np.flatnonzero(atoms.get_tags() == 0)))
        del atoms.arrays["tags"]
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(apply_constraint=False)}
        atoms.calc = SinglePointCalculator(atoms, **results)
        found.append(atoms)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    ase.io.write(root / "mine.extxyz", structures(24))
    ase.io.write(root / "other.traj", structures(6, seed=1))
    return root


def _run(folder: Path, config: str, *more: str) -> list[str]:
    settings = [f"--{key}={value}" for key, value in SMALL.items()]
    return ["--config", f"configs/own/{config}.yml", *settings, "--cpu", "--run-dir", str(folder / "runs"), *more]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    data = [f"--dataset.train.src={folder}/mine.extxyz", f"--dataset.val.val.src={folder}/other.traj"]
    assert main(_run(folder, "forces", *data, "--identifier", "forces")) == 0
    return folder / "runs" / "forces"


def test_training_is_reported_under_the_names_given(trained: Path) -> None:
    results = json.loads((trained / "results" / "metrics.json").read_text())
    assert list(results["splits"]) == ["val"] and results["splits"]["val"]["num_systems"] == 6
    assert results["average"] is None
    table = (trained / "results" / "table.md").read_text()
    assert "Energy MAE [eV]: val" in table and "OOD" not in table and "paper" not in table
    config = yaml.safe_load((trained / "config.yml").read_text())
    assert config["evaluation_metrics"]["primary_metric"] == {"split": "val", "metric": "energy_mae"}


def test_structures_come_back_with_predictions_of_the_calculator(trained: Path, folder: Path) -> None:
    best = str(trained / "checkpoints" / "best.pt")
    arguments = ["--mode", "predict", "--checkpoint", best, "--cpu", "--run-dir", str(folder / "runs")]
    arguments += [f"--dataset.test={{t: {{src: {folder}/other.traj}}}}", "--output-format", "extxyz"]
    assert main([*arguments, "--identifier", "predicted"]) == 0
    predicted = ase.io.read(folder / "runs/predicted/results/predictions/t.extxyz", ":")
    calculator = FAENetCalculator(best)
    for given, found in zip(ase.io.read(folder / "other.traj", ":"), predicted, strict=True):
        fixed = given.constraints[0].index
        given.calc = calculator
        assert found.get_potential_energy() == pytest.approx(given.get_potential_energy(), abs=1e-5)
        np.testing.assert_allclose(found.get_forces(), given.get_forces(), atol=1e-4)
        assert not found.get_forces(apply_constraint=False)[fixed].any()


def test_a_share_of_the_training_set_is_held_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same share on any number of ranks and after a resume; what was trained on is never evaluated."""
    contents = []
    for ranks in (1, 2):
        name, data = f"energy{ranks}", f"--dataset.train.src={folder}/mine.extxyz"
        arguments = _run(folder, "energy", data, "--dataset.val.val.from_train=0.25", "--identifier", name)
        for epochs in (1, 2):
            more = [*arguments, f"--optim.max_epochs={epochs}"]
            assert set(processes.finish(processes.forked(more, tmp_path / "log", ranks=ranks))) == {0}
        found = load_checkpoint(folder / "runs" / name / "checkpoints" / "last.pt")["data"]
        assert (found["dataset.train"]["num_systems"], found["dataset.val.val"]["num_systems"]) == (18, 6)
        contents.append({key: value["content"] for key, value in found.items()})
    assert contents[0] == contents[1]
    for change in ("--dataset.val.val.from_train=0.5", "--seed=1"):
        assert main([*arguments, change]) == 2
    best = folder / "runs" / "energy1" / "checkpoints" / "best.pt"
    for change in ("--dataset.val.val.from_train=0.5", "--seed=1"):
        for use in (["--mode", "validate", "--checkpoint", str(best), "--cpu"], [*arguments, f"--checkpoint={best}"]):
            assert main([*use, change, "--identifier", "leak"]) == 2
            assert "not the systems that the checkpoint's run held out" in capsys.readouterr().err
    assert [path.parent for path in (folder / "runs").rglob("groups-*.npy")] == [folder / "runs" / ".cache"]


def test_a_checkpoint_is_evaluated_on_other_splits(trained: Path, folder: Path) -> None:
    """Also on a share of files that it was not trained on."""
    best = str(trained / "checkpoints" / "best.pt")
    arguments = ["--mode", "validate", "--checkpoint", best, "--cpu", f"--dataset.train.src={folder}/other.traj"]
    splits = f"{{far: {{src: {folder}/mine.extxyz}}, half: {{from_train: 0.5}}}}"
    assert main([*arguments, f"--dataset.val={splits}", "--identifier", "other"]) == 0
    results = json.loads((folder / "runs" / "other" / "results" / "metrics.json").read_text())
    assert {name: split["num_systems"] for name, split in results["splits"].items()} == {"far": 24, "half": 3}


def test_splits_of_an_included_file_are_dropped_or_replaced(folder: Path, tmp_path: Path) -> None:
    parent = Path("configs/is2re/base.yml").resolve()
    own = {"includes": [str(parent)], "dataset": {"val": dict.fromkeys(("val_ood_ads", "val_ood_cat", "val_ood_both"))}}
    (tmp_path / "own.yml").write_text(yaml.safe_dump(own))
    from faenet_ocp.config.schema import build_config
    from faenet_ocp.config.yaml import load_yaml, merge, parse_overrides

    rest = {"model": {"name": "faenet"}, "optim": {"lr_initial": 0.1, "batch_size": 1, "max_epochs": 1}}
    raw = merge(load_yaml(tmp_path / "own.yml"), rest)
    config = build_config(raw)
    assert list(config.dataset.val) == ["val_id"]
    assert build_config(config.model_dump(mode="json")) == config  # what config.yml says
    merged = merge(raw, parse_overrides(["--dataset.val.val_id.src=x"]))
    assert list(build_config(merged).dataset.val) == ["val_id"]
    replaced = merge(raw, parse_overrides(["--dataset.val={mine: {src: x}}", "--dataset.val.more.src=y"]))
    config = build_config(replaced)
    assert list(config.dataset.val) == ["mine", "more"]
    assert config.evaluation_metrics.primary_metric.split == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["format=ase_db"], "'ase_db' is a data set of fairchem's own, .* `ase` reads all files"),
        (["val.val.from_train=1.5"], "dataset.val.val.from_train: Input should be less than 1"),
        (["val.val.from_train=0.99"], "would be held out, and none left to train on"),
        (
            ["tags=none", "transforms={remove_subsurface: {}}"],
            "dataset.tags: none, but .* remove_subsurface; that needs",
        ),
        (["tags=fixed", "format=oc20_lmdb"], "dataset.tags: 'fixed' is for format ase"),
        (["tags=file"], "structure 0 has no tags, which the model needs; tags: file takes"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    data = f"--dataset.train.src={folder}/mine.extxyz"
    assert main(_run(folder, "energy", data, *(f"--dataset.{option}" for option in options))) == 2
    assert re.search(message, capsys.readouterr().err)
