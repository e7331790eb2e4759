"""The result of `suite.run` as a Markdown table and as a picture."""

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from faenet_ocp.benchmark import data

_HEADS = ("model", "parameters", "systems", "atoms", "edges", "speed-up", "(wall)", "us/atom", "peak MB", "difference")


def markdown(result: dict[str, Any]) -> str:
    """One table a group. Speed-ups are against the first row, from medians."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{result['device']}, {result['threads']} thread(s), {versions}, {result['date'][:10]}", ""]
    for group in result["groups"]:
        lines += [f"### {group['name']}: {group['task'].upper()}, {group.get('mode', '')}".rstrip(", "), ""]
        if "unavailable" in group:
            lines += [f"not available: {group['unavailable']}", ""]
            continue
        if "curves" in group:
            lines += [*_curves(group["curves"]), ""]
            continue
        if "steps" in group:
            lines += [*_engine(group["steps"]), ""]
            continue
        if "paths" in group:
            heads, *rows = data.table(group)
            lines += [_line(heads), _line(["---"] + ["---:"] * (len(heads) - 1)), *map(_line, rows), ""]
            continue
        lines += [_line(_HEADS), _line(["---"] + ["---:"] * (len(_HEADS) - 1))]
        lines += [_line(_cells(row)) for row in group["rows"]]
        lines.append("")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    peak = row["peak_bytes"]
    differences = row.get("difference")
    return [
        row["model"],
        f"{row['parameters'] / 1e6:.2f} M",
        str(row["systems"]),
        str(row["atoms"]),
        str(row["edges"]),
        f"{row['speed_up']:.2f}",
        f"{row['speed_up_wall']:.2f}",
        f"{1e6 * median(row['seconds']) / row['atoms']:.0f}",
        "" if peak is None else f"{peak / 1e6:.0f}",
        "" if differences is None else f"{max(differences.values()):.0e}",
    ]


def _curves(curves: list[dict[str, Any]]) -> list[str]:
    """Mean loss over six equal parts of the training."""
    steps = len(curves[0]["losses"])
    parts = [slice(steps * part // 6, steps * (part + 1) // 6) for part in range(6)]
    lines = [_line(["mean loss of steps", *(f"{part.start + 1} to {part.stop}" for part in parts)])]
    lines.append(_line(["---"] + ["---:"] * len(parts)))
    for curve in curves:
        means = [curve["losses"][part] for part in parts]
        lines.append(_line([curve["model"], *(f"{sum(part) / max(1, len(part)):.3f}" for part in means)]))
    change = curves[0]["bf16_change"]
    text = f"Energies of the first, computed in bf16, change by {change['mean']:.1%} of the label spread on average"
    return [*lines, "", f"{text}, by {change['largest']:.1%} at most."]


def _engine(steps: list[dict[str, float]]) -> list[str]:
    """Shares of the step's time."""
    parts = ("forward", "backward", "optimiser")
    shares = {part: [step[part] / step["step"] for step in steps] for part in parts}
    shares["everything else"] = [1 - sum(values) for values in zip(*shares.values(), strict=True)]
    lines = [_line(["share of the step's time", *shares]), _line(["---"] + ["---:"] * len(shares))]
    for name, function in (("median", median), ("largest", max)):
        lines.append(_line([name, *(f"{function(values):.2%}" for values in shares.values())]))
    return [*lines, "", f"{len(steps)} steps, {median(step['systems'] for step in steps):.0f} systems each."]


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(result: dict[str, Any], path: Path) -> None:
    """Systems a second against parameters, inference, relative to the slowest model of each task (PNG).

    Nothing is drawn without the group "peers".
    """
    groups = [group for group in result["groups"] if group["name"] == "peers" and group["mode"] == "inference"]
    if not groups:
        return
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axis, group in zip(axes, groups, strict=False):
        slowest = max(median(row["seconds"]) for row in group["rows"])
        for row in group["rows"]:
            place = (row["parameters"] / 1e6, slowest / median(row["seconds"]))
            axis.scatter(*place)
            axis.annotate(row["model"], place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set(title=group["task"].upper(), xlabel="parameters (millions)", ylabel="inference speed (slowest = 1)")
        axis.set_yscale("log")
        axis.margins(0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
