"""Predictions: the leaderboard's files, whole or absent, on any number of ranks, resumed after a kill."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

import processes
from faenet_ocp import build
from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.config.schema import build_config
from faenet_ocp.data.loader import make_loader
from faenet_ocp.evaluation import prediction
from faenet_ocp.evaluation.evaluator import load_model
from faenet_ocp.evaluation.submission import make_submission
from faenet_ocp.launch.cli import main
from faenet_ocp.prepare.s2ef import Options, prepare
from s2ef_raw import write_raw
from small_data import dump_record, make_fields, write_lmdb

SPLITS = ("val_id", "val_ood_ads", "val_ood_cat", "val_ood_both")


@pytest.fixture(scope="module")
def checkpoint(small_s2ef: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small S2EF model after one epoch, trained by the command line."""
    runs = tmp_path_factory.mktemp("runs")
    model = "{hidden_channels: 128, num_filters: 24, num_interactions: 2, num_gaussians: 10}"
    optim = "{warmup_steps: 0, batch_size: 4, max_epochs: 1, num_workers: 0}"
    overrides = [f"--model={model}", f"--optim={optim}", "--logger=none", "--cpu", "--frames.eval_method=canonical"]
    arguments = ["--config", "configs/s2ef/faenet.yml", *overrides, f"--dataset.root={small_s2ef}"]
    assert main([*arguments, "--run-dir", str(runs), "--identifier", "s2ef"]) == 0
    return runs / "s2ef" / "checkpoints" / "best.pt"


@pytest.fixture(scope="module")
def predictions(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the files of all splits, from an unbroken run on one rank."""
    runs = tmp_path_factory.mktemp("predictions")
    assert main(_arguments(checkpoint, runs)) == 0
    return _folder(runs)


def _arguments(checkpoint: Path, runs: Path, *extra: str) -> list[str]:
    return ["--mode", "predict", "--checkpoint", str(checkpoint), "--run-dir", str(runs), "--identifier", "p", *extra]


def _folder(runs: Path) -> Path:
    return runs / "p" / "results" / "predictions"


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as content:
        return {name: content[name] for name in content.files}


def _assert_same_predictions(left: Path, right: Path) -> None:
    """But for rounding: batches have other sizes."""
    for split in SPLITS:
        one, two = _arrays(left / f"{split}.npz"), _arrays(right / f"{split}.npz")
        assert set(one) == set(two)
        for name, values in one.items():
            if values.dtype.kind == "f":
                np.testing.assert_allclose(values, two[name], rtol=1e-4, atol=1e-5)
            else:
                assert np.array_equal(values, two[name])


def test_files_hold_each_systems_energy_and_free_forces(checkpoint: Path, predictions: Path) -> None:
    """Against a loop over single systems, cut back by numpy.split as the leaderboard does."""
    state = load_checkpoint(checkpoint)
    config = build_config(state["config"])
    model, _ = load_model(state, config, "cpu")
    model.eval()
    scale = 2.887317180633545
    for split in SPLITS:
        found = _arrays(predictions / f"{split}.npz")
        assert set(found) == {"ids", "energy", "forces", "chunk_idx"}
        assert (found["energy"].dtype, found["forces"].dtype) == (np.float64, np.float32)
        data = build.make_dataset(config, config.dataset.val[split])
        per_system = np.split(found["forces"], found["chunk_idx"])
        assert len(per_system) == len(data) == len(set(found["ids"]))
        for index in range(len(data)):
            sample = data[index]
            with torch.no_grad():
                out = model(atomicdata_list_to_batch([sample]))
            energy = float(out["energy"]["energy"]) * scale - 0.7554450631141663
            assert found["ids"][index] == f"{sample.sid[0]}_{int(sample.fid)}"
            assert float(found["energy"][index]) == pytest.approx(energy, rel=1e-5, abs=1e-5)
            forces = (out["forces"]["forces"] * scale)[sample.fixed == 0].numpy()
            np.testing.assert_allclose(per_system[index], forces, rtol=1e-4, atol=1e-5)


def test_two_ranks_write_the_same_file(checkpoint: Path, predictions: Path, tmp_path: Path) -> None:
    processes.main_on_ranks(_arguments(checkpoint, tmp_path), tmp_path / "log")
    _assert_same_predictions(predictions, _folder(tmp_path))


def test_an_interrupted_split_goes_on_and_is_never_partial(
    checkpoint: Path, predictions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the second of the parts; the same command makes the rest, and leaves these alone."""
    write, written = prediction._write, []

    def stopping(path: Path, arrays: dict, **options: bool) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, arrays, **options)

    def going_on(path: Path, arrays: dict, **options: bool) -> None:
        assert path not in written
        write(path, arrays, **options)

    monkeypatch.setattr(prediction, "_write", stopping)
    with pytest.raises(KeyboardInterrupt):
        main(_arguments(checkpoint, tmp_path))
    assert all(path.exists() for path in written) and not list(_folder(tmp_path).glob("*.npz"))
    monkeypatch.setattr(prediction, "_write", going_on)
    assert main(_arguments(checkpoint, tmp_path)) == 0
    _assert_same_predictions(predictions, _folder(tmp_path))
    assert not list(_folder(tmp_path).glob("*.parts"))


