"""The same global batches on 1, 2 and 3 ranks give the same losses, weights, metrics and predictions."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from torch_geometric.nn.norm import GraphNorm

import processes
from faenet_ocp import build
from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.config.schema import build_config
from faenet_ocp.config.yaml import load_yaml
from faenet_ocp.data.loader import TrainBatchSampler, balanced_shares, collate, even_slice, make_loader
from faenet_ocp.launch.cli import main
from faenet_ocp.models import norms
from faenet_ocp.models.norms import RankBatchNorm, RankGraphNorm

LOSSES = [
    {"energy": {"fn": "mae", "coefficient": 1.0}},
    {"forces": {"fn": "l2mae", "coefficient": 10.0}},
    {"gradient": {"fn": "mse", "coefficient": 2.0}},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def dataset(data: Path, tmp_path: Path) -> Dataset:
    """The training set, with stochastic frames."""
    config = build_config(load_yaml(processes.write_config(tmp_path / "config.yml", data)))
    return build.make_dataset(config, config.dataset.train, training=True)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The folder of a run by (precision, ranks), each done once."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def get(precision: str, ranks: int) -> Path:
        # Biases before a norm have a gradient of exactly 0: AdamW would make steps of its rounding.
        optimizer = {"optimizer": "SGD"} if precision == "float32" else {"optimizer_params": {"eps": 1e-4}}
        config = processes.write_config(
            folder / f"{precision}_{ranks}.yml",
            data,
            model={"force_norm": "batch1d", "force_decoder_type": "res_updown"},
            loss_functions=LOSSES,
            optim={"clip_grad_norm": 50.0, "ema_decay": 0.9, "grad_accumulation": 2, **optimizer}
            | {"balance": "atoms" if ranks > 1 else "systems"},
            job={"precision": precision},
        )
        arguments = ["--config", str(config), "--identifier", config.stem]
        if ranks == 1:
            assert main(arguments) == 0
        else:
            processes.main_on_ranks(arguments, config.with_suffix(".log"), ranks=ranks)
        return folder / config.stem

    return get


@pytest.mark.parametrize(
    ("precision", "ranks"),
    [
        ("float64", 2),
        pytest.param("float32", 2, marks=pytest.mark.slow),
        pytest.param("float64", 3, marks=pytest.mark.slow),
        pytest.param("float32", 3, marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_on_any_number_of_ranks(
    run: Callable[[str, int], Path], precision: str, ranks: int
) -> None:
    """Energy, force and gradient terms, accumulation, clipping, EMA, atoms from 5 to 18, norms over the batch."""
    tolerance = {"float32": 1e-5, "float64": 1e-12}[precision]
    one, many = run(precision, 1), run(precision, ranks)
    steps = 0
    for a, b in zip(processes.records(one), processes.records(many), strict=True):
        steps += "train/loss" in a
        assert a.keys() == b.keys()
        for name, value in a.items():
            bound = tolerance if name.startswith("train") else 1e-6
            assert b[name] == pytest.approx(value, rel=bound, abs=bound), (name, a["step"])
    assert steps == 4
    states = [load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (one, many)]
    for key in ("model", "ema"):
        for name, value in states[0][key].items():
            # Running variances of the norms are of the order of 1, and so is every weight.
            torch.testing.assert_close(states[1][key][name], value, rtol=tolerance, atol=tolerance, msg=f"{key} {name}")
    results = [json.loads((folder / "results" / "metrics.json").read_text())["splits"]["v"] for folder in (one, many)]
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert results[1][name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert results[1]["num_systems"] == 5


# ------------------------------------------------------------------------------------------ norms


def _norm_results(norm: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> dict[str, Any]:
    """Two training steps of a norm: outputs, gradients of sum(weights * output^2), buffers."""
    x = x.clone().requires_grad_(True)
    norm.train()
    norm(x.detach() * 2 + 1)
    out = norm(x)
    (weights[:, None] * out.square()).sum().backward()
    grads = {name: parameter.grad for name, parameter in norm.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **grads, **dict(norm.named_buffers())}


@pytest.mark.parametrize("kind", ["batch", "graph"])
def test_norms_on_ranks_are_those_of_the_whole_batch(kind: str, tmp_path: Path) -> None:
    """Rows split 5 + 2 + 0 between three processes, against the plain layer on all seven; and the plain layer fails."""
    torch.manual_seed(0)
    x, weights = torch.randn(7, 4, dtype=torch.float64) * 3 + 10, torch.rand(7, dtype=torch.float64)
    plain, ranked = (nn.BatchNorm1d, RankBatchNorm) if kind == "batch" else (GraphNorm, RankGraphNorm)
    reference = plain(4).double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.rand(4) + 0.5)
    state = {name: value.clone() for name, value in reference.state_dict().items()}

    def results(cls: type[nn.Module], rows: slice) -> dict[str, Any]:
        norm = cls(4).double()
        norm.load_state_dict(state)
        return {name: value.numpy() for name, value in _norm_results(norm, x[rows], weights[rows]).items()}

    expected = results(plain, slice(None))
    assert all(np.allclose(results(ranked, slice(None))[name], value, atol=1e-14) for name, value in expected.items())
    parts = [slice(0, 5), slice(5, 7), slice(7, 7)]
    found = processes.on_ranks(3, lambda rank: results(ranked, parts[rank]), tmp_path)
    for name, value in expected.items():
        if name in ("out", "x"):
            got = np.concatenate([part[name] for part in found])
        elif name in dict(reference.named_parameters()):
            got = sum(part[name] for part in found)
        else:
            got = found[0][name]
            assert all(np.array_equal(part[name], got) for part in found), f"{name} differs between ranks"
        np.testing.assert_allclose(got, value, rtol=1e-12, atol=1e-12, err_msg=name)
    alone = results(plain, parts[0])
    assert not np.allclose(alone["out"], expected["out"][:5], atol=1e-3)
    evaluated = ranked(4).double().eval()
    evaluated.load_state_dict(state)
    assert torch.equal(evaluated(x), reference.eval()(x))


# ------------------------------------------------------------------------------------------ batches


def _batches(world: int, sizes: np.ndarray | None = None, chunks: int = 1) -> list[list[list[int]]]:
    ranks = []
    for rank in range(world):
        sampler = TrainBatchSampler(103, 16, seed=5, rank=rank, world_size=world, num_chunks=chunks, sizes=sizes)
        ranks.append([[index for _, index in keys] for keys in sampler])
    return [list(step) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("balanced", [False, True])
def test_micro_batches_are_the_same_sets_on_any_ranks(world: int, balanced: bool) -> None:
    sizes = np.random.default_rng(0).integers(10, 200, size=103) if balanced else None

    def chunks(shares: list[list[int]]) -> list[set[int]]:
        return [{i for share in shares for i in share[even_slice(len(share), 3, chunk)]} for chunk in range(3)]

    for one, many in zip(_batches(1, chunks=3), _batches(world, sizes, chunks=3), strict=True):
        assert chunks(one) == chunks(many)
        assert len(one[0]) == sum(map(len, many))


def test_balance_by_atoms() -> None:
    """The slowest rank has less to do, in every batch or nearly; systems per rank are as without."""
    sizes = np.random.default_rng(1).integers(20, 225, size=103)

    def loads(batches: list[list[list[int]]]) -> np.ndarray:
        return np.array([[sizes[share].sum() for share in step] for step in batches])

    plain, balanced = loads(_batches(2)), loads(_batches(2, sizes))
    assert np.array_equal(plain.sum(axis=1), balanced.sum(axis=1))
    assert (plain.max(axis=1) / plain.mean(axis=1)).mean() > 1.05
    assert (balanced.max(axis=1) / balanced.mean(axis=1)).mean() < 1.02
    for a, b in zip(_batches(2), _batches(2, sizes), strict=True):
        assert [len(share) for share in a] == [len(share) for share in b]
    assert [share.tolist() for share in balanced_shares(np.array([9, 1, 1, 9, 5]), 2)] == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (1, 2)])
def test_stochastic_frames_do_not_depend_on_workers_and_ranks(dataset: Dataset, workers: int, world: int) -> None:
    """A sample's frame is decided by (seed, epoch, index) alone; another epoch gives another one."""

    def frames(epoch: int, workers: int, world: int) -> dict[str, list[float]]:
        found = {}
        for rank in range(world):
            sampler = TrainBatchSampler(12, 4, seed=0, rank=rank, world_size=world)
            sampler.set_epoch_and_start_iteration(epoch, 0)
            for (batch,) in make_loader(dataset, sampler, num_workers=workers):
                found |= {sid: rot.flatten().tolist() for sid, rot in zip(batch.sid, batch.frame_rot, strict=True)}
        return found

    expected = {
        sample.sid[0]: sample.frame_rot.flatten().tolist() for sample in (dataset[3, index] for index in range(12))
    }
    assert frames(3, workers, world) == expected
    assert frames(4, workers, world) != expected


