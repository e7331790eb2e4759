"""Metrics against numpy loops and fairchem's own."""

import numpy as np
import pytest
import torch
from fairchem.core.units.mlip_unit import _metrics as fairchem_metrics

from faenet_ocp.evaluation.metrics import (
    BaselineMetrics,
    JointThreshold,
    ScalarMetrics,
    VectorMetrics,
    energy_metrics,
)
from faenet_ocp.evaluation.results import BASELINES
from faenet_ocp.targets import TARGETS, metrics_of, scalar, targets_of
from faenet_ocp.tasks.references import NUM_ELEMENTS, CompositionRegression

ENERGY, FORCES = TARGETS["energy"], TARGETS["forces"]


def random_energies(num_systems=500, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.normal(-1.5, 2.0, num_systems)
    return label + rng.laplace(0.0, 0.05, num_systems), label


def random_frames(num_systems=60, seed=0):
    """Energies, forces, free atoms and systems; about half of the systems are within the thresholds."""
    rng = np.random.default_rng(seed)
    natoms = rng.integers(2, 9, num_systems)
    batch = np.repeat(np.arange(num_systems), natoms)
    scale = np.where(rng.random(num_systems) < 0.6, 0.006, 0.1)
    label = rng.normal(0.0, 0.5, (len(batch), 3))
    free = rng.random(len(batch)) < 0.5
    free[np.concatenate([[0], np.cumsum(natoms)[:-1]])] = True  # one free atom in every system
    error = rng.normal(0.0, 1.0, label.shape) * scale[batch, None]
    error[~free] = 5.0  # must not matter
    energy = rng.normal(0.0, 1.0, num_systems)
    energies = energy + rng.laplace(0.0, 0.01, num_systems), energy
    return {"energies": energies, "forces": (label + error, label), "free": free, "batch": batch}


def part(frames, systems):
    """The frames of some systems, renumbered from 0."""
    atoms = np.isin(frames["batch"], systems)
    return {
        "energies": tuple(values[systems] for values in frames["energies"]),
        "forces": tuple(values[atoms] for values in frames["forces"]),
        "free": frames["free"][atoms],
        "batch": np.searchsorted(systems, frames["batch"][atoms]),
    }


def force_metrics(*parts, split="s"):
    """What both collectors of S2EF's metrics say of some frames that come in parts."""
    vectors, joint = VectorMetrics(FORCES), JointThreshold(ENERGY, FORCES)
    for frames in parts:
        vectors.update(*frames["forces"], frames["free"])
        joint.update(frames["energies"], frames["forces"], counted=frames["free"], batch=frames["batch"])
    return vectors.compute(split) | joint.compute(split)


def test_energy_metrics_match_fairchem():
    pred, label = random_energies()
    found = energy_metrics(pred, label, split="val_id")
    args = ({"energy": torch.from_numpy(pred)}, {"energy": torch.from_numpy(label)}, "energy")
    assert found["energy_mae"] == pytest.approx(fairchem_metrics.mae(*args).metric)
    assert found["energy_mse"] == pytest.approx(fairchem_metrics.mse(*args).metric)
    ewt = fairchem_metrics.energy_within_threshold(*args).metric
    assert 0.05 < ewt < 0.95
    assert found["energy_within_threshold"] == pytest.approx(100 * ewt)
    assert found["num_systems"] == 500


def test_a_declared_scalar_has_the_metrics_that_its_unit_allows():
    pred, label = random_energies()
    metrics = ScalarMetrics(scalar("gap", "eV"))
    metrics.update(pred, label)
    energy = energy_metrics(pred, label, split="s")
    expected = {"gap_mae": energy["energy_mae"], "gap_mse": energy["energy_mse"], "num_systems": 500}
    assert metrics.compute("s") == expected


@pytest.mark.parametrize("targets", [[ENERGY], [ENERGY, FORCES], [ENERGY, FORCES, scalar("gap", "meV")]])
def test_the_table_names_what_is_computed_and_results_lead_back_to_it(targets):
    found = set(energy_metrics(*random_energies(), split="s"))
    found |= set(force_metrics(random_frames())) if FORCES in targets else set()
    found |= {"gap_mae", "gap_mse"} if len(targets) == 3 else set()
    metrics = metrics_of(targets)
    assert set(metrics) == found - {"num_systems", "num_atoms"}
    assert targets_of({name: metric.unit for name, metric in metrics.items()}) == targets


def test_force_metrics_match_fairchem_on_free_atoms():
    frames = random_frames()
    found, free = force_metrics(frames), frames["free"]
    natoms = torch.from_numpy(np.bincount(frames["batch"][free]))
    pred, label = (
        {
            "forces": torch.from_numpy(frames["forces"][side][free]),
            "energy": torch.from_numpy(frames["energies"][side]),
            "natoms": natoms,
        }
        for side in (0, 1)
    )
    for name, function, factor in (
        ("forces_mae", fairchem_metrics.mae, 1),
        ("forces_cosine_similarity", fairchem_metrics.cosine_similarity, 1),
        ("forces_magnitude_error", fairchem_metrics.magnitude_error, 1),
        ("energy_forces_within_threshold", fairchem_metrics.energy_forces_within_threshold, 100),
    ):
        expected = factor * function(pred, label, "forces").metric
        assert found[name] == pytest.approx(expected, rel=1e-6), name
    assert 10 < found["energy_forces_within_threshold"] < 90
    assert found["num_atoms"] == free.sum()


def test_forces_of_fixed_atoms_may_be_anything():
    frames = random_frames()
    expected = force_metrics(frames)
    pred, label = frames["forces"]
    assert expected["forces_mae"] == pytest.approx(np.abs(pred - label)[frames["free"]].mean())
    pred[~frames["free"]] = np.nan
    assert force_metrics(frames) == expected


def test_thresholds_by_hand():
    """One atom a system and one fixed; errors are strictly below, by component, not by norm."""
    energy = np.array([0.0, 0.0, 0.0, 0.0, 0.02, 0.0199])
    pred = np.zeros((12, 3))
    pred[::2] = [
        [0.029, 0.029, 0.029],  # norm 0.05, each component below: counts
        [0.0, 0.0, 0.03],  # at the threshold: does not
        [0.0, -0.04, 0.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],  # energy at the threshold: does not
        [0.0, 0.0, -0.0299],  # counts
    ]
    pred[7] = 1.0  # fixed atom of system 3: counts
    free, batch = np.arange(12) % 2 == 0, np.repeat(np.arange(6), 2)
    labels = np.zeros(6), np.zeros((12, 3))
    frames = {"energies": (energy, labels[0]), "forces": (pred, labels[1]), "free": free, "batch": batch}
    found = force_metrics(frames)
    assert found["energy_forces_within_threshold"] == pytest.approx(100 * 3 / 6)
    assert found["forces_cosine_similarity"] == 0.0  # label forces are zero
    ewt = energy_metrics(energy, labels[0], split="val_id")["energy_within_threshold"]
    assert ewt == pytest.approx(100 * 5 / 6)
    frames["free"] = batch == 0  # without free atoms only the energy counts
    assert force_metrics(frames)["energy_forces_within_threshold"] == pytest.approx(100 * 5 / 6)


def test_batches_of_any_size_precision_and_kind_give_the_same():
    frames, (pred, label) = random_frames(), random_energies()
    parts = [part(frames, np.arange(start, min(start + 7, 60))) for start in range(0, 60, 7)]
    assert force_metrics(*parts) == pytest.approx(force_metrics(frames), rel=1e-12)
    metrics = ScalarMetrics(ENERGY)
    for start in range(0, 500, 33):
        metrics.update(torch.from_numpy(pred[start : start + 33]).requires_grad_(), label[start : start + 33])
    whole = energy_metrics(pred, label, split="s")
    assert metrics.compute("s") == pytest.approx(whole, rel=1e-12)
    single = energy_metrics(torch.from_numpy(pred).float(), torch.from_numpy(label).float(), split="s")
    assert single["energy_mae"] == pytest.approx(whole["energy_mae"])


def test_not_finite_and_empty_input_name_the_split():
    pred, label = random_energies(num_systems=10)
    pred[[2, 5]] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"'val_ood_ads': 2 of 10 predicted energy are not finite"):
        energy_metrics(pred, label, split="val_ood_ads")
    with pytest.raises(ValueError, match=r"'val_id': 2 of 10 labelled energy"):
        energy_metrics(label, pred, split="val_id")
    with pytest.raises(ValueError, match=r"'val_id': no energy"):
        energy_metrics(np.zeros(0), np.zeros(0), split="val_id")
    frames = random_frames()
    frames["forces"][0][np.flatnonzero(frames["free"])[:3], 1] = np.nan
    with pytest.raises(ValueError, match=r"'val_id': 3 of \d+ predicted forces"):
        force_metrics(frames, split="val_id")
    with pytest.raises(ValueError, match=r"no forces to evaluate"):
        force_metrics({**frames, "free": np.zeros_like(frames["free"])})


