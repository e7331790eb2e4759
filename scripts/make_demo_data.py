"""Generate demo data (adsorbates on slabs, EMT energies) in OC20's LMDB layout, for IS2RE and S2EF.

    python scripts/make_demo_data.py [--output data/demo] [--num-train 1500] [--num-workers 2]

Data of the same settings that is there already is kept. See `faenet_ocp.prepare.demo.generate`.
"""

import argparse
import logging
import os
import sys
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
        "seed": "random seed",
    }.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=defaults[name], help=f"{text} (%(default)s)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = DemoSettings(**{name: getattr(args, name) for name in defaults})
        summary = make_demo_data(args.output, settings, num_workers=args.num_workers)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    for split, size in summary["splits"].items():
        print(f"{split:<13} {size['num_systems']:5d} systems {size['num_frames']:5d} S2EF frames")


if __name__ == "__main__":
    main()
