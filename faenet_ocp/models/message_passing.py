"""Interaction blocks of FAENet: equation (8) and the variants of it that the paper compares.

With the edge embedding e_ij, the node embeddings h and a filter f_ij per edge (figure 1, Table 6):

    m_i  = sum over edges j -> i of  f_ij * v_j          (elementwise; times the envelope, if there is one)
    h_i <- h_i + act(W2 act(W1 act(GraphNorm(m_i))))     W2 only with `complex_mp`

    mp_type            filter f_ij                  value v_j       Table 6
    base               act(W [e_ij, h_j, h_i])      h_j             baseline
    simple             act(W e_ij)                  h_j             "Simple MP"
    basic              e_ij                         h_j             "Basic MP"
    updownscale        act(W e_ij)                  act(W' h_j)     "Updownscale MP"
    updownscale_base   act(W [e_ij, h_j, h_i])      act(W' h_j)
    updown_local_env   W e_ij                       act(W' h_j)     (sum_j e_ij is put beside m_i)
    base_with_att      a_ij W e_ij                  W' h_j          "Attention mecha"
    att                m_i = sum_j a_ij (W e_ij + W' h_j), a graph transformer

`basic` is called `simple` in the package faenet 0.1.3, and `sfarinet` in the authors' fork of OCP.

Shapes: N atoms, E edges j -> i, B systems; C hidden_channels, F num_filters; M the channels of a message: F for the
updown types, else C. Under autocast, where linear layers give less, embeddings, values and sums over atoms keep the
precision of the positions: hence `.to(h.dtype)`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.utils import softmax

from faenet_ocp.models.functional import ACTIVATIONS, segment_sum
from faenet_ocp.models.norms import RankGraphNorm
from faenet_ocp.models.options import FAENetOptions


class Graph(NamedTuple):
    """What every block uses and none changes.

    Attributes:
        source: j of every edge, (E,).
        target: i of every edge, (E,).
        edge_embedding: e_ij, (E, F).
        norm_batch: system of every atom, (N,); None to normalise over all atoms of the batch.
        num_systems: B.
        norm_share: one over the number of atoms of each system, (B, 1); None with `norm_batch`.
        envelope: factor of the messages of every edge, (E, 1); None is one.
    """

    source: Tensor
    target: Tensor
    edge_embedding: Tensor
    norm_batch: Tensor | None
    num_systems: int
    norm_share: Tensor | None = None
    envelope: Tensor | None = None


def sum_messages(filters: Tensor, values: Tensor, graph: Graph) -> Tensor:
    """m_i = sum over edges j -> i of f_ij * v_j: (E, M), (N, M) -> (N, M)."""
    messages = filters * values.index_select(0, graph.source)
    if graph.envelope is not None:
        messages = messages * graph.envelope
    return segment_sum(messages, graph.target, len(values))


def polynomial_envelope(distances: Tensor, cutoff: float) -> Tensor:
    """1 at distance 0, and 0 with its first two derivatives at the cutoff, (E,) -> (E, 1).

    d u(d) of DimeNet, Gasteiger et al. 2020, equation (8), with p = 6.
    """
    x = (distances / cutoff).clamp(max=1).unsqueeze(1)
    return 1 - x**6 * (28 - 48 * x + 21 * x**2)


def dense(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer with the authors' initialisation: Xavier-uniform weight, zero bias."""
    layer = nn.Linear(in_channels, out_channels, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class EdgeFilter(nn.Module):
    """f_ij = act(W e_ij + b): (E, F) -> (E, M)."""

    def __init__(self, options: FAENetOptions, out_channels: int, *, node_channels: int = 0) -> None:
        super().__init__()
        self.act = ACTIVATIONS[options.act]
        self.lin = dense(options.num_filters + node_channels, out_channels)

    def sum_messages(self, h: Tensor, values: Tensor, graph: Graph) -> Tensor:
        """m_i = sum over edges j -> i of f_ij * v_j, (N, M)."""
        return sum_messages(self.act(self.lin(graph.edge_embedding)), values, graph)


class EdgeNodeFilter(EdgeFilter):
    """f_ij = act(W [e_ij, h_j, h_i] + b), equation (8).

    The columns of W that act on nodes are applied once per atom, and their results are gathered per edge.
    """

    def __init__(self, options: FAENetOptions, out_channels: int) -> None:
        super().__init__(options, out_channels, node_channels=2 * options.hidden_channels)

    def split(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The columns of W for e_ij, (M, F); what h_j adds, and what h_i and the bias add, (N, M) each."""
        edge, source, target = self.lin.weight.tensor_split((-2 * h.shape[1], -h.shape[1]), dim=1)
        return edge, functional.linear(h, source), functional.linear(h, target, self.lin.bias)

    def sum_messages(self, h: Tensor, values: Tensor, graph: Graph) -> Tensor:
        weight, of_source, of_target = self.split(h)
        filters = functional.linear(graph.edge_embedding, weight)
        filters = filters + of_source.index_select(0, graph.source) + of_target.index_select(0, graph.target)
        return sum_messages(self.act(filters), values, graph)


FilterType = Callable[[FAENetOptions, int], EdgeFilter]


class InteractionBlock(nn.Module):
    """The update of equation (8). Subclasses say what m_i is.

    Args:
        options: of `FAENet`.
        message_channels: M, the channels of m_i.
        update_channels: channels that `lin_out` takes; M unless given.
    """

    def __init__(self, options: FAENetOptions, message_channels: int, update_channels: int | None = None) -> None:
        super().__init__()
        hidden_channels = options.hidden_channels
        self.act = ACTIVATIONS[options.act]
        self.norm = RankGraphNorm(message_channels) if options.graph_norm != "none" else None
        self.lin_out = dense(update_channels or message_channels, hidden_channels)
        self.lin_complex = dense(hidden_channels, hidden_channels) if options.complex_mp else None

    def aggregate(self, h: Tensor, graph: Graph) -> Tensor:
        """The messages of every atom, summed: m_i, (N, M)."""
        raise NotImplementedError

    def update(self, m: Tensor, graph: Graph) -> Tensor:
        """From messages, (N, M), back to hidden channels, (N, C)."""
        return self.act(self.lin_out(m))

    def forward(self, h: Tensor, graph: Graph) -> Tensor:
        """Node embeddings (N, C) -> updated node embeddings (N, C)."""
        m = self.aggregate(h, graph)
        if self.norm is not None:
            m = self.act(self.norm(m, graph.norm_batch, graph.num_systems, graph.norm_share))
        m = self.update(m, graph)
        if self.lin_complex is not None:
            m = self.act(self.lin_complex(m))
        return h + m


class Convolution(InteractionBlock):
    """m_i = sum_j f_ij * h_j: `base`, `simple` and `basic`.

    Args:
        options: of `FAENet`.
        filter_type: what makes f_ij; None takes e_ij itself and needs F = C.
    """

    def __init__(self, options: FAENetOptions, filter_type: FilterType | None) -> None:
        super().__init__(options, message_channels=options.hidden_channels)
        self.filter = filter_type and filter_type(options, options.hidden_channels)

    def aggregate(self, h: Tensor, graph: Graph) -> Tensor:
        """Sum of the filtered embeddings of the neighbours, (N, C)."""
        if self.filter is None:
            return sum_messages(graph.edge_embedding, h, graph)
        return self.filter.sum_messages(h, h, graph)


class UpDownConvolution(InteractionBlock):
    """m_i = sum_j f_ij * act(W' h_j): `updownscale` and `updownscale_base`."""

    def __init__(self, options: FAENetOptions, filter_type: FilterType) -> None:
        super().__init__(options, message_channels=options.num_filters)
        self.lin_down = dense(options.hidden_channels, options.num_filters)
        self.filter = filter_type(options, options.num_filters)

    def aggregate(self, h: Tensor, graph: Graph) -> Tensor:
        """Sum of the filtered, scaled-down embeddings of the neighbours, (N, F)."""
        values = self.act(self.lin_down(h)).to(h.dtype)
        return self.filter.sum_messages(h, values, graph)


class LocalEnvConvolution(InteractionBlock):
    """Convolution with a linear filter of e_ij; the update also sees the sum of e_ij itself: `updown_local_env`."""

    def __init__(self, options: FAENetOptions) -> None:
        filters = options.num_filters
        super().__init__(options, message_channels=filters, update_channels=2 * filters)
        self.lin_down = dense(options.hidden_channels, filters)
        self.lin_filter = dense(filters, filters)

    def aggregate(self, h: Tensor, graph: Graph) -> Tensor:
        """Sum of the filtered, scaled-down embeddings of the neighbours, (N, F)."""
        values = self.act(self.lin_down(h)).to(h.dtype)
        return sum_messages(self.lin_filter(graph.edge_embedding), values, graph)

    def update(self, m: Tensor, graph: Graph) -> Tensor:
        """Messages and local environment to hidden channels, (N, C); linear."""
        edges = graph.edge_embedding.to(m.dtype)
        if graph.envelope is not None:
            edges = edges * graph.envelope
        local_env = segment_sum(edges, graph.target, len(m))  # (N, F)
        return self.lin_out(torch.cat([m, local_env], dim=1))


class Attention(InteractionBlock):
    """Messages weighted by attention: `base_with_att` and `att`.

    a_ij is the softmax over the neighbours j of q_i . k_ij / sqrt(C), k_ij = K h_j, to which `att` adds W e_ij. The
    mean is taken over the heads. The keys have no bias: it would shift all neighbours of an atom alike, which the
    softmax does not see.

    Args:
        options: of `FAENet`.
        multiply: whether W e_ij multiplies the values (`base_with_att`) or is added to keys and values (`att`).
    """

    def __init__(self, options: FAENetOptions, multiply: bool) -> None:
        channels = options.hidden_channels
        super().__init__(options, message_channels=channels)
        self.multiply = multiply
        self.heads = options.att_heads
        self.lin_query = dense(channels, self.heads * channels)
        self.lin_key = dense(channels, self.heads * channels, bias=False)
        self.lin_value = dense(channels, self.heads * channels)
        self.lin_edge = dense(options.num_filters, self.heads * channels, bias=False)

    def aggregate(self, h: Tensor, graph: Graph) -> Tensor:
        """Sum of the messages weighted by attention, (N, C)."""
        num_atoms, channels = h.shape
        shape = (-1, self.heads, channels)
        edges = self.lin_edge(graph.edge_embedding).view(shape)
        query = self.lin_query(h).view(shape).index_select(0, graph.target)
        key = self.lin_key(h).view(shape).index_select(0, graph.source)
        value = self.lin_value(h).view(shape).index_select(0, graph.source)
        if not self.multiply:
            key = key + edges
        scores = (query * key).sum(dim=-1) / math.sqrt(channels)  # (E, heads)
        weights = softmax(scores.to(h.dtype), graph.target, num_nodes=num_atoms).unsqueeze(-1)
        messages = weights * (value * edges if self.multiply else value + edges)
        return segment_sum(messages, graph.target, num_atoms).mean(dim=1)


BLOCKS: dict[str, Callable[[FAENetOptions], InteractionBlock]] = {
    "base": partial(Convolution, filter_type=EdgeNodeFilter),
    "simple": partial(Convolution, filter_type=EdgeFilter),
    "basic": partial(Convolution, filter_type=None),
    "updownscale": partial(UpDownConvolution, filter_type=EdgeFilter),
    "updownscale_base": partial(UpDownConvolution, filter_type=EdgeNodeFilter),
    "updown_local_env": LocalEnvConvolution,
    "base_with_att": partial(Attention, multiply=True),
    "att": partial(Attention, multiply=False),
}
"""Interaction block by the name of its message passing."""
