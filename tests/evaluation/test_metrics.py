"""Metrics against numpy loops and fairchem's own; the results document."""

import json
import os
from importlib.metadata import version

import numpy as np
import pytest
import torch
from fairchem.core.units.mlip_unit import _metrics as fairchem_metrics

from faenet_ocp.evaluation.metrics import (
    BASELINES,
    SPLITS,
    BaselineMetrics,
    EnergyMetrics,
    ForceMetrics,
    RunInfo,
    build_results,
    energy_metrics,
    force_metrics,
    load_results,
    software_versions,
    write_json,
)
from faenet_ocp.tasks.references import NUM_ELEMENTS, CompositionRegression


def random_energies(num_systems=500, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.normal(-1.5, 2.0, num_systems)
    return target + rng.laplace(0.0, 0.05, num_systems), target


def random_frames(num_systems=60, seed=0):
    """Keyword arguments of force_metrics; about half of the systems are within the thresholds."""
    rng = np.random.default_rng(seed)
    natoms = rng.integers(2, 9, num_systems)
    batch = np.repeat(np.arange(num_systems), natoms)
    scale = np.where(rng.random(num_systems) < 0.6, 0.006, 0.1)
    target = rng.normal(0.0, 0.5, (len(batch), 3))
    free = rng.random(len(batch)) < 0.5
    free[np.concatenate([[0], np.cumsum(natoms)[:-1]])] = True  # one free atom in every system
    error = rng.normal(0.0, 1.0, target.shape) * scale[batch, None]
    error[~free] = 5.0  # must not matter
    energy = rng.normal(0.0, 1.0, num_systems)
    return {
        "forces_pred": target + error,
        "forces_target": target,
        "free": free,
        "batch": batch,
        "energy_pred": energy + rng.laplace(0.0, 0.01, num_systems),
        "energy_target": energy,
    }


def part(frames, systems):
    """The frames of some systems, renumbered from 0."""
    atoms = np.isin(frames["batch"], systems)
    chosen = {key: value[systems if key.startswith("energy") else atoms] for key, value in frames.items()}
    chosen["batch"] = np.searchsorted(systems, chosen["batch"])
    return chosen


def run_info(**changes):
    values = {
        "model": "faenet",
        "config": "configs/demo/is2re.yml",
        "parameters": 1234,
        "checkpoint": None,
        "step": 10,
        "epoch": 2.0,
        "device": "CPU",
        "frames": {"method": "canonical", "dim": 2, "group": "SE"},
        "seed": 0,
    }
    return RunInfo(**{**values, **changes})


def some_results(names=tuple(SPLITS), **changes):
    pred, target = random_energies()
    metrics = {split: energy_metrics(pred[i::4], target[i::4], split=split) for i, split in enumerate(names)}
    arguments = {"task": "is2re", "dataset": "test data", "oc20": False, "run": run_info()}
    arguments |= {"splits": metrics, "baselines": {}}
    return build_results(**{**arguments, **changes})


# ---------------------------------------------------------------------------------------- metrics
def test_energy_metrics_match_numpy_and_fairchem():
    pred, target = random_energies()
    found = energy_metrics(pred, target, split="val_id")
    error = np.abs(pred - target)
    assert found["energy_mae"] == pytest.approx(error.mean())
    assert found["energy_mse"] == pytest.approx((error**2).mean())
    assert found["energy_within_threshold"] == pytest.approx(100 * (error < 0.02).mean())
    assert found["num_systems"] == 500
    args = ({"energy": torch.from_numpy(pred)}, {"energy": torch.from_numpy(target)}, "energy")
    assert found["energy_mae"] == pytest.approx(fairchem_metrics.mae(*args).metric)
    assert found["energy_mse"] == pytest.approx(fairchem_metrics.mse(*args).metric)
    ewt = fairchem_metrics.energy_within_threshold(*args).metric
    assert 0.05 < ewt < 0.95
    assert found["energy_within_threshold"] == pytest.approx(100 * ewt)


def test_force_metrics_match_fairchem_on_free_atoms():
    frames = random_frames()
    found = force_metrics(**frames, split="val_id")
    free = frames["free"]
    natoms = torch.from_numpy(np.bincount(frames["batch"][free]))
    pred, target = (
        {
            "forces": torch.from_numpy(frames[f"forces_{kind}"][free]),
            "energy": torch.from_numpy(frames[f"energy_{kind}"]),
            "natoms": natoms,
        }
        for kind in ("pred", "target")
    )
    for name, function, factor in (
        ("forces_mae", fairchem_metrics.mae, 1),
        ("forces_cosine_similarity", fairchem_metrics.cosine_similarity, 1),
        ("forces_magnitude_error", fairchem_metrics.magnitude_error, 1),
        ("energy_forces_within_threshold", fairchem_metrics.energy_forces_within_threshold, 100),
    ):
        expected = factor * function(pred, target, "forces").metric
        assert found[name] == pytest.approx(expected, rel=1e-6), name
    assert 10 < found["energy_forces_within_threshold"] < 90
    assert found["num_atoms"] == free.sum()


def test_force_metrics_count_free_atoms_only():
    frames = random_frames()
    everything = force_metrics(**{**frames, "free": np.ones_like(frames["free"])}, split="val_id")
    found = force_metrics(**frames, split="val_id")
    assert everything["forces_mae"] > 10 * found["forces_mae"]
    error = np.abs(frames["forces_pred"] - frames["forces_target"])[frames["free"]]
    assert found["forces_mae"] == pytest.approx(error.mean())


def test_thresholds_by_hand():
    """One atom a system and one fixed; errors are strictly below, by component, not by norm."""
    energy = np.array([0.0, 0.0, 0.0, 0.0, 0.02, 0.0199])
    free_error = np.array(
        [
            [0.029, 0.029, 0.029],  # norm 0.05, each component below: counts
            [0.0, 0.0, 0.03],  # at the threshold: does not
            [0.0, -0.04, 0.0],
            [0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0],  # energy at the threshold: does not
            [0.0, 0.0, -0.0299],  # counts
        ]
    )
    pred = np.zeros((12, 3))
    pred[::2] = free_error
    pred[7] = 1.0  # fixed atom of system 3: counts
    found = force_metrics(
        forces_pred=pred,
        forces_target=np.zeros((12, 3)),
        free=np.arange(12) % 2 == 0,
        batch=np.repeat(np.arange(6), 2),
        energy_pred=energy,
        energy_target=np.zeros(6),
        split="val_id",
    )
    assert found["energy_forces_within_threshold"] == pytest.approx(100 * 3 / 6)
    assert found["forces_cosine_similarity"] == 0.0  # label forces are zero
    ewt = energy_metrics(energy, np.zeros(6), split="val_id")["energy_within_threshold"]
    assert ewt == pytest.approx(100 * 5 / 6)


def test_a_system_without_free_atoms_is_judged_by_its_energy():
    found = force_metrics(
        forces_pred=np.ones((3, 3)),
        forces_target=np.zeros((3, 3)),
        free=np.array([True, False, False]),
        batch=np.array([0, 1, 2]),
        energy_pred=np.array([0.0, 0.0, 1.0]),
        energy_target=np.zeros(3),
        split="val_id",
    )
    assert found["energy_forces_within_threshold"] == pytest.approx(100 / 3)
    assert found["num_atoms"] == 1


def test_streamed_and_merged_sums_equal_one_pass():
    frames = random_frames()
    pred, target = random_energies()
    energy, forces = (EnergyMetrics(), EnergyMetrics()), (ForceMetrics(), ForceMetrics())
    for start in range(0, 60, 7):
        systems = np.arange(start, min(start + 7, 60))
        forces[start % 2].update(**part(frames, systems))
    for start in range(0, 500, 33):
        energy[start % 2].update(pred[start : start + 33], target[start : start + 33])
    for collectors, whole in (
        (energy, energy_metrics(pred, target, split="s")),
        (forces, force_metrics(**frames, split="s")),
    ):
        assert collectors[0].compute("s") != pytest.approx(whole, rel=1e-6)
        collectors[0].merge(collectors[1])
        assert collectors[0].compute("s") == pytest.approx(whole, rel=1e-12)


def test_tensors_of_any_precision_and_arrays_agree():
    pred, target = random_energies()
    single = torch.from_numpy(pred).float().requires_grad_(), torch.from_numpy(target).float()
    found = energy_metrics(*single, split="s")
    assert found["energy_mae"] == pytest.approx(energy_metrics(pred, target, split="s")["energy_mae"])


def test_not_finite_and_empty_input_name_the_split():
    pred, target = random_energies(num_systems=10)
    pred[[2, 5]] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"'val_ood_ads': 2 of 10 predicted energies"):
        energy_metrics(pred, target, split="val_ood_ads")
    with pytest.raises(ValueError, match=r"'val_id': 2 of 10 labelled energies"):
        energy_metrics(target, pred, split="val_id")
    with pytest.raises(ValueError, match=r"'val_id': no energies"):
        energy_metrics(np.zeros(0), np.zeros(0), split="val_id")
    frames = random_frames()
    frames["forces_pred"][np.flatnonzero(frames["free"])[:3], 1] = np.nan
    with pytest.raises(ValueError, match=r"'val_id': 3 of \d+ predicted forces"):
        force_metrics(**frames, split="val_id")
    with pytest.raises(ValueError, match=r"no forces of free atoms"):
        force_metrics(**{**frames, "free": np.zeros_like(frames["free"])}, split="val_id")


