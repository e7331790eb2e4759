"""OC20's LMDB files become samples: all layouts, label names and edge settings, in any process; errors say where."""

import logging
import multiprocessing
import os
import pickle
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import fcc111
from faenet_ocp.data.lmdb_records import RecordError
from fairchem.core.common.registry import registry
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.datasets.base_dataset import create_dataset
from torch.utils.data import DataLoader

import small_data
from faenet_ocp.data import edges as record_edges
from faenet_ocp.data import oc20 as lmdb_dataset
from faenet_ocp.data.lmdb_files import LmdbFile, resolve_files
from faenet_ocp.data.oc20 import NAMES, OC20LmdbDataset
from faenet_ocp.graph import lists as edge_lists
from faenet_ocp.graph.neighbors import build_graph, edge_vectors, limit_neighbors
from small_data import dump_record, make_fields, write_items, write_lmdb

STOCHASTIC = {"remove_subsurface": {}, "frame_averaging": {"dim": 3, "group": "E", "method": "stochastic"}}


def open_dataset(src, **config) -> OC20LmdbDataset:
    return OC20LmdbDataset({"src": src, "cutoff": 6.0, "max_neighbors": 40, **config})


def dataset_of(folder: Path, *records: dict, layout="pyg1", **config) -> OC20LmdbDataset:
    """A data set of these records, in a new file."""
    path = write_lmdb(folder / "data.lmdb", [dump_record(fields, layout=layout) for fields in records])
    return open_dataset(path, **config)


def edge_set(edge_index, offsets) -> set[tuple[int, ...]]:
    return set(map(tuple, torch.cat([edge_index.T, offsets.long()], 1).tolist()))


def equal(first: AtomicData, second: AtomicData) -> bool:
    if first.keys() != second.keys():
        return False
    pairs = ((first[name], second[name]) for name in first.keys())  # noqa: SIM118
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


# What a sample holds


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", small_data.LAYOUTS)
def test_a_sample_holds_the_record(tmp_path, layout, dtype):
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


def test_composition_counts_the_system_before_transforms(tmp_path):
    whole = dataset_of(tmp_path, make_fields(0))[0]
    cut = open_dataset(tmp_path / "data.lmdb", transforms={"remove_subsurface": {}})[0]
    assert cut.natoms < whole.natoms and torch.equal(cut.composition, whole.composition)


def test_samples_can_be_written_to_and_are_independent(tmp_path):
    dataset = dataset_of(tmp_path, make_fields(0))
    first = dataset[0]
    first.pos += 1
    first.tags.zero_()
    assert not torch.equal(dataset[0].pos, first.pos) and dataset[0].tags.any()


def test_optional_fields(tmp_path):
    """A molecule: no tags, no fixed, no periodicity, a cell of (3, 3), text as sid; the next without sid."""
    fields = make_fields(0, edges=False)
    molecule = {name: fields[name] for name in ("pos", "atomic_numbers")}
    molecule |= {"y": torch.tensor([-1.5]), "cell": torch.zeros(3, 3), "pbc": torch.tensor([False] * 3)}
    dataset = dataset_of(tmp_path, molecule | {"sid": "ethanol"}, molecule)
    data = dataset[0]
    assert not data.pbc.any() and not data.tags.any() and not data.fixed.any()
    assert (data.sid, dataset[1].sid, data.energy.tolist()) == (["ethanol"], ["1"], [-1.5])
    assert not data.cell_offsets.any() and data.edge_index.shape[1] > 0


@pytest.mark.parametrize(("epoch", "index"), [(0, 2), (3, 1)])
def test_keys_are_indices_or_pairs_of_epoch_and_index(small_is2re, epoch, index):
    dataset = open_dataset(small_is2re / "is2re/all/val_id/data.lmdb")
    assert len(dataset) == 4
    assert equal(dataset[index], dataset[epoch, index])
    assert equal(dataset[np.int64(index)], dataset[index])
    for wrong in (4, -1):
        with pytest.raises(IndexError, match="of 4"):
            dataset[wrong]


def test_the_whole_oc20_sample_is_read(oc20_sample):
    for split in small_data.SPLITS:
        dataset = open_dataset(oc20_sample / f"is2re/all/{split}/data.lmdb", key_mapping={"y_relaxed": "energy"})
        assert len(dataset) == (32 if split == "train" else 10)
        assert all(sample.natoms > 10 and sample.nedges > 100 for sample in dataset)
    train = open_dataset(oc20_sample / "s2ef/2M/train", labels=["energy", "forces"])
    assert len(train) == 48
    for index in (0, 23, 24, 47):  # with stored edges, and without
        assert train[index].forces.shape == (int(train[index].natoms), 3) and train[index].nedges > 100


