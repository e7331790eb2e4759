"""The paper's Table 8 from runs on QM9, one for each target and model, beside the paper's columns.

python scripts/qm9_table.py runs/qm9_u0 runs/qm9_gap runs/qm9_mu [--split test]
"""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Read the results of the runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or files of results (metrics.json)")
    parser.add_argument("--split", default="test", help="the split that is shown (default: test)")
    args = parser.parse_args(argv)
    from faenet_ocp.evaluation.qm9_table import render_qm9_table
    from faenet_ocp.evaluation.results import read_results

    try:
        results = [read_results(run / "results" / "metrics.json" if run.is_dir() else run) for run in args.runs]
        print(render_qm9_table(results, args.split), end="")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
