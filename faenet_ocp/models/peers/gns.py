"""GNS: the Graph Network Simulator (Sanchez-Gonzalez et al., ICML 2020) as Godwin et al. (ICLR 2022, arXiv:2106.07971)
adapt it to atoms: encode, process, decode.

    encode    h_i = LN(MLP([Emb(Z_i) | Emb(tag_i)])),    e_ij = LN(MLP([sin(n pi d_ij / cutoff) / d_ij | r_ij / d_ij]))
    process   u_ij = LN(MLP([e_ij | h_j | h_i])),        v_i = LN(MLP([h_i | sum_j u_ij]))
              e_ij <- e_ij + u_ij,                       h_i <- h_i + v_i
    decode    E = sum_i MLP(h_i) + MLP(h_i before processing),    forces = MLP(h_i)

The second part of the energy depends on what atoms there are: a reference that is learnt. No symmetry is built in: it
is learnt from rotated data, or imposed by frames. Periodic images enter by the edge vectors.

Of the paper left out, being no part of a network: Noisy Nodes, which moves the atoms of the training data and has the
network predict where they belong, and losses on what intermediate blocks say. The paper has edge vectors in
coordinates of the cell, and the cell's lengths and angles as features; here they are in the frame, as they are.

Shapes: N atoms, E edges j -> i, C hidden_channels. Distances in Angstrom.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn.models.schnet import ShiftedSoftplus

from faenet_ocp.common.checks import positive
from faenet_ocp.models.base import NUM_TAGS, Backbone, NodeFeatures, Options, option
from faenet_ocp.models.functional import segment_sum
from faenet_ocp.models.peers.layers import ElementEmbedding, Readout, SineBasis, at_least, mlp


@dataclass(frozen=True, kw_only=True)
class GNSOptions(Options):
    """Options of `GNS`; the defaults are the paper's for OC20 (Table 13), which has no cutoff.

    Attributes:
        hidden_channels: C, channels of the vectors of atoms and edges, and of all MLPs.
        num_mlp_layers: linear layers of an MLP.
        num_interactions: number of blocks.
        group_size: blocks with weights of their own; the others repeat them in turn, so that with 10 the blocks 1, 11
            and 21 are the same. Not below `num_interactions`: every block has its own.
        num_radial: radial basis functions.
        tag_hidden_channels: channels of the tag embedding (the paper has two flags, whether an atom is of the
            adsorbate, and whether it is fixed); 0 for data without tags.
        cutoff: Angstrom.
    """

    hidden_channels: int = option(512, at_least(1))
    num_mlp_layers: int = option(3, at_least(1))
    num_interactions: int = option(50, at_least(1))
    group_size: int = option(10, at_least(1))
    num_radial: int = option(512, at_least(1))
    tag_hidden_channels: int = option(0, at_least(0))
    cutoff: float = option(6.0, positive)


class GNS(Backbone):
    """The network up to the vectors of atoms. Keyword arguments are those of `GNSOptions`."""

    options_class = GNSOptions
    options: GNSOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        given = self.options
        channels, tag = given.hidden_channels, given.tag_hidden_channels
        self.needs = ("edges", "tags") if tag else ("edges",)
        self.embedding = ElementEmbedding(channels)
        self.tag = nn.Embedding(NUM_TAGS, tag) if tag else None
        self.basis = SineBasis(cutoff=given.cutoff, num_radial=given.num_radial)
        self.encode_node = _norm_mlp(channels + tag, given)
        self.encode_edge = _norm_mlp(given.num_radial + 3, given)
        self.blocks = nn.ModuleList(Block(given) for _ in range(min(given.group_size, given.num_interactions)))

    def forward(
        self,
        *,
        atomic_numbers: Tensor,
        edge_index: Tensor,
        edge_vec: Tensor,
        tags: Tensor | None = None,
        **_: Any,
    ) -> NodeFeatures:
        """Embed the atoms of a batch of systems; see `Backbone.forward`."""
        atoms = self.embedding(atomic_numbers)
        if self.tag is not None:
            if tags is None:
                raise ValueError("tags: missing; tag_hidden_channels: 0 does without")
            atoms = torch.cat([atoms, self.tag(tags.long())], dim=1)
        distance = torch.linalg.vector_norm(edge_vec, dim=1)
        edges = torch.cat([self.basis(distance), edge_vec / distance[:, None]], dim=1)
        h, e = self.encode_node(atoms).to(edge_vec), self.encode_edge(edges).to(edge_vec)
        states = [h]
        for number in range(self.options.num_interactions):
            h, e = self.blocks[number % len(self.blocks)](h, e, edge_index)
            states.append(h)
        return NodeFeatures(h, tuple(states))

    def scalar_output(self) -> nn.Module:
        """The sum of an MLP of the last state, and of one of the first."""
        return EndsReadout(self.options)

    def vector_output(self) -> nn.Module:
        """An MLP of the last state."""
        given = self.options
        return Readout(*[given.hidden_channels] * given.num_mlp_layers, 3, act=ShiftedSoftplus)


class Block(nn.Module):
    """A step of processing: edges, then atoms."""

    def __init__(self, options: GNSOptions) -> None:
        super().__init__()
        channels = options.hidden_channels
        self.edge = _norm_mlp(3 * channels, options)
        self.node = _norm_mlp(2 * channels, options)

    def forward(self, h: Tensor, e: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C), (E, C), (2, E) -> (N, C), (E, C)."""
        source, target = edge_index
        change = self.edge(torch.cat([e, h[source], h[target]], dim=1)).to(e)
        received = segment_sum(change, target, len(h))
        return h + self.node(torch.cat([h, received], dim=1)).to(h), e + change


class EndsReadout(nn.Module):
    """A number for every atom from its vectors after and before processing."""

    def __init__(self, options: GNSOptions) -> None:
        super().__init__()
        sizes = [options.hidden_channels] * options.num_mlp_layers
        self.last = mlp(*sizes, 1, act=ShiftedSoftplus)
        self.first = mlp(*sizes, 1, act=ShiftedSoftplus)

    def forward(self, features: NodeFeatures) -> Tensor:
        """-> (N, 1)."""
        return self.last(features.node_embedding) + self.first(features.hidden_states[0])


def _norm_mlp(channels: int, options: GNSOptions) -> nn.Sequential:
    """LN(MLP) from so many channels."""
    layers = mlp(channels, *[options.hidden_channels] * options.num_mlp_layers, act=ShiftedSoftplus)
    return nn.Sequential(*layers, nn.LayerNorm(options.hidden_channels))
