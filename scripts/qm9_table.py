"""The paper's Table 8 from runs on QM9, one for each target and model, beside the paper's columns.

    python scripts/qm9_table.py runs/qm9_U0 runs/qm9_gap runs/qm9_mu [--split test]

With --curve also the error against the number of training molecules, from runs of one target:

    python scripts/qm9_table.py runs/qm9_U0 --curve 1000=runs/u0_1k 10000=runs/u0_10k --plot curve.png
"""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Read the results of the runs and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or files of results (metrics.json)")
    parser.add_argument("--split", default="test", help="the split that is shown (default: test)")
    parser.add_argument("--curve", nargs="+", default=[], metavar="NUMBER=RUN", help="training molecules and their run")
    parser.add_argument("--plot", type=Path, help="PNG of the curve")
    args = parser.parse_args(argv)
    if args.plot is not None and not args.curve:
        parser.error("--plot draws the runs of --curve; give these too")
    from faenet_ocp.evaluation.qm9_table import plot_curve, render_curve, render_qm9_table
    from faenet_ocp.evaluation.results import read_results

    def read(run: str | Path) -> dict:
        path = Path(run)
        return read_results(path / "results" / "metrics.json" if path.is_dir() else path)

    try:
        print(render_qm9_table([read(run) for run in args.runs], args.split), end="")
        if args.curve:
            pairs = [entry.partition("=") for entry in args.curve]
            wrong = [number for number, _, run in pairs if not (number.isdecimal() and run)]
            if wrong:
                raise ValueError(f"--curve {wrong[0]}: expected the number of training molecules, =, and a run")
            curve = {int(number): read(run) for number, _, run in pairs}
            print("\n" + render_curve(curve, args.split), end="")
            if args.plot is not None:
                plot_curve(curve, args.plot, args.split)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
