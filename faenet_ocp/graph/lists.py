"""The edges of all records of a batch, in machine code (numba): which are kept, in which order, which are missing.

The edges are those that ``graph.limit_neighbors`` keeps, to the last bit, in a small part of the time: one pass with
all of an edge at hand instead of some 50 over arrays. Conventions as in ``graph``. Importing this file compiles it:
seconds the first time, then it is read from numba's cache. Do it before processes start that would each do it.

Shapes: B systems, N atoms and E edges of all of them together. Lists of edges come in parts: index (2, E) source and
target in the numbering of their system, offsets (E, 3), and of each part its system and where it ends, (P,).
"""

import numpy as np
from numba import types as nb

from faenet_ocp.common.numba import compiled

_INT, _INTS, _PAIRS = nb.int64, nb.int64[::1], nb.int64[:, ::1]
_FLOAT, _FLOATS, _ROWS = nb.float64, nb.float64[::1], nb.float64[:, ::1]
_BOXES, _BOOLS = nb.float64[:, :, ::1], nb.boolean[::1]

GOOD, NOT_WHOLE = -1, -2
"""What ``nearest`` says of offsets and atoms, or the system (0 to B - 1) that has edges of atoms it does not have."""
_MAX_COORDINATE = 1e4
_MAX_IMAGES = 1e4
_FLATTEST = 1e-3


@compiled()
def _is_whole(number):
    return abs(number) < 2.0**31 and number == np.rint(number)


@compiled()
def _length(pos, source, target, box, a, b, c):
    """As ``graph.edge_lengths``: the same operations in the same order."""
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
def _duals(cell):
    """Rows (3, 3) whose products with a vector are its coordinates in lattice vectors; infinite for a flat cell."""
    duals, volume, edges = np.empty((3, 3)), 0.0, 1.0
    for axis in range(3):
        first, second, third = cell[axis], cell[(axis + 1) % 3], cell[(axis + 2) % 3]
        volume = 0.0
        for i in range(3):
            j, k = (i + 1) % 3, (i + 2) % 3
            duals[axis, i] = second[j] * third[k] - second[k] * third[j]
            volume += first[i] * duals[axis, i]
        edges *= np.sqrt(first[0] * first[0] + first[1] * first[1] + first[2] * first[2])
    for axis in range(3):
        for i in range(3):
            duals[axis, i] = duals[axis, i] / volume if abs(volume) > _FLATTEST * edges else np.inf
    return duals


@compiled()
def _measure(index, offsets, systems, ends, first_atom, pos, cell, wanted, longest, length, centre, given, count):
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
            if length[edge] <= longest and (length[edge] > 0 or source != target):  # no neighbour of itself
                centre[edge] = target
                count[target] += 1
        begin = ends[part]
    return GOOD


@compiled(
    nb.Tuple((_INT, _INTS, _INTS, _INTS, _FLOATS))(
        _PAIRS, _ROWS, _INTS, _INTS, _INTS, _ROWS, _BOXES, _BOOLS, _FLOAT, _INT, _FLOAT, _FLOAT
    )
)
def nearest(
    index, offsets, systems, ends, first_atom, pos, cell, wanted, longest, max_neighbors, tolerance, resolution
):
    """Choose the edges of the nearest neighbours, as ``graph.limit_neighbors`` does.

    Args:
        index, offsets, systems, ends: the edges.
        first_atom: (B + 1,) where the atoms of each system begin.
        pos, cell: (N, 3) and (B, 3, 3).
        wanted: (N,) the targets that matter; edges of others are left out.
        longest: length up to which edges are kept.
        max_neighbors, tolerance, resolution: of ``graph.limit_neighbors``.

    Returns:
        GOOD, NOT_WHOLE or a system with wrong edges; the positions of the edges kept, ordered by target, distance,
        source, offsets; the number of them and of the edges given for each target (N,); the longest of them (N,).
    """
    length, centre = np.empty(len(offsets)), np.empty(len(offsets), np.int64)
    given, count, reach = np.zeros(len(pos), np.int64), np.zeros(len(pos), np.int64), np.zeros(len(pos))
    state = _measure(
        index, offsets, systems, ends, first_atom, pos, cell, wanted, longest, length, centre, given, count
    )
    if state != GOOD:
        return state, given, count, given, reach

    end = np.cumsum(count)
    place, order = end - count, np.empty(end[-1], np.int64)
    key = np.empty(len(offsets))
    for edge in range(len(centre)):
        target = centre[edge]
        if target >= 0:
            key[edge] = np.rint(length[edge] / resolution)
            order[place[target]] = edge
            place[target] += 1

    scratch, kept = np.empty_like(order), 0
    for target in range(len(pos)):
        mine = order[end[target] - count[target] : end[target]]
        _sort(mine, scratch, key, index[0], offsets)
        limit = np.inf
        if len(mine) > max_neighbors:
            limit = length[mine[max_neighbors - 1]] + tolerance
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


@compiled(nb.Tuple((nb.boolean, _PAIRS, _ROWS))(_ROWS, _ROWS, _BOOLS, _FLOAT))
def search(pos, cell, targets, radius):
    """All edges up to `radius` to some atoms of one system that is periodic in three directions, by trying them.

    Args:
        pos, cell: (n, 3), (3, 3).
        targets: (n,) whether edges to an atom are searched for.
        radius: the longest.

    Returns:
        Whether there is a result (not if the geometry is odd in any way), edges (2, e), offsets (e, 3).
    """
    size = 0
    index, offsets = np.empty((2, 4096), np.int64), np.empty((4096, 3))
    shifts = np.empty((3, 2), np.int64)
    duals = _duals(cell)
    spans, images = np.empty(3), 1.0
    for axis in range(3):  # how far the sphere reaches, in lattice vectors, and a little more than rounding
        dual = duals[axis]
        spans[axis] = radius * np.sqrt(dual[0] * dual[0] + dual[1] * dual[1] + dual[2] * dual[2]) + 1e-6
        images *= 2 * spans[axis] + 1
    if not (images < _MAX_IMAGES and np.abs(pos).max() < _MAX_COORDINATE):
        return False, index[:, :0].copy(), offsets[:0]
    for target in range(len(pos)):
        if not targets[target]:
            continue
        for source in range(len(pos)):
            for axis in range(3):
                middle = 0.0
                for i in range(3):
                    middle += (pos[target, i] - pos[source, i]) * duals[axis, i]
                shifts[axis, 0] = np.ceil(middle - spans[axis])
                shifts[axis, 1] = np.floor(middle + spans[axis])
            for a in range(shifts[0, 0], shifts[0, 1] + 1):
                for b in range(shifts[1, 0], shifts[1, 1] + 1):
                    for c in range(shifts[2, 0], shifts[2, 1] + 1):
                        if _length(pos, source, target, cell, a, b, c) > radius:
                            continue
                        if size == len(offsets):
                            index = np.concatenate((index, index), axis=1)
                            offsets = np.concatenate((offsets, offsets))
                        index[0, size], index[1, size] = source, target
                        offsets[size, 0], offsets[size, 1], offsets[size, 2] = a, b, c
                        size += 1
    return True, index[:, :size].copy(), offsets[:size]
