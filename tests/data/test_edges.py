"""The edges that machine code chooses are, to the last bit, those of the torch functions of ``graph`` and vesin."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faenet_ocp.data.packed_records import decode_packed, encode_packed, prepare_edges

from faenet_ocp.data import edges as record_edges
from faenet_ocp.data.batch import SHELL_EDGES, SHELL_OFFSETS, Fields, Reading, make_batch
from faenet_ocp.data.restricted_pickle import RecordError
from faenet_ocp.graph import lists as edge_lists
from faenet_ocp.graph.neighbors import ROUNDING, SHELL_TOLERANCE, edge_lengths, find_edges, limit_neighbors

STORED_CUTOFF = 4.0
DTYPES = (torch.float32, torch.float64)
SHUFFLED, DOUBLED, SELVES, THINNED = range(1, 5)


def system(seed: int, *, pbc: bool = True, spoilt: int = 0) -> dict[str, np.ndarray]:
    """A few atoms in a small, tilted cell, many at equal distances, and stored edges that are cut strictly."""
    rng = np.random.default_rng([seed, spoilt])
    size = float(rng.choice([2.6, 3.5, 5.5]))
    cell = np.eye(3) * size + (rng.uniform(-0.3, 0.3, (3, 3)) * size if seed % 3 else 0)
    count = int(rng.integers(1, 7))
    places = rng.integers(-2, 4, (count, 3)) / 2 if seed % 2 else rng.uniform(-1.2, 1.8, (count, 3))
    pos = (np.unique(places, axis=0) @ cell).astype(np.float32)
    count = len(pos)
    periodic = np.ones(3, dtype=bool) if pbc else rng.random(3) < 0.5
    found, shifts = (x.numpy() for x in find_edges(*map(torch.from_numpy, (pos, cell, periodic)), cutoff=STORED_CUTOFF))
    lengths = edge_lengths(*map(torch.from_numpy, (pos, cell[None], found, shifts))).numpy()
    order = np.lexsort((rng.random(len(lengths)), lengths.round(3), found[1]))  # any of those that are equally far
    rank = np.arange(len(order)) - np.searchsorted(found[1][order], found[1][order])
    order = order[rank < rng.choice([3, 8, 20])]
    edges = np.vstack([found[:, order], shifts[order].T])
    if spoilt >= SHUFFLED:
        edges = rng.permuted(edges, axis=1) if edges.shape[1] == 0 else edges[:, rng.permutation(edges.shape[1])]
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


def expected_edges(fields: Fields, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    """edge_index and cell_offsets of one record, with the functions of ``graph`` alone, in several steps."""
    pos = torch.tensor(fields["pos"]).to(reading.dtype)
    cell, pbc = torch.tensor(fields["cell"]).to(reading.dtype).view(1, 3, 3), torch.tensor(fields["pbc"])
    limits = {"num_atoms": len(pos), "cutoff": reading.cutoff, "max_neighbors": reading.max_neighbors}

    def read(edges: str, offsets: str) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.tensor(fields[name].astype(np.int64)) for name in (edges, offsets))

    def limited(index: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lengths = edge_lengths(pos, cell, index, offsets)
        lengths[(index[0] == index[1]) & (lengths == 0)] = torch.inf
        chosen = limit_neighbors(index, lengths, cell_offsets=offsets, **limits)
        return index[:, chosen], offsets[chosen], lengths[chosen]

    stored = reading.edges == "stored" and fields["edge_index"].size > 0
    index, offsets = read("edge_index", "cell_offsets") if stored else find_edges(pos, cell, pbc, cutoff=reading.cutoff)
    kept, shifts, lengths = limited(index, offsets)
    given, count = (torch.bincount(edges[1], minlength=len(pos)) for edges in (index, kept))
    broken = (count == given) & (given >= reading.max_neighbors) & stored
    if broken.any():
        if SHELL_EDGES in fields:
            more, more_shifts = read(SHELL_EDGES, SHELL_OFFSETS)
            whole, whole_shifts = torch.cat([index, more], 1), torch.cat([offsets, more_shifts])
        else:
            reach = float(lengths[broken[kept[1]]].max())
            whole, whole_shifts = find_edges(pos, cell, pbc, cutoff=min(reach + SHELL_TOLERANCE, reading.cutoff))
        whole, whole_shifts, _ = limited(whole, whole_shifts)
        old, new = ~broken[kept[1]], broken[whole[1]]
        kept, shifts = torch.cat([kept[:, old], whole[:, new]], 1), torch.cat([shifts[old], whole_shifts[new]])
        order = torch.argsort(kept[1], stable=True)
        kept, shifts = kept[:, order], shifts[order]
    return kept, shifts.to(reading.dtype)


def packed(fields: Fields) -> Fields:
    return decode_packed(encode_packed(prepare_edges(fields)))


def assert_expected(records: list[Any], reading: Reading) -> None:
    """A batch of the records, and each alone, against `expected_edges`; with and without atoms of tag 0."""
    expected = [expected_edges(fields, reading) for fields in records]
    sids = [str(number) for number in range(len(records))]
    first = np.cumsum([0, *(len(fields["pos"]) for fields in records)])
    batch = make_batch(records, sids, reading)
    edges = [index + start for (index, _), start in zip(expected, first, strict=False)]
    assert torch.equal(batch.edge_index, torch.cat(edges, 1)) and batch.edge_index.is_contiguous()
    assert torch.equal(batch.cell_offsets, torch.cat([offsets for _, offsets in expected]))
    assert batch.cell_offsets.dtype == reading.dtype
    assert batch.nedges.tolist() == [index.shape[1] for index, _ in expected]
    alone = make_batch(records[-1:], ["0"], reading)
    assert torch.equal(alone.edge_index, expected[-1][0]) and torch.equal(alone.cell_offsets, expected[-1][1])

    surface = make_batch(records, sids, reading, surface=True)
    kept = (batch.tags != 0)[batch.edge_index].all(0)
    assert torch.equal(surface.edge_index, batch.edge_index[:, kept])
    assert torch.equal(surface.cell_offsets, batch.cell_offsets[kept])
    assert int(surface.nedges.sum()) == int(kept.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_neighbors", [1, 3, 8, 100])
@pytest.mark.parametrize("spoilt", [0, SHUFFLED, DOUBLED, SELVES, THINNED])
def test_random_systems(spoilt: int, max_neighbors: int, dtype: torch.dtype) -> None:
    records = [system(seed, pbc=seed % 4 != 0, spoilt=spoilt) for seed in range(20)]
    of_packed = [packed(fields) for fields in records]
    for edges, cutoff in (("stored", 4.0), ("stored", 3.1), ("recompute", 3.5)):
        reading = Reading({}, edges, dtype, cutoff, max_neighbors)
        assert_expected(records, reading)
        if edges == "stored":
            assert_expected(of_packed, reading)


def test_the_systems_have_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that end in the middle of a shell, found in both ways, and equal distances with another order."""
    searched = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: searched.append(function) or function(*args, **options)

    ways = [edge_lists.search, record_edges.find_edges]
    monkeypatch.setattr(edge_lists, "search", counted(ways[0]))
    monkeypatch.setattr(record_edges, "find_edges", counted(ways[1]))
    reading = Reading({}, "stored", torch.float32, 4.0, 8)
    records = [system(seed, pbc=seed % 4 != 0) for seed in range(24)]
    batch = make_batch(records, [""] * 24, reading)
    assert searched.count(ways[0]) >= 5 and searched.count(ways[1]) >= 2
    assert (torch.bincount(batch.edge_index[1]) > 8).any()


