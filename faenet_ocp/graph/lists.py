"""Neighbour lists in machine code (numba): which edges are kept, in which order; atoms that lie on one point.

An atom keeps its `max_neighbors` nearest neighbours **and** all others as far away as the last of these, because slabs
are full of equal distances: which of them a strict cut keeps depends on the order of the atoms and on rounding, so a
rotated, reflected or permuted copy of a system would have another graph and another energy.

All systems of a batch are worked on together, with all of an edge at hand. Importing this file compiles it: seconds the
first time, then it is read from numba's cache. Do it before processes start that would each do it.

Shapes: B systems, N atoms and E edges of all of them together. Lists of edges come in parts: index (2, E) source and
target in the numbering of their system, offsets (E, 3), and of each part its system and where it ends, (P,).
"""

import numpy as np
from numba import types as nb

from faenet_ocp.common.numba import compiled

_INT, _INTS, _PAIRS = nb.int64, nb.int64[::1], nb.int64[:, ::1]
_FLOAT, _FLOATS, _ROWS = nb.float64, nb.float64[::1], nb.float64[:, ::1]
_BOXES, _BOOLS = nb.float64[:, :, ::1], nb.boolean[::1]

NO_LIMIT = 2**62
"""`max_neighbors` of graphs that are not cut by number."""
SHELL_TOLERANCE = 0.01
"""Distances are one shell if they exceed the distance of the last neighbour kept by no more than this.

It is the value fairchem uses: a thousand times the rounding of float32 coordinates, and below the spacing of different
shells. It is counted from that one distance only, so a chain of close distances cannot draw in more and more atoms.
"""
ROUNDING = 1e-4
"""An edge exactly as long as the cutoff is kept on all sides, whatever its last digits are."""
RESOLUTION = 2.0**-20
"""Distances closer than this (the rounding of float32 coordinates) are ordered by source and offsets instead."""
CLOSEST = 1e-3
"""Atoms closer than this lie on one point: far above rounding of coordinates, and a hundredth of what atoms can be."""

GOOD, NOT_WHOLE = -1, -2
"""What ``nearest`` says of offsets and atoms, or the system (0 to B - 1) that has edges of atoms it does not have."""


@compiled()
def _is_whole(number):
    return abs(number) < 2.0**31 and number == np.rint(number)


@compiled()
def _length(pos, source, target, box, a, b, c):
    """As ``vectors.edge_lengths``: the same operations in the same order."""
    x = pos[source, 0] - pos[target, 0] + a * box[0, 0] + b * box[1, 0] + c * box[2, 0]
    y = pos[source, 1] - pos[target, 1] + a * box[0, 1] + b * box[1, 1] + c * box[2, 1]
    z = pos[source, 2] - pos[target, 2] + a * box[0, 2] + b * box[1, 2] + c * box[2, 2]
    return np.sqrt(x * x + y * y + z * z)


@compiled()
def _is_before(first, second, key, sources, offsets):
    if key[first] != key[second]:
        return key[first] < key[second]
    if sources[first] != sources[second]:
        return sources[first] < sources[second]
    for axis in range(3):
        if offsets[first, axis] != offsets[second, axis]:
            return offsets[first, axis] < offsets[second, axis]
    return False


@compiled()
def _sort(order, scratch, key, sources, offsets):
    """Sort edges in place by merging; those that are in order, as in most files, are only looked at."""
    width, size = 1, len(order)
    while width < size:
        for middle in range(width, size, 2 * width):
            if not _is_before(order[middle], order[middle - 1], key, sources, offsets):
                continue
            scratch[:width] = order[middle - width : middle]
            left, right, end, place = 0, middle, min(middle + width, size), middle - width
            while left < width:
                if right < end and _is_before(order[right], scratch[left], key, sources, offsets):
                    order[place] = order[right]
                    right += 1
                else:
                    order[place] = scratch[left]
                    left += 1
                place += 1
        width *= 2


@compiled()
def _measure(index, offsets, systems, ends, first_atom, pos, cell, wanted, cutoff, length, centre, given, count):
    """Fill length (E,), centre (E,), the target in the batch, -1 for edges left out, given (N,) and count (N,)."""
    begin = 0
    for part in range(len(systems)):
        system = systems[part]
        first, size = first_atom[system], first_atom[system + 1] - first_atom[system]
        for edge in range(begin, ends[part]):
            source, target = index[0, edge], index[1, edge]
            if not (0 <= source < size and 0 <= target < size):
                return system
            source, target = first + source, first + target
            centre[edge] = -1
            if not wanted[target]:
                continue
            a, b, c = offsets[edge, 0], offsets[edge, 1], offsets[edge, 2]
            if not (_is_whole(a) and _is_whole(b) and _is_whole(c)):
                return NOT_WHOLE
            given[target] += 1
            length[edge] = _length(pos, source, target, cell[system], a, b, c)
            if length[edge] <= cutoff + ROUNDING and (length[edge] > 0 or source != target):  # no neighbour of itself
                centre[edge] = target
                count[target] += 1
        begin = ends[part]
    return GOOD


