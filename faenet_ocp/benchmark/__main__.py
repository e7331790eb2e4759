"""Measure FAENet beside the published package and all other models, on the same batches in the same run.

    python -m faenet_ocp.benchmark --output cpu.json
    python -m faenet_ocp.benchmark --device cuda --output cuda.json
    python -m faenet_ocp.benchmark --quick --output quick.json      # small networks: a check that all of it runs
    python -m faenet_ocp.benchmark gpu --output gpu.json            # what a GPU has to tell, see `gpu`

Writes OUTPUT (raw times, settings, versions) and, beside it, tables (.md).
`python main.py --mode benchmark` takes the same arguments.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes the files and prints the tables.

    Raises:
        ValueError, OSError: something cannot be measured, read or written; says what.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["gpu"]:
        from faenet_ocp.benchmark import gpu

        gpu.main(arguments[1:])
        return

    # Not before: the first part of `gpu` does without fairchem-core.
    from faenet_ocp.benchmark.report import markdown
    from faenet_ocp.benchmark.suite import GROUPS, QUICK, Settings, run
    from faenet_ocp.common.files import write_json, write_text

    parser = argparse.ArgumentParser(prog="python -m faenet_ocp.benchmark", description="Measure FAENet beside others.")
    add = parser.add_argument
    add("--output", type=Path, required=True, help="JSON to write; tables (.md) go beside it")
    add("--threads", type=int, default=1, help="of a CPU (default 1: least disturbed by others)")
    add("--quick", action="store_true", help="small networks and batches, one round")
    # From here on names and defaults are those of Settings.
    add("--device", choices=["cpu", "cuda"], help="default: cpu")
    add("--groups", nargs="+", choices=GROUPS, help="default: all")
    add("--rounds", type=int, help="how often each row is timed")
    add("--batch-size", type=int)
    add("--batch-sizes", type=int, nargs="+")
    add("--system-sizes", type=int, nargs="+")
    add(
        "--counts",
        type=int,
        nargs="+",
        help="records of a file (12 kB each, in the temporary folder), systems of an evaluation",
    )
    add("--keep-subsurface", action="store_false", default=None, dest="remove_subsurface", help="the atoms of tag 0")
    add("--lmdb", type=Path, help="systems of this LMDB instead of generated slabs")
    args = vars(parser.parse_args(arguments))
    output, threads, quick = (args.pop(name) for name in ("output", "threads", "quick"))
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in args.items() if value is not None
    }
    settings = dataclasses.replace(QUICK if quick else Settings(), **given)

    def save(result: dict[str, Any]) -> None:
        write_json(output, result)
        write_text(output.with_suffix(".md"), markdown(result))

    output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    sys.stdout.write(markdown(run(settings, save=save)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
