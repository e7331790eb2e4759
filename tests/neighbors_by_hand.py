"""The cut of a neighbour list, atom by atom, for the tests of `graph` and `data`."""

import numpy as np

TOLERANCE, ROUNDING, RESOLUTION = 0.01, 1e-4, 2.0**-20


def cut_by_hand(
    edge_index: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, *, cutoff: float, max_neighbors: int
) -> np.ndarray:
    """The edges kept of a system, ordered by target, distance, source and offsets.

    Each target keeps its nearest `max_neighbors`, and all that are farther than the last of these by the tolerance at
    most.
    """
    source, target = edge_index
    order = np.lexsort((*offsets.T[::-1], source, np.rint(lengths / RESOLUTION), target))
    kept = [order[:0]]
    for atom in np.unique(target):
        mine = order[(target[order] == atom) & (lengths[order] <= cutoff + ROUNDING)]
        limit = lengths[mine[max_neighbors - 1]] + TOLERANCE if len(mine) > max_neighbors else np.inf
        kept.append(mine[lengths[mine] <= limit])
    return np.concatenate(kept)
