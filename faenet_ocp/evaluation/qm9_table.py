"""The paper's Table 8, from the results of runs on QM9: a row for each target, the paper's columns beside ours.

Every run predicts one target (`task: qm9`); runs of one model make one column.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from faenet_ocp.evaluation.plots import plot_sizes
from faenet_ocp.targets import QM9

PAPER = {
    "mu": (0.033, 0.0529, 0.0560, 0.0286, 0.0297, 0.051, 0.0245, 0.0245, 0.0289),
    "alpha": (0.235, 0.0615, 0.0300, 0.0469, 0.0435, 0.142, 0.0449, 0.0452, 0.0527),
    "homo": (41, 32.9, 42.1, 27.8, 24.6, 35.0, 22.8, 23.1, 24.5),
    "lumo": (34, 24.7, 57.4, 19.7, 19.5, 33.0, 18.9, 19.8, 20.0),
    "gap": (63, 42.5, 64.2, 34.8, 32.6, 53.0, 31.1, 32.4, 40.2),
    "R2": (0.073, 0.765, 0.110, 0.331, 0.331, None, 0.268, 0.259, 0.498),
    "ZPVE": (1.7, 1.39, 1.12, 1.29, 1.21, None, 1.12, 1.20, 1.26),
    "U0": (14, 8.15, 12.9, 8.02, 6.32, None, 6.26, 6.59, 6.79),
    "U": (19, 8.34, 14.4, 7.89, 6.28, None, 6.36, 6.82, 6.80),
    "H": (14, 8.42, 14.6, 8.11, 6.53, None, 6.33, 6.86, 6.74),
    "G": (14, 9.4, 16.2, 8.98, 7.56, None, 7.78, 7.98, 7.91),
    "Cv": (0.033, 0.028, 0.038, 0.025, 0.023, 0.052, 0.022, 0.024, 0.023),
}
"""Table 8 as printed: MAE on the test split in the unit that the table shows, by model of `PAPER_MODELS`."""
PAPER_MODELS = ("SchNet", "PhysNet", "MGCN", "DimeNet", "DimeNet++", "SE(3)-T", "SphereNet", "ComENet", "FAENet")
REFERENCE = "schnet"
"""Improvements are relative to this model of the trainer, as the paper's are to its SchNet."""
OUTLIER = "R2"
"""Left out of the mean improvement, as in the paper (C.3)."""
_LINEAR = "linear in composition"
Errors = dict[str, float]


def errors_by_model(results: Sequence[Mapping[str, Any]], split: str = "test") -> dict[str, Errors]:
    """Model to target to MAE, as tables show it; what is linear in composition stands first.

    Args:
        results: documents of `results.build_results`.
        split: the one that is shown.

    Raises:
        ValueError: not of `task: qm9`, without the split, or a second run of a model and target.
    """
    found: dict[str, Errors] = {_LINEAR: {}}
    for document in results:
        run = document["run"]["config"]
        if document["task"] != "qm9" or split not in document["splits"]:
            splits = ", ".join(document["splits"])
            raise ValueError(f"{run}: task {document['task']} on {splits}; expected task qm9 with a split {split!r}")
        target = QM9[next(name for name, row in QM9.items() if row.metrics[0].name in document["units"])]
        metric = target.metrics[0]
        errors = found.setdefault(document["run"]["model"], {})
        if target.name in errors:
            raise ValueError(
                f"{run}: is the second run of {document['run']['model']} on {target.name}; give one of them"
            )
        errors[target.name] = metric.scale * document["splits"][split][metric.name]
        linear = document["baselines"]["linear_in_composition"]["splits"].get(split, {})
        if metric.name in linear:
            found[_LINEAR][target.name] = metric.scale * linear[metric.name]
    return found


