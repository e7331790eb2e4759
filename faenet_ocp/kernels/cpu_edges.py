"""Filters and sums over edges, the expensive part of FAENet, a block of edges at a time.

What is one line of mathematics (`plain_filtered_sum`) reads and writes about ten (E, M) tensors when every operation
runs over all edges before the next begins. They are far larger than a processor's caches, and fresh memory of that size
costs more than the arithmetic done on it. Here all operations run on one block of edges whose tensors stay in the
cache, and only what the gradient needs is kept for all edges: the filters before their activation.

On a CPU, all but the product is one pass in compiled code for the usual activation function (`edge_kernels`).

The part of the edge embedding that depends on the distance alone enters the filters as a function of one number. It is
multiplied by the weights at knots on that line, a few thousand rows instead of all edges, and interpolated.

Legend: N atoms, E edges j -> i, F channels of an edge embedding, M channels of a message, K knots.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

try:
    from faenet_ocp.kernels import edge_kernels
except ImportError:  # numba comes with fairchem-core; without both the network is slower on a CPU, and the same
    edge_kernels = None  # type: ignore[assignment]

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


class Remembered:
    """The last result of a function of parameters, taken again in evaluation while these hold the same numbers.

    The numbers are compared, because parameters change in place: a hundredth of the work that products at knots are.
    """

    def __init__(self) -> None:
        self._result = torch.empty(0)
        self._parameters: list[Tensor] = []
        self._given: Tensor | None = None
        self._circumstances: tuple[Any, ...] = ()

    def __call__(self, function: Callable[[], Tensor], *parameters: Tensor, given: Tensor | None = None) -> Tensor:
        """`function()`.

        Args:
            function: depends on `parameters` and `given` only.
            parameters: compared by number.
            given: a tensor that nobody writes to; compared by identity.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return function()
        kind = parameters[0].device, parameters[0].dtype
        precision = torch.is_autocast_enabled(kind[0].type) and torch.get_autocast_dtype(kind[0].type)
        circumstances = (*kind, precision)
        same = given is self._given and circumstances == self._circumstances
        if not same or not all(torch.equal(a, b) for a, b in zip(parameters, self._parameters, strict=True)):
            self._result = function()
            self._parameters = [parameter.detach().clone() for parameter in parameters]
            self._given, self._circumstances = given, circumstances
        return self._result


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
        knot_values = None if knot_values is None else knot_values.to(dtype)
    if not torch.is_grad_enabled():
        weight = weight.detach()  # a parameter would seem to need what only a gradient needs
    inputs = Inputs(e, weight, nodes, values, knot_values, near, knot_weight, source, target, shared)
    function = _in_blocks if opaque or not torch.compiler.is_compiling() else plain_filtered_sum
    return function(inputs, act)


class Inputs(NamedTuple):
    """What `filtered_sum` is given, in the precisions of its work; only the first five are differentiated."""

    e: Tensor
    weight: Tensor
    nodes: Tensor
    values: Tensor
    knot_values: Tensor | None
    near: Tensor | None
    knot_weight: Tensor | None
    source: Tensor
    target: Tensor
    shared: Tensor | None

    def knots_at(self, rows: slice) -> tuple[Tensor, Tensor, Tensor] | None:
        """Values at the knots, and the near ones and their weights for some rows of e; None: there are no knots."""
        if self.knot_values is None or self.near is None or self.knot_weight is None:
            return None
        return self.knot_values, self.near[rows], self.knot_weight[rows].to(self.knot_values.dtype)


def plain_filtered_sum(inputs: Inputs, act: Activation) -> Tensor:
    """`filtered_sum`, over all edges at once: what a compiler takes, and what derivatives of derivatives come from."""
    e, weight, nodes, values, *_, source, target, shared = inputs
    with torch.autocast(e.device.type, enabled=False):
        a, b = nodes.chunk(2, dim=1)
        filters = functional.linear(e, weight)
        if (knots := inputs.knots_at(slice(None))) is not None:
            knot_values, near, knot_weight = knots
            filters = filters + (knot_values[near] * knot_weight.unsqueeze(2)).sum(dim=1)
        if shared is not None:
            filters = torch.cat([filters, filters.index_select(0, shared)])
        filters = filters + a.index_select(0, source) + b.index_select(0, target)
        return segment_sum(act(filters) * values.index_select(0, source), target, len(values))


