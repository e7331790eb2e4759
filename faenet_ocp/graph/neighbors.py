"""Neighbour graphs with periodic images: building them, and cutting them to a model's cutoff and neighbour count.

Conventions: edge_index[0] is the source (neighbour) j, edge_index[1] the target (centre) i, and the vector of an edge
is pos[j] - pos[i] + cell_offsets @ cell. Shapes: N atoms, E edges, B systems. Lengths in Angstrom.

An atom keeps its `max_neighbors` nearest neighbours **and** all others as far away as the last of these, because slabs
are full of equal distances: which of them a strict cut keeps depends on the order of the atoms and on rounding, so a
rotated, reflected or permuted copy of a system would have another graph and another energy.
"""

import math

import numpy as np
import torch
import vesin
from numpy.typing import NDArray
from torch import Tensor

SHELL_TOLERANCE = 0.01
"""Distances are one shell if they exceed the distance of the last neighbour kept by no more than this.

It is the value fairchem uses: a thousand times the rounding of float32 coordinates, and below the spacing of different
shells. It is counted from that one distance only, so a chain of close distances cannot draw in more and more atoms.
"""
ROUNDING = 1e-4
"""An edge exactly as long as the cutoff is kept on all sides, whatever its last digits are."""

RESOLUTION = 2.0**-20
"""Distances closer than this (the rounding of float32 coordinates) are ordered by source and offsets instead."""
# Beyond these a neighbour list takes minutes or all memory, or ends the process (seen with vesin 0.6).
_MAX_COORDINATE = 1e4
_MAX_IMAGES = 1e4


def limit_neighbors(
    edge_index: Tensor,
    distances: Tensor,
    *,
    num_atoms: int,
    cutoff: float,
    max_neighbors: int,
    tolerance: float = SHELL_TOLERANCE,
    cell_offsets: Tensor | None = None,
) -> Tensor:
    """Choose the edges of the nearest neighbours; works for one system or a batch, on any device.

    Args:
        edge_index: (2, E) edges, in any order.
        distances: (E,) their lengths.
        num_atoms: N, larger than every index.
        cutoff: longest edge kept.
        max_neighbors: neighbours kept of each target, and with the last of them all that are as far away as it.
        tolerance: how much farther still counts as equally far.
        cell_offsets: (E, 3) whole numbers. With them the order of the result is that of the edges themselves, and does
            not depend on the order in which they are given.

    Returns:
        (E',) positions of the edges kept, ordered by target, distance (to 1e-6 A), source, offsets.

    Raises:
        ValueError: cutoff or max_neighbors is not positive.
    """
    _check_limits(cutoff, max_neighbors)
    short = distances <= cutoff + ROUNDING
    within = None if bool(short.all()) else torch.nonzero(short).view(-1)
    columns = [edge_index[1], (distances.double() / RESOLUTION).round_(), edge_index[0]]
    columns += [] if cell_offsets is None else cell_offsets.unbind(1)
    if within is not None:
        columns = [column[within] for column in columns]
    order = _lexicographic(*(column.long() for column in columns))
    order = order if within is None else within[order]
    target, distance = edge_index[1].index_select(0, order), distances.index_select(0, order)
    count = torch.bincount(target, minlength=num_atoms)
    if not (count > max_neighbors).any():
        return order
    last_kept = torch.cumsum(count, 0) - count + count.clamp(1, max_neighbors) - 1
    limit = distance[last_kept.clamp(max=len(order) - 1)] + tolerance  # atoms without edges: any value
    return order[distance <= limit[target]]


def _lexicographic(*columns: Tensor) -> Tensor:
    """Order of the rows of integer columns (E,), the first column first; equal rows stay in their order."""
    if len(columns[0]) == 0:
        return columns[0]
    lowest, highest = zip(*((int(column.min()), int(column.max())) for column in columns), strict=True)
    widths = [high - low + 1 for low, high in zip(lowest, highest, strict=True)]
    if math.prod(widths) < 2**63:  # one number for each row, as in practice
        key = torch.zeros_like(columns[0])
        for column, low, width in zip(columns, lowest, widths, strict=True):
            key.mul_(width).add_(column).sub_(low)
        if bool((key[1:] >= key[:-1]).all()):  # packed files are in this order
            return torch.arange(len(key), device=key.device)
        return torch.argsort(key, stable=True)
    order = torch.arange(len(columns[0]), device=columns[0].device)
    for column in reversed(columns):
        order = order[torch.argsort(column[order], stable=True)]
    return order