def test_a_search_finds_what_vesin_finds() -> None:
    refused = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        cell = np.eye(3) * rng.choice([1.5, 4.0, 20.0], 3) + rng.uniform(-0.7, 0.7, (3, 3))
        pos, targets = rng.uniform(-15, 15, (int(rng.integers(1, 9)), 3)), rng.random(8) < 0.5
        targets, radius = np.resize(targets, len(pos)), float(rng.uniform(1, 7))
        found, index, offsets = edge_lists.search(pos, cell, targets, radius)
        refused += not found
        if found:
            vesin = find_edges(*map(torch.from_numpy, (pos, cell, np.ones(3, bool))), cutoff=radius - 2 * ROUNDING)
            wanted = targets[vesin[0][1].numpy()]
            rows = np.vstack([vesin[0].numpy(), vesin[1].numpy().T])[:, wanted].T
            ours = np.vstack([index, offsets.T]).T
            is_self = (ours[:, 0] == ours[:, 1]) & (ours[:, 2:] == 0).all(1)
            assert sorted(map(tuple, ours[~is_self].astype(int).tolist())) == sorted(map(tuple, rows.tolist()))
    assert refused < 10


@pytest.mark.parametrize(
    ("pos", "cell"),
    [
        (np.zeros((2, 3)), np.zeros((3, 3))),
        (np.zeros((2, 3)), np.ones((3, 3))),
        (np.zeros((2, 3)), np.eye(3) * 1e-3),
        (np.full((2, 3), 1e9), np.eye(3) * 4),
        (np.full((2, 3), 1e308), np.eye(3) * 1e308),
        (np.full((2, 3), np.nan), np.eye(3)),
    ],
)
def test_a_search_refuses_what_would_take_forever(pos: np.ndarray, cell: np.ndarray) -> None:
    found, index, offsets = edge_lists.search(pos, cell, np.ones(2, dtype=bool), 6.0)
    assert not found and index.shape == (2, 0) and offsets.shape == (0, 3)


