"""Sums over atoms and edges."""

from collections.abc import Callable

from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def segment_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum the rows that share an index: (M, ...) and (M,) -> (size, ...); zero where none does.

    With a sorted index `index_add` is faster on a CPU than `torch.segment_reduce`, and unlike it, it can be
    differentiated twice, which a loss on -dE/dX needs.
    """
    return values.new_zeros(size, *values.shape[1:]).index_add(0, index, values)
