"""Predictions: the leaderboard's files, whole or absent, on any number of ranks, resumed after a kill."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

from faenet_ocp import build
from faenet_ocp.checkpoint import load_checkpoint, load_weights
from faenet_ocp.config.schema import build_config
from faenet_ocp.evaluation import prediction
from faenet_ocp.evaluation.submission import make_submission
from faenet_ocp.launch.cli import main
from faenet_ocp.prepare.s2ef import Options, prepare
from s2ef_raw import write_raw

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("val_id", "val_ood_ads", "val_ood_cat", "val_ood_both")


@pytest.fixture(scope="module")
def checkpoint(small_s2ef: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small S2EF model after one epoch, trained by the command line."""
    runs = tmp_path_factory.mktemp("runs")
    model = "{hidden_channels: 128, num_filters: 24, num_interactions: 2, num_gaussians: 10}"
    optim = "{warmup_steps: 0, batch_size: 4, max_epochs: 1, num_workers: 0}"
    overrides = [f"--model={model}", f"--optim={optim}", "--logger=none", "--cpu"]
    arguments = ["--config", "configs/s2ef/faenet.yml", *overrides, f"--dataset.root={small_s2ef}"]
    assert main([*arguments, "--run-dir", str(runs), "--identifier", "s2ef"]) == 0
    return runs / "s2ef" / "checkpoints" / "best.pt"


def _arguments(checkpoint: Path, runs: Path, *extra: str) -> list[str]:
    return ["--mode", "predict", "--checkpoint", str(checkpoint), "--run-dir", str(runs), "--identifier", "p", *extra]


def test_files_hold_each_systems_energy_and_free_forces(checkpoint: Path, tmp_path: Path) -> None:
    """Against a loop over single systems, cut back by numpy.split as the leaderboard does."""
    assert main(_arguments(checkpoint, tmp_path, "--frames.eval_method=canonical")) == 0
    state = load_checkpoint(checkpoint)
    state["config"]["frames"]["eval_method"] = "canonical"
    config = build_config(state["config"])
    model = build.make_model(config).eval()
    load_weights(model, state)
    scale = 2.887317180633545
    for split in SPLITS:
        with np.load(tmp_path / "p" / "results" / "predictions" / f"{split}.npz") as content:
            found = {name: content[name] for name in content.files}
        assert set(found) == {"ids", "energy", "forces", "chunk_idx"}
        data = build.make_dataset(config, config.dataset.val[split])
        per_system = np.split(found["forces"], found["chunk_idx"])
        assert len(per_system) == len(data) == len(set(found["ids"]))
        for index in range(len(data)):
            sample = data[index]
            with torch.no_grad():
                out = model(atomicdata_list_to_batch([sample]))
            energy = float(out["energy"]["energy"]) * scale - 0.7554450631141663
            assert found["ids"][index] == f"{sample.sid[0]}_{int(sample.fid)}"
            assert float(found["energy"][index]) == pytest.approx(energy, rel=2e-3, abs=1e-3)  # float16
            forces = (out["forces"]["forces"] * scale)[sample.fixed == 0].numpy()
            np.testing.assert_allclose(per_system[index], forces, rtol=2e-3, atol=1e-3)


def test_two_ranks_write_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    assert main(_arguments(checkpoint, tmp_path / "one")) == 0
    command = [sys.executable, str(ROOT / "main.py")]
    arguments = _arguments(checkpoint, tmp_path / "two", "--num-gpus", "2")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for split in SPLITS:
        one, two = (
            np.load(tmp_path / name / "p" / "results" / "predictions" / f"{split}.npz") for name in ("one", "two")
        )
        for name in one.files:
            if one[name].dtype == np.float16:
                np.testing.assert_allclose(one[name], two[name], rtol=2e-3, atol=1e-4)
            else:
                assert np.array_equal(one[name], two[name])


