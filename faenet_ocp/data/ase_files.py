"""Any files that ASE reads as a data set, registered as ``ase``: extxyz, traj, db, aselmdb, OUTCAR, POSCAR, cif, ...

A structure of a large file is read when it is needed: extended XYZ by an index of where structures begin, trajectories
and databases by number. Compressed files and other formats of many structures are read when they are opened, once in a
process, and kept in memory.
"""

import bz2
import glob
import gzip
import hashlib
import io
import lzma
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.io.extxyz import key_val_str_to_dict
from ase.io.formats import filetype, ioformats
from ase.io.trajectory import Trajectory
from fairchem.core.common.registry import registry
from fairchem.core.datasets.ase_datasets import AseDBDataset
from numpy.typing import NDArray
from tqdm import tqdm

from faenet_ocp.common.checks import RecordError, choice
from faenet_ocp.common.files import expand_path, write_array
from faenet_ocp.data.atoms import record_of, tags_of
from faenet_ocp.data.fields import Fields
from faenet_ocp.data.lmdb_files import LmdbFile, each_once, natural_order
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.data.tags import CHOICES, non_metals

_COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_DATABASES = ("db", "json", "aselmdb")
_OPEN_AT_ONCE = 64
"""Trajectories and databases that a process keeps open: it may open about a thousand files."""


# Finding files