# What is wrong


def _with(name: str, value: Any) -> dict[str, Any]:
    fields = system(2)
    fields["edge_index"] = fields["edge_index"].astype(np.float64 if isinstance(value, float) else np.int64)
    fields["cell_offsets"] = fields["cell_offsets"].astype(np.float64)
    fields[name].flat[3] = value
    return fields


ATOMS, WHOLE = "has edges of atoms outside 0 to", "that are no whole numbers"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(("edge_index", value, ATOMS) for value in (-1, 6, 2**31, 2**62, -(2**63), -1.0, 1e300, np.nan, np.inf)),
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
    one, other = system(2), _with("cell_offsets", 2.0**31 - 1)
    graphs = [make_batch([fields], [""], reading) for fields in (one, other)]
    assert graphs[0].edge_index.shape[1] == graphs[1].edge_index.shape[1] + 1


def test_impossible_geometries_are_errors_only_where_a_search_is_needed() -> None:
    pair = {"pos": np.eye(3)[:2], "cell": np.zeros((3, 3)), "atomic_numbers": np.ones(2, int)}
    pair |= {"edge_index": np.array([[0, 1], [1, 0]]), "cell_offsets": np.zeros((2, 3))}
    assert make_batch([pair], [""], Reading({}, "stored", torch.float32, 4.0, 2)).nedges == 2
    with pytest.raises(ValueError, match="span no cell"):
        make_batch([pair], [""], Reading({}, "stored", torch.float32, 4.0, 1))


# Compiling


def test_numba_is_imported_and_compiles_only_for_data_with_edges(tmp_path: Path, small_is2re: Path) -> None:
    code = f"""
import sys
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.training import trainer
config = {{"src": {str(small_is2re / "is2re/all/train")!r}, "cutoff": 6.0, "max_neighbors": 9}}
OC20LmdbDataset(config | {{"edges": "none"}})[0]
assert "faenet_ocp.graph.lists" not in sys.modules
OC20LmdbDataset(config)
assert "faenet_ocp.graph.lists" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(edge_lists.__file__).parents[1])
