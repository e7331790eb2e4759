"""What the terminal shows: our lines, and of the libraries around us only warnings."""

import importlib.abc
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from types import ModuleType

_NO_DRIVER = b"Warp CUDA warning: Could not find or load the NVIDIA CUDA driver"
_NVIDIA = "0x10de"


def set_up_logging(*, dates: bool = False, force: bool = False, level: int = logging.INFO) -> None:
    """Plain lines of ours, from this level on; of the host's only warnings, whose start-up would bury them."""
    handler = logging.StreamHandler()
    handler.setLevel(level)
    datefmt = "%Y-%m-%d %H:%M:%S" if dates else "%H:%M:%S"
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt=datefmt))
    handler.addFilter(
        lambda record: record.levelno >= logging.WARNING or os.sep + "faenet_ocp" + os.sep in record.pathname
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=force)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)  # fairchem's own call


def expect_no_driver() -> None:
    """Where there is no NVIDIA GPU, nobody has to be told that its driver is missing.

    fairchem imports nvalchemiops, which starts NVIDIA's Warp, whose C code says so on stderr, whatever its log level.
    """
    if sys.platform == "linux" and not _has_gpu():
        sys.meta_path.insert(0, _WarpStarter())


def _has_gpu() -> bool:
    """Whether there is one, with or without a driver that works."""
    vendors = glob("/sys/bus/pci/devices/*/vendor")
    return bool(glob("/dev/nvidia*")) or any(Path(path).read_text().strip() == _NVIDIA for path in vendors)


class _WarpStarter(importlib.abc.MetaPathFinder):
    """Starts Warp when nvalchemiops is about to be imported, as that would, without the one line; finds no module."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name != "nvalchemiops":
            return
        sys.meta_path.remove(self)
        try:
            import warp
        except ImportError:  # nvalchemiops will say so
            return
        warp.config.log_level = warp.LOG_WARNING
        sys.stderr.flush()
        stderr = os.dup(2)
        try:
            with tempfile.TemporaryFile() as said:
                os.dup2(said.fileno(), 2)
                try:
                    warp.init()
                finally:
                    os.dup2(stderr, 2)
                said.seek(0)
                os.write(2, b"".join(line for line in said if not line.startswith(_NO_DRIVER)))
        finally:
            os.close(stderr)
