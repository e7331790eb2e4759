"""Markdown tables of a results document (`results.build_results`). Computes no metric.

The columns are those of the FAENet paper (Duval et al., ICML 2023), Table 9 for IS2RE, Table 1 and its extended form
(C.4) for S2EF, Table 2 for QM7-X, elsewhere the first metric of each target; after them the other metrics that
`targets.py` has titles for. Splits have the names that the configuration gives them; the paper's row stands below
results on the same data only.
"""

from collections.abc import Mapping
from typing import Any

from faenet_ocp.evaluation.by_atoms import not_learnt
from faenet_ocp.evaluation.paper import PAPER, TABLE1_ENERGY
from faenet_ocp.evaluation.results import BASELINES, SPLITS, unseen_in_words
from faenet_ocp.evaluation.tables import (
    Row,
    cell,
    format_number,
    main_metrics,
    markdown_table,
    ordered_splits,
    padded,
    split_columns,
    time_columns,
)
from faenet_ocp.targets import TARGETS, Metric, Target, metrics_of, targets_of

_EWT, _EFWT = TARGETS["energy"].threshold, TARGETS["forces"].threshold
_LEGEND = {
    "energy_within_threshold": f"EwT: systems with an energy error below {_EWT} eV.",
    "forces_mae": "Forces: of free atoms; the mean predictor's are zero.",
    "energy_forces_within_threshold": f"EFwT: systems with an energy error below {_EWT} eV and every force component "
    f"off by less than {_EFWT} eV/A.",
}


def render_table(results: Mapping[str, Any]) -> str:
    """Markdown of a results document: the main columns, the further metrics, then what the numbers stand for.

    Rows: this run, the two baselines, and on the paper's splits its FAENet, marked as the paper's.

    Args:
        results: of `results.build_results`.
    """
    metrics = metrics_of(targets_of(results["units"], results["task"]))
    main = main_metrics(results, metrics)
    further = [metric for metric in metrics.values() if metric.title and metric not in main]
    rows, has_average = _rows(results), results["average"] is not None
    papers = [_paper_row(results)] if results["official"] else []
    rows = [row for row in rows if row.has(main)]
    tables = [
        markdown_table(
            [*rows, *papers], time_columns() + split_columns(main, ordered_splits(results), average=has_average)
        )
    ]
    if results["task"] == "s2ef" and has_average:
        papers = [_paper_row(results, energy_average=TABLE1_ENERGY)] if results["official"] else []
        averages = [(metric.header, cell("average", metric)) for metric in main]
        table1 = markdown_table([*rows, *papers], time_columns() + averages)
        tables = [
            f"Averages over the splits{' (Table 1)' if papers else ''}:\n\n{table1}",
            f"Per split{' (extended table)' if papers else ''}:\n\n{tables[0]}",
        ]
    if further:
        columns = split_columns(further, ordered_splits(results), average=has_average)
        table = markdown_table([row for row in rows if row.has(further)], columns)
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
            numbers = [format_number(value, ".2f") for value in [*values["correlation"], *values["spread"]]]
            head = [f"{SPLITS.get(split, split)}, {name}", f"{values['num_atoms']:,}", metric.text(values["mae"])]
            lines.append([*head, *numbers])
    return f"{target.name.capitalize()} by component (spread: of predictions, over that of labels):\n\n{padded(lines)}"


def _rows(results: Mapping[str, Any]) -> list[Row]:
    run = Row(
        label=f"{results['run']['model']} (this run)",
        splits=results["splits"],
        average=results["average"] or {},
        seconds_per_epoch=results["training"]["seconds_per_epoch"],
        samples_per_s=results["throughput"]["forward_samples_per_s"],
    )
    baselines = [
        Row(
            label=label,
            splits=results["baselines"][name]["splits"],
            average=results["baselines"][name]["average"] or {},
        )
        for name, label in BASELINES.items()
    ]
    return [run, *baselines]


def _paper_row(results: Mapping[str, Any], *, energy_average: float | None = None) -> Row:
    paper = PAPER[results["task"]]
    metrics, splits = paper.metrics, list(paper.sizes)
    average = {key: values[-1] for key, values in metrics.items() if len(values) > len(splits)}
    if energy_average is not None:
        average["energy_mae"] = energy_average
    return Row(
        label=f"FAENet, the paper's ({paper.data}, RTX8000)",
        splits={split: {key: values[i] for key, values in metrics.items()} for i, split in enumerate(splits)},
        average=average,
        seconds_per_epoch=paper.seconds_per_epoch,
        samples_per_s=paper.forward_samples_per_s,
    )


def _notes(results: Mapping[str, Any], metrics: Mapping[str, Metric]) -> str:
    run, speed, training = results["run"], results["throughput"], results["training"]
    frames = ", ".join(f"{key} {value}" for key, value in run["frames"].items())
    legend = ["Train: time of an epoch. Infer.: samples/s, forward pass only."]
    legend += [words for name, words in _LEGEND.items() if name in metrics]
    legend += ["Average: over the splits."] if results["average"] is not None else []
    facts = [
        f"Systems: {_counts(results['splits'])}.",
        " ".join(legend),
        f"This run: {run['config']}, {run['parameters']:,} parameters, epoch {format_number(run['epoch'], '.4g')}, "
        f"step {format_number(run['step'], 'd')}, frames {frames}, seed {run['seed']}; {run['device']}; inference end "
        f"to end {format_number(speed['end_to_end_samples_per_s'], '.0f')} samples/s; "
        f"{format_number(training['epochs'], '.4g')} epochs trained.",
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
