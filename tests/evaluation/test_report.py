"""Golden tables, and what they must never leave out."""

import pytest

from faenet_ocp.evaluation.metrics import SPLITS, RunInfo, build_results
from faenet_ocp.evaluation.report import render_table

IS2RE_GOLDEN = """\
Data: demo data (EMT labels)

| Model                                               | Train | Infer. | Energy MAE [eV]: ID | OOD Ads | OOD Cat | OOD Both | Average | EwT: ID | OOD Ads | OOD Cat | OOD Both | Average |
| --------------------------------------------------- | ----: | -----: | ------------------: | ------: | ------: | -------: | ------: | ------: | ------: | ------: | -------: | ------: |
| faenet (this run)                                   |  8.3s |    812 |              0.1000 |  0.2000 |  0.3000 |   0.4000 |  0.2500 |   8.00% |   7.00% |   6.00% |    5.00% |   6.50% |
| mean predictor                                      |     - |      - |              0.7000 |  0.7000 |  0.7000 |   0.7000 |  0.7000 |   1.00% |   1.00% |   1.00% |    1.00% |   1.00% |
| linear in composition                               |     - |      - |              0.2500 |  0.2500 |  0.2500 |   0.2500 |  0.2500 |   3.00% |   3.00% |   3.00% |    3.00% |   3.00% |
| FAENet, the paper's (OC20, RTX8000; not comparable) | 12min |   2469 |              0.5446 |  0.6115 |  0.5707 |   0.5449 |  0.5679 |   4.46% |   2.95% |   4.67% |    3.01% |   3.78% |

- Systems: ID 1,000, OOD Ads 1,000, OOD Cat 1,000, OOD Both 1,000.
- Train: time of an epoch. Infer.: samples/s, forward pass only. EwT: systems with an energy error below 0.02 eV. Average: over the four splits.
- This run: configs/demo/is2re.yml, 123,456 parameters, epoch 12, step 720, frames method stochastic, dim 2, group SE, seed 0; CPU, 2 threads; inference end to end 400 samples/s; 12 epochs trained.
- linear in composition: elements that the training set does not have count as 0 eV; systems with such elements: OOD Cat 3.
- The paper's row: Table 9 of Duval et al. (ICML 2023), as published; OC20 IS2RE (460,328 training systems), one RTX8000. **It is on OC20, the other rows are on demo data (EMT labels): not comparable.**
"""  # noqa: E501

S2EF_GOLDEN = """\
Data: OC20 S2EF-2M

Averages over the four splits (Table 1):

| Model                               | Train | Infer. | Energy MAE [eV] | Force MAE [meV/A] |
| ----------------------------------- | ----: | -----: | --------------: | ----------------: |
| faenet (this run)                   |     - |      - |          0.2500 |              55.0 |
| mean predictor                      |     - |      - |               - |                 - |
| linear in composition               |     - |      - |               - |                 - |
| FAENet, the paper's (OC20, RTX8000) | 75min |    623 |          0.4642 |              57.5 |

Per split (extended table):

| Model                               | Train | Infer. | Energy MAE [eV]: ID | OOD Ads | OOD Cat | OOD Both | Average | Force MAE [meV/A]: ID | OOD Ads | OOD Cat | OOD Both | Average |
| ----------------------------------- | ----: | -----: | ------------------: | ------: | ------: | -------: | ------: | --------------------: | ------: | ------: | -------: | ------: |
| faenet (this run)                   |     - |      - |              0.1000 |  0.2000 |  0.3000 |   0.4000 |  0.2500 |                  40.0 |    50.0 |    60.0 |     70.0 |    55.0 |
| mean predictor                      |     - |      - |                   - |       - |       - |        - |       - |                     - |       - |       - |        - |       - |
| linear in composition               |     - |      - |                   - |       - |       - |        - |       - |                     - |       - |       - |        - |       - |
| FAENet, the paper's (OC20, RTX8000) | 75min |    623 |              0.3960 |  0.4548 |  0.4295 |   0.5766 |  0.4643 |                  51.1 |    58.9 |    50.7 |     69.4 |    57.5 |

Further metrics (not in the paper):

| Model             | Force cosine: ID | OOD Ads | OOD Cat | OOD Both | Average | Magnitude error [meV/A]: ID | OOD Ads | OOD Cat | OOD Both | Average | EFwT: ID | OOD Ads | OOD Cat | OOD Both | Average |
| ----------------- | ---------------: | ------: | ------: | -------: | ------: | --------------------------: | ------: | ------: | -------: | ------: | -------: | ------: | ------: | -------: | ------: |
| faenet (this run) |            0.500 |   0.500 |   0.500 |    0.500 |   0.500 |                        20.0 |    20.0 |    20.0 |     20.0 |    20.0 |    0.12% |   0.12% |   0.12% |    0.12% |   0.12% |

- Systems: ID 1,000 (7,000 free atoms), OOD Ads 1,000 (7,000 free atoms), OOD Cat 1,000 (7,000 free atoms), OOD Both 1,000 (7,000 free atoms).
- Train: time of an epoch. Infer.: samples/s, forward pass only. Forces: of free atoms; the mean predictor's are zero. EFwT: systems with an energy error below 0.02 eV and every force component off by less than 0.03 eV/A. Average: over the four splits.
- This run: configs/demo/is2re.yml, 123,456 parameters, epoch -, step -, frames method stochastic, dim 2, group SE, seed 0; CPU, 2 threads; inference end to end - samples/s; - epochs trained.
- The paper's row: Table 1 and the extended table of C.4 of Duval et al. (ICML 2023), as published; OC20 S2EF-2M, one RTX8000.
"""  # noqa: E501


