"""Filters and sums over edges, the expensive part of FAENet, a block of edges at a time.

What is one line of mathematics (`plain_filtered_sum`) reads and writes about ten (E, M) tensors when every operation
runs over all edges before the next begins. They are far larger than a processor's caches, and fresh memory of that size
costs more than the arithmetic done on it. Here all operations run on one block of edges whose tensors stay in the
cache, and only what the gradient needs is kept for all edges: the filters before their activation.

The part of the edge embedding that depends on the distance alone enters the filters as a function of one number. It is
multiplied by the weights at knots on that line, a few thousand rows instead of all edges, and interpolated.

Legend: N atoms, E edges j -> i, F channels of an edge embedding, M channels of a message, K knots.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]

EDGES_PER_BLOCK = 1024
"""On a CPU: (1024, 384) float32 are 1.5 MB. Other devices take all edges at once: launches cost more there."""


class Knots(NamedTuple):
    """Interpolation of a function of the distance.

    Attributes:
        values: the function at the knots, (K, channels).
        near: the knots that each edge is interpolated from, (E, 4).
        weight: their weights, (E, 4), constants in derivatives.
    """

    values: Tensor
    near: Tensor
    weight: Tensor


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


def segment_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum the rows that share an index: (M, ...) and (M,) -> (size, ...); zero where none does.

    With a sorted index `index_add` is faster on CPU than `torch.segment_reduce`, and unlike it,
    it can be differentiated twice, which a loss on -dE/dX needs.
    """
    return values.new_zeros(size, *values.shape[1:]).index_add(0, index, values)


def edge_blocks(num_edges: int, device: torch.device) -> Iterator[slice]:
    """Rows of all edges, in blocks that fit a CPU's cache."""
    step = EDGES_PER_BLOCK if device.type == "cpu" else max(num_edges, 1)
    for start in range(0, num_edges, step):
        yield slice(start, min(start + step, num_edges))


def filtered_sum(
    e: Tensor,
    weight: Tensor,
    nodes: Tensor,
    values: Tensor,
    source: Tensor,
    target: Tensor,
    act: Activation,
    knots: Knots | None = None,
    shared: Tensor | None = None,
    *,
    opaque: bool = False,
) -> Tensor:
    """m_i = sum over edges j -> i of act(W e_ij + a_j + b_i + t(d_ij)) * v_j, differentiable any number of times.

    Args:
        e: edge embeddings, (E, F), or without those of the last S edges, if `shared` is given.
        weight: W, (M, F).
        nodes: a and b beside each other, (N, 2 M).
        values: v, (N, M). Sums have their precision; filters have that of autocast, if it is on.
        source: j of every edge, (E,).
        target: i of every edge, (E,), best sorted.
        act: activation function, elementwise.
        knots: t, with M channels, at as many distances as there are edge embeddings; none is 0.
        shared: (S,) row of e, and of `knots`, that is also that of each of the last S edges, ascending: what has been
            computed for one edge is taken for another.
        opaque: torch.compile is not to look inside, at the price of a break in its graph.

    Returns:
        (N, M).
    """
    knot_values, near, knot_weight = (None, None, None) if knots is None else knots
    if torch.is_autocast_enabled(e.device.type):
        dtype = torch.get_autocast_dtype(e.device.type)
        e, weight, nodes = e.to(dtype), weight.to(dtype), nodes.to(dtype)
        if knot_values is not None and knot_weight is not None:
            knot_values, knot_weight = knot_values.to(dtype), knot_weight.to(dtype)
    if not torch.is_grad_enabled():
        weight = weight.detach()  # a parameter would seem to need what only a gradient needs
    function = _in_blocks if opaque or not torch.compiler.is_compiling() else plain_filtered_sum
    return function(e, weight, nodes, values, knot_values, near, knot_weight, source, target, act, shared)


@torch.compiler.disable
def _in_blocks(*arguments: Any) -> Tensor:
    with torch.autocast(arguments[0].device.type, enabled=False):
        return _FilteredSum.apply(*arguments)


def plain_filtered_sum(
    e: Tensor,
    weight: Tensor,
    nodes: Tensor,
    values: Tensor,
    knot_values: Tensor | None,
    near: Tensor | None,
    knot_weight: Tensor | None,
    source: Tensor,
    target: Tensor,
    act: Activation,
    shared: Tensor | None = None,
) -> Tensor:
    """`filtered_sum`, over all edges at once: what a compiler takes, and what derivatives of derivatives come from."""
    with torch.autocast(e.device.type, enabled=False):
        a, b = nodes.chunk(2, dim=1)
        filters = functional.linear(e, weight)
        if knot_values is not None and near is not None and knot_weight is not None:
            filters = filters + (knot_values[near] * knot_weight.unsqueeze(2)).sum(dim=1)
        if shared is not None:
            filters = torch.cat([filters, filters.index_select(0, shared)])
        filters = filters + a.index_select(0, source) + b.index_select(0, target)
        return segment_sum(act(filters) * values.index_select(0, source), target, len(values))


