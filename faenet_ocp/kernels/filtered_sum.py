"""Filters and sums over edges, the expensive part of FAENet, a block of edges at a time.

What is one line of mathematics (`_all_at_once`) reads and writes about ten (E, M) tensors when every operation runs
over all edges before the next begins. They are far larger than a processor's caches, and fresh memory of that size
costs more than the arithmetic done on it. Here all operations run on one block of edges whose tensors stay in the
cache, and only what the gradient needs is kept for all edges: the filters before their activation. All but the product
of matrices is one pass in compiled code where that can be (`edge_kernels`), and a few operations of torch elsewhere.

Legend: N atoms, E edges j -> i, F channels of an edge embedding, M channels of a message, K knots.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from faenet_ocp.kernels import edge_kernels
from faenet_ocp.models.functional import Activation, segment_sum

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
    act: Activation,
    knots: Knots | None = None,
) -> Tensor:
    """m_i = sum over edges j -> i of act(W e_ij + a_j + b_i + t(d_ij)) * v_j, differentiable any number of times.

    Args:
        e: edge embeddings, (E, F).
        weight: W, (M, F).
        nodes: a and b beside each other, (N, 2 M).
        values: v, (N, M). Sums have their precision; filters have that of autocast, if it is on.
        source: j of every edge, (E,).
        target: i of every edge, (E,), best sorted.
        act: activation function, elementwise.
        knots: t, with M channels; none is 0.

    Returns:
        (N, M).

    Raises:
        IndexError: an edge of an atom that is not there.
    """
    if knots is None:
        knots = Knots(e.new_empty(0, len(weight)), source.new_empty(0, 4).int(), values.new_empty(0, 4))
    at_knots, near, knot_weight = knots
    if torch.is_autocast_enabled(e.device.type):
        dtype = torch.get_autocast_dtype(e.device.type)
        e, weight, nodes, at_knots = e.to(dtype), weight.to(dtype), nodes.to(dtype), at_knots.to(dtype)
    if not torch.is_grad_enabled():
        weight = weight.detach()  # a parameter would seem to need what only a gradient needs
    inputs = Inputs(e, weight, nodes, values, at_knots, near, knot_weight, source, target)
    with torch.autocast(e.device.type, enabled=False):
        return _FilteredSum.apply(act, *inputs)


def _all_at_once(inputs: Inputs, act: Activation) -> Tensor:
    """The formula, from which derivatives of derivatives come."""
    e, weight, nodes, values, knot_values, near, knot_weight, source, target = inputs
    a, b = nodes.chunk(2, dim=1)
    filters = functional.linear(e, weight) + a.index_select(0, source) + b.index_select(0, target)
    if len(near):
        filters = filters + (knot_values[near] * knot_weight.to(knot_values.dtype).unsqueeze(2)).sum(dim=1)
    return segment_sum(act(filters) * values.index_select(0, source), target, len(values))


def _blocks(num_edges: int, device: torch.device) -> Iterator[slice]:
    """Rows of all edges, in blocks that fit a CPU's cache."""
    step = EDGES_PER_BLOCK if device.type == "cpu" else max(num_edges, 1)
    for start in range(0, num_edges, step):
        yield slice(start, min(start + step, num_edges))


class _FilteredSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, act: Activation, *tensors: Any) -> Tensor:
        inputs = Inputs(*tensors)
        e, weight = inputs.e, inputs.weight
        blocks = list(_blocks(len(e), e.device))
        m = torch.zeros_like(inputs.values)
        linear = e.new_empty(max((block.stop - block.start for block in blocks), default=0), len(weight))
        kept = e.new_empty(len(e) if any(ctx.needs_input_grad) else 0, len(weight))
        make = _compiled_messages if _is_compiled(inputs, act) else _torch_messages
        add_messages = make(inputs, act, linear, kept, m)
        for rows in blocks:
            torch.mm(e[rows], weight.t(), out=linear[: rows.stop - rows.start])
            add_messages(rows)
        ctx.act = act
        ctx.save_for_backward(*inputs, kept)
        return m

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        inputs, needed = Inputs(*tensors), ctx.needs_input_grad[1:6]
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            gradients = _differentiable_gradients(inputs, ctx.act, grad_outputs[0], needed)
        else:
            gradients = _gradients(inputs, ctx.act, kept, grad_outputs[0], with_edges=needed[0])
        return None, *gradients, None, None, None, None


