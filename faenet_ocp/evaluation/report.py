"""Markdown tables of a results document (`results.build_results`). Computes no metric.

The columns are those of the FAENet paper (Duval et al., ICML 2023), Table 9 for IS2RE, Table 1 and its extended form
(C.4) for S2EF, Table 2 for QM7-X, elsewhere the first metric of each target; after them the other metrics that
`targets.py` has titles for. Splits have the names that the configuration gives them; the paper's row stands below
results on the same data only.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from faenet_ocp.evaluation.by_atoms import not_learnt
from faenet_ocp.evaluation.paper import PAPER, TABLE1_ENERGY
from faenet_ocp.evaluation.results import BASELINES, SPLITS, unseen_in_words
from faenet_ocp.targets import TARGETS, Metric, Target, metrics_of, targets_of

_EWT, _EFWT = TARGETS["energy"].threshold, TARGETS["forces"].threshold
_LEGEND = {
    "energy_within_threshold": f"EwT: systems with an energy error below {_EWT} eV.",
    "forces_mae": "Forces: of free atoms; the mean predictor's are zero.",
    "energy_forces_within_threshold": f"EFwT: systems with an energy error below {_EWT} eV and every force component "
    f"off by less than {_EFWT} eV/A.",
}


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One line of a table; `average` holds the means over splits, empty without any."""

    label: str
    splits: Mapping[str, Mapping[str, float | None]]
    average: Mapping[str, float | None]
    seconds_per_epoch: float | None = None
    samples_per_s: float | None = None

    def has(self, metrics: Iterable[Metric]) -> bool:
        return any(metric.name in values for metric in metrics for values in self.splits.values())


_Column = tuple[str, Callable[[_Row], str]]


def render_table(results: Mapping[str, Any]) -> str:
    """Markdown of a results document: the main columns, the further metrics, then what the numbers stand for.

    Rows: this run, the two baselines, and on the paper's splits its FAENet, marked as the paper's.

    Args:
        results: of `results.build_results`.
    """
    metrics = metrics_of(targets_of(results["units"], results["task"]))
    main = _main_metrics(results, metrics)
    further = [metric for metric in metrics.values() if metric.title and metric not in main]
    rows, has_average = _rows(results), results["average"] is not None
    papers = [_paper_row(results)] if results["official"] else []
    rows = [row for row in rows if row.has(main)]
    tables = [_table([*rows, *papers], _time_columns() + _split_columns(main, _ordered(results), average=has_average))]
    if results["task"] == "s2ef" and has_average:
        papers = [_paper_row(results, energy_average=TABLE1_ENERGY)] if results["official"] else []
        averages = [(metric.header, _cell("average", metric)) for metric in main]
        table1 = _table([*rows, *papers], _time_columns() + averages)
        tables = [
            f"Averages over the splits{' (Table 1)' if papers else ''}:\n\n{table1}",
            f"Per split{' (extended table)' if papers else ''}:\n\n{tables[0]}",
        ]
    if further:
        columns = _split_columns(further, _ordered(results), average=has_average)
        table = _table([row for row in rows if row.has(further)], columns)
        tables.append(f"Further metrics{' (not in the paper)' if papers else ''}:\n\n{table}")
    tables += [_by_atoms(TARGETS[name], splits) for name, splits in results.get("by_atoms", {}).items()]
    unseen = results.get("unseen_elements", {}).items()
    warnings = [f"**{unseen_in_words(SPLITS.get(split, split), counts)}.**" for split, counts in unseen]
    warnings += [
        f"**{SPLITS.get(split, split)}: {reason}.**"
        for name, splits in results.get("by_atoms", {}).items()
        for split, groups in splits.items()
        for reason in not_learnt(TARGETS[name], groups)
    ]
    return "\n\n".join([f"Data: {results['dataset']}", *warnings, *tables, _notes(results, metrics)]) + "\n"


def _by_atoms(target: Target, splits: Mapping[str, Mapping[str, Any]]) -> str:
    """Error, correlation with the labels, and spread over theirs, of each component for surface and adsorbate."""
    metric = target.metrics[0]
    lines = [["Atoms", "number", metric.header, "correlation: x", "y", "z", "spread: x", "y", "z"]]
    for split, groups in splits.items():
        for name, values in groups.items():
            numbers = [_format(value, ".2f") for value in [*values["correlation"], *values["spread"]]]
            head = [f"{SPLITS.get(split, split)}, {name}", f"{values['num_atoms']:,}", metric.text(values["mae"])]
            lines.append([*head, *numbers])
    return f"{target.name.capitalize()} by component (spread: of predictions, over that of labels):\n\n{_padded(lines)}"


