"""Data, numbers and processes that fail: a named error, or left out and counted; never a hang."""

import json
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from faenet_ocp.bad_samples import BadSample, BadSampleError, BadSamples

import processes
import small_data
from faenet_ocp.checkpoint import load_checkpoint, step_checkpoints
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.launch.cli import main

NUM_TRAIN = 12


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.write_data(tmp_path_factory.mktemp("good"), num_train=NUM_TRAIN)


def _fields(index: int, **changes: Any) -> dict[str, Any]:
    fields = small_data.make_fields(index, task="s2ef", edges=False, layers=1 + index % 4)
    return {name: value for name, value in (fields | changes).items() if value is not None}


def _flip(value: bytes, *, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 0xFF]) + value[at + 1 :]


def _lonely(index: int) -> dict[str, Any]:
    """One atom in a cell so large that it has no neighbour."""
    return {
        "pos": torch.zeros(1, 3),
        "cell": 50 * torch.eye(3)[None],
        "atomic_numbers": torch.tensor([78.0]),
        "natoms": 1,
        "tags": torch.tensor([2]),
        "fixed": torch.zeros(1),
        "sid": index,
        "fid": 0,
        "y": 0.5,
        "force": torch.zeros(1, 3),
    }


# What is wrong, how the record is made, what the message has to say.
_BAD: dict[str, tuple[Callable[[int], bytes], str]] = {
    "truncated value": (lambda i: small_data.dump_record(_fields(i))[:-100], "record 3"),
    "flipped byte": (lambda i: _flip(small_data.dump_record(_fields(i)), at=0), "record 3"),
    "no label": (lambda i: small_data.dump_record(_fields(i, y=None)), r"\(sid 3\) has no label 'energy'"),
    "no positions": (lambda i: small_data.dump_record(_fields(i, pos=None)), r"\(sid 3\) has no field 'pos'"),
    "NaN energy": (lambda i: small_data.dump_record(_fields(i, y=float("nan"))), r"\(sid 3\) has values in y that"),
    "infinite force": (
        lambda i: small_data.dump_record(_fields(i, force=torch.full_like(_fields(i)["pos"], torch.inf))),
        r"\(sid 3\) has values in force that are not finite",
    ),
    "forces of another shape": (
        lambda i: small_data.dump_record(_fields(i, force=torch.zeros(2, 3))),
        r"\(sid 3\) has force of shape \(2, 3\)",
    ),
    "energy of two systems": (
        lambda i: small_data.dump_record(_fields(i, y=torch.zeros(2))),
        r"\(sid 3\) has y of shape",
    ),
}


def _write(root: Path, good: Path, bad: dict[int, bytes]) -> Path:
    """The good data with some training records replaced."""
    values = [bad.get(i) or small_data.dump_record(_fields(i)) for i in range(NUM_TRAIN)]
    small_data.write_lmdb(root / "train.lmdb", values)
    (root / "val.lmdb").write_bytes((good / "val.lmdb").read_bytes())
    return root


def _arguments(folder: Path, root: Path, *, dataset: dict[str, Any] | None = None, **optim: Any) -> list[str]:
    config = processes.write_config(folder / "config.yml", root, model=processes.MODEL | {"num_interactions": 1})
    content = yaml.safe_load(config.read_text())
    content["optim"] |= optim
    content["dataset"] |= dataset or {}
    config.write_text(yaml.safe_dump(content))
    return ["--config", str(config), "--identifier", "run"]


