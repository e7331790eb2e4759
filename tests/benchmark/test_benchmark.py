"""The benchmark: generated systems, its result and reports; never how long anything takes."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from faenet_ocp.benchmark import models
from faenet_ocp.benchmark.measure import measure, ratio
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
from faenet_ocp.training.unit import OCPTrainUnit

ROOT = Path(__file__).resolve().parents[2]
GRAPH = {"cutoff": 6.0, "max_neighbors": 40}
CPU = torch.device("cpu")
TRACING = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own


def load_script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_script", ROOT / "scripts" / "benchmark.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [3, SMALLEST, 40, LARGEST])
def test_slabs_have_the_atoms_asked_for(size):
    slab = make_slab(size, 1, **GRAPH)

    assert len(slab.pos) == int(slab.natoms) == size
    assert set(slab.tags.tolist()) >= {1, 2}
    assert slab.edge_index.shape[1] == int(slab.nedges)
    vectors = slab.pos[slab.edge_index[0]] - slab.pos[slab.edge_index[1]] + slab.cell_offsets @ slab.cell[0]
    assert 0.3 < vectors.norm(dim=1).min() <= vectors.norm(dim=1).max() < 6.001
    assert torch.equal(make_slab(size, 1, **GRAPH).pos, slab.pos)
    assert not torch.equal(make_slab(size, 2, **GRAPH).pos, slab.pos)


def test_too_small_a_slab_is_refused():
    with pytest.raises(ValueError, match=r"num_atoms: .* at least 3 atoms, not 2"):
        make_slab(2, 0, **GRAPH)


def test_sizes_are_those_of_oc20():
    sizes = slab_sizes(2000)

    assert min(sizes) >= SMALLEST and max(sizes) == LARGEST
    assert 70 < sum(sizes) / len(sizes) < 85


def test_subsurface_atoms_are_removed_from_the_batch():
    full = make_batch(make_systems([30, 50], remove_subsurface=False, **GRAPH), CPU)
    cut = make_batch(make_systems([30, 50], remove_subsurface=True, **GRAPH), CPU)

    assert full.natoms.tolist() == [30, 50]
    assert (full.tags == 0).any() and not (cut.tags == 0).any()
    assert cut.natoms.tolist() == [(full.tags[full.batch == system] > 0).sum().item() for system in (0, 1)]


def test_systems_of_an_lmdb(oc20_sample):
    path = oc20_sample / "is2re" / "all" / "val_id" / "data.lmdb"
    systems = read_systems(path, 12, remove_subsurface=True, labels=["energy"], **GRAPH)

    assert len(systems) == 12
    assert torch.equal(systems[10].pos, systems[0].pos)


def test_functions_are_measured_in_turn():
    calls = []
    results = measure([lambda: calls.append("a"), lambda: calls.append("b")], CPU, 3)

    assert calls == ["a", "a", "b", "b", "a", "b", "a", "b", "a", "b"]
    assert [len(result["seconds"]) for result in results] == [3, 3]
    assert [len(result["wall_seconds"]) for result in results] == [3, 3]
    assert ratio({"seconds": [2.0, 4.0, 9.0]}, {"seconds": [1.0, 2.0, 2.0]}) == 2.0


def test_peak_of_memory_is_seen():
    size = 64 * 2**20
    result = measure([lambda: torch.ones(size // 4).sum()], CPU, 1)[0]
    if result["peak_bytes"] is not None:
        assert 0.9 * size < result["peak_bytes"] < 3 * size


@pytest.mark.filterwarnings("ignore:graph_norm 'batch':UserWarning")
@pytest.mark.parametrize("task", models.TASKS)
def test_published_weights_give_equal_outputs(task):
    if not all(importlib.util.find_spec(name) for name in ("faenet", "pandas")):
        pytest.skip("extra `reference` is not installed")
    batch = make_batch(make_systems([30, 60], remove_subsurface=True, **GRAPH), CPU)
    theirs, ours = models.published(task, models.small(task)), models.faenet(task, models.small(task))
    for contender in (theirs, ours):
        contender.module.eval()

    expected, before = theirs(batch), ours(batch)
    models.same_weights(ours, theirs)
    for name, value in ours(batch).items():
        assert (value - expected[name]).abs().max() < 1e-5 * expected[name].abs().max()
        assert (before[name] - expected[name]).abs().max() > 1e-2 * expected[name].abs().max()  # negative control
    assert "torch_scatter" not in sys.modules


def test_forces_of_schnet_are_those_of_its_energy():
    batch = make_batch(make_systems([8], remove_subsurface=False, **GRAPH), CPU)
    for name in ("pos", "cell", "cell_offsets"):
        setattr(batch, name, getattr(batch, name).double())
    model = models.schnet("s2ef")
    model.module.double()
    forces = model(batch)["forces"]
    energies = []
    for step in (1e-4, -1e-4):
        batch.pos[3, 0] += step
        energies.append(model(batch)["energy"].item())
        batch.pos[3, 0] -= step

    assert forces[3, 0].item() == pytest.approx(-(energies[0] - energies[1]) / 2e-4, rel=1e-3)


@pytest.mark.filterwarnings("ignore:graph_norm 'batch':UserWarning")
def test_quick_run_writes_json_and_tables(tmp_path):
    groups = ["published", "frames", "batch sizes", "system sizes"]
    load_script().main(["--quick", "--groups", *groups, "--output", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())

    assert {"date", "device", "threads", "versions", "settings", "groups"} <= set(result)
    assert {group["name"] for group in result["groups"]} == set(groups)
    for group in result["groups"]:
        if "unavailable" in group:
            continue
        for row in group["rows"]:
            assert len(row["seconds"]) == len(row["wall_seconds"]) == 1
            assert row["speed_up"] > 0
            if group["name"] == "published" and group["mode"] == "inference":
                limit = 1e-5 if row["precision"] == "fp32" else 0.1
                assert max(row["difference"].values()) < limit
    tables = (tmp_path / "out.md").read_text()
    assert tables.count("### ") == len(result["groups"])
    assert "frames: full" in tables
    assert not (tmp_path / "out.png").exists()


def test_the_engine_is_what_remains_of_a_step(tmp_path):
    """Through the command line."""
    output = tmp_path / "out.json"
    arguments = ["--mode", "benchmark", "--quick", "--groups", "engine", "--batch-size", "3", "--output", str(output)]
    before = OCPTrainUnit.train_step, torch.Tensor.backward
    assert cli.main(arguments) == 0
    (group,) = json.loads(output.read_text())["groups"]

    assert [step["systems"] for step in group["steps"]] == [3] * 4
    for step in group["steps"]:
        parts = [step[name] for name in ("forward", "backward", "optimiser")]
        assert min(parts) > 0
        assert sum(parts) < step["step"]
    assert "| share of the step's time | forward | backward | optimiser | everything else |" in (
        output.with_suffix(".md").read_text()
    )
    assert (OCPTrainUnit.train_step, torch.Tensor.backward) == before


def test_arguments_of_runs_have_no_meaning_for_the_benchmark(tmp_path, capsys):
    arguments = ["--mode", "benchmark", "--output", str(tmp_path / "out.json")]
    assert cli.main([*arguments, "--num-gpus", "2"]) == 2
    assert "--num-gpus: has no meaning with --mode benchmark" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--optim.batch_size=3"])
    assert "unrecognized arguments: --optim.batch_size=3" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_peers_run_and_are_drawn(tmp_path):
    arguments = ["--quick", "--groups", "peers", "--batch-size", "1", "--output", str(tmp_path / "out.json")]
    load_script().main(arguments)
    result = json.loads((tmp_path / "out.json").read_text())

    names = {row["model"] for group in result["groups"] for row in group["rows"]}
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert names == {"SchNet (PyG)", "SchNet (PyG), bf16", "FAENet", "FAENet, bf16", "eSCN-MD, small (fairchem)"}


@pytest.mark.slow
@TRACING
def test_losses_fall_alike(tmp_path, caplog):
    from faenet_ocp.benchmark.convergence import convergence

    curves = {curve["model"]: curve["losses"] for curve in convergence(60, CPU)}
    late = {name: sum(losses[-16:]) / 16 for name, losses in curves.items()}

    assert all(late[name] < 0.8 * sum(losses[:8]) / 8 for name, losses in curves.items())
    assert late["fp32, compiled"] == pytest.approx(late["fp32"], rel=0.02)
    assert late["bf16"] == pytest.approx(late["fp32"], rel=0.25)
    assert "compile: failed" not in caplog.text


@pytest.mark.slow
@TRACING
def test_compiled_rows_run(tmp_path, caplog):
    load_script().main(["--quick", "--groups", "compiled", "--output", str(tmp_path / "out.json")])
    groups = json.loads((tmp_path / "out.json").read_text())["groups"]

    assert [row["compiled"] for row in groups[0]["rows"]] == [False, True, False, True]
    assert groups[0]["rows"][1]["difference"]["energy"] < 1e-5
    assert "compile: failed" not in caplog.text


def test_forces_of_the_gradient_sum_to_zero_and_leave_the_batch_as_it_is():
    batch = make_batch(make_systems([12, 20], cutoff=6.0, max_neighbors=30, remove_subsurface=False), CPU)
    frames = {"method": "canonical", "dim": 2, "group": "SE"}
    predicted, gradient = (
        models.faenet("s2ef", models.small("s2ef"), frames=frames, graph_norm="system", conservative=conservative)
        for conservative in (False, True)
    )
    sums = [contender(batch)["forces"].detach().sum(dim=0).norm() for contender in (predicted, gradient)]
    assert sums[1] < 1e-4 * gradient(batch)["forces"].abs().sum() < sums[0]
    assert not batch.pos.requires_grad
    assert torch.equal(predicted(batch)["energy"], gradient(batch)["energy"])
