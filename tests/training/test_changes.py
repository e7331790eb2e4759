"""A run taken up again: what may change is applied, all else is refused, and its configuration says what was done."""

import json
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

import processes
import small_data
from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.config.changes import MAY_CHANGE, MAY_NOT_CHANGE, allowed, flat
from faenet_ocp.config.schema import Config, build_config
from faenet_ocp.config.yaml import load_yaml
from faenet_ocp.launch import cli
from faenet_ocp.launch.cli import main
from faenet_ocp.tasks.references import fits_from_dict, fits_to_dict
from faenet_ocp.training.optim import learning_rate_schedule
from faenet_ocp.training.start import check_statistics

CHANGES: dict[str, Any] = {
    "trainer": "mine",
    "task": "is2re",
    "dataset.name": "other",
    "dataset.root": "COPY",
    "dataset.format": "oc20_lmdb2",
    "dataset.key_mapping.x": {"y": "energy"},
    "dataset.edges": "recompute",
    "dataset.transforms.x": {"remove_subsurface": {}},
    "dataset.transforms.x.x": None,
    "dataset.train.src": "COPY/train.lmdb",
    "dataset.val.x.src": "COPY/val.lmdb",
    "dataset.test.x.src": "COPY/val.lmdb",
    "model.x": {"num_gaussians": 9},
    "frames.dim": 2,
    "frames.group": "SE",
    "frames.method": "det",
    "frames.eval_method": "canonical",
    "frames.tolerance": 1e-4,
    "outputs.x.level": "system",
    "outputs.x.unit": "eV",
    "outputs.x.normalizer": {"mean": 1.0},
    "outputs.x.normalizer.mean": None,
    "outputs.x.normalizer.stdev": None,
    "outputs.x.element_references": None,
    "outputs.x.train_on_free_atoms": False,
    "outputs.x.eval_on_free_atoms": False,
    "outputs.x.eval_from": None,
    "loss_functions": [{"energy": {"fn": "mse"}}, {"forces": {}}],
    "evaluation_metrics.metrics.x": {"energy": ["mae"]},
    "evaluation_metrics.primary_metric.split": "w",
    "evaluation_metrics.primary_metric.metric": "forces_mae",
    "evaluation_metrics.max_systems": 2,
    "optim.optimizer": "Adam",
    "optim.optimizer_params.x": {"eps": 1e-6},
    "optim.lr_initial": 0.001,
    "optim.weight_decay": 0.5,
    "optim.scheduler": "constant",
    "optim.warmup_steps": 1,
    "optim.warmup_factor": 0.3,
    "optim.lr_min_factor": 0.1,
    "optim.multistep.milestones": None,
    "optim.multistep.gamma": None,
    "optim.plateau.factor": None,
    "optim.plateau.patience": None,
    "optim.plateau.min_lr": None,
    "optim.plateau.metric": None,
    "optim.early_stopping.patience": 5,
    "optim.early_stopping.min_epochs": None,
    "optim.batch_size": 4,
    "optim.eval_batch_size": 2,
    "optim.grad_accumulation": 2,
    "optim.max_epochs": 3,
    "optim.max_steps": 3,
    "optim.clip_grad_norm": 1.0,
    "optim.ema_decay": 0.5,
    "optim.eval_every": 3,
    "optim.eval_every_epochs": 2,
    "optim.checkpoint_every": 1,
    "optim.keep_checkpoints": 1,
    "optim.skip_nonfinite": 1,
    "optim.balance": "atoms",
    "optim.num_workers": 1,
    "optim.worker_context": "spawn",
    "optim.on_write_error": "warn",
    "evaluation_metrics.symmetry.dim": 2,
    "evaluation_metrics.symmetry.max_systems": 3,
    "evaluation_metrics.symmetry.split": "v",
    "logger.name": "tensorboard",
    "logger.project": "p",
    "logger.entity": "e",
    "logger.mode": "offline",
    "job.run_dir": "RUNS",
    "job.identifier": None,
    "job.seed": 1,
    "job.num_gpus": 2,
    "job.num_nodes": 2,
    "job.cpu": None,
    "job.amp": True,
    "job.precision": "float64",
    "job.debug": True,
    "job.print_every": 7,
    "slurm.partition": "p",
    "slurm.account": "a",
    "slurm.qos": "q",
    "dataset.tags": "file",
    "dataset.adsorbate": None,
    "dataset.target": "energy",
    "dataset.train.index": None,
    "dataset.val.x.index": None,
    "dataset.test.x.index": None,
    "dataset.train.from_train": None,
    "dataset.test.x.from_train": None,
    "dataset.val.x.from_train": 0.3,
    "job.output_format": "extxyz",
    "slurm.time": "1:00:00",
    "slurm.mem_gb": 3,
    "slurm.cpus_per_task": 2,
    "slurm.additional_parameters.x": {"nice": 3},
    "slurm.max_timeouts": 2,
    "slurm.rendezvous": "tcp",
}
"""For each key of the schema another value; x stands for a name of the user's. None: has no other value here."""


