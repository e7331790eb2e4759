"""Data, numbers and processes that fail: a named error, never a hang."""

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import processes
import small_data
from faenet_ocp.checkpoint import load_checkpoint, step_checkpoints
from faenet_ocp.config.schema import SourceConfig, build_config
from faenet_ocp.config.yaml import load_yaml
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.launch.cli import main
from faenet_ocp.training.samples import check_samples

NUM_TRAIN = 12


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.write_data(tmp_path_factory.mktemp("good"), num_train=NUM_TRAIN)


def _fields(index: int, **changes: Any) -> dict[str, Any]:
    fields = small_data.make_fields(index, task="s2ef", edges=False, layers=1 + index % 4)
    return {name: value for name, value in (fields | changes).items() if value is not None}


def _record(index: int, **changes: Any) -> bytes:
    return small_data.dump_record(_fields(index, **changes))


def _forces(index: int, value: float) -> torch.Tensor:
    return torch.full_like(_fields(index)["pos"], value)


# What is wrong with record 3, and what the message has to say.
_BAD: dict[str, tuple[bytes, str]] = {
    "truncated value": (_record(3)[:-100], "record 3"),
    "flipped byte": (bytes([_record(3)[0] ^ 0xFF]) + _record(3)[1:], "record 3"),
    "no label": (_record(3, y=None), r"\(sid 3\) has no label 'energy'"),
    "no positions": (_record(3, pos=None), r"\(sid 3\) has no field 'pos'"),
    "NaN energy": (_record(3, y=float("nan")), r"\(sid 3\) has values in y that"),
    "infinite force": (_record(3, force=_forces(3, torch.inf)), r"\(sid 3\) has values in force that are not finite"),
    "forces of another shape": (_record(3, force=torch.zeros(2, 3)), r"\(sid 3\) has force of shape \(2, 3\)"),
    "energy of two systems": (_record(3, y=torch.zeros(2)), r"\(sid 3\) has y of shape"),
}


def _write(root: Path, good: Path, bad: dict[int, bytes]) -> Path:
    """The good data with some training records replaced."""
    small_data.write_lmdb(root / "train.lmdb", [bad.get(i) or _record(i) for i in range(NUM_TRAIN)])
    (root / "val.lmdb").write_bytes((good / "val.lmdb").read_bytes())
    return root


def _arguments(folder: Path, root: Path, **optim: Any) -> list[str]:
    config = processes.write_config(folder / "config.yml", root, model={"num_interactions": 1}, optim=optim)
    return ["--config", str(config), "--identifier", "run"]


@pytest.mark.parametrize("kind", list(_BAD))
def test_a_bad_record_is_named(good: Path, tmp_path: Path, kind: str) -> None:
    """File, record and, once it is known, sid."""
    value, message = _BAD[kind]
    root = _write(tmp_path, good, {3: value})
    dataset = OC20LmdbDataset(
        {"src": str(root / "train.lmdb"), "labels": ["energy", "forces"], "cutoff": 4.0, "max_neighbors": 9}
    )
    with pytest.raises(ValueError, match=message) as caught:
        dataset[3]
    assert str(root / "train.lmdb") in str(caught.value)
    assert dataset[4].sid == ["4"]


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (1, 1), (0, 2)])
def test_a_bad_record_ends_training_with_its_name(good: Path, tmp_path: Path, workers: int, ranks: int) -> None:
    root = _write(tmp_path, good, {3: _BAD["NaN energy"][0]})
    arguments = _arguments(tmp_path, root, num_workers=workers)
    log = processes.main_on_ranks(arguments, tmp_path / "log", ranks=ranks, status=2)
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert error.endswith(f"{root / 'train.lmdb'}: record 3 (sid 3) has values in y that are not finite")


