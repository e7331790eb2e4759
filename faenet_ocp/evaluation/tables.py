"""Markdown tables: rows of results, and the columns that several tables share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from faenet_ocp.evaluation.paper import PAPER
from faenet_ocp.evaluation.results import SPLITS
from faenet_ocp.targets import Metric, targets_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table.

    Attributes:
        label: first column.
        splits: values by split and metric.
        average: means over the splits, empty without any.
        seconds_per_epoch, samples_per_s, parameters: what else there is to say.
        deviations: of values that are means over several runs, by split (or "average") and metric.
    """

    label: str
    splits: Mapping[str, Mapping[str, float | None]]
    average: Mapping[str, float | None]
    seconds_per_epoch: float | None = None
    samples_per_s: float | None = None
    parameters: int | None = None
    deviations: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    def has(self, metrics: Iterable[Metric]) -> bool:
        """Whether there is a value of any of them."""
        return any(metric.name in values for metric in metrics for values in self.splits.values())


Column = tuple[str, Callable[[Row], str]]


def main_metrics(results: Mapping[str, Any], metrics: Mapping[str, Metric]) -> list[Metric]:
    """Those of the paper's table, elsewhere the first of each target."""
    papers = PAPER[results["task"]].metrics if results["task"] in PAPER else ()
    if all(name in metrics for name in papers) and papers:
        return [metrics[name] for name in papers]
    return [target.metrics[0] for target in targets_of(results["units"], results["task"])]


def ordered_splits(results: Mapping[str, Any]) -> list[str]:
    """The splits that were evaluated, OC20's first and in their order."""
    return sorted(results["splits"], key=lambda split: [*SPLITS, split].index(split))


def cell(split: str, metric: Metric) -> Callable[[Row], str]:
    """What a column shows of a row: its value of a split (or "average"), and the deviation if there is one."""

    def text(row: Row) -> str:
        values = row.average if split == "average" else row.splits.get(split, {})
        deviation = row.deviations.get(split, {}).get(metric.name)
        return metric.text(values.get(metric.name)) + ("" if deviation is None else f" +- {metric.text(deviation)}")

    return text


def split_columns(metrics: Iterable[Metric], splits: Iterable[str], *, average: bool) -> list[Column]:
    """For each metric its splits and their average; the first header of each names the metric."""
    columns: list[Column] = []
    titles = {split: SPLITS.get(split, split) for split in splits} | ({"average": "Average"} if average else {})
    for metric in metrics:
        named = [(title, cell(split, metric)) for split, title in titles.items()]
        columns += [(f"{metric.header}: {named[0][0]}", named[0][1]), *named[1:]]
    return columns


def time_columns() -> list[Column]:
    """Time of an epoch, and throughput of the forward pass."""
    return [
        ("Train", lambda row: duration(row.seconds_per_epoch)),
        ("Infer.", lambda row: format_number(row.samples_per_s, ".0f")),
    ]


def format_number(value: float | None, spec: str) -> str:
    """A number, or "-" where there is none."""
    return "-" if value is None else f"{value:{spec}}"


def duration(seconds: float | None) -> str:
    """Seconds, or minutes where there are many."""
    if seconds is None:
        return "-"
    return f"{seconds:.1f}s" if seconds < 100 else f"{seconds / 60:,.0f}min"


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Rows below the names of their columns."""
    lines = [["Model", *(header for header, _ in columns)]]
    return padded(lines + [[row.label.replace("|", "\\|"), *(cell(row) for _, cell in columns)] for row in rows])


def padded(lines: Sequence[Sequence[str]]) -> str:
    """Markdown of a header and rows that also reads well on a terminal."""
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in aligned)