def test_stored_and_recomputed_edges_of_the_oc20_sample_agree(oc20_sample):
    """At 40 neighbours most of these slabs have stored lists that end inside the last shell.

    The files were cut at 6 A to the last digit; an edge that is longer by rounding is not in them.
    """
    for split in small_data.SPLITS:
        stored, built = (
            open_dataset(oc20_sample / f"is2re/all/{split}", edges=edges) for edges in ("stored", "recompute")
        )
        for ours, expected in zip(stored, built, strict=True):
            vectors = edge_vectors(expected.pos, expected.cell, expected.edge_index, expected.cell_offsets)
            inside = vectors.norm(dim=1) <= 6.0
            whole = edge_set(expected.edge_index, expected.cell_offsets)
            sure = edge_set(expected.edge_index[:, inside], expected.cell_offsets[inside])
            assert sure <= edge_set(ours.edge_index, ours.cell_offsets) <= whole


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
        (("y", "y_relaxed"), {"y": "energy"}, ["energy"], {"energy": "y"}),
        (("y_relaxed", "energy"), {"y_relaxed": "energy"}, None, {"energy": "y_relaxed"}),
        (("y",), {"y": "energy", "y_relaxed": "energy"}, None, {"energy": "y"}),
        (("y", "force"), None, [], {}),
        ((), None, [], {}),
    ],
)
def test_labels_of_all_eras(tmp_path, names, key_mapping, labels, expected):
    fields = bare_fields()
    values = {
        name: torch.rand(fields["natoms"], 3) if name.startswith("force") else -float(i) for i, name in enumerate(names)
    }
    data = dataset_of(tmp_path, fields | values, key_mapping=key_mapping, labels=labels)[0]
    assert {label for label in ("energy", "forces") if label in data} == set(expected)
    for label, name in expected.items():
        assert torch.equal(data[label], torch.as_tensor(values[name]).view(data[label].shape).float())


def bare_fields() -> dict:
    fields = make_fields(0)
    return {name: item for name, item in fields.items() if not name.startswith(("y", "force", "pos_"))}


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        ((), {}, r"\(sid 0\) has no label 'energy' \(looked for y_relaxed, energy, y; it has atomic_numbers, cell,"),
        (("y",), {"labels": ["energy", "forces"]}, r"has no label 'forces' \(looked for forces, force;"),
        (("y_init",), {"key_mapping": {"y_relaxed": "energy"}}, r"has no label 'energy' \(looked for y_relaxed;"),
        (
            ("y_relaxed", "energy"),
            {},
            "has several candidates for 'energy': y_relaxed, energy; choose with key_mapping",
        ),
        (("y", "y_relaxed"), {"key_mapping": {"y": "energy", "y_relaxed": "energy"}}, "has several candidates"),
    ],
)
def test_missing_and_ambiguous_labels(tmp_path, names, config, message):
    with pytest.raises(RecordError, match=message):
        dataset_of(tmp_path, bare_fields() | dict.fromkeys(names, 0.5), **config)[0]


# Edges


def test_stored_edges_are_cut_like_edges_built_anew(tmp_path):
    """The files hold 50 neighbours, cut strictly; 20 with their shells are among them."""
    records = [make_fields(index, layers=3) for index in range(4)]
    stored = dataset_of(tmp_path, *records, max_neighbors=20, cutoff=5.0)
    built = open_dataset(tmp_path / "data.lmdb", max_neighbors=20, cutoff=5.0, edges="recompute")
    for index, fields in enumerate(records):
        ours = edge_set(stored[index].edge_index, stored[index].cell_offsets)
        assert ours == edge_set(built[index].edge_index, built[index].cell_offsets)
        assert 0 < len(ours) < fields["edge_index"].shape[1]


def test_stored_edges_really_come_from_the_file(tmp_path):
    fields = make_fields(0)
    few = fields | {name: fields[name][..., :7] if name == "edge_index" else fields[name][:7] for name in EDGE_FIELDS}
    assert dataset_of(tmp_path, few)[0].nedges.tolist() == [7]
    assert open_dataset(tmp_path / "data.lmdb", edges="recompute")[0].nedges > 100
    assert open_dataset(tmp_path / "data.lmdb", edges="none")[0].nedges.tolist() == [0]


EDGE_FIELDS = ("edge_index", "cell_offsets", "distances")


