"""Every record of a split is read, and each that cannot be used is listed with its reason."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from data_sets import dataset_of, open_dataset
from faenet_ocp.data import check as check_module
from faenet_ocp.data.check import Problem, check, compare_edges
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.data.packed import OC20PackedDataset
from faenet_ocp.prepare.pack import pack
from small_data import dump_record, make_fields, write_items

DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "energy": ({"y_relaxed": float("nan")}, "has values in y_relaxed that are not finite"),
    "label": ({"y_relaxed": None}, "has no label 'energy'"),
    "tags": ({"tags": torch.full((13,), 5)}, "has values in tags outside 0 to 2"),
    "fixed": ({"fixed": torch.full((13,), 2)}, "has values in fixed outside 0 to 1"),
    "point": ({"pos": torch.zeros(13, 3)}, "on one point"),
    "edges": ({"edge_index": torch.full((2, 464), 13)}, "has edges in edge_index of atoms outside 0 to 12"),
    "subsurface": ({"tags": torch.zeros(13)}, "transform remove_subsurface: no atom would be left"),
}


def damaged(folder: Path) -> tuple[Path, dict[int, str]]:
    """A file with a good record before each bad one; the bad ones and what is wrong."""
    items, expected = {}, {}
    good, fields = dump_record(make_fields(1)), make_fields(0)
    values = [(dump_record(fields | change), message) for change, message in DAMAGE.values()]
    values += [(good[:-30], "is "), (b"\x80\x04cos\nsystem\n.", "names os.system, .*refused"), (None, "is missing")]
    for number, (value, message) in enumerate(values):
        items[b"%d" % (2 * number)] = good
        expected[2 * number + 1] = message
        if value is not None:
            items[b"%d" % (2 * number + 1)] = value
    count = 2 * len(values) + 1
    items[b"%d" % (count - 1)] = good
    return write_items(folder / "data.lmdb", items | {b"length": b"K%c." % count, b"a": b"", b"b": b""}), expected


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_that_cannot_be_used_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, num_workers: int
) -> None:
    monkeypatch.setattr(check_module, "_AT_ONCE", 6)
    monkeypatch.setattr(check_module, "_FEW_TASKS", 0)
    path, expected = damaged(tmp_path)
    dataset = open_dataset(path, transforms={"remove_subsurface": {}})
    found = check({"train": dataset, "again": dataset}, num_workers)
    assert list(found) == ["train", "again"] and found["train"] == found["again"]
    assert [problem.index for problem in found["train"]] == list(expected)
    for problem in found["train"]:
        assert problem.file == str(path) and f"{path}: record {problem.index} " in problem.reason
        assert re.search(expected[problem.index], problem.reason), problem.reason
    shown = capsys.readouterr().err
    assert "checking again: 100%" in shown and f"unusable={2 * len(expected)}" in shown


def test_a_good_split_is_read_in_batches(
    small_is2re: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    dataset = open_dataset(small_is2re / "is2re/all/train")
    monkeypatch.setattr(check_module, "load_batch", lambda dataset, keys: read.append(len(keys)))
    monkeypatch.setattr(check_module, "_AT_ONCE", 5)
    read: list[int] = []
    assert check({"train": dataset}, 1, progress=False) == {"train": []}
    assert read == [5, 5, 2] and not capsys.readouterr().err


def test_packed_records(small_is2re: Path, tmp_path: Path) -> None:
    pack(small_is2re / "is2re/all/val_id", tmp_path)
    path = tmp_path / "data.lmdb"
    content = bytearray(path.read_bytes())
    dataset = open_dataset(path, OC20PackedDataset)
    record = dataset.files[0].read(2)
    content[content.index(record) + len(record) // 2] ^= 4
    path.write_bytes(content)
    (problem,) = check({"val": open_dataset(path, OC20PackedDataset)}, 1)["val"]
    assert (
        problem.index == 2 and "record 2 is damaged: its checksum is wrong (it calls itself sid 1002)" in problem.reason
    )


@pytest.mark.parametrize("cls", [OC20LmdbDataset, OC20PackedDataset])
def test_stored_edges_that_end_before_the_limits(small_is2re: Path, tmp_path: Path, cls: type[OC20LmdbDataset]) -> None:
    """The file has the 50 nearest neighbours within 6 A, cut strictly."""
    src = small_is2re / "is2re/all/train"
    if cls is OC20PackedDataset:
        pack(src, tmp_path)
        src = tmp_path
    options: dict[str, Any] = {"transforms": {"remove_subsurface": {}}, "labels": []}
    for cutoff, max_neighbors in ((6.0, 40), (6.0, 50), (4.5, 7)):
        assert compare_edges(open_dataset(src, cls, cutoff=cutoff, max_neighbors=max_neighbors, **options), 12) == []
    found = compare_edges(open_dataset(src, cls, cutoff=8.0, **options), 12)
    assert len(found) == 12 and len(compare_edges(open_dataset(src, cls, cutoff=8.0, **options), 5)) == 5
    assert re.search(r"record 0 lacks [1-9]\d* of \d+ edges and has 0 others and 0 twice; its longest is 5.9", found[0])
    assert compare_edges(open_dataset(src, cls, max_neighbors=60, **options), 12)


def _swapped(fields: dict[str, Any]) -> dict[str, Any]:
    return {"edge_index": fields["edge_index"].flip(0)}


def _other_sign(fields: dict[str, Any]) -> dict[str, Any]:
    return {"cell_offsets": -fields["cell_offsets"]}


def _moved(fields: dict[str, Any]) -> dict[str, Any]:
    return {"pos": fields["pos"] + torch.linspace(0, 1, 13)[:, None]}


def _thinned(fields: dict[str, Any]) -> dict[str, Any]:
    return {"edge_index": fields["edge_index"][:, ::2], "cell_offsets": fields["cell_offsets"][::2]}


def _doubled(fields: dict[str, Any]) -> dict[str, Any]:
    return {"edge_index": fields["edge_index"].tile(1, 2), "cell_offsets": fields["cell_offsets"].tile(2, 1)}


@pytest.mark.parametrize(
    ("change", "max_neighbors", "expected"),
    [
        *((change, 1000, [1, 0, 0]) for change in (_swapped, _other_sign, _moved)),
        (_thinned, 5, [1, 1, 0]),
        (_doubled, 1000, [0, 0, 1]),
        (dict, 1000, [0, 0, 0]),
    ],
)
def test_stored_edges_of_another_convention_or_geometry(
    tmp_path: Path, change: Any, max_neighbors: int, expected: list[bool]
) -> None:
    """Lacking, others, twice; edges longer than the cutoff are cut before."""
    fields = make_fields(0)
    dataset = dataset_of(tmp_path, fields | change(fields), max_neighbors=max_neighbors)
    found = "".join(compare_edges(dataset, 32))
    numbers = re.search(r"lacks (\d+) of .* has (\d+) others and (\d+) twice", found)
    counts = [int(number) > 0 for number in numbers.groups()] if numbers else [False] * 3
    assert counts == expected, found


def test_records_that_cannot_be_used_are_not_compared(tmp_path: Path) -> None:
    fields = make_fields(0)
    bad = [{"edge_index": torch.full((2, 464), 13)}, {"cell": torch.ones(3, 3)}, {"pos": fields["pos"][:3]}]
    dataset = dataset_of(tmp_path, *(fields | change for change in bad), fields | _other_sign(fields))
    (found,) = compare_edges(dataset, 4)
    assert "record 3 lacks" in found


class Own(Dataset):
    """Of a user, with errors of its own; fails as a batch where no sample does."""

    def __init__(self, bad: set[int]):
        self.bad = bad

    def __len__(self) -> int:
        return 5

    def __getitem__(self, key: tuple[int, int]) -> int:
        if key[1] in self.bad:
            raise KeyError("no such thing")
        return key[1]

    def load_batch(self, keys: list[tuple[int, int]]) -> None:
        raise ValueError("shapes differ")


def test_data_sets_of_users_and_errors_of_any_kind() -> None:
    assert check({"own": Own({1, 4})}, 1)["own"] == [Problem(i, "", "KeyError: 'no such thing'") for i in (1, 4)]
    assert check({"own": Own(set())}, 1)["own"] == [Problem(0, "", "shapes differ")]