@torch.compiler.disable
def _in_blocks(inputs: Inputs, act: Activation) -> Tensor:
    with torch.autocast(inputs.e.device.type, enabled=False):
        return _FilteredSum.apply(act, *inputs)


class _FilteredSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, act: Activation, *tensors: Any) -> Tensor:
        inputs = Inputs(*tensors)
        keep = any(ctx.needs_input_grad)
        m, kept = _fused_messages(inputs, keep) if _is_fused(inputs, act) else _messages(inputs, act, keep)
        ctx.act = act
        ctx.save_for_backward(*inputs, kept)
        return m

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        inputs, (grad_m,) = Inputs(*tensors), grad_outputs
        _, *needed = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            gradients = _differentiable_gradients(inputs, ctx.act, grad_m, needed)
        elif _is_fused(inputs, ctx.act):
            gradients = _fused_gradients(inputs, kept, grad_m, with_edges=needed[0])
        else:
            gradients = _gradients(inputs, ctx.act, kept, grad_m, with_edges=needed[0])
        return None, *gradients, None, None, None, None, None


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
    inputs: Inputs, act: Activation, grad_m: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    # Views: one argument may have been computed from another, whose gradient here is the direct one alone.
    views = Inputs(*(None if tensor is None else tensor.view_as(tensor) for tensor in inputs))  # type: ignore[arg-type]
    wanted = [tensor for tensor, needs in zip(views, needed, strict=False) if needs and tensor is not None]
    found = iter(torch.autograd.grad(plain_filtered_sum(views, act), wanted, grad_m, create_graph=True))
    return [next(found) if needs else None for needs in needed]


# In torch, on any device, with any activation function


def _messages(inputs: Inputs, act: Activation, keep: bool) -> tuple[Tensor, Tensor]:
    """m, (N, M), and if it is to be kept what the gradient needs: the filters before their activation, (E, M)."""
    e, weight, nodes, values, *_, source, target, shared = inputs
    # Row 2 j of the table is a_j, row 2 i + 1 is b_i: one bag an edge adds them up.
    table = nodes.reshape(-1, len(weight))
    bags = torch.stack([2 * source, 2 * target + 1], dim=1)
    kept = e.new_empty(len(source) if keep else 0, len(weight))
    m = torch.zeros_like(values)
    for rows, users in _users(len(e), shared, e.device):
        if (knots := inputs.knots_at(rows)) is not None:
            knot_values, near, share = knots
            common = functional.embedding_bag(near, knot_values, mode="sum", per_sample_weights=share)
            common = common.addmm_(e[rows], weight.t())
        else:
            common = e[rows] @ weight.t()
        for edges, place in reversed(users):
            linear = functional.embedding_bag(bags[edges], table, mode="sum")
            linear += common if place is None else common.index_select(0, place)
            if keep:
                kept[edges] = linear
            m.index_add_(0, target[edges], act(linear) * values.index_select(0, source[edges]))
    return m, kept


def _gradients(
    inputs: Inputs, act: Activation, kept: Tensor, grad_m: Tensor, *, with_edges: bool
) -> list[Tensor | None]:
    """Gradients by the first five inputs, a block of edges at a time; sums in the precision of the values."""
    e, weight, nodes, values, knot_values, *_, source, target, shared = inputs
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
        if grad_knots is not None and (knots := inputs.knots_at(rows)) is not None:
            grad_common = grad_common.to(values.dtype)
            for knot, share in zip(knots[1].unbind(1), knots[2].unbind(1), strict=True):
                grad_knots.index_add_(0, knot, grad_common * share.to(grad_common.dtype).unsqueeze(1))
    return [
        grad_e,
        grad_weight.to(weight.dtype),
        torch.cat([grad_a, grad_b], dim=1).to(nodes.dtype),
        grad_values,
        None if knot_values is None or grad_knots is None else grad_knots.to(knot_values.dtype),
    ]


