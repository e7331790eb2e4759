"""Sweeps: the grid, the runs it stands for, running them here, and mistakes found before any of them begins."""

import json
import statistics
from pathlib import Path

import pytest
import yaml

from faenet_ocp.launch.cli import main
from faenet_ocp.launch.sweep import Element, expand, load_sweep

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--model.hidden_channels=64 --model.num_filters=16 --model.num_interactions=1 --model.num_gaussians=8 "
    "--model.tag_hidden_channels=8 --model.pg_hidden_channels=8 --optim.warmup_steps=0 --optim.batch_size=6 "
    "--optim.max_epochs=1 --optim.num_workers=0 --logger=none --cpu"
).split()


def _grid(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "grid.yml"
    path.write_text(text)
    return path


def _arguments(root: Path, tmp_path: Path, grid: str, *more: str) -> list[str]:
    sweep = ["--sweep-yml", str(_grid(tmp_path, grid)), "--identifier", "s", "--run-dir", str(tmp_path / "runs")]
    return ["--config", str(ROOT / "configs/is2re/faenet.yml"), *SMALL, f"--dataset.root={root}", *sweep, *more]


def _expand(tmp_path: Path, text: str, raw: dict | None = None, given: dict | None = None) -> list[Element]:
    return expand(load_sweep(_grid(tmp_path, text)), raw, given or {}, "name")


def test_all_combinations_in_order(tmp_path: Path) -> None:
    grid = "optim.lr_initial: [1e-3, 2e-3]\nmodel:\n  num_interactions: [3, 4, 5]\n"
    raw = {"optim": {"lr_initial": 9.0, "batch_size": 7}, "model": {"name": "faenet"}, "job": {"cpu": True}}
    elements = _expand(tmp_path, grid, raw)
    assert [tuple(element.values.values()) for element in elements] == [
        (rate, number) for rate in (1e-3, 2e-3) for number in (3, 4, 5)
    ]
    for number, (name, values, merged) in enumerate(elements):
        assert name == f"run{number}"
        assert merged["optim"] == {"lr_initial": values["optim.lr_initial"], "batch_size": 7}
        assert merged["model"] == {"name": "faenet", "num_interactions": values["model.num_interactions"]}
        assert merged["job"] == {"cpu": True, "identifier": f"name_run{number}"}
    assert raw == {"optim": {"lr_initial": 9.0, "batch_size": 7}, "model": {"name": "faenet"}, "job": {"cpu": True}}


def test_values_may_be_lists_and_mappings(tmp_path: Path) -> None:
    assert [element.raw["a"] for element in _expand(tmp_path, "a.b: [[1, 2], {c: 3}]\n", {"a": {"b": {"d": 4}}})] == [
        {"b": [1, 2]},
        {"b": {"d": 4, "c": 3}},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr_initial: 1e-3\n", "optim.lr_initial: expected a list of values, got 0.001"),
        ("optim:\n  lr_initial: []\n", "optim.lr_initial: expected a list of values, got []"),
        ("optim.lr_initial: [1, 1]\n", "optim.lr_initial: a value is listed twice"),
        ("optim.lr_initial: [1]\noptim: {lr_initial: [2]}\n", "optim.lr_initial: given twice"),
        ("job.identifier: [a]\n", "every run of a sweep gets its own folder"),
        ("runs: [a]\n", "runs: expected names with what belongs to each, got ['a']"),
        ("runs: {a: 3}\n", "runs.a: expected a path or keys of the configuration, got 3"),
        ("runs: {a: gone.yml}\n", "gone.yml: there is no such file beside it"),
        ("config: gone.yml\nruns: {a: {}}\n", "gone.yml: there is no such file beside it"),
        ("paper: Table 7\nruns: {a: {}}\n", "paper: 'Table 7'; the only table that is named so is 'Table 6'"),
        ("", "names no keys and no runs"),
        ("- 1\n", "the top level has to be a mapping"),
    ],
)
def test_wrong_grids(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"grid\.yml") as caught:
        load_sweep(_grid(tmp_path, text))
    assert message in str(caught.value)


