"""Generate demo data (adsorbates on slabs, EMT energies) in OC20's LMDB layout, for IS2RE and S2EF.

    python scripts/make_demo_data.py [--output data/demo] [--num-train 1500] [--num-workers 2]

Data of the same settings that is there already is kept. See `faenet_ocp.prepare.demo.generate`. Or molecules, with
energies and forces of GFN2-xTB in QM7-X's HDF5 files (needs `pip install 'faenet-ocp[demo-molecules]'`):

    python scripts/make_demo_data.py --molecules
    python scripts/prepare_qm7x.py --data-path data/demo_molecules/hdf5 --out-path data/demo_molecules
"""

import argparse
import logging
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, generate, and print what there is now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="output folder (data/demo, or data/demo_molecules/hdf5)")
    parser.add_argument("--molecules", action="store_true", help="molecules in QM7-X's files instead of OC20's")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--num-train", type=int, default=1500, help="training systems (%(default)s)")
    parser.add_argument("--num-val", type=int, default=200, help="systems in each validation split (%(default)s)")
    parser.add_argument("--frames-per-system", type=int, default=4, help="S2EF frames of a relaxation (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    args = vars(parser.parse_args(argv))
    output, num_workers = args.pop("output"), args.pop("num_workers")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.pop("molecules"):
        given = [
            name for name in ("num_train", "num_val", "frames_per_system") if args[name] != parser.get_default(name)
        ]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} has no meaning with --molecules")
        return _make_molecules(output or Path("data/demo_molecules/hdf5"), args["seed"], num_workers)
    from faenet_ocp.prepare.demo.generate import DemoSettings, make_demo_data  # not before: --help does not wait

    try:
        summary = make_demo_data(output or Path("data/demo"), DemoSettings(**args), num_workers=num_workers)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    for split, size in summary["splits"].items():
        print(f"{split:<13} {size['num_systems']:5d} systems {size['num_frames']:5d} S2EF frames")


def _make_molecules(output: Path, seed: int, num_workers: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before tblite is loaded: processes, not threads
    from faenet_ocp.prepare.demo.molecules import MoleculeSettings, make_molecules

    try:
        counts = make_molecules(output, MoleculeSettings(seed=seed), num_workers=num_workers)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"{output}: {counts['molecules']} molecules, {counts['structures']} structures (GFN2-xTB; not QM7-X)")


if __name__ == "__main__":
    main()
