"""Measure FAENet beside the published package, SchNet and fairchem's eSCN-MD, on the same batches in the same run.

    python scripts/benchmark.py --output docs/benchmarks/cpu.json
    python scripts/benchmark.py --device cuda --output cuda.json
    python scripts/benchmark.py --quick --output quick.json        # small networks: a check that all of it runs

Writes OUTPUT (raw times, settings, versions), and beside it tables (.md) and, of the peers, a picture (.png).
"""

import sys

from faenet_ocp.benchmark.command import main

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
