"""A record becomes a sample: fields, labels of all eras, random transforms, configuration; errors say where."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch
from fairchem.core.datasets.base_dataset import create_dataset

import small_data
from data_sets import TRANSFORMS, assert_same, bare_fields, dataset_of, one_by_one, open_dataset
from faenet_ocp.common.checks import RecordError
from faenet_ocp.data import fields as fields_module
from faenet_ocp.data import oc20
from faenet_ocp.data.fields import exact_label
from faenet_ocp.data.loader import make_loader
from faenet_ocp.data.oc20 import NAMES, OC20LmdbDataset
from small_data import make_fields

# What a sample holds


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", small_data.LAYOUTS)
def test_a_sample_holds_the_record(tmp_path: Path, layout: str, dtype: str) -> None:
    fields = make_fields(3)
    data = dataset_of(tmp_path, fields, layout=layout, dtype=dtype, labels=["energy", "forces"])[0]
    floating = getattr(torch, dtype)
    assert torch.equal(data.pos, fields["pos"].to(floating)) and torch.equal(data.cell, fields["cell"].to(floating))
    assert torch.equal(data.forces, fields["force"].to(floating))
    assert torch.equal(data.energy, torch.tensor([fields["y_relaxed"]], dtype=floating))
    for name in ("atomic_numbers", "tags", "fixed"):
        assert torch.equal(data[name], fields[name].long()), name
    assert data.pbc.tolist() == [[True] * 3] and data.natoms.tolist() == [fields["natoms"]]
    assert data.nedges.tolist() == [data.edge_index.shape[1]]
    assert (data.sid, data.fid.tolist(), data.dataset) == (["3"], [-1], "oc20")
    assert data.charge.tolist() == data.spin.tolist() == [0]
    assert data.composition.shape == (1, 119) and data.composition.dtype == torch.float32
    assert data.composition[0].tolist() == [(fields["atomic_numbers"] == z).sum() for z in range(119)]
    assert not hasattr(data, "pos_relaxed")
    data.dataset = ["oc20"]
    data.validate()


def test_composition_counts_the_system_before_transforms(tmp_path: Path) -> None:
    whole = dataset_of(tmp_path, make_fields(0))[0]
    cut = open_dataset(tmp_path / "data.lmdb", transforms={"remove_subsurface": {}})[0]
    assert cut.natoms < whole.natoms and torch.equal(cut.composition, whole.composition)


def test_samples_can_be_written_to_and_are_independent(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, make_fields(0))
    first = dataset[0]
    first.pos += 1
    first.tags.zero_()
    assert not torch.equal(dataset[0].pos, first.pos) and dataset[0].tags.any()


@pytest.mark.parametrize("cell", [None, torch.zeros(3, 3)])
def test_a_molecule_has_no_cell_tags_or_edges_and_text_as_sid(tmp_path: Path, cell: torch.Tensor | None) -> None:
    molecule = {name: make_fields(0)[name] for name in ("pos", "atomic_numbers")} | {"y": torch.tensor([-1.5])}
    molecule |= {} if cell is None else {"cell": cell}
    dataset = dataset_of(tmp_path, molecule | {"sid": "ethanol", "charge": -1}, molecule)
    data = dataset.load_batch([0, 1])
    assert not data.pbc.any() and not data.cell.any() and data.cell.shape == (2, 3, 3)
    assert not data.tags.any() and not data.fixed.any() and data.charge.tolist() == [-1, 0]
    assert (data.sid, data.energy.tolist()) == (["ethanol", "1"], [-1.5, -1.5])
    lengths = (data.pos[data.edge_index[0]] - data.pos[data.edge_index[1]]).norm(dim=1)
    assert not data.cell_offsets.any() and len(lengths) > 0 and lengths.max() <= 6


def test_periodicity_is_that_of_the_record_or_of_its_cell(tmp_path: Path) -> None:
    fields = make_fields(0, edges=False)
    slab = fields | {"pbc": torch.tensor([[True, True, False]])}
    assert dataset_of(tmp_path, slab, fields).load_batch([0, 1]).pbc.tolist() == [[True, True, False], [True] * 3]


@pytest.mark.parametrize(("epoch", "index"), [(0, 2), (3, 1)])
def test_keys_are_indices_or_pairs_of_epoch_and_index(small_is2re: Path, epoch: int, index: int) -> None:
    dataset = open_dataset(small_is2re / "is2re/all/val_id/data.lmdb")
    assert len(dataset) == 4
    assert_same(dataset[index], dataset[epoch, index])
    assert_same(dataset[np.int64(index)], dataset[index])  # type: ignore[index]
    for wrong in (4, -1):
        with pytest.raises(IndexError, match="of 4"):
            dataset[wrong]


def test_the_whole_oc20_sample_is_read(oc20_sample: Path) -> None:
    for split in small_data.SPLITS:
        dataset = open_dataset(oc20_sample / f"is2re/all/{split}/data.lmdb", key_mapping={"y_relaxed": "energy"})
        assert len(dataset) == (32 if split == "train" else 10)
        assert all(sample.natoms > 10 and sample.nedges > 100 for sample in dataset)
    train = open_dataset(oc20_sample / "s2ef/2M/train", labels=["energy", "forces"])
    assert len(train) == 48
    for index in (0, 23, 24, 47):  # with stored edges, and without
        assert train[index].forces.shape == (int(train[index].natoms), 3) and train[index].nedges > 100


def test_random_transforms_depend_on_seed_epoch_and_index_only(small_is2re: Path) -> None:
    def frames(seed: int, epoch: int) -> torch.Tensor:
        dataset = open_dataset(small_is2re / "is2re/all/train", transforms=TRANSFORMS["stochastic 3D"], seed=seed)
        order = torch.randperm(len(dataset)).tolist()
        return dataset.load_batch([(epoch, index) for index in order]).frame_rot[torch.tensor(order).argsort()]

    first = frames(0, 0)
    torch.manual_seed(99)
    assert torch.equal(frames(0, 0), first)
    others = [frames(0, epoch) for epoch in range(1, 4)] + [frames(1, 0)]
    assert all(not torch.equal(other, first) for other in others)
    signs = torch.stack([first, *others]).sign().flatten(2)
    assert all(len(signs[:, index].unique(dim=0)) > 1 for index in range(signs.shape[1]))  # each sample varies


# Labels


@pytest.mark.parametrize(
    ("names", "key_mapping", "labels", "expected"),
    [
        (("y_relaxed",), None, None, {"energy": "y_relaxed"}),
        (("y",), None, None, {"energy": "y"}),
        (("energy",), None, None, {"energy": "energy"}),
        (("y_relaxed", "force"), {"y_relaxed": "energy"}, None, {"energy": "y_relaxed"}),
        (("y", "force"), {"y": "energy", "force": "forces"}, None, {"energy": "y", "forces": "force"}),
        (("energy", "forces"), {"y": "energy", "force": "forces"}, None, {"energy": "energy", "forces": "forces"}),
        (("y", "force"), None, ["energy", "forces"], {"energy": "y", "forces": "force"}),
        (("energy", "forces"), None, ["forces"], {"forces": "forces"}),
        (("y_relaxed", "y_init"), {"y_init": "energy"}, None, {"energy": "y_init"}),
        (("y_relaxed", "energy"), {"y_relaxed": "energy"}, None, {"energy": "y_relaxed"}),
        (("y",), {"y": "energy", "y_relaxed": "energy"}, None, {"energy": "y"}),
        (("y", "force"), None, [], {}),
        (("y", "gap"), None, ["energy", "gap"], {"energy": "y", "gap": "gap"}),
        (("y", "lumo"), {"lumo": "gap"}, ["energy", "gap"], {"energy": "y", "gap": "lumo"}),
        (("y", "lumo"), {"lumo": "gap"}, [], {}),
    ],
)
def test_labels_of_all_eras_and_declared_scalars(
    tmp_path: Path, names: tuple[str, ...], key_mapping: Any, labels: Any, expected: dict[str, str]
) -> None:
    fields = bare_fields()
    values = {
        name: torch.rand(fields["natoms"], 3) if name.startswith("force") else -float(i) for i, name in enumerate(names)
    }
    data = dataset_of(tmp_path, fields | values, key_mapping=key_mapping, labels=labels)[0]
    assert {label for label in ("energy", "forces", "gap") if label in data} == set(expected)
    for label, name in expected.items():
        assert torch.equal(data[label], torch.as_tensor(values[name]).view(data[label].shape).float())
        assert data[label].shape == ((fields["natoms"], 3) if label == "forces" else (1,))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_labels_of_systems_are_as_exact_as_the_record(tmp_path: Path, dtype: str) -> None:
    """Also behind fairchem's collater, which wants energies in the precision of positions, and behind transforms."""
    energies = [-1234567.0123456789, -0.1]
    records = [make_fields(i) | {"y_relaxed": energy, "gap": -energy} for i, energy in enumerate(energies)]
    options = {"labels": ["energy", "gap"], "dtype": dtype, "key_mapping": {"y_relaxed": "energy"}}
    dataset = dataset_of(tmp_path, *records, transforms={"remove_subsurface": {}}, **options)
    for batch in (dataset.load_batch([0, 1]), one_by_one(dataset, [(0, 0), (0, 1)])):
        assert batch.energy.dtype == batch.pos.dtype
        for name, sign in (("energy", 1), ("gap", -1)):
            label = sign * exact_label(batch, name)
            np.testing.assert_allclose(label.numpy(), energies, rtol=1e-14)
            assert label.dtype == torch.float64


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_declared_scalars_are_known_in_workers_and_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: str
) -> None:
    monkeypatch.setattr(fields_module, "FIELDS", dict(fields_module.FIELDS))
    records = [make_fields(index) | {"lumo": float(index)} for index in range(4)]
    dataset = dataset_of(tmp_path, *records, key_mapping={"lumo": f"gap_{context}"}, transforms=TRANSFORMS["augmented"])
    loader = make_loader(dataset, [[(0, 1), (0, 3)]], num_workers=1, context=context)
    ((batch,),) = loader
    assert batch[f"gap_{context}"].tolist() == [1, 3]
    assert fields_module.level_of(f"gap_{context}") == "system"
    assert [len(sample[f"gap_{context}"]) for sample in batch.batch_to_atomicdata_list()] == [1, 1]


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        ((), {}, r"\(sid 0\) has no label 'energy' \(looked for y_relaxed, energy, y; it has atomic_numbers, cell,"),
        (("y",), {"labels": ["energy", "forces"]}, r"has no label 'forces' \(looked for forces, force;"),
        (("y",), {"labels": ["energy", "gap"]}, r"has no label 'gap' \(looked for gap;"),
        (("y_init",), {"key_mapping": {"y_relaxed": "energy"}}, r"has no label 'energy' \(looked for y_relaxed;"),
        (("y_relaxed", "energy"), {}, "several candidates for 'energy': y_relaxed, energy; choose with key_mapping"),
        (("y", "y_relaxed"), {"key_mapping": {"y": "energy", "y_relaxed": "energy"}}, "has several candidates"),
    ],
)
def test_missing_and_ambiguous_labels(tmp_path: Path, names: tuple[str, ...], config: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        dataset_of(tmp_path, bare_fields() | dict.fromkeys(names, 0.5), **config)[0]


# Fields that cannot be used


NAN, INF = float("nan"), float("inf")


def changed(name: str, change: Any) -> Any:
    def apply(fields: dict[str, Any]) -> None:
        fields[name] = change(fields[name].clone() if isinstance(fields[name], torch.Tensor) else fields[name])

    return apply


def at_first(value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[(0,) * tensor.dim()] = value
        return tensor

    return change


def onto(image: int) -> Any:
    """Puts the last atom where an image of the first is, as nearly as float32 can say."""

    def change(pos: torch.Tensor) -> torch.Tensor:
        pos[12] = pos[0] + image * make_fields(0)["cell"][0, 0] - 2 * image * make_fields(0)["cell"][0, 1]
        return pos

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed("pos", at_first(NAN)), "has values in pos that are not finite"),
        (changed("cell", at_first(INF)), "has values in cell that are not finite"),
        (changed("force", at_first(NAN)), "has values in force that are not finite"),
        (changed("y_relaxed", lambda y: -INF), "has values in y_relaxed that are not finite"),
        (changed("y_relaxed", lambda y: 1e300), "has values in y_relaxed that are not finite"),  # in float32
        (changed("y_relaxed", lambda y: torch.zeros(2)), r"has y_relaxed of shape \(2,\), not \(1\)"),
        (changed("y_relaxed", lambda y: "low"), "has no numbers in the field 'y_relaxed'"),
        (changed("force", lambda f: f[1:]), r"has force of shape \(12, 3\), not \(13, 3\)"),
        (changed("pos", lambda p: p[:, :2]), r"has pos of shape \(13, 2\), not \(any, 3\)"),
        (changed("pos", lambda p: p[:0]), "has 0 positions for 13 atoms"),
        (changed("pos", onto(0)), r"has atoms 0 and 12 on one point \(in pos\)"),
        (changed("pos", onto(3)), r"has atoms 0 and 12 on one point \(in pos\)"),
        (changed("natoms", lambda n: 10**12), "has 13 positions for 1000000000000 atoms"),
        (changed("cell", lambda c: c[0, 0]), r"has cell of shape \(3,\), not \(1, 3, 3\)"),
        (changed("tags", lambda t: t[:4]), r"has tags of shape \(4,\), not \(13\)"),
        (changed("tags", at_first(3)), "has values in tags outside 0 to 2"),
        (changed("tags", at_first(-1)), "has values in tags outside 0 to 2"),
        (changed("atomic_numbers", at_first(0)), "has values in atomic_numbers outside 1 to 118"),
        (changed("atomic_numbers", at_first(119)), "has values in atomic_numbers outside 1 to 118"),
        (changed("atomic_numbers", at_first(6.5)), "has values in atomic_numbers that are no whole numbers"),
        (changed("atomic_numbers", at_first(NAN)), "has values in atomic_numbers that are no whole numbers"),
        (changed("fixed", at_first(2)), "has values in fixed outside 0 to 1"),
        (changed("edge_index", at_first(13)), "has edges in edge_index of atoms outside 0 to 12"),
        (changed("edge_index", lambda e: e.T), r"has edge_index of shape \(464, 2\), not \(2, any\)"),
        (changed("cell_offsets", lambda c: c[1:]), r"has cell_offsets of shape \(463, 3\), not \(464, 3\)"),
        (changed("cell_offsets", at_first(0.25)), "has values in cell_offsets that are no whole numbers"),
        (lambda fields: fields.pop("cell_offsets"), "has no field 'cell_offsets'"),
        (lambda fields: fields.pop("pos"), "has no field 'pos'"),
        (lambda fields: fields.pop("atomic_numbers"), "has no field 'atomic_numbers'"),
        (lambda fields: fields.update(pbc=torch.tensor([[0.5, 1, 1]])), "has values in pbc that are no whole numbers"),
        (lambda fields: fields.update(fid="x"), "has no numbers in the field 'fid'"),
        (lambda fields: fields.update(fid=2**70), "has values in fid that are no numbers of 64 bits"),
        (lambda fields: fields.update(natoms=((13,),)), "has a natoms that is no whole number"),
    ],
)
def test_unusable_fields_are_named_with_file_record_and_sid(tmp_path: Path, spoil: Any, message: str) -> None:
    fields = make_fields(0)
    assert fields["natoms"] == 13 and fields["edge_index"].shape == (2, 464)
    spoil(fields)
    dataset = dataset_of(tmp_path, make_fields(1), fields, labels=["energy", "forces"])
    assert dataset[0].natoms > 0
    with pytest.raises(RecordError, match=rf"data.lmdb: record 1 \(sid 0\) {message}"):
        dataset[1]
    with pytest.raises(RecordError):  # in a batch, too
        dataset.load_batch([0, 1])


