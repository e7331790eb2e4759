"""Forces of surface and adsorbate atoms apart, against numpy; holes are told, and only holes."""

import numpy as np
import pytest
import torch

from faenet_ocp.evaluation.by_atoms import ByAtoms, not_learnt
from faenet_ocp.targets import TARGETS

RNG = np.random.default_rng(0)
LABEL = RNG.normal(size=(600, 3)) * [1.0, 0.5, 2.0] + [0.0, 0.1, 3.0]
PRED = LABEL * [0.9, 1.1, 1.0] + 0.1 * RNG.normal(size=LABEL.shape)
TAGS = RNG.integers(0, 3, size=600)
COUNTED = RNG.random(600) < 0.8


def _compute(pred: np.ndarray, tags: np.ndarray = TAGS, parts: int = 1) -> dict:
    """Sums of parts of the atoms, added up as over ranks."""
    total = ByAtoms(TARGETS["forces"])
    for rows in np.array_split(np.arange(600), parts):
        part = ByAtoms(TARGETS["forces"])
        part.update(pred[rows], LABEL[rows], torch.tensor(COUNTED[rows]), torch.tensor(tags[rows]))
        total.sums += part.sums
    return total.compute()


@pytest.mark.parametrize("parts", [1, 3])
def test_numbers_are_those_of_numpy(parts: int) -> None:
    found = _compute(PRED, parts=parts)
    for name, group in (("surface", COUNTED & (TAGS != 2)), ("adsorbate", COUNTED & (TAGS == 2))):
        values = found[name]
        assert values["num_atoms"] == group.sum()
        assert values["mae"] == pytest.approx(np.abs(PRED - LABEL)[group].mean())
        for axis in range(3):
            pred, label = PRED[group, axis], LABEL[group, axis]
            assert values["correlation"][axis] == pytest.approx(np.corrcoef(pred, label)[0, 1])
            assert values["spread"][axis] == pytest.approx(pred.std() / label.std())
            assert values["label_stdev"][axis] == pytest.approx(label.std())


def test_without_adsorbates_there_is_one_group_and_without_variation_no_correlation() -> None:
    assert list(_compute(PRED, tags=np.zeros(600, dtype=int))) == ["all"]
    still = ByAtoms(TARGETS["forces"])
    still.update(np.ones((4, 3)), np.full((4, 3), 2.0), torch.ones(4, dtype=torch.bool), torch.ones(4))
    assert still.compute()["all"]["correlation"] == [None] * 3
    assert not list(not_learnt(TARGETS["forces"], still.compute()))


def test_holes_are_told_and_nothing_else() -> None:
    assert not list(not_learnt(TARGETS["forces"], _compute(PRED)))
    hole = PRED.copy()
    hole[TAGS == 2, :2] *= 0.03
    found = list(not_learnt(TARGETS["forces"], _compute(hole)))
    assert [reason.partition(":")[0] for reason in found] == [
        "forces of adsorbate atoms along x are not learnt",
        "forces of adsorbate atoms along y are not learnt",
    ]
    assert "predictions vary 0.03 as much as labels" in found[0]