def unrelaxed_slab(order) -> dict:
    """A slab full of equal distances, its atoms in the given order, with OC20's strict cut at 50 neighbours."""
    atoms = fcc111("Cu", size=(2, 2, 4), vacuum=8.0)
    atoms.pbc = True
    atoms = atoms[order]
    edge_index, shift, distance = small_data.stored_edges(atoms)
    fields = {"edge_index": edge_index, "cell_offsets": shift, "distances": distance, "y": 0.0}
    fields |= {"pos": atoms.positions, "cell": atoms.cell.array, "atomic_numbers": atoms.numbers}
    return {name: torch.tensor(item) for name, item in fields.items()}


@pytest.mark.parametrize("max_neighbors", [40, 48, 49, 50])
def test_shells_that_the_stored_list_breaks_off_are_completed(tmp_path, max_neighbors):
    """Inner atoms have 48 neighbours in four shells and 66 in five, of which 50 are stored."""
    orders = [np.arange(16), np.random.default_rng(0).permutation(16)]
    records = [unrelaxed_slab(order) for order in orders]
    dataset = dataset_of(tmp_path, *records, max_neighbors=max_neighbors)
    first, second = (
        edge_set(torch.tensor(order)[sample.edge_index], sample.cell_offsets)
        for order, sample in zip(orders, dataset, strict=True)
    )
    assert first == second
    as_stored = [
        edge_set(torch.tensor(order)[fields["edge_index"]], fields["cell_offsets"])
        for order, fields in zip(orders, records, strict=True)
    ]
    assert as_stored[0] != as_stored[1]  # negative control: what is in the file depends on the order


def test_whole_shells_are_taken_from_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(record_edges, "find_edges", None)
    monkeypatch.setattr(edge_lists, "search", None)
    assert dataset_of(tmp_path, unrelaxed_slab(np.arange(16)), max_neighbors=12)[0].nedges > 16 * 9


def test_stored_distances_are_not_trusted(tmp_path):
    fields = make_fields(0)
    wrong = fields | {"distances": torch.rand_like(fields["distances"])}
    assert equal(dataset_of(tmp_path / "a", wrong)[0], dataset_of(tmp_path / "b", fields)[0])


def test_records_without_edges_get_them_built(tmp_path):
    fields = make_fields(0, edges=False)
    data = dataset_of(tmp_path, fields, max_neighbors=12)[0]
    edge_index, offsets = build_graph(data.pos, data.cell, data.pbc, cutoff=6.0, max_neighbors=12)
    assert torch.equal(data.edge_index, edge_index) and torch.equal(data.cell_offsets, offsets)


def test_edges_of_an_atom_to_itself_are_dropped(tmp_path):
    fields = make_fields(0)
    num_edges = fields["edge_index"].shape[1]
    selves = {
        "edge_index": torch.cat([torch.tensor([[0, 3], [0, 3]]), fields["edge_index"]], 1),
        "cell_offsets": torch.cat([torch.zeros(2, 3), fields["cell_offsets"]]),
    }
    with_selves = dataset_of(tmp_path, fields | selves, max_neighbors=99)[0]
    assert with_selves.nedges.tolist() == [num_edges]  # images of an atom stay
    assert bool((with_selves.edge_index[0] == with_selves.edge_index[1]).any())


def test_edges_are_cut_before_atoms_are_removed(tmp_path):
    fields = make_fields(1, layers=4)
    data = dataset_of(tmp_path, fields, max_neighbors=15, transforms={"remove_subsurface": {}})[0]
    old = (fields["tags"] > 0).nonzero().view(-1)
    vectors = edge_vectors(fields["pos"], fields["cell"], fields["edge_index"], fields["cell_offsets"])
    kept = limit_neighbors(
        fields["edge_index"], vectors.norm(dim=1), num_atoms=fields["natoms"], cutoff=6.0, max_neighbors=15
    )
    whole = edge_set(fields["edge_index"][:, kept], fields["cell_offsets"][kept])
    expected = {edge for edge in whole if edge[0] in old.tolist() and edge[1] in old.tolist()}
    assert edge_set(old[data.edge_index], data.cell_offsets) == expected
    assert np.bincount(data.edge_index[1]).max() < 15


# Files, folders, globs, lists


def labelled(path: Path, energies) -> Path:
    return write_lmdb(path, [dump_record(bare_fields() | {"y": float(energy)}) for energy in energies])


def energies_of(dataset) -> list[float]:
    return [dataset[index].energy.item() for index in range(len(dataset))]


