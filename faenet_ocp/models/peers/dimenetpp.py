"""DimeNet++: messages between edges, with angles (Gasteiger et al., arXiv:2011.14115), on PyTorch Geometric's blocks.

    m_ji <- f(m_ji, sum_k g(m_kj, d_kj, angle kji)),     E = sum_i MLP(sum_j gate(d_ji) * m_ji), over all blocks

Invariant; forces are -dE/dX. Periodic images enter by the edge vectors: a triplet k -> j -> i is two edges, and is none
only if it goes back along its own edge to the same image.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch_geometric.nn.inits import glorot_orthogonal
from torch_geometric.nn.models.dimenet import BesselBasisLayer, EmbeddingBlock, InteractionPPBlock

from faenet_ocp.common.checks import positive
from faenet_ocp.models.base import Backbone, NodeFeatures, Options, option
from faenet_ocp.models.functional import segment_sum
from faenet_ocp.models.peers.directions import spherical_basis
from faenet_ocp.models.peers.layers import ElementEmbedding, at_least

_SAME_IMAGE = 1e-3
"""Angstrom; vectors to different images of an atom differ by more."""


@dataclass(frozen=True, kw_only=True)
class DimeNetPlusPlusOptions(Options):
    """Options of `DimeNetPlusPlus`; the defaults are OCP's for IS2RE.

    Attributes:
        hidden_channels: channels of the messages of edges.
        num_blocks: number of interaction blocks.
        int_emb_size, basis_emb_size: channels that triplets, and their basis functions, are projected to.
        out_emb_channels: channels of the output blocks.
        num_spherical, num_radial: basis functions of angles, and of distances.
        num_before_skip, num_after_skip: residual layers of an interaction block.
        num_output_layers: layers of the output blocks.
        cutoff: Angstrom.
    """

    hidden_channels: int = option(256, at_least(2))
    num_blocks: int = option(3, at_least(1))
    int_emb_size: int = option(64, at_least(1))
    basis_emb_size: int = option(8, at_least(1))
    out_emb_channels: int = option(192, at_least(1))
    num_spherical: int = option(7, at_least(2))
    num_radial: int = option(6, at_least(1))
    num_before_skip: int = option(1, at_least(0))
    num_after_skip: int = option(2, at_least(0))
    num_output_layers: int = option(3, at_least(0))
    cutoff: float = option(6.0, positive)


class DimeNetPlusPlus(Backbone):
    """The network up to sums of messages at atoms. Keyword arguments are those of `DimeNetPlusPlusOptions`."""

    options_class = DimeNetPlusPlusOptions
    options: DimeNetPlusPlusOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        given = self.options
        self.rbf = BesselBasisLayer(given.num_radial, given.cutoff)
        self.sbf = spherical_basis(given.num_spherical, given.num_radial, given.cutoff)
        self.embedding = EmbeddingBlock(given.num_radial, given.hidden_channels, silu)
        self.embedding.emb = ElementEmbedding(given.hidden_channels)
        sizes = [given.hidden_channels, given.int_emb_size, given.basis_emb_size, given.num_spherical]
        sizes += [given.num_radial, given.num_before_skip, given.num_after_skip]
        self.interactions = nn.ModuleList(InteractionPPBlock(*sizes, silu) for _ in range(given.num_blocks))
        gates = [nn.Linear(given.num_radial, given.hidden_channels, bias=False) for _ in range(given.num_blocks + 1)]
        self.gates = nn.ModuleList(gates)
        for gate in gates:
            glorot_orthogonal(gate.weight, scale=2.0)

    def forward(self, *, atomic_numbers: Tensor, edge_index: Tensor, edge_vec: Tensor, **_: Any) -> NodeFeatures:
        """Sums of messages at the atoms of a batch of systems; see `Backbone.forward`."""
        source, target = edge_index
        distance = torch.linalg.vector_norm(edge_vec, dim=1)
        kj, ji = triplets(edge_index, edge_vec, len(atomic_numbers))
        rbf, sbf = self.rbf(distance), self.triplet_basis(distance, edge_vec, kj, ji)
        messages = [self.embedding(atomic_numbers, rbf, target, source)]
        for interaction in self.interactions:
            messages.append(interaction(messages[-1], rbf, sbf, kj, ji))
        gated = [gate(rbf) * message for gate, message in zip(self.gates, messages, strict=True)]
        states = tuple(segment_sum(part, target, len(atomic_numbers)).to(edge_vec) for part in gated)
        return NodeFeatures(states[-1], states)

    def triplet_basis(self, distance: Tensor, edge_vec: Tensor, kj: Tensor, ji: Tensor) -> Tensor:
        """Functions of the distance k-j and the angle of every triplet, (T, num_spherical * num_radial)."""
        return self.sbf(distance, _angles(edge_vec[kj], edge_vec[ji]), kj)

    def scalar_output(self) -> nn.Module:
        """The sum over blocks of an MLP of each block's messages."""
        return SummedReadout(self.options)


class SummedReadout(nn.Module):
    """A number for every atom from the sums of messages of all blocks."""

    def __init__(self, options: DimeNetPlusPlusOptions) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_output_mlp(options) for _ in range(options.num_blocks + 1))

    def forward(self, features: NodeFeatures) -> Tensor:
        """-> (N, 1)."""
        return sum(block(h) for block, h in zip(self.blocks, features.hidden_states, strict=True))


def _output_mlp(options: DimeNetPlusPlusOptions) -> nn.Sequential:
    channels = options.out_emb_channels
    layers: list[nn.Module] = [nn.Linear(options.hidden_channels, channels, bias=False)]
    for _ in range(options.num_output_layers):
        layers += [nn.Linear(channels, channels), nn.SiLU()]
    layers.append(nn.Linear(channels, 1, bias=False))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            glorot_orthogonal(layer.weight, scale=2.0)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def triplets(edge_index: Tensor, edge_vec: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """All pairs of edges k -> j and j -> i that do not go back to where they came from.

    Args:
        edge_index: (2, E), j and i of every edge, in any order.
        edge_vec: (E, 3), as for `Backbone.forward`.
        num_atoms: N.

    Returns:
        numbers of the edges k -> j, and of the edges j -> i, (T,) each; in the order of the latter.
    """
    source, target = edge_index
    order = torch.argsort(target, stable=True)
    received = torch.bincount(target, minlength=num_atoms)
    first = received.cumsum(0) - received
    count = received[source]
    ji = torch.arange(len(source), device=source.device).repeat_interleave(count)
    within = torch.arange(len(ji), device=source.device) - (count.cumsum(0) - count).repeat_interleave(count)
    kj = order[first[source[ji]] + within]
    is_back = (source[kj] == target[ji]) & ((edge_vec[kj] + edge_vec[ji]).abs().amax(dim=1) < _SAME_IMAGE)
    return kj[~is_back], ji[~is_back]


def _angles(to_k: Tensor, to_j: Tensor) -> Tensor:
    """Angles between the directions k -> j and j -> i, (T,), from their vectors (T, 3)."""
    return torch.atan2(torch.linalg.vector_norm(torch.linalg.cross(to_j, to_k), dim=1), (to_j * to_k).sum(dim=1))
