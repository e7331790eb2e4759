"""Checkpoints: one file each, written whole or not at all, loadable without running code.

The file is a zip file as torch writes it, with the SHA-256 of its content as its comment. It holds a dictionary of
tensors, numbers, strings and containers (see `FORMAT`), read with `torch.load(weights_only=True)`:

| key | what |
| --- | --- |
| `format` | `FORMAT` |
| `versions` | see `common.files` |
| `config` | the resolved configuration |
| `model`, `ema` | state dicts (`ema` is None without EMA) |
| `tasks` | normalisers and element references, in eV and eV/Angstrom |
| `optimizer`, `scheduler`, `progress`, `best` | what training needs to go on |
| `statistics` | label statistics of the training set (`references.py`) |
"""

import hashlib
import io
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from faenet_ocp.common.files import publish, software_versions, temporary_path, write_bytes

FORMAT = 1
_NO_COMMENT = b"\0\0"
_STEP_FILE = re.compile(r"step_(\d+)\.pt")


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint; a reader sees the old file or the new one, whole.

    Raises:
        OSError: it could not be written, or the folder that `path.parent` is in is gone; the old file is still there.
    """
    # In memory first: torch's writer ends the process when the disk is full.
    content = io.BytesIO()
    torch.save({"format": FORMAT, "versions": software_versions(), **state}, content)
    write_bytes(path, _seal(content.getvalue()))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU; no code in it can run.

    Raises:
        ValueError: no such file, not a checkpoint of ours, or one of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: there is no such file")
    content = path.read_bytes()
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for truncated, foreign and refused files
        raise ValueError(f"checkpoint {path}: not readable ({type(error).__name__}: {str(error)[:300]})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"checkpoint {path}: not a faenet-ocp checkpoint (no format number)")
    if state["format"] != FORMAT:
        raise ValueError(f"checkpoint {path}: format {state['format']}, this version reads format {FORMAT}")
    if not _is_sealed(content):
        raise ValueError(f"checkpoint {path}: damaged (its content does not match its check sum)")
    return state


def _seal(content: bytes) -> bytes:
    """A zip file with the digest of its content as its comment: zip's own check sums are not looked at by torch."""
    if not content.endswith(_NO_COMMENT):
        raise ValueError("torch.save has written something else than a zip file without comment")
    digest = hashlib.sha256(content).digest()
    return content[: -len(_NO_COMMENT)] + len(digest).to_bytes(2, "little") + digest


def _is_sealed(content: bytes) -> bool:
    size = hashlib.sha256().digest_size
    original = content[: -size - len(_NO_COMMENT)] + _NO_COMMENT
    return content[-size - len(_NO_COMMENT) :] == _seal(original)[-size - len(_NO_COMMENT) :]


def step_checkpoints(folder: Path) -> list[Path]:
    """The periodic checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP_FILE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_step(folder: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Saves `step_<step>.pt`, points `last.pt` at it and removes all but the newest `keep` periodic checkpoints."""
    path = folder / f"step_{step:08d}.pt"
    save_checkpoint(path, state)
    link = temporary_path(folder / "last.pt")
    link.symlink_to(path.name)
    publish(link, folder / "last.pt")
    for old in step_checkpoints(folder)[:-keep]:
        old.unlink()
    logging.info("saved %s", path)
    return path


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run, or None when it has none."""
    for path in reversed(step_checkpoints(folder)):
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            logging.warning("%s; trying the one before", error)
    return None


def load_weights(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Puts a checkpoint's weights into a model: the EMA's where there is one.

    Raises:
        ValueError: names of parameters that are missing, unexpected or of another shape.
    """
    weights = state["model"]
    if state["ema"] is not None:
        weights = {key.removeprefix("module."): value for key, value in state["ema"].items() if key != "n_averaged"}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the configured model: {error}") from error
