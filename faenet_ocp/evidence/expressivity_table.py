"""All networks on all pairs of `expressivity`, in several processes, and the table of it."""

import json
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from faenet_ocp.common.files import software_versions, write_json, write_text
from faenet_ocp.common.pool import ordered_map
from faenet_ocp.evaluation.tables import padded
from faenet_ocp.evidence.expressivity import Accuracy, Pair, congruence, pairs, rows, spread, train

FORMAT = 1
_SAVE_EVERY = 5.0
"""Seconds."""


def run(out: Path, *, seeds: int, epochs: int, num_workers: int) -> str:
    """Trains what the file does not hold yet.

    Args:
        out: JSON; the table goes beside it (.md).
        seeds: networks for each row and pair.
        epochs: of each.
        num_workers: processes.

    Returns:
        the table.

    Raises:
        ValueError: the file is something else, or was made with other epochs.
    """
    found, keys = _read(out, epochs), _keys()
    done = found["accuracy"]
    tasks = [(*key, seed, epochs) for key, name in keys.items() for seed in range(len(done.get(name, [])), seeds)]
    results = ordered_map(_train, tasks, num_workers)
    bar = tqdm(results, total=len(tasks), desc="expressivity", unit="network", disable=None)
    saved = time.monotonic()
    for number, (task, accuracy) in enumerate(zip(tasks, bar, strict=True), 1):
        done.setdefault(keys[task[:2]], []).append(list(accuracy))
        if time.monotonic() > saved + _SAVE_EVERY or number == len(tasks):
            write_json(out, found)
            saved = time.monotonic()
    table = render(found)
    write_text(out.with_suffix(".md"), table)
    return table


def _keys() -> dict[tuple[int, int], str]:
    """What the file calls each row and pair."""
    networks, graphs = rows(), list(pairs())
    every = product(range(len(networks)), range(len(graphs)))
    return {(row, pair): f"{networks[row].name} | {graphs[pair].test}: {graphs[pair].name}" for row, pair in every}


def _train(row: int, pair: int, seed: int, epochs: int) -> Accuracy:
    torch.set_num_threads(1)
    return train(list(pairs())[pair], rows()[row], seed, epochs=epochs)


def _read(out: Path, epochs: int) -> dict[str, Any]:
    new = {"format": FORMAT, "kind": "expressivity", "epochs": epochs, "versions": software_versions(), "accuracy": {}}
    if not out.exists():
        return new
    try:
        known = json.loads(out.read_text())
    except ValueError as error:
        raise ValueError(f"{out}: is no JSON ({error})") from error
    if not isinstance(known, dict) or known.get("kind") != "expressivity" or known.get("format") != FORMAT:
        raise ValueError(f"{out}: holds something else; choose another file")
    if known["epochs"] != epochs:
        raise ValueError(f"{out}: was made with --epochs {known['epochs']}, not {epochs}; choose another file")
    return known


def render(found: Mapping[str, Any]) -> str:
    """Markdown: `summary`, then for each pair a row of every network with deviations over seeds."""
    lines = [["Network", "Pair", "Congruent", "Best epoch", "Last epoch", "Moved copies", "Seeds"]]
    networks, graphs = rows(), list(pairs())
    for (row, pair), key in _keys().items():
        values = found["accuracy"].get(key, [])
        if not values:
            continue
        shown = spread([Accuracy(*value) for value in values])
        cells = [f"{mean:.0f} +- {deviation:.0f}" for mean, deviation in shown.values()]
        lines.append([networks[row].name, _name(graphs[pair]), _congruent(graphs[pair]), *cells, str(len(values))])
    return f"{summary(found)}\n{padded(lines)}\n\n{_NOTE}\n"


def summary(found: Mapping[str, Any]) -> str:
    """Markdown: a row for each pair, a column for each network; means of best epoch / last epoch / moved copies."""
    networks, graphs, keys = rows(), list(pairs()), _keys()
    lines = [["Pair", "Congruent", *(network.name for network in networks)]]
    for number, pair in enumerate(graphs):
        cells = []
        for row in range(len(networks)):
            values = found["accuracy"].get(keys[row, number], [])
            shown = spread([Accuracy(*value) for value in values]) if values else {}
            cells.append(" / ".join(f"{mean:.0f}" for mean, _ in shown.values()))
        lines.append([_name(pair), _congruent(pair), *cells])
    return padded(lines) + "\n"


def _name(pair: Pair) -> str:
    return f"{pair.test}: {pair.name}"


def _congruent(pair: Pair) -> str:
    return congruence(pair.first, pair.second)


_NOTE = (
    "- Accuracy in percent, mean and standard deviation over seeds. Best epoch: the published number, on the two graphs"
    " as they were trained on. Moved copies: 40 of each graph, turned and shifted at random, after the last epoch.\n"
    "- Congruent: whether one graph is the other, rotated, or only its mirror image. Of rotated ones an exactly"
    " invariant network cannot get more than 50 %: more on the unmoved graphs means that it is not invariant, or that"
    " frames drawn at random were right in one epoch of a hundred. Of mirror images the same holds under E(3)."
)
