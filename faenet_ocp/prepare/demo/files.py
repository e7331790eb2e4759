"""Relaxed systems in OC20's formats: IS2RE and S2EF records, sharded LMDBs, the raw S2EF download.

Fields, dtypes and names are those of OC20's official IS2RE and S2EF files: energies are relative to
the clean slab and the gas phase (eV), edge_index[0] is the neighbour, edge_index[1] the centre.
Legend: N atoms, E edges.
"""

import io
import lzma
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ase.io
import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from torch_geometric.data import Data

from faenet_ocp.graph.neighbors import build_graph
from faenet_ocp.graph.vectors import edge_vectors
from faenet_ocp.prepare.demo.emt import Array
from faenet_ocp.prepare.demo.systems import System, Trajectory
from faenet_ocp.prepare.lmdb_writer import LmdbShardWriter

EDGE_CUTOFF = 6.0
EDGE_NEIGHBORS = 50
FRAMES_PER_SHARD = 2000
RAW_FRAMES_PER_FILE = 1000


def is2re_record(system: System, sid: int) -> Data:
    """The IS2RE record of a system: its first frame, with edges, and where the relaxation ended."""
    trajectory = system.trajectory
    return Data(
        **_structure(system, trajectory.positions[0], sid),
        **_edges(system, trajectory.positions[0]),
        y_init=float(trajectory.energies[0] - system.reference),
        y_relaxed=float(trajectory.energies[-1] - system.reference),
        pos_relaxed=_float_tensor(trajectory.positions[-1]),
        force=_float_tensor(trajectory.forces[0]),
    )


def s2ef_record(system: System, sid: int, fid: int, *, edges: bool) -> Data:
    """The S2EF record of step `fid` of the relaxation."""
    positions = system.trajectory.positions[fid]
    return Data(
        **_structure(system, positions, sid),
        **(_edges(system, positions) if edges else {}),
        y=float(system.trajectory.energies[fid] - system.reference),
        force=_float_tensor(system.trajectory.forces[fid]),
        fid=fid,
    )


def raw_frame(system: System, sid: int, fid: int) -> tuple[str, str]:
    """One frame of the S2EF download: its extended XYZ text (absolute energy) and its txt line."""
    trajectory = system.trajectory
    atoms = system.atoms.copy()
    atoms.positions = trajectory.positions[fid]
    atoms.calc = SinglePointCalculator(atoms, energy=float(trajectory.energies[fid]), forces=trajectory.forces[fid])
    text = io.StringIO()
    ase.io.write(text, atoms, format="extxyz")
    return text.getvalue(), f"random{sid},frame{fid},{system.reference!r}\n"


def pick_frames(trajectory: Trajectory, number: int, rng: np.random.Generator) -> list[int]:
    """Choose at most `number` steps that differ: one at random in each equal part of the way.

    The way is the sum of all atomic displacements, so the many last steps that hardly move an atom
    do not crowd out the first ones.
    """
    moves = np.linalg.norm(np.diff(trajectory.positions, axis=0), axis=2).sum(axis=1)
    way = np.concatenate([[0.0], np.cumsum(moves)])
    aims = (np.arange(number) + rng.random(number)) / number * way[-1]
    return sorted({int(np.abs(way - aim).argmin()) for aim in aims})


def _structure(system: System, positions: Array, sid: int) -> dict[str, Any]:
    tags = torch.from_numpy(system.atoms.get_tags().astype(np.int64))
    return {
        "atomic_numbers": _float_tensor(system.atoms.numbers),
        "pos": _float_tensor(positions),
        "cell": _float_tensor(system.atoms.cell.array[None]),
        "natoms": len(positions),
        "tags": tags,
        "fixed": (tags == 0).float(),
        "sid": sid,
    }


def _edges(system: System, positions: Array) -> dict[str, torch.Tensor]:
    """At most 50 neighbours per atom within 6 A, cut strictly as in OC20's files."""
    pos, cell = _float_tensor(positions), _float_tensor(system.atoms.cell.array[None])
    pbc = torch.ones(3, dtype=torch.bool)
    edge_index, cell_offsets = build_graph(pos, cell, pbc, cutoff=EDGE_CUTOFF, max_neighbors=EDGE_NEIGHBORS)
    # build_graph keeps a shell of equal distances whole; edges come by centre, then by distance.
    first_edge = torch.searchsorted(edge_index[1], edge_index[1])
    kept = torch.arange(edge_index.shape[1]) - first_edge < EDGE_NEIGHBORS
    edge_index, cell_offsets = edge_index[:, kept], cell_offsets[kept]
    one_system = torch.zeros(edge_index.shape[1], dtype=torch.long)
    vectors = edge_vectors(pos, cell, edge_index, cell_offsets, one_system)
    return {
        "edge_index": edge_index,
        "cell_offsets": cell_offsets,
        "distances": vectors.norm(dim=1),
    }


def _float_tensor(values: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float32)


class ShardedWriter:
    """Writes records to data.0000.lmdb, data.0001.lmdb, ... in a folder; use as a context manager.

    Args:
        folder: where the shards go; shards of the same names are replaced.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._shard: LmdbShardWriter | None = None
        self._number = 0

    def __enter__(self) -> Self:
        self._stack.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def append(self, value: bytes) -> None:
        """Add one record."""
        if self._shard is None or len(self._shard) == FRAMES_PER_SHARD:
            if self._shard is not None:
                self._shard.close()
            path = self._folder / f"data.{self._number:04d}.lmdb"
            self._shard = self._stack.enter_context(LmdbShardWriter(path, overwrite=True))
            self._number += 1
        self._shard.append(value)


def write_raw(folder: Path, frames: list[tuple[str, str]]) -> None:
    """Write frames as `0.extxyz.xz`, `0.txt.xz`, `1.extxyz.xz`, ... of an S2EF download."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(frames), RAW_FRAMES_PER_FILE)):
        chunk = frames[start : start + RAW_FRAMES_PER_FILE]
        for part, suffix in enumerate(("extxyz", "txt")):
            with lzma.open(folder / f"{number}.{suffix}.xz", "wt", encoding="ascii") as file:
                file.writelines(frame[part] for frame in chunk)
