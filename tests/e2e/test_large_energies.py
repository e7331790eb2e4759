"""Total energies of a million eV: what references or the mean take away changes no number."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import processes
import small_data
from faenet_ocp import FAENetCalculator
from faenet_ocp.launch.cli import main
from faenet_ocp.prepare.pack import pack

PER_ATOM = -1.6e5 + 1e3 * np.sin(np.arange(119.0))
TOLERANCE = 1e-4


def _write(root: Path, *, per_atom: np.ndarray | float = 0.0, constant: float = 0.0) -> Path:
    for number, (split, count) in enumerate((("train", 12), ("val", 5))):
        fields = [small_data.make_fields(i, task="s2ef", edges=False, seed=number) for i in range(count)]
        for record in fields:
            shares = np.broadcast_to(per_atom, 119)[record["atomic_numbers"].long().numpy()]
            record["y"] += constant + float(shares.sum())
        small_data.write_lmdb(root / f"{split}.lmdb", [small_data.dump_record(record) for record in fields])
    return root


def _run(root: Path, energy: dict[str, str], **dataset: Any) -> tuple[dict[str, float], dict[str, Any], Path]:
    """Metrics and baselines of the validation split, and the run's folder."""
    config = processes.write_config(root / "c.yml", root, outputs={"energy": energy}, frames={"method": "canonical"})
    settings = [f"--dataset.{key}={value}" for key, value in dataset.items()]
    assert main(["--config", str(config), "--identifier", "r", *settings]) == 0
    results = json.loads((root / "r" / "results" / "metrics.json").read_text())
    return results["splits"]["v"], results["baselines"], root / "r"


def _predictions(root: Path, run: Path) -> np.ndarray:
    checkpoint = str(run / "checkpoints" / "best.pt")
    flags = ["--mode", "predict", "--checkpoint", checkpoint, "--run-dir", str(root), "--identifier", "p"]
    assert main(flags) == 0
    with np.load(root / "p" / "results" / "predictions" / "v.npz") as content:
        return content["energy"]


def test_an_offset_of_each_atom_goes_into_the_references(tmp_path: Path) -> None:
    """From packed files, to metrics, baselines, predictions and the calculator."""
    both = {"normalizer": "fit", "element_references": "fit"}
    metrics, baselines, run = _run(_write(tmp_path / "plain"), both)
    for split in ("train", "val"):
        pack(_write(tmp_path / "large", per_atom=PER_ATOM) / f"{split}.lmdb", tmp_path / "packed" / f"{split}.lmdb")
    large_metrics, large_baselines, large_run = _run(tmp_path / "packed", both, format="oc20_packed")
    assert large_metrics == pytest.approx(metrics, abs=TOLERANCE)
    linear, large_linear = (found["linear_in_composition"]["splits"]["v"] for found in (baselines, large_baselines))
    assert large_linear == pytest.approx(linear, abs=TOLERANCE)

    slabs = [small_data.make_slab(i, seed=1) for i in range(5)]
    offset = np.array([PER_ATOM[atoms.numbers].sum() for atoms in slabs])
    assert (offset < -1e6).all()
    energies, large = _predictions(tmp_path, run), _predictions(tmp_path / "packed", large_run)
    np.testing.assert_allclose(large - offset, energies, rtol=0, atol=TOLERANCE)
    calculator = FAENetCalculator.from_checkpoint(large_run / "checkpoints" / "best.pt", device="cpu")
    found = [calculator.get_potential_energy(atoms) for atoms in slabs]
    np.testing.assert_allclose(found, large, rtol=0, atol=TOLERANCE)


def test_the_same_offset_of_all_systems_goes_into_the_mean(tmp_path: Path) -> None:
    metrics, baselines, _ = _run(_write(tmp_path / "plain"), {"normalizer": "fit"})
    large_metrics, large_baselines, _ = _run(_write(tmp_path / "large", constant=-1e6), {"normalizer": "fit"})
    assert large_metrics == pytest.approx(metrics, abs=TOLERANCE)
    mean, large_mean = (found["mean_predictor"]["splits"]["v"] for found in (baselines, large_baselines))
    assert large_mean == pytest.approx(mean, abs=TOLERANCE)
