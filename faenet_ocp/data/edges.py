"""The edges of decoded records: those that they store, or found anew, cut to a graph in which shells are whole.

Every step is taken for all records at once, in machine code (``graph.lists``).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from faenet_ocp.common.checks import RecordError
from faenet_ocp.data.fields import FIELDS, Array, Fields, Reading, array_of, converted
from faenet_ocp.graph import lists
from faenet_ocp.graph.neighbors import find_edges

SHELL_EDGES, SHELL_OFFSETS = "shell_index", "shell_offsets"
"""Edges that `edge_index` and `cell_offsets` lack: the rest of the shell in which the list of an atom ends."""
_AT_ONCE = 16
"""Records whose edges are looked at together: so few that these stay in the processor's cache (30 % less time)."""


class Systems(NamedTuple):
    """The atoms of some records.

    Attributes:
        first: (B + 1,) where the atoms of each begin.
        pos, cell, pbc: (N, 3) and (B, 3, 3) float64, in the precision of the data set; (B, 3) bool.
    """

    first: Array
    pos: Array
    cell: Array
    pbc: Array

    def part(self, start: int, stop: int) -> "Systems":
        """Some of the records."""
        first = self.first[start : stop + 1]
        atoms = slice(first[0], first[-1])
        return Systems(first - first[0], self.pos[atoms], self.cell[start:stop], self.pbc[start:stop])

    def atoms(self, system: int) -> slice:
        return slice(self.first[system], self.first[system + 1])


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


class _Edges(NamedTuple):
    """edges (2, E), offsets (E, 3), positions of those kept (K,), number of these for each target (N,)."""

    edges: Array
    offsets: Array
    kept: Array
    counts: Array


def check_distances(systems: Systems) -> None:
    """RecordError if two atoms of a system, or of its periodic images, lie on one point."""
    lattice = np.where(systems.pbc[:, :, None], systems.cell, 0.0)
    try:
        inverse = np.linalg.inv(lattice)
    except np.linalg.LinAlgError:  # one of them is not periodic in three directions
        inverse = np.linalg.pinv(lattice, rcond=1e-6)
    system, first, second = lists.coincident(systems.first, systems.pos, lattice, inverse)
    if system >= 0:
        raise RecordError(f"has atoms {first} and {second} on one point (in pos)")


def make_edges(
    records: Sequence[Fields], systems: Systems, reading: Reading, wanted: Array | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The graph of all records.

    Args:
        records, systems: the same.
        reading: how.
        wanted: (N,) atoms to and from which there may be edges; None: all.

    Returns:
        edge_index (2, E) in the numbering of the batch, ordered as by ``graph.build_graph``, cell_offsets (E, 3), and
        the number of edges of each record (B,).

    Raises:
        RecordError: edges that cannot be.
        ValueError: they have to be searched for, and the geometry is impossible.
    """
    if reading.edges == "none":
        edges = torch.empty(2, 0, dtype=torch.long), torch.empty(0, 3, dtype=reading.dtype)
        return *edges, torch.zeros(len(records), dtype=torch.long)
    wanted = np.ones(len(systems.pos), dtype=bool) if wanted is None else wanted
    parts = []
    for start in range(0, len(records), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(records))
        first, last = systems.first[start], systems.first[stop]
        some = records[start:stop], systems.part(start, stop)
        index, offsets, nedges = _make_edges(*some, reading, wanted[first:last])
        parts.append((torch.from_numpy(index + first), torch.from_numpy(offsets), torch.from_numpy(nedges)))
    indices, shifts, counts = zip(*parts, strict=True)
    return torch.cat(indices, 1), torch.cat(shifts).to(reading.dtype), torch.cat(counts)


def _make_edges(
    records: Sequence[Fields], systems: Systems, reading: Reading, wanted: Array
) -> tuple[Array, Array, Array]:
    is_stored = np.array([reading.edges == "stored" and np.size(f.get("edge_index", ())) > 0 for f in records])
    edges = _Lists()
    for system, (fields, stored) in enumerate(zip(records, is_stored, strict=True)):
        if stored:
            edges.add(system, *_stored_list(fields, "edge_index", "cell_offsets", systems, system))
        else:
            edges.add(system, *_search(systems, system, reading.cutoff))
    chosen, given, reach = _nearest(edges, systems, wanted, reading)
    stored_targets = np.repeat(is_stored, np.diff(systems.first))
    broken = (chosen.counts == given) & (given >= reading.max_neighbors) & stored_targets
    whole = chosen
    if broken.any():  # the stored lists of these atoms end inside a shell that must be whole
        whole, _, _ = _nearest(_whole_lists(records, systems, reading, broken, reach), systems, broken, reading)
    return lists.gather(*chosen, *whole, broken, systems.first, wanted)


def _nearest(edges: _Lists, systems: Systems, wanted: Array, reading: Reading) -> tuple[_Edges, Array, Array]:
    """What ``lists.nearest`` chooses, the number of edges that each target has in `edges`, and its longest."""
    index, offsets, *parts = edges.joined()
    limits = reading.cutoff, reading.max_neighbors
    state, kept, count, given, reach = lists.nearest(
        index, offsets, *parts, systems.first, systems.pos, systems.cell, wanted, *limits
    )
    if state == lists.NOT_WHOLE:
        raise RecordError("has values in cell_offsets that are no whole numbers")
    if state != lists.GOOD:
        raise _no_such_atoms(systems, state)
    return _Edges(index, offsets, kept, count), given, reach


def _stored_list(fields: Fields, edges: str, offsets: str, systems: Systems, system: int) -> tuple[Array, Array]:
    index = array_of(fields, edges, (2, None))
    if index.dtype.kind == "f":  # they are made integers; those are checked in `nearest`
        atoms = systems.atoms(system)
        if not ((index >= 0) & (index < atoms.stop - atoms.start)).all():
            raise _no_such_atoms(systems, system)
        converted(index, FIELDS["edge_index"], torch.long)
    return index, array_of(fields, offsets, (index.shape[1], 3))


def _no_such_atoms(systems: Systems, system: int) -> RecordError:
    return RecordError(f"has edges in edge_index of atoms outside 0 to {np.diff(systems.first)[system] - 1}")


def _search(systems: Systems, system: int, cutoff: float) -> tuple[Array, Array]:
    return find_edges(systems.pos[systems.atoms(system)], systems.cell[system], systems.pbc[system], cutoff=cutoff)


def _whole_lists(records: Sequence[Fields], systems: Systems, reading: Reading, broken: Array, reach: Array) -> _Lists:
    """Edges to the targets `broken` (N,), none of their last shells missing; `reach` (N,): where these begin."""
    edges = _Lists()
    for system, fields in enumerate(records):
        atoms = systems.atoms(system)
        if not broken[atoms].any():
            continue
        if SHELL_EDGES in fields:
            for names in (("edge_index", "cell_offsets"), (SHELL_EDGES, SHELL_OFFSETS)):
                edges.add(system, *_stored_list(fields, *names, systems, system))
        else:
            end = float(reach[atoms][broken[atoms]].max()) + lists.SHELL_TOLERANCE
            edges.add(system, *_search(systems, system, min(end, reading.cutoff)))
    return edges
