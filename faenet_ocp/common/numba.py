"""Functions compiled by numba, which fairchem-core needs as well: nothing is built when the package is installed.

The code is kept beside the source, in the user's cache folder where that cannot be written, or in `NUMBA_CACHE_DIR`;
where none of these can be written, every process compiles anew.
"""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(signature: Any = None) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function to be compiled: now for the types of `signature`, else for those of its first call.

    Floating-point operations are done as they are written, division by zero is as in numpy, and the interpreter's lock
    is released.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(signature, cache=True, **options)(function)
        except (RuntimeError, OSError):  # there is no folder to keep it in
            return njit(signature, **options)(function)

    return decorate
