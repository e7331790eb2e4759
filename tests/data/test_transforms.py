"""Transforms change a sample consistently, draw from their generator only, and are checked when they are built."""

import pytest
import torch
from fairchem.core.datasets.atomic_data import AtomicData

import small_data
from faenet_ocp.data import transforms
from faenet_ocp.data.batch import make_batch
from faenet_ocp.data.fields import Reading
from faenet_ocp.data.records import decode_record
from faenet_ocp.data.transforms import TRANSFORMS, Compose, Transform, register_transform
from faenet_ocp.frames import compute_frames, num_frames
from faenet_ocp.graph.vectors import edge_vectors


def sample(index: int = 0) -> AtomicData:
    """A slab as the data set makes it, with forces."""
    record = decode_record(small_data.dump_record(small_data.make_fields(index)))
    reading = Reading({"energy": ["y_relaxed"], "forces": ["force"]}, "stored", torch.float64, 6.0, 50)
    data = make_batch([record], ["7"], reading)
    data.dataset = "oc20"
    return data


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(specs, data, seed: int = 0) -> AtomicData:
    return Compose(specs)(data, seeded(seed))


def vectors_of(data: AtomicData) -> torch.Tensor:
    return edge_vectors(data.pos, data.cell, data.edge_index, data.cell_offsets)


# remove_subsurface


@pytest.mark.parametrize("index", range(4))
def test_removing_the_subsurface_keeps_atoms_edges_and_labels_consistent(index):
    before, after = sample(index), run({"remove_subsurface": {}}, sample(index))
    old = (before.tags > 0).nonzero().view(-1)  # number in the full system of each atom left
    assert 0 < len(old) < len(before.pos)
    for name in ("pos", "atomic_numbers", "tags", "fixed", "forces", "batch"):
        assert torch.equal(after[name], before[name][old]), name
    for name in ("energy", "cell", "pbc", "charge", "spin", "composition"):
        assert torch.equal(after[name], before[name]), name
    assert after.natoms.tolist() == [len(old)] and after.nedges.tolist() == [after.edge_index.shape[1]]
    assert after.sid == ["7"] and after.dataset == "oc20"
    after.dataset = ["oc20"]
    after.validate()
    edges = zip(*before.edge_index.tolist(), before.cell_offsets.tolist(), vectors_of(before).tolist(), strict=True)
    expected = [(j, i, k, v) for j, i, k, v in edges if before.tags[j] > 0 and before.tags[i] > 0]
    found = zip(*old[after.edge_index].tolist(), after.cell_offsets.tolist(), vectors_of(after).tolist(), strict=True)
    assert list(found) == expected and 0 < len(expected) < before.edge_index.shape[1]


def test_nothing_below_the_surface_changes_nothing():
    data = sample()
    data.tags = torch.full_like(data.tags, 2)
    before = dict(data)
    after = run({"remove_subsurface": {}}, data)
    for name in ("pos", "edge_index", "cell_offsets", "natoms", "nedges", "forces"):
        assert torch.equal(after[name], before[name])


def test_removing_every_atom_is_an_error():
    data = sample()
    data.tags = torch.zeros_like(data.tags)
    with pytest.raises(ValueError, match="transform remove_subsurface: no atom would be left: all tags are 0"):
        run({"remove_subsurface": {}}, data)


# frame_averaging


@pytest.mark.parametrize("method", ["full", "det", "canonical", "stochastic", "none"])
@pytest.mark.parametrize(("dim", "group"), [(2, "SE"), (3, "E")])
def test_frames_are_those_of_the_frames_module_and_positions_stay(method, dim, group):
    data = sample()
    pos = data.pos.clone()
    arguments = {"dim": dim, "group": group, "method": method}
    after = run({"frame_averaging": arguments}, data, seed=5)
    expected = compute_frames(
        pos, data.batch, 1, **arguments, atomic_numbers=data.atomic_numbers, generator=seeded(5), tolerance=1e-3
    )
    count = expected.rot.shape[1]  # those behind them have no weight: systems of a batch need equally many
    assert torch.equal(after.frame_rot[:, :count], expected.rot)
    assert torch.equal(after.frame_weight[:, :count], expected.weight) and not after.frame_weight[:, count:].any()
    most = num_frames(dim, group) * (7 if dim == 2 else 28)
    assert after.frame_rot.shape[:2] == (1, 1 if method in ("stochastic", "none") else most)
    assert torch.equal(after.pos, pos)


