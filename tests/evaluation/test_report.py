"""The results document, and golden tables made of it."""

import json
from importlib.metadata import version

import numpy as np
import pytest
import torch

from faenet_ocp.common.files import write_json
from faenet_ocp.evaluation.paper import PAPER
from faenet_ocp.evaluation.report import render_table
from faenet_ocp.evaluation.results import BASELINES, SPLITS, RunInfo, build_results, dataset_label
from faenet_ocp.targets import TARGETS, scalar

IS2RE_GOLDEN = """\
Data: demo data (EMT labels)

**OOD Cat: 3 systems have elements that the training set lacks: Au (in 2), Pt (in 3). These count as 0 in fitted element references and in the baseline 'linear in composition', and the model has not learned them.**

| Model                 | Train | Infer. | Energy MAE [eV]: ID | OOD Ads | OOD Cat | OOD Both | Average | EwT: ID | OOD Ads | OOD Cat | OOD Both | Average |
| --------------------- | ----: | -----: | ------------------: | ------: | ------: | -------: | ------: | ------: | ------: | ------: | -------: | ------: |
| faenet (this run)     |  8.3s |    812 |              0.1000 |  0.2000 |  0.3000 |   0.4000 |  0.2500 |   8.00% |   7.00% |   6.00% |    5.00% |   6.50% |
| mean predictor        |     - |      - |              0.7000 |  0.7000 |  0.7000 |   0.7000 |  0.7000 |   1.00% |   1.00% |   1.00% |    1.00% |   1.00% |
| linear in composition |     - |      - |              0.2500 |  0.2500 |  0.2500 |   0.2500 |  0.2500 |   3.00% |   3.00% |   3.00% |    3.00% |   3.00% |

- Systems: ID 1,000, OOD Ads 1,000, OOD Cat 1,000, OOD Both 1,000.
- Train: time of an epoch. Infer.: samples/s, forward pass only. EwT: systems with an energy error below 0.02 eV. Average: over the splits.
- This run: configs/demo/is2re.yml, 123,456 parameters, epoch 12, step 720, frames method stochastic, dim 2, group SE, seed 0; CPU, 2 threads; inference end to end 400 samples/s; 12 epochs trained.
"""  # noqa: E501

S2EF_GOLDEN = """\
Data: OC20 S2EF-2M

Averages over the splits (Table 1):

| Model                               | Train | Infer. | Energy MAE [eV] | Force MAE [meV/A] |
| ----------------------------------- | ----: | -----: | --------------: | ----------------: |
| faenet (this run)                   |     - |      - |          0.2500 |              55.0 |
| FAENet, the paper's (OC20, RTX8000) | 75min |    623 |          0.4642 |              57.5 |

Per split (extended table):

| Model                               | Train | Infer. | Energy MAE [eV]: ID | OOD Ads | OOD Cat | OOD Both | Average | Force MAE [meV/A]: ID | OOD Ads | OOD Cat | OOD Both | Average |
| ----------------------------------- | ----: | -----: | ------------------: | ------: | ------: | -------: | ------: | --------------------: | ------: | ------: | -------: | ------: |
| faenet (this run)                   |     - |      - |              0.1000 |  0.2000 |  0.3000 |   0.4000 |  0.2500 |                  40.0 |    50.0 |    60.0 |     70.0 |    55.0 |
| FAENet, the paper's (OC20, RTX8000) | 75min |    623 |              0.3960 |  0.4548 |  0.4295 |   0.5766 |  0.4643 |                  51.1 |    58.9 |    50.7 |     69.4 |    57.5 |

Further metrics (not in the paper):

| Model             | EwT: ID | OOD Ads | OOD Cat | OOD Both | Average | Force cosine: ID | OOD Ads | OOD Cat | OOD Both | Average | Magnitude error [meV/A]: ID | OOD Ads | OOD Cat | OOD Both | Average | EFwT: ID | OOD Ads | OOD Cat | OOD Both | Average |
| ----------------- | ------: | ------: | ------: | -------: | ------: | ---------------: | ------: | ------: | -------: | ------: | --------------------------: | ------: | ------: | -------: | ------: | -------: | ------: | ------: | -------: | ------: |
| faenet (this run) |   8.00% |   7.00% |   6.00% |    5.00% |   6.50% |            0.500 |   0.500 |   0.500 |    0.500 |   0.500 |                        20.0 |    20.0 |    20.0 |     20.0 |    20.0 |    0.12% |   0.12% |   0.12% |    0.12% |   0.12% |

- Systems: ID 1,000 (7,000 free atoms), OOD Ads 1,000 (7,000 free atoms), OOD Cat 1,000 (7,000 free atoms), OOD Both 1,000 (7,000 free atoms).
- Train: time of an epoch. Infer.: samples/s, forward pass only. EwT: systems with an energy error below 0.02 eV. Forces: of free atoms; the mean predictor's are zero. EFwT: systems with an energy error below 0.02 eV and every force component off by less than 0.03 eV/A. Average: over the splits.
- This run: configs/demo/is2re.yml, 123,456 parameters, epoch -, step -, frames method stochastic, dim 2, group SE, seed 0; CPU, 2 threads; inference end to end - samples/s; - epochs trained.
- The paper's row: Table 1 and the extended table of C.4 of Duval et al. (ICML 2023), as published; OC20 S2EF-2M, one RTX8000.
"""  # noqa: E501


