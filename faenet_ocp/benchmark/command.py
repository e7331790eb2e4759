"""The command line of the benchmark: `python main.py --mode benchmark ...` and `python scripts/benchmark.py ...`."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from faenet_ocp.benchmark.report import draw, markdown
from faenet_ocp.benchmark.suite import GROUPS, QUICK, Settings, run


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes the files and prints the tables.

    Raises:
        ValueError, OSError: something cannot be measured, read or written; says what.
    """
    parser = argparse.ArgumentParser(description="Measure FAENet beside other models.")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write; .md and .png go beside it")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default 1: least disturbed by others)")
    parser.add_argument("--quick", action="store_true", help="small networks and batches, one round")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, help="default: all")
    parser.add_argument("--rounds", type=int, help="how often each row is timed")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    parser.add_argument("--system-sizes", type=int, nargs="+")
    parser.add_argument("--keep-subsurface", action="store_true", help="with the atoms of tag 0")
    parser.add_argument("--lmdb", type=Path, help="systems of this LMDB instead of generated slabs")
    args = parser.parse_args(argv)
    given = {
        "groups": args.groups and tuple(args.groups),
        "rounds": args.rounds,
        "batch_size": args.batch_size,
        "batch_sizes": args.batch_sizes and tuple(args.batch_sizes),
        "system_sizes": args.system_sizes and tuple(args.system_sizes),
        "lmdb": args.lmdb,
        "remove_subsurface": False if args.keep_subsurface else None,
        "device": args.device,
    }
    settings = dataclasses.replace(
        QUICK if args.quick else Settings(), **{name: value for name, value in given.items() if value is not None}
    )
    torch.set_num_threads(args.threads)
    result = run(settings, save=lambda result: _save(result, args.output))
    sys.stdout.write(markdown(result) + "\n")


def _save(result: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(result))
    draw(result, output.with_suffix(".png"))
