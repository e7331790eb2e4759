"""Checks of the networks' options: what is wrong, where, what is allowed, the nearest match."""

import difflib
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.nn import functional

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "swish": functional.silu,
    "silu": functional.silu,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "gelu": functional.gelu,
    "softplus": functional.softplus,
    "tanh": functional.tanh,
}


def choice(key: str, value: object, allowed: Sequence[str]) -> str:
    """Return `value` if it is one of `allowed`.

    Raises:
        ValueError: naming the key, the value, the allowed values and the nearest of them.
    """
    if isinstance(value, str) and value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{key}: {value!r} is not one of {', '.join(allowed)}{hint}")


def switched_off(value: object) -> bool:
    """Whether an option that takes names is switched off: false, null or an empty text."""
    return value is False or value is None or value == ""


def activation(key: str, value: object) -> Callable[[Tensor], Tensor]:
    """Return the activation function of this name."""
    return ACTIVATIONS[choice(key, value, tuple(ACTIVATIONS))]


def flag(key: str, value: object) -> bool:
    """Return `value` if it is true or false."""
    if isinstance(value, bool):
        return value
    raise ValueError(f"{key}: {value!r} is not true or false")


def positive(key: str, value: object) -> float:
    """Return `value` if it is a number above zero."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError(f"{key}: {value!r} is not a positive number")


def whole_number(key: str, value: object, *, minimum: int) -> int:
    """Return `value` if it is a whole number, at least `minimum`."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
        return value
    raise ValueError(f"{key}: {value!r} is not a whole number of at least {minimum}")