@pytest.mark.parametrize(
    ("pred", "label", "counted", "message"),
    [
        (np.zeros((4, 2)), np.zeros((4, 2)), np.ones(4, dtype=bool), "forces must be"),
        (np.zeros((4, 3)), np.zeros((3, 3)), np.ones(4, dtype=bool), "forces: .* same 2-dimensional shape"),
        (np.zeros((4, 3)), np.zeros((4, 3)), np.ones(4), "bool"),
    ],
)
def test_shapes_are_checked(pred, label, counted, message):
    with pytest.raises(ValueError, match=message):
        VectorMetrics(FORCES).update(pred, label, counted)
    with pytest.raises(ValueError, match="same 1-dimensional shape"):
        ScalarMetrics(ENERGY).update(np.zeros((4, 1)), np.zeros(4))  # would broadcast to (4, 4)


def test_zero_forces_are_a_baseline():
    """What it says is what zero predictions would get, whatever was predicted."""
    frames = random_frames()
    metrics = VectorMetrics(FORCES)
    metrics.update(*frames["forces"], frames["free"])
    label = frames["forces"][1]
    expected = force_metrics({**frames, "forces": (np.zeros_like(label), label)})["forces_mae"]
    assert metrics.zero_baseline() == {"forces_mae": pytest.approx(expected, rel=1e-12)}
    assert metrics.compute("s")["forces_mae"] != pytest.approx(expected, rel=1e-3)


def test_baselines():
    composition = torch.zeros(40, NUM_ELEMENTS)
    composition[:, 1], composition[:, 29] = torch.arange(40) % 5, torch.arange(40) % 7 + 1
    energy = 0.3 * composition[:, 1] - 0.2 * composition[:, 29]
    regression = CompositionRegression()
    regression.update(composition[:20], energy[:20])
    metrics = BaselineMetrics(ENERGY, regression.solve())
    held_out = composition[20:].clone()
    held_out[0, 78] = 3
    metrics.update(held_out[:8], energy[20:28])
    metrics.update(held_out[8:], energy[28:])
    rows = metrics.compute("val_id")
    assert set(rows) == set(BASELINES)
    mean_error = np.abs(energy[20:].numpy() - energy[:20].numpy().mean()).mean()
    assert rows["mean_predictor"]["energy_mae"] == pytest.approx(mean_error, rel=1e-5)
    assert rows["linear_in_composition"]["energy_mae"] < 1e-6
    assert rows["linear_in_composition"]["num_systems_unseen_elements"] == 1
    assert rows["mean_predictor"]["num_systems"] == 20