def _keys(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a section, of all its branches."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from _keys(field.annotation, f"{prefix}.{name}" if prefix else name)
    elif origin in (Union, types.UnionType):
        for branch in arguments:
            yield from _keys(branch, prefix)
    elif origin is dict:
        yield from _keys(arguments[1], f"{prefix}.x")
    elif annotation is not type(None):
        yield prefix


KEYS = sorted(set(_keys(Config)))


def test_every_key_has_one_rule_and_every_rule_a_key() -> None:
    assert sorted(CHANGES) == KEYS
    for key in KEYS:
        assert allowed(key, MAY_CHANGE) != allowed(key, MAY_NOT_CHANGE), key
    for table in (MAY_CHANGE, MAY_NOT_CHANGE):
        for section, names in table.items():
            for name in names.split():
                assert any(allowed(key, {section: name}) for key in KEYS), f"{section}.{name}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = processes.write_data(tmp_path_factory.mktemp("data"))
    shutil.copytree(root, root / "copy")
    return root


def _arguments(folder: Path, root: Path, *more: str, **optim: Any) -> list[str]:
    config = processes.write_config(folder / "config.yml", root, model={"num_interactions": 1}, optim=optim)
    return ["--config", str(config), "--identifier", "run", *more]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `run/`, which has done all of its four steps."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(_arguments(folder, data)) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def _last(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "run" / "checkpoints" / "last.pt")


def _config(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "run" / "config.yml").read_text())


# Keys of whole sections, and what the command line itself refuses or overrules, are left to the table.
@pytest.mark.parametrize("key", [key for key, value in CHANGES.items() if value is not None])
def test_a_change_is_applied_or_refused(
    data: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, key: str
) -> None:
    monkeypatch.setattr(cli.local_ranks, "launch", lambda config: None)
    monkeypatch.setattr(cli.local_ranks, "fairchem_config", lambda built: None)
    value = CHANGES[key]
    if isinstance(value, str):
        value = value.replace("COPY", str(data / "copy")).replace("RUNS", f"{run}/../{run.name}")
    written = key.removesuffix(".x") if isinstance(value, dict) else key.replace(".x.", ".v.")
    written = written.replace("outputs.v", "outputs.energy")
    if key == "dataset.format":
        written, value = "dataset.format", "lmdb"
    more = ["--dataset.val.w.src=val.lmdb"] if value == "w" else []
    before = (run / "run" / "config.yml").read_text()
    status = main([*_arguments(run, data), f"--{written}={json.dumps(value)}", *more])
    message, now = capsys.readouterr().err, dict(flat(_config(run)))
    if allowed(key):
        # No run has fewer steps than it has done.
        assert status == (2 if key == "optim.max_steps" else 0), message
        if status == 0:
            applied = dict(flat({written: value})) if not isinstance(value, dict) else dict(flat(value, f"{written}."))
            assert applied.items() <= now.items()
            assert f"from step 4 on: {written}" in (run / "run" / "config.yml").read_text()
    else:
        assert status == 2, message
        assert key in ("trainer", "outputs.x.level", "outputs.x.unit") or written.split(".x")[0] in message
        assert (run / "run" / "config.yml").read_text() == before


def _rates(folder: Path) -> list[float]:
    return [r["train/lr"] for r in processes.records(folder / "run") if "train/loss" in r]


def test_learning_rate_and_length_follow_the_configuration(data: Path, run: Path) -> None:
    """Each step has the rate that the present settings give it, from the first one on, and the last one is nearly 0."""
    first = _rates(run)
    optim = {"max_epochs": 4, "lr_initial": 0.01, "weight_decay": 0.3, "warmup_steps": 1, "lr_min_factor": 0.01}
    assert main(_arguments(run, data, **optim)) == 0
    factor = learning_rate_schedule(build_config(load_yaml(run / "config.yml")).optim, 8)
    assert _rates(run) == pytest.approx([*first, *(0.01 * factor(step) for step in range(4, 8))])
    state = _last(run)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.3
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.01 * 0.01)
    assert state["progress"] == {
        "num_epochs_completed": 4,
        "num_steps_completed": 8,
        "num_steps_completed_in_epoch": 0,
    }
    assert _config(run)["optim"]["lr_initial"] == 0.01
    assert json.loads((run / "run" / "results" / "metrics.json").read_text())["training"]["epochs"] >= 2
    assert main(_arguments(run, data, **optim)) == 0  # a third time: the history of the changes stays
    assert (run / "run" / "config.yml").read_text().count("from step 4 on: optim.lr_initial: 0.01, before 0.002") == 1


def test_an_epoch_that_max_steps_cut_short_goes_on(data: Path, tmp_path: Path) -> None:
    """With the samples that it had not seen yet, to where a run without interruption ends."""
    for folder, limits in (("one", [None]), ("two", [3, None])):
        for max_steps in limits:
            optim = {"scheduler": "constant", "eval_every_epochs": None, "max_steps": max_steps}
            assert main(_arguments(tmp_path / folder, data, **optim)) == 0
    one, two = (_last(tmp_path / folder) for folder in ("one", "two"))
    assert processes.differences(one["model"], two["model"]) == []
    assert one["progress"] == two["progress"]


