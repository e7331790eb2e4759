"""The results of a run as one document: the facts that tables are made of, and that `metrics.json` holds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from faenet_ocp.common.files import plain, software_versions
from faenet_ocp.evaluation.paper import PAPER
from faenet_ocp.targets import Target, metrics_of

FORMAT = 1
SPLITS = {
    "val_id": "ID",
    "val_ood_ads": "OOD Ads",
    "val_ood_cat": "OOD Cat",
    "val_ood_both": "OOD Both",
}
BASELINES = {
    "mean_predictor": "mean predictor",
    "linear_in_composition": "linear in composition",
}


def dataset_label(dataset: str, task: str, sizes: Mapping[str, int]) -> tuple[str, bool]:
    """What results call a data set with these systems by split, and whether it is the paper's splits."""
    paper = PAPER.get(task)
    if paper is None or dataset != paper.data:
        return dataset, False
    if paper.are_its(sizes):
        return f"{dataset} {task.upper()}" if dataset == "OC20" else dataset, True
    return f"{dataset}'s formats, not its validation splits", False


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What was evaluated, where and how; goes into the results as it is.

    Attributes:
        model: name for the table's row.
        config: path or name of the YAML.
        parameters: numbers in all parameters.
        checkpoint: path, None for weights that were never saved.
        step, epoch: of the weights.
        device: in words, with the number of ranks if more than one.
        frames: ``{"method": ..., "dim": ..., "group": ...}`` used in this evaluation.
        seed: of the frames and of a split's subset.
    """

    model: str
    config: str
    parameters: int
    checkpoint: str | None
    step: int | None
    epoch: float | None
    device: str
    frames: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str | None] = field(default_factory=software_versions)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def build_results(
    *,
    task: str,
    targets: Sequence[Target],
    dataset: str,
    official: bool,
    run: RunInfo,
    splits: Mapping[str, Mapping[str, float | int]],
    baselines: Mapping[str, Mapping[str, Mapping[str, float | int]]],
    unseen: Mapping[str, Mapping[str, int]] | None = None,
    by_atoms: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    forward_samples_per_s: float | None = None,
    end_to_end_samples_per_s: float | None = None,
    seconds_per_epoch: float | None = None,
    epochs: float | None = None,
    ended: str | None = None,
) -> dict[str, Any]:
    """The document that `common.files.write_json` stores and tables are made from.

    Args:
        task: a key of `targets.TASKS`.
        targets: what is predicted.
        dataset: what data this is, in words, for tables and plots ("OC20 IS2RE all").
        official: True only for evaluation on the splits of the paper's table: its row belongs to these.
        run: see `RunInfo`.
        splits: split name to metrics (`validation.SplitOutcome.metrics`).
        baselines: split name to rows of `BASELINES` to metrics.
        unseen: split name to systems with elements that the training set lacks (`validation.SplitOutcome.unseen`).
        by_atoms: by target of rank 1 and split what `by_atoms.ByAtoms` computes.
        forward_samples_per_s: model forward passes only (the paper's footnote 6).
        end_to_end_samples_per_s: with loading and collecting.
        seconds_per_epoch, epochs: of training.
        ended: why training ended, in words.

    Raises:
        ValueError: a value that JSON does not know, with its place.
    """
    metrics = metrics_of(targets)
    by_row = {name: {split: rows[name] for split, rows in baselines.items() if name in rows} for name in BASELINES}
    results = {
        "format": FORMAT,
        "task": task,
        "dataset": dataset,
        "official": official,
        "run": asdict(run),
        "units": {name: metric.unit for name, metric in metrics.items()},
        "splits": splits,
        "average": _average(splits, list(metrics)),
        "baselines": {
            name: {"splits": rows, "average": _average(rows, list(metrics))} for name, rows in by_row.items()
        },
        "unseen_elements": {split: counts for split, counts in (unseen or {}).items() if counts},
        "by_atoms": by_atoms or {},
        "throughput": {
            "forward_samples_per_s": forward_samples_per_s,
            "end_to_end_samples_per_s": end_to_end_samples_per_s,
        },
        "training": {"seconds_per_epoch": seconds_per_epoch, "epochs": epochs, "ended": ended},
    }
    return plain(results, "results")


def read_results(path: str | Path) -> dict[str, Any]:
    """A document that was written before.

    Raises:
        ValueError: the file is no such document.
        OSError: it cannot be read.
    """
    text = Path(path).read_text()
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT or "splits" not in document:
        raise ValueError(f"{path}: no results of this version; expected the metrics.json of a run")
    return document


def unseen_in_words(split: str, counts: Mapping[str, int]) -> str:
    """Which elements the training set lacks, and what that means; `counts` as in `validation.SplitOutcome.unseen`."""
    listing = ", ".join(f"{symbol} (in {count:,})" for symbol, count in counts.items() if symbol != "all")
    return (
        f"{split}: {counts['all']:,} systems have elements that the training set lacks: {listing}. These count as 0 in "
        f"fitted element references and in the baseline {BASELINES['linear_in_composition']!r}, and the model has not "
        "learned them"
    )


def _average(splits: Mapping[str, Mapping[str, float | int]], names: Sequence[str]) -> dict[str, float] | None:
    """Mean over the splits, None where there is one, or not all four of OC20's."""
    among = [split for split in splits if split in SPLITS] or list(splits)
    if len(among) < 2 or (among[0] in SPLITS and len(among) < len(SPLITS)):
        return None
    return {
        name: sum(splits[split][name] for split in among) / len(among)
        for name in names
        if all(name in splits[split] for split in among)
    }
