"""ForceNet: unconstrained message passing over edge vectors (Hu et al. 2021, arXiv:2103.01436), in OCP's form.

    e_ij = B(r_ij / d_ij, q_ij),    q_ij = (d_ij, d_ij - R_j, d_ij - R_i, d_ij - R_i - R_j) / cutoff
    W_ij = cos(pi d_ij / (2 cutoff)) MLP([L e_ij | h_j | h_i])
    h_i <- h_i + MLP(sum_j W_ij * A h_j + c * A h_i)

with a basis B (`EdgeBasis`), atomic radii R, linear layers L and A, and a learnt vector c. With a_i = act(O h_i) after
the last block the energy is the sum of w a_i, forces are MLP(a_i). No symmetry is built in: it is learnt from rotated
data, or imposed by frames. Periodic images enter by the edge vectors.

Of OCP's model left out: atoms described by properties of their elements (here they have a learnt vector each), the
bases that its configurations do not choose, and the ablations.

Shapes: N atoms, E edges j -> i, C hidden_channels, D decoder_hidden_channels. Distances and radii in Angstrom.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from faenet_ocp.common.checks import choice, positive
from faenet_ocp.common.elements import PROPERTIES, element_table
from faenet_ocp.models.base import Backbone, NodeFeatures, Options, option
from faenet_ocp.models.functional import segment_sum
from faenet_ocp.models.norms import RankBatchNorm
from faenet_ocp.models.peers.directions import spherical_harmonics
from faenet_ocp.models.peers.layers import ElementEmbedding, Readout, at_least, mlp

BASES = ("sphallmul", "powersine")
NUM_DISTANCES = 4
_SHORTEST = 1e-3
"""Of q_ij: atoms that are nearer than their radii are at this distance."""
_RATIO = 1.1
"""Of each frequency of the sines to the one before; the first is 1."""


@dataclass(frozen=True, kw_only=True)
class ForceNetOptions(Options):
    """Options of `ForceNet`; names and defaults are OCP's.

    Attributes:
        hidden_channels: C, channels of embeddings and messages.
        decoder_hidden_channels: D, channels that energies and forces are read from.
        num_interactions: number of blocks.
        basis: sphallmul, spherical harmonics of the direction times functions of the distances; or powersine, sines
            of the three components and of the distances.
        max_n: of sphallmul: number of degrees, from 0 on (3 are the degrees 0, 1 and 2, nine functions).
        num_freqs: sines of each number.
        depth_mlp_edge, depth_mlp_node: hidden layers of the MLPs of a filter, and of an update.
        cutoff: Angstrom.
    """

    hidden_channels: int = option(512, at_least(1))
    decoder_hidden_channels: int = option(512, at_least(1))
    num_interactions: int = option(5, at_least(1))
    basis: str = option("sphallmul", partial(choice, allowed=BASES))
    max_n: int = option(3, at_least(1))
    num_freqs: int = option(50, at_least(1))
    depth_mlp_edge: int = option(2, at_least(1))
    depth_mlp_node: int = option(1, at_least(1))
    cutoff: float = option(6.0, positive)


class ForceNet(Backbone):
    """The network up to the channels that its outputs are read from. Arguments are those of `ForceNetOptions`."""

    options_class = ForceNetOptions
    options: ForceNetOptions
    radii: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        given = self.options
        self.register_buffer("radii", atomic_radii(), persistent=False)
        self.embedding = ElementEmbedding(given.hidden_channels)
        self.basis = EdgeBasis(given)
        self.blocks = nn.ModuleList(Block(given, self.basis.num_functions) for _ in range(given.num_interactions))
        self.output = nn.Linear(given.hidden_channels, given.decoder_hidden_channels)
        _xavier(self.blocks)

    def forward(self, *, atomic_numbers: Tensor, edge_index: Tensor, edge_vec: Tensor, **_: Any) -> NodeFeatures:
        """Embed the atoms of a batch of systems; see `Backbone.forward`."""
        h = self.embedding(atomic_numbers)
        distance = torch.linalg.vector_norm(edge_vec, dim=1)
        cutoff, (r_j, r_i) = self.options.cutoff, self.radii[atomic_numbers.long()][edge_index]
        distances = torch.stack([distance, distance - r_j, distance - r_i, distance - r_j - r_i], dim=1) / cutoff
        basis = self.basis(edge_vec / distance[:, None], distances.clamp(min=_SHORTEST))
        weight = (torch.cos(distance * (math.pi / (2 * cutoff))) * (distance < cutoff))[:, None]
        for block in self.blocks:
            h = h + block(h, basis, weight, edge_index).to(h)
        return NodeFeatures(nn.functional.silu(self.output(h)).to(h))

    def scalar_output(self) -> nn.Module:
        """A linear layer."""
        return Readout(self.options.decoder_hidden_channels, 1)

    def vector_output(self) -> nn.Module:
        """Two layers."""
        return ForceDecoder(self.options.decoder_hidden_channels)


def atomic_radii() -> Tensor:
    """Radii of all elements, (119,); where the table has no atomic radius, the covalent one (Pyykko, single bond)."""
    properties = element_table().properties / 100  # pm
    atomic, covalent = (properties[:, PROPERTIES.index(name)] for name in ("atomic_radius", "covalent_radius_pyykko"))
    return torch.where(atomic.isnan(), covalent, atomic).nan_to_num(nan=0.0).to(torch.get_default_dtype())


class EdgeBasis(nn.Module):
    """Functions of a direction n and the distances q.

        powersine   sin(1.1^k x) for x in (n | q)
        sphallmul   Y_lm(n) times the components of M [sin(1.1^k q)], a linear layer

    for k < num_freqs and l < max_n.
    """

    frequencies: Tensor

    def __init__(self, options: ForceNetOptions) -> None:
        super().__init__()
        spherical = options.basis == "sphallmul"
        self.num_degrees = options.max_n if spherical else 0
        self.register_buffer("frequencies", _RATIO ** torch.arange(options.num_freqs), persistent=False)
        self.mix = nn.Linear(NUM_DISTANCES * options.num_freqs, NUM_DISTANCES) if spherical else None
        self.num_functions = options.max_n**2 * NUM_DISTANCES if spherical else (3 + NUM_DISTANCES) * options.num_freqs

    def forward(self, direction: Tensor, distances: Tensor) -> Tensor:
        """(E, 3), (E, 4) -> (E, num_functions)."""
        if self.mix is None:
            return self._sines(torch.cat([direction, distances], dim=1))
        radial = self.mix(self._sines(distances))
        return (spherical_harmonics(direction, self.num_degrees)[:, :, None] * radial[:, None]).flatten(1)

    def _sines(self, x: Tensor) -> Tensor:
        return torch.sin(x[:, :, None] * self.frequencies).flatten(1)


class Block(nn.Module):
    """Messages with filters that depend on the edge and on both atoms, and what becomes of their sum."""

    def __init__(self, options: ForceNetOptions, num_functions: int) -> None:
        super().__init__()
        channels = options.hidden_channels
        self.basis = nn.Linear(num_functions, channels)
        self.filter = mlp(3 * channels, *[channels] * (options.depth_mlp_edge + 1))
        self.source = nn.Linear(channels, channels)
        self.self_weight = nn.Parameter(torch.empty(1, channels))
        layers: list[nn.Module] = []
        for _ in range(options.depth_mlp_node):  # the norm takes off what a bias adds
            layers += [nn.Linear(channels, channels, bias=False), RankBatchNorm(channels), nn.SiLU()]
        self.update = nn.Sequential(*layers, nn.Linear(channels, channels))

    def forward(self, h: Tensor, basis: Tensor, weight: Tensor, edge_index: Tensor) -> Tensor:
        """(N, C), (E, functions), (E, 1), (2, E) -> (N, C)."""
        source, target = edge_index
        filters = self.filter(torch.cat([self.basis(basis).to(h), h[source], h[target]], dim=1)) * weight
        own = self.source(h).to(h)
        return self.update(segment_sum(own[source] * filters, target, len(h)).to(h) + self.self_weight * own)


class ForceDecoder(nn.Module):
    """A vector of every atom from its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = nn.Linear(channels, channels, bias=False)
        self.layers = nn.Sequential(hidden, RankBatchNorm(channels), nn.SiLU(), nn.Linear(channels, 3))
        _xavier(self.layers)

    def forward(self, features: NodeFeatures) -> Tensor:
        """-> (N, 3), in the frame."""
        return self.layers(features.node_embedding)


def _xavier(module: nn.Module) -> None:
    """The authors' initial weights: uniform after Glorot and Bengio (2010), biases zero."""
    for part in module.modules():
        if isinstance(part, Block):
            nn.init.xavier_uniform_(part.self_weight)
        elif isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