def energies(mae, ewt):
    return {"energy_mae": mae, "energy_mse": mae**2, "energy_within_threshold": ewt, "num_systems": 1000}


def forces(mae):
    return {
        "forces_mae": mae,
        "forces_cosine_similarity": 0.5,
        "forces_magnitude_error": 0.02,
        "energy_forces_within_threshold": 0.12,
        "num_atoms": 7000,
    }


def run_info(**changes):
    values = {
        "model": "faenet",
        "config": "configs/demo/is2re.yml",
        "parameters": 123456,
        "checkpoint": "checkpoints/best",
        "step": 720,
        "epoch": 12.0,
        "device": "CPU, 2 threads",
        "frames": {"method": "stochastic", "dim": 2, "group": "SE"},
        "seed": 0,
    }
    return RunInfo(**{**values, **changes})


def is2re(run=None, **changes):
    linear = energies(0.25, 3.0)
    arguments = {
        "task": "is2re",
        "targets": [TARGETS["energy"]],
        "dataset": "demo data (EMT labels)",
        "official": False,
        "run": run or run_info(),
        "splits": {split: energies(0.1 * (i + 1), 8.0 - i) for i, split in enumerate(SPLITS)},
        "baselines": {
            split: {
                "mean_predictor": energies(0.7, 1.0),
                "linear_in_composition": linear,
            }
            for split in SPLITS
        },
        "unseen": {split: {} for split in SPLITS} | {"val_ood_cat": {"Au": 2, "Pt": 3, "all": 3}},
        "forward_samples_per_s": 812.3,
        "end_to_end_samples_per_s": 400.4,
        "seconds_per_epoch": 8.31,
        "epochs": 12,
    }
    return build_results(**{**arguments, **changes})


def s2ef():
    return build_results(
        task="s2ef",
        targets=list(TARGETS.values()),
        dataset="OC20 S2EF-2M",
        official=True,
        run=run_info(step=None, epoch=None),
        splits={split: energies(0.1 * (i + 1), 8.0 - i) | forces(0.04 + 0.01 * i) for i, split in enumerate(SPLITS)},
        baselines={},
    )


def cells(markdown, label):
    """Cells of the lines whose first cell starts with a label."""
    lines = [line for line in markdown.splitlines() if line.startswith(f"| {label}")]
    return [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines]


# ---------------------------------------------------------------------------------------- results
def test_average_needs_all_four_splits_and_no_other():
    splits = is2re()["splits"]
    expected = np.mean([splits[split]["energy_mae"] for split in SPLITS])
    average = is2re()["average"]
    assert average == {name: pytest.approx(average[name]) for name in is2re()["units"]}  # no counts
    assert average["energy_mae"] == pytest.approx(expected)
    further = is2re(splits=splits | {"val_mine": energies(9.0, 0.0)})
    assert further["average"] == average and "val_mine" in further["splits"]
    del splits["val_ood_both"]
    assert is2re(splits=splits)["average"] is None


def test_baselines_are_turned_into_rows():
    rows = is2re(baselines={split: {"mean_predictor": energies(0.7, 1.0)} for split in SPLITS})["baselines"]
    assert list(rows) == list(BASELINES)
    assert rows["mean_predictor"]["splits"]["val_ood_cat"] == energies(0.7, 1.0)
    assert rows["mean_predictor"]["average"]["energy_mae"] == pytest.approx(0.7)
    assert rows["linear_in_composition"] == {"splits": {}, "average": None}


def test_written_results_are_strict_json_and_say_what_they_are(tmp_path):
    results = is2re(
        forward_samples_per_s=np.float32(12.5),
        end_to_end_samples_per_s=float("nan"),
        seconds_per_epoch=torch.tensor(3.0),
        run=run_info(checkpoint=tmp_path / "best"),
    )

    def refuse(constant):
        raise AssertionError(constant)

    raw = json.loads(write_json(tmp_path / "metrics.json", results).read_text(), parse_constant=refuse)
    assert raw == results
    assert raw["throughput"] == {"forward_samples_per_s": 12.5, "end_to_end_samples_per_s": None}
    assert raw["training"] == {"seconds_per_epoch": 3.0, "epochs": 12, "ended": None}
    assert (raw["format"], raw["task"], raw["dataset"], raw["official"]) == (
        1,
        "is2re",
        "demo data (EMT labels)",
        False,
    )
    assert raw["units"] == {"energy_mae": "eV", "energy_mse": "eV^2", "energy_within_threshold": "%"}
    assert raw["run"]["checkpoint"] == str(tmp_path / "best")
    assert raw["run"]["versions"]["torch"] == version("torch")
    assert raw["run"]["date"].endswith("+00:00")
    with pytest.raises(ValueError, match=r"results.run.frames.method: a object"):
        is2re(run=run_info(frames={"method": object()}))


