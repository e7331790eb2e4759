"""Molecules through everything that slabs go through: two ranks, a resume, evaluation, calculator, relaxation."""

import json
import os
import re
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from scipy.spatial.transform import Rotation

import processes
from faenet_ocp import FAENetCalculator
from faenet_ocp.inference.predictor import Predictor
from faenet_ocp.launch.cli import main
from faenet_ocp.prepare.qm7x import prepare
from qm7x_files import read_store, write_files

SMALL = {"hidden_channels": 32, "num_filters": 16, "num_interactions": 2, "pg_hidden_channels": 4, "num_gaussians": 16}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on generated molecules in QM7-X's format: an epoch on one rank, then it goes on with another on two."""
    root = tmp_path_factory.mktemp("molecules")
    prepare(write_files(root / "hdf5"), root / "data")
    known = {"src": "train"} if not (root / "data" / "val_known").exists() else {"src": "val_known"}
    arguments = ["--config", "configs/demo/qm7x.yml", f"--dataset.root={root / 'data'}", "--logger=none"]
    arguments += [f"--dataset.val={{val_known: {{src: {known['src']}}}, val_unknown: {{src: val_unknown}}}}"]
    arguments += [*(f"--model.{key}={value}" for key, value in SMALL.items()), "--optim.batch_size=8"]
    arguments += ["--model.force_hidden_channels=32", "--optim.num_workers=0", "--optim.eval_every_epochs=1"]
    arguments += ["--run-dir", str(root), "--identifier", "run", "--optim.warmup_steps=2"]
    assert main([*arguments, "--optim.max_epochs=1"]) == 0
    output = processes.run([*arguments, "--optim.max_epochs=2", "--num-gpus", "2"])
    (root / "two_ranks.log").write_text(output)
    return root / "run"


def molecules() -> list[Atoms]:
    return [Atoms(numbers, pos) for numbers, pos, _, _ in list(read_store().values())[::5]]


def test_two_ranks_and_a_resume_give_results_of_both_splits(trained: Path) -> None:
    results = json.loads((trained / "results" / "metrics.json").read_text())
    assert results["training"]["epochs"] == 2 and not results["official"]
    assert list(results["splits"]) == ["val_known", "val_unknown"]
    threads = os.environ.get("OMP_NUM_THREADS", max(1, len(os.sched_getaffinity(0)) // 2))
    assert results["run"]["device"] == f"2 x CPU, {threads} thread(s)"  # the ranks share the cores
    table = (trained / "results" / "table.md").read_text()
    assert "Energy MAE [meV]: val_known" in table and "not QM7-X" in table and "paper" not in table


def test_two_ranks_say_what_one_says(trained: Path) -> None:
    """Each line once, with its time; nothing of the libraries around."""
    lines = (trained.parent / "two_ranks.log").read_text().splitlines()
    evaluated = [line for line in lines if ": forces_mae: val_known " in line]
    assert len(evaluated) == 1 and re.match(r"\d\d:\d\d:\d\d INFO step \d+: ", evaluated[0]), lines
    foreign = ("INFO:", "torchtnt", "fairchem", "run_id", "FutureWarning", "distributed backend")
    assert [line for line in lines if any(word in line for word in foreign)] == []


@pytest.mark.parametrize("frames", ["canonical", "full", "none"])
def test_a_molecule_is_the_same_in_any_place_pose_order_and_company(trained: Path, frames: str) -> None:
    """In float64, to rounding; without frames turning and mirroring change the energy, all else does not."""
    predictor = Predictor(trained, frames=frames, precision="float64")
    given = molecules()
    alone = [predictor([atoms])[0] for atoms in given]
    turn = Rotation.random(random_state=1).as_matrix()
    order = [np.random.default_rng(number).permutation(len(atoms)) for number, atoms in enumerate(given)]
    changes = {
        "company": (given, np.eye(3), None),
        "place": ([_with(atoms, atoms.positions + np.array([3.0, -20.0, 7.0])) for atoms in given], np.eye(3), None),
        "order": ([atoms[places] for atoms, places in zip(given, order, strict=True)], np.eye(3), order),
        "pose": ([_with(atoms, atoms.positions @ turn) for atoms in given], turn, None),
        "mirror": ([_with(atoms, atoms.positions * [-1, 1, 1]) for atoms in given], np.diag([-1.0, 1, 1]), None),
    }
    for change, (changed, matrix, places) in changes.items():
        found = predictor(changed)
        errors = []
        for number, (before, after) in enumerate(zip(alone, found, strict=True)):
            expected = before.forces @ matrix if places is None else before.forces[places[number]]
            errors.append(max(abs(after.energy - before.energy), np.abs(after.forces - expected).max()))
        if frames == "none" and change in ("pose", "mirror"):
            assert max(errors) > 1e-3, change
        else:
            # Molecules whose axes are not unique have no frame of their own: a few of these are.
            assert np.median(errors) < 1e-9 and max(errors) < (1e-9 if change in ("company", "place") else 1e-6), change


def _with(atoms: Atoms, positions: np.ndarray) -> Atoms:
    moved = atoms.copy()
    moved.positions = positions
    return moved


def test_calculator_and_relaxation_need_no_tags(trained: Path, tmp_path: Path) -> None:
    best = str(trained / "checkpoints" / "best.pt")
    atoms = molecules()[0]
    atoms.calc = FAENetCalculator(best)
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    assert np.isfinite(energy) and forces.shape == (len(atoms), 3)
    ase.io.write(tmp_path / "in.extxyz", molecules()[:3])
    arguments = ["--checkpoint", best, "--device", "cpu", "--fmax", 0.05, "--max-steps", 3]
    processes.run_script("relax.py", *arguments, "--input", tmp_path / "in.extxyz", "--output", tmp_path / "out")
    relaxed = ase.io.read(tmp_path / "out" / "relaxed.extxyz", ":")
    assert [found.get_chemical_formula() for found in relaxed] == [m.get_chemical_formula() for m in molecules()[:3]]


@pytest.mark.slow
def test_validation_of_the_checkpoint_gives_the_numbers_of_the_run(trained: Path) -> None:
    best = str(trained / "checkpoints" / "best.pt")
    torch.manual_seed(5)
    run = ["--mode", "validate", "--checkpoint", best, "--cpu", "--run-dir", str(trained.parent)]
    assert main([*run, "--identifier", "again", "--optim.eval_batch_size=3"]) == 0
    (first, again) = (
        json.loads((folder / "results" / "metrics.json").read_text())["splits"]["val_unknown"]
        for folder in (trained, trained.parent / "again")
    )
    for name in ("energy_mae", "forces_mae"):
        assert again[name] == pytest.approx(first[name], rel=1e-5)
