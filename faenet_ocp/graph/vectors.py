"""Vectors and lengths of edges; the only part of this package that models need, torch alone.

Conventions: edge_index[0] is the source (neighbour) j, edge_index[1] the target (centre) i, and the vector of an edge
is pos[j] - pos[i] + cell_offsets @ cell. Shapes: N atoms, E edges, B systems. Lengths in Angstrom.
"""

from torch import Tensor


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
    if len(cell) > 1 and edge_batch is None:
        raise ValueError(f"edge_batch is needed for {len(cell)} systems")
    lattice = cell[0] if len(cell) == 1 else cell[edge_batch]
    # Elementwise on purpose: under autocast or with TF32 a product of matrices has three digits.
    shift = (cell_offsets.unsqueeze(-1) * lattice).sum(dim=-2)
    return pos[source] - pos[target] + shift


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