# Compiled, on a CPU, with silu


def _is_fused(inputs: Inputs, act: Activation) -> bool:
    if edge_kernels is None or act is not functional.silu or inputs.values.dtype != torch.float32:
        return False
    return edge_kernels.usable(inputs.e, inputs.weight, inputs.nodes, inputs.values, inputs.knot_values)


def _fused_messages(inputs: Inputs, keep: bool) -> tuple[Tensor, Tensor]:
    """As `_messages`."""
    e, weight, *_, shared = inputs
    channels = len(weight)
    for index in (inputs.source, inputs.target):  # machine code would read, and write, whatever is there
        if len(index) > 0 and not 0 <= int(index.min()) <= int(index.max()) < len(inputs.values):
            raise IndexError(f"edge_index: edges of atoms outside 0 to {len(inputs.values) - 1}")
    m = torch.zeros_like(inputs.values)
    kept = e.new_empty(len(inputs.source) if keep else 0, channels)
    common = e.new_empty(min(len(e), EDGES_PER_BLOCK), channels)
    knots = e.new_empty(0, channels) if inputs.knot_values is None else inputs.knot_values
    arrays = edge_kernels.arrays(m, kept, common, knots, inputs.nodes, *_of_edges(inputs))
    for rows, users in _users(len(e), shared, e.device):
        torch.mm(e[rows], weight.t(), out=common[: rows.stop - rows.start])
        for edges, _ in users:
            edge_kernels.run(edge_kernels.add_messages, channels, *arrays, rows.start, edges.start, edges.stop)
    return m, kept


def _fused_gradients(inputs: Inputs, kept: Tensor, grad_m: Tensor, *, with_edges: bool) -> list[Tensor | None]:
    """As `_gradients`."""
    e, weight, nodes, values, knot_values, *_, shared = inputs
    channels = len(weight)
    grad_e = torch.empty_like(e) if with_edges else None
    grad_weight = torch.zeros_like(weight, dtype=values.dtype)
    grad_nodes, grad_values = torch.zeros_like(nodes, dtype=values.dtype), torch.zeros_like(values)
    grad_knots = values.new_zeros(0 if knot_values is None else len(knot_values), channels)
    grad_common = values.new_empty(min(len(e), EDGES_PER_BLOCK), channels)
    arrays = edge_kernels.arrays(grad_common, grad_nodes, grad_values, grad_knots, kept, grad_m, *_of_edges(inputs))
    for rows, users in _users(len(e), shared, e.device):
        part = grad_common[: rows.stop - rows.start].zero_()
        for edges, _ in users:
            edge_kernels.run(edge_kernels.add_gradients, channels, *arrays, rows.start, edges.start, edges.stop)
        part = part.to(e.dtype)
        if grad_e is not None:
            torch.mm(part, weight, out=grad_e[rows])
        grad_weight += part.t() @ e[rows]
    return [
        grad_e,
        grad_weight.to(weight.dtype),
        grad_nodes.to(nodes.dtype),
        grad_values,
        None if knot_values is None else grad_knots.to(knot_values.dtype),
    ]


def _of_edges(inputs: Inputs) -> tuple[Tensor, ...]:
    """values, source, target, shared, near, share, as the kernels take them: nothing is an empty tensor."""
    none = inputs.source.new_empty(0)
    shared = none if inputs.shared is None else inputs.shared
    if inputs.near is None or inputs.knot_weight is None:
        near, share = none.int(), inputs.values.new_empty(0, 4)
    else:
        near, share = inputs.near[:, 0], inputs.knot_weight
    return inputs.values, inputs.source, inputs.target, shared, near, share
