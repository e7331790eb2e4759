"""Parity plots of predictions and learning curves of a run, as PNG.

Drawn with matplotlib's object interface (no pyplot, no global figure).
"""

import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from faenet_ocp.common.files import write_bytes
from faenet_ocp.evaluation.log_names import LEARNING_RATE, LOSS, split_of
from faenet_ocp.evaluation.results import SPLITS
from faenet_ocp.targets import Target

logger = logging.getLogger(__name__)

_MAX_SCATTER = 3000  # more points than this are drawn as counts in hexagons
_GREY, _GRID = "0.45", "0.9"

_Points = tuple[np.ndarray, np.ndarray]
_Draw = Callable[[Axes, str, np.ndarray, np.ndarray], None]


def plot_parity(
    splits: Mapping[str, _Points],
    path: Path,
    *,
    dataset: str,
    target: Target,
    marked: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Prediction against label, one panel a split, all panels on the same axes.

    Args:
        splits: split name to (prediction, label), finite: scalars (B,), or vectors (M, 3), whose components are drawn.
        path: PNG to write (atomically).
        dataset: what data it is; heads the figure.
        target: what is predicted.
        marked: of vectors, by split which belong to adsorbate atoms, (M,) bool: these are drawn in another colour.
    """
    points = {name: (pred.ravel(), label.ravel()) for name, (pred, label) in splits.items()}
    low = min(float(min(pred.min(), label.min())) for pred, label in points.values())
    high = max(float(max(pred.max(), label.max())) for pred, label in points.values())
    margin = 0.04 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    columns = min(len(points), 2)
    lines = math.ceil(len(points) / columns)
    figure = Figure(figsize=(4.4 * columns + 0.8, 4.3 * lines + 0.7), layout="constrained")
    count = "components" if target.rank else "systems"
    figure.suptitle(f"{dataset}\n{target.name}, prediction against label", size=11)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax, (name, (pred, label)) in zip(axes, points.items(), strict=False):
        mae = float(np.abs(pred - label).mean())
        ax.set_title(f"{name}: MAE {mae:#.3g} {target.unit}, {len(pred):,} {count}", size=9)
        ax.set_xlabel(f"label [{target.unit}]")
        ax.set_ylabel(f"prediction [{target.unit}]")
    for ax in axes[len(points) :]:
        ax.set_axis_off()
    marks = {name: mask for name, mask in (marked or {}).items() if mask is not None and mask.any()}
    if marks:
        for ax, (name, (pred, label)) in zip(axes, points.items(), strict=False):
            _draw_two(ax, pred, label, np.repeat(marks.get(name, np.zeros(len(pred) // 3, dtype=bool)), 3), limits)
    else:
        _draw_points(figure, list(axes[: len(points)]), list(points.values()), limits)
    return _save(figure, path)


def _draw_two(ax: Axes, pred: np.ndarray, label: np.ndarray, is_adsorbate: np.ndarray, limits: tuple) -> None:
    """Dots of two colours, small where there are many."""
    size = 14 if len(pred) <= _MAX_SCATTER else 3
    for name, chosen in (("surface", ~is_adsorbate), ("adsorbate", is_adsorbate)):
        ax.scatter(label[chosen], pred[chosen], s=size, alpha=0.4, linewidths=0, label=name)
    ax.legend(fontsize=8, markerscale=2, loc="upper left")
    _frame(ax, limits)


def _frame(ax: Axes, limits: tuple[float, float]) -> None:
    ax.plot(limits, limits, color=_GREY, linewidth=1, linestyle="--", zorder=3)
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.yaxis.set_major_locator(MaxNLocator(6))
    ax.grid(color=_GRID, linewidth=0.6)
    ax.set_axisbelow(True)


def _draw_points(figure: Figure, axes: list[Axes], points: list[_Points], limits: tuple[float, float]) -> None:
    """Dots, or in all panels hexagons with one colour scale when any panel has too many points."""
    dense = max(len(pred) for pred, _ in points) > _MAX_SCATTER
    cells = []
    for ax, (pred, label) in zip(axes, points, strict=True):
        if dense:
            extent = (*limits, *limits)
            cells.append(ax.hexbin(label, pred, gridsize=60, extent=extent, mincnt=1, linewidths=0.1))
        else:
            ax.scatter(label, pred, s=14, alpha=0.5, linewidths=0)
        _frame(ax, limits)
    if cells:
        scale = LogNorm(1, max(2.0, *(cell.get_clim()[1] or 0.0 for cell in cells)))
        for cell in cells:
            cell.set_norm(scale)
        figure.colorbar(cells[0], ax=axes, label="points per cell", shrink=0.6, aspect=30)


def plot_sizes(errors: Mapping[int, float], path: Path, *, title: str, label: str, levels: Mapping[str, float]) -> Path:
    """Error against the number of training systems, both axes logarithmic.

    Args:
        errors: by number of systems.
        path: PNG to write (atomically).
        title, label: of the figure and of the error with its unit.
        levels: lines to compare with, by name.
    """
    sizes = sorted(errors)
    figure = Figure(figsize=(5.2, 4.0), layout="constrained")
    ax = figure.subplots()
    ax.loglog(sizes, [errors[size] for size in sizes], "o-")
    for size in sizes:
        ax.annotate(f"{errors[size]:.3g}", (size, errors[size]), xytext=(4, 6), textcoords="offset points")
    for name, value in levels.items():
        ax.axhline(value, color=_GREY, linestyle="--", linewidth=1)
        ax.annotate(name, (sizes[0], value), xytext=(0, 3), textcoords="offset points", color=_GREY)
    ax.set(title=title, xlabel="training molecules", ylabel=label)
    ax.grid(color=_GRID, which="both")
    return _save(figure, path)


def plot_trade_off(points: Mapping[str, tuple[float, float]], path: Path, *, title: str, label: str) -> Path:
    """Error against throughput, which is logarithmic, one labelled point for each model (the paper's Figure 2).

    Args:
        points: samples/s and error, by name.
        path: PNG to write (atomically).
        title, label: of the figure and of the error with its unit.
    """
    figure = Figure(figsize=(6.6, 4.6), layout="constrained")
    ax = figure.subplots()
    ax.set_xscale("log")
    colours = [ax.plot(speed, error, "o")[0].get_color() for speed, error in points.values()]
    ax.set_title(title, size=9)
    ax.set(xlabel="inference, samples/s (forward pass)", ylabel=label)
    ax.margins(0.2)
    ax.grid(color=_GRID, which="both")
    figure.draw_without_rendering()  # from here on it is known where things are
    places = ax.transData.transform(np.reshape(list(points.values()), (-1, 2)))
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in places]
    for (name, point), colour in zip(points.items(), colours, strict=True):
        _label(ax, name, point, colour, taken)
    return _save(figure, path)


def _label(ax: Axes, text: str, point: tuple[float, float], colour: Any, taken: list[Bbox]) -> None:
    """Writes a text beside a point: in the first place inside the axes that is not `taken`, else the first."""
    boxes = []
    for x, y in ((5, 5), (5, -12), (-5, 5), (-5, -12), (5, 16), (-5, 16)):
        side = "left" if x > 0 else "right"
        shown = ax.annotate(text, point, xytext=(x, y), textcoords="offset points", size=9, ha=side, color=colour)
        boxes.append((shown.get_window_extent(), (x, y), side))
        box = boxes[-1][0]
        if ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 and not any(box.overlaps(other) for other in taken):
            break
        shown.remove()
    else:
        _, place, side = boxes[0]
        ax.annotate(text, point, xytext=place, textcoords="offset points", size=9, ha=side, color=colour)
        boxes.append(boxes[0])
    taken.append(boxes[-1][0])


def plot_differences(values: Mapping[str, np.ndarray], path: Path, *, title: str, target: Target) -> Path:
    """How many systems differ by how much, |E(x) - E(Rx)|, a line for each name; both axes logarithmic.

    Args:
        values: absolute differences, by name.
        path: PNG to write (atomically).
        title: of the figure.
        target: what they are differences of.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    for name, found in values.items():
        shown = np.sort(np.maximum(1e3 * found, 1e-9))
        ax.step(shown, np.arange(1, len(shown) + 1) / len(shown), where="post", label=name)
    ax.set_xscale("log")
    ax.set_title(title, size=9)
    ax.set(xlabel=f"|{target.name}(x) - {target.name}(Rx)| [m{target.unit}]", ylabel="share of systems below")
    ax.legend(fontsize=8)
    ax.grid(color=_GRID, which="both")
    return _save(figure, path)


def plot_learning_curve(log: Path, path: Path, *, dataset: str, targets: Sequence[Target]) -> Path:
    """Training loss, validation errors and learning rate over steps, from the log of a run.

    Panels without records are left out. A step that was logged twice (a resumed run) counts as logged last.

    Args:
        log: `metrics.jsonl`, see `log_names`.
        path: PNG to write (atomically).
        dataset: what data it is; heads the figure.
        targets: whose first metric is shown, a curve for each split.

    Raises:
        ValueError: the log holds none of the known series; names the file.
    """
    records = _read_log(log)
    panels: list[tuple[str, dict[str, _Points], _Draw]] = []
    panels.append(("training loss", _curves(records, {LOSS: "loss"}), _draw_loss))
    for metric in (target.metrics[0] for target in targets):
        panels.append((metric.header, _curves(records, _split_keys(records, metric.name), metric.scale), _draw_errors))
    panels.append(("learning rate", _curves(records, {LEARNING_RATE: "last"}), _draw_learning_rate))
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        raise ValueError(f"{log}: no training loss, validation error or learning rate to plot")
    figure = Figure(figsize=(9.0, 2.3 * len(panels) + 0.9), layout="constrained")
    epochs = max((record["epoch"] for record in records if record.get("epoch")), default=None)
    figure.suptitle(f"{dataset}: learning curve" + (f", {epochs:.4g} epochs" if epochs else ""), size=11)
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True).flatten()
    for ax, (title, curves, draw) in zip(axes, panels, strict=True):
        for label, curve in curves.items():
            draw(ax, label, *curve)
        if draw is not _draw_learning_rate:
            _scale_axis(ax, curves)
        ax.set_ylabel(title)
        ax.grid(color=_GRID, linewidth=0.6, which="both")
        ax.set_axisbelow(True)
        ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.align_ylabels(axes)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return _save(figure, path)


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a log; lines that do not decode (a killed writer leaves one) are left out with a warning."""
    records, skipped = [], 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in filter(str.strip, file):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
            else:
                skipped += 1
    if skipped:
        logger.warning("%s: skipped %d lines that are not metrics records", path, skipped)
    return records


def _split_keys(records: Iterable[Mapping[str, Any]], metric: str) -> dict[str, str]:
    """Names in the log to split names, OC20's splits first and in their order."""
    found = {key: split for record in records for key in record if (split := split_of(key, metric)) is not None}
    order = [*SPLITS, *sorted(set(found.values()) - set(SPLITS))]
    return dict(sorted(found.items(), key=lambda item: order.index(item[1])))


def _curves(records: Iterable[Mapping[str, Any]], keys: Mapping[str, str], scale: float = 1.0) -> dict[str, _Points]:
    """Label to (steps, values), by step; the label says how many values are left out because they are not finite."""
    curves = {}
    for key, label in keys.items():
        known = {r["step"]: scale * r[key] for r in records if isinstance(r.get(key), int | float)}
        values = {step: value for step, value in known.items() if math.isfinite(value)}
        if values:
            label += f" ({len(known) - len(values)} not finite)" if len(values) < len(known) else ""
            steps = sorted(values)
            curves[label] = (np.array(steps), np.array([values[step] for step in steps]))
    return curves


def _scale_axis(ax: Axes, curves: Mapping[str, _Points]) -> None:
    """Logarithmic where the values span more than a decade: below that log ticks are too few."""
    low = min(values.min() for _, values in curves.values())
    high = max(values.max() for _, values in curves.values())
    if low > 0 and high / low > 10:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))


def _draw_errors(ax: Axes, label: str, steps: np.ndarray, values: np.ndarray) -> None:
    text = f"{label}\n last {values[-1]:.4g}, best {values.min():.4g}"
    ax.plot(steps, values, marker="o", markersize=3, linewidth=1.2, label=text)


def _draw_learning_rate(ax: Axes, label: str, steps: np.ndarray, values: np.ndarray) -> None:
    ax.plot(steps, values, color=_GREY, label=f"{label} {values[-1]:.3g}")


def _draw_loss(ax: Axes, label: str, steps: np.ndarray, values: np.ndarray) -> None:
    """The records in pale, their running mean over 2 % of them on top."""
    window = max(1, len(values) // 50)
    if window > 1:
        ax.plot(steps, values, color="C0", alpha=0.3, linewidth=0.8, label="as logged")
    words = (f"mean of {window} records" if window > 1 else "as logged") + label.removeprefix("loss")
    mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
    ax.plot(steps[window - 1 :], mean, color="C0", linewidth=1.2, label=words)


def _save(figure: Figure, path: Path) -> Path:
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return write_bytes(path, content.getvalue())
