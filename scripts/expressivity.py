"""Trains small networks to tell pairs of graphs apart: the paper's Tables 3 to 5, by frames and by network.

    python scripts/expressivity.py --out expressivity.json [--seeds 10] [--num-workers 2]

Goes on with what OUT holds already; writes a table (.md) beside it. See `faenet_ocp.evidence.expressivity`.
"""

import argparse
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--seeds", type=int, default=10, help="networks for each pair and row (%(default)s)")
    parser.add_argument("--epochs", type=int, default=100, help="of each (%(default)s, the protocol's)")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: processes, not threads
    from faenet_ocp.evidence.expressivity_table import run

    try:
        table = run(args.out, seeds=args.seeds, epochs=args.epochs, num_workers=args.num_workers)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table, end="")


if __name__ == "__main__":
    main()
