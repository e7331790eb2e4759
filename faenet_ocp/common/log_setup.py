"""What the terminal shows: our lines, and of the libraries around us only warnings."""

import logging
import os
import warnings


def set_up_logging(*, dates: bool = False, force: bool = False) -> None:
    """Plain lines of ours; of the host's only warnings, whose start-up would bury them."""
    handler = logging.StreamHandler()
    datefmt = "%Y-%m-%d %H:%M:%S" if dates else "%H:%M:%S"
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt=datefmt))
    handler.addFilter(
        lambda record: record.levelno >= logging.WARNING or os.sep + "faenet_ocp" + os.sep in record.pathname
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=force)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)  # fairchem's own call
