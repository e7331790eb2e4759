"""The evaluation loop with a model whose predictions are known: labels plus an error for each system."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import processes
from faenet_ocp.config.schema import build_config
from faenet_ocp.data.loader import EvalBatchSampler, make_loader
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.evaluation.validation import predict, run_split
from faenet_ocp.tasks.references import fit_labels
from faenet_ocp.tasks.tasks import make_tasks

OUTPUTS = {"energy": {"normalizer": {"mean": 1.0, "stdev": 2.0}}, "forces": {"eval_on_free_atoms": False}}


class _Wrong(nn.Module):
    """Energies off by 0.01 eV for each atom, forces by 0.1 eV/A in x, in normalised units."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        energy = (batch.energy + 0.01 * batch.natoms - 1.0) / 2.0
        forces = batch.forces + torch.tensor([0.1, 0.0, 0.0]).to(batch.forces)
        return {"energy": {"energy": energy + self.weight}, "forces": {"forces": forces}}


@pytest.fixture
def dataset(tmp_path: Path) -> OC20LmdbDataset:
    source = processes.write_data(tmp_path, num_train=0, num_val=7) / "val.lmdb"
    settings = {"src": str(source), "labels": ["energy", "forces"], "dtype": "float64"}
    return OC20LmdbDataset(settings | {"cutoff": 5.0, "max_neighbors": 12})


@pytest.fixture
def tasks(tmp_path: Path) -> list:
    config = {"trainer": "faenet", "task": "s2ef", "dataset": {}, "model": {"name": "faenet"}, "outputs": OUTPUTS}
    return make_tasks(build_config(config | {"optim": {"lr_initial": 0.1, "batch_size": 1, "max_epochs": 1}}), {})


def _loader(dataset, *, rank=0, world_size=1, total=7):
    return make_loader(dataset, EvalBatchSampler(range(total), 2, rank=rank, world_size=world_size), num_workers=0)


def test_predictions_are_physical_and_the_model_goes_on_training(dataset, tasks) -> None:
    model = _Wrong()
    for batch, values, seconds in predict(model, tasks, [batch for group in _loader(dataset) for batch in group]):
        assert not model.training and seconds > 0
        torch.testing.assert_close(values["energy"], batch.energy + 0.01 * batch.natoms)
        assert not values["energy"].requires_grad
    assert model.training


def _outcome(dataset, tasks, **options):
    outcome = run_split(_Wrong(), tasks, _loader(dataset, **options), split="v")
    return outcome.metrics, outcome.pairs


def test_a_split_is_compared_with_its_labels_in_order(dataset, tasks) -> None:
    samples = [dataset[index] for index in range(7)]
    natoms = np.array([len(sample.pos) for sample in samples])
    energies = np.array([float(sample.energy) for sample in samples])
    labels = [(torch.stack([s.composition[0] for s in samples]), {"energy": torch.tensor(energies)})]
    outcome = run_split(_Wrong(), tasks, _loader(dataset), split="v", fits=fit_labels(labels, ["energy"]))
    np.testing.assert_allclose(outcome.pairs["energy"], [energies + 0.01 * natoms, energies], atol=1e-6)
    assert outcome.pairs["forces"][0].shape == (natoms.sum(), 3)  # fixed atoms count here
    assert outcome.num_systems == outcome.metrics["num_systems"] == 7 and outcome.metrics["frames_per_system"] == 1
    assert outcome.forward_systems == 5  # without the first batch
    assert outcome.metrics["num_atoms"] == natoms.sum()
    assert outcome.metrics["energy_mae"] == pytest.approx(0.01 * natoms.mean(), rel=1e-5)
    assert outcome.metrics["forces_mae"] == pytest.approx(0.1 / 3, rel=1e-5)
    mean = outcome.baselines["mean_predictor"]
    assert mean["energy_mae"] == pytest.approx(np.abs(energies - energies.mean()).mean(), rel=1e-5)
    forces = torch.cat([sample.forces for sample in samples])
    assert mean["forces_mae"] == pytest.approx(float(forces.abs().mean()), rel=1e-5)


@pytest.mark.parametrize("total", [7, 1])
def test_two_ranks_say_the_same_also_when_one_has_no_systems(dataset, tasks, tmp_path: Path, total: int) -> None:
    metrics, pairs = _outcome(dataset, tasks, total=total)
    ranks = processes.on_ranks(2, lambda rank: _outcome(dataset, tasks, rank=rank, world_size=2, total=total), tmp_path)
    for found, _ in ranks:
        assert found == pytest.approx(metrics, rel=1e-12)
    np.testing.assert_array_equal(ranks[0][1]["energy"], pairs["energy"])