def test_files_folders_globs_and_lists(tmp_path):
    for number, energies in ((10, [3]), (2, [1, 2]), (1, [0])):
        labelled(tmp_path / "shards" / f"data.{number}.lmdb", energies)
    (tmp_path / "shards" / "notes.txt").write_text("no data")
    other = labelled(tmp_path / "other.lmdb", [9])
    shards = tmp_path / "shards"
    assert energies_of(open_dataset(str(shards))) == [0, 1, 2, 3]  # 1, 2, 10: natural order
    assert energies_of(open_dataset(str(shards / "data.*.lmdb"))) == [0, 1, 2, 3]
    assert energies_of(open_dataset(str(tmp_path / "**" / "data.1*.lmdb"))) == [0, 3]
    assert energies_of(open_dataset([other, str(shards / "data.2.lmdb")])) == [9, 1, 2]
    assert energies_of(open_dataset([shards, other])) == [0, 1, 2, 3, 9]
    odd = labelled(tmp_path / "run[1]*" / "data.lmdb", [5])  # names that look like globs
    assert energies_of(open_dataset(odd)) == energies_of(open_dataset(odd.parent)) == [5]


@pytest.mark.parametrize(
    ("src", "error", "message"),
    [
        ("missing.lmdb", FileNotFoundError, "no file or folder .*missing.lmdb"),
        ("empty", FileNotFoundError, r"no \*.lmdb file in the folder .*empty"),
        ("none*.lmdb", FileNotFoundError, "no file matches .*none"),
        ([], ValueError, "src must be a path or a list of paths"),
        (5, ValueError, "src must be a path"),
        (["a.lmdb", "a.lmdb"], ValueError, "means .*a.lmdb twice"),
        ([".", "a.lmdb"], ValueError, "means .*a.lmdb twice"),
    ],
)
def test_sources_that_are_not_there(tmp_path, monkeypatch, src, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    labelled(tmp_path / "a.lmdb", [0])
    with pytest.raises(error, match=message):
        open_dataset(src)


@pytest.mark.parametrize("length", [True, False])
def test_the_length_key_is_optional(tmp_path, length):
    values = [dump_record(bare_fields() | {"y": float(energy)}) for energy in range(11)]
    path = write_lmdb(tmp_path / "data.lmdb", values, length=length)
    assert energies_of(open_dataset(path)) == list(range(11))
    assert LmdbFile(path).numbers == range(11)  # not listed


@pytest.mark.parametrize(
    "keys", [["0", "1", "2", "3", "note"], ["0", "2", "5", "11", "100"], ["7", "meta", "8"], ["1", "2", "3"]]
)
def test_other_keys_and_gaps_without_length(tmp_path, keys):
    numbers = sorted(int(key) for key in keys if key.isdigit())
    items = {key.encode(): dump_record(bare_fields() | {"y": float(key)}) if key.isdigit() else b"x" for key in keys}
    dataset = open_dataset(write_items(tmp_path / "data.lmdb", items))
    assert energies_of(dataset) == numbers


def test_further_keys_beside_length(tmp_path):
    items = {b"0": dump_record(bare_fields() | {"y": 1.0}), b"length": pickle.dumps(1), b"property_keys": b"x"}
    assert energies_of(open_dataset(write_items(tmp_path / "data.lmdb", items))) == [1]


@pytest.mark.parametrize("length", [4, 3])
def test_a_length_that_promises_too_much(tmp_path, length):
    items = {str(i).encode(): dump_record(bare_fields()) for i in range(2)} | {
        b"length": pickle.dumps(length),
        b"x": b"",
    }
    with pytest.raises(ValueError, match=rf"data.lmdb: its length key says {length} records"):
        open_dataset(write_items(tmp_path / "data.lmdb", items))


@pytest.mark.parametrize("length", [b"12", b"", pickle.dumps("3"), pickle.dumps(-3)])
def test_a_damaged_length(tmp_path, length):
    with pytest.raises(ValueError, match=r"data.lmdb: the length key "):
        open_dataset(write_items(tmp_path / "data.lmdb", {b"0": b"x", b"length": length}))


@pytest.mark.parametrize("items", [{}, {b"length": pickle.dumps(0)}, {b"note": b"x"}])
def test_files_without_records(tmp_path, items):
    with pytest.raises(ValueError, match=r"no records in .*data.lmdb"):
        open_dataset(write_items(tmp_path / "data.lmdb", items))


def test_a_gap_below_length_is_named_when_it_is_read(tmp_path):
    items = {
        b"0": dump_record(make_fields(0)),
        b"2": dump_record(make_fields(2)),
        b"x": b"",
        b"length": pickle.dumps(3),
    }
    dataset = open_dataset(write_items(tmp_path / "data.lmdb", items))
    assert dataset[2].sid == ["2"]
    with pytest.raises(RecordError, match=r"data.lmdb: record 1 is missing"):
        dataset[1]


# Damage


def damaged_copy(small_is2re: Path, folder: Path, change) -> Path:
    target = folder / "data.lmdb"
    data = bytearray((small_is2re / "is2re/all/val_id/data.lmdb").read_bytes())
    target.write_bytes(bytes(change(data)))
    return target


@pytest.mark.parametrize("size", [0, 1, 39, 43, 100, 4096, 8192, 20_000, -4096, -1])
def test_a_truncated_file_is_an_error_and_does_not_end_the_process(small_is2re, tmp_path, size):
    path = damaged_copy(small_is2re, tmp_path, lambda data: data[:size])
    with pytest.raises(ValueError, match=r"data.lmdb: .*cut short"):
        open_dataset(path)


def test_a_file_cut_after_it_was_opened_and_before_it_is_read(small_is2re, tmp_path):
    path = damaged_copy(small_is2re, tmp_path, lambda data: data)
    dataset = open_dataset(path)
    os.truncate(path, 16384)
    with pytest.raises(ValueError, match="cut short: 16384 bytes of"):
        dataset[0]


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" * 4000, bytes(30_000)])
def test_other_files_are_no_lmdb_files(tmp_path, content):
    path = tmp_path / "data.lmdb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data.lmdb: .*LMDB"):
        open_dataset(path)


