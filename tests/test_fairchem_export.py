"""Checkpoints in fairchem's own format: its calculator gives our numbers, and where it cannot."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
from ase.build import molecule
from fairchem.core import FAIRChemCalculator
from fairchem.core.units.mlip_unit import load_predict_unit

import small_runs
from faenet_ocp.calculator import FAENetCalculator, Predictor
from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.fairchem_export import export_fairchem, make_exported_model

REFERENCES = np.linspace(-1, 1, 119)


@pytest.fixture(scope="module")
def checkpoint(small_s2ef: Path) -> Path:
    return small_runs.train("s2ef", small_s2ef)


@pytest.fixture
def state(checkpoint: Path) -> dict[str, Any]:
    """With references of elements, to see that they survive."""
    state = load_checkpoint(checkpoint)
    state["tasks"]["energy"]["element_references"] = REFERENCES.tolist()
    return state


def _both(state: dict[str, Any], path: Path, frames: str) -> tuple[FAENetCalculator, FAIRChemCalculator]:
    export_fairchem(state, path, frames=frames)
    theirs = FAIRChemCalculator(load_predict_unit(path, "batch", device="cpu"))
    return FAENetCalculator(Predictor(state, frames=frames, device="cpu")), theirs


def _wrapped(index: int) -> ase.Atoms:
    atoms = small_runs.slab(index)
    atoms.wrap(eps=0)
    return atoms


@pytest.mark.parametrize("frames", ["canonical", "full"])
def test_fairchems_calculator_gives_our_numbers(
    checkpoint: Path, state: dict[str, Any], tmp_path: Path, frames: str
) -> None:
    ours, theirs = _both(state, tmp_path / "export.pt", frames)
    plain = FAENetCalculator.from_checkpoint(checkpoint, frames=frames)
    assert [path.name for path in tmp_path.iterdir()] == ["export.pt"]
    assert theirs.task_name == "small data"
    for atoms in (_wrapped(0), _wrapped(1), _wrapped(2), molecule("CH3OH", tags=2)):
        energy = theirs.get_potential_energy(atoms)
        assert energy == pytest.approx(ours.get_potential_energy(atoms), abs=1e-5)
        assert energy == pytest.approx(plain.get_potential_energy(atoms) + REFERENCES[atoms.numbers].sum(), abs=1e-4)
        np.testing.assert_allclose(theirs.get_forces(atoms), ours.get_forces(atoms), rtol=0, atol=1e-5)


def test_fairchem_wraps_atoms_and_frames_follow(state: dict[str, Any], tmp_path: Path) -> None:
    """The one difference between the two calculators: an atom beyond the border of the cell."""
    ours, theirs = _both(state, tmp_path / "export.pt", "canonical")
    atoms = _wrapped(1)
    before = ours.get_potential_energy(atoms), theirs.get_potential_energy(atoms)
    atoms.positions[-1] += atoms.cell[0] + atoms.cell[1]
    assert theirs.get_potential_energy(atoms) == pytest.approx(before[1], abs=1e-5)
    assert abs(ours.get_potential_energy(atoms) - before[0]) > 1e-5


def test_what_cannot_be_exported(state: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes no overrides, got \['cutoff', 'model'\]"):
        make_exported_model({"model": "faenet", "cutoff": 5.0}, state["config"])
    state["config"]["dataset"]["transforms"] = {"remove_subsurface": {}}
    with pytest.raises(ValueError, match=r"transforms \(remove_subsurface\) would be missing"):
        export_fairchem(state, tmp_path / "export.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_and_a_process_that_has_not_imported_this_package(checkpoint: Path, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "scripts" / "export_fairchem.py"
    path = tmp_path / "export.pt"
    subprocess.run([sys.executable, script, "--checkpoint", checkpoint, "--output", path], check=True)
    code = f"""
        from ase.build import molecule
        from fairchem.core import FAIRChemCalculator
        from fairchem.core.units.mlip_unit import load_predict_unit
        atoms = molecule("H2O", tags=2)
        atoms.calc = FAIRChemCalculator(load_predict_unit({str(path)!r}, "batch", device="cpu"))
        assert atoms.get_forces().shape == (3, 3)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
