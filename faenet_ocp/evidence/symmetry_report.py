"""The results of `symmetry.measure` as a document, a table in the form of the paper's Tables 11 and 12, and a plot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faenet_ocp.common.files import plain
from faenet_ocp.evaluation.tables import padded
from faenet_ocp.evidence.symmetry import METHODS, MOTIONS, POSITIONS, SUMMARIES, Found
from faenet_ocp.targets import TARGETS, Target

_ANGSTROM = "A"
PAPER: dict[str, dict[str, tuple[float | None, ...]]] = {
    "is2re": {  # Rot-I, %-diff, Refl-I
        "Full FA": (0.07, 0.26, 0.05),
        "SFA": (6.57, 2.12, 6.54),
        "SE(3)-SFA": (6.35, 1.87, 8.90),
        "DA": (7.41, 2.97, 8.22),
        "No-FA": (51.1, 18.3, 55.3),
        "SchNet": (0.00, 0.00, 0.00),
        "ForceNet": (61.6, 14.8, 63.0),
        "ForceNet-DA": (18.9, 7.47, 20.8),
        "ForceNet-SFA": (7.11, 2.59, 7.14),
    },
    "s2ef": {  # Rot-I, Refl-I, F-Rot-E, F-Refl-E
        "Full FA": (0.05, 0.03, 0.07, 0.05),
        "SFA": (6.94, 6.96, 4.79, 4.78),
        "SE(3)-SFA": (6.23, 8.86, 3.78, 5.25),
        "DA": (8.88, 9.12, 6.12, 6.46),
        "No-FA": (26.81, 27.61, 10.27, 10.12),
        "SchNet": (0.00, 0.00, 0.00, 0.00),
    },
}
"""Tables 11 (IS2RE) and 12 (S2EF) as printed, in meV and meV/A; rows of trained models."""
_PAPER_COLUMNS = {
    "is2re": ("Rot-I", "%-diff", "Refl-I"),
    "s2ef": ("Rot-I", "Refl-I", "F-Rot-E", "F-Refl-E"),
}
_TITLES = {
    "same": "same input twice",
    "rotated": "Rot",
    "reflected": "Refl",
    "translated": "translated",
    "permuted": "permuted",
    "lattice": "lattice vectors",
    "wrapped": "wrapped",
}


def document(found: Found, targets: Sequence[Target], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `symmetry.json` holds.

    Args:
        found: of `symmetry.measure`.
        targets: of the run.
        facts: about checkpoint, data and device; taken as they are.
    """
    methods: dict[str, Any] = {}
    for (method, motion, name), values in found.differences.items():
        summary = {key: function(values) for key, function in SUMMARIES.items()}
        if found.labels.get(name):
            summary["percent"] = 100 * summary["mean"] / found.labels[name]
        methods.setdefault(method, {}).setdefault(motion, {})[name] = summary
    return plain(
        {
            **facts,
            "num_systems": found.num_systems,
            "degenerate": found.degenerate,
            "ambiguous": found.ambiguous,
            "mean_absolute_labels": found.labels,
            "units": {target.name: target.unit for target in targets} | {POSITIONS: _ANGSTROM},
            "methods": methods,
        },
        "symmetry",
    )


def render_symmetry(results: Mapping[str, Any]) -> str:
    """Markdown: for each target a row for each method, then what is meant and the paper's rows."""
    parts = [f"Data: {results['dataset']}, split {results['split']}, {results['num_systems']:,} systems"]
    for name, unit in results["units"].items():
        if name != POSITIONS:
            parts.append(f"{name}, m{unit}: mean, 95th percentile, maximum\n\n{_table(results, name)}")
    parts.append(f"Framed positions, A\n\n{_positions(results)}")
    parts.append(_notes(results))
    if (task := results["task"]) in PAPER:
        lines = [["Model", *_PAPER_COLUMNS[task]]]
        lines += [[f"{name}, the paper's", *map(str, values)] for name, values in PAPER[task].items()]
        table = "11" if task == "is2re" else "12"
        parts.append(f"The paper's rows (Table {table}, OC20, as published; its definitions, see above):")
        parts.append(padded(lines))
    return "\n\n".join(parts) + "\n"


def _table(results: Mapping[str, Any], name: str) -> str:
    energy = name in results["mean_absolute_labels"]
    motions = [motion for motion in MOTIONS if any(motion in found for found in results["methods"].values())]
    suffix = "-I" if energy else "-E"
    heads = [_TITLES[m] + (suffix if m in ("rotated", "reflected") else "") for m in motions]
    lines = [["Frames", *heads, *(["%-diff"] if energy else [])]]
    for method in _methods(results):
        found = results["methods"][method]
        cells = [" / ".join(_milli(found[motion][name][key]) for key in SUMMARIES) for motion in motions]
        percent = [f"{found['rotated'][name].get('percent', float('nan')):.2f}"] if energy else []
        own = " (this run's)" if method == results["frames"]["method"] else ""
        lines.append([method + own, *cells, *percent])
    return padded(lines)


def _positions(results: Mapping[str, Any]) -> str:
    lines = [["Frames", "Pos, rotated", "Pos, reflected"]]
    for method in _methods(results):
        found = results["methods"][method]
        lines.append([method, *(f"{found[m][POSITIONS]['mean']:.4f}" for m in ("rotated", "reflected"))])
    return padded(lines)


def _methods(results: Mapping[str, Any]) -> list[str]:
    return [method for method in METHODS if method in results["methods"]]


def _milli(value: float) -> str:
    return f"{1e3 * value:.3g}"


def _notes(results: Mapping[str, Any]) -> str:
    around = "about z and mirrors that contain it" if results["dim"] == 2 else "about any axis, and any mirror"
    facts = [
        f"{results['checkpoint']}, step {results['step']}, {results['model']} trained in frames "
        f"{results['trained_with']}; seed {results['seed']}; {results['precision']}; {results['device']}.",
        f"Every system is turned at random ({around}), graphs are built anew. Scalars: |E(x) - E(Rx)|. Vectors: "
        "|F(x) R - F(Rx)|, each component on the free atoms (the paper sums components, over all atoms).",
        "%-diff: mean difference of rotated systems over the mean |label| (the paper divides by each label).",
        "Same input twice: what frames drawn at random change by themselves; the paper's Rot-I contains it.",
        "Pos: largest distance of a framed position of the copy from the nearest set of the original's; 0: the same.",
        f"Two equal variances: {results['degenerate']:,} systems; more than one canonical frame: "
        f"{results['ambiguous']:,}.",
    ]
    facts.append(
        "Moved by lattice vectors, and wrapped: the same crystal with other positions (molecules stay as they are). "
        "Frames follow positions, so a model in frames may see a difference."
    )
    return "\n".join(f"- {fact}" for fact in facts)


def rotated(differences: Mapping[tuple[str, str, str], NDArray[np.float64]], name: str) -> dict[str, NDArray]:
    """Differences of rotated systems by method, for a plot."""
    return {method: found for method in METHODS if (found := differences.get((method, "rotated", name))) is not None}


def first_scalar(targets: Sequence[Target]) -> Target:
    """The target that the plot shows."""
    return next((target for target in targets if target.rank == 0), targets[0] if targets else TARGETS["energy"])
