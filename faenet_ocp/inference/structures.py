"""Structures to relax: the records of LMDBs, or any files that ASE reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.io.formats import filetype
from fairchem.core.datasets.atomic_data import AtomicData

from faenet_ocp.data.ase_files import matches, visible_files, with_text_sid
from faenet_ocp.data.atoms import data_to_atoms
from faenet_ocp.data.fields import Fields
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
    paths = [path for item in ([source] if isinstance(source, str | Path) else source) for path in matches(item)]
    if paths and all(_is_lmdb(path) for path in paths):
        return LmdbStructures(paths)
    files = [file for path in paths for file in (visible_files(path) if path.is_dir() else [path])]
    structures = FileStructures(files)
    if not any(isinstance(entry, Atoms) for entry in structures.entries):
        raise next(iter(structures.entries), ValueError(f"{source}: no files to read structures from"))
    return structures


def _is_lmdb(path: Path) -> bool:
    return path.suffix == ".lmdb" or any(path.glob("*.lmdb")) or (path / "data.mdb").exists()


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
        options = {"properties_parser": with_text_sid} if kind == "extxyz" else {}
        for atoms in ase.io.iread(path, ":", format=kind, do_not_split_by_at_sign=True, **options):
            found.append(atoms)  # those before an error are kept
    except Exception as error:  # ASE's readers fail in many ways
        what = f"structure {len(found)} and what follows" if found else "it"
        return [*found, ValueError(f"{path}: ASE cannot read {what} ({type(error).__name__}: {error})")]
    return found or [ValueError(f"{path}: ASE finds no structure in it")]


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
        atoms = data_to_atoms(data)
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