def test_a_shortened_run_is_evaluated_or_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def die(*args: Any) -> None:
        raise OSError("as if it had been stopped")

    optim = {"eval_every_epochs": None, "checkpoint_every": 1, "max_epochs": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("faenet_ocp.training.run.TrainingRun.evaluate_and_save", die)
        assert main(_arguments(tmp_path, data, **optim)) == 1
    done = _last(tmp_path)["progress"]["num_steps_completed"]
    assert done == 5
    assert main(_arguments(tmp_path, data, **optim | {"max_steps": 4})) == 2
    assert "4 steps, but the run has done 5" in capsys.readouterr().err
    assert main(_arguments(tmp_path, data, **optim | {"max_steps": 5})) == 0
    results = json.loads((tmp_path / "run" / "results" / "metrics.json").read_text())
    assert results["run"]["step"] == 5


def test_the_advice_after_a_diverged_run_works(data: Path, run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(_arguments(run, data, max_epochs=4, lr_initial=1e30, optimizer="AdamW", scheduler="constant")) == 1
    assert "Lower optim.lr_initial" in capsys.readouterr().err
    assert main(_arguments(run, data, max_epochs=4, lr_initial=0.001, scheduler="constant")) == 0
    assert _rates(run)[4:] == [0.001] * 4


# ------------------------------------------------------------------------------------------ data


def _relabelled(root: Path, *, shift: float = 1.0, count: int = 12, name: str = "train") -> None:
    """The file replaced by another of the same name."""
    seed = 0 if name == "train" else 1
    fields = [small_data.make_fields(i, task="s2ef", edges=False, seed=seed, layers=1 + i % 4) for i in range(count)]
    (root / f"{name}.lmdb").unlink()
    values = [small_data.dump_record(f | {"y": f["y"] + shift}, layout="pyg2") for f in fields]
    small_data.write_lmdb(root / f"{name}.lmdb", values)


def _only_statistics(*args: Any, **kwargs: Any) -> None:
    raise OSError("stopped before the first checkpoint")


def test_statistics_belong_to_the_labels_they_were_computed_from(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that stopped before its first checkpoint begins anew: other labels, other names of labels, other sizes."""
    root = shutil.copytree(data, tmp_path / "data")
    monkeypatch.setattr("faenet_ocp.training.run.make_loader", make_loader := _counting())
    monkeypatch.setattr("faenet_ocp.training.run.TrainingRun._make_unit", _only_statistics)

    def mean(*more: str) -> float:
        assert main(_arguments(tmp_path, root, *more)) == 1
        return json.loads((tmp_path / "run" / "statistics.json").read_text())["fit"]["mean"]

    first = mean()
    calls = make_loader.calls
    assert mean() == first
    assert make_loader.calls == calls + 1  # that of training: nothing was computed again
    assert "computed again" not in caplog.text
    _relabelled(root, shift=5.0)
    assert mean() == pytest.approx(first + 5.0)
    assert "statistics.json belongs to other data or labels: computed again" in caplog.text
    _relabelled(root, shift=0.0)
    assert mean() == pytest.approx(first)
    assert mean("--dataset.key_mapping={fid: energy}") == pytest.approx(5.5)


def _counting() -> Callable[..., Any]:
    from faenet_ocp.data.loader import make_loader

    def counting(*args: Any, **kwargs: Any) -> Any:
        counting.calls += 1  # type: ignore[attr-defined]
        return make_loader(*args, **kwargs)

    counting.calls = 0  # type: ignore[attr-defined]
    return counting


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"count": 18, "shift": 0.0},
            "dataset.train: these are not the data that the run began with (systems: 12, now 18)",
        ),
        ({"shift": 1e-3}, "dataset.train: these are not the data that the run began with (content: "),
        ({"name": "val", "count": 5}, "dataset.val.v: these are not the data that the run began with (content: "),
    ],
)
def test_a_run_does_not_go_on_with_other_data(
    data: Path, run: Path, capsys: pytest.CaptureFixture, change: dict[str, Any], message: str
) -> None:
    root = shutil.copytree(data, run / "data")
    _relabelled(root, **change)
    before = (run / "run" / "config.yml").read_text()
    assert main(_arguments(run, root, max_epochs=4)) == 2
    assert message.format("these are not the data that the run began with") in capsys.readouterr().err
    assert (run / "run" / "config.yml").read_text() == before


def test_a_run_goes_on_with_copies_of_its_data(data: Path, run: Path) -> None:
    root = shutil.copytree(data, run / "data")
    assert main(_arguments(run, root, max_epochs=3)) == 0
    assert _last(run)["progress"]["num_steps_completed"] == 6


def test_one_label_among_many_shows_in_the_statistics(finished: Path) -> None:
    state = _last(finished)
    check_statistics(fits_from_dict(state["statistics"]), state)
    other = state["statistics"] | {"mean": state["statistics"]["mean"] + 1e-6}
    with pytest.raises(ValueError, match="other labels than those that the run began with"):
        check_statistics(fits_from_dict(other), state)
    assert fits_to_dict(fits_from_dict(other)) == other
