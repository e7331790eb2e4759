"""Batches made as a whole are those of the samples one by one, to the last bit, in every format; loading them."""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fairchem.core.datasets.atomic_data import AtomicData

from data_sets import FRAMES, TRANSFORMS, assert_same, dataset_of, one_by_one, open_dataset
from faenet_ocp.data.loader import Batches, EvalBatchSampler, collate, load_batch, make_loader
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.data.packed import OC20PackedDataset
from faenet_ocp.data.transforms import BatchTransform, RemoveSubsurface, Transform, register_transform
from faenet_ocp.prepare.pack import pack
from small_data import make_fields


class Format(NamedTuple):
    cls: type[OC20LmdbDataset]
    is2re: Path
    s2ef: Path


@pytest.fixture(scope="module", params=["oc20_lmdb", "oc20_packed"])
def stored(
    request: pytest.FixtureRequest, small_is2re: Path, small_s2ef: Path, tmp_path_factory: pytest.TempPathFactory
) -> Format:
    """The same training sets in each format."""
    sources = small_is2re / "is2re/all/train", small_s2ef / "s2ef/2M/train"
    if request.param == "oc20_lmdb":
        return Format(OC20LmdbDataset, *sources)
    targets = [tmp_path_factory.mktemp("packed") for _ in sources]
    for source, target in zip(sources, targets, strict=True):
        pack(source, target)
    return Format(OC20PackedDataset, *targets)


@pytest.mark.parametrize("transforms", list(TRANSFORMS))
def test_a_batch_is_its_samples(stored: Format, transforms: str) -> None:
    dataset = open_dataset(
        stored.is2re, stored.cls, max_neighbors=20, transforms=TRANSFORMS[transforms], seed=3, labels=["energy"]
    )
    for keys in ([(2, index) for index in (7, 0, 11, 3, 4)], [(0, 5)]):
        assert_same(dataset.load_batch(keys), one_by_one(dataset, keys))


