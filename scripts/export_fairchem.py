"""Write a checkpoint in the format of fairchem's own predict unit and FAIRChemCalculator.

    python scripts/export_fairchem.py --checkpoint runs/NAME/checkpoints/best.pt --output faenet_fairchem.pt

Load it with `FAIRChemCalculator(load_predict_unit("faenet_fairchem.pt", "batch", device="cpu"))`. The head of
`faenet_ocp/fairchem_export.py` says where its results differ from those of `FAENetCalculator`.
"""

import argparse
import sys
from pathlib import Path

from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.fairchem_export import export_fairchem
from faenet_ocp.frames import METHODS


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Write a checkpoint in fairchem's inference format.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--frames", choices=METHODS, help="default: the checkpoint's, canonical instead of stochastic")
    args = parser.parse_args(argv)
    try:
        export_fairchem(load_checkpoint(args.checkpoint), args.output, frames=args.frames)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{args.output}\n")


if __name__ == "__main__":
    main()
