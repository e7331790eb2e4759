"""Several runs side by side: one table in the form of the paper's Table 9, and its Figure 2, error against throughput.

Runs of the same name that differ in their seed are one row, mean and standard deviation.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from faenet_ocp.evaluation.paper import OTHERS, PAPER, TABLE6
from faenet_ocp.evaluation.plots import plot_trade_off
from faenet_ocp.evaluation.results import BASELINES
from faenet_ocp.evaluation.tables import (
    Column,
    Row,
    format_number,
    main_metrics,
    markdown_table,
    ordered_splits,
    padded,
    split_columns,
    time_columns,
)
from faenet_ocp.targets import Metric, metrics_of, targets_of

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""Results documents (`results.build_results`) by the name of the row."""


def render_comparison(runs: Runs, *, ablations: bool = False) -> str:
    """Markdown: a row for each name, the baselines, then what the numbers stand for; the paper's rows apart.

    Args:
        runs: what is compared.
        ablations: the paper's rows are those of Table 6, in place of other models'.

    Raises:
        ValueError: the runs are of different tasks, data or splits.
    """
    first, metrics = _common(runs)
    splits, has_average = ordered_splits(first), first["average"] is not None
    columns: list[Column] = [("Parameters", _parameters), *time_columns()]
    columns += split_columns(metrics, splits, average=has_average)
    rows = [_row(name, documents) for name, documents in runs.items()]
    baselines = [
        Row(label=label, splits=found["splits"], average=found["average"] or {})
        for name, label in BASELINES.items()
        if (found := first["baselines"][name])["splits"]
    ]
    shown = [row for row in baselines if row.has(metrics)]
    parts = [f"Data: {first['dataset']}", markdown_table([*rows, *shown], columns), _notes(runs)]
    if ablations:
        lines = [["Model", "Infer.", "Energy MAE [meV]"]]
        lines += [[f"{name}, the paper's", f"{speed}", f"{error}"] for name, (speed, error) in TABLE6.items()]
        parts.append("The paper's Table 6 (OC20 IS2RE, average over its splits, GPU), as published:")
        parts.append(padded(lines))
    elif papers := _paper_rows(first["task"]):
        columns = [*time_columns(), *split_columns(metrics, list(PAPER[first["task"]].sizes), average=True)]
        paper = PAPER[first["task"]]
        parts.append(
            f"The paper's rows ({paper.source} of Duval et al., ICML 2023, as published: {paper.training_set}, GPUs)"
            f"{'' if first['official'] else '; other data than above, not to be compared with it'}:"
        )
        parts.append(markdown_table(papers, columns))
    return "\n\n".join(parts) + "\n"


def plot_comparison(runs: Runs, path: Path) -> Path:
    """The paper's Figure 2 of these runs: mean error over the splits against samples/s, one labelled point for each."""
    first, metrics = _common(runs)
    metric, points = metrics[0], {}
    for row in (_row(name, documents) for name, documents in runs.items()):
        values = row.average or next(iter(row.splits.values()))
        value = values.get(metric.name)
        if row.samples_per_s is not None and value is not None:
            points[row.label] = (row.samples_per_s, metric.scale * value)
    which = "mean over the splits" if first["average"] is not None else next(iter(first["splits"]))
    title = f"{first['dataset']}\n{_devices(runs)}"
    return plot_trade_off(points, path, title=title, label=f"{metric.header}, {which}")


def _common(runs: Runs) -> tuple[Mapping[str, Any], list[Metric]]:
    """One of the documents, and the metrics that are shown."""
    documents = [document for name in runs for document in runs[name]]
    kinds = {(d["task"], d["dataset"], tuple(sorted(d["splits"]))) for d in documents}
    if len(kinds) != 1:
        found = "; ".join(f"{task} on {data} ({', '.join(splits)})" for task, data, splits in sorted(kinds))
        raise ValueError(f"runs of different tasks, data or splits cannot be compared: {found or 'there are none'}")
    first = documents[0]
    metrics = main_metrics(first, metrics_of(targets_of(first["units"], first["task"])))
    return first, metrics


def _row(name: str, documents: Sequence[Mapping[str, Any]]) -> Row:
    speeds = [document["throughput"]["forward_samples_per_s"] for document in documents]
    seconds = [document["training"]["seconds_per_epoch"] for document in documents]
    splits = {split: [document["splits"][split] for document in documents] for split in documents[0]["splits"]}
    averages = [document["average"] for document in documents if document["average"] is not None]
    values = {split: _means(found) for split, found in splits.items()}
    deviations = {split: _deviations(found) for split, found in (splits | {"average": averages}).items()}
    return Row(
        label=name if len(documents) == 1 else f"{name} ({len(documents)} seeds)",
        splits=values,
        average=_means(averages),
        seconds_per_epoch=_mean(seconds),
        samples_per_s=_mean(speeds),
        parameters=documents[0]["run"]["parameters"],
        deviations=deviations if len(documents) > 1 else {},
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(values[name] for values in found) for name in (found[0] if found else ())}


def _deviations(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.stdev(values[name] for values in found) for name in (found[0] if len(found) > 1 else ())}


def _parameters(row: Row) -> str:
    return "-" if row.parameters is None else f"{row.parameters / 1e6:.2f} M"


def _paper_rows(task: str) -> list[Row]:
    rows = []
    for name, metrics in OTHERS.get(task, {}).items():
        seconds, speed = metrics.get("time", (None, None))
        values = {key: value for key, value in metrics.items() if key != "time"}
        splits = {split: {key: v[i] for key, v in values.items()} for i, split in enumerate(PAPER[task].sizes)}
        average = {key: v[-1] for key, v in values.items()}
        rows.append(
            Row(
                label=f"{name}, the paper's",
                splits=splits,
                average=average,
                seconds_per_epoch=seconds,
                samples_per_s=speed,
            )
        )
    return rows


def _devices(runs: Runs) -> str:
    return "; ".join(sorted({document["run"]["device"] for name in runs for document in runs[name]}))


def _notes(runs: Runs) -> str:
    facts = ["Train: time of an epoch. Infer.: samples/s, forward pass only."]
    for name, documents in runs.items():
        run, training = documents[0]["run"], documents[0]["training"]
        frames = " ".join(str(run["frames"][key]) for key in ("method", "dim", "group"))
        seeds = ", ".join(str(document["run"]["seed"]) for document in documents)
        facts.append(
            f"{name}: {run['model']}, step {run['step']}, {format_number(training['epochs'], '.4g')} epochs, frames in "
            f"evaluation {frames}, seed {seeds}, {run['device']}."
        )
    return "\n".join(f"- {fact}" for fact in facts)
