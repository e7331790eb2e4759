"""Parity plots of predictions and learning curves of a run, as PNG.

Drawn with matplotlib's object interface (no pyplot, no global figure). The metrics log of a run is
JSON lines, see `read_metrics_log`.
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter
from torch import Tensor

from faenet_ocp.evaluation.metrics import SPLITS, Array

logger = logging.getLogger(__name__)

_UNITS = {"energy": "eV", "forces": "eV/A"}
_NOUNS = {"energy": ("energy", "systems"), "forces": ("force components", "components")}
_MAX_SCATTER = 3000  # more points than this are drawn as counts in hexagons
_GREY, _GRID = "0.45", "0.9"


def plot_parity(
    splits: Mapping[str, tuple[Array, Array]],
    path: str | Path,
    *,
    dataset: str,
    quantity: str = "energy",
) -> Path:
    """Prediction against label, one panel a split, all panels on the same axes.

    Args:
        splits: split name to (prediction, target): energies (B,), or forces (M, 3) of free atoms,
            whose components are the points.
        path: PNG to write (atomically).
        dataset: what data it is; heads the figure.
        quantity: energy or forces.

    Raises:
        ValueError: unknown quantity, no split, shapes that differ, an empty split or values that
            are not finite.
    """
    if quantity not in _UNITS:
        raise ValueError(f"quantity must be one of {sorted(_UNITS)}, got {quantity!r}")
    points = {name: _flat_pair(name, pred, target) for name, (pred, target) in splits.items()}
    if not points:
        raise ValueError("a parity plot needs at least one split")
    low = min(float(min(pred.min(), target.min())) for pred, target in points.values())
    high = max(float(max(pred.max(), target.max())) for pred, target in points.values())
    margin = 0.04 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    columns = min(len(points), 2)
    lines = math.ceil(len(points) / columns)
    figure = Figure(figsize=(4.4 * columns + 0.8, 4.3 * lines + 0.7), layout="constrained")
    noun, count = _NOUNS[quantity]
    figure.suptitle(f"{dataset}\n{noun}, prediction against label", size=11)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax, (name, (pred, target)) in zip(axes, points.items(), strict=False):
        mae = float(np.abs(pred - target).mean())
        ax.set_title(f"{name}: MAE {mae:#.3g} {_UNITS[quantity]}, {len(pred):,} {count}", size=9)
        ax.set_xlabel(f"label [{_UNITS[quantity]}]")
        ax.set_ylabel(f"prediction [{_UNITS[quantity]}]")
    for ax in axes[len(points) :]:
        ax.set_axis_off()
    _draw_points(figure, list(axes[: len(points)]), list(points.values()), limits)
    return _save(figure, path)


def _flat_pair(name: str, pred: Array, target: Array) -> tuple[np.ndarray, np.ndarray]:
    first, second = (
        np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)
        for values in (pred, target)
    )
    if first.shape != second.shape or first.size == 0:
        raise ValueError(
            f"split {name!r}: prediction and target must have the same shape and not be empty, "
            f"got {first.shape} and {second.shape}"
        )
    bad = int((~np.isfinite(first) | ~np.isfinite(second)).sum())
    if bad:
        raise ValueError(f"split {name!r}: {bad} of {first.size} points are not finite")
    return first.ravel(), second.ravel()


def _draw_points(
    figure: Figure,
    axes: list[Axes],
    points: list[tuple[np.ndarray, np.ndarray]],
    limits: tuple[float, float],
) -> None:
    """Dots, or in all panels hexagons with one colour scale when any panel has too many points."""
    dense = max(len(pred) for pred, _ in points) > _MAX_SCATTER
    cells = []
    for ax, (pred, target) in zip(axes, points, strict=True):
        ax.plot(limits, limits, color=_GREY, linewidth=1, linestyle="--", zorder=3)
        if dense:
            extent = (*limits, *limits)
            cells.append(ax.hexbin(target, pred, gridsize=60, extent=extent, mincnt=1, linewidths=0.1))
        else:
            ax.scatter(target, pred, s=14, alpha=0.5, linewidths=0)
        ax.set(xlim=limits, ylim=limits, aspect="equal")
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.grid(color=_GRID, linewidth=0.6)
        ax.set_axisbelow(True)
    if cells:
        scale = LogNorm(1, max(2.0, *(cell.get_clim()[1] or 0.0 for cell in cells)))
        for cell in cells:
            cell.set_norm(scale)
        figure.colorbar(cells[0], ax=axes, label="points per cell", shrink=0.6, aspect=30)


def read_metrics_log(path: str | Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines metrics log: one object a line, with ``step`` and any metrics.

    Known keys: ``step``, ``epoch``, ``train/loss``, ``lr``, ``<split>/<metric>``. Lines that do not
    decode (a killed writer leaves one) are skipped with a warning that counts them.

    Raises:
        FileNotFoundError: no such file.
    """
    records, skipped = [], 0
    with Path(path).open(encoding="utf-8", errors="replace") as file:
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


