"""Writing LMDB shards in OC20's on-disk layout.

A shard is one file (`subdir=False`) with keys `0` .. `N-1` and `length` (a pickled int). A value is a pickled
`torch_geometric.data.Data`, or bytes that were encoded elsewhere. A shard appears under its own name only when it is
whole: it is written under a hidden temporary name in the same folder, synced to disk and then renamed.
"""

import io
import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import lmdb
import numpy as np
import numpy.typing as npt
from torch_geometric.data import Data

from faenet_ocp.common.files import publish, temporary_path, write_bytes

logger = logging.getLogger(__name__)

METADATA_NAME = "metadata.npz"
_INITIAL_MAP_SIZE = 1 << 28
_BATCH_BYTES = 1 << 25

Items = Sequence[tuple[bytes, bytes]]


def encode_record(record: Data) -> bytes:
    """The bytes of one LMDB value: a record pickled in the PyG 2 layout.

    Its tensors must own their storage: a view would drag its whole base along.
    """
    return pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)


def open_to_write(path: Path) -> lmdb.Environment:
    """Opens or creates a file that no other process uses before it is finished.

    So it needs no lock file, and nothing has to survive a crash before the sync at its end.
    """
    size = max(_INITIAL_MAP_SIZE, 2 * path.stat().st_size if path.exists() else 0)
    return lmdb.open(str(path), subdir=False, map_size=size, lock=False, sync=False, metasync=False, mode=0o644)


def put_all(env: lmdb.Environment, items: Items) -> None:
    """Writes keys and values in one transaction; while they do not fit, grows the map and tries again."""
    while True:
        try:
            with env.begin(write=True) as txn, txn.cursor() as cursor:
                cursor.putmulti(items)
            return
        except lmdb.MapFullError:
            size = 2 * env.info()["map_size"] + 2 * sum(len(value) for _, value in items)
            env.set_mapsize(size)
            logger.debug("%s: map grown to %d bytes", env.path(), size)


class LmdbShardWriter:
    """Writes one shard, record after record, with memory bounded by `batch_bytes`.

    Records are collected and written in large transactions: 30,000 to 60,000 records of 20 kB a second on one core,
    where one transaction a record reaches about 1,000. OC20's keys are decimal numbers without leading zeros, so
    records do not come in the byte order of the tree and LMDB's append mode is not possible; sorting a batch gains
    nothing measurable.

    Use as a context manager: the shard is finished when the block ends well and discarded when it raises. A writer that
    is killed leaves only a hidden temporary file, which `common.files.remove_leftovers` deletes.

    Args:
        path: the shard, e.g. `.../data.0000.lmdb`. Its folder is created.
        overwrite: whether a finished shard of that name may be replaced (only at the very end).
        batch_bytes: how many bytes of values to collect for one transaction.

    Raises:
        FileExistsError: the shard exists and `overwrite` is false.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, batch_bytes: int = _BATCH_BYTES) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        self._batch_bytes = batch_bytes
        self._refuse_existing()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = temporary_path(self.path)
        self._batch: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0
        self._length = 0
        self._env: lmdb.Environment | None = open_to_write(self._temporary)

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abort()

    def append(self, value: bytes | Data) -> int:
        """Adds one record, encoded or to be encoded here, and returns its index in the shard.

        Raises:
            ValueError: the writer is closed, or the value is neither bytes nor a `Data`.
        """
        if self._env is None:
            raise ValueError(f"{self.path}: cannot append, the shard is already closed")
        if isinstance(value, Data):
            value = encode_record(value)
        elif not isinstance(value, bytes):
            raise ValueError(f"{self.path}: a value must be bytes or Data, got {type(value).__name__}")
        self._batch.append((b"%d" % self._length, value))
        self._pending_bytes += len(value)
        self._length += 1
        if self._pending_bytes >= self._batch_bytes:
            put_all(self._env, self._batch)
            self._batch.clear()
            self._pending_bytes = 0
        return self._length - 1

    def close(self) -> None:
        """Writes what is pending and `length`, syncs and gives the shard its name; again: nothing.

        Raises:
            FileExistsError: the shard appeared in the meantime and `overwrite` is false; what this writer has written
                is discarded.
        """
        if self._env is None:
            return
        try:
            put_all(self._env, [*self._batch, self._last_item()])
            self._env.sync(True)
            self._env.close()
            self._refuse_existing()
            publish(self._temporary, self.path)
        except BaseException:
            self._abort()
            raise
        self._env = None

    def _last_item(self) -> tuple[bytes, bytes]:
        """Says how many records there are."""
        return b"length", pickle.dumps(self._length, pickle.HIGHEST_PROTOCOL)

    def _abort(self) -> None:
        """Discards what was written and leaves the shard's name alone; when closed: nothing."""
        if self._env is not None:
            self._env.close()
            self._env = None
            self._temporary.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        if not self._overwrite and self.path.exists():
            raise FileExistsError(f"{self.path} exists; a finished shard is overwritten only if asked")


def write_metadata(
    folder: str | Path,
    *,
    natoms: Sequence[int] | npt.NDArray[np.integer],
    neighbors: Sequence[int] | npt.NDArray[np.integer] | None = None,
) -> Path:
    """Writes `metadata.npz` (OCP's name and keys) for the shards of a folder, replacing an old one.

    Args:
        folder: the folder that holds the shards.
        natoms: atoms of every record, shard after shard in sorted order of the file names.
        neighbors: edges of every record in the same order, if known.

    Raises:
        ValueError: an array is not one-dimensional or the two differ in length.
    """
    arrays = {"natoms": np.asarray(natoms, dtype=np.int64)}
    if neighbors is not None:
        arrays["neighbors"] = np.asarray(neighbors, dtype=np.int64)
    shapes = {name: array.shape for name, array in arrays.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) != 1:
        raise ValueError(f"{folder}: metadata needs one number per record, got shapes {shapes}")
    return write_arrays(Path(folder) / METADATA_NAME, arrays)


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Path:
    """Writes an .npz file whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return write_bytes(path, buffer.getvalue())
