"""OC20's LMDB files, or any that ASE reads, to packed ones: in several processes, resumable, compared with the source.

A packed file has the name of its source (`a.extxyz.lmdb` for `a.extxyz`) and gets it when it is whole, on disk, and
every record of it has been read back and compared. Until then it is a hidden file with the ending `.partial`, to which
the next call adds what is missing: records are added in order and in transactions, so a killed call leaves the first n
of them.
"""

import json
import logging
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from faenet_ocp.common.checks import RecordError, choice
from faenet_ocp.common.files import exclusive, expand_path, file_state, publish
from faenet_ocp.common.pool import ordered_map
from faenet_ocp.data.ase_files import AseFile, visible_files
from faenet_ocp.data.fields import Fields
from faenet_ocp.data.lmdb_files import PACKED_KEY, LmdbFile, resolve_files
from faenet_ocp.data.packed import LEFT_OUT, PackedFile, decode_packed, encode_packed, prepare_edges, write_header
from faenet_ocp.data.records import decode_record
from faenet_ocp.prepare.lmdb_writer import LmdbShardWriter, open_to_write, put_all, write_metadata

logger = logging.getLogger(__name__)

_SOURCE_KEY = b"source"
LOCK_NAME = ".packing.lock"
FORMATS = ("oc20_lmdb", "ase")
_RECORDS_PER_TASK = 64


class PackedShardWriter(LmdbShardWriter):
    """Writes a packed file from what ``data.packed.encode_packed`` returns, without an LMDB file in between.

    Args:
        path, overwrite: as in ``LmdbShardWriter``.
        source: what it is made from, plain JSON; stands in its header.
    """

    def __init__(self, path: str | Path, *, source: dict[str, Any], overwrite: bool = False) -> None:
        super().__init__(path, overwrite=overwrite)
        self._source = source

    def _last_item(self) -> tuple[bytes, bytes]:
        return PACKED_KEY, write_header(count=len(self), source=self._source)


def pack(
    data_path: str | Path,
    out_path: str | Path,
    *,
    num_workers: int = 1,
    source_format: str = "oc20_lmdb",
    tags: str | None = None,
) -> int:
    """Pack all files below a folder, or one file, or finish what an earlier call began.

    Args:
        data_path: a folder, for example OC20's `data`, or a file.
        out_path: folder of the packed files, at the same places below it, each folder with a `metadata.npz`.
        num_workers: processes; what is written does not depend on it.
        source_format: oc20_lmdb, or ase for files that ASE reads; all numbers that come with a structure are kept.
        tags: of the format ase: "file" (default), "fixed" or "none", see ``tags.assign_tags``.

    Returns:
        The number of records in all packed files.

    Raises:
        ValueError: wrong arguments, a record that cannot be read, files there that are not from this source.
        RuntimeError: what was written does not agree with the source, or a process died.
        OSError: reading or writing fails.
    """
    data_path, out_path = (Path(expand_path(path)) for path in (data_path, out_path))
    if num_workers < 1:
        raise ValueError(f"num_workers: {num_workers} is not at least 1")
    if data_path.resolve() == out_path.resolve():
        raise ValueError(f"{out_path}: is the folder of the data; choose another one")
    choice("source_format", source_format, FORMATS)
    if tags is not None and source_format != "ase":
        raise ValueError(f"tags: {tags!r} is for files that ASE reads; OC20's files have OC20's tags")
    kinds = ("*.lmdb", "data.mdb") if source_format == "oc20_lmdb" else ("*",)
    is_folder = data_path.is_dir()
    folders = sorted(_folders_with(kinds, data_path, leave_out=out_path)) if is_folder else [data_path]
    if not folders:
        raise ValueError(f"{data_path}: no file ({', '.join(kinds)}) is there or below")
    total = 0
    out_path.mkdir(parents=True, exist_ok=True)
    with exclusive(out_path / LOCK_NAME, out_path):
        for folder in folders:
            sources = _sources(folder, source_format, tags)
            target = out_path / folder.relative_to(data_path) if is_folder else out_path
            target.mkdir(parents=True, exist_ok=True)
            if is_folder:
                _check_no_others(target, sources)
            sizes = [pack_file(source, target / _name(source), num_workers) for source in sources]
            natoms, neighbors = (np.concatenate([pair[column] for pair in sizes]) for column in (0, 1))
            if len(natoms):
                write_metadata(target, natoms=natoms, neighbors=neighbors if neighbors.any() else None)
            total += len(natoms)
    return total