def test_a_name_of_the_users_has_no_stand_in(tmp_path: Path) -> None:
    """A misspelt name must not give the energy of another level of theory; names of OC20's eras mean the same."""
    fields = make_fields(0) | {"energy": 1.0, "REF_energy": 2.0}
    del fields["y_relaxed"]
    found = [("REF_energy", 2.0), ("y_relaxed", 1.0), ("REF_enrgy", None)]
    for number, (name, value) in enumerate(found):
        dataset = dataset_of(tmp_path / str(number), fields, key_mapping={name: "energy"})
        if value is None:
            with pytest.raises(RecordError, match=r"has no label 'energy' \(looked for REF_enrgy; .* names it"):
                dataset[0]
        else:
            assert dataset[0].energy == value


def test_atoms_on_one_point_are_found_without_edges_and_where_little_is_periodic(tmp_path: Path) -> None:
    """Also where no stored edge shows them, and through lattice vectors that are periodic alone."""
    cell = torch.tensor([[4.0, 1, 0], [0, 5, 2], [0, 0, 9]])
    pos = torch.tensor([[0.5, 0.5, 0.5], [2.0, 2, 2], [0, 0, 0]])
    for pbc in ([False] * 3, [True, False, False], [False, True, True], [True] * 3):
        image = torch.tensor(pbc) * torch.tensor([-2.0, 1, 3]) @ cell
        for shift, is_error in ((0.0, True), (2e-4, True), (2e-2, False)):
            pos[2] = pos[0] + image + shift
            fields = {"pos": pos, "cell": cell, "pbc": torch.tensor(pbc), "atomic_numbers": torch.ones(3), "y": 0.0}
            for number, edges in enumerate(("none", "stored")):
                folder = tmp_path / f"{pbc}{shift}{number}"
                stored = {"edge_index": torch.tensor([[0, 1], [1, 0]]), "cell_offsets": torch.zeros(2, 3)}
                dataset = dataset_of(folder, fields | stored, edges=edges)
                if is_error:
                    with pytest.raises(RecordError, match=r"has atoms 0 and 2 on one point"):
                        dataset[0]
                else:
                    assert dataset[0].natoms == 3