def test_stored_edges_of_other_limits_end_a_run_before_it_begins(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of a few records are warned of; the default limits, OC20's files and edges made anew are no matter."""
    records = [small_data.make_fields(index, task="s2ef") for index in range(NUM_TRAIN)]
    small_data.write_lmdb(tmp_path / "train.lmdb", map(small_data.dump_record, records))
    (tmp_path / "val.lmdb").write_bytes((good / "val.lmdb").read_bytes())
    arguments = _arguments(tmp_path, tmp_path)
    assert main([*arguments, "--model.cutoff=8", "--model.max_neighbors=40"]) == 2
    error = capsys.readouterr().err
    assert "dataset, split train: stored edges are not those within model.cutoff (8) and model.max_neighbors" in error
    assert f"in 12 of 12 systems looked at ({tmp_path / 'train.lmdb'}: record 0 lacks " in error
    assert "dataset.edges: recompute builds them anew" in error
    assert not (tmp_path / "run").exists()

    def samples(cutoff: float, edges: str = "stored") -> str:
        caplog.clear()
        limits = {"dataset": {"edges": edges}, "model": {"cutoff": cutoff, "max_neighbors": 40}}
        config = build_config(load_yaml(processes.write_config(tmp_path / "own.yml", tmp_path, **limits)))
        check_samples(config, {"train": SourceConfig(src="train.lmdb")}, mode="train")
        return caplog.text

    assert not samples(6.0) and not samples(8.0, "recompute")
    records[5]["cell_offsets"] *= -1
    (tmp_path / "train.lmdb").unlink()
    small_data.write_lmdb(tmp_path / "train.lmdb", map(small_data.dump_record, records))
    assert f"in 1 of 12 systems looked at ({tmp_path / 'train.lmdb'}: record 5 lacks " in samples(6.0)


def test_a_missing_record_and_an_empty_split_are_named(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    items = {b"length": pickle.dumps(3), b"0": _record(0), b"2": _record(2), b"x": b""}
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

    def record(index: int, pos: torch.Tensor, size: float) -> bytes:
        n, metals = len(pos), torch.tensor([29.0, 46.0])
        fields = {"pos": pos, "cell": size * torch.eye(3)[None], "natoms": n, "atomic_numbers": metals.repeat(n)[:n]}
        fields |= {"tags": torch.ones(n, dtype=torch.long), "fixed": torch.zeros(n), "force": torch.zeros(n, 3)}
        return small_data.dump_record(fields | {"sid": index, "fid": 0, "y": 0.5})

    grid = 2.6 * torch.cartesian_prod(*[torch.arange(10.0)] * 3)
    root = _write(tmp_path, good, {3: record(3, torch.zeros(1, 3), 50.0), 5: record(5, grid, 26.0)})
    assert main(_arguments(tmp_path, root, max_epochs=1)) == 0
    losses = [r["train/loss"] for r in processes.records(tmp_path / "run") if "train/loss" in r]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


# ------------------------------------------------------------------------------------------ numbers


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_evidence(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A label of 1e38 is finite; its loss is not."""
    root = _write(tmp_path, good, {3: _record(3, force=_forces(3, 1e38))})
    losses = ["--loss_functions=[{energy: {fn: mae}}, {forces: {fn: mse, coefficient: 1}}]"]
    assert main([*_arguments(tmp_path, root), *losses]) == 1
    error = capsys.readouterr().err
    assert "is not finite" in error
    assert "optim.skip_nonfinite" in error
    (path,) = (tmp_path / "run" / "failures").glob("step_*_rank_0.pt")
    evidence = torch.load(path, weights_only=True)
    assert "3" in evidence["sids"]
    assert evidence["losses"]["forces"] == np.inf
    assert any(torch.isfinite(batch["pos"]).all() for batch in evidence["batches"])
    assert all(torch.isfinite(value).all() for value in evidence["model"].values() if value.is_floating_point())

    assert main([*_arguments(tmp_path / "skip", root, skip_nonfinite=2), *losses]) == 0
    state = load_checkpoint(tmp_path / "skip" / "run" / "checkpoints" / "last.pt")
    assert state["num_skipped"] == 2
    assert all(torch.isfinite(value).all() for value in state["model"].values() if value.is_floating_point())
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
    """The real command: within a minute, one line that says which rank died of what, status 1."""
    arguments = _arguments(tmp_path, good, num_workers=1, max_epochs=3000, checkpoint_every=2, eval_every_epochs=None)
    process = processes.start([*arguments, "--num-gpus", "2"])
    try:
        processes.wait_for(lambda: step_checkpoints(tmp_path / "run" / "checkpoints"))
        os.kill(processes.ranks_of(process.pid)[victim], signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: rank ") and error.endswith(" was killed by SIGKILL"), output[-2000:]
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["model"]
