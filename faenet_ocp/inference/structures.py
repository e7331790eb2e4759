"""Structures to relax: the records of LMDBs, or any files that ASE reads."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from ase.io.extxyz import key_val_str_to_dict
from ase.io.formats import filetype
from fairchem.core.datasets.atomic_data import AtomicData

from faenet_ocp.common.files import expand_path
from faenet_ocp.data.fields import Fields
from faenet_ocp.data.lmdb_files import natural_order
from faenet_ocp.data.oc20 import OC20LmdbDataset


def open_structures(source: str | Path | Sequence[str | Path]) -> Sequence[Atoms]:
    """The structures of LMDBs or of files that ASE reads; one that cannot be read is an error when it is asked for.

    `info["sid"]` names each: its own, as text, else its number, or its file where there are several. Where the relaxed
    structure is known, `info["y_relaxed"]` is its energy and the array `pos_relaxed` its positions (n, 3).

    Args:
        source: a file, a folder of LMDBs or of other files, a glob, or a list of these; `~` and `$HOME` are expanded.

    Raises:
        ValueError, FileNotFoundError: nothing is there, or no structure that can be read.
    """
    paths = [path for item in ([source] if isinstance(source, str | Path) else source) for path in _matches(item)]
    if paths and all(_is_lmdb(path) for path in paths):
        return LmdbStructures(paths)
    files = [file for path in paths for file in (_visible_files(path) if path.is_dir() else [path])]
    structures = FileStructures(files)
    if not any(isinstance(entry, Atoms) for entry in structures.entries):
        raise next(iter(structures.entries), ValueError(f"{source}: no files to read structures from"))
    return structures


def _matches(item: str | Path) -> list[Path]:
    path = Path(expand_path(item))
    if path.exists():
        return [path]
    there = next(parent for parent in path.parents if parent.exists())  # a bracket in its name is no pattern
    found = glob.glob(str(path.relative_to(there)), root_dir=there, recursive=True)
    if not found:
        raise FileNotFoundError(f"there is no file, folder or match of {path}")
    return [there / name for name in sorted(found, key=natural_order)]


def _is_lmdb(path: Path) -> bool:
    return path.suffix == ".lmdb" or any(path.glob("*.lmdb")) or (path / "data.mdb").exists()


def _visible_files(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(found, key=natural_order)


class FileStructures(Sequence[Atoms]):
    """The structures of files, in their order.

    Attributes:
        entries: Atoms, or in their place the error that reading them gave.
    """

    def __init__(self, files: Sequence[Path]):
        self.entries: list[Atoms | ValueError] = []
        for file in files:
            found = _read(file)
            for number, atoms in enumerate(found):
                if isinstance(atoms, Atoms):
                    name = file.name if len(found) == 1 else f"{file.name}:{number}"
                    atoms.info["sid"] = str(atoms.info.get("sid", number if len(files) == 1 else name))
            self.entries += found

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        entry = self.entries[index]
        if isinstance(entry, ValueError):
            raise entry
        return entry


def _read(path: Path) -> list[Atoms | ValueError]:
    """The structures of a file; an error in place of those that cannot be read, or if there are none."""
    found: list[Atoms | ValueError] = []
    try:
        kind = filetype(str(path))
        options = {"properties_parser": _with_text_sid} if kind == "extxyz" else {}
        for atoms in ase.io.iread(path, ":", format=kind, do_not_split_by_at_sign=True, **options):
            found.append(atoms)  # those before an error are kept
    except Exception as error:  # ASE's readers fail in many ways
        what = f"structure {len(found)} and what follows" if found else "it"
        return [*found, ValueError(f"{path}: ASE cannot read {what} ({type(error).__name__}: {error})")]
    return found or [ValueError(f"{path}: ASE finds no structure in it")]


def _with_text_sid(line: str) -> dict[str, Any]:
    """The comment line of extended XYZ with its sid as text.

    ASE's parser makes 12 of 0012 and True of T, and for an empty value takes the next key with all that belongs to it.
    """
    line, is_empty = re.subn(r"""(?<!\S)sid=(?:""|''|(?=\s+\S+=|\s*$))""", "", line)
    info = key_val_str_to_dict(line)
    if is_empty:
        info["sid"] = ""
    elif not isinstance(info.get("sid", ""), str):
        renamed = re.sub(r"(?<!\S)sid=", "uid=", re.sub(r"(?<!\S)uid=", "other_uid=", line))
        info["sid"] = key_val_str_to_dict(renamed).get("uid", info["sid"])  # of this name the parser leaves the value
    return info


class LmdbStructures(Sequence[Atoms]):
    """The records of OC20 LMDBs as Atoms: fixed atoms in a FixAtoms constraint, periodic as OC20's systems are.

    Args:
        source: file, folder, glob, or a list of these.
    """

    def __init__(self, source: str | Path | Sequence[str | Path]):
        self.dataset = _RecordsWithReference({"src": source, "edges": "none", "labels": []})

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        data = self.dataset[index]
        atoms = Atoms(
            numbers=data.atomic_numbers.numpy(),
            positions=data.pos.double().numpy(),
            cell=data.cell[0].double().numpy(),
            pbc=data.pbc[0].numpy(),
            tags=data.tags.numpy(),
            info={"sid": data.sid[0]},
        )
        if bool(data.fixed.any()):
            atoms.set_constraint(FixAtoms(mask=data.fixed.bool().numpy()))
        if "y_relaxed" in data:
            atoms.info["y_relaxed"] = float(data.y_relaxed)
        if "pos_relaxed" in data:
            atoms.set_array("pos_relaxed", data.pos_relaxed.double().numpy())
        return atoms


class _RecordsWithReference(OC20LmdbDataset):
    """Samples that keep the relaxed energy and positions that IS2RE records have."""

    def _make(self, records: Sequence[Fields], sids: list[str]) -> AtomicData:
        data = super()._make(records, sids)
        (fields,) = records
        if "y_relaxed" in fields:
            data.y_relaxed = torch.tensor([float(np.asarray(fields["y_relaxed"]).item())], dtype=torch.float64)
        if "pos_relaxed" in fields:
            data.pos_relaxed = torch.tensor(np.asarray(fields["pos_relaxed"]), dtype=data.pos.dtype)
            if data.pos_relaxed.shape != data.pos.shape:
                raise ValueError(f"has pos_relaxed of shape {tuple(data.pos_relaxed.shape)}")
        return data
