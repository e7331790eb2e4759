"""The command's first lines: Ctrl-C ends it with status 130 also while torch and fairchem are imported, for seconds.

Nothing has been written by then. Training has handlers of its own (`local_ranks`). Ranks and other processes that are
spawned run the command's main module, and with it this one, before all else.
"""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """`cli.main` with the arguments of the command line."""
    from faenet_ocp.launch import cli

    return cli.main()


def _stop(signum: int, _frame: FrameType | None) -> None:
    """An exception could be swallowed, or turned into another one, by whatever is being imported."""
    if "--multiprocessing-fork" not in sys.orig_argv:
        os.write(2, b"stopped\n")
    os._exit(128 + signum)


signal.signal(signal.SIGINT, _stop)