def build_graph(pos: Tensor, cell: Tensor, pbc: Tensor, *, cutoff: float, max_neighbors: int) -> tuple[Tensor, Tensor]:
    """Build the graph of one system, with vesin's neighbour list, as ``limit_neighbors`` cuts it.

    Args:
        pos: (N, 3) positions, inside or outside the cell.
        cell: (3, 3) or (1, 3, 3) lattice vectors in rows; rows of directions that are not periodic do not matter.
        pbc: (3,) or (1, 3) whether each direction is periodic.
        cutoff: longest edge.
        max_neighbors: neighbours of each atom, equal distances kept whole.

    Returns:
        edge_index (2, E), ordered by target, then by distance, and cell_offsets (E, 3) in the dtype of `pos`. An atom
        is a neighbour of its own images, never of itself.

    Raises:
        ValueError: the limits are not positive, coordinates are not finite or absurdly large, or the periodic
            lattice vectors are linearly dependent or absurdly short.
    """
    _check_limits(cutoff, max_neighbors)
    points, box = pos.detach().cpu().double(), cell.detach().cpu().double().view(1, 3, 3)
    edge_index, shifts = find_edges(points, box, pbc, cutoff=cutoff)
    kept = limit_neighbors(
        edge_index,
        edge_lengths(points, box, edge_index, shifts),
        num_atoms=len(pos),
        cutoff=cutoff,
        max_neighbors=max_neighbors,
        cell_offsets=shifts,
    )
    return edge_index[:, kept].to(pos.device).contiguous(), shifts[kept].to(pos)


def find_edges(pos: Tensor, cell: Tensor, pbc: Tensor, *, cutoff: float) -> tuple[Tensor, Tensor]:
    """All edges of one system up to `cutoff`, and some that are up to ``2 * ROUNDING`` longer, in any order.

    Args:
        pos, cell, pbc, cutoff: as for ``build_graph``; on the CPU, not attached to a gradient.

    Returns:
        edge_index (2, E) and the whole numbers of lattice vectors (E, 3) int64.

    Raises:
        ValueError: as ``build_graph``.
    """
    points, box, periodic = pos.double().numpy(), cell.double().view(3, 3).numpy(), pbc.bool().view(3).numpy()
    _check_geometry(points, box[periodic], cutoff)
    # One thread: this runs in loader workers. full_list: both i-j and j-i.
    finder = vesin.NeighborList(cutoff=cutoff + 2 * ROUNDING, full_list=True, n_threads=1)
    targets, sources, shifts = finder.compute(points, box, periodic, "ijS")
    edge_index = np.stack([sources, targets]).astype(np.int64)
    return torch.from_numpy(edge_index), torch.from_numpy(shifts.astype(np.int64))


def edge_lengths(
    pos: Tensor, cell: Tensor, edge_index: Tensor, cell_offsets: Tensor, edge_batch: Tensor | None = None
) -> Tensor:
    """Lengths (E,) of edges in float64, the same to the last bit in a batch as in the system alone.

    Args:
        pos, cell, edge_index, cell_offsets, edge_batch: as for ``edge_vectors``.
    """
    points, lattice, offsets = pos.double(), cell.double(), cell_offsets.double()
    vectors = points.index_select(0, edge_index[0]).sub_(points.index_select(0, edge_index[1]))
    for axis in range(3):  # elementwise on purpose: the last bits of a product of matrices depend on their size
        rows = lattice[:, axis]
        rows = rows if edge_batch is None else rows.contiguous().index_select(0, edge_batch)
        vectors += offsets[:, axis, None] * rows
    x, y, z = vectors.unbind(1)
    return (x * x + y * y + z * z).sqrt()


def edge_vectors(
    pos: Tensor, cell: Tensor, edge_index: Tensor, cell_offsets: Tensor, edge_batch: Tensor | None = None
) -> Tensor:
    """Vectors (E, 3) from target to source, pos[j] - pos[i] + cell_offsets @ cell; differentiable.

    Args:
        pos: (N, 3) positions.
        cell: (B, 3, 3) lattice vectors in rows.
        edge_index: (2, E) source and target atoms.
        cell_offsets: (E, 3) whole numbers of lattice vectors.
        edge_batch: (E,) system of each edge; not needed if there is one system.

    Raises:
        ValueError: several systems, but no edge_batch.
    """
    source, target = edge_index
    cell_offsets = cell_offsets.to(pos.dtype)
    if len(cell) == 1:
        shift = cell_offsets @ cell[0]
    elif edge_batch is None:
        raise ValueError(f"edge_batch is needed for {len(cell)} systems")
    else:
        shift = torch.bmm(cell_offsets.unsqueeze(1), cell[edge_batch]).squeeze(1)
    return pos[source] - pos[target] + shift


def _check_limits(cutoff: float, max_neighbors: int) -> None:
    if not cutoff > 0 or max_neighbors < 1:
        raise ValueError(f"cutoff {cutoff} and max_neighbors {max_neighbors} must be positive")


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