class _FilteredSum(torch.autograd.Function):
    """Arguments as of `plain_filtered_sum`; only the first five are differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        weight: Tensor,
        nodes: Tensor,
        values: Tensor,
        knot_values: Tensor | None,
        near: Tensor | None,
        knot_weight: Tensor | None,
        source: Tensor,
        target: Tensor,
        act: Activation,
        shared: Tensor | None,
    ) -> Tensor:
        keep = any(ctx.needs_input_grad)
        # Row 2 j of the table is a_j, row 2 i + 1 is b_i: one bag an edge adds them up.
        table = nodes.reshape(-1, len(weight))
        bags = torch.stack([2 * source, 2 * target + 1], dim=1)
        kept = e.new_empty(len(source) if keep else 0, len(weight))
        m = torch.zeros_like(values)
        for rows, users in _users(len(e), shared, e.device):
            if knot_values is not None and near is not None and knot_weight is not None:
                common = functional.embedding_bag(
                    near[rows], knot_values, mode="sum", per_sample_weights=knot_weight[rows]
                ).addmm_(e[rows], weight.t())
            else:
                common = e[rows] @ weight.t()
            for edges, place in reversed(users):
                linear = functional.embedding_bag(bags[edges], table, mode="sum")
                linear += common if place is None else common.index_select(0, place)
                if keep:
                    kept[edges] = linear
                m.index_add_(0, target[edges], act(linear) * values.index_select(0, source[edges]))
        ctx.act = act
        ctx.save_for_backward(e, weight, nodes, values, knot_values, near, knot_weight, source, target, shared, kept)
        return m

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *arguments, shared, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            gradients = _differentiable_gradients(arguments, ctx.act, shared, grad_outputs[0], ctx.needs_input_grad[:5])
        else:
            gradients = _gradients(
                arguments, kept, ctx.act, shared, grad_outputs[0], with_edges=ctx.needs_input_grad[0]
            )
        return *gradients, None, None, None, None, None, None


def _users(
    num_rows: int, shared: Tensor | None, device: torch.device
) -> Iterator[tuple[slice, list[tuple[slice, Tensor | None]]]]:
    """Blocks of rows of e, each with the edges that they belong to, and the edges' places in it (None: in order)."""
    blocks = list(edge_blocks(num_rows, device))
    if shared is None:
        for rows in blocks:
            yield rows, [(rows, None)]
        return
    starts = torch.searchsorted(shared, torch.tensor([rows.start for rows in blocks], device=device)).tolist()
    for rows, start, end in zip(blocks, starts, [*starts[1:], len(shared)], strict=True):
        yield rows, [(rows, None), (slice(num_rows + start, num_rows + end), shared[start:end] - rows.start)]


def _differentiable_gradients(
    arguments: list[Any], act: Activation, shared: Tensor | None, grad_m: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    # Views: one argument may have been computed from another, whose gradient here is the direct one alone.
    arguments = [None if argument is None else argument.view_as(argument) for argument in arguments]
    m = plain_filtered_sum(*[*arguments, act, shared])
    inputs = [argument for argument, needs in zip(arguments, needed, strict=False) if needs]
    found = iter(torch.autograd.grad(m, inputs, grad_m, create_graph=True))
    return [next(found) if needs else None for needs in needed]


def _gradients(
    arguments: list[Any],
    kept: Tensor,
    act: Activation,
    shared: Tensor | None,
    grad_m: Tensor,
    *,
    with_edges: bool,
) -> list[Tensor | None]:
    """Gradients by the first five arguments, a block of edges at a time; sums in the precision of the values."""
    e, weight, nodes, values, knot_values, near, knot_weight, source, target = arguments
    grad_e = torch.empty_like(e) if with_edges else None
    grad_weight = torch.zeros_like(weight, dtype=values.dtype)
    grad_a, grad_b, grad_values = (torch.zeros_like(values) for _ in range(3))
    grad_knots = None if knot_values is None else torch.zeros_like(knot_values, dtype=values.dtype)
    for rows, users in _users(len(e), shared, e.device):
        grad_common = kept.new_empty(0)
        for edges, place in users:
            j, i = source[edges], target[edges]
            grad = grad_m.index_select(0, i)
            with torch.enable_grad():
                linear = kept[edges].detach().requires_grad_()
                filters = act(linear)
            grad_values.index_add_(0, j, grad * filters.detach())
            grad *= values.index_select(0, j)
            (grad_linear,) = torch.autograd.grad(filters, linear, grad.to(filters.dtype))
            exact = grad_linear.to(values.dtype)
            grad_a.index_add_(0, j, exact)
            grad_b.index_add_(0, i, exact)
            grad_common = grad_linear if place is None else grad_common.index_add_(0, place, grad_linear)
        if grad_e is not None:
            torch.mm(grad_common, weight, out=grad_e[rows])
        grad_weight += grad_common.t() @ e[rows]
        if grad_knots is not None:
            grad_common = grad_common.to(values.dtype)
            for knot, share in zip(near[rows].unbind(1), knot_weight[rows].unbind(1), strict=True):
                grad_knots.index_add_(0, knot, grad_common * share.to(grad_common.dtype).unsqueeze(1))
    return [
        grad_e,
        grad_weight.to(weight.dtype),
        torch.cat([grad_a, grad_b], dim=1).to(nodes.dtype),
        grad_values,
        None if grad_knots is None else grad_knots.to(knot_values.dtype),
    ]