@pytest.mark.parametrize("kind", list(_BAD))
def test_a_bad_record_is_named(good: Path, tmp_path: Path, kind: str) -> None:
    """File, record and, once it is known, sid."""
    make, message = _BAD[kind]
    root = _write(tmp_path, good, {3: make(3)})
    dataset = OC20LmdbDataset(
        {"src": str(root / "train.lmdb"), "labels": ["energy", "forces"], "cutoff": 4.0, "max_neighbors": 9}
    )
    with pytest.raises(ValueError, match=message) as caught:
        dataset[3]
    assert str(root / "train.lmdb") in str(caught.value)
    assert dataset[4].sid == ["4"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_record_ends_training_with_its_name(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture, workers: int
) -> None:
    root = _write(tmp_path, good, {3: _BAD["NaN energy"][0](3)})
    assert main(_arguments(tmp_path, root, num_workers=workers)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {root / 'train.lmdb'}: record 3 (sid 3) has values in y that are not finite"


def test_a_missing_record_and_an_empty_split_are_named(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    items = {b"length": pickle.dumps(3)}
    items |= {b"%d" % i: small_data.dump_record(_fields(i)) for i in (0, 2)}
    items[b"x"] = b""
    small_data.write_items(tmp_path / "train.lmdb", items)
    dataset = OC20LmdbDataset({"src": str(tmp_path / "train.lmdb"), "edges": "none"})
    with pytest.raises(ValueError, match=r"train.lmdb: record 1 is missing"):
        dataset[1]
    small_data.write_lmdb(tmp_path / "empty" / "train.lmdb", [])
    (tmp_path / "empty" / "val.lmdb").write_bytes((good / "val.lmdb").read_bytes())
    assert main(_arguments(tmp_path, tmp_path / "empty")) == 2
    assert "dataset, split train: no records in" in capsys.readouterr().err


def test_a_truncated_file_is_named_before_any_work(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    content = (good / "train.lmdb").read_bytes()
    (tmp_path / "train.lmdb").write_bytes(content[: len(content) // 2])
    (tmp_path / "val.lmdb").write_bytes((good / "val.lmdb").read_bytes())
    assert main(_arguments(tmp_path, tmp_path)) == 2
    assert "train.lmdb: is cut short" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unusual_systems_are_trained_on(good: Path, tmp_path: Path) -> None:
    """A single atom without neighbours, and a thousand atoms: not bad, only unusual."""
    atoms = np.random.default_rng(0).permutation(1000)
    grid = torch.tensor([[i % 10, i // 10 % 10, i // 100] for i in range(1000)]).float() * 2.6
    large = _lonely(5) | {
        "pos": grid,
        "cell": 26 * torch.eye(3)[None],
        "atomic_numbers": torch.tensor(np.where(atoms % 2, 29.0, 46.0)).float(),
        "natoms": 1000,
        "tags": torch.ones(1000, dtype=torch.long),
        "fixed": torch.zeros(1000),
        "force": torch.zeros(1000, 3),
    }
    unusual = {3: small_data.dump_record(_lonely(3)), 5: small_data.dump_record(large)}
    root = _write(tmp_path, good, unusual)
    assert main(_arguments(tmp_path, root, max_epochs=1)) == 0
    losses = [r["train/loss"] for r in processes.records(tmp_path / "run") if "train/loss" in r]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


# ------------------------------------------------------------------------------------------ skipping

_SKIP = {"on_bad_sample": "skip", "max_bad_share": 0.2}


def _listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]


def test_bad_samples_are_left_out_counted_and_listed(good: Path, tmp_path: Path) -> None:
    """Training and evaluation equal those on data without the bad records, over several epochs and a resume."""
    root = _write(tmp_path, good, {3: _BAD["NaN energy"][0](3), 8: _BAD["truncated value"][0](8)})
    val = [small_data.dump_record(small_data.make_fields(i, task="s2ef", edges=False, seed=1)) for i in range(6)]
    val[2] = val[2][:-10]
    small_data.write_lmdb(root / "val.lmdb", val)
    arguments = _arguments(tmp_path, root, dataset=_SKIP, batch_size=12, num_workers=1)
    assert main([*arguments, "--optim.max_epochs=1"]) == 0
    assert main([*arguments, "--optim.max_epochs=3"]) == 0
    entries = _listed(tmp_path / "run")
    assert sorted((entry["split"], entry["index"]) for entry in entries) == [("train", 3), ("train", 8), ("v", 2)]
    assert any("record 3 (sid 3)" in entry["reason"] for entry in entries)
    metrics = json.loads((tmp_path / "run" / "results" / "metrics.json").read_text())["splits"]["v"]
    assert metrics["num_systems"] == 5
    # One batch an epoch: the loss of the first step is a mean over the ten good systems.
    clean = tmp_path / "clean"
    kept = [i for i in range(NUM_TRAIN) if i not in (3, 8)]
    small_data.write_lmdb(clean / "train.lmdb", [small_data.dump_record(_fields(i)) for i in kept])
    small_data.write_lmdb(clean / "val.lmdb", [value for i, value in enumerate(val) if i != 2])
    frames = ["--frames.method=det", "--optim.max_epochs=1"]  # stochastic frames go by the index
    arguments = _arguments(clean, clean, batch_size=12)
    assert main([*arguments, *frames]) == 0
    skipping = _arguments(tmp_path / "det", root, dataset=_SKIP, batch_size=12)
    assert main([*skipping, *frames]) == 0
    for one, two in zip(processes.records(clean / "run"), processes.records(tmp_path / "det" / "run"), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-4)


def test_more_bad_samples_than_allowed_end_the_run(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = {i: _BAD["no label"][0](i) for i in (1, 3, 8)}
    arguments = _arguments(tmp_path, _write(tmp_path, good, bad), dataset=_SKIP)
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "split 'train': 3 of 12 samples cannot be used, more than dataset.max_bad_share: 0.2 allows" in error
    assert error.endswith(f"see {tmp_path / 'run' / 'bad_samples.jsonl'}")
    assert len(_listed(tmp_path / "run")) == 3


def test_a_rank_whose_whole_share_is_bad_takes_part(good: Path, tmp_path: Path) -> None:
    """Two ranks, one system each, accumulation and BatchNorm; in some steps one rank or both have nothing."""
    bad = {i: _BAD["NaN energy"][0](i) for i in (0, 1, 2, 5, 7, 9)}
    root = _write(tmp_path, good, bad)
    for name, extra in (("plain", []), ("accumulated", ["--optim.batch_size=4", "--optim.grad_accumulation=2"])):
        share = {"on_bad_sample": "skip", "max_bad_share": 0.5}
        arguments = [*_arguments(tmp_path / name, root, dataset=share, batch_size=2, max_epochs=2), *extra]
        arguments.append("--outputs.energy.normalizer={mean: 0.0, stdev: 1.0}")  # six systems are fitted exactly
        started = processes.forked(arguments, tmp_path / f"{name}.log", ranks=2)
        assert processes.finish(started) == [0, 0], (tmp_path / f"{name}.log").read_text()[-3000:]
        losses = [r["train/loss"] for r in processes.records(tmp_path / name / "run") if "train/loss" in r]
        assert len(losses) == (12 if name == "plain" else 6)
        assert np.isfinite(losses).all()


def test_a_split_to_predict_is_never_cut(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(_arguments(tmp_path, good, max_epochs=1)) == 0
    values = [small_data.dump_record(_fields(i)) for i in range(4)]
    small_data.write_lmdb(tmp_path / "test.lmdb", [*values[:2], values[2][:-9], values[3]])
    weights = ["--mode", "predict", "--checkpoint", str(tmp_path / "run" / "checkpoints" / "best.pt")]
    source = [f"--dataset.test={{t: {{src: {tmp_path / 'test.lmdb'}}}}}", "--dataset.on_bad_sample=skip"]
    assert main([*weights, *source, "--run-dir", str(tmp_path), "--identifier", "p"]) == 2
    assert f"{tmp_path / 'test.lmdb'}: record 2" in capsys.readouterr().err
    assert not (tmp_path / "p" / "results" / "predictions" / "t.npz").exists()


def test_the_list_survives_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    path.write_text('{"split": "train", "index": 1, "reason": ""}\n{"split": "tr')
    samples = BadSamples("train", 10, max_share=0.2, path=path)
    samples.note([BadSample(1, "again"), BadSample(2, "new")])
    assert path.read_text().count("index") == 2
    samples.add(2)
    with pytest.raises(BadSampleError, match="3 of 10 samples"):
        samples.add(1)
    with pytest.raises(BadSampleError, match=r"^file: record 5$"):
        BadSamples("train", 10, path=path).note([BadSample(5, "file: record 5")])


# ------------------------------------------------------------------------------------------ numbers


def _evidence(folder: Path) -> dict[str, Any]:
    (path,) = sorted((folder / "failures").glob("step_*_rank_0.pt"))[:1]
    return torch.load(path, weights_only=True)


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_evidence(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A label of 1e38 is finite; its loss is not."""
    poisoned = small_data.dump_record(_fields(3, force=torch.full_like(_fields(3)["pos"], 1e38)))
    root = _write(tmp_path, good, {3: poisoned})
    losses = ["--loss_functions=[{energy: {fn: mae}}, {forces: {fn: mse, coefficient: 1}}]"]
    arguments = [*_arguments(tmp_path, root), *losses]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "is not finite" in error
    assert "optim.skip_nonfinite" in error
    evidence = _evidence(tmp_path / "run")
    assert "3" in evidence["sids"]
    assert evidence["losses"]["forces"] == np.inf
    assert any(torch.isfinite(batch["pos"]).all() for batch in evidence["batches"])
    assert all(torch.isfinite(value).all() for value in evidence["model"].values() if value.is_floating_point())

    skipping = [*_arguments(tmp_path / "skip", root, skip_nonfinite=2), *losses]
    assert main(skipping) == 0
    state = load_checkpoint(tmp_path / "skip" / "run" / "checkpoints" / "last.pt")
    assert state["num_skipped"] == 2
    assert all(torch.isfinite(value).all() for value in state["model"].values() if value.is_floating_point())
    capsys.readouterr()
    assert main([*_arguments(tmp_path / "few", root, skip_nonfinite=1), *losses]) == 1


def test_a_learning_rate_that_explodes_stops(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(_arguments(tmp_path, good, lr_initial=1e30, optimizer="SGD", warmup_steps=0)) in (1, 2)
    assert "not finite" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ processes


def test_a_dead_loader_worker_ends_the_run_with_its_reason(good: Path, tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, good, num_workers=2, max_epochs=3000, checkpoint_every=2, eval_every_epochs=None)
    (process,) = processes.forked(arguments, tmp_path / "log")
    processes.wait_for(lambda: step_checkpoints(tmp_path / "run" / "checkpoints") or process.exitcode is not None)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    assert processes.finish([process], timeout=60) == [1]
    log = (tmp_path / "log").read_text()
    assert f"DataLoader worker (pid {workers[0]}) is killed by signal: Killed" in log
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["model"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_ends_the_run_with_its_reason(good: Path, tmp_path: Path, victim: int) -> None:
    """Through torch elastic: within a minute, one line that says which rank died of what, status 1."""
    arguments = _arguments(tmp_path, good, num_workers=1, max_epochs=3000, checkpoint_every=2, eval_every_epochs=None)
    process = processes.start([*arguments, "--num-gpus", "2"])
    try:
        processes.wait_for(lambda: step_checkpoints(tmp_path / "run" / "checkpoints"))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = sorted(int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes())
        os.kill(ranks[victim], signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: rank ") and error.endswith(" was killed by SIGKILL"), output[-2000:]
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["model"]


@pytest.mark.slow
def test_a_bad_record_ends_two_ranks_with_its_name(good: Path, tmp_path: Path) -> None:
    root = _write(tmp_path, good, {3: _BAD["NaN energy"][0](3)})
    output = processes.run([*_arguments(tmp_path, root), "--num-gpus", "2"], status=2)
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"{root / 'train.lmdb'}: record 3 (sid 3) has values in y that are not finite" in error
