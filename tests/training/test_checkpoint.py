"""Checkpoints: whole or not there, of a known format, and never able to run code."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from faenet_ocp.checkpoint import (
    FORMAT,
    load_checkpoint,
    load_newest,
    load_weights,
    save_checkpoint,
    save_step,
    step_checkpoints,
)


def test_round_trip_and_retention(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_step(tmp_path, step, {"model": {"w": torch.full((3,), float(step))}}, keep=2)
    assert [path.name for path in step_checkpoints(tmp_path)] == ["step_00000010.pt", "step_00000015.pt"]
    path, state = load_newest(tmp_path)
    assert path.name == "step_00000015.pt"
    assert state["format"] == FORMAT
    assert torch.equal(state["model"]["w"], torch.full((3,), 15.0))
    assert load_checkpoint(tmp_path / "last.pt")["model"]["w"][0] == 15


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        save_step(tmp_path, step, {"model": {"w": torch.full((100,), float(step))}}, keep=2)
    newest = tmp_path / "step_00000002.pt"
    newest.write_bytes(newest.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"step_00000002.pt: not readable: it is cut short"):
        load_checkpoint(newest)
    assert load_newest(tmp_path)[0].name == "step_00000001.pt"
    assert load_newest(tmp_path / "nothing") is None


def test_a_run_whose_folder_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save_checkpoint(tmp_path / "gone" / "checkpoints" / "best.pt", {"model": {}})
    assert not list(tmp_path.iterdir())


class _Payload:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_nothing_in_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": FORMAT, "model": _Payload()}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(_Payload()))
    for name in ("evil.pt", "raw.pt"):
        with pytest.raises(ValueError, match="not a checkpoint"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_foreign_files_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    torch.save({"format": FORMAT + 1}, tmp_path / "newer.pt")
    with pytest.raises(ValueError, match=r"other.pt: not a faenet-ocp checkpoint"):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=rf"newer.pt: format {FORMAT + 1}, this version reads format {FORMAT}"):
        load_checkpoint(tmp_path / "newer.pt")
    with pytest.raises(ValueError, match="there is no such file"):
        load_checkpoint(tmp_path / "gone.pt")


def test_weights_of_another_model_are_refused() -> None:
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="does not fit the configured model"):
        load_weights(model, {"model": torch.nn.Linear(3, 1).state_dict(), "ema": None})
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 1))
    load_weights(model, {"model": {}, "ema": averaged.state_dict()})
    assert torch.equal(model.weight, averaged.module.weight)