def test_a_folder_without_permission_names_the_file(small_is2re, tmp_path):
    path = damaged_copy(small_is2re, tmp_path, lambda data: data)
    path.unlink()
    path.mkdir()  # a folder with the name of a file
    with pytest.raises(FileNotFoundError, match=r"no \*.lmdb file in the folder .*data.lmdb"):
        open_dataset(path)


def test_flipped_bytes_of_a_value_are_found_and_named(small_is2re, tmp_path):
    name = b"_rebuild_tensor_v2"
    path = damaged_copy(small_is2re, tmp_path, lambda data: data.replace(name, b"_rebuild_tensor_v0"))
    dataset = open_dataset(path)
    assert len(dataset) == 4
    with pytest.raises(RecordError, match=r"data.lmdb: record 2 names torch._utils._rebuild_tensor_v0, .*refused"):
        dataset[2]


def test_a_record_that_would_run_something_is_refused(tmp_path):
    class Gadget:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    path = write_lmdb(tmp_path / "data.lmdb", [pickle.dumps(Gadget())])
    with pytest.raises(RecordError, match=rf"data.lmdb: record 0 names {os.mkdir.__module__}.mkdir, .*refused"):
        open_dataset(path)[0]
    assert not (tmp_path / "canary").exists()


NAN, INF = float("nan"), float("inf")


def changed(name, change):
    def apply(fields):
        fields[name] = change(fields[name].clone() if isinstance(fields[name], torch.Tensor) else fields[name])

    return apply


def at_first(value):
    def change(tensor):
        tensor[(0,) * tensor.dim()] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed("pos", at_first(NAN)), "has values in pos that are not finite"),
        (changed("pos", at_first(INF)), "has values in pos that are not finite"),
        (changed("cell", at_first(NAN)), "has values in cell that are not finite"),
        (changed("force", at_first(NAN)), "has values in force that are not finite"),
        (changed("y_relaxed", lambda y: NAN), "has values in y_relaxed that are not finite"),
        (changed("y_relaxed", lambda y: -INF), "has values in y_relaxed that are not finite"),
        (changed("y_relaxed", lambda y: 1e300), "has values in y_relaxed that are not finite"),  # in float32
        (changed("y_relaxed", lambda y: torch.zeros(2)), r"has y_relaxed of shape \(2,\), not \(1\)"),
        (changed("y_relaxed", lambda y: "low"), "has no numbers in the field 'y_relaxed'"),
        (changed("force", lambda f: f[1:]), r"has force of shape \(12, 3\), not \(13, 3\)"),
        (changed("force", lambda f: f[:, 0]), r"has force of shape \(13,\), not \(13, 3\)"),
        (changed("pos", lambda p: p[:, :2]), r"has pos of shape \(13, 2\), not \(any, 3\)"),
        (changed("pos", lambda p: p[:0]), "has 0 positions for 13 atoms"),
        (changed("natoms", lambda n: n + 1), "has 13 positions for 14 atoms"),
        (changed("natoms", lambda n: 10**12), "has 13 positions for 1000000000000 atoms"),
        (changed("cell", lambda c: c[0, 0]), r"has cell of shape \(3,\), not \(1, 3, 3\)"),
        (changed("tags", lambda t: t[:4]), r"has tags of shape \(4,\), not \(13\)"),
        (changed("atomic_numbers", at_first(0)), "has atomic numbers outside 1 to 118"),
        (changed("atomic_numbers", at_first(119)), "has atomic numbers outside 1 to 118"),
        (changed("atomic_numbers", at_first(6.5)), "has values in atomic_numbers that are no whole numbers"),
        (changed("atomic_numbers", at_first(NAN)), "has values in atomic_numbers that are no whole numbers"),
        (changed("fixed", at_first(0.5)), "has values in fixed that are no whole numbers"),
        (changed("edge_index", at_first(13)), "has edges of atoms outside 0 to 12"),
        (changed("edge_index", at_first(-1)), "has edges of atoms outside 0 to 12"),
        (changed("edge_index", lambda e: e.T), r"has edge_index of shape \(464, 2\), not \(2, any\)"),
        (changed("cell_offsets", lambda c: c[1:]), r"has cell_offsets of shape \(463, 3\), not \(464, 3\)"),
        (changed("cell_offsets", at_first(0.25)), "has values in cell_offsets that are no whole numbers"),
        (lambda fields: fields.pop("cell_offsets"), "has no field 'cell_offsets'"),
        (lambda fields: fields.pop("pos"), "has no field 'pos'"),
        (lambda fields: fields.pop("cell"), "has no field 'cell'"),
        (lambda fields: fields.pop("atomic_numbers"), "has no field 'atomic_numbers'"),
    ],
)
def test_unusable_fields_are_named_with_file_record_and_sid(tmp_path, spoil, message):
    fields = make_fields(0)
    assert fields["natoms"] == 13 and fields["edge_index"].shape == (2, 464)
    spoil(fields)
    dataset = dataset_of(tmp_path, make_fields(1), fields, labels=["energy", "forces"])
    assert dataset[0].natoms > 0
    with pytest.raises(RecordError, match=rf"data.lmdb: record 1 \(sid 0\) {message}"):
        dataset[1]