def plot_learning_curve(log: str | Path, path: str | Path, *, dataset: str) -> Path:
    """Training loss, validation errors and learning rate over steps, from a metrics log.

    Panels without records are left out. A step that was logged twice (a resumed run) counts as
    logged last.

    Args:
        log: see `read_metrics_log`.
        path: PNG to write (atomically).
        dataset: what data it is; heads the figure.

    Raises:
        ValueError: the log holds none of the known series; names the file.
    """
    records = read_metrics_log(log)
    panels = [
        (title, curves)
        for title, keys, scale in (
            ("training loss", {"train/loss": "train"}, 1.0),
            ("energy MAE [eV]", _split_keys(records, "energy_mae"), 1.0),
            ("force MAE [meV/A]", _split_keys(records, "forces_mae"), 1e3),
            ("learning rate", {"lr": "lr"}, 1.0),
        )
        if (curves := _curves(records, keys, scale))
    ]
    if not panels:
        raise ValueError(f"{log}: no training loss, validation error or learning rate to plot")
    figure = Figure(figsize=(9.0, 2.3 * len(panels) + 0.9), layout="constrained")
    epochs = max((record["epoch"] for record in records if record.get("epoch")), default=None)
    figure.suptitle(f"{dataset}: learning curve" + (f", {epochs:.4g} epochs" if epochs else ""), size=11)
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True).flatten()
    for ax, (title, curves) in zip(axes, panels, strict=True):
        _curve_panel(ax, title, curves)
    figure.align_ylabels(axes)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return _save(figure, path)


_Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def _split_keys(records: Iterable[Mapping[str, Any]], metric: str) -> dict[str, str]:
    """Log keys "<split>/<metric>" to split names, OC20's splits first and in their order."""
    found = {key for record in records for key in record if key.endswith(f"/{metric}")}
    order = [f"{split}/{metric}" for split in SPLITS]
    keys = [key for key in order if key in found] + sorted(found.difference(order))
    return {key: key.removesuffix(f"/{metric}") for key in keys}


def _curves(records: Iterable[Mapping[str, Any]], keys: Mapping[str, str], scale: float) -> _Curves:
    """Label to (steps, values), by step; values that are no finite numbers are left out."""
    curves = {}
    for key, label in keys.items():
        values = {
            record["step"]: scale * record[key]
            for record in records
            if isinstance(record.get(key), int | float) and math.isfinite(record[key])
        }
        if values:
            steps = sorted(values)
            curves[label] = (np.array(steps), np.array([values[step] for step in steps]))
    return curves


def _curve_panel(ax: Axes, title: str, curves: _Curves) -> None:
    for label, (steps, values) in curves.items():
        if label == "train":
            _draw_loss(ax, steps, values)
        elif label == "lr":
            ax.plot(steps, values, color=_GREY, label=f"last {values[-1]:.3g}")
        else:
            text = f"{label}\n last {values[-1]:.4g}, best {values.min():.4g}"
            ax.plot(steps, values, marker="o", markersize=3, linewidth=1.2, label=text)
    low = min(values.min() for _, values in curves.values())
    high = max(values.max() for _, values in curves.values())
    if low > 0 and high / low > 10 and "lr" not in curves:  # below a decade log ticks are too few
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    ax.set_ylabel(title)
    ax.grid(color=_GRID, linewidth=0.6, which="both")
    ax.set_axisbelow(True)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_loss(ax: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """The records in pale, their running mean over 2 % of them on top."""
    window = max(1, len(values) // 50)
    if window > 1:
        ax.plot(steps, values, color="C0", alpha=0.3, linewidth=0.8, label="as logged")
    label = f"mean of {window} records" if window > 1 else "as logged"
    mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
    ax.plot(steps[window - 1 :], mean, color="C0", linewidth=1.2, label=label)


def _save(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG under a temporary name in the same folder, then renames it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, path)
    return path
