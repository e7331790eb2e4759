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
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from faenet_ocp.common.files import expand_path, publish, software_versions, temporary_path, write_bytes

FORMAT = 1
_ZIP = b"PK\3\4"
_NO_COMMENT = b"\0\0"
_SEAL_SIZE = hashlib.sha256().digest_size
_HEAD = re.compile(r"output_heads\.(\w+)\.")
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
        ValueError: no such file, not a checkpoint of ours (what it is instead, as far as that can be told), or one of
            another format.
    """
    path = Path(expand_path(path))
    if path.is_dir():
        raise ValueError(f"checkpoint {path}: is a folder; name the file in it, e.g. checkpoints/best.pt of a run")
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: there is no such file")
    content = path.read_bytes()
    if not content.startswith(_ZIP):
        raise ValueError(f"checkpoint {path}: not a checkpoint: {_kind_of(content)}")
    is_ours = content[:-_SEAL_SIZE].endswith(_SEAL_SIZE.to_bytes(2, "little"))
    if is_ours and not _is_sealed(content):
        raise ValueError(f"checkpoint {path}: damaged (its content does not match its check sum)")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        message = "holds objects beside tensors, numbers and text, which are not loaded, as code in them would run"
        raise ValueError(f"checkpoint {path}: not a checkpoint of faenet-ocp: it {message}") from error
    except Exception as error:  # torch raises many kinds for truncated and damaged files
        raise ValueError(f"checkpoint {path}: not readable: it is cut short or damaged") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"checkpoint {path}: not a checkpoint of faenet-ocp (no format number){_published(state)}")
    if state["format"] != FORMAT:
        raise ValueError(f"checkpoint {path}: format {state['format']}, this version reads format {FORMAT}")
    if not is_ours:
        raise ValueError(
            f"checkpoint {path}: has no check sum: it was saved by torch.save, not by faenet-ocp. Where that is as it "
            "should be, faenet_ocp.checkpoint.save_checkpoint(Path(...), state) writes it with one"
        )
    return state


def _kind_of(content: bytes) -> str:
    """What a file that is no zip file seems to be."""
    beginning = content[:200].lstrip().lower()
    if not content:
        return "the file is empty"
    if beginning.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs; `git lfs pull` fetches the file itself"
    if beginning.startswith((b"<!doctype html", b"<html")):
        return "a web page; the download needs another address, or a login"
    if content[0] == 0x80:
        return "a pickle, as torch wrote them before version 1.6; it is not read, as code in it would run"
    try:
        content.decode()
    except UnicodeDecodeError:
        return "a binary file of another kind, or damaged in its first bytes"
    return f"a text that begins with {content[:60].decode(errors='ignore')!r}"


def _published(state: Any) -> str:
    """A hint where a file seems to hold weights of the authors' code, bare or as a run of theirs saves them."""
    inner = state.get("state_dict", state.get("model_state_dict", state)) if isinstance(state, dict) else None
    if not any(re.search(r"(^|\.)(embed_block|interaction_blocks)\.", str(name)) for name in inner or ()):
        return ""
    return (
        "; it seems to hold weights of the published FAENet package, which "
        "faenet_ocp.models.reference_weights.load_reference_state_dict puts into a model"
    )


def _seal(content: bytes) -> bytes:
    """A zip file with the digest of its content as its comment: zip's own check sums are not looked at by torch."""
    if not content.endswith(_NO_COMMENT):
        raise ValueError("torch.save has written something else than a zip file without comment")
    digest = hashlib.sha256(content).digest()
    return content[: -len(_NO_COMMENT)] + len(digest).to_bytes(2, "little") + digest


def _is_sealed(content: bytes) -> bool:
    start = -_SEAL_SIZE - len(_NO_COMMENT)
    return content[start:] == _seal(content[:start] + _NO_COMMENT)[start:]


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


def load_weights(model: nn.Module, state: Mapping[str, Any], *, heads_may_differ: bool = False) -> None:
    """Puts a checkpoint's weights into a model: the EMA's where there is one.

    Args:
        model: a model whose heads are `output_heads`.
        state: content of a checkpoint.
        heads_may_differ: a head that the checkpoint lacks keeps its initial weights, one that only the checkpoint has
            is left out, and a warning says so.

    Raises:
        ValueError: names of parameters that are missing, unexpected or of another shape.
    """
    weights = state["model"]
    if state["ema"] is not None:
        weights = {key.removeprefix("module."): value for key, value in state["ema"].items() if key != "n_averaged"}
    own = model.state_dict()
    if heads_may_differ:
        ours, theirs = _heads(own), _heads(weights)
        if ours != theirs:
            logging.warning(
                "the checkpoint gives the backbone and the heads %s; new, with random weights: %s; left out: %s",
                *(", ".join(sorted(names)) or "none" for names in (ours & theirs, ours - theirs, theirs - ours)),
            )
        kept = {key: value for key, value in weights.items() if not _heads([key]) - ours}
        weights = kept | {key: value for key, value in own.items() if _heads([key]) - theirs}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the configured model: {error}") from error


def _heads(keys: Iterable[str]) -> set[str]:
    """Names of the heads that parameters belong to."""
    return {match[1] for key in keys if (match := _HEAD.match(key))}