def test_a_sid_of_another_kind_and_a_transform_that_fails_are_named(tmp_path):
    with pytest.raises(RecordError, match="record 0 has a sid that is no whole number"):
        dataset_of(tmp_path / "a", make_fields(0) | {"sid": 0.5})[0]
    flat = make_fields(0)
    flat["tags"].zero_()
    with pytest.raises(RecordError, match=r"record 0 \(sid 0\): transform remove_subsurface: no atom would be left"):
        dataset_of(tmp_path / "b", flat, transforms={"remove_subsurface": {}})[0]
    far = make_fields(0, edges=False)
    far["pos"][0, 0] = 1e30
    with pytest.raises(RecordError, match=r"record 0 \(sid 0\): positions are not finite or beyond"):
        dataset_of(tmp_path / "c", far)[0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_workers_keep_type_and_message(tmp_path, num_workers):
    dataset = dataset_of(tmp_path, changed_nan())
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    with pytest.raises(RecordError, match=r"data.lmdb: record 0 \(sid 0\) has values in pos that are not finite"):
        next(iter(loader))


def changed_nan() -> dict:
    fields = make_fields(0)
    fields["pos"][0, 0] = NAN
    return fields


# Config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"key_maping": {}}, "unknown key 'key_maping'; did you mean 'key_mapping'"),
        ({"edges": "otf"}, "dataset.edges: 'otf' is not one of stored, recompute, none"),
        ({"dtype": "bfloat16"}, "dataset.dtype: 'bfloat16' is not one of float32, float64"),
        ({"cutoff": None}, "dataset.cutoff: None must be positive"),
        ({"cutoff": 0}, "dataset.cutoff: 0 must be positive"),
        ({"max_neighbors": "40"}, "dataset.max_neighbors: '40' must be positive"),
        ({"key_mapping": {"y": "enery"}}, "key_mapping.y: 'enery' is not one of energy, forces"),
        ({"labels": ["stress"]}, "labels: 'stress' is not one of energy, forces"),
        ({"transforms": {"remove_subsurfce": {}}}, "did you mean 'remove_subsurface'"),
    ],
)
def test_wrong_configs_are_value_errors(small_is2re, config, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(small_is2re / "is2re/all/val_id", **config)


def test_src_is_required():
    with pytest.raises(ValueError, match="no src"):
        OC20LmdbDataset({"cutoff": 6.0, "max_neighbors": 40})


def test_without_edges_no_limits_are_needed(small_is2re):
    dataset = OC20LmdbDataset({"src": str(small_is2re / "is2re/all/val_id"), "edges": "none"})
    assert dataset[0].nedges.tolist() == [0]


def test_it_is_registered_under_all_names_and_fairchem_builds_it(small_is2re):
    for name in NAMES:
        assert registry.get_dataset_class(name) is OC20LmdbDataset
    assert set(NAMES) == {"oc20_lmdb", "lmdb", "single_point_lmdb", "trajectory_lmdb"}
    splits = {"val": {"src": str(small_is2re / "is2re/all/val_id/data.lmdb")}}
    config = {"format": "oc20_lmdb", "splits": splits, "cutoff": 6.0, "max_neighbors": 40, "no_shuffle": True}
    subset = create_dataset(config, "val")
    assert len(subset) == 4 and subset[1].sid == ["1001"]
    batch = atomicdata_list_to_batch([subset[0], subset[1]])
    assert batch.composition.shape == (2, 119) and batch.energy.shape == (2,) and batch.fid.shape == (2,)


def test_registration_can_be_repeated_and_leaves_names_that_are_taken(caplog, monkeypatch):
    class Other:
        pass

    monkeypatch.setitem(registry.mapping["dataset_name_mapping"], "lmdb", Other)
    with caplog.at_level(logging.WARNING):
        lmdb_dataset._register()
    assert registry.get_dataset_class("lmdb") is Other
    assert registry.get_dataset_class("oc20_lmdb") is OC20LmdbDataset
    assert "'lmdb' is test_lmdb_dataset" in caplog.text and len(caplog.records) == 1


# Processes and folders


def reference(dataset, epoch: int) -> list[AtomicData]:
    return [dataset[epoch, index] for index in range(len(dataset))]


class Keys(torch.utils.data.Sampler):
    """Keys (epoch, index), which the default sampler does not give."""

    def __init__(self, epoch: int, count: int):
        self.keys = [(epoch, index) for index in range(count)]

    def __iter__(self):
        return iter(self.keys)

    def __len__(self):
        return len(self.keys)


@pytest.mark.parametrize(
    ("context", "num_workers", "already_read"),
    [("fork", 1, True), ("fork", 2, True), ("fork", 2, False), ("spawn", 1, True)],
)
def test_workers_give_the_samples_of_one_process(small_is2re, context, num_workers, already_read):
    """Also when the parent has read before the fork, and when it reads meanwhile."""
    dataset = open_dataset(small_is2re / "is2re/all/train/data.lmdb", transforms=STOCHASTIC, seed=3)
    expected = reference(open_dataset(small_is2re / "is2re/all/train", transforms=STOCHASTIC, seed=3), epoch=5)
    if already_read:
        _ = dataset[0]
    loader = DataLoader(
        dataset,
        sampler=Keys(5, len(dataset)),
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=multiprocessing.get_context(context),
    )
    for index, sample in enumerate(loader):
        assert equal(sample, expected[index])
        assert equal(dataset[5, index], expected[index])


def test_random_transforms_depend_on_seed_epoch_and_index_only(small_is2re):
    def frames(seed, epoch):
        dataset = open_dataset(small_is2re / "is2re/all/train", transforms=STOCHASTIC, seed=seed)
        order = torch.randperm(len(dataset)).tolist()
        read = {index: dataset[epoch, index].frame_rot for index in order}
        return torch.cat([read[index] for index in sorted(read)])

    first = frames(0, 0)
    torch.manual_seed(99)
    assert torch.equal(frames(0, 0), first)
    others = [frames(0, epoch) for epoch in range(1, 4)] + [frames(1, 0)]
    assert all(not torch.equal(other, first) for other in others)
    signs = torch.stack([first, *others]).sign().flatten(2)
    assert all(len(signs[:, index].unique(dim=0)) > 1 for index in range(signs.shape[1]))  # each sample varies


def test_two_readers_and_many_threads_at_once(small_is2re):
    path = small_is2re / "is2re/all/train/data.lmdb"
    first, second = open_dataset(path), open_dataset(path)
    expected = reference(first, epoch=0)
    assert all(equal(second[index], expected[index]) for index in range(len(second)))
    failures = []

    def read():
        for index in range(len(first)):
            if not equal(first[index], expected[index]):
                failures.append(index)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_pickled_data_sets_open_their_files_anew(small_is2re):
    dataset = open_dataset(small_is2re / "is2re/all/val_id", transforms=STOCHASTIC)
    sample = dataset[1]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.files[0]._env is None and dataset.files[0]._env is not None
    assert equal(copy[1], sample)


def test_nothing_is_left_in_the_data_folder(small_is2re):
    folder = small_is2re / "is2re/all/val_id"
    dataset = open_dataset(folder)
    _ = dataset[0], dataset.natoms()
    assert [path.name for path in folder.iterdir()] == ["data.lmdb"]


def test_a_read_only_folder_is_enough(small_is2re):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(small_is2re / "is2re/all/val_id/data.lmdb", folder)
        (folder / "data.lmdb").chmod(0o444)
        folder.chmod(0o555)
        child = os.fork()
        if child == 0:  # root may write anywhere, so the child reads as somebody else
            code = 1
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                code = 2 * os.access(folder, os.W_OK) + 4 * (len(LmdbFile(folder / "data.lmdb").read(0)) < 1000)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        folder.chmod(0o755)
        assert os.waitstatus_to_exitcode(status) == 0
        assert [path.name for path in folder.iterdir()] == ["data.lmdb"]


# Sizes


def sizes(dataset) -> list[int]:
    return [int(sample.natoms) for sample in reference(dataset, 0)]


def test_opening_reads_no_record(small_is2re, monkeypatch):
    monkeypatch.setattr(LmdbFile, "read", None)
    monkeypatch.setattr(lmdb_dataset, "decode_record", None)
    dataset = open_dataset([small_is2re / "is2re/all/train", small_is2re / "is2re/all/val_id"])
    assert len(dataset) == 16
    assert dataset._metadata == {} and not dataset.metadata_hasattr("natoms")
    assert dataset.indices.tolist() == list(range(16))


def test_sizes_come_from_metadata_beside_the_files(small_is2re, tmp_path, monkeypatch):
    for split in ("train", "val_id"):
        shutil.copytree(small_is2re / "is2re/all" / split, tmp_path / split)
    dataset = open_dataset([tmp_path / "train", tmp_path / "val_id"])
    true = sizes(dataset)
    np.savez(tmp_path / "train/metadata.npz", natoms=np.array(true[:12]), neighbors=np.arange(12))
    assert "natoms" not in open_dataset([tmp_path / "train", tmp_path / "val_id"])._metadata  # one folder lacks it
    np.savez(tmp_path / "val_id/metadata.npz", natoms=np.array(true[12:]))
    monkeypatch.setattr(LmdbFile, "read", None)
    dataset = open_dataset([tmp_path / "train", tmp_path / "val_id"])
    assert dataset.natoms().tolist() == true
    assert dataset.get_metadata("natoms", [0, 13]) == [true[0], true[13]]
    assert list(dataset._metadata) == ["natoms"]


def test_metadata_that_does_not_fit_is_not_used(small_is2re, tmp_path, caplog):
    shutil.copytree(small_is2re / "is2re/all/val_id", tmp_path / "a")
    np.savez(tmp_path / "a/metadata.npz", natoms=np.arange(5))
    with caplog.at_level(logging.WARNING):
        assert open_dataset(tmp_path / "a")._metadata == {}
    assert "metadata.npz is not used: it has no natoms for exactly the 4 records" in caplog.text


def test_metadata_that_would_run_something_or_is_damaged(small_is2re, tmp_path):
    shutil.copytree(small_is2re / "is2re/all/val_id", tmp_path / "a")
    path = tmp_path / "a/metadata.npz"
    np.savez(path, natoms=np.array([{}, 1, 2, 3], dtype=object))
    with pytest.raises(ValueError, match=r"metadata.npz: cannot be read: .*allow_pickle"):
        _ = open_dataset(tmp_path / "a")._metadata
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"metadata.npz: cannot be read"):
        _ = open_dataset(tmp_path / "a")._metadata


