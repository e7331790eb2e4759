"""Neighbour graphs with periodic images: building them, and cutting them to a model's cutoff and neighbour count.

Conventions: edge_index[0] is the source (neighbour) j, edge_index[1] the target (centre) i, and the vector of an edge
is pos[j] - pos[i] + cell_offsets @ cell. Shapes: N atoms, E edges, B systems. Lengths in Angstrom.

An atom keeps its `max_neighbors` nearest neighbours **and** all others as far away as the last of these, because slabs
are full of equal distances: which of them a strict cut keeps depends on the order of the atoms and on rounding, so a
rotated, reflected or permuted copy of a system would have another graph and another energy.
"""

import torch
import vesin
from torch import Tensor

SHELL_TOLERANCE = 0.01
"""Distances are one shell if they exceed the distance of the last neighbour kept by no more than this.

It is the value fairchem uses: a thousand times the rounding of float32 coordinates, and below the spacing of different
shells. It is counted from that one distance only, so a chain of close distances cannot draw in more and more atoms.
"""
ROUNDING = 1e-4
"""An edge exactly as long as the cutoff is kept on all sides, whatever its last digits are."""

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
) -> Tensor:
    """Choose the edges of the nearest neighbours; works for one system or a batch, on any device.

    Args:
        edge_index: (2, E) edges, in any order.
        distances: (E,) their lengths.
        num_atoms: N, larger than every index.
        cutoff: longest edge kept.
        max_neighbors: neighbours kept of each target, and with the last of them all that are as far away as it.
        tolerance: how much farther still counts as equally far.

    Returns:
        (E',) positions of the edges kept, ordered by target, then by distance.

    Raises:
        ValueError: cutoff or max_neighbors is not positive.
    """
    _check_limits(cutoff, max_neighbors)
    within = torch.nonzero(distances <= cutoff + ROUNDING).view(-1)
    # One sort by target + (distance scaled below 1) instead of two stable ones.
    sort_key = edge_index[1, within].double() + distances[within].double() / (2 * cutoff + 1)
    order = within[torch.argsort(sort_key)]
    target, distance = edge_index[1, order], distances[order]
    count = torch.bincount(target, minlength=num_atoms)
    if not (count > max_neighbors).any():
        return order
    last_kept = torch.cumsum(count, 0) - count + count.clamp(1, max_neighbors) - 1
    limit = distance[last_kept.clamp(max=len(order) - 1)] + tolerance  # atoms without edges: any value
    return order[distance <= limit[target]]


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
    points, box = pos.detach().cpu().double(), cell.detach().cpu().double().view(3, 3)
    periodic = pbc.cpu().bool().view(3)
    _check_geometry(points, box[periodic], cutoff)
    # One thread: this runs in loader workers. full_list: both i-j and j-i.
    finder = vesin.NeighborList(cutoff=cutoff + ROUNDING, full_list=True, n_threads=1)
    pairs, shifts, distances = finder.compute(points.numpy(), box.numpy(), periodic.numpy(), "PSd")
    edge_index = torch.from_numpy(pairs.T[::-1].astype("int64", order="C"))  # vesin puts the centre first
    kept = limit_neighbors(
        edge_index, torch.from_numpy(distances), num_atoms=len(pos), cutoff=cutoff, max_neighbors=max_neighbors
    )
    offsets = torch.from_numpy(shifts)[kept].to(pos)
    return edge_index[:, kept].to(pos.device).contiguous(), offsets


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


def _check_geometry(points: Tensor, lattice: Tensor, cutoff: float) -> None:
    """Refuse what the neighbour list cannot digest; `lattice` (0 to 3, 3) are the periodic lattice vectors."""
    if not bool((points.abs() <= _MAX_COORDINATE).all()):  # also false for NaN
        raise ValueError(f"positions are not finite or beyond {_MAX_COORDINATE:g} A")
    if len(lattice) == 0:
        return
    if not bool(torch.isfinite(lattice).all()) or torch.linalg.matrix_rank(lattice) < len(lattice):
        raise ValueError(f"periodic lattice vectors {lattice.tolist()} span no cell")
    heights = 1 / torch.linalg.pinv(lattice).norm(dim=0)
    images = float((2 * cutoff / heights + 1).prod())
    if images > _MAX_IMAGES:
        raise ValueError(f"cell {lattice.tolist()} is too small for cutoff {cutoff}: {images:.3g} images of each atom")
