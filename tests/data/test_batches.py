"""Batches made as a whole are those of the samples one by one, to the last bit."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faenet_ocp.bad_samples import BadSample
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch

from faenet_ocp.benchmark.data import data_paths, table
from faenet_ocp.data import loader
from faenet_ocp.data.loader import BatchSource, EvalBatchSampler, TrainBatchSampler, make_loader
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.data.transforms import BatchTransform, RemoveSubsurface, Transform, register_transform
from small_data import dump_record, make_fields, write_lmdb

FRAMES = {
    "stochastic": {"dim": 2, "group": "SE", "method": "stochastic"},
    "stochastic 3D": {"dim": 3, "group": "E", "method": "stochastic"},
    "canonical": {"dim": 3, "group": "E", "method": "canonical"},
    "full": {"dim": 2, "group": "E", "method": "full"},
    "det": {"dim": 3, "group": "SE", "method": "det"},
}
TRANSFORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "no subsurface": {"remove_subsurface": {}},
    "augmented": {"remove_subsurface": {}, "data_augmentation": {"dim": 3, "reflect": True}},
    "augmented whole": {"data_augmentation": {"dim": 2}},
    **{name: {"remove_subsurface": {}, "frame_averaging": frames} for name, frames in FRAMES.items()},
}


def open_dataset(src: Path, **config: Any) -> OC20LmdbDataset:
    return OC20LmdbDataset({"src": str(src), "cutoff": 6.0, "max_neighbors": 20, **config})


def assert_same(batch: AtomicData, expected: AtomicData) -> None:
    """Bits, types, order, and what fairchem knows about the systems of a batch."""
    assert batch.keys() == expected.keys()
    for name, value in expected:
        if isinstance(value, torch.Tensor):
            assert batch[name].dtype == value.dtype and torch.equal(batch[name], value), name
            assert batch[name].is_contiguous(), name
        else:
            assert batch[name] == value, name
    assert batch.get_batch_stats() == expected.get_batch_stats()


def one_by_one(dataset: OC20LmdbDataset, keys: list[tuple[int, int]]) -> AtomicData:
    return atomicdata_list_to_batch([dataset[key] for key in keys])


@pytest.mark.parametrize("transforms", list(TRANSFORMS))
def test_a_batch_is_its_samples(small_is2re: Path, transforms: str) -> None:
    dataset = open_dataset(small_is2re / "is2re/all/train", transforms=TRANSFORMS[transforms], seed=3)
    for keys in ([(2, index) for index in (7, 0, 11, 3, 4)], [(0, 5)]):
        assert_same(dataset.load_batch(keys), one_by_one(dataset, keys))


@pytest.mark.parametrize("edges", ["stored", "recompute", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_records_of_all_eras_in_one_batch(small_s2ef: Path, edges: str, dtype: str) -> None:
    """The first six with edges, labels y and force; the others without, energy and forces."""
    dataset = open_dataset(
        small_s2ef / "s2ef/2M/train",
        labels=["energy", "forces"],
        edges=edges,
        dtype=dtype,
        transforms={"remove_subsurface": {}, "data_augmentation": {}},
    )
    keys = [(1, index) for index in (10, 0, 6, 3, 5, 11)]
    batch = dataset.load_batch(keys)
    assert_same(batch, one_by_one(dataset, keys))
    assert (batch.nedges > 0).all() == (edges != "none")


def test_the_oc20_sample(oc20_sample: Path) -> None:
    """Slabs full of equal distances, most with lists that end inside a shell."""
    for transforms in ("none", "stochastic"):
        dataset = open_dataset(
            oc20_sample / "is2re/all/train", max_neighbors=40, transforms=TRANSFORMS[transforms], seed=1
        )
        keys = [(1, index) for index in np.random.default_rng(0).permutation(32).tolist()]
        assert_same(dataset.load_batch(keys), one_by_one(dataset, keys))


def test_batches_can_be_taken_apart(small_is2re: Path) -> None:
    dataset = open_dataset(small_is2re / "is2re/all/train", transforms=TRANSFORMS["stochastic"])
    keys = [(0, 4), (0, 9)]
    for sample, key in zip(dataset.load_batch(keys).batch_to_atomicdata_list(), keys, strict=True):
        assert torch.equal(sample.pos, dataset[key].pos) and torch.equal(sample.edge_index, dataset[key].edge_index)


def test_systems_of_one_atom(tmp_path: Path) -> None:
    """As many atoms as systems: fields of atoms and of systems have the same length."""
    atom = {"pos": torch.zeros(1, 3), "cell": 50 * torch.eye(3), "y": 0.5, "tags": torch.tensor([2])}
    values = [dump_record(atom | {"atomic_numbers": torch.tensor([float(z)]), "sid": z}) for z in (1, 6, 8)]
    dataset = open_dataset(write_lmdb(tmp_path / "data.lmdb", values), transforms=TRANSFORMS["no subsurface"])
    keys = [(0, 2), (0, 0), (0, 1)]
    assert_same(dataset.load_batch(keys), one_by_one(dataset, keys))


def test_random_frames_depend_on_seed_epoch_and_index_only(small_is2re: Path) -> None:
    def rotations(seed: int, epoch: int, order: list[int]) -> torch.Tensor:
        dataset = open_dataset(small_is2re / "is2re/all/train", transforms=TRANSFORMS["stochastic 3D"], seed=seed)
        found = dataset.load_batch([(epoch, index) for index in order]).frame_rot
        return found[torch.tensor(order).argsort()]

    first = rotations(0, 1, list(range(12)))
    assert torch.equal(first, rotations(0, 1, list(range(12))[::-1]))
    assert not torch.equal(first, rotations(0, 2, list(range(12))))
    assert not torch.equal(first, rotations(5, 1, list(range(12))))


# What cannot work on batches


@register_transform("test_shift")
class Shift(Transform):
    """Of a user: one sample at a time."""

    def __call__(self, data: AtomicData, generator: torch.Generator) -> AtomicData:
        if len(data.natoms) != 1:
            raise TypeError("this transform knows single samples only")
        data.pos = data.pos + torch.randn(1, 3, generator=generator)
        return data


@register_transform("test_other_subsurface")
class Other(RemoveSubsurface):
    """Inherits `batch`, but does something else with a sample."""

    def __call__(self, data: AtomicData, generator: torch.Generator) -> AtomicData:
        data.energy = data.energy + 1
        return super().__call__(data, generator)


@register_transform("test_same_subsurface")
class Same(RemoveSubsurface):
    """The same, but not known to be: edges of removed atoms are made and removed again."""


@pytest.mark.parametrize("name", ["test_shift", "test_other_subsurface"])
def test_transforms_of_single_samples_are_called_with_single_samples(small_is2re: Path, name: str) -> None:
    steps = {name: {}, "frame_averaging": FRAMES["stochastic"]}
    dataset = open_dataset(small_is2re / "is2re/all/train", transforms=steps)
    assert not dataset.transforms.takes_batches
    keys = [(1, 2), (1, 7)]
    assert_same(dataset.load_batch(keys), one_by_one(dataset, keys))
    plain = open_dataset(small_is2re / "is2re/all/train", transforms={"frame_averaging": FRAMES["stochastic"]})
    changed = "pos" if name == "test_shift" else "energy"
    assert not torch.equal(dataset.load_batch(keys)[changed], plain.load_batch(keys)[changed])


def test_a_data_set_with_its_own_samples_is_asked_for_them(small_is2re: Path) -> None:
    class Own(OC20LmdbDataset):
        def __getitem__(self, key: Any) -> AtomicData:
            data = super().__getitem__(key)
            data.energy = data.energy + 1
            return data

    dataset = open_dataset(small_is2re / "is2re/all/train")
    own = Own({**dataset.config})
    assert torch.equal(own.load_batch([(0, 1), (0, 2)]).energy, dataset.load_batch([(0, 1), (0, 2)]).energy + 1)


@pytest.mark.parametrize("edges", ["stored", "recompute"])
def test_edges_that_are_not_made_are_those_that_would_be_removed(small_is2re: Path, edges: str) -> None:
    names = ("remove_subsurface", "test_same_subsurface")
    quick, plain = (open_dataset(small_is2re / "is2re/all/train", edges=edges, transforms={name: {}}) for name in names)
    assert quick.transforms.removes_subsurface_first and not plain.transforms.removes_subsurface_first
    keys = [(0, index) for index in range(12)]
    assert_same(quick.load_batch(keys), plain.load_batch(keys))


# Records


def test_the_order_of_stored_edges_does_not_matter(tmp_path: Path) -> None:
    fields = make_fields(0)
    order = torch.randperm(fields["edge_index"].shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = fields | {"edge_index": fields["edge_index"][:, order], "cell_offsets": fields["cell_offsets"][order]}
    values = [dump_record(fields), dump_record(shuffled), dump_record(make_fields(0, edges=False))]
    dataset = open_dataset(write_lmdb(tmp_path / "data.lmdb", values), max_neighbors=30)
    first, *others = (dataset[index] for index in range(3))
    for other in others:
        assert torch.equal(first.edge_index, other.edge_index)
        assert torch.equal(first.cell_offsets, other.cell_offsets)


# Loading


def _with_bad_ones(folder: Path) -> Path:
    fields = [make_fields(index, layers=1 + index % 3) for index in range(8)]
    fields[2]["y_relaxed"] = float("nan")
    fields[5]["tags"] = torch.zeros_like(fields[5]["tags"])  # refused by the transform, not by the reader
    return write_lmdb(folder / "data.lmdb", [dump_record(one) for one in fields])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_left_out_and_named(tmp_path: Path, num_workers: int) -> None:
    dataset = open_dataset(_with_bad_ones(tmp_path), transforms=TRANSFORMS["stochastic"])
    sampler = EvalBatchSampler(range(8), 4)
    first, second = make_loader(dataset, sampler, num_workers=num_workers, num_chunks=2)
    assert [sample.index for sample in first.bad] == [2] and [sample.index for sample in second.bad] == [5]
    assert "data.lmdb: record 2 (sid 2) has values in y_relaxed that are not finite" in first.bad[0].reason
    assert "record 5 (sid 5): transform remove_subsurface: no atom would be left" in second.bad[0].reason
    assert first.kept == [0, 1, 3] and second.kept == [0, 2, 3]
    chunks = [[0, 1], [3], [4], [6, 7]]
    for batch, indices in zip([*first, *second], chunks, strict=True):
        assert_same(batch, one_by_one(dataset, [(0, index) for index in indices]))


def test_a_batch_of_bad_samples_only(tmp_path: Path) -> None:
    source = BatchSource(open_dataset(_with_bad_ones(tmp_path)), num_chunks=2)
    batches = source.__getitems__([(0, 0), (0, 2)])
    assert batches[0].sid == ["0"] and batches[1] is None and batches.kept == [0]


def test_other_data_sets_are_read_sample_by_sample(small_is2re: Path) -> None:
    class Plain(torch.utils.data.Dataset):
        def __init__(self, dataset: OC20LmdbDataset):
            self.dataset = dataset

        def __getitem__(self, key: tuple[int, int]) -> AtomicData:
            return self.dataset[key]

    dataset = open_dataset(small_is2re / "is2re/all/train", transforms=TRANSFORMS["stochastic"])
    keys = [(0, 3), (0, 1), (0, 2)]
    (quick,), (plain,) = (BatchSource(one).__getitems__(keys) for one in (dataset, Plain(dataset)))
    assert_same(quick, plain)


def test_batches_are_made_as_a_whole_unless_a_sample_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[list[Any]] = []
    whole = loader._join
    monkeypatch.setattr(loader, "_join", lambda samples: joined.append(list(samples)) or whole(samples))
    dataset = open_dataset(_with_bad_ones(tmp_path), transforms=TRANSFORMS["stochastic"])
    for _ in make_loader(dataset, EvalBatchSampler(range(8), 2), num_workers=0):
        pass
    assert [[isinstance(sample, BadSample) for sample in samples] for samples in joined] == [
        [True, False],
        [False, True],
    ]


def test_workers_do_not_change_batches(small_is2re: Path) -> None:
    dataset = open_dataset(small_is2re / "is2re/all/train", transforms=TRANSFORMS["stochastic"])
    epochs = []
    for num_workers in (0, 2):
        sampler = TrainBatchSampler(12, 5, seed=1)
        sampler.set_epoch_and_start_iteration(2, 0)
        epochs.append([batch for (batch,) in make_loader(dataset, sampler, num_workers=num_workers)])
    assert sorted(sid for batch in epochs[0] for sid in batch.sid) == sorted(map(str, range(12)))
    for first, second in zip(*epochs, strict=True):
        assert_same(second, first)


def test_batches_are_pickled_with_one_tensor(tmp_path: Path) -> None:
    dataset = open_dataset(_with_bad_ones(tmp_path), transforms=TRANSFORMS["stochastic"])
    batches = BatchSource(dataset, num_chunks=3).__getitems__([(0, index) for index in (0, 1, 2, 6, 7)])
    _, (memory, *rest) = batches.__reduce__()
    assert memory.dtype == torch.uint8 and b"torch" not in pickle.dumps(rest[1:])
    again = pickle.loads(pickle.dumps(batches))
    assert (again.bad, again.kept) == (batches.bad, batches.kept) == (batches.bad, [0, 1, 3, 4])
    for batch, expected in zip(again, batches, strict=True):
        assert_same(batch, expected)
        batch.pos += 1  # a place of its own
        assert torch.equal(batch.natoms, expected.natoms) and not torch.equal(batch.pos, expected.pos)
    empty = BatchSource(dataset).__getitems__([(0, 2)])
    assert list(pickle.loads(pickle.dumps(empty))) == [None]


def test_built_in_transforms_take_batches() -> None:
    from faenet_ocp.data.transforms import TRANSFORMS as known

    for name in ("remove_subsurface", "frame_averaging", "data_augmentation"):
        assert issubclass(known[name], BatchTransform)


@pytest.mark.parametrize("own_file", [False, True])
def test_the_benchmark_loads_the_same_systems_in_each_way(small_is2re: Path, own_file: bool) -> None:
    lmdb = small_is2re / "is2re/all/train/data.lmdb" if own_file else None
    group = data_paths(lmdb=lmdb, batch_size=2, rounds=2, max_neighbors=40, remove_subsurface=True)
    stock, single, whole, packed = group["paths"]
    assert group["systems"] == 16 and group["edges"] > group["atoms"] > 4
    assert stock["speed_up"] == 1 and all(len(row["seconds"]) == 2 for row in group["paths"])
    assert stock["bytes"] == single["bytes"] == whole["bytes"] > packed["bytes"]
    heads, *rows = table(group)
    assert [len(row) for row in rows] == [len(heads)] * 4 and rows[3][0] == packed["model"]