def test_named_runs(tmp_path: Path) -> None:
    """Changes to the common configuration, another configuration, and a grid for each."""
    (tmp_path / "other.yml").write_text("model: {name: other, size: 1}\n")
    text = "runs:\n  a: {model: {name: b, width: 2}, optim: {x: 1}}\n  c:\n  d: other.yml\njob.seed: [0, 1]\n"
    raw = {"model": {"name": "a", "depth": 3}, "optim": {"y": 2}}
    elements = _expand(tmp_path, text, raw, {"optim": {"z": 5}})
    assert [element.name for element in elements] == ["a", "a", "c", "c", "d", "d"]
    assert [element.raw["job"] for element in elements[:3]] == [
        {"seed": 0, "identifier": "name_a_run0"},
        {"seed": 1, "identifier": "name_a_run1"},
        {"seed": 0, "identifier": "name_c_run0"},
    ]
    assert elements[0].raw["model"] == {"name": "b", "width": 2} and elements[0].raw["optim"] == {"x": 1, "y": 2}
    assert elements[2].raw["model"] == raw["model"] and elements[2].raw["optim"] == raw["optim"]
    assert elements[4].raw["model"] == {"name": "other", "size": 1} and elements[4].raw["optim"] == {"z": 5}
    (single,) = _expand(tmp_path, "runs: {a: {}}\n", raw)
    assert single.raw["job"]["identifier"] == "name_a"
    with pytest.raises(ValueError, match=r"runs\.a: changes what\? give config: in the file, or --config"):
        _expand(tmp_path, "runs: {a: {}}\n")
    with pytest.raises(ValueError, match="there is no such file"):
        load_sweep(tmp_path / "gone.yml")


def test_models_are_compared_and_gone_on_with(
    small_is2re: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file names its configuration; a second start reports what is there; seeds are one row."""
    text = (
        f"config: {ROOT / 'configs/is2re/faenet.yml'}\nruns:\n"
        "  painn: {model: {name: painn, hidden_channels: 8, num_interactions: 1}, frames: {method: none}}\n"
        "  egnn: {model: {name: egnn, hidden_channels: 8, num_interactions: 1}, frames: {method: none}}\n"
        "job.seed: [0, 1]\n"
    )
    options = [option for option in SMALL if not option.startswith("--model.")] + [f"--dataset.root={small_is2re}"]
    command = ["--sweep-yml", str(_grid(tmp_path, text)), *options, "--run-dir", str(tmp_path / "runs")]
    assert main(command) == 0
    table = (tmp_path / "runs" / "grid_sweep" / "table.md").read_text()
    assert (tmp_path / "runs" / "grid_sweep" / "trade_off.png").stat().st_size > 10_000
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    assert {"painn (2 seeds)", "egnn (2 seeds)", "mean predictor", "Graphormer, the paper's"} <= set(rows)
    folders = [tmp_path / "runs" / f"grid_painn_run{number}" for number in (0, 1)]
    found = [json.loads((folder / "results" / "metrics.json").read_text()) for folder in folders]
    errors = [results["average"]["energy_mae"] for results in found]
    shown = f"{statistics.fmean(errors):.4f} +- {statistics.stdev(errors):.4f}"
    assert errors[0] != errors[1] and shown in rows["painn (2 seeds)"]
    assert "other data than above, not to be compared" in table
    before = [(folder / "results" / "metrics.json").stat().st_mtime_ns for folder in folders]
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("mean predictor") == 5
    assert [(folder / "results" / "metrics.json").stat().st_mtime_ns for folder in folders] == before


def test_the_runs_of_a_sweep(small_is2re: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(_arguments(small_is2re, tmp_path, "optim.lr_initial: [1e-3, 5e-3]\nmodel.num_gaussians: [6]\n")) == 0
    printed = capsys.readouterr().out
    losses = []
    for number, rate in enumerate((1e-3, 5e-3)):
        folder = tmp_path / "runs" / f"s_run{number}"
        assert f"results: {folder}\n" in printed
        config = yaml.safe_load((folder / "config.yml").read_text())
        assert config["optim"]["lr_initial"] == rate and config["model"]["num_gaussians"] == 6
        values = yaml.safe_load((folder / "sweep_values.yml").read_text())
        assert values == {"optim.lr_initial": rate, "model.num_gaussians": 6}
        losses.append(json.loads((folder / "results" / "metrics.json").read_text())["splits"]["val_id"]["energy_mae"])
    assert losses[0] != losses[1]


def test_all_runs_are_checked_before_the_first_begins(
    small_is2re: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for grid, message in (
        ("optim.lr_initial: [1e-3, -1]\n", "s_run1, {'optim.lr_initial': -1}: the configuration is not valid"),
        ("optim.lr_inital: [1e-3]\n", "optim.lr_inital: unknown key; did you mean lr_initial?"),
        ("model.act: [swish, swosh]\n", "s_run1"),
    ):
        assert main(_arguments(small_is2re, tmp_path, grid)) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_failed_run_does_not_stop_the_others(
    small_is2re: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """A learning rate that makes the weights infinite."""
    grid = "optim.lr_initial: [1e+38, 1e-3]\n"
    assert main(_arguments(small_is2re, tmp_path, grid, "--optim.max_epochs=3", "--optim.optimizer=SGD")) == 1
    assert "1 of 2 runs failed: s_run0" in capsys.readouterr().err
    assert "not finite" in caplog.text
    assert (tmp_path / "runs" / "s_run1" / "results" / "metrics.json").is_file()