def _folders_with(kinds: Sequence[str], top: Path, *, leave_out: Path) -> Iterator[Path]:
    """Folders below `top` in which files of these kinds are; links are followed, but not back to a folder above."""
    for name, below, files in os.walk(top, followlinks=True):
        folder = Path(name)
        no_more = {leave_out.resolve(), *(path.resolve() for path in (folder, *folder.parents))}
        below[:] = [each for each in below if (folder / each).resolve() not in no_more]
        if any(fnmatch(file, kind) and not file.startswith(".") for file in files for kind in kinds):
            yield folder


def _check_no_others(target: Path, sources: Sequence[LmdbFile]) -> None:
    """What a source packed that is gone would be read with the rest."""
    packed = {path.name for path in target.glob("*.lmdb") if path.is_file()}
    others = sorted(packed - {_name(source) for source in sources})
    if others:
        raise ValueError(f"{target}: {', '.join(others)} is packed from no file that is there now; remove it")


def _sources(folder: Path, source_format: str, tags: str | None) -> list[LmdbFile]:
    """The files of a folder, or the one file."""
    if source_format == "ase":
        paths = visible_files(folder) if folder.is_dir() else [folder]
        return [AseFile(path, tags=tags or "file") for path in paths]
    return [LmdbFile(path) for path in resolve_files(folder) if path == folder or path.parent == folder]


def _name(source: LmdbFile) -> str:
    return f"{source.path.name}.lmdb" if isinstance(source, AseFile) else source.path.name


def _fields(source: LmdbFile, position: int) -> Fields:
    value = source.read(position)
    return decode_record(value) if isinstance(value, bytes) else value


# One file


