"""Relax structures with the forces of a checkpoint, many at a time.

    python scripts/relax.py --checkpoint runs/NAME/checkpoints/best.pt --input data/is2re/all/val_id/data.lmdb \\
        --output relaxed/val_id

The input is an OC20 LMDB (file or folder) or any file that ASE reads, with OC20's tags and with fixed atoms in a
FixAtoms constraint. The output folder gets `relaxed.extxyz` and `metrics.json`; the same command goes on where it was
interrupted. Where the relaxed structures are known (`y_relaxed`, `pos_relaxed`, as in OC20's IS2RE training and
validation files) the metrics say how close the relaxed energies and positions come to them.
"""

import argparse
import hashlib
import json
import logging
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Relax structures with the forces of a checkpoint.")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="checkpoint of task s2ef")
    add("--input", required=True, help="LMDB file, folder of LMDB files, or a file that ASE reads")
    add("--output", type=Path, required=True, help="folder for the results")
    add("--fmax", type=float, default=0.03, help="largest force of a relaxed structure, eV/A (default: 0.03, as OC20)")
    add("--max-steps", type=int, default=300, help="of one structure (default: 300)")
    add("--max-step", type=float, default=0.2, help="longest step of an atom, A (default: 0.2)")
    add("--batch-size", type=int, default=32, help="structures in a model call (default: 32)")
    add(
        "--frames",
        choices=("canonical", "full", "det", "none"),  # not stochastic: forces have to be functions of the positions
        help="default: what the checkpoint is evaluated with, canonical instead of stochastic",
    )
    add("--forces", choices=("prediction", "energy_gradient"), help="default: what the checkpoint is evaluated with")
    add("--precision", choices=("float32", "float64"), help="default: the checkpoint's")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--keep-net-force", action="store_true", help="do not take the mean force out where no fixed atom is seen")
    add("--trajectories", action="store_true", help="keep the path of each structure (trajectories/<index>.traj)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    # Not before: --help does not wait for torch.
    from faenet_ocp import Predictor, load_checkpoint
    from faenet_ocp.inference.relaxation_run import METRICS, open_structures, run

    try:
        predictor = Predictor(
            load_checkpoint(args.checkpoint),
            device=args.device,
            frames=args.frames,
            forces=args.forces,
            precision=args.precision,
            keep_net_force=args.keep_net_force,
        )
        metrics = run(
            open_structures(args.input),
            predictor,
            args.output,
            settings={
                "checkpoint_sha256": hashlib.sha256(args.checkpoint.read_bytes()).hexdigest(),
                "input": str(Path(args.input).resolve()),
                "frames": predictor.config.frames.evaluation_method,
                "forces": "energy_gradient" if predictor.conservative else "prediction",
                "precision": predictor.config.job.precision,
                "keep_net_force": args.keep_net_force,
                **{name: getattr(args, name) for name in ("fmax", "max_steps", "max_step")},
            },
            batch_size=args.batch_size,
            keep_trajectories=args.trajectories,
        )
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{json.dumps(metrics, indent=2)}\nresults: {args.output / METRICS}\n")


if __name__ == "__main__":
    main()
