"""Shares of a training set: systems stay together, nothing is lost or used twice, the seed alone decides."""

from pathlib import Path

import numpy as np
import pytest

from data_sets import open_dataset
from faenet_ocp.build import make_dataset
from faenet_ocp.config.schema import build_config
from faenet_ocp.config.yaml import find_config, load_yaml
from faenet_ocp.data.held_out import hold_out
from faenet_ocp.data.packed import OC20PackedDataset
from faenet_ocp.prepare.pack import pack
from small_data import dump_record, make_fields, write_lmdb

GROUPS = np.random.default_rng(1).permutation(np.repeat(np.arange(50), np.arange(50) % 4 + 1))


def test_parts_are_whole_systems_and_together_everything() -> None:
    first, second, rest = hold_out(GROUPS, [0.1, 0.2], seed=3)
    assert sorted([*first, *second, *rest]) == list(range(len(GROUPS)))
    sets = [set(GROUPS[part]) for part in (first, second, rest)]
    assert [len(found) for found in sets] == [5, 10, 35]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert all((np.diff(part) > 0).all() for part in (first, second, rest))


def test_the_seed_decides() -> None:
    again, other = (hold_out(GROUPS, [0.1], seed=seed)[0] for seed in (3, 4))
    np.testing.assert_array_equal(hold_out(GROUPS, [0.1], seed=3)[0], again)
    assert set(again) != set(other)


def test_something_has_to_be_left() -> None:
    assert [len(part) for part in hold_out(np.array([0, 0, 1]), [0.01], seed=0)] in ([2, 1], [1, 2])
    for groups, shares in ((np.zeros(9, dtype=int), [0.1]), (np.arange(10), [0.5, 0.5])):
        with pytest.raises(ValueError, match=r"from_train: .* would be held out, and none left to train on"):
            hold_out(groups, shares, seed=0)


def test_a_share_that_whole_systems_cannot_give_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = [dump_record(make_fields(index) | {"sid": index // 4}) for index in range(12)]
    source = {"src": str(write_lmdb(tmp_path / "data.lmdb", values))}
    for share, told in ((0.3, False), (0.1, True)):
        raw = load_yaml(find_config("configs/is2re/faenet.yml"))
        raw["dataset"] |= {"root": "", "train": source, "val": {"val": {"from_train": share}}, "test": {}}
        config = build_config(raw | {"job": {"run_dir": str(tmp_path)}, "evaluation_metrics": {}})
        assert len(make_dataset(config, config.dataset.val["val"])) == 4
        assert ("from_train: 0.1 of the systems are 4 of 12 samples" in caplog.text) == told


def test_frames_of_a_sid_are_of_one_system(tmp_path: Path) -> None:
    sids = [7, 3, 7, 12, 3, 3]
    values = [dump_record(make_fields(index) | {"sid": sid}) for index, sid in enumerate(sids)]
    dataset = open_dataset(write_lmdb(tmp_path / "data.lmdb", values), cache_dir=str(tmp_path / "cache"))
    pack(tmp_path / "data.lmdb", tmp_path / "packed")
    packed = open_dataset(tmp_path / "packed", OC20PackedDataset)
    for groups in (dataset.groups(), packed.groups(), dataset.groups()):  # at last those of the cache
        assert np.array_equal(groups[:, None] == groups, np.array(sids)[:, None] == sids)
    values[2] = b"damaged"
    groups = open_dataset(write_lmdb(tmp_path / "bad" / "data.lmdb", values)).groups()
    assert (groups == groups[2]).sum() == 1 and groups[1] == groups[4]
    assert len(dataset.select(np.array([5, 0])).groups()) == 2