def pack_file(source: Any, target: Path, num_workers: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack one file, or what has its `path`, `item`, `numbers`, length and `read`; natoms and neighbors of each."""
    made_from = {"name": source.path.name, "records": len(source), "state": file_state(source.path)}
    if isinstance(source, AseFile):
        made_from["tags"] = source.tags
    if not target.exists():
        _write(source, target, made_from, num_workers)
    else:
        if PackedFile(target).header["source"] != made_from:
            _check_same(source, target, num_workers)
        logger.info("%s is packed already", target)
    with lmdb.open(str(target), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        sizes = [np.frombuffer(txn.get(name), "<i8") for name in (b"natoms", b"neighbors")]
    return sizes[0], sizes[1]


def _check_same(source: LmdbFile, target: Path, num_workers: int) -> None:
    """Whether a packed file holds a source that is not the file it was made from, but perhaps a copy of that."""
    try:
        if len(PackedFile(target)) != len(source):
            raise RecordError(f"it has not {len(source)} records")
        with tqdm(total=len(source), unit="record", desc=f"comparing {target.name}") as bar:
            _compare_all(source, target, num_workers, bar)
    except RecordError as error:
        raise ValueError(f"{target}: was packed from another file than {source.path} ({error}); remove it") from error


def _write(source: LmdbFile, target: Path, made_from: dict[str, Any], num_workers: int) -> None:
    unfinished = target.with_name(f".{target.name}.partial")
    with _open_partial(unfinished, json.dumps(made_from).encode()) as env:
        with env.begin() as txn:
            begun = bisect_left(range(len(source)), True, key=lambda position: txn.get(b"%d" % position) is None)
        if begun:
            logger.info("%s: %d of %d records are packed already", target, begun, len(source))
        with tqdm(total=2 * len(source), initial=begun, unit="record", desc=f"packing {target.name}") as bar:
            for values in ordered_map(partial(_encode, source), _tasks(source, begun), num_workers):
                put_all(env, values)
                bar.update(len(values))
            try:
                sizes = _compare_all(source, unfinished, num_workers, bar)
            except RecordError as error:
                raise RuntimeError(f"{target}: {error}; remove {unfinished} and start again") from error
        natoms, neighbors = np.array(sizes, dtype="<i8").reshape(-1, 2).T
        header = write_header(count=len(source), source=made_from)
        put_all(env, [(b"natoms", natoms.tobytes()), (b"neighbors", neighbors.tobytes()), (PACKED_KEY, header)])
        env.sync(True)
    publish(unfinished, target)


def _open_partial(path: Path, made_from: bytes) -> lmdb.Environment:
    """The unfinished file: records 0 to n-1 of the source that it names, in whole transactions.

    A kill loses nothing of it; what a failing machine loses is found when the records are read back.
    """
    try:
        env = open_to_write(path)
    except lmdb.Error as error:
        raise ValueError(f"{path}: cannot be continued ({error}); remove it") from error
    with env.begin() as txn:
        known = txn.get(_SOURCE_KEY)
    if known not in (None, made_from):
        logger.warning("%s: was begun from another file and is begun again", path)
        env.close()
        path.unlink()
        return _open_partial(path, made_from)
    put_all(env, [(_SOURCE_KEY, made_from)])
    return env


def _tasks(source: LmdbFile, begin: int) -> list[tuple[int, int]]:
    starts = range(begin, len(source), _RECORDS_PER_TASK)
    return [(start, min(start + _RECORDS_PER_TASK, len(source))) for start in starts]


def _encode(source: LmdbFile, start: int, stop: int) -> list[tuple[bytes, bytes]]:
    """Keys and values of some records."""
    items = []
    for position in range(start, stop):
        try:
            value = encode_packed(prepare_edges(_fields(source, position)))
        except RecordError as error:
            known = str(source.path) in str(error)
            where = "" if known else f"{source.path}: {source.item} {source.numbers[position]} "
            raise RecordError(f"{where}{error}") from error
        items.append((b"%d" % position, value))
    return items


def _compare_all(source: LmdbFile, packed: Path, num_workers: int, bar: tqdm) -> list[tuple[int, int]]:
    """Read all packed records back and compare them with their source; atoms and edges of each."""
    sizes = []
    for part in ordered_map(partial(_compare, source, packed), _tasks(source, 0), num_workers):
        sizes += part
        bar.update(len(part))
    return sizes


def _compare(source: LmdbFile, packed: Path, start: int, stop: int) -> list[tuple[int, int]]:
    """Compare some records; RecordError says which one differs."""
    sizes = []
    with lmdb.open(str(packed), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        for position in range(start, stop):
            original = _fields(source, position)
            try:
                found = decode_packed(txn.get(b"%d" % position) or b"")
            except RecordError as error:
                raise RecordError(f"record {position} {error}") from error
            written, expected = _sorted_edges(found), _sorted_edges(original)
            for name, item in expected.items():
                if name not in LEFT_OUT and not _same(item, written.get(name)):
                    raise RecordError(f"record {position} differs from {source.path} in {name}")
            sizes.append((_length(found, "pos", 0), _length(found, "edge_index", 1)))
    return sizes


def _sorted_edges(fields: Fields) -> Fields:
    """The fields with edges, if there are any, in one order."""
    index, offsets = np.asarray(fields.get("edge_index", ())), np.asarray(fields.get("cell_offsets", ()))
    if index.ndim != 2 or offsets.shape != (index.shape[1], 3):
        return fields
    order = np.lexsort(np.concatenate([index, offsets.T]))
    return {**fields, "edge_index": index[:, order], "cell_offsets": offsets[order]}


def _same(original: Any, packed: Any) -> bool:
    if isinstance(original, str) or isinstance(packed, str):
        return original == packed
    left, right = np.asarray(original), np.asarray(packed)
    if packed is None or left.shape != right.shape:
        return False
    return bool(np.array_equal(left, right, equal_nan="f" in (left.dtype.kind, right.dtype.kind)))


def _length(fields: Fields, name: str, axis: int) -> int:
    shape = np.shape(fields.get(name, ()))
    return shape[axis] if len(shape) > axis else 0