def test_sizes_are_collected_once_and_cached_until_the_file_changes(small_is2re, tmp_path, monkeypatch):
    shutil.copytree(small_is2re / "is2re/all/val_id", tmp_path / "data")
    path, cache = tmp_path / "data/data.lmdb", tmp_path / "run/cache"
    dataset = open_dataset(path, cache_dir=str(cache), transforms={"remove_subsurface": {}})
    true = sizes(open_dataset(path))
    assert not cache.exists()  # nothing is collected unless asked for
    assert dataset.natoms().tolist() == true  # before transforms
    assert dataset.metadata_hasattr("natoms") and dataset.get_metadata("natoms", 2) == true[2]
    (kept,) = cache.iterdir()
    assert kept.suffix == ".npy" and [p.name for p in path.parent.iterdir()] == ["data.lmdb"]
    with monkeypatch.context() as patch:
        patch.setattr(LmdbFile, "read", None)
        assert open_dataset(path, cache_dir=str(cache)).natoms().tolist() == true
    os.utime(path, (1, 1))
    assert open_dataset(path, cache_dir=str(cache))._metadata == {}
    assert open_dataset(path, cache_dir=str(cache)).natoms().tolist() == true
    assert len(list(cache.iterdir())) == 2


def test_collecting_sizes_names_a_bad_record(tmp_path):
    path = write_items(tmp_path / "data.lmdb", {b"0": dump_record(make_fields(0)), b"1": b"nothing"})
    with pytest.raises(RecordError, match=r"data.lmdb: record 1 "):
        open_dataset(path).natoms()


def test_resolved_files_are_paths(small_is2re):
    (path,) = resolve_files(str(small_is2re / "is2re/all/val_id"))
    assert path == small_is2re / "is2re/all/val_id/data.lmdb"
