"""Relax structures with the forces of a checkpoint, many at a time.

    python scripts/relax.py --checkpoint runs/NAME/checkpoints/best.pt --input data/is2re/all/val_id/data.lmdb \\
        --output relaxed/val_id

The input is an OC20 LMDB (file or folder), or files that ASE reads (also a folder of POSCARs, a glob), with OC20's
tags (or see --tags and --adsorbate) and with fixed atoms in a constraint. The output folder gets `relaxed.extxyz`, in
the order of the input, and `metrics.json`; the same command goes on where it was interrupted. Where the relaxed
structures are known (`y_relaxed`, `pos_relaxed`, as in OC20's IS2RE training and validation files) the metrics say how
close the relaxed energies and positions come to them. With `--max-steps 0` the results are energies and forces of the
structures as they are.

Structures that cannot be used are left out and listed in `metrics.json` (`left_out`: index, sid, reason), and the exit
status is 3. With `--strict` the first of them is an error.
"""

import argparse
import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Relax structures with the forces of a checkpoint.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint of task s2ef (of any with --max-steps 0), or its run's folder")
    add("--input", required=True, nargs="+", help="LMDBs or files that ASE reads: files, folders, globs")
    add("--output", required=True, help="folder for the results")
    add("--fmax", type=float, default=0.03, help="largest force of a relaxed structure, eV/A (default: 0.03, as OC20)")
    add(
        "--max-steps", type=int, default=300, help="of one structure (default: 300; 0: energies and forces as they are)"
    )
    add("--max-step", type=float, default=0.2, help="longest step of an atom, A (default: 0.2)")
    add("--batch-size", type=int, default=32, help="structures in a model call (default: 32)")
    add(
        "--frames",
        choices=("canonical", "full", "det", "none"),  # not stochastic: forces have to be functions of the positions
        help="default: what the checkpoint is evaluated with, canonical instead of stochastic",
    )
    add("--forces", choices=("prediction", "energy_gradient"), help="default: what the checkpoint is evaluated with")
    add(
        "--tags",
        choices=("file", "fixed", "none"),
        help="OC20's tags: of the structures, 0 for fixed atoms and 1 for others, or none; default: as the model needs",
    )
    add("--adsorbate", nargs="+", help="atoms that get tag 2: indices, or `metal` for all that a metal slab has not")
    add("--precision", choices=("float32", "float64"), help="default: the checkpoint's")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--keep-net-force", action="store_true", help="do not take the mean force out where no fixed atom is seen")
    add("--trajectories", action="store_true", help="keep the path of each structure (trajectories/<index>.traj)")
    add("--strict", action="store_true", help="end with an error at a structure that cannot be used")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        metrics, where = _relax(args)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command goes on from here\n")
        sys.exit(130)
    sys.stdout.write(f"{json.dumps(metrics, indent=2)}\nresults: {where}\n")
    if metrics["left_out"]:
        sys.stderr.write(f"{len(metrics['left_out'])} structures could not be used and are left out, see {where}\n")
        sys.exit(3)


def _relax(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    # Not before: --help does not wait for torch.
    from faenet_ocp.common.files import expand_path
    from faenet_ocp.inference.predictor import Predictor, checkpoint_file
    from faenet_ocp.inference.relaxation_run import METRICS, run
    from faenet_ocp.inference.structures import open_structures

    checkpoint, output = checkpoint_file(args.checkpoint), Path(expand_path(args.output))
    names = ("device", "frames", "forces", "precision", "tags", "keep_net_force")
    adsorbate = _adsorbate(args.adsorbate)
    predictor = Predictor(checkpoint, adsorbate=adsorbate, **{name: getattr(args, name) for name in names})
    metrics = run(
        open_structures(args.input),
        predictor,
        output,
        settings={
            "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
            "frames": predictor.config.frames.evaluation_method,
            "forces": "energy_gradient" if predictor.conservative else "prediction",
            "precision": predictor.config.job.precision,
            "keep_net_force": args.keep_net_force,
            **({"tags": predictor.tags, "adsorbate": adsorbate} if args.tags or args.adsorbate else {}),
            **{name: getattr(args, name) for name in ("fmax", "max_steps", "max_step")},
        },
        batch_size=args.batch_size,
        keep_trajectories=args.trajectories,
        strict=args.strict,
    )
    return metrics, output / METRICS


def _adsorbate(given: list[str] | None) -> str | list[int] | None:
    if given is None or given == ["metal"]:
        return given[0] if given else None
    try:
        return [int(index) for index in given]
    except ValueError:
        raise ValueError(f"--adsorbate: expected indices of atoms or `metal`, got {' '.join(given)}") from None


if __name__ == "__main__":
    main()
