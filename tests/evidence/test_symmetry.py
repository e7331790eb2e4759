"""`--mode symmetry`: motions, what they leave equal, and the command on a trained checkpoint, on one and two ranks."""

import json
import runpy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from faenet_ocp import build
from faenet_ocp.config.schema import build_config
from faenet_ocp.evidence import symmetry
from faenet_ocp.launch.cli import main
from faenet_ocp.models.frame_averaging import with_graph
from faenet_ocp.tasks.tasks import make_tasks
from models.suite import SMALL_FAENET, slabs

ROOT = Path(__file__).resolve().parents[2]
SPACE = ("rotated", "reflected", "translated", "permuted")


def _measure(root: Path, model: dict[str, Any], **frames: Any) -> symmetry.Found:
    raw = {
        "trainer": "faenet",
        "task": "s2ef",
        "dataset": {
            "root": str(root),
            "val": {"val_id": {"src": "s2ef/all/val_id"}},
            "transforms": {"remove_subsurface": {}},
        },
        "model": model,
        "frames": {"method": "canonical", "dim": 2, "group": "E", **frames},
        "optim": {"lr_initial": 1e-3, "batch_size": 4, "max_epochs": 1},
        "job": {"precision": "float64"},
    }
    config = build_config(raw)
    network = build.make_model(config)
    for name, buffer in network.named_buffers():
        if "running_mean" in name:
            buffer.uniform_(-0.1, 0.1)
    found = symmetry.measure(
        network,
        make_tasks(config, {}),
        build.make_dataset(config, config.dataset.val["val_id"]),
        transforms=config.dataset.transforms,
        dim=config.frames.dim,
        max_systems=6,
        batch_size=4,
        seed=0,
    )
    assert found is not None
    return found


def _worst(found: symmetry.Found, method: str, motion: str) -> float:
    return max(float(found.differences[method, motion, name].max()) for name in ("energy", "forces"))


def test_exact_frames_are_exact_and_others_are_not(small_s2ef: Path) -> None:
    found = _measure(small_s2ef, {"name": "faenet", **SMALL_FAENET})
    assert found.num_systems == 4  # all that there are
    for motion in SPACE:
        assert max(_worst(found, method, motion) for method in ("full", "canonical")) < 1e-9
    for method in ("none", "stochastic", "det"):  # the negative control
        assert _worst(found, method, "rotated") > 1e-4 or method == "det"
        assert _worst(found, method, "reflected") > 1e-4
    assert _worst(found, "none", "translated") < 1e-9 and _worst(found, "none", "permuted") < 1e-9
    assert _worst(found, "stochastic", "same") > 1e-4 > 1e-9 > _worst(found, "full", "same")
    positions = {method: found.differences[method, "rotated", symmetry.POSITIONS].max() for method in symmetry.METHODS}
    assert positions["full"] < 1e-9 > positions["canonical"] and positions["none"] > 0.1


def test_special_frames_are_no_mirrors(small_s2ef: Path) -> None:
    found = _measure(small_s2ef, {"name": "faenet", **SMALL_FAENET}, group="SE", dim=3)
    assert _worst(found, "full", "rotated") < 1e-9 and _worst(found, "full", "reflected") > 1e-4


def test_an_invariant_model_needs_no_frames(small_s2ef: Path) -> None:
    """Also not for images: atoms moved by lattice vectors, which frames do not know."""
    found = _measure(small_s2ef, {"name": "painn", "hidden_channels": 16, "num_interactions": 1})
    for motion in (*SPACE, "lattice", "wrapped"):
        assert _worst(found, "none", motion) < 1e-9


