"""Several runs side by side: how accurate each is, and how symmetric in each kind of frames (`--mode symmetry`)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from faenet_ocp.evaluation.results import read_results
from faenet_ocp.evaluation.tables import padded
from faenet_ocp.evidence.symmetry import METHODS
from faenet_ocp.targets import targets_of


class SymmetryOfRun(NamedTuple):
    """Results of a run, and what `--mode symmetry` found of its checkpoint."""

    name: str
    results: dict[str, Any]
    symmetry: dict[str, Any]


def read_run(folder: Path) -> SymmetryOfRun:
    """What `--mode symmetry` has left in a folder, and the results of the run whose checkpoint it was about.

    Raises:
        ValueError: one is missing; says what makes it.
    """
    found = folder / "results" / "symmetry.json"
    if not found.is_file():
        raise ValueError(f"{folder}: has no results/{found.name}; name folders that --mode symmetry has made")
    symmetry = json.loads(found.read_text())
    run = Path(symmetry["checkpoint"]).parent.parent
    if not (results := run / "results" / "metrics.json").is_file():
        raise ValueError(f"{folder}: is about {symmetry['checkpoint']}, but {results} is missing (--mode validate)")
    return SymmetryOfRun(run.name, read_results(results), symmetry)


def render_runs(runs: Sequence[SymmetryOfRun]) -> str:
    """Markdown: a table for each target of all runs.

    Args:
        runs: on the same data.

    Raises:
        ValueError: different data, splits or targets.
    """
    kinds = {(run.symmetry["task"], run.symmetry["dataset"], run.symmetry["split"]) for run in runs}
    if len(kinds) != 1:
        shown = "; ".join(" ".join(kind) for kind in sorted(kinds))
        raise ValueError(f"runs of different tasks, data or splits cannot be compared: {shown or 'there are none'}")
    first = runs[0].symmetry
    parts = [f"Data: {first['dataset']}, split {first['split']}, {first['num_systems']:,} systems"]
    for target in targets_of(runs[0].results["units"], runs[0].results["task"]):
        name, metric = target.name, target.metrics[0]
        lines = [["Run", "trained in", "evaluated in", metric.header, *_heads(runs, name)]]
        for run in runs:
            values = run.results["average"] or run.results["splits"][first["split"]]
            frames = run.symmetry["trained_with"].replace("dim ", "").replace("group ", "")
            own = run.symmetry["frames"]["method"]
            lines.append(
                [run.name, frames, own, metric.text(values[metric.name]), *_cells(run.symmetry, _methods(runs), name)]
            )
        parts.append(padded(lines))
    return "\n\n".join([*parts, _NOTE]) + "\n"


def _methods(runs: Sequence[SymmetryOfRun]) -> list[str]:
    return [method for method in METHODS if any(method in run.symmetry["methods"] for run in runs)]


def _heads(runs: Sequence[SymmetryOfRun], name: str) -> list[str]:
    unit, methods = runs[0].symmetry["units"][name], _methods(runs)
    heads = [f"{title} [m{unit}]: {methods[0]}" for title in ("Rot", "Refl")]
    rotated, reflected = ([head, *methods[1:]] for head in heads)
    return [*rotated, "same input, stochastic", *reflected]


def _cells(found: Mapping[str, Any], methods: Sequence[str], name: str) -> list[str]:
    def mean(method: str, motion: str) -> str:
        known = found["methods"].get(method, {})
        return f"{1e3 * known[motion][name]['mean']:.3g}" if motion in known else ""

    rotated, reflected = ([mean(method, motion) for method in methods] for motion in ("rotated", "reflected"))
    return [*rotated, mean("stochastic", "same"), *reflected]


_NOTE = (
    "- The error is the run's own, in the frames that it is evaluated in, on all splits. Rot, Refl: mean difference of"
    " a system from its copy turned, or mirrored and turned, in each kind of frames. Same input: what stochastic"
    " frames change by themselves, which is in their Rot and Refl too."
)