def _main_metrics(results: Mapping[str, Any], metrics: Mapping[str, Metric]) -> list[Metric]:
    """Those of the paper's table, elsewhere the first of each target."""
    papers = PAPER[results["task"]].metrics if results["task"] in PAPER else ()
    if all(name in metrics for name in papers) and papers:
        return [metrics[name] for name in papers]
    return [target.metrics[0] for target in targets_of(results["units"], results["task"])]


def _ordered(results: Mapping[str, Any]) -> list[str]:
    """The splits that were evaluated, OC20's first and in their order."""
    return sorted(results["splits"], key=lambda split: [*SPLITS, split].index(split))


def _rows(results: Mapping[str, Any]) -> list[_Row]:
    run = _Row(
        label=f"{results['run']['model']} (this run)",
        splits=results["splits"],
        average=results["average"] or {},
        seconds_per_epoch=results["training"]["seconds_per_epoch"],
        samples_per_s=results["throughput"]["forward_samples_per_s"],
    )
    baselines = [
        _Row(
            label=label,
            splits=results["baselines"][name]["splits"],
            average=results["baselines"][name]["average"] or {},
        )
        for name, label in BASELINES.items()
    ]
    return [run, *baselines]


def _paper_row(results: Mapping[str, Any], *, energy_average: float | None = None) -> _Row:
    paper = PAPER[results["task"]]
    metrics, splits = paper.metrics, list(paper.sizes)
    average = {key: values[-1] for key, values in metrics.items() if len(values) > len(splits)}
    if energy_average is not None:
        average["energy_mae"] = energy_average
    return _Row(
        label=f"FAENet, the paper's ({paper.data}, RTX8000)",
        splits={split: {key: values[i] for key, values in metrics.items()} for i, split in enumerate(splits)},
        average=average,
        seconds_per_epoch=paper.seconds_per_epoch,
        samples_per_s=paper.forward_samples_per_s,
    )


def _cell(split: str, metric: Metric) -> Callable[[_Row], str]:
    def text(row: _Row) -> str:
        values = row.average if split == "average" else row.splits.get(split, {})
        return metric.text(values.get(metric.name))

    return text


def _split_columns(metrics: Iterable[Metric], splits: Iterable[str], *, average: bool) -> list[_Column]:
    """For each metric its splits and their average; the first header of each names the metric."""
    columns: list[_Column] = []
    titles = {split: SPLITS.get(split, split) for split in splits} | ({"average": "Average"} if average else {})
    for metric in metrics:
        named = [(title, _cell(split, metric)) for split, title in titles.items()]
        columns += [(f"{metric.header}: {named[0][0]}", named[0][1]), *named[1:]]
    return columns


def _time_columns() -> list[_Column]:
    return [
        ("Train", lambda row: _duration(row.seconds_per_epoch)),
        ("Infer.", lambda row: _format(row.samples_per_s, ".0f")),
    ]


def _format(value: float | None, spec: str) -> str:
    return "-" if value is None else f"{value:{spec}}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f}s" if seconds < 100 else f"{seconds / 60:,.0f}min"


def _table(rows: Sequence[_Row], columns: Sequence[_Column]) -> str:
    lines = [["Model", *(header for header, _ in columns)]]
    return _padded(lines + [[row.label.replace("|", "\\|"), *(cell(row) for _, cell in columns)] for row in rows])


def _padded(lines: Sequence[Sequence[str]]) -> str:
    """Markdown of a header and rows that also reads well on a terminal."""
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in aligned)


def _notes(results: Mapping[str, Any], metrics: Mapping[str, Metric]) -> str:
    run, speed, training = results["run"], results["throughput"], results["training"]
    frames = ", ".join(f"{key} {value}" for key, value in run["frames"].items())
    legend = ["Train: time of an epoch. Infer.: samples/s, forward pass only."]
    legend += [words for name, words in _LEGEND.items() if name in metrics]
    legend += ["Average: over the splits."] if results["average"] is not None else []
    facts = [
        f"Systems: {_counts(results['splits'])}.",
        " ".join(legend),
        f"This run: {run['config']}, {run['parameters']:,} parameters, epoch {_format(run['epoch'], '.4g')}, step "
        f"{_format(run['step'], 'd')}, frames {frames}, seed {run['seed']}; {run['device']}; inference end to end "
        f"{_format(speed['end_to_end_samples_per_s'], '.0f')} samples/s; "
        f"{_format(training['epochs'], '.4g')} epochs trained.",
    ]
    if results["official"]:
        paper = PAPER[results["task"]]
        facts.append(
            f"The paper's row: {paper.source} of Duval et al. (ICML 2023), as published; {paper.training_set}, "
            "one RTX8000."
        )
    return "\n".join(f"- {fact}" for fact in facts)


def _counts(splits: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{SPLITS.get(name, name)} {metrics['num_systems']:,}"
        + (f" ({metrics['num_atoms']:,} free atoms)" if "num_atoms" in metrics else "")
        for name, metrics in splits.items()
    )