@compiled(
    nb.Tuple((_INT, _INTS, _INTS, _INTS, _FLOATS))(
        _PAIRS, _ROWS, _INTS, _INTS, _INTS, _ROWS, _BOXES, _BOOLS, _FLOAT, _INT
    )
)
def nearest(index, offsets, systems, ends, first_atom, pos, cell, wanted, cutoff, max_neighbors):
    """Choose the edges of the nearest neighbours, last shells whole.

    Args:
        index, offsets, systems, ends: the edges, in any order.
        first_atom: (B + 1,) where the atoms of each system begin.
        pos, cell: (N, 3) and (B, 3, 3).
        wanted: (N,) the targets that matter; edges of others are left out.
        cutoff: length up to which edges are kept (and `ROUNDING` more).
        max_neighbors: neighbours kept of each target, and with the last of them all that are as far away as it.

    Returns:
        GOOD, NOT_WHOLE or a system with wrong edges; the positions of the edges kept, ordered by target, distance,
        source, offsets; the number of them and of the edges given for each target (N,); the longest of them (N,).
    """
    length, centre = np.empty(len(offsets)), np.empty(len(offsets), np.int64)
    given, count, reach = np.zeros(len(pos), np.int64), np.zeros(len(pos), np.int64), np.zeros(len(pos))
    state = _measure(index, offsets, systems, ends, first_atom, pos, cell, wanted, cutoff, length, centre, given, count)
    if state != GOOD:
        return state, given, count, given, reach

    end = np.cumsum(count)
    place, order = end - count, np.empty(end[-1], np.int64)
    key = np.empty(len(offsets))
    for edge in range(len(centre)):
        target = centre[edge]
        if target >= 0:
            key[edge] = np.rint(length[edge] / RESOLUTION)
            order[place[target]] = edge
            place[target] += 1

    scratch, kept = np.empty_like(order), 0
    for target in range(len(pos)):
        mine = order[end[target] - count[target] : end[target]]
        _sort(mine, scratch, key, index[0], offsets)
        limit = np.inf
        if len(mine) > max_neighbors:
            limit = length[mine[max_neighbors - 1]] + SHELL_TOLERANCE
        count[target] = 0
        for edge in mine:
            if length[edge] <= limit:
                order[kept] = edge  # never beyond the place where this edge was
                reach[target] = max(reach[target], length[edge])
                count[target] += 1
                kept += 1
    return GOOD, order[:kept], count, given, reach


@compiled(nb.Tuple((_PAIRS, _ROWS, _INTS))(*[_PAIRS, _ROWS, _INTS, _INTS] * 2, _BOOLS, _INTS, _BOOLS))
def gather(
    index, offsets, kept, count, whole_index, whole_offsets, whole_kept, whole_count, broken, first_atom, wanted
):
    """The edges that ``nearest`` has chosen, those of the targets `broken` (N,) from its second choice.

    Args:
        index, offsets, kept, count: edges, and what `nearest` says of them.
        whole_index, whole_offsets, whole_kept, whole_count: the same of the other edges.
        broken, wanted: (N,) edges of sources that are not wanted are left out.
        first_atom: (B + 1,).

    Returns:
        edge_index (2, E') in the numbering of the batch, cell_offsets (E', 3), number of edges of each system (B,).
    """
    num_edges = np.where(broken, whole_count, count).sum()
    found, shifts = np.empty((2, num_edges), np.int64), np.empty((num_edges, 3))
    edges = np.zeros(len(first_atom) - 1, np.int64)
    size = begin = whole_begin = 0
    for system in range(len(edges)):
        first = first_atom[system]
        edges[system] = -size
        for target in range(first, first_atom[system + 1]):
            if broken[target]:
                sources, rows, chosen = whole_index, whole_offsets, whole_kept[whole_begin:]
                chosen = chosen[: whole_count[target]]
            else:
                sources, rows, chosen = index, offsets, kept[begin:]
                chosen = chosen[: count[target]]
            begin += count[target]
            whole_begin += whole_count[target]
            for edge in chosen:
                source = first + sources[0, edge]
                if wanted[source]:
                    found[0, size], found[1, size] = source, target
                    for axis in range(3):
                        shifts[size, axis] = rows[edge, axis]
                    size += 1
        edges[system] += size
    if size < num_edges:
        found = np.ascontiguousarray(found[:, :size])
    return found, shifts[:size], edges


@compiled(nb.Tuple((_INT, _INT, _INT))(_INTS, _ROWS, _BOXES, _BOXES))
def coincident(first_atom, pos, lattice, inverse):
    """The first two atoms that lie on one point, counting periodic images.

    Args:
        first_atom: (B + 1,) where the atoms of each system begin.
        pos: (N, 3).
        lattice: (B, 3, 3) lattice vectors in rows, zero where a direction is not periodic.
        inverse: (B, 3, 3) its pseudo-inverse.

    Returns:
        Their system and their numbers in it; a system of -1 if there are none.
    """
    scaled = np.empty_like(pos)
    for system in range(len(first_atom) - 1):
        box, to_box, begin = lattice[system], inverse[system], first_atom[system]
        width = CLOSEST * np.sqrt(to_box[0, 0] ** 2 + to_box[1, 0] ** 2 + to_box[2, 0] ** 2)  # in lattice vectors
        for atom in range(begin, first_atom[system + 1]):
            for axis in range(3):
                scaled[atom, axis] = (
                    pos[atom, 0] * to_box[0, axis] + pos[atom, 1] * to_box[1, axis] + pos[atom, 2] * to_box[2, axis]
                )
        for atom in range(begin, first_atom[system + 1]):
            for other in range(begin, atom):
                a = scaled[atom, 0] - scaled[other, 0]
                if abs(a - np.rint(a)) > width:  # most pairs
                    continue
                b, c = scaled[atom, 1] - scaled[other, 1], scaled[atom, 2] - scaled[other, 2]
                if _length(pos, atom, other, box, -np.rint(a), -np.rint(b), -np.rint(c)) < CLOSEST:
                    return system, other - begin, atom - begin
    return -1, -1, -1
