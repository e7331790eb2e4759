"""Neighbour graphs with periodic images, built with vesin's neighbour list and cut by ``lists.nearest``.

Conventions as in ``vectors``. Shapes: N atoms, E edges. Lengths in Angstrom.
"""

import functools
from typing import Any

import numpy as np
import torch
import vesin
from numpy.typing import NDArray
from torch import Tensor

from faenet_ocp.graph import lists

Array = NDArray[Any]

# Beyond these a neighbour list takes minutes or all memory, or ends the process (seen with vesin 0.6).
_MAX_COORDINATE = 1e4
_MAX_IMAGES = 1e4
_FEW_ATOMS = 64
"""Of a molecule whose pairs are all looked at."""


def build_graph(
    pos: Tensor, cell: Tensor, pbc: Tensor, *, cutoff: float, max_neighbors: int | None
) -> tuple[Tensor, Tensor]:
    """Build the graph of one system.

    Args:
        pos: (N, 3) positions, inside or outside the cell.
        cell: (3, 3) or (1, 3, 3) lattice vectors in rows; rows of directions that are not periodic do not matter.
        pbc: (3,) or (1, 3) whether each direction is periodic.
        cutoff: longest edge.
        max_neighbors: neighbours of each atom, equal distances kept whole (see ``lists``); None: all.

    Returns:
        edge_index (2, E), ordered by target, then by distance, and cell_offsets (E, 3) in the dtype of `pos`. An atom
        is a neighbour of its own images, never of itself.

    Raises:
        ValueError: the limits are not positive, coordinates are not finite or absurdly large, or the periodic
            lattice vectors are linearly dependent or absurdly short.
    """
    max_neighbors = lists.NO_LIMIT if max_neighbors is None else max_neighbors
    if not cutoff > 0 or max_neighbors < 1:
        raise ValueError(f"cutoff {cutoff} and max_neighbors {max_neighbors} must be positive")
    points, box = pos.detach().cpu().double().numpy(), cell.detach().cpu().double().view(3, 3).numpy()
    index, offsets = find_edges(points, box, pbc.bool().cpu().view(3).numpy(), cutoff=cutoff)
    one_part = np.zeros(1, np.int64), np.array([len(offsets)]), np.array([0, len(points)])
    everyone = np.ones(len(points), dtype=bool)
    _, kept, *_ = lists.nearest(
        index, offsets, *one_part, np.ascontiguousarray(points), box[None].copy(), everyone, cutoff, max_neighbors
    )
    kept_index = torch.from_numpy(index.take(kept, axis=1))
    return kept_index.to(pos.device), torch.from_numpy(offsets[kept]).to(pos)


def find_edges(pos: Array, cell: Array, pbc: Array, *, cutoff: float) -> tuple[Array, Array]:
    """All edges of one system up to `cutoff`, and some that are longer, in any order; the result is not to be changed.

    Args:
        pos, cell: (N, 3), (3, 3) float64.
        pbc: (3,) bool.
        cutoff: as for ``build_graph``.

    Returns:
        edge_index (2, E) int64 and the whole numbers of lattice vectors (E, 3) float64.

    Raises:
        ValueError: as ``build_graph``.
    """
    _check_geometry(pos, cell[pbc], cutoff)
    if not pbc.any() and len(pos) <= _FEW_ATOMS:
        return _all_pairs(len(pos))
    # One thread: this runs in loader workers. full_list: both i-j and j-i.
    finder = vesin.NeighborList(cutoff=cutoff + 2 * lists.ROUNDING, full_list=True, n_threads=1)
    targets, sources, shifts = finder.compute(pos, cell, pbc, "ijS")
    return np.stack([sources, targets]).astype(np.int64), shifts.astype(np.float64)


@functools.cache
def _all_pairs(num_atoms: int) -> tuple[Array, Array]:
    """Every atom to every other: of a small molecule, what is too long is left out faster than it is searched for."""
    index = np.argwhere(~np.eye(num_atoms, dtype=bool)).T
    return np.ascontiguousarray(index, dtype=np.int64), np.zeros((index.shape[1], 3))


def _check_geometry(points: NDArray[np.float64], lattice: NDArray[np.float64], cutoff: float) -> None:
    """Refuse what the neighbour list cannot digest; `lattice` (0 to 3, 3) are the periodic lattice vectors."""
    if not (np.abs(points) <= _MAX_COORDINATE).all():  # also false for NaN
        raise ValueError(f"positions are not finite or beyond {_MAX_COORDINATE:g} A")
    if len(lattice) == 0:
        return
    left, widths = None, np.zeros(1)
    if np.isfinite(lattice).all():
        left, widths, _ = np.linalg.svd(lattice, full_matrices=False)
    if left is None or widths.min() <= 3 * np.finfo(np.float64).eps * widths.max():
        raise ValueError(f"periodic lattice vectors {lattice.tolist()} span no cell")
    one_over_heights = np.sqrt(((left / widths) ** 2).sum(axis=1))  # columns of the pseudo-inverse
    images = float((2 * cutoff * one_over_heights + 1).prod())
    if images > _MAX_IMAGES:
        raise ValueError(f"cell {lattice.tolist()} is too small for cutoff {cutoff}: {images:.3g} images of each atom")
