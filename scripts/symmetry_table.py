"""Runs side by side: error, and how symmetric each is in each kind of frames.

python main.py --mode symmetry --checkpoint runs/a/checkpoints/best.pt --identifier a_symmetry     # for each run
python scripts/symmetry_table.py runs/a_symmetry runs/b_symmetry [--output symmetry_runs.json]
"""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Read the results of the runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that --mode symmetry has made")
    parser.add_argument("--output", type=Path, help="JSON of all that the table shows")
    args = parser.parse_args(argv)
    from faenet_ocp.common.files import write_json
    from faenet_ocp.evidence.symmetry_runs import read_run, render_runs

    try:
        runs = [read_run(run) for run in args.runs]
        print(render_runs(runs), end="")
        if args.output is not None:
            write_json(args.output, {run.name: {"results": run.results, "symmetry": run.symmetry} for run in runs})
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
