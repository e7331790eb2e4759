"""Prepare QM7-X (1000.hdf5 to 8000.hdf5, unpacked) for training: packed files of train, val_known and val_unknown.

    python scripts/prepare_qm7x.py --data-path qm7x_hdf5 --out-path data/qm7x --num-workers 8

The same command finishes what was interrupted. Needs `pip install 'faenet-ocp[qm7x]'`.
"""

import argparse
import logging
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="folder of 1000.hdf5 to 8000.hdf5")
    parser.add_argument("--out-path", type=Path, required=True, help="folder for the packed files")
    parser.add_argument("--duplicates", type=Path, help="DupMols.dat: leave these geometries out (default: keep all)")
    parser.add_argument("--seed", type=int, default=0, help="of the split into train and val_known (default: 0)")
    parser.add_argument("--num-workers", type=int, default=1, help="processes (default: 1)")
    args = vars(parser.parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    from faenet_ocp.prepare.qm7x import prepare  # not before: --help does not wait for torch

    try:
        counts = prepare(args.pop("data_path"), args.pop("out_path"), **args)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    for split, count in counts.items():
        print(f"{split:<12} {count:9,d} structures")


if __name__ == "__main__":
    main()
