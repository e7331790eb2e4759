"""ComENet: complete geometry within one hop (Wang et al., NeurIPS 2022, arXiv:2206.08515).

Every atom i has a frame: e3 points to its nearest neighbour f_i, its second one s_i lies at phi = 0. An edge has

    d_ij, theta_ij, phi_ij     spherical coordinates of j in the frame of i: complete around an atom
    tau_ij                     dihedral angle f_i, i, j, f_j: how the frame of j is turned around the edge

    torsion embedding  j_l(z_ln d / c) Y_l^m(theta, phi),     angle embedding  j_l(z_ln d / c) Y_l^0(tau)

A block has a branch for either: x_i <- W (sum_j W_e e_ij * x_j) + W' x_i. E = sum_i MLP(x_i); forces are -dE/dX.

Invariant under rotations, not under reflections: phi changes its sign. Y_l^0 is even, so the sign of tau is lost, as in
the paper; the authors' code also folds negative phi and tau by pi, which makes steps at 0, and is left out here.

Discontinuous where the order of two neighbours by distance changes, and where f_i, i, s_i get straight: references jump
from atom to atom. Neighbours whose distances differ by less than 0.001 Angstrom are ordered by which way most of the
environment lies, so that rounding and the order of edges decide between atoms only if these also agree.

Shapes: N atoms, E edges j -> i, C channels, L degrees, R radial functions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu
from torch_geometric.nn import GraphNorm

from faenet_ocp.common.checks import positive
from faenet_ocp.models.base import Backbone, NodeFeatures, Options, option
from faenet_ocp.models.functional import segment_sum
from faenet_ocp.models.peers import directions as geometry
from faenet_ocp.models.peers.layers import ElementEmbedding, Readout, at_least

_EQUALLY_FAR = 1e-3
"""Angstrom; such neighbours are ordered by more than their distance."""


@dataclass(frozen=True, kw_only=True)
class ComENetOptions(Options):
    """Options of `ComENet`; the defaults are the authors' for OC20.

    Attributes:
        hidden_channels: C, channels of embeddings.
        middle_channels: channels between the two layers that edges' embeddings pass.
        num_blocks: number of interaction blocks.
        num_radial, num_spherical: R and L, basis functions of distances and of angles.
        num_output_layers: layers with a skip connection in every block, and layers before the output.
        cutoff: Angstrom.
    """

    hidden_channels: int = option(256, at_least(2))
    middle_channels: int = option(256, at_least(1))
    num_blocks: int = option(4, at_least(1))
    num_radial: int = option(3, at_least(1))
    num_spherical: int = option(2, at_least(2))
    num_output_layers: int = option(3, at_least(1))
    cutoff: float = option(6.0, positive)


class ComENet(Backbone):
    """The network up to the node embeddings. Keyword arguments are those of `ComENetOptions`."""

    options_class = ComENetOptions
    options: ComENetOptions
    degree: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        given = self.options
        self.embedding = ElementEmbedding(given.hidden_channels)
        self.basis = geometry.spherical_basis(given.num_spherical, given.num_radial, given.cutoff)
        self.register_buffer("degree", torch.tensor(geometry.degrees(given.num_spherical)), persistent=False)
        self.blocks = nn.ModuleList(Block(given) for _ in range(given.num_blocks))

    def forward(
        self,
        *,
        atomic_numbers: Tensor,
        edge_index: Tensor,
        edge_vec: Tensor,
        batch: Tensor,
        num_systems: int,
        tags: Tensor | None = None,
    ) -> NodeFeatures:
        """Embed the atoms of a batch of systems; see `Backbone.forward`."""
        features = self.edge_features(atomic_numbers, edge_index, edge_vec)
        h = silu(self.embedding(atomic_numbers))
        for block in self.blocks:
            h = block(h, features, edge_index, batch, num_systems)
        return NodeFeatures(h)

    def edge_features(self, atomic_numbers: Tensor, edge_index: Tensor, edge_vec: Tensor) -> tuple[Tensor, Tensor]:
        """Torsion and angle embedding of every edge, (E, L^2 R) and (E, L R)."""
        size = self.options.num_spherical
        local, cos_tau = edge_geometry(atomic_numbers, edge_index, edge_vec)
        radial = geometry.bessel_functions(self.basis, torch.linalg.vector_norm(edge_vec, dim=1))
        torsion = radial.index_select(1, self.degree) * geometry.spherical_harmonics(local, size)[:, :, None]
        angle = radial * geometry.zonal_harmonics(cos_tau, size)[:, :, None]
        return torsion.flatten(1), angle.flatten(1)

    def scalar_output(self) -> nn.Module:
        """Layers of the embedding, and one more."""
        given = self.options
        return Readout(*[given.hidden_channels] * (given.num_output_layers + 1), 1)


class Block(nn.Module):
    """An interaction block: two convolutions, one with either embedding of edges."""

    def __init__(self, options: ComENetOptions) -> None:
        super().__init__()
        channels, functions = options.hidden_channels, options.num_spherical * options.num_radial
        self.first = nn.Linear(channels, channels)
        sizes = (functions * options.num_spherical, functions)
        self.branches = nn.ModuleList(Branch(channels, options.middle_channels, size) for size in sizes)
        self.join = nn.Linear(2 * channels, channels)
        self.layers = nn.ModuleList(nn.Linear(channels, channels) for _ in range(options.num_output_layers))
        self.norm = GraphNorm(channels)
        self.last = nn.Linear(channels, channels)

    def forward(
        self, h: Tensor, features: tuple[Tensor, Tensor], edge_index: Tensor, batch: Tensor, num_systems: int
    ) -> Tensor:
        """(N, C), embeddings of edges, (2, E), (N,), B -> (N, C)."""
        x = silu(self.first(h))
        parts = [branch(x, part, edge_index) for branch, part in zip(self.branches, features, strict=True)]
        x = self.join(torch.cat(parts, dim=1)) + x
        for layer in self.layers:
            x = x + silu(layer(x))
        return self.last(self.norm(x.to(h), batch, num_systems)).to(h)


class Branch(nn.Module):
    """A convolution whose weights are linear in an embedding of edges."""

    def __init__(self, channels: int, middle: int, functions: int) -> None:
        super().__init__()
        self.weights = nn.Sequential(nn.Linear(functions, middle, bias=False), nn.Linear(middle, channels, bias=False))
        self.received, self.own = nn.Linear(channels, channels), nn.Linear(channels, channels, bias=False)
        self.last = nn.Linear(channels, channels)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor, features: Tensor, edge_index: Tensor) -> Tensor:
        """(N, C), (E, functions), (2, E) -> (N, C)."""
        source, target = edge_index
        sums = segment_sum(x[source] * self.weights(features), target, len(x))
        return silu(self.last(self.received(sums) + self.own(x)))


def edge_geometry(atomic_numbers: Tensor, edge_index: Tensor, edge_vec: Tensor) -> tuple[Tensor, Tensor]:
    """The angles of every edge, as components and as a cosine.

    An atom with one neighbour, or all on a line, has no s_i: phi is averaged over. An axis ij on whose line f_i lies,
    as where j is f_i, takes s_i for it; with none to take, tau is a right angle.

    Returns:
        sin theta cos phi, sin theta sin phi, cos theta, (E, 3); cos tau, (E,).
    """
    source, target = edge_index
    direction = geometry.unit(edge_vec)
    nearest, second = (
        pad(direction, (0, 0, 0, 1))[edge]  # zeros where there is none
        for edge in reference_edges(atomic_numbers, edge_index, edge_vec)
    )
    local = geometry.components(direction, nearest[target], second[target])
    sides = []
    for atom in (target, source):
        side = geometry.across(nearest[atom], direction)
        other = geometry.across(second[atom], direction)
        sides.append(side.where(side.any(dim=1, keepdim=True), other))
    return local, (sides[0] * sides[1]).sum(dim=1)


@torch.no_grad()
def reference_edges(atomic_numbers: Tensor, edge_index: Tensor, edge_vec: Tensor) -> tuple[Tensor, Tensor]:
    """The edges from f_i and s_i to every atom i: its nearest neighbour, and the nearest that is not on a line with it.

    Returns:
        numbers of edges, (N,) each; E where an atom has none.
    """
    source, target = edge_index
    size = len(atomic_numbers)
    distance = torch.linalg.vector_norm(edge_vec, dim=1)
    direction = geometry.unit(edge_vec)
    weight = (atomic_numbers[source] / distance.square())[:, None]
    center = segment_sum(direction * weight, target, size) / segment_sum(weight, target, size).clamp(min=1e-12)
    score = distance - _EQUALLY_FAR * (direction * center[target]).sum(dim=1)
    nearest = _lowest(score, target, size)
    to_nearest = pad(direction, (0, 0, 0, 1))[nearest]
    is_straight = ~geometry.across(direction, to_nearest[target]).any(dim=1)
    return nearest, _lowest(score.masked_fill(is_straight, torch.inf), target, size)


def _lowest(score: Tensor, target: Tensor, size: int) -> Tensor:
    """The edge with the lowest finite score at every atom, the first of equal ones; E where there is none: (N,)."""
    edges = torch.arange(len(score), device=score.device)
    best = score.new_full((size,), torch.inf).scatter_reduce(0, target, score, "amin")
    is_best = (score == best[target]) & score.isfinite()
    return edges.new_full((size,), len(score)).scatter_reduce(0, target, edges.where(is_best, len(score)), "amin")
