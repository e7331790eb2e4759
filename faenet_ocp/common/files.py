"""Files that are whole or not there: atomic writes, locks on folders, versions that results name."""

import contextlib
import fcntl
import io
import json
import logging
import math
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

TEMPORARY_SUFFIX = ".tmp"


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Writes under a hidden temporary name in the same folder, syncs, and renames: a reader sees old or new, whole.

    The folder of the file is created, not those above it: a run whose folder is gone does not make it anew.

    Raises:
        OSError: it could not be written; the old file, if there was one, is still there.
    """
    path = Path(path)
    path.parent.mkdir(exist_ok=True)
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(content)
        publish(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # the error of writing is the one that matters
            temporary.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """`write_bytes` of UTF-8 text."""
    return write_bytes(path, text.encode())


def write_array(path: str | Path, array: NDArray[Any]) -> Path:
    """`write_bytes` of an array in NumPy's format; the folder and those above it are created."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return write_bytes(path, content.getvalue())


def write_json(path: str | Path, data: Mapping[str, Any]) -> Path:
    """`write_bytes` of strict JSON.

    Raises:
        ValueError: a value that JSON does not know, with its place.
    """
    return write_text(path, json.dumps(plain(data, "data"), indent=2, allow_nan=False) + "\n")


def plain(value: Any, where: str) -> Any:
    """Only what strict JSON knows: numbers of numpy and torch become Python's, NaN and infinities null.

    Raises:
        ValueError: something else, with its place.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item(), where)
    raise ValueError(f"{where}: a {type(value).__name__} cannot be stored in JSON")


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no reader's glob finds (hidden, with a suffix of its own) and no other writer has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")


def publish(temporary: Path, path: Path) -> None:
    """Makes a finished temporary file durable and renames it: readers see the whole file or none."""
    _sync(temporary)
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # not every file system can sync a folder; the file itself is safe
        _sync(path.parent)


def remove_leftovers(folder: str | Path) -> int:
    """Deletes the temporary files of killed writers in a folder, in which no writer may be at work; how many."""
    leftovers = list(Path(folder).glob(f".*{TEMPORARY_SUFFIX}"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)


_locks: set[IO[str]] = set()


def _leave_locks_to_the_parent() -> None:
    for file in _locks:  # a lock lives as long as anyone has its file open: loader workers would keep a dead run's
        file.close()


os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


@contextlib.contextmanager
def exclusive(lock: Path, folder: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Makes a folder ours alone by the lock on a file; the lock goes with the process, however that ends.

    Args:
        lock: the file.
        folder: named in messages.
        patience: seconds to wait for another process to end.

    Raises:
        ValueError: another process is writing there.
    """
    deadline = time.monotonic() + patience
    with lock.open("w") as file:
        _locks.add(file)
        try:
            while not _try_to_lock(file, folder):
                if time.monotonic() >= deadline:
                    raise ValueError(f"{folder}: another process is writing there; wait for its end, or stop it")
                time.sleep(min(1.0, patience))
            yield
        finally:
            _locks.discard(file)


@contextlib.contextmanager
def made_whole(root: Path) -> Iterator[Path]:
    """Gives a folder to write into, which gets the name `root` when all is done; leftovers of a killed call go.

    Raises:
        ValueError: another process is making it.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    lock, unfinished = root.with_name(f".{root.name}.lock"), root.with_name(f".{root.name}.unfinished")
    with exclusive(lock, root):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(root)
        lock.unlink()


def _try_to_lock(file: IO[str], folder: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s: cannot be locked (%s); do not start a second process there", folder, error)
    return True


def expand_path(path: str | os.PathLike[str]) -> str:
    """A path with `~` and `$VARIABLES` as a shell would put them in; what is not set stays as it is."""
    return os.path.expandvars(os.path.expanduser(path))


def file_state(path: str | Path) -> list[int]:
    """Size, inode and times of a file: another once it was written, also with the old time of writing put back.

    The time that sees through that (ctime) cannot be set. A copy has another state, too: compare its content.
    """
    status = os.stat(path)
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def software_versions() -> dict[str, str | None]:
    """Python and the packages whose change could change a result; None for one that is only on the path."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "torch-geometric", "fairchem-core", "faenet-ocp"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
