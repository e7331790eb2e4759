"""SchNet: continuous-filter convolutions over distances (Schuett et al., NeurIPS 2017), on PyTorch Geometric's blocks.

    h_i <- h_i + W2 act(W1 sum_j h_j * filter(d_ij)),     E = sum_i MLP(h_i)

Invariant; forces are -dE/dX. Periodic images enter by the edges' lengths.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn.models.schnet import GaussianSmearing, InteractionBlock, ShiftedSoftplus

from faenet_ocp.common.checks import positive
from faenet_ocp.models.base import Backbone, NodeFeatures, Options, option
from faenet_ocp.models.peers.layers import ElementEmbedding, Readout, at_least


@dataclass(frozen=True, kw_only=True)
class SchNetOptions(Options):
    """Options of `SchNet`; the defaults are OCP's for IS2RE.

    Attributes:
        hidden_channels: C, channels of a node embedding.
        num_filters: channels of a filter.
        num_interactions: number of interaction blocks.
        num_gaussians: Gaussians of the distance expansion.
        cutoff: Angstrom.
    """

    hidden_channels: int = option(384, at_least(2))
    num_filters: int = option(128, at_least(1))
    num_interactions: int = option(4, at_least(1))
    num_gaussians: int = option(100, at_least(2))
    cutoff: float = option(6.0, positive)


class SchNet(Backbone):
    """The network up to the node embeddings. Keyword arguments are those of `SchNetOptions`."""

    options_class = SchNetOptions
    options: SchNetOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        given = self.options
        self.embedding = ElementEmbedding(given.hidden_channels)
        self.smearing = GaussianSmearing(0.0, given.cutoff, given.num_gaussians)
        sizes = (given.hidden_channels, given.num_gaussians, given.num_filters, given.cutoff)
        self.interactions = nn.ModuleList(InteractionBlock(*sizes) for _ in range(given.num_interactions))

    def forward(self, *, atomic_numbers: Tensor, edge_index: Tensor, edge_vec: Tensor, **_: Any) -> NodeFeatures:
        """Embed the atoms of a batch of systems; see `Backbone.forward`."""
        distance = torch.linalg.vector_norm(edge_vec, dim=1)
        gaussians = self.smearing(distance)
        h = self.embedding(atomic_numbers)
        for interaction in self.interactions:
            h = h + interaction(h, edge_index, distance, gaussians).to(h)
        return NodeFeatures(h)

    def scalar_output(self) -> nn.Module:
        """Two layers, as PyTorch Geometric's."""
        channels = self.options.hidden_channels
        return Readout(channels, channels // 2, 1, act=ShiftedSoftplus)