@pytest.mark.slow
def test_spawned_workers_give_the_same_batches(dataset: Dataset) -> None:
    sampler = TrainBatchSampler(12, 6, seed=0)
    spawned = [batch.frame_rot for (batch,) in make_loader(dataset, sampler, num_workers=1, context="spawn")]
    here = [batch.frame_rot for (batch,) in make_loader(dataset, sampler, num_workers=0)]
    assert all(torch.equal(a, b) for a, b in zip(spawned, here, strict=True))


def test_pinning_reaches_every_tensor(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's pinning thread calls `Batches.pin_memory`, which pins each tensor (counted: there may be no GPU)."""
    batches = collate([dataset[0, 0], dataset[0, 1]], num_chunks=2)
    pinned: list[torch.Size] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    assert batches.pin_memory() is batches
    assert len(pinned) >= 2 * len([value for _, value in batches[0] if isinstance(value, torch.Tensor)])


def test_means_over_ranks_are_not_those_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast x may be bf16, in which 12,517 rows would count as 12,544."""
    monkeypatch.setattr(norms._SumOverRanks, "apply", lambda x: x)
    x = (2 + 0.5 * torch.randn(12_517, 3, generator=torch.Generator().manual_seed(0))).bfloat16()
    mean, count = norms._mean_over_ranks(x)
    assert count == 12_517
    torch.testing.assert_close(mean.double(), x.double().mean(dim=0), atol=1e-5, rtol=0)