def relative_improvement(errors: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """Eq. (11): (MAE of the reference - MAE) / MAE of the reference, for each target that both have."""
    return {name: (reference[name] - error) / reference[name] for name, error in errors.items() if name in reference}


def mean_improvement(improvements: Mapping[str, float]) -> tuple[float, float] | None:
    """Mean and population standard deviation over the targets without `OUTLIER`; None if there is none.

    The paper's own "mean" is the sum over these eleven targets divided by twelve: 0.395 for FAENet is 0.432 here.
    """
    values = [value for name, value in improvements.items() if name != OUTLIER]
    return (statistics.fmean(values), statistics.pstdev(values)) if values else None


def render_qm9_table(results: Sequence[Mapping[str, Any]], split: str = "test") -> str:
    """Markdown: twelve rows, our models, then the paper's, marked; below the improvements over SchNet."""
    ours = errors_by_model(results, split)
    papers = {
        f"{model}, paper": {name: row[place] for name, row in PAPER.items()} for place, model in enumerate(PAPER_MODELS)
    }
    header = ["Target", "Unit", *ours, *papers]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for name, target in QM9.items():
        metric = target.metrics[0]
        own = [_number(errors.get(name), metric.digits) for errors in ours.values()]
        lines.append([name, metric.shown_unit, *own, *(_printed(column[name]) for column in papers.values())])
    for label, place in (("mean improvement over SchNet", 0), ("its deviation", 1)):
        known = [_improvement(errors, ours.get(REFERENCE, {})) for errors in ours.values()]
        reference = papers["SchNet, paper"]
        known += [_improvement(column, reference) for column in papers.values()]
        lines.append([label, "", *(_number(pair and pair[place], 3) for pair in known)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n- {_NOTE.format(split=split)}\n"


_NOTE = (
    "MAE on the split {split}; empty: not trained. Columns marked `paper` are Table 8 of Duval et al. (ICML 2023) as"
    " printed. Improvements are eq. (11) without R2, ours over the SchNet trained here, the paper's over its own;"
    " computed anew from the printed numbers (the paper prints eleven twelfths of these means)."
)


def _improvement(
    errors: Mapping[str, float | None], reference: Mapping[str, float | None]
) -> tuple[float, float] | None:
    if errors == reference:
        return None
    known = {name: error for name, error in errors.items() if error is not None}
    return mean_improvement(relative_improvement(known, {k: v for k, v in reference.items() if v is not None}))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _printed(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def render_curve(curve: Mapping[int, Mapping[str, Any]], split: str = "test") -> str:
    """Markdown of errors by number of training molecules; `curve` has the results of one target.

    Raises:
        ValueError: results of several targets.
    """
    name, errors = _curve(curve, split)
    metric = QM9[name].metrics[0]
    lines = [f"| Training molecules | steps | {name} MAE [{metric.shown_unit}] |", "| ---: | ---: | ---: |"]
    lines += [f"| {n:,} | {curve[n]['run']['step']:,} | {errors[n]:.{metric.digits}f} |" for n in sorted(curve)]
    return "\n".join(lines) + "\n"


def plot_curve(curve: Mapping[int, Mapping[str, Any]], path: Path, split: str = "test") -> Path:
    """The same as a plot, with the error of what is linear in composition."""
    name, errors = _curve(curve, split)
    metric = QM9[name].metrics[0]
    linear = errors_by_model([curve[max(curve)]], split)[_LINEAR].get(name)
    steps = {results["run"]["step"] for results in curve.values()}
    return plot_sizes(
        errors,
        path,
        title=f"QM9, {name}, {split} split, {' or '.join(f'{step:,}' for step in sorted(steps))} steps each",
        label=f"MAE [{metric.shown_unit}]",
        levels={} if linear is None else {f"{_LINEAR} (fitted to {max(curve):,})": linear},
    )


def _curve(curve: Mapping[int, Mapping[str, Any]], split: str) -> tuple[str, dict[int, float]]:
    """The target, and its error by number of molecules."""
    found = {}
    for number, results in curve.items():
        errors = errors_by_model([results], split)
        found[number] = errors[results["run"]["model"]]
    names = {name for errors in found.values() for name in errors}
    if len(names) != 1:
        raise ValueError(f"a curve is of one target, not of {', '.join(sorted(names))}")
    (name,) = names
    return name, {number: errors[name] for number, errors in found.items()}
