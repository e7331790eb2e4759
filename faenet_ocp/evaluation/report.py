"""Markdown tables of a results document (`evaluation.build_results`). Computes no metric.

The columns are those of the FAENet paper (Duval et al., ICML 2023): Table 9 for IS2RE, Table 1 and
its extended form (C.4) for S2EF.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from faenet_ocp.evaluation.metrics import BASELINES, ENERGY_THRESHOLD, FORCE_THRESHOLD, SPLITS

# Rows of the paper as printed there (forces: meV/A in the paper, eV/A here).
_PAPER: dict[str, dict[str, Any]] = {
    "is2re": {
        "source": "Table 9",
        "training_set": "OC20 IS2RE (460,328 training systems)",
        "seconds_per_epoch": 12 * 60,
        "forward_samples_per_s": 2469,
        "energy_mae": (0.5446, 0.6115, 0.5707, 0.5449, 0.5679),
        "energy_within_threshold": (4.46, 2.95, 4.67, 3.01, 3.78),
    },
    "s2ef": {
        "source": "Table 1 and the extended table of C.4",
        "training_set": "OC20 S2EF-2M",
        "seconds_per_epoch": 75 * 60,
        "forward_samples_per_s": 623,
        # The average is 0.4643 in the extended table and 0.4642 in Table 1.
        "energy_mae": (0.3960, 0.4548, 0.4295, 0.5766, 0.4643),
        "forces_mae": (0.0511, 0.0589, 0.0507, 0.0694, 0.0575),
    },
}
_PAPER_TABLE1_ENERGY = 0.4642
_LEGEND = {
    "is2re": f"EwT: systems with an energy error below {ENERGY_THRESHOLD} eV.",
    "s2ef": "Forces: of free atoms; the mean predictor's are zero. EFwT: systems with an energy error below "
    f"{ENERGY_THRESHOLD} eV and every force component off by less than {FORCE_THRESHOLD} eV/A.",
}


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One line of a table; `average` holds OC20's four-split means, empty without all four."""

    label: str
    splits: Mapping[str, Mapping[str, float | None]]
    average: Mapping[str, float | None]
    seconds_per_epoch: float | None = None
    samples_per_s: float | None = None


def render_table(results: Mapping[str, Any], *, reference: bool = True) -> str:
    """Markdown of a results document: the paper's columns, then what the numbers stand for.

    Rows: this run, the two baselines (always), and with `reference` the paper's FAENet, marked as
    the paper's. A split that was not evaluated is "-"; averages need all four.

    Args:
        results: of `evaluation.build_results` or `evaluation.load_results`.
        reference: whether the paper's row is shown.
    """
    rows = _rows(results)
    paper = [_paper_row(results)] if reference else []
    if results["task"] == "is2re":
        tables = [_table([*rows, *paper], _time_columns() + _energy_columns() + _ewt_columns())]
    else:
        table1 = [_paper_row(results, energy_average=_PAPER_TABLE1_ENERGY)] if reference else []
        averages = [
            ("Energy MAE [eV]", _cell("average", "energy_mae", _FIXED4)),
            ("Force MAE [meV/A]", _cell("average", "forces_mae", _MILLI)),
        ]
        tables = [
            "Averages over the four splits (Table 1):\n\n" + _table([*rows, *table1], _time_columns() + averages),
            "Per split (extended table):\n\n"
            + _table([*rows, *paper], _time_columns() + _energy_columns() + _force_columns()),
            "Further metrics (not in the paper):\n\n" + _table(rows[:1], _further_columns()),
        ]
    return "\n\n".join([f"Data: {results['dataset']}", *tables, _notes(results, reference)]) + "\n"


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
    paper = _PAPER[results["task"]]
    metrics = {key: values for key, values in paper.items() if isinstance(values, tuple)}
    average = {key: values[-1] for key, values in metrics.items()}
    if energy_average is not None:
        average["energy_mae"] = energy_average
    place = "OC20, RTX8000" if results["oc20"] else "OC20, RTX8000; not comparable"
    return _Row(
        label=f"FAENet, the paper's ({place})",
        splits={split: {key: values[i] for key, values in metrics.items()} for i, split in enumerate(SPLITS)},
        average=average,
        seconds_per_epoch=paper["seconds_per_epoch"],
        samples_per_s=paper["forward_samples_per_s"],
    )


_Column = tuple[str, Callable[[_Row], str]]


def _format(value: float | None, scale: float, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value * scale:{spec}}{unit}"


_FIXED4 = (1.0, ".4f", "")
_FIXED3 = (1.0, ".3f", "")
_MILLI = (1e3, ".1f", "")
_PERCENT = (1.0, ".2f", "%")


