"""Configuration: merging, validation before any work, and messages that say what would be right."""

import copy
from pathlib import Path

import pytest

import shipped
from faenet_ocp.build import make_model
from faenet_ocp.config.schema import build_config
from faenet_ocp.config.yaml import find_config, load_yaml, merge, parse_overrides
from faenet_ocp.launch.sweep import expand, load_sweep
from shipped import CONFIGS

MINIMAL = {
    "trainer": "faenet",
    "task": "is2re",
    "dataset": {"train": {"src": "a"}, "val": {"val_id": {"src": "b"}}},
    "model": {"name": "faenet"},
    "optim": {"lr_initial": 0.002, "batch_size": 4, "max_epochs": 1},
}


def _with(path: str, value: object) -> dict:
    raw = copy.deepcopy(MINIMAL)
    *parents, last = path.split(".")
    section = raw
    for part in parents:
        section = section.setdefault(part, {})
    section[last] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optm", {}, "optm: unknown key; did you mean optim?"),
        ("optim.lr_inital", 1.0, "optim.lr_inital: unknown key; did you mean lr_initial?"),
        ("dataset.val.val_id.scr", "x", "dataset.val.val_id.scr: unknown key; did you mean src?"),
        ("optim.batch_size", "4", "optim.batch_size: Input should be a valid integer"),
        ("optim.batch_size", 0, "optim.batch_size: Input should be greater than or equal to 1"),
        ("optim.batch_size", True, "optim.batch_size: Input should be a valid integer"),
        ("outputs.energy", {"normalizer": {"std": 1.0}}, "normalizer.std: unknown key; did you mean stdev?"),
        ("loss_functions", [{"energy": {"fn": "mea"}}], "'mae', 'mse' or 'l2mae'"),
        ("loss_functions", [{"forces": {"fn": "mae"}}], "loss_functions.forces: not predicted here, only energy"),
        ("frames", {"method": "stochastc"}, "frames.method: Input should be 'full', 'stochastic'"),
        ("logger", "wandbb", "logger.name: Input should be 'tensorboard', 'wandb' or 'none'"),
        ("evaluation_metrics", {"primary_metric": {"split": "val_di"}}, "'val_di' is not among the splits"),
        ("job", {"identifier": "../x"}, "used as a folder name"),
        ("job", {"amp": True, "precision": "float64"}, "exclude each other"),
        ("model", {"hidden_channels": 3}, "model.name: missing"),
    ],
)
def test_wrong_configurations_are_named(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        build_config(_with(path, value))
    assert message in str(error.value)


def test_all_mistakes_are_listed_at_once() -> None:
    raw = _with("optim.lr_inital", 1.0)
    del raw["optim"]["lr_initial"]
    raw["modl"] = {}
    with pytest.raises(ValueError) as error:
        build_config(raw)
    for message in ("optim.lr_inital: unknown key", "optim.lr_initial: missing", "modl: unknown key"):
        assert message in str(error.value)


def test_defaults() -> None:
    config = build_config(MINIMAL)
    assert config.logger.name == "tensorboard"
    assert config.properties == ("energy",)
    assert config.losses["energy"].fn == "mae"
    assert config.frames.method == "none"


def test_includes_merge_below_the_file(tmp_path: Path) -> None:
    (tmp_path / "base.yml").write_text("optim: {lr_initial: 1e-3, batch_size: 8}\ntask: is2re\n")
    (tmp_path / "top.yml").write_text("includes: [base.yml]\noptim: {batch_size: 16}\n")
    assert load_yaml(tmp_path / "top.yml") == {"task": "is2re", "optim": {"lr_initial": 1e-3, "batch_size": 16}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("includes: [top.yml]\n", "includes itself"),
        ("includes: [gone.yml]\n", "gone.yml: there is no such file"),
        ("a: 1\na: 2\n", "top.yml: line 2: 'a' is given twice"),
        ("a: [1\n", "top.yml"),
        ("- 1\n", "has to be a mapping"),
        ("a: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "top.yml").write_text(text)
    with pytest.raises(ValueError) as error:
        load_yaml(tmp_path / "top.yml")
    assert message in str(error.value)


def test_another_model_comes_without_the_options_of_the_one_below() -> None:
    below = {"model": {"name": "faenet", "num_filters": 480}, "optim": {"batch_size": 4}}
    for above in ({"name": "painn"}, {"name": "painn", "hidden_channels": 64}):
        assert merge(below, {"model": above}) == {"model": above, "optim": {"batch_size": 4}}
    assert merge(below, {"model": {"num_filters": 9}})["model"] == {"name": "faenet", "num_filters": 9}
    assert merge(below, {"model": {"name": "faenet"}})["model"] == below["model"]
    raw = load_yaml(find_config("configs/demo/is2re.yml"))
    config = build_config(merge(raw, parse_overrides(["--model.name=painn", "--model.hidden_channels=64"])))
    assert config.model == {"name": "painn", "hidden_channels": 64}


def test_overrides() -> None:
    parsed = parse_overrides(["--optim.lr_initial=1e-3", "--dataset.root", "/x"])
    assert parsed == {"optim": {"lr_initial": 1e-3}, "dataset": {"root": "/x"}}
    parsed = parse_overrides(["--model.b=[1, x]", "--model.c=true", "--logger=none"])
    assert parsed == {"model": {"b": [1, "x"], "c": True}, "logger": "none"}
    with pytest.raises(ValueError, match=r"--batch_size=3: unknown argument"):
        parse_overrides(["--batch_size=3"])
    with pytest.raises(ValueError, match=r"--optm.batch_size=3: unknown argument"):
        parse_overrides(["--optm.batch_size=3"])
    with pytest.raises(ValueError, match="a value is missing"):
        parse_overrides(["--optim.batch_size"])


def test_shipped_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/is2re/faenet.yml").samefile(CONFIGS / "is2re" / "faenet.yml")
    with pytest.raises(ValueError, match="no such file"):
        find_config("configs/is2re/fanet.yml")


@pytest.mark.parametrize("path", shipped.RUNS, ids=shipped.name_of)
def test_every_shipped_config_is_valid(path: Path) -> None:
    build_config(load_yaml(path))


@pytest.mark.parametrize("path", shipped.SWEEPS, ids=shipped.name_of)
def test_every_run_of_a_shipped_sweep_is_valid_and_builds(path: Path) -> None:
    found = load_sweep(path)
    common = None if found.config is None else load_yaml(found.config)
    elements = expand(found, common, {}, "sweep")
    assert len({element.raw["job"]["identifier"] for element in elements}) == len(elements) > 1
    for element in {element.name: element for element in elements}.values():  # one of the seeds
        make_model(build_config(element.raw))


def test_paper_settings_of_is2re() -> None:
    """Table 7 and the authors' public settings, written out once more."""
    config = build_config(load_yaml(CONFIGS / "is2re" / "faenet.yml"))
    expected = {"hidden_channels": 384, "num_filters": 480, "num_gaussians": 104, "num_interactions": 5, "cutoff": 6.0}
    assert expected.items() <= config.model.items()
    assert (config.optim.lr_initial, config.optim.warmup_steps, config.optim.batch_size) == (0.002, 6000, 256)
    assert config.optim.max_epochs * -(-460328 // config.optim.batch_size) == pytest.approx(22_000, rel=0.02)
    assert (config.frames.dim, config.frames.group, config.frames.method) == (2, "SE", "stochastic")
