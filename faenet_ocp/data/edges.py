"""The edges of decoded records: those that they store, or found anew, cut to a graph in which shells are whole.

Every step is taken for all records at once, in machine code (``edge_lists``); importing this file compiles it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from faenet_ocp.data.batch import SHELL_EDGES, SHELL_OFFSETS, Array, Fields, Reading, Systems, array_of, converted
from faenet_ocp.data.restricted_pickle import RecordError
from faenet_ocp.graph import lists as edge_lists
from faenet_ocp.graph.neighbors import RESOLUTION, ROUNDING, SHELL_TOLERANCE, find_edges

_AT_ONCE = 16
"""Records whose edges are looked at together: so few that these stay in the processor's cache."""


class _Lists:
    """Edges of some systems, in parts: system, index (2, e) in the numbering of that system, offsets (e, 3)."""

    def __init__(self) -> None:
        self.systems: list[int] = []
        self.index: list[Array] = []
        self.offsets: list[Array] = []

    def add(self, system: int, index: Array, offsets: Array) -> None:
        self.systems.append(system)
        self.index.append(index)
        self.offsets.append(offsets)

    def joined(self) -> tuple[Array, Array, Array, Array]:
        """index (2, E) int64, offsets (E, 3) float64, and of each part the system and where it ends."""
        ends = np.cumsum([part.shape[1] for part in self.index])
        index, offsets = np.empty((2, ends[-1]), dtype=np.int64), np.empty((ends[-1], 3))
        np.concatenate(self.index, axis=1, out=index, casting="unsafe")
        with np.errstate(invalid="ignore"):  # of some NaN numpy would say so here; `nearest` refuses all of them
            np.concatenate(self.offsets, out=offsets, casting="unsafe")
        return index, offsets, np.array(self.systems), ends


class _Geometry(NamedTuple):
    """first (B + 1,): where the atoms of each record begin; pos (N, 3), cell (B, 3, 3): float64."""

    first: Array
    pos: Array
    cell: Array


class _Edges(NamedTuple):
    """edges (2, E), offsets (E, 3), positions of those kept (K,), number of these for each target (N,)."""

    edges: Array
    offsets: Array
    kept: Array
    counts: Array


def make_edges(
    records: Sequence[Fields], systems: Systems, reading: Reading, wanted: Array | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The graph of all records.

    Args:
        records, systems, reading: as in ``record_batch``; `reading.edges` is not none.
        wanted: (N,) atoms to and from which there may be edges; None: all.

    Returns:
        edge_index (2, E) in the numbering of the batch, ordered as by ``graph.limit_neighbors``, cell_offsets (E, 3),
        and the number of edges of each record (B,).

    Raises:
        RecordError: edges that cannot be.
        ValueError: they have to be searched for, and the geometry is impossible.
    """
    wanted = np.ones(len(systems.pos), dtype=bool) if wanted is None else wanted
    parts = []
    for start in range(0, len(records), _AT_ONCE):
        some = systems.part(start, start + _AT_ONCE)
        first = int(systems.first[start])
        mask = wanted[first : first + len(some.pos)]
        index, offsets, nedges = _make_edges(records[start : start + _AT_ONCE], some, reading, mask)
        parts.append((torch.from_numpy(index + first), torch.from_numpy(offsets), torch.from_numpy(nedges)))
    indices, shifts, counts = zip(*parts, strict=True)
    return torch.cat(indices, 1), torch.cat(shifts).to(reading.dtype), torch.cat(counts)


def _make_edges(
    records: Sequence[Fields], systems: Systems, reading: Reading, wanted: Array
) -> tuple[Array, Array, Array]:
    is_stored = np.array([reading.edges == "stored" and np.size(f.get("edge_index", ())) > 0 for f in records])
    lists = _Lists()
    for system, (fields, stored) in enumerate(zip(records, is_stored, strict=True)):
        if stored:
            lists.add(system, *_stored_list(fields, "edge_index", "cell_offsets", systems.counts[system]))
        else:
            lists.add(system, *_search(systems, system, reading.cutoff))
    geometry = _Geometry(
        np.append(systems.first, len(systems.pos)), systems.pos.double().numpy(), systems.cell.double().numpy()
    )
    edges, given, reach = _nearest(lists, geometry, wanted, reading)
    broken = (edges.counts == given) & (given >= reading.max_neighbors) & np.repeat(is_stored, systems.counts)
    whole = edges
    if broken.any():  # the stored lists of these atoms end inside a shell that must be whole
        lists = _whole_lists(records, systems, geometry, reading, broken, reach)
        whole, _, _ = _nearest(lists, geometry, broken, reading)
    return edge_lists.gather(*edges, *whole, broken, geometry.first, wanted)


def _nearest(lists: _Lists, geometry: _Geometry, wanted: Array, reading: Reading) -> tuple[_Edges, Array, Array]:
    """What ``edge_lists.nearest`` chooses, the number of edges that each target has in `lists`, and its longest."""
    index, offsets, *parts = lists.joined()
    limits = reading.cutoff + ROUNDING, reading.max_neighbors, SHELL_TOLERANCE, RESOLUTION
    state, kept, count, given, reach = edge_lists.nearest(index, offsets, *parts, *geometry, wanted, *limits)
    if state == edge_lists.NOT_WHOLE:
        raise RecordError("has values in cell_offsets that are no whole numbers")
    if state != edge_lists.GOOD:
        raise _no_such_atoms(geometry.first[state + 1] - geometry.first[state])
    return _Edges(index, offsets, kept, count), given, reach


def _stored_list(fields: Fields, edges: str, offsets: str, num_atoms: int) -> tuple[Array, Array]:
    index = array_of(fields, edges, (2, None))
    if index.dtype.kind == "f":  # they are made integers; those are checked in `nearest`
        if not ((index >= 0) & (index < num_atoms)).all():
            raise _no_such_atoms(num_atoms)
        converted(index, "edge_index", torch.long)
    return index, array_of(fields, offsets, (index.shape[1], 3))


def _no_such_atoms(num_atoms: int) -> RecordError:
    return RecordError(f"has edges of atoms outside 0 to {num_atoms - 1}")


def _search(systems: Systems, system: int, cutoff: float) -> tuple[Array, Array]:
    atoms = slice(systems.first[system], systems.first[system] + systems.counts[system])
    index, offsets = find_edges(systems.pos[atoms], systems.cell[system], systems.pbc[system], cutoff=cutoff)
    return index.numpy(), offsets.numpy()


def _whole_lists(
    records: Sequence[Fields], systems: Systems, geometry: _Geometry, reading: Reading, broken: Array, reach: Array
) -> _Lists:
    """Edges to the targets `broken` (N,), none of their last shells missing; `reach` (N,): where these begin."""
    lists = _Lists()
    for system in np.unique(systems.batch.numpy()[broken]).tolist():
        fields, atoms = records[system], slice(geometry.first[system], geometry.first[system + 1])
        if SHELL_EDGES in fields:
            for names in (("edge_index", "cell_offsets"), (SHELL_EDGES, SHELL_OFFSETS)):
                lists.add(system, *_stored_list(fields, *names, systems.counts[system]))
            continue
        radius = min(float(reach[atoms][broken[atoms]].max()) + SHELL_TOLERANCE, reading.cutoff)
        found = False
        if bool(systems.pbc[system].all()):
            found, *edges = edge_lists.search(
                geometry.pos[atoms], geometry.cell[system], broken[atoms], radius + 2 * ROUNDING
            )
        lists.add(system, *(edges if found else _search(systems, system, radius)))
    return lists
