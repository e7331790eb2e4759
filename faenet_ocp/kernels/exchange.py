"""`accelerate`: modules of a model are exchanged, in place, for ones that compute the same faster.

They are subclasses of the modules of `models`, with the same parameters: state dicts, optimisers, copies and pickles do
not notice. Where the compiled code cannot be used (another precision, another activation function) they do what their
parents do. The part of FAENet's edge embedding that depends on the distance alone enters the filters as a function of
one number. On a CPU it is multiplied by the weights at knots on that line, a few thousand rows instead of all edges,
and interpolated.

Legend: N atoms, E edges j -> i, F channels of an edge embedding, M channels of a message, K knots.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from faenet_ocp.kernels.edge_kernels import usable
from faenet_ocp.kernels.filtered_sum import Knots, filtered_sum
from faenet_ocp.models.embedding import EdgeEmbedding
from faenet_ocp.models.faenet import FAENet
from faenet_ocp.models.message_passing import EdgeFilter, EdgeNodeFilter, Graph

KNOTS_PER_GAUSSIAN = 24
"""The interpolation is then as exact as float32: the error is below 3e-7 of the function's size, for smooth weights."""
BEYOND = 8
"""Widths beyond the last centre where all Gaussians are below 1e-13; knots end there."""


def accelerate(model: nn.Module) -> None:
    """Give every FAENet inside a model its fast modules, in place; parameters and their names stay.

    Forms without a faster one, and networks with an envelope, are left as they are, and so is what is
    accelerated already.
    """
    for network in model.modules():
        if isinstance(network, FAENet) and network.options.envelope == "none":
            filters = [getattr(block, "filter", None) for block in network.blocks]
            for module in filters:
                _exchange(module, _FAST)
            embedding = network.edge_embedding
            by_distance = embedding.lin_rbf is not None and embedding.lin_2 is None
            if by_distance and all(isinstance(module, FastEdgeFilter | FastEdgeNodeFilter) for module in filters):
                _exchange(embedding, {EdgeEmbedding: FastEdgeEmbedding})


def _exchange(module: nn.Module | None, fast: dict[type, type]) -> None:
    if type(module) in fast:
        module.__class__ = fast[type(module)]
        module.table = KeptTable()  # type: ignore[union-attr]


class KeptTable:
    """A table that follows from weights, computed once for many batches without gradients.

    It is computed anew when the weights are others: their numbers are compared, because weights change in place, past
    autograd's count of changes too (state dicts loaded, averages swapped in). That takes a hundredth of the work.
    Copies and pickles of a model begin without it.
    """

    def __init__(self) -> None:
        self._table = torch.empty(0)
        self._weights: list[Tensor] = []
        self._given: Tensor | None = None
        self._precision: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[type, tuple]:
        return KeptTable, ()

    def get(self, compute: Callable[[], Tensor], weights: Sequence[Tensor], given: Tensor | None = None) -> Tensor:
        """`compute()`, or what it gave before.

        Args:
            compute: depends on `weights` and `given` only.
            weights: compared by number.
            given: a tensor that nobody writes to; compared by identity.
        """
        if torch.is_grad_enabled():
            return compute()
        precision = weights[0].dtype, torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        same = given is self._given and precision == self._precision
        if not same or not all(torch.equal(a, b) for a, b in zip(weights, self._weights, strict=True)):
            self._table = compute()
            self._weights = [weight.detach().clone() for weight in weights]
            self._given, self._precision = given, precision
        return self._table


def cubic_interpolation(place: Tensor) -> tuple[Tensor, Tensor]:
    """Lagrange's cubic through the two knots on either side, when knot k lies at k - 1.

    Args:
        place: (E,), from 0 to K - 4.

    Returns:
        near (E, 4) int32 and weight (E, 4), as in `Knots`. The error is at most 9/384 of the fourth derivative.
    """
    below = place.floor()
    u = place - below
    near = below.int()[:, None] + torch.arange(4, dtype=torch.int32, device=place.device)
    before, after, beyond = u + 1, u - 1, u - 2
    weight = [-u * after * beyond / 6, before * after * beyond / 2, -before * u * beyond / 2, before * u * after / 6]
    return near, torch.stack(weight, dim=1)