@pytest.mark.parametrize("edges", ["stored", "recompute", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_records_of_all_eras_in_one_batch(stored: Format, edges: str, dtype: str) -> None:
    """The first six with edges, labels y and force; the others without, energy and forces."""
    transforms = {"remove_subsurface": {}, "data_augmentation": {}}
    options = {"labels": ["energy", "forces"], "edges": edges, "dtype": dtype, "transforms": transforms}
    dataset = open_dataset(stored.s2ef, stored.cls, max_neighbors=20, **options)
    keys = [(1, index) for index in (10, 0, 6, 3, 5, 11)]
    batch = dataset.load_batch(keys)
    assert_same(batch, one_by_one(dataset, keys))
    assert bool((batch.nedges > 0).all()) == (edges != "none")


def test_batches_can_be_taken_apart(small_is2re: Path) -> None:
    dataset = open_dataset(small_is2re / "is2re/all/train", transforms=TRANSFORMS["stochastic"])
    keys = [(0, 4), (0, 9)]
    for sample, key in zip(dataset.load_batch(keys).batch_to_atomicdata_list(), keys, strict=True):
        assert torch.equal(sample.pos, dataset[key].pos) and torch.equal(sample.edge_index, dataset[key].edge_index)


@pytest.mark.parametrize("frames", ["stochastic", "canonical", "full", "det"])
def test_loaders_say_how_large_several_frames_make_a_batch(small_is2re: Path, frames: str) -> None:
    """From worker to model; with one frame of every system there is nothing to say."""
    dataset = open_dataset(small_is2re / "is2re/all/train", transforms=TRANSFORMS[frames])
    for workers in (0, 1):
        ((batch,),) = make_loader(dataset, [[(0, 4), (0, 9), (0, 2)]], num_workers=workers)
        if frames == "stochastic":
            assert "frame_sizes" not in batch
            continue
        for system, (views, atoms, edges) in enumerate(batch.frame_sizes):
            assert views == int((batch.frame_weight[system] > 0).sum())
            assert (atoms, edges) == (views * int(batch.natoms[system]), views * int(batch.nedges[system]))
        assert len(batch.clone().to("meta").frame_sizes) == len(batch.batch_to_atomicdata_list()) == 3


@pytest.mark.parametrize("below", [0, 1])
def test_as_many_atoms_as_systems(tmp_path: Path, below: int) -> None:
    """Fields of atoms and of systems have the same length: systems of one atom, also once others are removed."""
    atom: dict[str, Any] = {"pos": torch.tensor([[0.0, 0, 0], [0, 0, 1]])[: 1 + below], "cell": 50 * torch.eye(3)}
    atom |= {"y": 0.5, "tags": torch.tensor([2, 0])[: 1 + below]}
    records = [atom | {"atomic_numbers": torch.full((1 + below,), z), "sid": z} for z in (1, 6, 8)]
    dataset = dataset_of(tmp_path, *records, transforms=TRANSFORMS["stochastic"])
    keys = [(0, 2), (0, 0), (0, 1)]
    batch = dataset.load_batch(keys)
    assert len(batch.pos) == len(batch.natoms) == 3 and batch.energy.tolist() == [0.5] * 3
    assert_same(batch, one_by_one(dataset, keys))


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
    frames = {"frame_averaging": FRAMES["stochastic"]}
    dataset, plain = (
        open_dataset(small_is2re / "is2re/all/train", transforms=t) for t in ({name: {}} | frames, frames)
    )
    assert not dataset.transforms.takes_batches
    keys = [(1, 2), (1, 7)]
    assert_same(dataset.load_batch(keys), one_by_one(dataset, keys))
    changed = "pos" if name == "test_shift" else "energy"
    assert not torch.equal(dataset.load_batch(keys)[changed], plain.load_batch(keys)[changed])


def test_a_data_set_with_its_own_samples_is_asked_for_them(small_is2re: Path) -> None:
    class Own(OC20LmdbDataset):
        def __getitem__(self, key: Any) -> AtomicData:
            data = super().__getitem__(key)
            data.energy = data.energy + 1
            return data

    dataset, own = (open_dataset(small_is2re / "is2re/all/train", cls) for cls in (OC20LmdbDataset, Own))
    assert torch.equal(own.load_batch([(0, 1), (0, 2)]).energy, dataset.load_batch([(0, 1), (0, 2)]).energy + 1)


@pytest.mark.parametrize("edges", ["stored", "recompute"])
def test_edges_that_are_not_made_are_those_that_would_be_removed(small_is2re: Path, edges: str) -> None:
    names = ("remove_subsurface", "test_same_subsurface")
    quick, plain = (open_dataset(small_is2re / "is2re/all/train", edges=edges, transforms={name: {}}) for name in names)
    assert quick.transforms.removes_subsurface_first and not plain.transforms.removes_subsurface_first
    keys = [(0, index) for index in range(12)]
    assert_same(quick.load_batch(keys), plain.load_batch(keys))


def test_the_order_of_stored_edges_does_not_matter(tmp_path: Path) -> None:
    fields = make_fields(0)
    order = torch.randperm(fields["edge_index"].shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = fields | {"edge_index": fields["edge_index"][:, order], "cell_offsets": fields["cell_offsets"][order]}
    first, *others = dataset_of(tmp_path, fields, shuffled, make_fields(0, edges=False), max_neighbors=30)
    for other in others:
        assert torch.equal(first.edge_index, other.edge_index)
        assert torch.equal(first.cell_offsets, other.cell_offsets)


# Loading


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("y_relaxed", float("nan"), r"record 2 \(sid 2\) has values in y_relaxed that are not finite"),
        ("tags", torch.zeros(13), r"record 2 \(sid 2\): transform remove_subsurface: no atom would be left"),
    ],
)
def test_a_sample_that_cannot_be_used_ends_loading_with_its_name_alone(
    tmp_path: Path, num_workers: int, name: str, value: Any, message: str
) -> None:
    records = [make_fields(index) for index in range(4)]
    records[2][name] = torch.zeros(records[2]["natoms"]) if name == "tags" else value
    dataset = dataset_of(tmp_path, *records, transforms=TRANSFORMS["stochastic"])
    loader = iter(make_loader(dataset, EvalBatchSampler(range(4), 2), num_workers=num_workers, num_chunks=2))
    assert [batch.sid for batch in next(loader)] == [["0"], ["1"]]
    with pytest.raises(ValueError, match=rf"^{tmp_path}/data.lmdb: {message}"):  # no traceback of a worker
        next(loader)


def test_other_data_sets_are_read_sample_by_sample(small_is2re: Path) -> None:
    class Plain(torch.utils.data.Dataset):
        def __init__(self, dataset: OC20LmdbDataset):
            self.dataset = dataset

        def __getitem__(self, key: tuple[int, int]) -> AtomicData:
            return self.dataset[key]

    dataset = open_dataset(small_is2re / "is2re/all/train", transforms=TRANSFORMS["stochastic"])
    keys = [(0, 3), (0, 1), (0, 2)]
    assert_same(load_batch(dataset, keys), load_batch(Plain(dataset), keys))
    assert list(make_loader(Plain(dataset), [keys], num_workers=0, num_chunks=2, convert=len)) == [2]


def test_batches_are_pickled_with_one_tensor(small_is2re: Path) -> None:
    dataset = open_dataset(small_is2re / "is2re/all/train", transforms=TRANSFORMS["stochastic"])
    batches = collate([dataset[index] for index in (0, 1, 6, 7, 2)], num_chunks=3)
    _, (memory, *rest) = batches.__reduce__()
    assert memory.dtype == torch.uint8 and b"torch.storage" not in pickle.dumps(rest)
    again = pickle.loads(pickle.dumps(batches))
    assert isinstance(again, Batches) and [len(batch.natoms) for batch in again] == [2, 2, 1]
    for batch, expected in zip(again, batches, strict=True):
        assert_same(batch, expected)
        batch.pos += 1  # a place of its own
        assert torch.equal(batch.natoms, expected.natoms) and not torch.equal(batch.pos, expected.pos)


def test_built_in_transforms_take_batches() -> None:
    from faenet_ocp.data.transforms import TRANSFORMS as known

    for name in ("remove_subsurface", "frame_averaging", "data_augmentation"):
        assert issubclass(known[name], BatchTransform)