def test_only_the_official_validation_splits_are_called_oc20():
    sizes = PAPER["is2re"].sizes
    assert dataset_label("OC20", "is2re", sizes) == ("OC20 IS2RE", True)
    for other in (sizes | {"val_id": 100}, sizes | {"val_mine": 100}):
        assert dataset_label("OC20", "is2re", other) == ("OC20's formats, not its validation splits", False)
    assert dataset_label("mine", "is2re", sizes) == ("mine", False)


# ----------------------------------------------------------------------------------------- tables
@pytest.mark.parametrize("results, golden", [(is2re(), IS2RE_GOLDEN), (s2ef(), S2EF_GOLDEN)], ids=["is2re", "s2ef"])
def test_golden_tables(results, golden):
    assert render_table(results) == golden


def test_columns_are_the_splits_that_were_evaluated():
    results = is2re(splits={"val_ood_ads": energies(0.2, 5.0)})
    assert cells(render_table(results), "faenet") == [["8.3s", "812", "0.2000", "5.00%"]]
    assert "Systems: OOD Ads 1,000." in render_table(results)
    more = is2re(splits={"val_mine": energies(0.125, 4.0)} | is2re()["splits"])
    (header,) = (line for line in render_table(more).splitlines() if line.startswith("| Model"))
    names = [cell.strip() for cell in header.strip("|").split("|")][3:9]
    assert names == ["Energy MAE [eV]: ID", "OOD Ads", "OOD Cat", "OOD Both", "val_mine", "Average"]
    assert more["average"] == is2re()["average"]
    own = is2re(splits={"near": energies(0.1, 4.0), "far": energies(0.3, 2.0)})
    assert cells(render_table(own), "faenet")[0][2:5] == ["0.1000", "0.3000", "0.2000"]


def test_a_declared_scalar_has_columns_of_the_splits_that_were_evaluated():
    gap = {"gap_mae": 0.0123, "gap_mse": 0.5}
    results = is2re(
        targets=[TARGETS["energy"], scalar("gap", "eV")],
        splits={"val_id": energies(0.1, 8.0) | gap, "mine": energies(0.2, 7.0) | gap | {"gap_mae": 2.0}},
        baselines={"mine": {"mean_predictor": energies(0.7, 1.0) | gap}},
    )
    markdown = render_table(results)
    (header,) = (line for line in markdown.splitlines() if "gap" in line)
    titles = [cell.strip() for cell in header.strip("|").split("|")]
    assert titles == ["Model", "gap MAE [eV]: ID", "mine", "gap MSE [eV^2]: ID", "mine"]
    assert cells(markdown, "faenet")[1] == ["0.0123", "2.0000", "0.5000", "0.5000"]
    assert cells(markdown, "mean predictor")[1] == ["-", "0.0123", "-", "0.5000"]
    assert not cells(markdown, "linear in composition")  # it has nothing to say


def test_the_papers_row_is_marked():
    assert "FAENet, the paper's (OC20, RTX8000)" in render_table(is2re(official=True))
    assert "paper" not in render_table(is2re())  # elsewhere its row says nothing


@pytest.mark.parametrize("results", [is2re(official=True), s2ef()], ids=["is2re", "s2ef"])
def test_the_papers_averages_are_those_of_its_splits(results):
    """Guards the typed-in numbers: an average is the mean of its four splits, as far as rounded."""
    row = [float(cell.strip("%")) for cell in cells(render_table(results), "FAENet")[-1][2:]]
    for values, tolerance in ((row[:5], 1e-4), (row[5:], 0.1 if results["task"] == "s2ef" else 0.01)):
        assert sum(values[:4]) / 4 == pytest.approx(values[4], abs=tolerance)


def test_a_bar_in_a_name_does_not_break_the_table():
    table = render_table(is2re(run=run_info(model="a|b"))).split("\n\n")[1].splitlines()
    assert len({(len(line), line.replace("\\|", "").count("|")) for line in table}) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.31, "8.3s"), (99.9, "99.9s"), (720.0, "12min"), (69420.0, "1,157min")]
)
def test_epoch_times(seconds, text):
    assert cells(render_table(is2re(seconds_per_epoch=seconds)), "faenet")[0][0] == text