def test_forces_of_fixed_atoms_may_be_anything():
    frames = random_frames()
    expected = force_metrics(**frames, split="s")
    frames["forces_pred"][~frames["free"]] = np.nan
    assert force_metrics(**frames, split="s") == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forces_pred": np.zeros((4, 2)), "forces_target": np.zeros((4, 2))}, r"forces must be"),
        ({"forces_target": np.zeros((3, 3))}, "same 2-dimensional shape"),
        ({"free": np.ones(4)}, "bool"),
        ({"batch": np.zeros(3, dtype=int)}, r"batch \(N,\)"),
        ({"energy_pred": np.zeros((1, 1))}, "energy"),
    ],
)
def test_shapes_are_checked(change, message):
    fits = {
        "forces_pred": np.zeros((4, 3)),
        "forces_target": np.zeros((4, 3)),
        "free": np.ones(4, dtype=bool),
        "batch": np.zeros(4, dtype=int),
        "energy_pred": np.zeros(1),
        "energy_target": np.zeros(1),
    }
    ForceMetrics().update(**fits)
    with pytest.raises(ValueError, match=message):
        ForceMetrics().update(**{**fits, **change})
    with pytest.raises(ValueError, match="same 1-dimensional shape"):
        EnergyMetrics().update(np.zeros((4, 1)), np.zeros(4))  # would broadcast to (4, 4)


