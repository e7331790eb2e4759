"""Functions that networks share: sums over atoms and edges, activation functions by name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


def segment_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum the rows that share an index: (M, ...) and (M,) -> (size, ...); zero where none does.

    With a sorted index `index_add` is faster on a CPU than `torch.segment_reduce`, and unlike it, it can be
    differentiated twice, which a loss on -dE/dX needs.
    """
    return _SegmentSum.apply(values, index, size)


class _SegmentSum(torch.autograd.Function):
    """`index_add`, which by itself keeps all that it has summed up until its gradient is taken."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        return values.new_zeros(size, *values.shape[1:]).index_add_(0, index, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


ACTIVATIONS: dict[str, Activation] = {
    "swish": functional.silu,
    "silu": functional.silu,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "gelu": functional.gelu,
    "softplus": functional.softplus,
    "tanh": functional.tanh,
}
