"""Prepare OC20's S2EF download for training: folders of `*.extxyz(.xz)` and `*.txt(.xz)` to LMDB shards.

    python scripts/prepare_s2ef.py --data-path data/s2ef_raw/s2ef_train_2M/s2ef_train_2M \\
        --out-path data/s2ef/2M/train --num-workers 16

The same command finishes what was interrupted. Options are named as in OCP's `preprocess_ef.py`; unlike there, the
reference energy is subtracted unless `--no-ref-energy` is given.
"""

import argparse
import logging
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Prepare OC20's S2EF download for training.")
    parser.add_argument("--data-path", type=Path, required=True, help="folder of *.extxyz(.xz) and *.txt(.xz)")
    parser.add_argument("--out-path", type=Path, required=True, help="folder for the LMDB shards")
    parser.add_argument(
        "--ref-energy",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="store adsorption energies: the file's energy minus the reference energy (default: yes)",
    )
    parser.add_argument("--get-edges", action="store_true", help="store edges: about ten times the disk space")
    parser.add_argument("--test-data", action="store_true", help="store no energies and forces")
    parser.add_argument("--num-workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--chunk", type=int, help="input files per shard (default: as few as make at most 128 shards)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    from faenet_ocp.prepare.s2ef import Options, prepare  # not before: --help does not wait for torch

    options = Options(labels=not args.test_data, ref_energy=args.ref_energy, get_edges=args.get_edges)
    try:
        frames = prepare(args.data_path, args.out_path, options=options, num_workers=args.num_workers, chunk=args.chunk)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    logging.info("%s: %d frames", args.out_path, frames)


if __name__ == "__main__":
    main()
