"""The command line end to end on small data: train, go on, validate, predict, ranks, and mistakes."""

import json
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import processes
import small_data
from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.evaluation import evaluator
from faenet_ocp.launch.cli import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--model.hidden_channels=64 --model.num_filters=32 --model.num_interactions=2 --model.num_gaussians=12 "
    "--model.tag_hidden_channels=8 --model.pg_hidden_channels=8 --optim.warmup_steps=2 --optim.batch_size=4 "
    "--optim.max_epochs=3 --optim.num_workers=0 --logger=none"
).split()


def _arguments(root: Path, runs: Path, name: str, *overrides: str) -> list[str]:
    config = ["--config", "configs/is2re/faenet.yml", "--cpu", "--print-every", "1", *SMALL, *overrides]
    return [*config, f"--dataset.root={root}", "--run-dir", str(runs), "--identifier", name]


def _run(root: Path, runs: Path, name: str, *overrides: str) -> Path:
    assert main(_arguments(root, runs, name, *overrides)) == 0
    return runs / name


def _losses(folder: Path) -> list[float]:
    return [record["train/loss"] for record in processes.records(folder) if "train/loss" in record]


def _results(folder: Path) -> dict:
    return json.loads((folder / "results" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(small_is2re: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three epochs."""
    return _run(small_is2re, tmp_path_factory.mktemp("runs"), "first")


@pytest.fixture
def no_plots() -> Iterator[None]:
    """Plots take half a run of this size."""
    with mock.patch.object(evaluator, "plot_parity"), mock.patch.object(evaluator, "plot_learning_curve"):
        yield


def _with_weights(trained: Path, mode: str, runs: Path, name: str, *more: str) -> list[str]:
    weights = str(trained / "checkpoints" / "best.pt")
    return ["--mode", mode, "--checkpoint", weights, "--run-dir", str(runs), "--identifier", name, *more]


def test_a_run_leaves_what_is_promised(trained: Path) -> None:
    for name in ("config.yml", "checkpoints/best.pt", "checkpoints/last.pt", "logs/metrics.jsonl", "statistics.json"):
        assert (trained / name).is_file(), name
    for name in ("metrics.json", "table.md", "parity_energy.png", "learning_curve.png"):
        assert (trained / "results" / name).is_file(), name
    results = _results(trained)
    assert list(results["splits"]) == ["val_id", "val_ood_ads", "val_ood_cat", "val_ood_both"]
    assert all(metrics["num_systems"] == 4 for metrics in results["splits"].values())
    assert results["official"] is False
    assert results["training"]["epochs"] == 3
    table = (trained / "results" / "table.md").read_text()
    for row in ("mean predictor", "linear in composition"):
        assert row in table
    assert "the paper's" not in table  # these are not OC20's splits


def test_the_model_learns(trained: Path) -> None:
    losses = _losses(trained)
    assert len(losses) == 9
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_metrics_are_those_of_an_independent_loop(trained: Path, small_is2re: Path) -> None:
    """The best checkpoint, loaded by hand and run system by system, gives the reported energy MAE."""
    from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

    from faenet_ocp import build
    from faenet_ocp.checkpoint import load_weights
    from faenet_ocp.config.schema import build_config

    state = load_checkpoint(trained / "checkpoints" / "best.pt")
    config = build_config(state["config"])
    model = build.make_model(config).eval()
    load_weights(model, state)
    reported = _results(trained)["splits"]
    for split, source in config.dataset.val.items():
        data = build.make_dataset(config, source)
        errors = []
        for index in range(len(data)):
            sample = data[index]
            with torch.no_grad():
                out = model(atomicdata_list_to_batch([sample]))["energy"]["energy"]
            energy = out * 2.279365062713623 - 1.525913953781128
            errors.append(float((energy - sample.energy).abs()))
        assert reported[split]["energy_mae"] == pytest.approx(np.mean(errors), abs=1e-5)


def test_a_finished_run_is_not_trained_again(trained: Path, small_is2re: Path) -> None:
    files = [*(trained / "checkpoints").glob("*.pt"), trained / "results" / "metrics.json"]
    before = [path.stat().st_mtime_ns for path in files]
    _run(small_is2re, trained.parent, "first")
    assert [path.stat().st_mtime_ns for path in files] == before


def test_validate_repeats_the_final_evaluation(trained: Path, tmp_path: Path, no_plots: None) -> None:
    """Also on two ranks, through torch elastic."""
    arguments = _with_weights(trained, "validate", tmp_path, "again")
    assert main(arguments) == 0
    first, again = _results(trained), _results(tmp_path / "again")
    assert again["splits"] == first["splits"]
    assert again["baselines"] == first["baselines"]
    assert main(arguments) == 2  # results are never overwritten
    processes.main_on_ranks(_with_weights(trained, "validate", tmp_path, "two"), tmp_path / "log")
    for split, metrics in first["splits"].items():
        for name, value in metrics.items():
            assert _results(tmp_path / "two")["splits"][split][name] == pytest.approx(value, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("method", "frames"), [("canonical", 1), ("full", 2)])
def test_other_frames_in_evaluation(trained: Path, tmp_path: Path, no_plots: None, method: str, frames: int) -> None:
    assert main(_with_weights(trained, "validate", tmp_path, "v", f"--frames.eval_method={method}")) == 0
    results = _results(tmp_path / "v")
    assert results["run"]["frames"]["method"] == method
    assert {metrics["frames_per_system"] for metrics in results["splits"].values()} == {frames}


def test_predictions(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = _with_weights(trained, "predict", tmp_path, "p")
    assert main(arguments) == 0
    assert "dataset.test is not given: predicting the validation splits (val_id, val_ood_ads" in caplog.text
    files = {path.stem: path for path in (tmp_path / "p" / "results" / "predictions").iterdir()}
    assert files.keys() == _results(trained)["splits"].keys()
    with np.load(files["val_id"]) as content:
        assert content["ids"].shape == content["energy"].shape == (4,)
    assert main(arguments) == 2


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("--job.debug=false", 0.0),
        ("--optim.num_workers=1", 0.0),
        ("--optim.grad_accumulation=2", 1e-4),
        ("--job.num_gpus=2", 2e-4),
        ("--job.seed=1", None),
    ],
)
def test_what_changes_the_losses(
    trained: Path, small_is2re: Path, tmp_path: Path, no_plots: None, override: str, same: float | None
) -> None:
    """The same run once more, loader workers, accumulation and ranks change rounding at most; the seed decides all."""
    if "num_gpus" in override:
        output = processes.main_on_ranks(_arguments(small_is2re, tmp_path, "again"), tmp_path / "log")
        assert output.rstrip().splitlines()[-1] == f"results: {tmp_path / 'again'}"
    else:
        _run(small_is2re, tmp_path, "again", override)
    losses = _losses(tmp_path / "again")
    if same is None:
        assert losses != pytest.approx(_losses(trained), rel=0.01)
    else:
        assert losses == pytest.approx(_losses(trained), rel=same, abs=0)


def test_more_settings_work(small_is2re: Path, tmp_path: Path, no_plots: None) -> None:
    """EMA, clipping, fitted references, bfloat16, early evaluation and checkpoints, TensorBoard."""
    settings = "ema_decay=0.9 clip_grad_norm=1.0 eval_every=2 checkpoint_every=2 keep_checkpoints=1 max_epochs=2"
    overrides = [f"--optim.{setting}" for setting in settings.split()]
    overrides += ["--outputs.energy={normalizer: fit, element_references: fit}", "--amp", "--logger=tensorboard"]
    folder = _run(small_is2re, tmp_path, "settings", *overrides, "--frames.method=data_augmentation")
    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    assert state["ema"] is not None
    assert state["tasks"]["energy"]["element_references"] is not None
    assert len(list((folder / "checkpoints").glob("step_*.pt"))) == 1
    assert list((folder / "logs" / "tensorboard").iterdir())
    records = processes.records(folder)
    assert [r["step"] for r in records if "val_id/energy_mae" in r] == [2, 3, 4, 6]
    assert all("train/grad_norm" in r for r in records if "train/loss" in r)


def test_wandb_offline(small_is2re: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    """Every line of metrics.jsonl is in W&B's own file: also of evaluations, which come after the step's own line."""
    logger = "--logger={name: wandb, project: test, mode: offline}"
    folder = _run(small_is2re, tmp_path, "w", logger, "--optim.max_epochs=2", "--optim.eval_every=2")
    (path,) = (folder / "logs" / "wandb").glob("offline-run-*/*.wandb")
    rows = [{name: v for name, v in row.items() if not name.startswith("_")} for row in _wandb_rows(path)]
    lines = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == 6 + 4
    assert sum("val_id/energy_mae" in row for row in rows) == 4
    for row, line in zip(rows, lines, strict=True):
        assert row == pytest.approx(line, rel=1e-5)


def _wandb_rows(path: Path) -> list[dict[str, float]]:
    """History in a file of W&B: a header of 7 bytes, then pieces of records as in LevelDB's logs, blocks of 32 kB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, value, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        value += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            items = Record.FromString(value).history.item
            value = b""
            if items:
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lr_inital=1"], "optim.lr_inital: unknown key; did you mean lr_initial?"),
        (["--model.hiden_channels=3"], "model.hiden_channels: unknown key; did you mean hidden_channels?"),
        (["--model.mp_type=bsae"], "mp_type: 'bsae' is not one of"),
        (["--model.name=fanet"], "model.name: 'fanet' is not registered; did you mean faenet?"),
        (["--trainer=fanet"], "trainer: 'fanet' is not registered; did you mean faenet?"),
        (["--optm.batch_size=3"], "--optm.batch_size=3: unknown argument"),
        (["--dataset.format=oc20_lmbd"], "dataset.format: 'oc20_lmbd' is not registered; did you mean oc20_lmdb?"),
        (["--dataset.transforms={remove_subsurfce: {}}"], "remove_subsurface"),
        (["--dataset.train.src=is2re/gone.lmdb"], "gone.lmdb"),
        (["--optim.optimizer=AdamX"], "torch.optim has no optimiser 'AdamX'"),
        (["--optim.optimizer_params={betaz: 1}"], "optim.optimizer_params: AdamW"),
        (["--evaluation_metrics.primary_metric.metric=mea"], "unknown metric 'mea'"),
        (["--evaluation_metrics.metrics={energy: [mael]}"], "unknown metric 'energy_mael'; did you mean energy_mae?"),
        (["--mode", "validate"], "--checkpoint: --mode validate needs the weights to use"),
        (["--checkpoint", "gone.pt"], "gone.pt: there is no such file"),
        (["--mode", "check", "--submit"], "--mode check: reads the data of one configuration, here"),
        (["--mode", "benchmark"], "--config: has no meaning with --mode benchmark"),
        (["--dry-run"], "--dry-run: says what --submit would do"),
    ],
)
def test_mistakes_end_before_any_work(
    arguments: list[str], message: str, small_is2re: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(_arguments(small_is2re, tmp_path, "x", *arguments)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_config(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 2
    assert "--config: missing" in capsys.readouterr().err


def test_a_misspelt_key_is_told_at_once() -> None:
    """Before torch and fairchem are imported, which takes seconds."""
    arguments = ["--config", "configs/is2re/faenet.yml", "--optim.lr_inital=1"]
    code = f"""if True:
        import sys
        from faenet_ocp.launch.cli import main
        assert main({arguments}) == 2
        assert not {{"torch", "fairchem"}} & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "did you mean lr_initial?" in done.stderr


def test_check_reads_every_record_and_lists_the_unusable(
    small_is2re: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [*_arguments(small_is2re, tmp_path / "runs", "c"), "--mode", "check"]
    assert main(arguments) == 0
    assert "train, val_id, val_ood_ads, val_ood_cat, val_ood_both: no unusable records" in capsys.readouterr().out
    path = tmp_path / "test.lmdb"
    good = [small_data.dump_record(small_data.make_fields(index)) for index in range(3)]
    unlabelled = small_data.make_fields(1)
    del unlabelled["y_relaxed"]
    small_data.write_lmdb(path, [good[0], small_data.dump_record(unlabelled), good[2][:-50], pickle.dumps(None)])
    for workers in (0, 2):
        tests = [f"--dataset.test={{t: {{src: {path}}}}}", f"--optim.num_workers={workers}"]
        assert main([*arguments, *tests]) == 2
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(f"test t: {path}: record ")[2][:1] for line in lines] == ["2", "3", ""]
        assert lines[-1].endswith("test t: 2 unusable records")
    assert main([*arguments, f"--dataset.train.src={path}"]) == 2  # labels are wanted of training data
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(f"train: {path}: record ")[2][:1] for line in lines] == ["1", "2", "3", ""]
    assert not (tmp_path / "runs").exists()
