"""Prepare QM9: one packed file with its 12 targets, and index files of the paper's splits.

    pip install 'faenet-ocp[qm9]' && python scripts/prepare_qm9.py --out-path data/qm9
    python scripts/prepare_qm9.py --out-path data/qm9 --raw-path <folder of gdb9.sdf or of dsgdb9nsd_*.xyz>

The same command finishes what was interrupted.
"""

import argparse
import logging
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Prepare QM9.")
    parser.add_argument("--out-path", type=Path, required=True, help="folder for the packed file and the splits")
    parser.add_argument("--raw-path", type=Path, help="folder with gdb9.sdf and gdb9.sdf.csv, or dsgdb9nsd_*.xyz")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    from faenet_ocp.prepare.qm9 import prepare  # not before: --help does not wait for torch

    try:
        count = prepare(args.out_path, args.raw_path)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    logging.info("%s: %d molecules", args.out_path, count)


if __name__ == "__main__":
    main()