# data_augmentation


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("reflect", [True, False])
def test_augmentation_rotates_positions_cell_and_forces_alike(dim, reflect):
    determinants = set()
    for seed in range(12):
        before, after = sample(), run({"data_augmentation": {"dim": dim, "reflect": reflect}}, sample(), seed)
        rot = torch.linalg.lstsq(before.cell[0], after.cell[0]).solution
        assert torch.allclose(rot @ rot.T, torch.eye(3, dtype=rot.dtype), atol=1e-10)
        assert torch.allclose(after.pos, before.pos @ rot, atol=1e-10)
        assert torch.allclose(after.forces, before.forces @ rot, atol=1e-10)
        assert torch.allclose(vectors_of(after), vectors_of(before) @ rot, atol=1e-9)
        assert torch.equal(after.energy, before.energy)
        assert not torch.allclose(after.pos, before.pos)
        if dim == 2:
            assert torch.allclose(rot[2], torch.tensor([0.0, 0.0, 1.0], dtype=rot.dtype), atol=1e-10)
        determinants.add(round(float(torch.linalg.det(rot))))
    assert determinants == ({1, -1} if reflect else {1})


@pytest.mark.parametrize("late", ["remove_subsurface", "data_augmentation", "frame_averaging"])
def test_what_changes_atoms_must_come_before_frames(late):
    data = run({"frame_averaging": {}}, sample())
    with pytest.raises(ValueError, match=f"transform {late}: must come before frame_averaging"):
        run({late: {}}, data)


# Composing


def test_transforms_run_in_the_order_given():
    specs = {"remove_subsurface": {}, "frame_averaging": {"method": "full"}}
    after = run(specs, sample())
    alone = run({"remove_subsurface": None}, sample())
    assert torch.equal(after.frame_rot, run({"frame_averaging": {"method": "full"}}, alone).frame_rot)
    with pytest.raises(ValueError, match="must come before"):
        run(dict(reversed(specs.items())), sample())


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"remove_subsurfaces": {}}, "remove_subsurfaces: unknown transform; did you mean remove_subsurface"),
        ({"xyz": {}}, "allowed: data_augmentation, frame_averaging, remove_subsurface.*or a dotted import path"),
        ({"frame_averaging": {"dims": 2}}, "transforms.frame_averaging.dims: unknown key; did you mean dim"),
        ({"frame_averaging": {"dim": 4}}, "transforms.frame_averaging: dim: 4 is not one of 2, 3"),
        ({"frame_averaging": {"dim": True}}, "dim: True is not one of 2, 3"),
        ({"frame_averaging": {"group": "SO"}}, "group: 'SO' is not one of E, SE"),
        ({"frame_averaging": {"method": "random"}}, "method: 'random' is not one of"),
        ({"data_augmentation": {"reflect": "yes"}}, "reflect: 'yes' is not true or false"),
        ({"data_augmentation": {"reflect": 1}}, "reflect: 1 is not true or false"),
        ({"remove_subsurface": {"tag": 0}}, "remove_subsurface.tag: unknown key; allowed: none"),
        ({"remove_subsurface": [1]}, "arguments must be a mapping"),
        ({"no_such_package.transforms.X": {}}, "cannot be imported"),
        ({"faenet_ocp.data.transforms.Missing": {}}, "cannot be imported"),
        ({"subprocess.Popen": {"args": "true"}}, "is no subclass of"),
        ({"os.system": {"command": "true"}}, "is no subclass of"),
        ({"faenet_ocp.data.transforms.": {}}, "cannot be imported|no subclass"),
    ],
)
def test_wrong_configs_are_value_errors_that_say_what_is_possible(specs, message):
    with pytest.raises(ValueError, match=message):
        Compose(specs)


class Shift(Transform):
    """A transform of a user, for the tests."""

    def __init__(self, *, by: float = 1.0):
        self.by = by

    def __call__(self, data: AtomicData, generator: torch.Generator) -> AtomicData:
        data.pos = data.pos + self.by
        return data


def test_own_transforms_by_dotted_path_and_by_registered_name(monkeypatch):
    monkeypatch.setattr(transforms, "TRANSFORMS", dict(TRANSFORMS))
    by_path = run({f"{__name__}.Shift": {"by": 2.0}}, sample())
    assert torch.allclose(by_path.pos, sample().pos + 2)
    register_transform("shift")(Shift)
    register_transform("shift")(Shift)  # again, as when a module is imported twice
    assert torch.allclose(run({"shift": {}}, sample()).pos, sample().pos + 1)
    with pytest.raises(ValueError, match="'remove_subsurface' is already"):
        register_transform("remove_subsurface")(Shift)
