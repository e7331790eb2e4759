"""Writing LMDB shards in OC20's on-disk layout.

A shard is one file (`subdir=False`) with keys `0` .. `N-1` and `length` (a pickled int). A value is
a pickled `torch_geometric.data.Data`, or bytes that were encoded elsewhere. A shard appears
under its own name only when it is whole: it is written under a hidden temporary name in the same
folder, synced to disk and then renamed.
"""

import contextlib
import fcntl
import logging
import os
import pickle
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import lmdb
import numpy as np
import numpy.typing as npt
from torch_geometric.data import Data

logger = logging.getLogger(__name__)

METADATA_NAME = "metadata.npz"
_TEMPORARY_SUFFIX = ".tmp"
_INITIAL_MAP_SIZE = 1 << 28
_BATCH_BYTES = 1 << 25


def encode_record(record: Data) -> bytes:
    """Pickle one record in the PyG 2 layout, as the values of an OC20 LMDB are stored.

    Args:
        record: the record; its tensors must own their storage (a view would drag its whole base
            along).

    Returns:
        The bytes of one LMDB value.
    """
    return pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)


class LmdbShardWriter:
    """Writes one shard, record after record, with memory bounded by `batch_bytes`.

    Records are collected and written in large transactions: 30,000 to 60,000 records of 20 kB a
    second on one core, where one transaction a record reaches about 1,000. OC20's keys are decimal
    numbers without leading zeros, so records do not come in the byte order of the tree and LMDB's
    append mode is not possible; sorting a batch gains nothing measurable.

    Use as a context manager: the shard is finished when the block ends well and discarded when it
    raises. A writer that is killed leaves only a hidden temporary file, which `remove_leftovers`
    deletes.

    Args:
        path: the shard, e.g. `.../data.0000.lmdb`. Its folder is created.
        overwrite: whether a finished shard of that name may be replaced (only at the very end).
        batch_bytes: how many bytes of values to collect for one transaction.

    Raises:
        FileExistsError: the shard exists and `overwrite` is false.
        ValueError: `batch_bytes` is not positive.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, batch_bytes: int = _BATCH_BYTES) -> None:
        if batch_bytes < 1:
            raise ValueError(f"batch_bytes must be at least 1, got {batch_bytes}")
        self.path = Path(path)
        self._overwrite = overwrite
        self._batch_bytes = batch_bytes
        self._refuse_existing()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = _temporary_path(self.path)
        self._map_size = _INITIAL_MAP_SIZE
        self._batch: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0
        self._length = 0
        # lock=False: one writer on a private name needs no lock file. sync=False: nothing has to
        # survive a crash before the rename, so one sync at the end replaces one per transaction.
        self._env: lmdb.Environment | None = lmdb.open(
            str(self._temporary),
            subdir=False,
            map_size=self._map_size,
            lock=False,
            sync=False,
            metasync=False,
            mode=0o644,
        )

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def append(self, value: bytes | Data) -> int:
        """Add one record and return its index in the shard.

        Args:
            value: an encoded record, or a `Data` that is encoded here.

        Raises:
            ValueError: the writer is closed, or the value is neither bytes nor a `Data`.
        """
        if self._env is None:
            raise ValueError(f"{self.path}: cannot append, the shard is already closed")
        if isinstance(value, Data):
            value = encode_record(value)
        elif not isinstance(value, bytes):
            kind = type(value).__name__
            raise ValueError(f"{self.path}: a value must be bytes or Data, got {kind}")
        index = self._length
        self._batch.append((b"%d" % index, value))
        self._pending_bytes += len(value)
        self._length += 1
        if self._pending_bytes >= self._batch_bytes:
            self._flush()
        return index

    def close(self) -> None:
        """Write what is pending and `length`, sync and give the shard its name; again: nothing.

        Raises:
            FileExistsError: the shard appeared in the meantime and `overwrite` is false; what this
                writer has written is discarded.
        """
        if self._env is None:
            return
        try:
            self._batch.append((b"length", pickle.dumps(self._length, pickle.HIGHEST_PROTOCOL)))
            self._flush()
            self._env.sync(True)
            self._env.close()
            self._refuse_existing()
            publish(self._temporary, self.path)
        except BaseException:
            self.abort()
            raise
        self._env = None

    def abort(self) -> None:
        """Discard what was written and leave the shard's name alone; when closed: nothing."""
        if self._env is None:
            return
        self._env.close()
        self._env = None
        self._batch.clear()
        self._temporary.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        if not self._overwrite and self.path.exists():
            raise FileExistsError(f"{self.path} exists; a finished shard is overwritten only if asked")

    def _flush(self) -> None:
        """Write the batch in one transaction; while it does not fit, grow the map and try again."""
        if self._env is None or not self._batch:
            return
        while True:
            try:
                with self._env.begin(write=True) as transaction, transaction.cursor() as cursor:
                    cursor.putmulti(self._batch, overwrite=False)
                break
            except lmdb.MapFullError:
                self._map_size = 2 * self._map_size + self._pending_bytes
                self._env.set_mapsize(self._map_size)
                logger.debug("%s: map grown to %d bytes", self._temporary, self._map_size)
        self._batch.clear()
        self._pending_bytes = 0


def write_metadata(
    folder: str | Path,
    *,
    natoms: Sequence[int] | npt.NDArray[np.integer],
    neighbors: Sequence[int] | npt.NDArray[np.integer] | None = None,
) -> Path:
    """Write `metadata.npz` (OCP's name and keys) for the shards of a folder, replacing an old one.

    Args:
        folder: the folder that holds the shards.
        natoms: atoms of every record, shard after shard in sorted order of the file names.
        neighbors: edges of every record in the same order, if known.

    Returns:
        The path of the file.

    Raises:
        ValueError: an array is not one-dimensional or the two differ in length.
    """
    arrays = {"natoms": np.asarray(natoms, dtype=np.int64)}
    if neighbors is not None:
        arrays["neighbors"] = np.asarray(neighbors, dtype=np.int64)
    shapes = {name: array.shape for name, array in arrays.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) != 1:
        raise ValueError(f"{folder}: metadata needs one number per record, got shapes {shapes}")
    path = Path(folder) / METADATA_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(path)
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def remove_leftovers(folder: str | Path) -> int:
    """Delete the temporary files of killed writers in a folder; no writer may be at work there.

    Returns:
        The number of deleted files.
    """
    leftovers = list(Path(folder).glob(f".*{_TEMPORARY_SUFFIX}"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)


def _temporary_path(path: Path) -> Path:
    # Hidden and not ending in .lmdb: no reader's glob finds it. Unique: no two writers share it.
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{_TEMPORARY_SUFFIX}")


@contextlib.contextmanager
def exclusive(lock: Path, folder: Path) -> Iterator[None]:
    """Make a folder ours alone by the lock on a file; the lock goes with the process, however that ends.

    Raises:
        ValueError: another process is writing there.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing there") from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s: cannot be locked (%s); do not start a second process there", folder, error)
        yield


def publish(temporary: Path, path: Path) -> None:
    """Make a finished temporary file durable and rename it: readers see the whole file or none."""
    _fsync(temporary)
    os.replace(temporary, path)
    # Not every file system can sync a folder; the file itself is safe.
    with contextlib.suppress(OSError):
        _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
