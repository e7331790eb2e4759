"""The benchmark: generated systems, its result and reports; never how long anything takes."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from faenet_ocp.benchmark import __main__ as benchmark_main
from faenet_ocp.benchmark import models
from faenet_ocp.benchmark.__main__ import main
from faenet_ocp.benchmark.measure import measure
from faenet_ocp.benchmark.models import OC20_TASKS
from faenet_ocp.benchmark.systems import (
    LARGEST,
    SMALLEST,
    make_batch,
    make_slab,
    make_systems,
    read_systems,
    slab_sizes,
)
from faenet_ocp.launch import cli

GRAPH = {"cutoff": 6.0, "max_neighbors": 40}
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:graph_norm 'batch':UserWarning")


# ------------------------------------------------------------------------------------ systems
@pytest.mark.parametrize("size", [3, SMALLEST, 40, LARGEST])
def test_slabs_have_the_atoms_asked_for(size: int) -> None:
    slab = make_slab(size, 1, **GRAPH)
    assert len(slab.pos) == int(slab.natoms) == len(slab.forces) == size
    assert set(slab.tags.tolist()) >= {1, 2}
    assert torch.equal(slab.fixed, (slab.tags == 0).long())
    assert slab.edge_index.shape[1] == int(slab.nedges)
    vectors = slab.pos[slab.edge_index[0]] - slab.pos[slab.edge_index[1]] + slab.cell_offsets @ slab.cell[0]
    assert 0.3 < vectors.norm(dim=1).min() <= vectors.norm(dim=1).max() < 6.001
    assert torch.equal(make_slab(size, 1, **GRAPH).pos, slab.pos)
    assert not torch.equal(make_slab(size, 2, **GRAPH).pos, slab.pos)


def test_sizes_are_those_of_oc20() -> None:
    with pytest.raises(ValueError, match=r"num_atoms: .* at least 3 atoms, not 2"):
        make_slab(2, 0, **GRAPH)
    sizes = slab_sizes(2000)
    assert min(sizes) >= SMALLEST and max(sizes) == LARGEST
    assert 70 < sum(sizes) / len(sizes) < 85


def test_subsurface_atoms_are_removed_from_the_batch() -> None:
    full = make_batch(make_systems([30, 50], remove_subsurface=False, **GRAPH), CPU)
    cut = make_batch(make_systems([30, 50], remove_subsurface=True, **GRAPH), CPU)
    assert full.natoms.tolist() == [30, 50]
    assert (full.tags == 0).any() and not (cut.tags == 0).any()
    assert cut.natoms.tolist() == [(full.tags[full.batch == system] > 0).sum().item() for system in (0, 1)]


def test_systems_of_an_lmdb(small_is2re: Path) -> None:
    path = small_is2re / "is2re" / "all" / "val_id" / "data.lmdb"
    systems = read_systems(path, 6, remove_subsurface=True, labels=["energy"], **GRAPH)
    assert len(systems) == 6
    assert torch.equal(systems[4].pos, systems[0].pos) and not torch.equal(systems[1].pos, systems[0].pos)


# ------------------------------------------------------------------------------------ measuring
def test_functions_are_measured_in_turn() -> None:
    calls: list[str] = []
    results = measure([lambda: calls.append("a"), lambda: calls.append("b")], CPU, 3)
    assert calls == 4 * ["a", "a", "b", "b"]  # once before and in three rounds; short ones always twice
    assert [len(result["seconds"]) for result in results] == [3, 3]
    for clock, ratio in (("seconds", "speed_up"), ("wall_seconds", "speed_up_wall")):
        first, second = (sorted(result[clock])[1] for result in results)
        assert [result[ratio] for result in results] == [1, first / second]


def test_peak_of_memory_is_seen() -> None:
    size = 64 * 2**20
    (result,) = measure([lambda: torch.ones(size // 4).sum()], CPU, 1)
    if result["peak_bytes"] is not None:
        assert 0.9 * size < result["peak_bytes"] < 3 * size


# ------------------------------------------------------------------------------------ models
@pytest.mark.parametrize("task", OC20_TASKS)
def test_published_weights_give_equal_outputs(task: str) -> None:
    if not all(importlib.util.find_spec(name) for name in ("faenet", "pandas")):
        pytest.skip("extra `reference` is not installed")
    batch = make_batch(make_systems([30, 60], remove_subsurface=True, **GRAPH), CPU)
    theirs, ours = models.published(task, small=True), models.shipped(task, small=True, graph_norm="batch")
    for contender in (theirs, ours):
        contender.module.eval()
    expected, before = theirs(batch), ours(batch)
    models.same_weights(ours, theirs)
    for name, value in ours(batch).items():
        assert (value - expected[name]).abs().max() < 1e-5 * expected[name].abs().max()
        assert (before[name] - expected[name]).abs().max() > 1e-2 * expected[name].abs().max()  # negative control
    assert "torch_scatter" not in sys.modules


def test_forces_of_schnet_are_those_of_its_energy() -> None:
    batch = make_batch(make_systems([8], remove_subsurface=False, **GRAPH), CPU)
    for name in ("pos", "cell", "cell_offsets", "energy", "forces"):
        if name in batch:
            setattr(batch, name, getattr(batch, name).double())
    model = models.shipped("s2ef", "schnet", small=True)
    model.module.double()
    forces = model(batch)["forces"]
    energies = []
    for step in (1e-4, -2e-4):
        batch.pos[3, 0] += step
        energies.append(model(batch)["energy"].item())
    assert forces[3, 0].item() == pytest.approx(-(energies[0] - energies[1]) / 2e-4, rel=1e-3)


def test_forces_of_the_gradient_sum_to_zero_and_leave_the_batch_as_it_is() -> None:
    batch = make_batch(make_systems([12, 20], remove_subsurface=False, **GRAPH), CPU)
    frames = {"method": "canonical", "dim": 2, "group": "SE"}
    predicted, gradient = (models.shipped("s2ef", small=True, frames=frames, conservative=on) for on in (False, True))
    sums = [contender(batch)["forces"].detach().sum(dim=0).norm() for contender in (predicted, gradient)]
    assert sums[1] < 1e-4 * gradient(batch)["forces"].abs().sum() < sums[0]
    assert not batch.pos.requires_grad
    assert torch.equal(predicted(batch)["energy"], gradient(batch)["energy"])


# ------------------------------------------------------------------------------------ the command
def _groups(output: Path, *arguments: str) -> list[dict[str, Any]]:
    main(["--quick", "--output", str(output), "--groups", *arguments])
    result = json.loads(output.read_text())
    assert {"date", "device", "threads", "versions", "settings", "groups"} <= set(result)
    return result["groups"]


def test_a_quick_run_writes_json_and_tables(tmp_path: Path) -> None:
    names = ["published", "frames", "forces", "batch sizes", "system sizes"]
    groups = _groups(tmp_path / "new" / "out.json", *names)
    assert {group["name"] for group in groups} == set(names)
    for group in groups:
        for row in group.get("rows", []):
            assert len(row["seconds"]) == len(row["wall_seconds"]) == 1
            assert row["speed_up"] > 0
            if "difference" in row:
                assert max(row["difference"].values()) < (1e-5 if row["precision"] == "fp32" else 0.1)
    tables = (tmp_path / "new" / "out.md").read_text()
    assert tables.count("### ") == len(groups)
    assert "| frames: full | 0.03 M | 2 |" in tables


@pytest.mark.parametrize("own_file", [False, True])
def test_the_same_systems_are_loaded_in_each_way(small_is2re: Path, tmp_path: Path, own_file: bool) -> None:
    lmdb = ["--lmdb", str(small_is2re / "is2re/all/train/data.lmdb")] if own_file else []
    (group,) = _groups(tmp_path / "out.json", "data", *lmdb)
    stock, single, whole, packed = group["rows"]
    assert {row["systems"] for row in group["rows"]} == {16} and stock["edges"] > stock["atoms"] > 16 * 4
    assert stock["speed_up"] == 1
    assert stock["bytes"] == single["bytes"] == whole["bytes"] > packed["bytes"]
    assert f"{stock['bytes'] / 16000:.1f} |" in (tmp_path / "out.md").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # EScAIP under autocast
def test_peers_run(tmp_path: Path) -> None:
    names = {
        row["model"] for group in _groups(tmp_path / "out.json", "peers", "--batch-size", "1") for row in group["rows"]
    }
    shown = {{"faenet": "FAENet"}.get(model, model) for model in models.PEERS}
    assert names == shown | {f"{name}, bf16" for name in shown}


def test_a_package_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    groups = _groups(tmp_path / "out.json", "published")
    assert [group["task"] for group in groups] == list(OC20_TASKS)
    assert all("pandas" in group["unavailable"] for group in groups)
    assert "not available: " in (tmp_path / "out.md").read_text()


def test_launches_are_counted(tmp_path: Path) -> None:
    groups = _groups(tmp_path / "out.json", "launches")
    assert [group["task"] for group in groups] == list(OC20_TASKS)
    for group in groups:
        ours = group["rows"][-1]
        assert ours["model"] == "FAENet" and 100 < ours["launches"][0] < ours["launches"][1]
        assert sum(ours["bytes_by_place"].values()) == ours["moved_bytes"][0]
        assert len(ours["largest"]) == 3
    assert "| launches forward |" in (tmp_path / "out.md").read_text()


def test_mode_benchmark(small_is2re: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same arguments through main.py; those of runs have no meaning."""
    lmdb = str(small_is2re / "is2re/all/train/data.lmdb")
    arguments = ["--mode", "benchmark", "--output", str(tmp_path / "out.json")]
    assert cli.main([*arguments, "--num-gpus", "2"]) == 2
    assert "--num-gpus: has no meaning with --mode benchmark" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--optim.batch_size=3"])
    assert "unrecognized arguments: --optim.batch_size=3" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    quick = ["--quick", "--groups", "batch sizes", "--batch-sizes", "1", "3", "--keep-subsurface", "--lmdb", lmdb]
    assert cli.main([*arguments, *quick]) == 0
    assert "### batch sizes: IS2RE, inference" in capsys.readouterr().out
    group, _ = json.loads((tmp_path / "out.json").read_text())["groups"]
    assert [(row["systems"], row["atoms"] > 12 * row["systems"]) for row in group["rows"]] == [(1, True), (3, True)]


def test_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--quick", "--groups", "data", "--lmdb", "none.lmdb", "--output", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit, match=r"^error: [^\n]*none.lmdb[^\n]*$"):
        runpy.run_path(benchmark_main.__file__, run_name="__main__")


@pytest.mark.slow  # a process of its own for each file
def test_files_and_evaluations_of_several_sizes(tmp_path: Path) -> None:
    records, evaluation = _groups(tmp_path / "out.json", "records", "evaluation")
    assert [(row["model"], row["systems"]) for row in records["rows"]] == [
        ("300 records", 300),
        ("1,000 records", 1000),
    ]
    for row in records["rows"]:
        assert row["start_seconds"] > 0 and 5 * row["systems"] <= row["atoms"] <= 8 * row["systems"]
        assert row["bytes"] > 1000 * row["systems"] and row["edges"] > row["atoms"]
    assert [row["systems"] for row in evaluation["rows"]] == [256, 768]
    assert "| start ms |" in (tmp_path / "out.md").read_text()
