"""Checkpoints: whole or not there, of a known format, and never able to run code."""

import io
import os
import pickle
import re
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


def _as_torch_saves(content: object, **options: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


_PUBLISHED = {"module.embed_block.emb.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "a pointer of git-lfs; `git lfs pull`"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        (b"trainer: faenet\ntask: is2re\n", "a text that begins with 'trainer: faenet"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "a binary file of another kind"),
        (_as_torch_saves({"a": 1}, _use_new_zipfile_serialization=False), "a pickle, as torch wrote them before"),
        (_as_torch_saves(torch.nn.Linear(1, 1)), "holds objects beside tensors, numbers and text"),
        (_as_torch_saves({"state_dict": {}}), "not a checkpoint of faenet-ocp (no format number)"),
        (_as_torch_saves([1]), "not a checkpoint of faenet-ocp (no format number)"),
        (_as_torch_saves(_PUBLISHED), "load_reference_state_dict"),
        (_as_torch_saves({"state_dict": _PUBLISHED, "epoch": 1}), "load_reference_state_dict"),
        (_as_torch_saves({"format": FORMAT + 1}), f"format {FORMAT + 1}, this version reads format {FORMAT}"),
        (_as_torch_saves({"format": FORMAT}), "has no check sum: it was saved by torch.save"),
        (_as_torch_saves({"format": FORMAT})[:-40], "not readable: it is cut short or damaged"),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    """In words of ours: torch's advise to switch its safety off."""
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"checkpoint .*other\.pt: .*{re.escape(message)}") as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value)


def test_folders_places_and_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, message in (
        (tmp_path, "is a folder; name the file in it"),
        (tmp_path / "gone.pt", "there is no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    save_checkpoint(tmp_path / "a.pt", {"model": {"w": torch.ones(100)}})
    assert load_checkpoint("~/a.pt")["model"]["w"].sum() == 100
    assert load_checkpoint("$HOME/a.pt")["format"] == FORMAT
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt: damaged"):
        load_checkpoint(tmp_path / "a.pt")
    # What the message about a missing check sum says, helps.
    (tmp_path / "b.pt").write_bytes(_as_torch_saves({"format": FORMAT, "model": {}}))
    save_checkpoint(tmp_path / "b.pt", torch.load(tmp_path / "b.pt", weights_only=True))
    assert load_checkpoint(tmp_path / "b.pt")["model"] == {}


def test_weights_of_another_model_are_refused() -> None:
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="does not fit the configured model"):
        load_weights(model, {"model": torch.nn.Linear(3, 1).state_dict(), "ema": None})
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 1))
    load_weights(model, {"model": {}, "ema": averaged.state_dict()})
    assert torch.equal(model.weight, averaged.module.weight)
