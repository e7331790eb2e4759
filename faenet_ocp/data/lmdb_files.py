"""LMDB files of records: finding them, and reading them from any number of processes at once.

Files are opened read only and without LMDB's lock file, so the data folder may be read only and nothing is left in it.
An environment is opened when a process first reads from it and never crosses a fork or a pickle.
"""

import glob
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb

from faenet_ocp.common.checks import RecordError
from faenet_ocp.common.files import expand_path, file_state
from faenet_ocp.data.records import decode_count

logger = logging.getLogger(__name__)

PACKED_KEY = b"packed"
"""Only packed files (``packed``) have it."""
_LENGTH_KEY = b"length"
_FOLDER_FILE = "data.mdb"
"""What LMDB calls the file of an environment that is a folder, its default."""
_PAGE_SIZE_AT = 40  # bytes into a header page
_PAGE_SIZES = tuple(2**power for power in range(9, 17))


def resolve_files(src: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the LMDB files meant by `src`, shards of a folder or glob in natural order (2 before 10).

    Args:
        src: a file, a folder (its ``*.lmdb``, or its ``data.mdb``), a glob, or a list of these, whose order is kept;
            `~` and environment variables are expanded.

    Raises:
        FileNotFoundError: nothing is there, or a folder or glob without LMDB files.
        ValueError: `src` is empty, of another type, or means a file twice, or a folder has files of both kinds.
    """
    items = [src] if isinstance(src, str | os.PathLike) else src
    if not isinstance(items, Sequence) or not items or not all(isinstance(item, str | os.PathLike) for item in items):
        raise ValueError(f"src must be a path or a list of paths, not {src!r}")
    return each_once([file for item in items for file in _files_of(Path(expand_path(Path(item))))])


def each_once(files: list[Path]) -> list[Path]:
    """The files; ValueError if one is there twice, under whatever names."""
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise ValueError(f"src means {file} twice")
        seen.add(file.resolve())
    return files


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        found, own = list(path.glob("*.lmdb")), path / _FOLDER_FILE
        if own.exists():
            if found:
                raise ValueError(f"the folder {path} has {own.name} and {found[0].name}; name one of them in src")
            return [own]
        what = f"no *.lmdb file in the folder {path}"
    elif path.exists():
        return [path]
    elif glob.has_magic(str(path)):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        what = f"no file matches {path}"
    else:
        found, what = [], f"no file or folder {path}"
    if not found:
        raise FileNotFoundError(what)
    return [
        file for item in sorted(found, key=natural_order) for file in (_files_of(item) if item.is_dir() else [item])
    ]


def natural_order(path: Path | str) -> list[tuple[int, str]]:
    """A key to sort by: 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", str(path))]


class LmdbFile:
    """The records of one file, by number.

    Opening it reads a few pages only: with a ``length`` key the records are 0 ... length-1; without, they are 0 ...
    entries-1 if the first and the last of these exist. Only if they do not are the keys (not the values) listed: those
    that are numbers, all or none of them filled up with zeros to one width, are records.

    Attributes:
        item: what one of them is called in messages.

    Raises:
        ValueError: the file is no LMDB file, is cut short, holds fewer records than its ``length`` says, or its keys
            are no numbers.
    """

    item = "record"

    def __init__(self, path: Path):
        self.path = path
        self._width = 0  # of keys that are filled up with zeros
        self._env: lmdb.Environment | None = None
        self._pid: int | None = None
        env = self._open()
        try:
            with self._errors(), env.begin() as txn:
                self.numbers = self._find_numbers(txn)
        finally:
            env.close()  # a process that only counts records does not keep the file open

    def __len__(self) -> int:
        return len(self.numbers)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_env": None, "_pid": None}

    def state(self) -> str:
        """Place and `file_state`: another once the file has changed."""
        return f"{self.path.resolve()} {file_state(self.path)}"

    def read(self, position: int) -> bytes:
        """Return the value of the record at `position` (0 ... len-1).

        Raises:
            RecordError: there is none; names file and key.
        """
        if self._env is None or self._pid != os.getpid():
            self._env, self._pid = self._open(), os.getpid()
        number = self.numbers[position]
        with self._errors(), self._env.begin() as txn:
            value = txn.get(b"%0*d" % (self._width, number))
        if value is None:
            raise RecordError(f"{self.path}: record {number} is missing")
        return value

    def _open(self) -> lmdb.Environment:
        _check_page_size(self.path)
        with self._errors():
            env = lmdb.open(str(self.path), subdir=False, readonly=True, lock=False, readahead=False)
            used = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        size = self.path.stat().st_size
        if size < used:  # reading on would end the process with a bus error
            env.close()
            raise ValueError(f"{self.path}: is cut short: {size} bytes of {used}")
        return env

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise ValueError(f"{self.path}: cannot be read as an LMDB file: {error}") from error

    def _find_numbers(self, txn: lmdb.Transaction) -> Sequence[int]:
        entries = txn.stat()["entries"]
        if txn.get(PACKED_KEY) is not None:
            raise ValueError(f"{self.path}: is a packed file: dataset.format: oc20_packed")
        length = txn.get(_LENGTH_KEY)
        available = entries if length is None else entries - 1
        count = available if length is None else self._read_count(length)
        if count < available:
            logger.warning(
                "%s: its length key says %d records; %d more entries are not read", self.path, count, available - count
            )
        if count == 0:
            return range(0)
        if count <= available and txn.get(b"0") is not None and txn.get(b"%d" % (count - 1)) is not None:
            return range(count)
        listed = self._list_numbers(txn)
        if length is None:
            return listed
        if count > available or count - 1 not in listed:
            raise ValueError(f"{self.path}: its length key says {count} records, but some are missing")
        return range(count)

    def _read_count(self, value: bytes) -> int:
        try:
            return decode_count(value)
        except RecordError as error:
            raise ValueError(f"{self.path}: the length key {error}") from error

    def _list_numbers(self, txn: lmdb.Transaction) -> list[int]:
        """All keys that are numbers, in order; others beside them are told of."""
        keys = [key for key in txn.cursor().iternext(keys=True, values=False) if key != _LENGTH_KEY]
        digits = [key for key in keys if key.isdigit()]
        others = [key for key in keys if not key.isdigit()]
        if others:
            what = f"{self.path}: {len(others)} entries with keys like {_shown(others[0])}"
            if not digits:
                raise ValueError(f"{what}; expected 0, 1, 2, ...")
            logger.warning("%s are no records", what)
        padded = [key for key in digits if key[:1] == b"0" and len(key) > 1]
        if padded:
            other = next((key for key in digits if len(key) != len(padded[0])), None)
            if other is not None:
                raise ValueError(f"{self.path}: keys of several kinds, {_shown(padded[0])} and {_shown(other)}")
            self._width = len(padded[0])
        return sorted(map(int, digits))


def _shown(key: bytes) -> str:
    text = key.decode(errors="replace")
    return text[:80] if text.isprintable() else repr(key)[:80]


def _check_page_size(path: Path) -> None:
    """Compare the page sizes in LMDB's two header pages; LMDB trusts them, and a wrong one ends the process."""
    with path.open("rb") as file:
        first = file.read(_PAGE_SIZE_AT + 4)[_PAGE_SIZE_AT:]
        size = int.from_bytes(first, sys.byteorder)
        file.seek(size + _PAGE_SIZE_AT)
        second = file.read(4)
    if len(second) < 4 or second != first or size not in _PAGE_SIZES:
        raise ValueError(f"{path}: is no LMDB file, or damaged or cut short in its first pages")
