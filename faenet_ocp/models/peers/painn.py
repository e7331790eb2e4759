"""PaiNN: equivariant message passing with scalars and vectors of atoms (Schuett, Unke and Gastegger, ICML 2021).

    message (eqs. 7, 8)   s_i += sum_j phi_s(s_j) * W_s(d_ij)
                          v_i += sum_j v_j * phi_v(s_j) * W_v(d_ij) + r_ij / d_ij * phi_r(s_j) * W_r(d_ij)
    update (eqs. 9, 10)   v_i += a_vv * U v_i,      s_i += a_ss + a_sv * <U v_i, V v_i>

with a = MLP([s_i, |V v_i|]). E = sum_i MLP(s_i); forces by two gated blocks, or -dE/dX.

Shapes: N atoms, E edges j -> i, C channels; scalars (N, C), vectors (N, 3, C).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faenet_ocp.common.checks import positive
from faenet_ocp.models.base import Backbone, NodeFeatures, Options, option
from faenet_ocp.models.functional import segment_sum
from faenet_ocp.models.peers.layers import ElementEmbedding, Readout, SineBasis, at_least, cosine_cutoff, mlp

_EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class PaiNNOptions(Options):
    """Options of `PaiNN`; the defaults are the paper's, with OC20's cutoff.

    Attributes:
        hidden_channels: C, channels of scalars and of vectors.
        num_interactions: number of blocks.
        num_radial: radial basis functions.
        cutoff: Angstrom.
    """

    hidden_channels: int = option(128, at_least(2))
    num_interactions: int = option(3, at_least(1))
    num_radial: int = option(20, at_least(1))
    cutoff: float = option(6.0, positive)


class PaiNN(Backbone):
    """The network up to scalars and vectors of atoms. Keyword arguments are those of `PaiNNOptions`."""

    options_class = PaiNNOptions
    options: PaiNNOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        given = self.options
        channels = given.hidden_channels
        self.embedding = ElementEmbedding(channels)
        self.basis = SineBasis(cutoff=given.cutoff, num_radial=given.num_radial)
        blocks = range(given.num_interactions)
        self.filters = nn.ModuleList(nn.Linear(given.num_radial, 3 * channels) for _ in blocks)
        self.messages = nn.ModuleList(Message(channels) for _ in blocks)
        self.updates = nn.ModuleList(Update(channels) for _ in blocks)

    def forward(self, *, atomic_numbers: Tensor, edge_index: Tensor, edge_vec: Tensor, **_: Any) -> NodeFeatures:
        """Embed the atoms of a batch of systems; see `Backbone.forward`."""
        distance = torch.linalg.vector_norm(edge_vec, dim=1)
        direction = edge_vec / distance[:, None]
        basis, weight = self.basis(distance), cosine_cutoff(distance, self.options.cutoff)[:, None]
        s = self.embedding(atomic_numbers)
        v = s.new_zeros(len(s), 3, s.shape[1])
        for filters, message, update in zip(self.filters, self.messages, self.updates, strict=True):
            s, v = message(s, v, filters(basis) * weight, direction, edge_index)
            s, v = update(s, v)
        return NodeFeatures(s, vectors=v)

    def scalar_output(self) -> nn.Module:
        """Two layers of the scalars."""
        channels = self.options.hidden_channels
        return Readout(channels, channels // 2, 1)

    def vector_output(self) -> nn.Module:
        """Two gated equivariant blocks."""
        return GatedReadout(self.options.hidden_channels)


class Message(nn.Module):
    """Equations 7 and 8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.phi = mlp(channels, channels, 3 * channels)

    def forward(
        self, s: Tensor, v: Tensor, filters: Tensor, direction: Tensor, edge_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(N, C), (N, 3, C), (E, 3 C), (E, 3), (2, E) -> (N, C), (N, 3, C)."""
        source, target = edge_index
        to_scalar, to_direction, to_vector = (self.phi(s)[source] * filters).chunk(3, dim=1)
        vectors = direction[:, :, None] * to_direction[:, None] + v[source] * to_vector[:, None]
        return s + segment_sum(to_scalar, target, len(s)).to(s), v + segment_sum(vectors, target, len(s)).to(v)


class Update(nn.Module):
    """Equations 9 and 10."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, 2 * channels, bias=False)
        self.a = mlp(2 * channels, channels, 3 * channels)

    def forward(self, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C), (N, 3, C) -> the same."""
        vv, uv = self.mix(v).chunk(2, dim=2)
        a_ss, a_vv, a_sv = self.a(torch.cat([s, _length(vv)], dim=1)).chunk(3, dim=1)
        return s + a_ss + a_sv * (uv * vv).sum(dim=1), v + uv * a_vv[:, None]


class GatedReadout(nn.Module):
    """A vector of every atom by two gated equivariant blocks (figure 3 of the paper)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = GatedBlock(channels, channels // 2)
        self.second = GatedBlock(channels // 2, 1)

    def forward(self, features: NodeFeatures) -> Tensor:
        """-> (N, 3)."""
        s, v = self.first(features.node_embedding, features.vectors)
        return self.second(nn.functional.silu(s), v)[1].squeeze(2)


class GatedBlock(nn.Module):
    """Scalars and vectors to others, the vectors multiplied by functions of scalars."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, 2 * out_channels, bias=False)
        self.gate = mlp(channels + out_channels, channels, 2 * out_channels)

    def forward(self, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C), (N, 3, C) -> (N, D), (N, 3, D)."""
        vv, wv = self.mix(v).chunk(2, dim=2)
        s, gate = self.gate(torch.cat([s, _length(vv)], dim=1)).chunk(2, dim=1)
        return s, wv * gate[:, None]


def _length(v: Tensor) -> Tensor:
    """Of vectors (N, 3, C), with a derivative where they are zero."""
    return (v.square().sum(dim=1) + _EPSILON).sqrt()
