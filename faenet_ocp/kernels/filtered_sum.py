"""Filters and sums over edges, the expensive part of FAENet, a block of edges at a time.

What is one line of mathematics (`_all_at_once`) reads and writes about ten (E, M) tensors when every operation runs
over all edges before the next begins. They are far larger than a processor's caches, and fresh memory of that size
costs more than the arithmetic done on it. Here all operations run on one block of edges whose tensors stay in the
cache, and only what the gradient needs is kept for all edges: the filters before their activation. All but the product
of matrices is one pass in compiled code (`edge_kernels`).

Legend: N atoms, E edges j -> i, F channels of an edge embedding, M channels of a message, K knots.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from faenet_ocp.kernels import edge_kernels
from faenet_ocp.models.functional import segment_sum

NUMBERS_PER_BLOCK = 1024 * 384
"""Edges times channels; in float32 1.5 MB."""


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


class Inputs(NamedTuple):
    """What is summed, in the precisions of the work; only the first five are differentiated.

    Without knots, `knot_values` (0, M), `near` (0, 4) and `knot_weight` (0, 4) are empty.
    """

    e: Tensor
    weight: Tensor
    nodes: Tensor
    values: Tensor
    knot_values: Tensor
    near: Tensor
    knot_weight: Tensor
    source: Tensor
    target: Tensor


def filtered_sum(
    e: Tensor,
    weight: Tensor,
    nodes: Tensor,
    values: Tensor,
    source: Tensor,
    target: Tensor,
    knots: Knots | None = None,
) -> Tensor:
    """m_i = sum over edges j -> i of silu(W e_ij + a_j + b_i + t(d_ij)) * v_j, differentiable any number of times.

    Args (on a CPU, see `edge_kernels.usable`):
        e: edge embeddings, (E, F).
        weight: W, (M, F).
        nodes: a and b beside each other, (N, 2 M).
        values: v, (N, M). Sums have their precision; filters have that of autocast, if it is on.
        source: j of every edge, (E,).
        target: i of every edge, (E,), best sorted.
        knots: t, with M channels; none is 0.

    Returns:
        (N, M).

    Raises:
        IndexError: an edge of an atom that is not there.
    """
    if knots is None:
        knots = Knots(e.new_empty(0, len(weight)), source.new_empty(0, 4).int(), values.new_empty(0, 4))
    at_knots, near, knot_weight = knots
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        e, weight, nodes, at_knots = e.to(dtype), weight.to(dtype), nodes.to(dtype), at_knots.to(dtype)
    if not torch.is_grad_enabled():
        weight = weight.detach()  # a parameter would seem to need what only a gradient needs
    inputs = Inputs(e, weight, nodes, values, at_knots, near, knot_weight, source, target)
    with torch.autocast("cpu", enabled=False):
        return _FilteredSum.apply(*inputs)


def _all_at_once(inputs: Inputs) -> Tensor:
    """The formula, from which derivatives of derivatives come."""
    e, weight, nodes, values, knot_values, near, knot_weight, source, target = inputs
    a, b = nodes.chunk(2, dim=1)
    filters = functional.linear(e, weight) + a.index_select(0, source) + b.index_select(0, target)
    if len(near):
        filters = filters + (knot_values[near] * knot_weight.to(knot_values.dtype).unsqueeze(2)).sum(dim=1)
    return segment_sum(functional.silu(filters) * values.index_select(0, source), target, len(values))


def _blocks(num_edges: int, channels: int) -> Iterator[slice]:
    """Rows of all edges, in blocks that fit a CPU's cache."""
    step = max(NUMBERS_PER_BLOCK // channels, 1)
    for start in range(0, num_edges, step):
        yield slice(start, min(start + step, num_edges))


class _FilteredSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> Tensor:
        inputs = Inputs(*tensors)
        e, weight = inputs.e, inputs.weight
        blocks = list(_blocks(len(e), len(weight)))
        m = torch.zeros_like(inputs.values)
        linear = e.new_empty(max((block.stop - block.start for block in blocks), default=0), len(weight))
        kept = e.new_empty(len(e) if any(ctx.needs_input_grad) else 0, len(weight))
        add_messages = _messages(inputs, linear, kept, m)
        for rows in blocks:
            torch.mm(e[rows], weight.t(), out=linear[: rows.stop - rows.start])
            add_messages(rows)
        ctx.save_for_backward(*inputs, kept)
        return m

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        inputs, needed = Inputs(*tensors), ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            gradients = _differentiable_gradients(inputs, grad_outputs[0], needed)
        else:
            gradients = _gradients(inputs, kept, grad_outputs[0], with_edges=needed[0])
        return *gradients, None, None, None, None


def _differentiable_gradients(inputs: Inputs, grad_m: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    # Views: one argument may have been computed from another, whose gradient here is the direct one alone.
    views = Inputs(*(tensor.view_as(tensor) for tensor in inputs))
    wanted = [tensor for tensor, needs in zip(views, needed, strict=False) if needs]
    found = iter(torch.autograd.grad(_all_at_once(views), wanted, grad_m, create_graph=True))
    return [next(found) if needs else None for needs in needed]


class Gradients(NamedTuple):
    """Gradients that are added up over the edges, in the precision of the values."""

    nodes: Tensor
    values: Tensor
    knot_values: Tensor


def _gradients(inputs: Inputs, kept: Tensor, grad_m: Tensor, *, with_edges: bool) -> list[Tensor | None]:
    """Gradients by the first five inputs."""
    e, weight, values = inputs.e, inputs.weight, inputs.values
    blocks = list(_blocks(len(e), len(weight)))
    grad_e = torch.empty_like(e) if with_edges else None
    grad_weight = torch.zeros_like(weight, dtype=values.dtype)
    sums = Gradients(
        nodes=torch.zeros_like(inputs.nodes, dtype=values.dtype),
        values=torch.zeros_like(values),
        knot_values=torch.zeros_like(inputs.knot_values, dtype=values.dtype),
    )
    linear = values.new_empty(max((block.stop - block.start for block in blocks), default=0), len(weight))
    add_gradients = _added_gradients(inputs, linear, kept, grad_m, sums)
    for rows in blocks:
        add_gradients(rows)
        grad_linear = linear[: rows.stop - rows.start].to(e.dtype)
        if grad_e is not None:
            torch.mm(grad_linear, weight, out=grad_e[rows])
        grad_weight += grad_linear.t() @ e[rows]
    return [
        grad_e,
        grad_weight.to(weight.dtype),
        sums.nodes.to(inputs.nodes.dtype),
        sums.values,
        sums.knot_values.to(inputs.knot_values.dtype),
    ]


def _of_edges(inputs: Inputs) -> tuple[Tensor, ...]:
    """values, source, target, near, share, as the kernels take them."""
    return inputs.values, inputs.source, inputs.target, inputs.near[:, 0], inputs.knot_weight


def _messages(inputs: Inputs, linear: Tensor, kept: Tensor, m: Tensor) -> Callable[[slice], None]:
    channels = len(inputs.weight)
    arrays = edge_kernels.arrays(m, kept, linear, inputs.knot_values, inputs.nodes, *_of_edges(inputs))

    def add(rows: slice) -> None:
        if edge_kernels.run(edge_kernels.add_messages, channels, *arrays, rows.start, rows.stop):
            raise IndexError(f"edge_index: edges of atoms outside 0 to {len(inputs.values) - 1}")

    return add


def _added_gradients(
    inputs: Inputs, linear: Tensor, kept: Tensor, grad_m: Tensor, sums: Gradients
) -> Callable[[slice], None]:
    arrays = edge_kernels.arrays(linear, *sums, kept, grad_m, *_of_edges(inputs))

    def add(rows: slice) -> None:
        edge_kernels.run(edge_kernels.add_gradients, len(inputs.weight), *arrays, rows.start, rows.stop)

    return add