def test_zero_forces_are_a_baseline():
    """What it says is what zero predictions would get, whatever was predicted."""
    frames = random_frames()
    metrics = ForceMetrics()
    metrics.update(**frames)
    zeros = {**frames, "forces_pred": np.zeros_like(frames["forces_pred"])}
    expected = force_metrics(**zeros, split="s")["forces_mae"]
    assert metrics.zero_baseline() == {"forces_mae": pytest.approx(expected, rel=1e-12)}
    assert metrics.compute("s")["forces_mae"] != pytest.approx(expected, rel=1e-3)


def test_baselines():
    composition = torch.zeros(40, NUM_ELEMENTS)
    composition[:, 1], composition[:, 29] = torch.arange(40) % 5, torch.arange(40) % 7 + 1
    energy = 0.3 * composition[:, 1] - 0.2 * composition[:, 29]
    regression = CompositionRegression()
    regression.update(composition[:20], energy[:20])
    metrics = BaselineMetrics(regression.solve())
    held_out = composition[20:].clone()
    held_out[0, 78] = 3
    metrics.update(held_out[:8], energy[20:28])
    other = BaselineMetrics(regression.solve())
    other.update(held_out[8:], energy[28:])
    metrics.merge(other)
    rows = metrics.compute("val_id")
    assert set(rows) == set(BASELINES)
    mean_error = np.abs(energy[20:].numpy() - energy[:20].numpy().mean()).mean()
    assert rows["mean_predictor"]["energy_mae"] == pytest.approx(mean_error, rel=1e-5)
    assert rows["linear_in_composition"]["energy_mae"] < 1e-6
    assert rows["linear_in_composition"]["num_systems_unseen_elements"] == 1
    assert rows["mean_predictor"]["num_systems"] == 20


