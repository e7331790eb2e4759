"""Checks of options and records: what is wrong, where, what is allowed, the nearest match."""

import difflib
import inspect
from collections.abc import Iterable, Sequence
from typing import TypeVar

Choice = TypeVar("Choice", str, int)


class RecordError(ValueError):
    """A record that cannot be read or used, or that asks for something a record has no business with."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """'; did you mean X?' or the list of what is allowed, for error messages."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; allowed: {', '.join(names) or 'none'}"


def choice(key: str, value: object, allowed: Sequence[Choice]) -> Choice:
    """Return `value` if it is one of `allowed`, in value and type.

    Raises:
        ValueError: naming the key, the value, the allowed values and the nearest of them.
    """
    for option in allowed:
        if type(value) is type(option) and value == option:
            return option
    names = [str(option) for option in allowed]
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{key}: {value!r} is not one of {', '.join(names)}{hint}")


def parameters(cls: type) -> set[str] | None:
    """Names that a constructor takes, None if it takes any."""
    found = inspect.signature(cls).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in found):
        return None
    return {parameter.name for parameter in found}


def switched_off(value: object) -> bool:
    """Whether an option that takes names is switched off: false, null or an empty text."""
    return value is False or value is None or value == ""


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
