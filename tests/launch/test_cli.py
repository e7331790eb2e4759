"""The command line end to end on small data: train, go on, validate, predict, ranks, and mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.launch.cli import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--model.hidden_channels=64 --model.num_filters=32 --model.num_interactions=2 --model.num_gaussians=12 "
    "--model.tag_hidden_channels=8 --model.pg_hidden_channels=8 --optim.warmup_steps=2 --optim.batch_size=4 "
    "--optim.max_epochs=3 --optim.num_workers=0 --logger=none"
).split()


def _small(overrides: Sequence[str] = ()) -> list[str]:
    return ["--config", "configs/is2re/faenet.yml", "--cpu", "--print-every", "1", *SMALL, *overrides]


def _run(root: Path, runs: Path, name: str, *overrides: str) -> Path:
    arguments = [*_small(overrides), f"--dataset.root={root}", "--run-dir", str(runs), "--identifier", name]
    assert main(arguments) == 0
    return runs / name


def _losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def _process(arguments: Sequence[str], **options: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        **options,
    )


@pytest.fixture(scope="module")
def trained(small_is2re: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three epochs."""
    return _run(small_is2re, tmp_path_factory.mktemp("runs"), "first")


def test_a_run_leaves_what_is_promised(trained: Path) -> None:
    for name in ("config.yml", "checkpoints/best.pt", "checkpoints/last.pt", "logs/metrics.jsonl", "statistics.json"):
        assert (trained / name).is_file(), name
    for name in ("metrics.json", "table.md", "parity_energy.png", "learning_curve.png"):
        assert (trained / "results" / name).is_file(), name
    results = json.loads((trained / "results" / "metrics.json").read_text())
    assert list(results["splits"]) == ["val_id", "val_ood_ads", "val_ood_cat", "val_ood_both"]
    assert all(metrics["num_systems"] == 4 for metrics in results["splits"].values())
    assert results["oc20"] is False
    assert results["training"]["epochs"] == 3
    table = (trained / "results" / "table.md").read_text()
    for row in ("mean predictor", "linear in composition", "the paper's"):
        assert row in table


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
    reported = json.loads((trained / "results" / "metrics.json").read_text())["splits"]
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
    before = {path: path.stat().st_mtime_ns for path in (trained / "checkpoints").glob("*.pt")}
    table = (trained / "results" / "metrics.json").stat().st_mtime_ns
    _run(small_is2re, trained.parent, "first")
    after = {path: path.stat().st_mtime_ns for path in (trained / "checkpoints").glob("*.pt")}
    assert before == after
    assert (trained / "results" / "metrics.json").stat().st_mtime_ns == table


def test_validate_repeats_the_final_evaluation(trained: Path, tmp_path: Path) -> None:
    checkpoint = str(trained / "checkpoints" / "best.pt")
    arguments = ["--mode", "validate", "--checkpoint", checkpoint, "--run-dir", str(tmp_path), "--identifier", "again"]
    assert main(arguments) == 0
    first, again = (
        json.loads((folder / "results" / "metrics.json").read_text()) for folder in (trained, tmp_path / "again")
    )
    assert again["splits"] == first["splits"]
    assert again["baselines"] == first["baselines"]
    assert main(arguments) == 2  # results are never overwritten


def test_canonical_frames_in_evaluation(trained: Path, tmp_path: Path) -> None:
    checkpoint = str(trained / "checkpoints" / "best.pt")
    for method in ("canonical", "full"):
        arguments = ["--mode", "validate", "--checkpoint", checkpoint, "--run-dir", str(tmp_path)]
        assert main([*arguments, "--identifier", method, f"--frames.eval_method={method}"]) == 0
        results = json.loads((tmp_path / method / "results" / "metrics.json").read_text())
        assert results["run"]["frames"]["method"] == method
        for metrics in results["splits"].values():
            assert metrics["frames_per_system"] == {"canonical": 1, "full": 2}[method]


def test_predictions(trained: Path, tmp_path: Path) -> None:
    checkpoint = str(trained / "checkpoints" / "best.pt")
    arguments = ["--mode", "predict", "--checkpoint", checkpoint, "--run-dir", str(tmp_path), "--identifier", "p"]
    assert main(arguments) == 0
    folder = tmp_path / "p" / "results" / "predictions"
    assert sorted(path.name for path in folder.iterdir()) == [
        "val_id.npz",
        "val_ood_ads.npz",
        "val_ood_both.npz",
        "val_ood_cat.npz",
    ]
    with np.load(folder / "val_id.npz") as content:
        assert content["ids"].shape == content["energy"].shape == (4,)
    assert main(arguments) == 2


def test_the_seed_decides_everything(trained: Path, small_is2re: Path, tmp_path: Path) -> None:
    again = _run(small_is2re, tmp_path, "again")
    other = _run(small_is2re, tmp_path, "other", "--seed", "1")
    assert _losses(again) == _losses(trained)
    assert _losses(other) != _losses(trained)


