"""Generate demo data (adsorbates on slabs, EMT energies) in OC20's LMDB layout, for IS2RE and S2EF.

    python scripts/make_demo_data.py [--output data/demo] [--num-train 1500] [--num-workers 2]

Interrupted, the same command goes on where it stopped. See `faenet_ocp.prepare.demo.generate`.
"""

import argparse
import logging
import os
import sys
import time
from dataclasses import fields
from pathlib import Path

from faenet_ocp.prepare.demo.generate import DemoSettings, make_demo_data


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, generate, and print what there is now."""
    defaults = {item.name: item.default for item in fields(DemoSettings)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/demo"), help="output folder")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="processes")
    for name, text in {
        "num_train": "training systems",
        "num_val": "systems in each of the four validation splits",
        "frames_per_system": "S2EF frames from each relaxation",
        "raw_frames": "frames of each split also written in the format of the S2EF download",
        "seed": "random seed",
    }.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=defaults[name], help=f"{text} (%(default)s)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    start = time.perf_counter()
    try:
        settings = DemoSettings(**{name: getattr(args, name) for name in defaults})
        summary = make_demo_data(args.output, settings, num_workers=args.num_workers)
    except (ValueError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    print("split         systems frames   mean  stdev | MAE of mean predictor, linear | discarded")
    for split, row in summary["splits"].items():
        print(
            f"{split:<13} {row['num_systems']:7d} {row['num_frames']:6d} {row['mean']:6.3f} "
            f"{row['stdev']:6.3f} | {row['mean_predictor_mae']:.3f}, {row['linear_mae']:.3f} | "
            + ", ".join(f"{count} {reason}" for reason, count in row["discarded"].items())
        )
    print(f"{args.output} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
