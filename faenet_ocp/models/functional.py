"""Functions that networks share: sums over atoms and edges, activation functions by name."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


def segment_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum the rows that share an index: (M, ...) and (M,) -> (size, ...); zero where none does.

    With a sorted index `index_add` is faster on a CPU than `torch.segment_reduce`, and unlike it, it can be
    differentiated twice, which a loss on -dE/dX needs.
    """
    return values.new_zeros(size, *values.shape[1:]).index_add(0, index, values)


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
