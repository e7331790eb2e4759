"""The table of fields: what is in it is handled by level, and what is not is an error that says what to do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import fcc111, molecule
from ase.constraints import FixAtoms
from fairchem.core.datasets.atomic_data import AtomicData

import faenet_ocp
from data_sets import TRANSFORMS, assert_same, dataset_of, one_by_one, open_dataset
from faenet_ocp.data import fields as fields_module
from faenet_ocp.data.atoms import atoms_to_data
from faenet_ocp.data.fields import FIELDS, Field, level_of, register_field
from faenet_ocp.data.transforms import BatchTransform


class Mark(BatchTransform):
    """A user's transform that adds fields of each level."""

    def batch(self, data: AtomicData, generators: object) -> AtomicData:
        data.site = data.atomic_numbers[:, None, None] * torch.arange(4).view(2, 2)
        data.order = data.cell_offsets[:, :1]
        data.spectrum = torch.ones(len(data.natoms), 5)
        data.remark = ["text"] * len(data.natoms)
        return data


NEW = (Field("site", "atom", torch.long, (2, 2)), Field("order", "edge", shape=(1,)), Field("remark", "system", str))


def test_fields_of_users_are_cut_and_collated_by_their_level(
    tmp_path: Path, small_is2re: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fields_module, "FIELDS", dict(FIELDS))
    steps = {f"{__name__}.Mark": {}, "remove_subsurface": {}}
    dataset = open_dataset(small_is2re / "is2re/all/train", transforms=steps)
    with pytest.raises(ValueError, match=r"Mark: a batch has a field '\w+' that is not known.*faenet_ocp.register_f"):
        dataset[0]
    for field in (*NEW, Field("spectrum", "system", shape=(5,))):
        faenet_ocp.register_field(field)
    keys = [(0, 3), (0, 1)]
    batch = dataset.load_batch(keys)
    assert_same(batch, one_by_one(dataset, keys))
    whole = open_dataset(small_is2re / "is2re/all/train", transforms={f"{__name__}.Mark": {}}).load_batch(keys)
    keep = whole.tags != 0
    edges = keep[whole.edge_index].all(0)
    assert torch.equal(batch.site, whole.site[keep]) and torch.equal(batch.order, whole.order[edges])
    assert batch.spectrum.shape == (2, 5) and batch.remark == ["text"] * 2


def test_names_cannot_be_taken_twice() -> None:
    register_field(FIELDS["tags"])  # again, as when a module is imported twice
    with pytest.raises(ValueError, match="field 'tags' is already Field"):
        register_field(Field("tags", "system"))


def test_unknown_fields_are_errors_with_the_nearest_name() -> None:
    names = ("forces", "edge_index", "energy", "frame_rot")
    assert [level_of(name) for name in names] == ["atom", "edge", "system", "system"]
    with pytest.raises(ValueError, match=r"'cel_offsets' .*not known; did you mean cell_offsets\?; .*register_field"):
        level_of("cel_offsets")


def test_every_field_of_a_batch_has_the_level_dtype_and_shape_of_its_row(small_s2ef: Path) -> None:
    dataset = open_dataset(
        small_s2ef / "s2ef/2M/train", labels=["energy", "forces"], transforms=TRANSFORMS["stochastic"], dtype="float64"
    )
    batch = dataset.load_batch([(0, 0), (0, 7), (0, 3)])
    lengths = {"atom": len(batch.pos), "edge": batch.edge_index.shape[1], "system": 3}
    for name, value in batch:
        row = FIELDS[name]
        if row.dtype is str:
            assert len(value) == 3 and all(isinstance(text, str) for text in value)
        elif name != "edge_index":
            assert value.dtype == (row.dtype or torch.float64) and len(value) == lengths[row.level], name
            assert row.shape is None or value.shape[1:] == row.shape, name


# Structures of ASE


def slab() -> Atoms:
    atoms = fcc111("Cu", size=(2, 2, 4), vacuum=8.0)
    atoms.pbc = True
    atoms.rattle(0.1, seed=1)
    atoms.set_tags(np.arange(16) % 3)
    atoms.set_constraint(FixAtoms(indices=[0, 5]))
    atoms.info["sid"] = 7
    return atoms


def test_atoms_become_the_sample_of_a_record(tmp_path: Path) -> None:
    for number, atoms in enumerate((slab(), molecule("CH3CH2OH"), fcc111("Pt", size=(2, 2, 3), vacuum=5.0))):
        atoms.set_tags(atoms.get_tags() % 3)
        record = {"pos": atoms.positions, "atomic_numbers": atoms.numbers, "tags": atoms.get_tags(), "pbc": atoms.pbc}
        record |= {"cell": atoms.cell.array, "fixed": np.isin(np.arange(len(atoms)), [0, 5]) * (number == 0)}
        record = {name: torch.tensor(value) for name, value in record.items()} | {"sid": str(atoms.info.get("sid", ""))}
        expected = dataset_of(tmp_path / str(number), record, labels=[], max_neighbors=30)[0]
        expected.atom_id = torch.arange(len(atoms))
        assert_same(atoms_to_data(atoms, cutoff=6.0, max_neighbors=30), expected)


def test_atoms_that_no_record_could_hold_are_errors() -> None:
    atoms = slab()
    atoms.positions[3] = atoms.positions[9] + atoms.cell[1]
    with pytest.raises(ValueError, match="has atoms 3 and 9 on one point"):
        atoms_to_data(atoms, cutoff=6.0, max_neighbors=30)
    with pytest.raises(ValueError, match="has tags that are not OC20's 0, 1 and 2, but 1, 2, 3, 4; tags: file takes"):
        atoms_to_data(fcc111("Cu", size=(1, 1, 4), vacuum=5.0), cutoff=6.0, max_neighbors=30)
