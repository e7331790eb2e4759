"""Functions compiled by numba, which fairchem-core needs as well: nothing is built when the package is installed.

The code is kept beside the source, in the user's cache folder where that cannot be written, or in `NUMBA_CACHE_DIR`;
where none of these can be written, every process compiles anew.
"""

import logging
import multiprocessing
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core import event


class _Announcement(event.Listener):
    """Says once, in the process that the user has started, that the first use takes longer than others."""

    said = False

    def on_start(self, event: event.Event) -> None:
        """numba has not found a function in its cache and is about to compile it."""
        ours = event.data["dispatcher"].py_func.__module__.startswith("faenet_ocp.")
        if ours and not self.said and multiprocessing.parent_process() is None:
            self.said = True
            logging.info("compiling functions for this machine, once: about ten seconds; they are kept for later runs")

    def on_end(self, event: event.Event) -> None:
        """Nothing to say."""


event.register("numba:compile", _Announcement())


def compiled(signature: Any = None, *, fused: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function to be compiled: now for the types of `signature`, else for those of its first call.

    Floating-point operations are done as they are written, division by zero is as in numpy, and the interpreter's lock
    is released.

    Args:
        signature: of numba.
        fused: a product and the sum it goes into may be one operation, rounded once: faster, and not less exact.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    if fused:
        options["fastmath"] = {"contract"}

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(signature, cache=True, **options)(function)
        except (RuntimeError, OSError):  # there is no folder to keep it in
            return njit(signature, **options)(function)

    return decorate