def test_an_interrupted_split_goes_on_and_is_never_partial(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the second of the parts; the rest is made by the same command, the first parts are kept."""
    assert main(_arguments(checkpoint, tmp_path / "unbroken")) == 0
    write, written = prediction._write, []

    def stopping(path: Path, arrays: dict, **options: bool) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, arrays, **options)

    monkeypatch.setattr(prediction, "_write", stopping)
    with pytest.raises(KeyboardInterrupt):
        main(_arguments(checkpoint, tmp_path / "broken"))
    folder = tmp_path / "broken" / "p" / "results" / "predictions"
    assert not list(folder.glob("*.npz"))
    times = {path: path.stat().st_mtime_ns for path in written}
    kept: dict[Path, int] = {}

    def looking(path: Path, arrays: dict, **options: bool) -> None:
        kept.update({p: p.stat().st_mtime_ns for p in times if p.exists()})
        write(path, arrays, **options)

    monkeypatch.setattr(prediction, "_write", looking)
    assert main(_arguments(checkpoint, tmp_path / "broken")) == 0
    assert kept == times
    for split in SPLITS:
        one = np.load(tmp_path / "unbroken" / "p" / "results" / "predictions" / f"{split}.npz")
        two = np.load(folder / f"{split}.npz")
        assert np.array_equal(one["ids"], two["ids"])
        np.testing.assert_allclose(one["forces"], two["forces"], rtol=2e-3, atol=1e-4)
    assert not list(folder.glob("*.parts"))


def _sources(checkpoint: Path) -> list[str]:
    config = build_config(load_checkpoint(checkpoint)["config"])
    return [str(Path(config.dataset.root) / config.dataset.val[split].src) for split in SPLITS]


def test_submission_joins_the_four_splits(checkpoint: Path, tmp_path: Path) -> None:
    assert main(_arguments(checkpoint, tmp_path)) == 0
    folder = tmp_path / "p" / "results" / "predictions"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "make_submission.py"),
        "--task",
        "s2ef",
        "--predictions",
        str(folder),
    ]
    options = ["--splits", ",".join(SPLITS), "--sources", ",".join(_sources(checkpoint))]
    done = subprocess.run([*command, *options, "--out", str(tmp_path / "sub.npz")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "sub.npz") as joined, np.load(folder / "val_ood_cat.npz") as part:
        names = {f"{split}_{array}" for split in ("id", "ood_ads", "ood_cat", "ood_both") for array in part.files}
        assert set(joined.files) == names
        assert np.array_equal(joined["ood_cat_forces"], part["forces"])
    with pytest.raises(ValueError, match="there already"):
        make_submission("s2ef", folder, SPLITS, tmp_path / "sub.npz")


def test_submission_refuses_what_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    assert main(_arguments(checkpoint, tmp_path)) == 0
    folder = tmp_path / "p" / "results" / "predictions"
    with np.load(folder / "val_id.npz") as content:
        whole = {name: content[name] for name in content.files}

    def attempt(message: str, **changed: np.ndarray) -> None:
        np.savez(folder / "val_id.npz", **(whole | changed))
        with pytest.raises(ValueError, match=message):
            make_submission("s2ef", folder, SPLITS, tmp_path / "sub.npz", sources=_sources(checkpoint))
        assert not (tmp_path / "sub.npz").exists()

    ids = whole["ids"].copy()
    ids[0] = ids[1]
    attempt("more than once", ids=ids)
    ids = whole["ids"].copy()
    ids[0] = "random0_0"
    attempt("1 ids have no prediction", ids=ids)
    attempt("energies or chunks for another number", energy=whole["energy"][:-1])
    (folder / "val_id.npz").unlink()
    with pytest.raises(ValueError, match="there is no such file"):
        make_submission("s2ef", folder, SPLITS, tmp_path / "sub.npz")


def test_unlabelled_data_can_be_predicted(checkpoint: Path, tmp_path: Path, small_s2ef: Path) -> None:
    """Test splits have no labels: the labels of a copy are removed, the predictions stay."""
    import pickle

    import lmdb

    source = small_s2ef / "s2ef" / "all" / "val_id" / "data.0000.lmdb"
    target = tmp_path / "unlabelled.lmdb"
    with (
        lmdb.open(str(source), subdir=False, readonly=True, lock=False) as env,
        lmdb.open(str(target), subdir=False, map_size=1 << 26, lock=False) as out,
        env.begin() as reading,
        out.begin(write=True) as writing,
    ):
        for key, value in reading.cursor():
            record = pickle.loads(value)
            if key != b"length":
                fields = record.__dict__.get("_store", record.__dict__)
                for name in ("y", "force", "energy", "forces"):
                    if name in fields:
                        del fields[name]
            writing.put(key, pickle.dumps(record))
    splits = yaml.safe_dump({"test_id": {"src": str(target)}}, default_flow_style=True).strip()
    assert main(_arguments(checkpoint, tmp_path, f"--dataset.test={splits}")) == 0
    assert [path.name for path in (tmp_path / "p" / "results" / "predictions").iterdir()] == ["test_id.npz"]
    with np.load(tmp_path / "p" / "results" / "predictions" / "test_id.npz") as content:
        assert len(content["ids"]) > 0


def test_free_atoms_that_were_taken_out_are_not_left_out_of_the_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for number, fixed in enumerate(("subsurface", "random")):
        prepare(write_raw(tmp_path / fixed, 1, fixed=fixed), tmp_path / f"d{number}", options=Options(labels=False))
    test = f"--dataset.test={{held: {{src: {tmp_path / 'd0'}}}, loose: {{src: {tmp_path / 'd1'}}}}}"
    assert main(_arguments(checkpoint, tmp_path, test)) == 2
    assert "free atoms are of tag 0" in capsys.readouterr().err
    written = {path.name for path in (tmp_path / "p" / "results" / "predictions").glob("*.npz")}
    assert written == {"held.npz"}