def _differentiable_gradients(
    inputs: Inputs, act: Activation, grad_m: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    # Views: one argument may have been computed from another, whose gradient here is the direct one alone.
    views = Inputs(*(tensor.view_as(tensor) for tensor in inputs))
    wanted = [tensor for tensor, needs in zip(views, needed, strict=False) if needs]
    found = iter(torch.autograd.grad(_all_at_once(views, act), wanted, grad_m, create_graph=True))
    return [next(found) if needs else None for needs in needed]


class Gradients(NamedTuple):
    """Gradients that are added up over the edges, in the precision of the values."""

    nodes: Tensor
    values: Tensor
    knot_values: Tensor


def _gradients(
    inputs: Inputs, act: Activation, kept: Tensor, grad_m: Tensor, *, with_edges: bool
) -> list[Tensor | None]:
    """Gradients by the first five inputs."""
    e, weight, values = inputs.e, inputs.weight, inputs.values
    blocks = list(_blocks(len(e), e.device))
    grad_e = torch.empty_like(e) if with_edges else None
    grad_weight = torch.zeros_like(weight, dtype=values.dtype)
    sums = Gradients(
        nodes=torch.zeros_like(inputs.nodes, dtype=values.dtype),
        values=torch.zeros_like(values),
        knot_values=torch.zeros_like(inputs.knot_values, dtype=values.dtype),
    )
    linear = values.new_empty(max((block.stop - block.start for block in blocks), default=0), len(weight))
    make = _compiled_gradients if _is_compiled(inputs, act) else _torch_gradients
    add_gradients = make(inputs, act, linear, kept, grad_m, sums)
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


# Compiled, on a CPU, with silu


def _is_compiled(inputs: Inputs, act: Activation) -> bool:
    if act is not functional.silu or inputs.values.dtype != torch.float32:
        return False
    return edge_kernels.usable(inputs.e, inputs.weight, inputs.nodes, inputs.values, inputs.knot_values)


def _of_edges(inputs: Inputs) -> tuple[Tensor, ...]:
    """values, source, target, near, share, as the kernels take them."""
    return inputs.values, inputs.source, inputs.target, inputs.near[:, 0], inputs.knot_weight


def _compiled_messages(
    inputs: Inputs, _: Activation, linear: Tensor, kept: Tensor, m: Tensor
) -> Callable[[slice], None]:
    channels = len(inputs.weight)
    arrays = edge_kernels.arrays(m, kept, linear, inputs.knot_values, inputs.nodes, *_of_edges(inputs))

    def add(rows: slice) -> None:
        if edge_kernels.run(edge_kernels.add_messages, channels, *arrays, rows.start, rows.stop):
            raise IndexError(f"edge_index: edges of atoms outside 0 to {len(inputs.values) - 1}")

    return add


def _compiled_gradients(
    inputs: Inputs, _: Activation, linear: Tensor, kept: Tensor, grad_m: Tensor, sums: Gradients
) -> Callable[[slice], None]:
    arrays = edge_kernels.arrays(linear, *sums, kept, grad_m, *_of_edges(inputs))

    def add(rows: slice) -> None:
        edge_kernels.run(edge_kernels.add_gradients, len(inputs.weight), *arrays, rows.start, rows.stop)

    return add


# In torch, on any device, in any precision, with any activation function


def _torch_messages(
    inputs: Inputs, act: Activation, linear: Tensor, kept: Tensor, m: Tensor
) -> Callable[[slice], None]:
    source, target = inputs.source, inputs.target
    # Row 2 j of the table is a_j, row 2 i + 1 is b_i: one bag an edge adds them up.
    table = inputs.nodes.reshape(-1, len(inputs.weight))
    bags = torch.stack([2 * source, 2 * target + 1], dim=1)

    def add(rows: slice) -> None:
        part = linear[: rows.stop - rows.start]
        part += functional.embedding_bag(bags[rows], table, mode="sum")
        if len(inputs.near):
            near, share = inputs.near[rows], inputs.knot_weight[rows].to(part.dtype)
            part += functional.embedding_bag(near, inputs.knot_values, mode="sum", per_sample_weights=share)
        if len(kept):
            kept[rows] = part
        m.index_add_(0, target[rows], act(part) * inputs.values.index_select(0, source[rows]))

    return add


def _torch_gradients(
    inputs: Inputs, act: Activation, linear: Tensor, kept: Tensor, grad_m: Tensor, sums: Gradients
) -> Callable[[slice], None]:
    of_source, of_target = sums.nodes.chunk(2, dim=1)

    def add(rows: slice) -> None:
        j, i = inputs.source[rows], inputs.target[rows]
        grad = grad_m.index_select(0, i)
        with torch.enable_grad():
            before = kept[rows].detach().requires_grad_()
            filters = act(before)
        sums.values.index_add_(0, j, grad * filters.detach())
        grad *= inputs.values.index_select(0, j)
        (grad_linear,) = torch.autograd.grad(filters, before, grad.to(filters.dtype))
        exact = linear[: rows.stop - rows.start].copy_(grad_linear)
        of_source.index_add_(0, j, exact)
        of_target.index_add_(0, i, exact)
        if len(inputs.near):
            for knot, share in zip(inputs.near[rows].unbind(1), inputs.knot_weight[rows].unbind(1), strict=True):
                sums.knot_values.index_add_(0, knot, exact * share.to(exact.dtype).unsqueeze(1))

    return add