def find_files(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files that `source` means, those of a folder or glob in natural order (2 before 10).

    Args:
        source: a file, a folder of files, a glob, or a list of these, whose order is kept.

    Raises:
        FileNotFoundError: nothing is there, or a folder without files.
        ValueError: a file is meant twice.
    """
    items = [source] if isinstance(source, str | os.PathLike) else source
    paths = [path for item in items for path in matches(item)]
    files = [file for path in paths for file in (visible_files(path) if path.is_dir() else [path])]
    if not files:
        raise FileNotFoundError(f"there is no file in {', '.join(map(str, paths))}")
    return each_once(files)


def matches(item: str | os.PathLike[str]) -> list[Path]:
    """The path itself, or what a pattern matches, in natural order.

    Raises:
        FileNotFoundError: nothing is there.
    """
    path = Path(expand_path(Path(item)))
    if path.exists():
        return [path]
    there = next(parent for parent in path.parents if parent.exists())  # a bracket in its name is no pattern
    found = glob.glob(str(path.relative_to(there)), root_dir=there, recursive=True)
    if not found:
        raise FileNotFoundError(f"there is no file, folder or match of {path}")
    return [there / name for name in sorted(found, key=natural_order)]


def visible_files(folder: Path) -> list[Path]:
    """The files in a folder that are not hidden, in natural order."""
    found = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(found, key=natural_order)


# Reading


class AseFile(LmdbFile):
    """The structures of one file, by number: for ``ase`` what ``lmdb_files.LmdbFile`` is for ``oc20_lmdb``.

    Args:
        path: of the file.
        tags: "file", "fixed" or "none", see ``tags.assign_tags``.
        adsorbate: "metal": ``tags.non_metals`` get tag 2; None: `tags` alone decides.
        cache_dir: folder in which the index of a large file is kept; None: it is not.

    Raises:
        ValueError: ASE does not know what it is, it holds no structure, or ends within one.
    """

    item = "structure"

    def __init__(self, path: Path, *, tags: str = "file", adsorbate: str | None = None, cache_dir: Path | None = None):
        self.path, self.tags, self.adsorbate = path, tags, adsorbate
        self._state = self.state()
        self._kind = _kind(path)
        self._offsets: NDArray[np.int64] | None = None
        self._ids: Sequence[int] = ()
        if self._kind == "extxyz":
            self._offsets = _index(path, self.state(), cache_dir)
            count = len(self._offsets) - 1
        elif self._kind == "single":
            count = 1
        elif self._kind == "memory":
            count = len(_read_all(path, self.state()))
        else:
            with _reading(path):
                source = self._connection()
                if self._kind == "database":
                    self._ids = list(getattr(source, "ids", None) or [row.id for row in source.select()])
                count = len(self._ids) if self._kind == "database" else len(source)
        if count == 0:
            raise ValueError(f"{path}: ASE finds no structure in it")
        self.numbers = range(count)

    def read(self, position: int) -> Any:
        """Return the structure at `position` (0 ... len-1) as a record.

        Raises:
            RecordError: it cannot be read, or has not the tags that are asked for; names file and number.
        """
        with _reading(self.path, position):
            if self._kind == "memory":
                record = _read_all(self.path, self.state())[position]
            else:
                record = record_of(self._atoms(position))
            marked = None if self.adsorbate is None else non_metals(record["atomic_numbers"], record["fixed"])
            return {**record, **tags_of(record, self.tags, adsorbate=marked)}

    def _atoms(self, position: int) -> Atoms:
        if self._kind == "single":
            return ase.io.read(self.path)
        if self._offsets is not None:
            begin, end = self._offsets[position : position + 2].tolist()
            with self.path.open("rb") as file:
                file.seek(begin)
                return read_extxyz(file.read(end - begin).decode())
        source = self._connection()
        if self._kind == "traj":
            return source[position]
        row = source.get(self._ids[position])
        atoms = row.toatoms()
        atoms.info |= row.key_value_pairs | dict(row.data)
        return atoms

    def _connection(self) -> Any:
        return _connect(self.path, self._kind, self._state, os.getpid())


@lru_cache(maxsize=_OPEN_AT_ONCE)
def _connect(path: Path, kind: str, state: str, pid: int) -> Any:
    """An open trajectory or database as it was in `state`, of this process: none crosses a fork."""
    return Trajectory(path) if kind == "traj" else AseDBDataset.connect_db(str(path))


def _kind(path: Path) -> str:
    """How structures of a file are reached."""
    if path.suffix in _COMPRESSED:
        return "memory"
    if path.suffix == ".aselmdb":
        return "database"
    with _reading(path):
        found = filetype(str(path))
        if found in _DATABASES:
            return "database"
        if found in ("extxyz", "traj"):
            return found
        return "single" if ioformats[found].single else "memory"


@contextmanager
def _reading(path: Path, position: int | None = None) -> Iterator[None]:
    """Whatever ASE raises, said with the file and the number of the structure."""
    what = path if position is None else f"{path}: structure {position}"
    try:
        yield
    except FileNotFoundError:
        raise
    except RecordError as error:
        raise RecordError(f"{what} {error}") from error
    except Exception as error:  # ASE's readers fail in many ways
        raise RecordError(f"{what}: ASE cannot read it ({type(error).__name__}: {error})") from error


@cache
def _read_all(path: Path, state: str) -> list[dict[str, Any]]:
    """The structures of a file whose structures cannot be reached one by one, once in a process for each `state`."""
    records: list[dict[str, Any]] = []
    for atoms in tqdm(_every(path), desc=f"reading {path.name}", unit="structure", delay=2.0):
        with _reading(path, len(records)):
            records.append(record_of(atoms))
    return records


def _every(path: Path) -> Iterator[Atoms]:
    opened = _COMPRESSED.get(path.suffix)
    if opened is not None and filetype(path.stem, read=False, guess=False) in ("extxyz", "xyz"):
        with _reading(path):
            with opened(path, "rb") as file:
                content = file.read()
            offsets = list(_starts(io.BytesIO(content), path, len(content)))
        for number, (begin, end) in enumerate(pairwise(offsets)):
            with _reading(path, number):
                atoms = read_extxyz(content[begin:end].decode())
            yield atoms
        return
    structures, number = iter(ase.io.iread(path, ":", do_not_split_by_at_sign=True)), 0
    while True:
        with _reading(path, number):
            atoms = next(structures, None)
        if atoms is None:
            return
        yield atoms
        number += 1


@cache
def _index(path: Path, state: str, cache_dir: Path | None) -> NDArray[np.int64]:
    """Where the structures of an extended XYZ file begin, and where the last ends, in bytes."""
    kept = None
    if cache_dir is not None:
        kept = cache_dir / f"index-{hashlib.sha256(state.encode()).hexdigest()[:16]}.npy"
        if kept.is_file():
            return np.load(kept, allow_pickle=False)
    with path.open("rb") as file:
        offsets = np.fromiter(_starts(file, path, path.stat().st_size), dtype=np.int64)
    if kept is not None:
        write_array(kept, offsets)
    return offsets


def _starts(file: Any, path: Path, size: int) -> Iterator[int]:
    place, number = 0, 0
    with tqdm(total=size, desc=f"index of {path.name}", unit="B", unit_scale=True, delay=2.0) as bar:
        while first := file.readline():
            if not first.strip() and not file.read().strip():
                break
            if not first.strip().isdigit():
                text = first[:40].decode(errors="replace").strip()
                raise ValueError(f"{path}: structure {number} does not begin with its number of atoms, but {text!r}")
            natoms = int(first)
            lines = list(islice(file, natoms + 1))
            if len(lines) <= natoms:
                raise ValueError(
                    f"{path}: is cut short: structure {number} has {max(len(lines) - 1, 0)} of {natoms} atoms"
                )
            yield place
            place, number = place + len(first) + sum(map(len, lines)), number + 1
            bar.update(place - bar.n)
    yield place


def read_extxyz(text: str) -> Atoms:
    """The one structure of a text in extended XYZ; its sid is text.

    ASE's parser makes 12 of 0012 and True of T, and for an empty value takes the next key with all that belongs to it.
    """
    return ase.io.read(io.StringIO(text), format="extxyz", properties_parser=with_text_sid)


def with_text_sid(line: str) -> dict[str, Any]:
    """The comment line of extended XYZ with its sid as text."""
    line, is_empty = re.subn(r"""(?<!\S)sid=(?:""|''|(?=\s+\S+=|\s*$))""", "", line)
    info = key_val_str_to_dict(line)
    if is_empty:
        info["sid"] = ""
    elif not isinstance(info.get("sid", ""), str):
        renamed = re.sub(r"(?<!\S)sid=", "uid=", re.sub(r"(?<!\S)uid=", "other_uid=", line))
        info["sid"] = key_val_str_to_dict(renamed).get("uid", info["sid"])  # of this name the parser leaves the value
    return info


# The data set


@registry.register_dataset("ase")
class AseDataset(OC20LmdbDataset):
    """Like ``OC20LmdbDataset``, with the same config and fields, from any files that ASE reads.

    Labels are results of the calculator, or numbers in `atoms.info` and `atoms.arrays`, under the names that
    `key_mapping` says (`{REF_energy: energy}`). An energy is what the file has under `energy`, whether extrapolated to
    zero temperature or not; `key_mapping: {free_energy: energy}` takes the other. Atoms of FixAtoms are fixed. `sid` is
    that of `atoms.info`, else the number of the sample.

    Args:
        config: as there, and
            src: file, folder of files, glob, or a list of these.
            tags: "file" (default), "fixed" or "none", see ``tags.assign_tags``.
            adsorbate: "metal": atoms of non-metals that are not fixed get tag 2.
    """

    _file = AseFile
    _keys = (*OC20LmdbDataset._keys, "tags", "adsorbate")

    def _open_files(self) -> list[LmdbFile]:
        folder, tags = self.config.get("cache_dir"), choice("dataset.tags", self.config.get("tags", "file"), CHOICES)
        cache_dir = None if folder is None else Path(folder)
        options: dict[str, Any] = {"tags": tags, "adsorbate": self.config.get("adsorbate"), "cache_dir": cache_dir}
        return [AseFile(path, **options) for path in find_files(self.config["src"])]

    def _decode(self, value: Any) -> Fields:
        return value

    def _group_of(self, fields: Fields, index: int) -> str:
        """Frames of one sid belong together, and of several files those in one that have none."""
        own = str(index) if len(self.files) == 1 else str(self.files[bisect_right(self._ends, index)].path)
        return super()._group_of(fields, index) if "sid" in fields else own