def energies(mae, ewt):
    return {
        "energy_mae": mae,
        "energy_mse": mae**2,
        "energy_within_threshold": ewt,
        "num_systems": 1000,
    }


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


def is2re(splits=None, *, oc20=False, **changes):
    own = {split: energies(0.1 * (i + 1), 8.0 - i) for i, split in enumerate(SPLITS)}
    linear = energies(0.25, 3.0)
    baselines = {
        split: {
            "mean_predictor": energies(0.7, 1.0),
            "linear_in_composition": linear | {"num_systems_unseen_elements": 3 if split == "val_ood_cat" else 0},
        }
        for split in SPLITS
    }
    return build_results(
        task="is2re",
        dataset="demo data (EMT labels)",
        oc20=oc20,
        run=run_info(**changes),
        splits=own if splits is None else splits,
        baselines=baselines,
        forward_samples_per_s=812.3,
        end_to_end_samples_per_s=400.4,
        seconds_per_epoch=8.31,
        epochs=12,
    )


def s2ef():
    return build_results(
        task="s2ef",
        dataset="OC20 S2EF-2M",
        oc20=True,
        run=run_info(step=None, epoch=None),
        splits={split: energies(0.1 * (i + 1), 8.0 - i) | forces(0.04 + 0.01 * i) for i, split in enumerate(SPLITS)},
        baselines={},
    )


def cells(markdown, label):
    """Cells of the lines whose first cell starts with a label."""
    lines = [line for line in markdown.splitlines() if line.startswith(f"| {label}")]
    return [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines]


def test_golden_is2re_table():
    assert render_table(is2re()) == IS2RE_GOLDEN


def test_golden_s2ef_tables():
    assert render_table(s2ef()) == S2EF_GOLDEN


def test_missing_splits_and_averages_are_dashes():
    results = is2re(splits={"val_ood_ads": energies(0.2, 5.0)})
    assert cells(render_table(results), "faenet") == [
        ["8.3s", "812", "-", "0.2000", "-", "-", "-", "-", "5.00%", "-", "-", "-"]
    ]
    assert "Systems: OOD Ads 1,000." in render_table(results)


def test_further_splits_are_told_in_text():
    extra = {"val_mine": energies(0.125, 4.0)}
    markdown = render_table(is2re(splits=is2re()["splits"] | extra))
    assert "val_mine: energy MAE 0.1250 eV, EwT 4.00%." in markdown
    assert "val_mine 1,000" in markdown
    assert cells(markdown, "faenet") == cells(render_table(is2re()), "faenet")


def test_the_papers_row_is_marked_and_can_be_left_out():
    assert "not comparable" in render_table(is2re(oc20=False))
    on_oc20 = render_table(is2re(oc20=True))
    assert "not comparable" not in on_oc20
    assert "FAENet, the paper's (OC20, RTX8000)" in on_oc20
    for results in (is2re(), s2ef()):
        without = render_table(results, reference=False)
        assert "paper's" not in without
        for baseline in ("mean predictor", "linear in composition"):
            assert f"| {baseline} " in without


@pytest.mark.parametrize("results", [is2re(), s2ef()], ids=["is2re", "s2ef"])
def test_the_papers_averages_are_those_of_its_splits(results):
    """Guards the typed-in numbers: an average is the mean of its four splits, as far as rounded."""
    row = [float(cell.strip("%")) for cell in cells(render_table(results), "FAENet")[-1][2:]]
    for values, tolerance in ((row[:5], 1e-4), (row[5:], 0.1 if results["oc20"] else 0.01)):
        assert sum(values[:4]) / 4 == pytest.approx(values[4], abs=tolerance)


def test_every_line_of_a_table_has_as_many_cells():
    for results in (is2re(model="a|b"), s2ef()):
        for block in render_table(results).split("\n\n"):
            lines = [line.replace("\\|", "") for line in block.splitlines() if line[:1] == "|"]
            assert len({line.count("|") for line in lines}) <= 1
            assert len({len(line) for line in block.splitlines() if line[:1] == "|"}) <= 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.31, "8.3s"), (99.9, "99.9s"), (720.0, "12min"), (69420.0, "1,157min")]
)
def test_epoch_times(seconds, text):
    results = is2re()
    results["training"]["seconds_per_epoch"] = seconds
    assert cells(render_table(results), "faenet")[0][0] == text
