"""EGNN: equivariant message passing that moves atoms (Satorras, Hoogeboom and Welling, ICML 2021).

    m_ij = phi_e(h_i, h_j, d_ij^2),     m_ij <- m_ij sigmoid(w m_ij)                     (eqs. 3 and 8)
    x_i <- x_i + mean_j (x_i - x_j) phi_x(m_ij)                                           (eq. 4)
    h_i <- h_i + phi_h(h_i, sum_j m_ij)                                                   (eqs. 5, 6)

E = sum_i MLP(h_i); forces are sums like eq. (4) of all blocks, weighted by functions of h_i. Moved atoms take their
periodic images along: r_ij <- r_ij + dx_j - dx_i.

Shapes: N atoms, E edges j -> i, C channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faenet_ocp.common.checks import flag, positive
from faenet_ocp.models.base import Backbone, NodeFeatures, Options, option
from faenet_ocp.models.functional import segment_sum
from faenet_ocp.models.peers.layers import ElementEmbedding, Readout, at_least, mlp

_SMALL = 1e-3
"""Moves begin small, as in the authors' code."""


@dataclass(frozen=True, kw_only=True)
class EGNNOptions(Options):
    """Options of `EGNN`; the defaults are the paper's for QM9, where atoms do not move.

    Attributes:
        hidden_channels: C, channels of embeddings and messages.
        num_interactions: number of blocks.
        attention: weigh messages, eq. (8).
        cutoff: Angstrom; of the graph.
    """

    hidden_channels: int = option(128, at_least(2))
    num_interactions: int = option(7, at_least(1))
    attention: bool = option(True, flag)
    cutoff: float = option(6.0, positive)


class EGNN(Backbone):
    """The network up to embeddings and vectors of atoms. Keyword arguments are those of `EGNNOptions`."""

    options_class = EGNNOptions
    options: EGNNOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        given = self.options
        self.embedding = ElementEmbedding(given.hidden_channels)
        blocks = range(given.num_interactions)
        self.blocks = nn.ModuleList(Block(given.hidden_channels, attention=given.attention) for _ in blocks)

    def forward(self, *, atomic_numbers: Tensor, edge_index: Tensor, edge_vec: Tensor, **_: Any) -> NodeFeatures:
        """Embed the atoms of a batch of systems; see `Backbone.forward`."""
        source, target = edge_index
        h = self.embedding(atomic_numbers)
        degree = segment_sum(edge_vec.new_ones(len(edge_vec), 1), target, len(h)).clamp(min=1)
        pulls = []
        for block in self.blocks:
            h, move, pull = block(h, edge_vec, edge_index, degree)
            edge_vec = edge_vec + move[source] - move[target]
            pulls.append(pull)
        return NodeFeatures(h, vectors=torch.stack(pulls, dim=2))

    def scalar_output(self) -> nn.Module:
        """Two layers of the embedding."""
        channels = self.options.hidden_channels
        return Readout(channels, channels, 1)

    def vector_output(self) -> nn.Module:
        """The vectors of all blocks, weighted."""
        return WeightedVectors(self.options.hidden_channels, self.options.num_interactions)


class Block(nn.Module):
    """An equivariant graph convolutional layer."""

    def __init__(self, channels: int, *, attention: bool) -> None:
        super().__init__()
        self.phi_e = mlp(2 * channels + 1, channels, channels, last=nn.SiLU)
        self.weight = nn.Linear(channels, 1) if attention else None
        self.phi_x = mlp(channels, channels, 2)  # of moves, and of forces
        with torch.no_grad():
            list(self.phi_x.parameters())[-2][0] *= _SMALL  # the last weight
        self.phi_h = mlp(2 * channels, channels, channels)

    def forward(self, h: Tensor, edge_vec: Tensor, edge_index: Tensor, degree: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, C), (E, 3), (2, E), (N, 1) -> new embeddings (N, C), moves (N, 3), further vectors (N, 3)."""
        source, target = edge_index
        square = edge_vec.square().sum(dim=1, keepdim=True)
        messages = self.phi_e(torch.cat([h[target], h[source], square], dim=1))
        if self.weight is not None:
            messages = messages * torch.sigmoid(self.weight(messages))
        vectors = -edge_vec[:, :, None] * self.phi_x(messages)[:, None]
        move, pull = (segment_sum(vectors, target, len(h)) / degree[:, None]).unbind(dim=2)
        received = segment_sum(messages, target, len(h))
        return h + self.phi_h(torch.cat([h, received.to(h)], dim=1)).to(h), move.to(edge_vec), pull.to(edge_vec)


class WeightedVectors(nn.Module):
    """F_i = sum over blocks of w(h_i) times the atom's vector."""

    def __init__(self, channels: int, num_interactions: int) -> None:
        super().__init__()
        self.weights = mlp(channels, channels, num_interactions)

    def forward(self, features: NodeFeatures) -> Tensor:
        """-> (N, 3)."""
        return (features.vectors * self.weights(features.node_embedding)[:, None]).sum(dim=2)
