"""`benchmark gpu` on a CPU: what it finds is right, and the whole command runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from faenet_ocp.benchmark import gpu, gpu_speed
from faenet_ocp.benchmark.gpu import Settings
from faenet_ocp.benchmark.gpu_batch import Network, loss_of, made_batch, make_faenet, make_published

SMALL = Settings(torch.device("cpu"), systems=4, largest=30, rounds=1, small=True)


def test_made_batches_are_systems_with_all_near_neighbours() -> None:
    batch = made_batch(3, largest=60)
    assert batch.batch.unique().tolist() == [0, 1, 2]
    source, target = batch.edge_index
    assert torch.equal(batch.batch[source], batch.batch[target])
    torch.testing.assert_close(batch.edge_vec, batch.pos[source] - batch.pos[target], rtol=0, atol=1e-5)
    assert (target.diff() >= 0).all() and (source != target).all()
    assert batch.edge_vec.norm(dim=1).max() < 6 and torch.bincount(target).max() <= 40


def test_parts_of_a_batch_are_its_systems() -> None:
    batch, network = made_batch(4, largest=30), make_faenet(small=True)
    whole, parts = network(batch), [network(batch.part(start, start + 2)) for start in (0, 2)]
    for place in (0, 1):
        torch.testing.assert_close(torch.cat([part[place] for part in parts]), whole[place], rtol=1e-5, atol=1e-6)
    losses = [loss_of(network, batch.part(start, start + 2)) for start in (0, 2)]
    torch.testing.assert_close(sum(losses) / 2, loss_of(network, batch))


def test_equal_numbers_and_unequal_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, bf16 = gpu.equality(SMALL)
    assert exact["outputs"] < 1e-5 and exact["gradients"] < 1e-5
    assert 1e-4 < bf16["outputs"] < 0.1
    right = Network.forward

    def wrong(network: Network, batch: gpu.MadeBatch) -> tuple[torch.Tensor, torch.Tensor]:
        energy, forces = right(network, batch)
        return energy, forces * (1.01 if forces.dtype == torch.float32 else 1)

    monkeypatch.setattr(Network, "forward", wrong)
    assert gpu.equality(SMALL)[0]["outputs"] > 1e-3


@pytest.mark.filterwarnings("ignore:graph_norm 'batch':UserWarning")
def test_the_published_network_has_the_same_settings_and_sees_the_same_edges() -> None:
    """Its embeddings of atoms and edges, and the parameters behind the energy, are as many; only its norms differ."""
    batch = made_batch(2, largest=30)
    published, ours = make_published(batch, small=True), make_faenet(small=True)
    energy, forces = published(batch)
    assert energy.shape == batch.energy.shape and forces.shape == batch.forces.shape
    vectors: list[torch.Tensor] = []
    published.network.embed_block.register_forward_pre_hook(lambda module, given: vectors.append(given[1]))
    published(batch)
    torch.testing.assert_close(vectors[0], batch.edge_vec, rtol=0, atol=1e-6)
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (published, ours)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_a_plain_network_waits_only_where_a_cpu_checks_elements() -> None:
    found = gpu.waits(SMALL)
    assert set(found["waits"]) == {"_local_scalar_dense in models/base.py:check_elements"}
    assert found["launches"] > 300 and found["bytes_by_place"]["models/message_passing.py"] > 0


def test_the_plain_network_compiles_without_a_graph_break() -> None:
    """In one piece; the code that is generated is not what is tested."""
    torch.compiler.reset()
    network, batch = make_faenet(small=True), made_batch(3, largest=30)
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="eager")
    for one in (batch, made_batch(2, largest=20, seed=1)):
        for found, expected in zip(compiled(one), network(one), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_forward_and_backward_compile_in_one_piece_each() -> None:
    torch.compiler.reset()
    network, batch = make_faenet(small=True), made_batch(3, largest=30)
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(loss_of(net, batch), list(network.parameters())[:20]) for net in (compiled, network)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_launches_of_generated_code_are_counted() -> None:
    """A product, and all that follows it as one; backward one operation before the two products."""

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ weight) + 1).square()

    torch.compiler.reset()
    x, weight = torch.ones(8, 8, requires_grad=True), torch.ones(8, 8, requires_grad=True)
    compiled = torch.compile(function, dynamic=False)
    assert gpu_speed._first_call(lambda: compiled(x.detach(), weight.detach()))["launches"] == 2
    torch.compiler.reset()
    assert gpu_speed._first_call(lambda: compiled(x, weight).backward(torch.ones(8, 8)))["launches"] == 5


def test_its_first_part_needs_no_fairchem() -> None:
    code = (
        "import sys; from faenet_ocp.benchmark import gpu; "
        "assert not {'fairchem', 'lmdb', 'ase', 'faenet_ocp.kernels'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_done_is_kept_when_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(settings: Settings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "ranks", interrupted)
    saved: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        gpu.run(SMALL, save=lambda result: saved.append(dict(result)), trainer=False)
    assert {"limits", "equality", "waits"} < saved[-1].keys() and "ranks" not in saved[-1]
    assert "equality: `" in gpu.markdown(saved[-1])


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    output = tmp_path / "new" / "gpu.json"
    command = [
        sys.executable,
        "-m",
        "faenet_ocp.benchmark",
        "gpu",
        "--device",
        "cpu",
        "--quick",
        "--output",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(output.read_text())
    assert done.stdout.endswith(output.with_suffix(".md").read_text())
    timed = [row for row in result["speed"] if "unavailable" not in row]
    compiled = {f"FAENet, torch.compile, {shapes} shapes" for shapes in ("dynamic", "static")}
    assert {row["model"] for row in timed} == {"FAENet", "SchNet", "published faenet 0.1.3", *compiled}
    assert all(row["samples_per_s"] > 0 for row in timed)
    gloo, nccl = result["ranks"]
    assert gloo["gradients"] < 1e-5 and nccl["unavailable"] == "no CUDA"
    assert result["trainer"]["steps"] == 20 and result["trainer"]["largest_difference"] < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--device cuda: torch finds no GPU here"):
        gpu.main(["--device", "cuda", "--output", str(tmp_path / "out.json")])
    assert not list(tmp_path.iterdir())