def _cell(split: str, key: str, style: tuple[float, str, str]) -> Callable[[_Row], str]:
    def text(row: _Row) -> str:
        metrics = row.average if split == "average" else row.splits.get(split, {})
        return _format(metrics.get(key), *style)

    return text


def _per_split(first: str, key: str, style: tuple[float, str, str]) -> list[_Column]:
    """The four splits and their average; the first header names the metric."""
    columns = [(title, _cell(split, key, style)) for split, title in SPLITS.items()]
    columns.append(("Average", _cell("average", key, style)))
    return [(f"{first}: {columns[0][0]}", columns[0][1]), *columns[1:]]


def _time_columns() -> list[_Column]:
    return [
        ("Train", lambda row: _duration(row.seconds_per_epoch)),
        ("Infer.", lambda row: _format(row.samples_per_s, 1.0, ".0f")),
    ]


def _energy_columns() -> list[_Column]:
    return _per_split("Energy MAE [eV]", "energy_mae", _FIXED4)


def _ewt_columns() -> list[_Column]:
    return _per_split("EwT", "energy_within_threshold", _PERCENT)


def _force_columns() -> list[_Column]:
    return _per_split("Force MAE [meV/A]", "forces_mae", _MILLI)


def _further_columns() -> list[_Column]:
    return [
        *_per_split("Force cosine", "forces_cosine_similarity", _FIXED3),
        *_per_split("Magnitude error [meV/A]", "forces_magnitude_error", _MILLI),
        *_per_split("EFwT", "energy_forces_within_threshold", _PERCENT),
    ]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f}s" if seconds < 100 else f"{seconds / 60:,.0f}min"


def _table(rows: Sequence[_Row], columns: Sequence[_Column]) -> str:
    """Markdown, padded so that it also reads well on a terminal."""
    lines = [["Model", *(header for header, _ in columns)]]
    lines += [[row.label.replace("|", "\\|"), *(cell(row) for _, cell in columns)] for row in rows]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns) + 1)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in aligned)


def _notes(results: Mapping[str, Any], reference: bool) -> str:
    run, speed, training = results["run"], results["throughput"], results["training"]
    facts = [
        f"Systems: {_counts(results['splits'])}.",
        "Train: time of an epoch. Infer.: samples/s, forward pass only. "
        + _LEGEND[results["task"]]
        + " Average: over the four splits.",
    ]
    facts.append(
        f"This run: {run['config']}, {run['parameters']:,} parameters, epoch "
        f"{_format(run['epoch'], 1.0, '.4g')}, step {_format(run['step'], 1, 'd')}, frames "
        f"{_frames(run['frames'])}, seed {run['seed']}; {run['device']}; inference end to end "
        f"{_format(speed['end_to_end_samples_per_s'], 1.0, '.0f')} samples/s; "
        f"{_format(training['epochs'], 1.0, '.4g')} epochs trained."
    )
    facts += _other_splits(results["splits"])
    facts += _unseen(results["baselines"]["linear_in_composition"]["splits"])
    if reference:
        facts.append(_paper_note(results))
    return "\n".join(f"- {fact}" for fact in facts)


def _frames(frames: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in frames.items())


def _counts(splits: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{SPLITS.get(name, name)} {metrics['num_systems']:,}"
        + (f" ({metrics['num_atoms']:,} free atoms)" if "num_atoms" in metrics else "")
        for name, metrics in splits.items()
    )


def _other_splits(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Splits outside OC20's four have no column; their numbers follow as text."""
    lines = []
    for name, metrics in splits.items():
        if name not in SPLITS:
            text = f"{name}: energy MAE {metrics['energy_mae']:.4f} eV, EwT "
            text += f"{metrics['energy_within_threshold']:.2f}%"
            if "forces_mae" in metrics:
                text += f", force MAE {1e3 * metrics['forces_mae']:.1f} meV/A"
            lines.append(text + ".")
    return lines


def _unseen(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    key = "num_systems_unseen_elements"
    found = [f"{SPLITS.get(n, n)} {m[key]:,}" for n, m in splits.items() if m.get(key)]
    if not found:
        return []
    return [
        f"{BASELINES['linear_in_composition']}: elements that the training set does not have count "
        f"as 0 eV; systems with such elements: {', '.join(found)}."
    ]


def _paper_note(results: Mapping[str, Any]) -> str:
    paper = _PAPER[results["task"]]
    source = f"The paper's row: {paper['source']} of Duval et al. (ICML 2023), as published; "
    source += f"{paper['training_set']}, one RTX8000."
    if results["oc20"]:
        return source
    return f"{source} **It is on OC20, the other rows are on {results['dataset']}: not comparable.**"