class Tabulated(NamedTuple):
    """e_ij in two parts: the channels of r_ij, (E, F // 2), and the others as a function of the distance."""

    vector_part: Tensor
    knots: Knots


class FastEdgeEmbedding(EdgeEmbedding):
    """`EdgeEmbedding` whose part of the distance alone is given at knots, where that is faster and as exact.

    It is faster where arithmetic is what costs, on a CPU, if there are more edges than knots, or the same knots serve
    many batches. For derivatives by the positions it would not be exact enough.
    """

    table: KeptTable

    def forward(self, edge_vec: Tensor) -> Tensor:
        """(E, 3) -> (E, F), or for the fast filters in two parts, `Tabulated`."""
        lin_rbf, offset = cast(nn.Linear, self.lin_rbf), self.smearing.offset
        spacing = self.smearing.cutoff / (len(offset) - 1) / KNOTS_PER_GAUSSIAN
        num_knots = (len(offset) - 1 + BEYOND) * KNOTS_PER_GAUSSIAN + 4  # from one before 0 to one beyond the end
        faster = len(edge_vec) > 2 * num_knots or not torch.is_grad_enabled()
        if edge_vec.requires_grad or not faster or not usable(edge_vec, self.act):
            return super().forward(edge_vec)

        def at_knots() -> Tensor:
            distances = torch.arange(-1, num_knots - 1).to(offset.dtype) * spacing
            return self.act(lin_rbf(self.smearing(distances)))

        values = self.table.get(at_knots, (lin_rbf.weight, lin_rbf.bias))  # (K, F - F // 2)
        place = (torch.linalg.vector_norm(edge_vec, dim=1) / spacing).clamp(max=num_knots - 4)
        parts = Tabulated(self.act(self.lin(edge_vec)), Knots(values, *cubic_interpolation(place)))
        return cast(Tensor, parts)


class FastEdgeFilter(EdgeFilter):
    """`EdgeFilter` whose messages are made and summed a block of edges at a time."""

    table: KeptTable

    def sum_messages(self, h: Tensor, values: Tensor, graph: Graph) -> Tensor:
        if not usable(values, self.act):
            return super().sum_messages(h, values, graph)
        bias = self.lin.bias
        nodes = torch.cat([torch.zeros_like(bias), bias]).expand(len(h), -1)
        return _sum(self, self.lin.weight, nodes, values, graph)


class FastEdgeNodeFilter(EdgeNodeFilter):
    """`EdgeNodeFilter` whose messages are made and summed a block of edges at a time."""

    table: KeptTable

    def sum_messages(self, h: Tensor, values: Tensor, graph: Graph) -> Tensor:
        if not usable(values, self.act):
            return super().sum_messages(h, values, graph)
        weight, of_source, of_target = self.split(h)
        return _sum(self, weight, torch.cat([of_source, of_target], dim=1), values, graph)


_FAST: dict[type, type] = {EdgeFilter: FastEdgeFilter, EdgeNodeFilter: FastEdgeNodeFilter}


def _sum(
    module: FastEdgeFilter | FastEdgeNodeFilter, weight: Tensor, nodes: Tensor, values: Tensor, graph: Graph
) -> Tensor:
    """`filtered_sum` of embeddings in one part or two; weight (M, F), nodes (N, 2 M), values (N, M)."""
    e: Any = graph.edge_embedding
    knots = None
    if isinstance(e, Tabulated):
        channels, given = e.vector_part.shape[1], e.knots.values
        of_distance = weight[:, channels:]
        table = module.table.get(lambda: functional.linear(given, of_distance), (of_distance,), given)  # (K, M)
        e, weight, knots = e.vector_part, weight[:, :channels], e.knots._replace(values=table)
    return filtered_sum(e, weight, nodes, values, graph.source, graph.target, knots)