# ----------------------------------------------------------------------------------- results JSON
def test_average_needs_all_four_splits():
    results = some_results()
    expected = np.mean([results["splits"][split]["energy_mae"] for split in SPLITS])
    assert results["average"]["energy_mae"] == pytest.approx(expected)
    assert "num_systems" not in results["average"]
    assert some_results(names=tuple(SPLITS)[:3])["average"] is None


def test_a_further_split_does_not_enter_the_average():
    four, five = some_results(), some_results(names=(*SPLITS, "val_mine"))
    assert five["average"] == four["average"]
    assert "val_mine" in five["splits"]


def test_baselines_are_turned_into_rows():
    pred, target = random_energies()
    metrics = energy_metrics(pred, target, split="s")
    by_split = {split: {"mean_predictor": metrics} for split in SPLITS}
    rows = some_results(baselines=by_split)["baselines"]
    assert list(rows) == list(BASELINES)
    assert rows["mean_predictor"]["splits"]["val_ood_cat"] == metrics
    assert rows["mean_predictor"]["average"]["energy_mae"] == pytest.approx(metrics["energy_mae"])
    assert rows["linear_in_composition"] == {"splits": {}, "average": None}


def test_results_say_what_they_are():
    results = some_results()
    assert (results["format"], results["dataset"], results["oc20"]) == (1, "test data", False)
    assert results["units"]["energy_mae"] == "eV"
    run = results["run"]
    assert run["versions"]["torch"] == version("torch")
    assert run["versions"]["fairchem-core"].startswith("2.24")
    assert run["date"].endswith("+00:00")
    assert set(software_versions()) == set(run["versions"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "is2rs"}, "task must be one of"),
        ({"splits": {}}, "at least one split"),
        ({"splits": {"val_id": {"energy_mae": 1.0}}}, r"'val_id': metrics lack"),
        ({"task": "s2ef"}, "forces_mae"),
        ({"baselines": {"val_id": {"median": {}}}}, r"unknown baselines \['median'\]"),
        ({"run": run_info(frames={"method": object()})}, r"results.run.frames.method: a object"),
    ],
)
def test_incomplete_results_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        some_results(**change)


def test_written_results_are_strict_json_and_come_back(tmp_path):
    results = some_results(
        forward_samples_per_s=np.float32(12.5),
        end_to_end_samples_per_s=float("nan"),
        seconds_per_epoch=torch.tensor(3.0),
        run=run_info(checkpoint=tmp_path / "best"),
    )
    path = write_json(results, tmp_path / "results" / "metrics.json")

    def refuse(constant):
        raise AssertionError(constant)

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert raw["throughput"] == {"forward_samples_per_s": 12.5, "end_to_end_samples_per_s": None}
    assert raw["training"] == {"seconds_per_epoch": 3.0, "epochs": None}
    assert raw["run"]["checkpoint"] == str(tmp_path / "best")
    assert load_results(path) == results == raw
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_json({"a": 1}, tmp_path / "metrics.json")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json({"a": 2}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ValueError, match=r"data.b\[1\]: a set"):
        write_json({"b": [1, {2}]}, path)


def test_files_that_are_no_results_are_refused(tmp_path):
    path = write_json(some_results(), tmp_path / "metrics.json")
    good = json.loads(path.read_text())
    for text, message in (
        ("{", "not a results file"),
        ('{"format": NaN}', "NaN is not JSON"),
        ("[1]", "format 'list'"),
        (json.dumps({**good, "format": 2}), "format 2, this version reads 1"),
        (json.dumps({k: v for k, v in good.items() if k != "run"}), r"missing \['run'\]"),
        (json.dumps({**good, "task": "other"}), "unknown task"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            load_results(path)
        assert "metrics.json" in str(error.value)