def test_a_sid_of_another_kind_and_a_transform_that_fails_are_named(tmp_path: Path) -> None:
    for sid in (0.5, NAN, torch.tensor([INF])):
        with pytest.raises(RecordError, match="record 0 has a sid that is no whole number"):
            dataset_of(tmp_path / str(sid), make_fields(0) | {"sid": sid})[0]
    flat = make_fields(0)
    flat["tags"].zero_()
    with pytest.raises(RecordError, match=r"record 0 \(sid 0\): transform remove_subsurface: no atom would be left"):
        dataset_of(tmp_path / "b", flat, transforms={"remove_subsurface": {}})[0]
    far = make_fields(0, edges=False)
    far["pos"][0, 0] = 1e30
    with pytest.raises(RecordError, match=r"record 0 \(sid 0\): positions are not finite or beyond"):
        dataset_of(tmp_path / "c", far)[0]


# Configuration


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"key_maping": {}}, "unknown key 'key_maping'; did you mean key_mapping"),
        ({"edges": "otf"}, "dataset.edges: 'otf' is not one of stored, recompute, none"),
        ({"dtype": "bfloat16"}, "dataset.dtype: 'bfloat16' is not one of float32, float64"),
        ({"cutoff": None}, "dataset.cutoff: None is not a positive number"),
        ({"cutoff": 0}, "dataset.cutoff: 0 is not a positive number"),
        ({"max_neighbors": "40"}, "dataset.max_neighbors: '40' is not a whole number of at least 1"),
        ({"key_mapping": {"y": "enery"}, "labels": ["energy"]}, "y: 'enery' is no label; did you mean energy"),
        ({"labels": ["tags"]}, "labels: 'tags' is a field of every sample and no label"),
        ({"transforms": {"remove_subsurfce": {}}}, "did you mean remove_subsurface"),
    ],
)
def test_wrong_configs_are_value_errors(small_is2re: Path, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(small_is2re / "is2re/all/val_id", **config)


def test_src_is_required_and_limits_only_for_edges(small_is2re: Path) -> None:
    with pytest.raises(ValueError, match="no src"):
        OC20LmdbDataset({"cutoff": 6.0, "max_neighbors": 40})
    dataset = OC20LmdbDataset({"src": str(small_is2re / "is2re/all/val_id"), "edges": "none"})
    assert dataset[0].nedges.tolist() == [0]


def test_it_is_registered_under_all_names_and_fairchem_builds_it(small_is2re: Path) -> None:
    for name in NAMES:
        assert registry.get_dataset_class(name) is OC20LmdbDataset
    assert set(NAMES) == {"oc20_lmdb", "lmdb", "single_point_lmdb", "trajectory_lmdb"}
    splits = {"val": {"src": str(small_is2re / "is2re/all/val_id/data.lmdb")}}
    config = {"format": "oc20_lmdb", "splits": splits, "cutoff": 6.0, "max_neighbors": 40, "no_shuffle": True}
    subset = create_dataset(config, "val")
    assert len(subset) == 4 and subset[1].sid == ["1001"]
    batch = atomicdata_list_to_batch([subset[0], subset[1]])
    assert batch.composition.shape == (2, 119) and batch.energy.shape == (2,) and batch.fid.shape == (2,)


def test_registration_can_be_repeated_and_leaves_names_that_are_taken(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        pass

    monkeypatch.setitem(registry.mapping["dataset_name_mapping"], "lmdb", Other)
    with caplog.at_level(logging.WARNING):
        oc20._register()
    assert registry.get_dataset_class("lmdb") is Other
    assert registry.get_dataset_class("oc20_lmdb") is OC20LmdbDataset
    assert "Other already" in caplog.text and len(caplog.records) == 1
