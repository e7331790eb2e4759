"""OC20's S2EF download (folders of `*.extxyz(.xz)` and `*.txt(.xz)`) to LMDB shards that training reads.

Which frame goes where depends on the input folder and `chunk` alone, not on processes or interruptions: input files in
natural order (2 before 10), `chunk` consecutive files to a shard, frames in the order of their file. A shard is written
by one process and gets its name when it is whole and on disk. Beside the shards, the folder `.prepare_s2ef` keeps the
settings, so that a restart cannot mix two preparations, and the sizes of each finished shard's records.

A record is a pickled PyG `Data` as OCP's preprocessing wrote it (N atoms, E edges): atomic_numbers (N,) float32, pos
(N, 3), cell (1, 3, 3), natoms, tags (N,) int64, fixed (N,) float32, sid, fid; and, named as in fairchem 1.x, energy
(float, eV) and forces (N, 3), which OCP called y and force. With edges: edge_index (2, E), cell_offsets (E, 3) and
distances (E,) of the 50 nearest neighbours of each atom within 6 A; where OCP took any of several that are equally far,
all are kept.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import Data

from faenet_ocp.common.files import exclusive, expand_path, file_state, remove_leftovers, write_bytes
from faenet_ocp.data.lmdb_files import LmdbFile, natural_order
from faenet_ocp.graph.neighbors import build_graph
from faenet_ocp.graph.vectors import edge_vectors
from faenet_ocp.prepare.extxyz import FormatError, Frame, LogLine, read_frames, read_log
from faenet_ocp.prepare.lmdb_writer import METADATA_NAME, LmdbShardWriter, write_arrays, write_metadata
from faenet_ocp.prepare.shards import write_shards

logger = logging.getLogger(__name__)

CUTOFF = 6.0
MAX_NEIGHBORS = 50
MAX_SHARDS = 128
"""Unless `chunk` says otherwise. fairchem 1.x holds all shards of all splits open at once: stay below 1024 files."""
STATE_FOLDER = ".prepare_s2ef"
_PERIODIC = torch.ones(3, dtype=torch.bool)


class Options(NamedTuple):
    """What the records contain.

    labels: energy and forces; without (test data) both are left out.
    ref_energy: whether the energy is the one in the file minus the reference energy of the log (the adsorption energy,
        which OC20's S2EF models are trained on), or the one in the file.
    get_edges: whether edges are stored: about ten times the disk space, and no neighbour search in training.
    """

    labels: bool = True
    ref_energy: bool = True
    get_edges: bool = False


class _Pair(NamedTuple):
    """One input: structures, and the log with a line for each."""

    frames: Path
    log: Path


class _Shard(NamedTuple):
    path: Path
    sizes: Path
    pairs: list[_Pair]
    options: Options


def prepare(
    data_path: str | Path,
    out_path: str | Path,
    *,
    options: Options,
    num_workers: int = 1,
    chunk: int | None = None,
) -> int:
    """Prepare a folder, or finish what an earlier call with the same settings began.

    A faulty input file costs its own shard only; all others are finished before the error is raised.

    Args:
        data_path: the folder of the input files.
        out_path: folder of the shards `data.NNNN.lmdb` and of `metadata.npz`, written last (natoms, with edges also
            neighbors, of all records in order).
        options: contents of the records.
        num_workers: processes; what is written does not depend on it.
        chunk: input files of a shard; by default as few as make at most `MAX_SHARDS` shards.

    Returns:
        The number of frames in the prepared folder.

    Raises:
        FormatError: input files are damaged or disagree; one line per file, beginning with `file:line:`.
        ValueError: wrong arguments, no or incomplete pairs of input files, or an output folder with something else.
        OSError: reading or writing fails.
    """
    data_path, out_path = (Path(expand_path(path)) for path in (data_path, out_path))
    if num_workers < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"num_workers {num_workers} and chunk {chunk} must be at least 1")
    pairs = _find_pairs(data_path)
    chunk = chunk or -(-len(pairs) // MAX_SHARDS)
    with _locked(out_path):
        _check_settings(out_path, pairs, options, chunk)
        remove_leftovers(out_path)
        remove_leftovers(out_path / STATE_FOLDER)
        shards = _plan(out_path, pairs, options, chunk)
        missing = [shard for shard in shards if not _is_finished(shard)]
        if len(missing) < len(shards):
            logger.info("%s: %d of %d shards are finished already", out_path, len(shards) - len(missing), len(shards))
        write_shards(
            _write_shard,
            missing,
            num_workers=num_workers,
            inputs=lambda shard: len(shard.pairs),
            unit="file",
            records="frames",
        )
        sizes = [_read_sizes(shard.sizes) for shard in shards]
        natoms, neighbors = (np.concatenate([size[name] for size in sizes]) for name in ("natoms", "neighbors"))
        if missing or not (out_path / METADATA_NAME).exists():
            write_metadata(out_path, natoms=natoms, neighbors=neighbors if options.get_edges else None)
    return len(natoms)


# What belongs where


def _find_pairs(folder: Path) -> list[_Pair]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    found: dict[str, dict[str, Path]] = {".extxyz": {}, ".txt": {}}
    for path in folder.iterdir():
        stem, kind = os.path.splitext(path.name.removesuffix(".xz"))
        if kind in found:
            if stem in found[kind]:
                raise ValueError(f"{folder}: both {found[kind][stem].name} and {path.name}; remove one")
            found[kind][stem] = path
    frames, logs = found.values()
    if not frames:
        below = sorted({str(path.parent) for path in folder.glob("*/*.extxyz*")})
        raise ValueError(f"{folder}: no *.extxyz(.xz) files" + (f"; did you mean {below[0]}?" if below else ""))
    # Other text files, like a README.txt, may lie about; a structure without its log may not.
    for stem in frames:
        if stem not in logs:
            raise ValueError(f"{frames[stem]}: has no {stem}.txt(.xz) beside it")
    for stem in logs:
        if stem.isdigit() and stem not in frames:
            raise ValueError(f"{logs[stem]}: has no {stem}.extxyz(.xz) beside it")
    return [_Pair(frames[stem], logs[stem]) for stem in sorted(frames, key=natural_order)]


def _plan(out_path: Path, pairs: list[_Pair], options: Options, chunk: int) -> list[_Shard]:
    groups = [pairs[start : start + chunk] for start in range(0, len(pairs), chunk)]
    digits = max(4, len(str(len(groups) - 1)))  # names sort in the order of the shards
    names = [f"data.{number:0{digits}d}" for number in range(len(groups))]
    state = out_path / STATE_FOLDER
    return [
        _Shard(out_path / f"{name}.lmdb", state / f"{name}.npz", group, options)
        for name, group in zip(names, groups, strict=True)
    ]


@contextmanager
def _locked(out_path: Path) -> Iterator[None]:
    """Make the output folder ours alone, unless it holds other files."""
    state = out_path / STATE_FOLDER
    foreign = [] if state.exists() else sorted([*out_path.glob("*.lmdb"), *out_path.glob(METADATA_NAME)])
    if foreign:
        raise ValueError(f"{foreign[0]}: is not from an earlier preparation; choose another folder")
    state.mkdir(parents=True, exist_ok=True)
    with exclusive(state / "lock", out_path):
        yield


def _check_settings(out_path: Path, pairs: list[_Pair], options: Options, chunk: int) -> None:
    """Refuse to go on with other settings or inputs than before."""
    settings = {**options._asdict(), "chunk": chunk, "inputs": [path.name for pair in pairs for path in pair]}
    file = out_path / STATE_FOLDER / "settings.json"
    if not file.exists():
        write_bytes(file, json.dumps(settings).encode())
        return
    earlier = json.loads(file.read_bytes())
    for name, value in settings.items():
        if earlier.get(name) != value:
            what = "other input files" if name == "inputs" else f"{name} = {earlier.get(name)}, not {value}"
            raise ValueError(f"{out_path}: was begun with {what}; choose another folder, or remove this one")


def _is_finished(shard: _Shard) -> bool:
    if not shard.path.exists():
        return False
    # The sizes are written before the shard gets its name. A power failure may still leave either of them damaged.
    with suppress(OSError, ValueError):
        sizes = _read_sizes(shard.sizes)
        if len(LmdbFile(shard.path)) == len(sizes["natoms"]) and _is_from(sizes, shard):
            return True
    logger.warning("%s: is damaged, or its input files have changed since; it is written again", shard.path)
    return False


def _is_from(sizes: dict[str, NDArray[Any]], shard: _Shard) -> bool:
    """Whether a shard was made from these input files, or from others of the same content."""
    if not {"inputs", "digests"} <= sizes.keys():  # written by an earlier version
        return False
    if np.array_equal(sizes["inputs"], _input_states(shard)):
        return True
    return np.array_equal(sizes["digests"], _input_digests(shard))


def _input_states(shard: _Shard) -> NDArray[np.int64]:
    return np.array([file_state(path) for pair in shard.pairs for path in pair])


def _input_digests(shard: _Shard) -> NDArray[np.str_]:
    """Of the content of each input file; to read one is little beside parsing it."""
    digests = []
    for pair in shard.pairs:
        for path in pair:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "blake2b").hexdigest())
    return np.array(digests)


def _read_sizes(file: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged zip file can fail in many ways
        raise ValueError(f"{file}: cannot be read: {error}") from error


# Records


def _make_record(frame: Frame, log: LogLine, options: Options) -> Data:
    """The record of one frame, as the module's docstring describes it; ValueError if its cell has no edges to give."""
    pos = torch.from_numpy(frame.pos.astype(np.float32))
    cell = torch.from_numpy(frame.cell.astype(np.float32)).unsqueeze(0)
    fields = {
        "atomic_numbers": torch.from_numpy(frame.numbers.astype(np.float32)),
        "pos": pos,
        "cell": cell,
        "natoms": len(pos),
        "tags": torch.from_numpy(frame.tags),
        "fixed": torch.from_numpy(frame.fixed.astype(np.float32)),
        "sid": log.sid,
        "fid": log.fid,
    }
    if frame.energy is not None and frame.forces is not None:
        reference = log.reference if options.ref_energy else None
        fields["energy"] = frame.energy if reference is None else frame.energy - reference
        fields["forces"] = torch.from_numpy(frame.forces.astype(np.float32))
    if options.get_edges:
        fields |= stored_edges(pos, cell)
    return Data(**fields)


def stored_edges(pos: Tensor, cell: Tensor) -> dict[str, Tensor]:
    """edge_index, cell_offsets and distances of one structure, as the module's docstring describes them."""
    edge_index, offsets = build_graph(pos, cell, _PERIODIC, cutoff=CUTOFF, max_neighbors=MAX_NEIGHBORS)
    vectors = edge_vectors(pos, cell, edge_index, offsets, torch.zeros(edge_index.shape[1], dtype=torch.long))
    return {"edge_index": edge_index, "cell_offsets": offsets, "distances": vectors.norm(dim=1)}


def _read_pair(pair: _Pair, options: Options) -> Iterator[tuple[Frame, LogLine]]:
    """Frames with their log lines; FormatError where the two files disagree."""
    atoms_of: dict[int, tuple[int, int]] = {}
    frames = read_frames(pair.frames, labels=options.labels)
    for count, (frame, log) in enumerate(zip_longest(frames, read_log(pair.log))):
        if frame is None:
            raise FormatError(f"{pair.log}:{log.line}: has no frame: {pair.frames} ends after {count} frames")
        if log is None:
            raise FormatError(f"{pair.frames}:{frame.line}: has no id: {pair.log} ends after {count} lines")
        if options.labels and options.ref_energy and log.reference is None:
            raise FormatError(f"{pair.log}:{log.line}: has no reference energy")
        natoms, line = atoms_of.setdefault(log.sid, (len(frame.numbers), log.line))
        if natoms != len(frame.numbers):
            where = f"{pair.log}:{log.line} and line {line}"
            raise FormatError(
                f"{pair.frames}:{frame.line}: has {len(frame.numbers)} atoms, an earlier frame of the same system "
                f"(random{log.sid}, {where}) has {natoms}: structures and ids do not belong together"
            )
        yield frame, log
    if not atoms_of:
        raise FormatError(f"{pair.frames}:1: is empty")


# Shards


def _write_shard(shard: _Shard) -> int | FormatError:
    """Write one shard: the number of its frames, or what is wrong with an input file."""
    natoms, neighbors = [], []
    try:
        with LmdbShardWriter(shard.path, overwrite=True) as writer:
            inputs = {"inputs": _input_states(shard), "digests": _input_digests(shard)}
            for pair in shard.pairs:
                for frame, log in _read_pair(pair, shard.options):
                    try:
                        record = _make_record(frame, log, shard.options)
                    except ValueError as error:
                        raise FormatError(f"{pair.frames}:{frame.line}: {error}") from error
                    writer.append(record)
                    natoms.append(len(frame.numbers))
                    if shard.options.get_edges:
                        neighbors.append(record.edge_index.shape[1])
            sizes = {"natoms": np.array(natoms, np.int64), "neighbors": np.array(neighbors, np.int64)}
            write_arrays(shard.sizes, inputs | sizes)
    except FormatError as error:
        return error
    return len(natoms)