def test_parts_of_other_data_are_not_taken_over_and_ids_that_are_the_same_are_told(
    checkpoint: Path,
    predictions: Path,
    tmp_path: Path,
    small_s2ef: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Interrupted, and the file replaced under its name."""
    data = shutil.copyfile(small_s2ef / "s2ef/all/val_id/data.0000.lmdb", tmp_path / "data.lmdb")
    arguments = _arguments(checkpoint, tmp_path, f"--dataset.test={{t: {{src: {data}}}}}")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prediction, "_join", Mock(side_effect=KeyboardInterrupt))
        main(arguments)
    data.unlink()
    records = [make_fields(index, task="s2ef", edges=False, seed=2) | {"sid": 5, "fid": 0} for index in range(4)]
    write_lmdb(data, [dump_record(fields) for fields in records])
    assert main(arguments) == 0
    found, expected = _arrays(_folder(tmp_path) / "t.npz"), _arrays(predictions / "val_ood_ads.npz")
    np.testing.assert_allclose(found["energy"], expected["energy"], rtol=2e-3, atol=1e-4)
    assert "t.npz: 1 of 1 ids belong to several systems, 5_0 to 4" in caplog.text


def test_predictions_that_are_not_finite_are_no_file(checkpoint: Path, tmp_path: Path) -> None:
    state = load_checkpoint(checkpoint)
    next(value for value in state["model"].values() if value.is_floating_point()).fill_(float("nan"))
    config = build_config(state["config"])
    model, tasks = load_model(state, config, "cpu")
    dataset = build.make_dataset(config, config.dataset.val["val_id"], labelled=False)
    path = tmp_path / "val_id.npz"
    options = {"key": "k", "batch_size": 2, "make_loader": lambda batches: make_loader(dataset, batches, num_workers=0)}
    with pytest.raises(ValueError, match="split 'val_id': 1 of 1 predicted energy are not finite"):
        prediction.predict_split(model, tasks, dataset, path, **options)
    assert not path.exists()


def test_submission_joins_the_four_splits(checkpoint: Path, predictions: Path, tmp_path: Path) -> None:
    out = tmp_path / "sub.npz"
    counts = make_submission("s2ef", predictions, SPLITS, out, sources=_sources(checkpoint))
    assert counts == dict.fromkeys(SPLITS, 4)
    joined, part = _arrays(out), _arrays(predictions / "val_ood_cat.npz")
    assert set(joined) == {f"{split}_{name}" for split in ("id", "ood_ads", "ood_cat", "ood_both") for name in part}
    assert np.array_equal(joined["ood_cat_energy"], part["energy"])
    assert np.array_equal(joined["ood_cat_forces"], part["forces"].astype(np.float16))
    with pytest.raises(ValueError, match="there already"):
        make_submission("s2ef", predictions, SPLITS, out)
    with pytest.raises(ValueError, match="a submission has the four splits"):
        make_submission("s2ef", predictions, SPLITS[:3], tmp_path / "three.npz")


def _sources(checkpoint: Path) -> list[str]:
    config = build_config(load_checkpoint(checkpoint)["config"])
    return [str(Path(config.dataset.root) / config.dataset.val[split].src) for split in SPLITS]


def test_submission_refuses_what_does_not_fit(checkpoint: Path, predictions: Path, tmp_path: Path) -> None:
    folder, sources = shutil.copytree(predictions, tmp_path / "copy"), _sources(checkpoint)
    whole = _arrays(folder / "val_id.npz")
    repeated, unknown = whole["ids"].copy(), whole["ids"].copy()
    repeated[0], unknown[0] = repeated[1], "random0_0"
    for message, changed in (
        ("more than once", {"ids": repeated}),
        ("1 ids have no prediction", {"ids": unknown}),
        ("energies or chunks for another number", {"energy": whole["energy"][:-1]}),
        ("a force component of 7e\\+04 eV/A is too large for float16", {"forces": np.full_like(whole["forces"], 7e4)}),
        ("lacks forces; is it of task s2ef", {"forces": None}),
        ("there is no such file", None),
    ):
        (folder / "val_id.npz").unlink()
        if changed is not None:
            arrays = {name: values for name, values in (whole | changed).items() if values is not None}
            np.savez(folder / "val_id.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            make_submission("s2ef", folder, SPLITS, tmp_path / "sub.npz", sources=sources)
        assert not (tmp_path / "sub.npz").exists()


def test_data_without_labels_is_predicted_but_no_free_atom_is_left_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Free atoms are in the file also where the model does not see those of tag 0."""
    for number, fixed in enumerate(("subsurface", "random")):
        prepare(write_raw(tmp_path / fixed, 1, fixed=fixed), tmp_path / f"d{number}", options=Options(labels=False))
    test = f"--dataset.test={{held: {{src: {tmp_path / 'd0'}}}, loose: {{src: {tmp_path / 'd1'}}}}}"
    assert main(_arguments(checkpoint, tmp_path, test)) == 2
    assert "free atoms are of tag 0" in capsys.readouterr().err
    assert [path.name for path in _folder(tmp_path).glob("*.npz")] == ["held.npz"]
    assert len(_arrays(_folder(tmp_path) / "held.npz")["ids"]) == 4
