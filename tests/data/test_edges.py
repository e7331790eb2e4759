"""Edges of records are stored, built or completed, and to the last bit those of plain loops over vesin's list."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small_data
from data_sets import assert_same, dataset_of, edge_set, open_dataset, unrelaxed_slab
from faenet_ocp.common.checks import RecordError
from faenet_ocp.data import edges as edges_module
from faenet_ocp.data.batch import make_batch
from faenet_ocp.data.edges import SHELL_EDGES, SHELL_OFFSETS
from faenet_ocp.data.fields import Fields, Reading
from faenet_ocp.data.packed import decode_packed, encode_packed, prepare_edges
from faenet_ocp.graph.neighbors import build_graph, find_edges
from faenet_ocp.graph.vectors import edge_lengths, edge_vectors
from neighbors_by_hand import TOLERANCE, cut_by_hand
from small_data import make_fields

# Against plain loops


STORED_CUTOFF = 4.0
SHUFFLED, DOUBLED, SELVES, THINNED = range(1, 5)


def lengths_of(pos: np.ndarray, cell: np.ndarray, index: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return edge_lengths(*(torch.tensor(array) for array in (pos, cell.reshape(1, 3, 3), index, offsets))).numpy()


def system(seed: int, *, pbc: bool = True, spoilt: int = 0) -> dict[str, np.ndarray]:
    """A few atoms in a small, tilted cell, many at equal distances, and stored edges that are cut strictly."""
    rng = np.random.default_rng([seed, spoilt])
    size = float(rng.choice([2.6, 3.5, 5.5]))
    cell = np.eye(3) * size + (rng.uniform(-0.3, 0.3, (3, 3)) * size if seed % 3 else 0)
    count = int(rng.integers(1, 7))
    places = rng.integers(-2, 4, (count, 3)) / 2 if seed % 2 else rng.uniform(-1.2, 1.8, (count, 3))
    pos = (places[np.unique(places % 1, axis=0, return_index=True)[1]] @ cell).astype(np.float32)
    count = len(pos)
    periodic = np.ones(3, dtype=bool) if pbc else rng.random(3) < 0.5
    found, shifts = find_edges(pos.astype(float), cell, periodic, cutoff=STORED_CUTOFF)
    lengths = lengths_of(pos, cell, found, shifts)
    order = np.lexsort((rng.random(len(lengths)), lengths.round(3), found[1]))  # any of those that are equally far
    rank = np.arange(len(order)) - np.searchsorted(found[1][order], found[1][order])
    order = order[rank < rng.choice([3, 8, 20])]
    edges = np.vstack([found[:, order], shifts[order].T.astype(int)])
    if spoilt >= SHUFFLED:
        edges = edges[:, rng.permutation(edges.shape[1])]
    if spoilt == DOUBLED:
        edges = np.hstack([edges, edges[:, : edges.shape[1] // 3]])
    if spoilt == SELVES:
        selves = np.zeros((5, count), dtype=np.int64)
        selves[:2] = np.arange(count)
        edges = np.hstack([selves, edges])
    if spoilt == THINNED:
        edges = edges[:, rng.random(edges.shape[1]) < 0.7]
    return {
        "pos": pos,
        "cell": cell,
        "pbc": periodic[None],
        "atomic_numbers": np.full(count, 29),
        "tags": rng.integers(0, 3, count),
        "edge_index": edges[:2].astype(rng.choice([np.uint8, np.int32, np.int64, np.float32])),
        "cell_offsets": edges[2:].T.astype(rng.choice([np.int8, np.float32, np.int64])),
    }


def expected_edges(fields: Fields, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """edge_index and cell_offsets of one record, in several steps."""
    pos, cell = (torch.tensor(fields[name]).to(reading.dtype).double().numpy() for name in ("pos", "cell"))
    num_atoms, limits = len(pos), {"cutoff": reading.cutoff, "max_neighbors": reading.max_neighbors}

    def search(cutoff: float) -> tuple[np.ndarray, np.ndarray]:
        return find_edges(pos, cell, fields["pbc"][0], cutoff=cutoff)

    def limited(index: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lengths = lengths_of(pos, cell, index, offsets)
        lengths[(index[0] == index[1]) & (lengths == 0)] = np.inf
        chosen = cut_by_hand(index, offsets, lengths, **limits)
        return index[:, chosen], offsets[chosen], lengths[chosen]

    stored = reading.edges == "stored" and fields["edge_index"].size > 0
    index, offsets = (fields[name].astype(int) for name in ("edge_index", "cell_offsets"))
    index, offsets = (index, offsets) if stored else search(reading.cutoff)
    kept, shifts, lengths = limited(index, offsets)
    given, count = (np.bincount(edges[1], minlength=num_atoms) for edges in (index, kept))
    broken = (count == given) & (given >= reading.max_neighbors) & stored
    if broken.any():
        if SHELL_EDGES in fields:
            whole = np.hstack([index, fields[SHELL_EDGES]]), np.vstack([offsets, fields[SHELL_OFFSETS]])
        else:
            whole = search(min(float(lengths[broken[kept[1]]].max()) + TOLERANCE, reading.cutoff))
        again, more, _ = limited(*whole)
        old, new = ~broken[kept[1]], broken[again[1]]
        kept, shifts = np.hstack([kept[:, old], again[:, new]]), np.vstack([shifts[old], more[new]])
        order = np.argsort(kept[1], kind="stable")
        kept, shifts = kept[:, order], shifts[order]
    return kept, shifts


def assert_expected(records: list[Any], reading: Reading) -> None:
    """A batch of the records, and each alone, against `expected_edges`; with and without atoms of tag 0."""
    expected = [expected_edges(fields, reading) for fields in records]
    sids = [str(number) for number in range(len(records))]
    first = np.cumsum([0, *(len(fields["pos"]) for fields in records)])
    batch = make_batch(records, sids, reading)
    edges = [index + start for (index, _), start in zip(expected, first, strict=False)]
    assert np.array_equal(batch.edge_index, np.hstack(edges)) and batch.edge_index.is_contiguous()
    assert np.array_equal(batch.cell_offsets, np.vstack([offsets for _, offsets in expected]))
    assert batch.cell_offsets.dtype == reading.dtype
    assert batch.nedges.tolist() == [index.shape[1] for index, _ in expected]
    alone = make_batch(records[-1:], ["0"], reading)
    assert np.array_equal(alone.edge_index, expected[-1][0]) and np.array_equal(alone.cell_offsets, expected[-1][1])

    surface = make_batch(records, sids, reading, surface=True)
    kept = (batch.tags != 0)[batch.edge_index].all(0)
    assert torch.equal(surface.edge_index, batch.edge_index[:, kept])
    assert torch.equal(surface.cell_offsets, batch.cell_offsets[kept])
    assert int(surface.nedges.sum()) == int(kept.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_neighbors", [1, 3, 8, 100])
@pytest.mark.parametrize("spoilt", [0, SHUFFLED, DOUBLED, SELVES, THINNED])
def test_random_systems(spoilt: int, max_neighbors: int, dtype: torch.dtype) -> None:
    records = [system(seed, pbc=seed % 4 != 0, spoilt=spoilt) for seed in range(16)]
    for edges, cutoff in (("stored", 4.0), ("stored", 3.1), ("recompute", 3.5)):
        reading = Reading({}, edges, dtype, cutoff, max_neighbors)
        assert_expected(records, reading)
        if edges == "stored":
            assert_expected([decode_packed(encode_packed(prepare_edges(fields))) for fields in records], reading)


# Of files


def test_stored_and_recomputed_edges_of_the_oc20_sample_agree(oc20_sample: Path) -> None:
    """At 40 neighbours most of these slabs have stored lists that end inside the last shell.

    The files were cut at 6 A to the last digit; an edge that is longer by rounding is not in them.
    """
    for split in small_data.SPLITS[:2]:
        src = oc20_sample / f"is2re/all/{split}"
        for ours, expected in zip(open_dataset(src), open_dataset(src, edges="recompute"), strict=True):
            vectors = edge_vectors(expected.pos, expected.cell, expected.edge_index, expected.cell_offsets)
            inside = vectors.norm(dim=1) <= 6.0
            whole = edge_set(expected.edge_index, expected.cell_offsets)
            sure = edge_set(expected.edge_index[:, inside], expected.cell_offsets[inside])
            assert sure <= edge_set(ours.edge_index, ours.cell_offsets) <= whole


def test_stored_edges_really_come_from_the_file_and_distances_do_not(tmp_path: Path) -> None:
    fields = make_fields(0)
    few = fields | {"edge_index": fields["edge_index"][:, :7], "cell_offsets": fields["cell_offsets"][:7]}
    assert dataset_of(tmp_path / "a", few)[0].nedges.tolist() == [7]
    assert open_dataset(tmp_path / "a/data.lmdb", edges="recompute")[0].nedges > 100
    assert open_dataset(tmp_path / "a/data.lmdb", edges="none")[0].nedges.tolist() == [0]
    wrong = fields | {"distances": torch.rand_like(fields["distances"])}
    assert_same(dataset_of(tmp_path / "b", wrong)[0], dataset_of(tmp_path / "c", fields)[0])


@pytest.mark.parametrize("max_neighbors", [40, 48, 49, 50])
def test_shells_that_the_stored_list_breaks_off_are_completed(tmp_path: Path, max_neighbors: int) -> None:
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


def test_whole_shells_are_taken_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges_module, "find_edges", None)
    assert dataset_of(tmp_path, unrelaxed_slab(np.arange(16)), max_neighbors=12)[0].nedges > 16 * 9


def test_records_without_edges_get_those_of_build_graph(tmp_path: Path) -> None:
    data = dataset_of(tmp_path, make_fields(0, edges=False), max_neighbors=12)[0]
    edge_index, offsets = build_graph(data.pos, data.cell, data.pbc, cutoff=6.0, max_neighbors=12)
    assert torch.equal(data.edge_index, edge_index) and torch.equal(data.cell_offsets, offsets)


def test_edges_are_cut_before_atoms_are_removed(tmp_path: Path) -> None:
    fields = make_fields(1, layers=4)
    data = dataset_of(tmp_path, fields, max_neighbors=15, transforms={"remove_subsurface": {}})[0]
    old = (fields["tags"] > 0).nonzero().view(-1)
    index, offsets = fields["edge_index"], fields["cell_offsets"]
    lengths = edge_vectors(fields["pos"], fields["cell"], index, offsets).norm(dim=1)
    kept = cut_by_hand(index.numpy(), offsets.numpy(), lengths.numpy(), cutoff=6.0, max_neighbors=15)
    expected = {edge for edge in edge_set(index[:, kept], offsets[kept]) if set(edge[:2]) <= set(old.tolist())}
    assert edge_set(old[data.edge_index], data.cell_offsets) == expected
    assert np.bincount(data.edge_index[1]).max() < 15


# What is wrong


def _with(name: str, value: Any) -> dict[str, Any]:
    fields = system(2)
    fields["edge_index"] = fields["edge_index"].astype(np.float64 if isinstance(value, float) else np.int64)
    fields["cell_offsets"] = fields["cell_offsets"].astype(np.float64)
    fields[name].flat[3] = value
    return fields


ATOMS, WHOLE = "has edges in edge_index of atoms outside 0 to", "that are no whole numbers"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(("edge_index", value, ATOMS) for value in (-1, 6, 2**62, -(2**63), -1.0, 1e300, np.nan)),
        ("edge_index", 0.5, WHOLE),
        *(("cell_offsets", value, WHOLE) for value in (0.25, 2.0**31, -1e300, np.nan, -np.inf)),
    ],
)
def test_wrong_edges_are_named(name: str, value: float, message: str) -> None:
    for records in ([_with(name, value)], [system(5), system(4), _with(name, value)]):
        with pytest.raises(RecordError, match=message):
            make_batch(records, [""] * len(records), Reading({}, "stored", torch.float32, 4.0, 8))


def test_nan_of_the_kind_that_signals_is_named_too() -> None:
    """To convert it is an event of its own, which numpy would warn of."""
    fields = system(5)
    fields["cell_offsets"] = fields["cell_offsets"].astype(np.float32)
    fields["cell_offsets"].view(np.uint32).flat[3] = 0x7F800001
    with pytest.raises(RecordError, match=WHOLE):
        make_batch([fields], [""], Reading({}, "stored", torch.float32, 4.0, 8))


def test_offsets_of_far_images_are_left_out() -> None:
    reading = Reading({}, "stored", torch.float64, 4.0, 1000)
    graphs = [make_batch([fields], [""], reading) for fields in (system(2), _with("cell_offsets", 2.0**31 - 1))]
    assert graphs[0].edge_index.shape[1] == graphs[1].edge_index.shape[1] + 1


def test_impossible_geometries_are_errors_only_where_a_search_is_needed() -> None:
    pair = {"pos": np.eye(3)[:2], "cell": np.ones((3, 3)), "atomic_numbers": np.ones(2, int)}
    pair |= {"edge_index": np.array([[0, 1], [1, 0]]), "cell_offsets": np.zeros((2, 3))}
    assert make_batch([pair], [""], Reading({}, "stored", torch.float32, 4.0, 2)).nedges == 2
    with pytest.raises(ValueError, match="span no cell"):
        make_batch([pair], [""], Reading({}, "stored", torch.float32, 4.0, 1))
