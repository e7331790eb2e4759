"""Hyper-parameter sweeps: a grid of values, each combination of which is one run.

A grid is YAML that names keys of the configuration, nested or dotted, each with the list of its values:

    optim.lr_initial: [1.0e-3, 2.0e-3]
    model:
      num_interactions: [3, 4, 5]

gives six runs, the last key varying fastest.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from faenet_ocp.common.files import expand_path
from faenet_ocp.config.changes import flat
from faenet_ocp.config.yaml import load_yaml, merge

Grid = dict[str, list[Any]]


class Element(NamedTuple):
    """One run of a sweep: the values of the grid's keys, and the whole configuration, not validated yet."""

    values: dict[str, Any]
    raw: dict[str, Any]


def load_grid(path: str | Path) -> Grid:
    """Reads a grid, keys dotted.

    Raises:
        ValueError: no such file, no keys, a key without a list of values, a value or key given twice.
    """
    path = Path(expand_path(path))
    if not path.is_file():
        raise ValueError(f"--sweep-yml {path}: there is no such file")
    grid: Grid = {}
    for key, values in flat(load_yaml(path)):
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: {key}: expected a list of values, got {values!r}")
        if any(value in values[:number] for number, value in enumerate(values)):
            raise ValueError(f"{path}: {key}: a value is listed twice: {values!r}")
        if key in grid:
            raise ValueError(f"{path}: {key}: given twice, nested and dotted")
        grid[key] = values
    if not grid:
        raise ValueError(f"{path}: names no keys")
    return grid


def expand(raw: Mapping[str, Any], grid: Grid, identifier: str) -> list[Element]:
    """All combinations, in the order of the grid; the runs are called `<identifier>_run<number>`.

    A value that is a mapping is merged into what is there, as everywhere; the grid's own keys win over the rest.

    Raises:
        ValueError: the grid names the run or its folder, which the sweep does.
    """
    for key in grid:
        if key in ("job", "job.identifier", "job.run_dir"):
            raise ValueError(f"the sweep's {key}: every run of a sweep gets its own folder; leave this out")
    elements = []
    for number, combination in enumerate(itertools.product(*grid.values())):
        values = dict(zip(grid, combination, strict=True))
        merged = dict(raw)
        for key, value in values.items():
            for part in reversed(key.split(".")):
                value = {part: value}
            merged = merge(merged, value)
        merged = merge(merged, {"job": {"identifier": f"{identifier}_run{number}"}})
        elements.append(Element(values, merged))
    return elements
