#!/usr/bin/env python
"""What `optim.balance: atoms` saves on a data set: how much longer than the mean the rank with most atoms works.

    python scripts/balance_report.py --src data/demo/is2re/all/train --batch-size 64 --ranks 2 4 8

Prints, for each number of ranks, the atoms of the fullest rank above the mean of all, averaged over the steps of an
epoch: the share of the time that the other ranks wait, as far as time goes with atoms.
"""

import argparse
import sys
from typing import Any


def main() -> int:
    """Runs the command line; 2 for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", required=True, help="LMDB file, folder or glob")
    parser.add_argument("--batch-size", type=int, default=64, help="systems over all ranks together")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    flags = parser.parse_args()
    from faenet_ocp.data.oc20 import OC20LmdbDataset  # not before: --help does not wait for torch

    try:
        sizes = OC20LmdbDataset({"src": flags.src, "labels": [], "edges": "none"}).natoms()
        rows = [
            (ranks, *(_excess(sizes, flags.batch_size, ranks, on) for on in (False, True))) for ranks in flags.ranks
        ]
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{len(sizes):,} systems of {sizes.min()} to {sizes.max()} atoms, batch {flags.batch_size}\n")
    for ranks, without, balanced in rows:
        sys.stdout.write(f"{ranks:3d} ranks: {without:.1%} without, {balanced:.1%} with balance\n")
    return 0


def _excess(sizes: Any, batch_size: int, ranks: int, balance: bool) -> float:
    import numpy as np

    from faenet_ocp.data.loader import TrainBatchSampler

    samplers = [
        TrainBatchSampler(len(sizes), batch_size, seed=0, rank=rank, world_size=ranks, sizes=sizes if balance else None)
        for rank in range(ranks)
    ]
    atoms = np.array([[sizes[[index for _, index in batch]].sum() for batch in sampler] for sampler in samplers])
    return float((atoms.max(axis=0) / atoms.mean(axis=0)).mean() - 1)


if __name__ == "__main__":
    sys.exit(main())