@pytest.mark.parametrize("name", [name for name in symmetry.MOTIONS if name != "same"])
def test_motions_keep_distances(name: str) -> None:
    """Between neighbours of the graph built anew, whatever has become of positions and order."""
    batch = slabs(2)
    generators = [torch.Generator().manual_seed(system) for system in range(2)]
    moved = symmetry.move(batch, name, dim=3, generators=generators).batch
    assert not torch.equal(moved.pos, batch.pos) or name == "wrapped"
    lengths = []
    for one in (batch, moved):
        one = with_graph(one, 4.0, None)
        cells = one.cell[one.batch[one.edge_index[1]]]
        vectors = one.pos[one.edge_index[0]] - one.pos[one.edge_index[1]]
        vectors = vectors + torch.einsum("ei,eij->ej", one.cell_offsets, cells)
        lengths.append(vectors.norm(dim=1).sort().values)
    torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-9, atol=1e-9)


def _command(data: Path, checkpoint: Path, runs: Path) -> list[str]:
    command = ["--mode", "symmetry", "--checkpoint", str(checkpoint), f"--dataset.root={data}", "--cpu"]
    return [*command, "--run-dir", str(runs), "--max-systems", "3", "--symmetry-dim", "2"]


def test_transforms_that_are_switched_off_stay_off(
    small_s2ef: Path, s2ef_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = Mock(wraps=symmetry.Compose)
    monkeypatch.setattr(symmetry, "Compose", composed)
    for value in ("{}", "false"):
        switch = f"--dataset.transforms.remove_subsurface={value}"
        assert (
            main([*_command(small_s2ef, s2ef_checkpoint, tmp_path), "--identifier", f"with_{len(value)}", switch]) == 0
        )
    assert [list(call.args[0]) for call in composed.call_args_list] == [["remove_subsurface"], []]


def test_the_command(small_s2ef: Path, s2ef_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The paper's rows stand beside; results are not overwritten."""
    command = _command(small_s2ef, s2ef_checkpoint, tmp_path)
    assert main([*command, "--identifier", "one"]) == 0
    found = json.loads((tmp_path / "one" / "results" / "symmetry.json").read_text())
    printed = capsys.readouterr().out
    assert "F-Rot-E" in printed and "Full FA, the paper's" in printed and "results:" in printed
    assert found["num_systems"] == 3
    energies = found["methods"]["none"]["rotated"]["energy"]
    assert energies["mean"] <= energies["p95"] <= energies["max"]
    assert energies["percent"] == pytest.approx(100 * energies["mean"] / found["mean_absolute_labels"]["energy"])
    assert (tmp_path / "one" / "results" / "symmetry.png").stat().st_size > 10_000
    assert main([*command, "--identifier", "one"]) == 2
    assert "has results already" in capsys.readouterr().err
    script = runpy.run_path(str(ROOT / "scripts" / "symmetry_table.py"))["main"]
    script([str(tmp_path / "one"), "--output", str(tmp_path / "runs.json")])
    table, ((name, kept),) = capsys.readouterr().out, json.loads((tmp_path / "runs.json").read_text()).items()
    rows = [line for line in table.splitlines() if line.startswith(f"| {name} ")]
    assert f" {1e3 * energies['mean']:.3g} |" in rows[0] and len(rows) == 2 == len(kept)
    with pytest.raises(SystemExit, match=r"has no results/symmetry\.json"):
        script([str(tmp_path)])
    assert main(["--config", "x.yml", "--max-systems", "3"]) == 2
    assert "--max-systems: is for --mode symmetry" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_find_the_same(small_s2ef: Path, s2ef_checkpoint: Path, tmp_path: Path) -> None:
    """But for frames drawn at random."""
    command, found = _command(small_s2ef, s2ef_checkpoint, tmp_path), []
    for ranks in ("1", "2"):
        assert main([*command, "--identifier", ranks, "--num-gpus", ranks]) == 0
        found.append(json.loads((tmp_path / ranks / "results" / "symmetry.json").read_text()))
    assert found[0]["num_systems"] == found[1]["num_systems"] == 3
    for method in ("none", "canonical"):
        for target in ("energy", "forces"):
            means = [document["methods"][method]["rotated"][target]["mean"] for document in found]
            assert means[0] == pytest.approx(means[1], rel=0.05, abs=1e-5)


def test_a_summary_is_of_all_systems() -> None:
    values = np.arange(101.0)
    assert [function(values) for function in symmetry.SUMMARIES.values()] == [50.0, 95.0, 100.0]
