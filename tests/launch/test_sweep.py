"""Sweeps: the grid, the runs it stands for, running them here, and mistakes found before any of them begins."""

import json
from pathlib import Path

import pytest
import yaml

from faenet_ocp.launch.cli import main
from faenet_ocp.launch.sweep import expand, load_grid

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


def test_all_combinations_in_order(tmp_path: Path) -> None:
    grid = load_grid(_grid(tmp_path, "optim.lr_initial: [1e-3, 2e-3]\nmodel:\n  num_interactions: [3, 4, 5]\n"))
    raw = {"optim": {"lr_initial": 9.0, "batch_size": 7}, "model": {"name": "faenet"}, "job": {"cpu": True}}
    elements = expand(raw, grid, "name")
    assert [tuple(element.values.values()) for element in elements] == [
        (rate, number) for rate in (1e-3, 2e-3) for number in (3, 4, 5)
    ]
    for number, (values, merged) in enumerate(elements):
        assert merged["optim"] == {"lr_initial": values["optim.lr_initial"], "batch_size": 7}
        assert merged["model"] == {"name": "faenet", "num_interactions": values["model.num_interactions"]}
        assert merged["job"] == {"cpu": True, "identifier": f"name_run{number}"}
    assert raw == {"optim": {"lr_initial": 9.0, "batch_size": 7}, "model": {"name": "faenet"}, "job": {"cpu": True}}


def test_values_may_be_lists_and_mappings(tmp_path: Path) -> None:
    grid = load_grid(_grid(tmp_path, "a.b: [[1, 2], {c: 3}]\n"))
    assert [element.raw["a"] for element in expand({"a": {"b": {"d": 4}}}, grid, "x")] == [
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
        ("", "names no keys"),
        ("- 1\n", "the top level has to be a mapping"),
    ],
)
def test_wrong_grids(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"grid\.yml") as caught:
        load_grid(_grid(tmp_path, text))
    assert message in str(caught.value)


def test_a_grid_does_not_name_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every run of a sweep gets its own folder"):
        expand({}, {"job.identifier": ["a"]}, "x")
    with pytest.raises(ValueError, match="there is no such file"):
        load_grid(tmp_path / "gone.yml")


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