@pytest.mark.parametrize("workers", [1])
def test_workers_change_nothing(trained: Path, small_is2re: Path, tmp_path: Path, workers: int) -> None:
    assert _losses(_run(small_is2re, tmp_path, "w", f"--optim.num_workers={workers}")) == _losses(trained)


def test_accumulation_changes_nothing_but_rounding(trained: Path, small_is2re: Path, tmp_path: Path) -> None:
    folder = _run(small_is2re, tmp_path, "accumulated", "--optim.grad_accumulation=2")
    assert _losses(folder) == pytest.approx(_losses(trained), rel=1e-4)


def test_more_settings_work(small_is2re: Path, tmp_path: Path) -> None:
    """EMA, clipping, fitted references, bfloat16, early evaluation and checkpoints, TensorBoard."""
    folder = _run(
        small_is2re,
        tmp_path,
        "settings",
        "--amp",
        "--optim.ema_decay=0.9",
        "--optim.clip_grad_norm=1.0",
        "--outputs.energy={normalizer: fit, element_references: fit}",
        "--optim.eval_every=2",
        "--optim.checkpoint_every=2",
        "--optim.keep_checkpoints=1",
        "--logger=tensorboard",
        "--frames.method=data_augmentation",
        "--optim.max_epochs=2",
    )
    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    assert state["ema"] is not None
    assert state["tasks"]["energy"]["element_references"] is not None
    assert len(list((folder / "checkpoints").glob("step_*.pt"))) == 1
    assert list((folder / "logs" / "tensorboard").iterdir())
    records = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "val_id/energy_mae" in r] == [2, 3, 4, 6]
    assert all("train/grad_norm" in r for r in records if "train/loss" in r)


def test_wandb_offline(small_is2re: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = _run(
        small_is2re, tmp_path, "w", "--logger={name: wandb, project: test, mode: offline}", "--optim.max_epochs=1"
    )
    assert list((folder / "logs" / "wandb").glob("offline-run-*"))


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
    ],
)
def test_mistakes_end_before_any_work(
    arguments: list[str], message: str, small_is2re: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*_small(arguments), f"--dataset.root={small_is2re}", "--run-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_config(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 2
    assert "--config: missing" in capsys.readouterr().err


def test_two_ranks_equal_one(trained: Path, small_is2re: Path, tmp_path: Path) -> None:
    arguments = [*_small(), f"--dataset.root={small_is2re}", "--run-dir", str(tmp_path), "--identifier", "two"]
    process = _process([*arguments, "--num-gpus", "2"])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    assert output.rstrip().splitlines()[-1] == f"results: {tmp_path / 'two'}"
    assert _losses(tmp_path / "two") == pytest.approx(_losses(trained), rel=2e-4)
    one, two = (json.loads((f / "results" / "metrics.json").read_text()) for f in (trained, tmp_path / "two"))
    for split, metrics in one["splits"].items():
        assert two["splits"][split]["num_systems"] == metrics["num_systems"]
        assert two["splits"][split]["energy_mae"] == pytest.approx(metrics["energy_mae"], abs=2e-3)


def test_validation_is_the_same_on_two_ranks(trained: Path, tmp_path: Path) -> None:
    checkpoint = str(trained / "checkpoints" / "best.pt")
    arguments = ["--mode", "validate", "--checkpoint", checkpoint, "--run-dir", str(tmp_path), "--identifier", "two"]
    process = _process([*arguments, "--num-gpus", "2"])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    one, two = (json.loads((f / "results" / "metrics.json").read_text()) for f in (trained, tmp_path / "two"))
    for split, metrics in one["splits"].items():
        for name, value in metrics.items():
            assert two["splits"][split][name] == pytest.approx(value, rel=1e-6, abs=1e-6)


def test_a_killed_run_goes_on_to_the_same_weights(small_is2re: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch; the same command again ends bit for bit where an unbroken run does."""
    extra = ["--optim.checkpoint_every=2", "--optim.max_epochs=40", "--optim.eval_every_epochs=50"]
    unbroken = _run(small_is2re, tmp_path, "unbroken", *extra)
    arguments = [*_small(extra), f"--dataset.root={small_is2re}", "--run-dir", str(tmp_path), "--identifier", "killed"]
    process = _process(arguments)
    deadline = time.monotonic() + 200
    checkpoints = tmp_path / "killed" / "checkpoints"
    while time.monotonic() < deadline and not list(checkpoints.glob("step_*.pt")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = max(int(re.findall(r"\d+", path.name)[0]) for path in checkpoints.glob("step_*.pt"))
    assert 0 < reached < 120
    killed = _run(small_is2re, tmp_path, "killed", *extra)
    one, two = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (unbroken, killed))
    for name, weight in one["model"].items():
        assert torch.equal(weight, two["model"][name]), name
    assert _losses(killed) == _losses(unbroken)
