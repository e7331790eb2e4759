"""Sweeps: a grid of values, each combination of which is one run; or named runs, or both.

A grid is YAML that names keys of the configuration, nested or dotted, each with the list of its values:

    optim.lr_initial: [1.0e-3, 2.0e-3]
    model:
      num_interactions: [3, 4, 5]

gives six runs, the last key varying fastest. `runs` gives them names: each is another configuration, or changes to the
common one, `config` (a path relative to this file), which is not needed with `--config`; a grid beside them is gone
through for each:

    config: is2re.yml
    runs:
      faenet: {}
      schnet: {model: {name: schnet, hidden_channels: 128}}   # another model's options take the place of all others
      painn: ../is2re/painn.yml
    job.seed: [0, 1, 2]

`paper: Table 6` has the table end with the rows of that table of the paper; without it they are those of the task.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from faenet_ocp.common.files import expand_path
from faenet_ocp.config.changes import flat
from faenet_ocp.config.yaml import find_config, load_yaml, merge

Grid = dict[str, list[Any]]
TABLE6 = "Table 6"
_OWN_FOLDER = ("job", "job.identifier", "job.run_dir")


class Sweep(NamedTuple):
    """A file of runs.

    Attributes:
        path: the file.
        config: the configuration that all share, if the file names one.
        runs: by name: the path of another configuration, or changes to the common one; empty: the grid alone.
        grid: dotted keys with their values.
        paper: which table of the paper results are shown beside; None: the task's.
    """

    path: Path
    config: Path | None
    runs: dict[str, Path | dict[str, Any]]
    grid: Grid
    paper: str | None = None


class Element(NamedTuple):
    """One run of a sweep: its row's name, the values of the grid's keys, and the configuration, not validated yet."""

    name: str
    values: dict[str, Any]
    raw: dict[str, Any]


def load_sweep(path: str | Path) -> Sweep:
    """Reads a sweep.

    Raises:
        ValueError: no such file, neither keys nor runs, a key without a list of values, a value or key given twice.
    """
    path = find_config(path, flag="--sweep-yml")
    content = load_yaml(path)
    config, runs, paper = content.pop("config", None), content.pop("runs", {}), content.pop("paper", None)
    if paper is not None and paper != TABLE6:
        raise ValueError(f"{path}: paper: {paper!r}; the only table that is named so is {TABLE6!r}")
    grid: Grid = {}
    for key, values in flat(content):
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: {key}: expected a list of values, got {values!r}")
        if any(value in values[:number] for number, value in enumerate(values)):
            raise ValueError(f"{path}: {key}: a value is listed twice: {values!r}")
        if key in grid:
            raise ValueError(f"{path}: {key}: given twice, nested and dotted")
        if key in _OWN_FOLDER:
            raise ValueError(f"{path}: {key}: every run of a sweep gets its own folder; leave this out")
        grid[key] = values
    if not grid and not runs:
        raise ValueError(f"{path}: names no keys and no runs")
    return Sweep(path, None if config is None else _beside(path, config), _named(path, runs), grid, paper)


def _named(path: Path, runs: Any) -> dict[str, Path | dict[str, Any]]:
    if not isinstance(runs, dict):
        raise ValueError(f"{path}: runs: expected names with what belongs to each, got {runs!r}")
    found: dict[str, Path | dict[str, Any]] = {}
    for name, given in runs.items():
        if isinstance(given, str):
            found[str(name)] = _beside(path, given)
        elif isinstance(given, dict | None):
            found[str(name)] = given or {}
        else:
            raise ValueError(f"{path}: runs.{name}: expected a path or keys of the configuration, got {given!r}")
    return found


def _beside(path: Path, name: str) -> Path:
    target = path.parent / expand_path(str(name))
    if not target.is_file():
        raise ValueError(f"{path}: {name}: there is no such file beside it")
    return target


def expand(sweep: Sweep, common: Mapping[str, Any] | None, given: Mapping[str, Any], identifier: str) -> list[Element]:
    """All runs, in the order of the file; their folders are `<identifier>[_<name>][_run<number>]`.

    A value that is a mapping is merged into what is there, as everywhere, but for a `model` with a `name`. The file's
    own keys win over those of the command line, which win over configurations.

    Args:
        sweep: see `load_sweep`.
        common: the configuration that runs share, with the command line's keys; None if there is none.
        given: the command line's keys alone, for runs with another configuration.
        identifier: of the sweep.

    Raises:
        ValueError: runs without a configuration.
    """
    elements = []
    combinations = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    for name, run in (sweep.runs or {"": {}}).items():
        for number, values in enumerate(combinations):
            if isinstance(run, Path):
                merged = merge(load_yaml(run), given)
            elif common is None:
                raise ValueError(f"{sweep.path}: runs.{name}: changes what? give config: in the file, or --config")
            else:
                merged = _changed(common, run)
            for key, value in values.items():
                merged = _changed(merged, _nested(key, value))
            numbered = not name or len(combinations) > 1
            folder = "_".join(part for part in (identifier, name, f"run{number}" if numbered else "") if part)
            elements.append(Element(name or f"run{number}", values, merge(merged, {"job": {"identifier": folder}})))
    return elements


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _changed(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merged; a model that is named takes the place of the one that is there."""
    merged, model = merge(raw, changes), changes.get("model")
    if isinstance(model, Mapping) and "name" in model:
        merged["model"] = dict(model)
    return merged
