"""Joins the predictions of the four test splits into the one file that OC20's leaderboard takes.

    python scripts/make_submission.py --task s2ef --predictions runs/RUN/results/predictions --out submission.npz

With `--sources`, the ids of each split's LMDB are compared with the file's: each has to be there exactly once.
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Runs the command line; 2 for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("is2re", "s2ef"), required=True)
    parser.add_argument("--predictions", type=Path, required=True, help="folder with <split>.npz")
    parser.add_argument(
        "--splits", default="test_id,test_ood_ads,test_ood_cat,test_ood_both", help="names of the files"
    )
    parser.add_argument("--sources", help="LMDBs of the splits in that order, comma separated, to check ids against")
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    from faenet_ocp.evaluation.submission import make_submission  # not before: --help does not wait for torch

    sources = flags.sources.split(",") if flags.sources else None
    try:
        counts = make_submission(flags.task, flags.predictions, flags.splits.split(","), flags.out, sources=sources)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for split, count in counts.items():
        sys.stdout.write(f"{split}: {count} systems\n")
    sys.stdout.write(f"written: {flags.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
