"""Reads OC20's S2EF files: extended XYZ with one line of columns per atom, and the id log that lies beside it.

Both may be compressed with xz and are read as a stream. The dialect is the one that ASE wrote for OC20; anything else
is refused with file and line, because a column or a key of unknown meaning is a sign of another kind of data. A frame:

    68
    Lattice="<9 numbers>" Properties=species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3 energy=-1.5 pbc="T T T"
    Cu  0.37533933  7.42235804  26.65437889  T  1  -0.05452826  -0.10050129  -0.09451159
    ... one line per atom

and its line in the log is `random<sid>,frame<fid>,<reference energy>`. Lengths in A, energies in eV, forces in eV/A.
Faster than `ase.io.read`, with the same numbers to the last bit (`tests/test_extxyz.py`).
"""

import io
import lzma
import math
import re
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

_BUFFER = 1 << 20
_MAX_ATOMS = 100_000  # OC20 has a few hundred at most; a damaged count must not make us read the whole file into memory
_HEADER_ITEM = re.compile(rb'\s*(\w+)=(?:"([^"]*)"|([^\s"]+))(?=\s)')
_HEADER_KEYS = (b"Lattice", b"Properties", b"energy", b"free_energy", b"pbc")
_COLUMNS = {b"species": b"S:1", b"pos": b"R:3", b"move_mask": b"L:1", b"tags": b"I:1", b"forces": b"R:3"}
_LOG_LINE = re.compile(rb"random(\d{1,18}),frame(\d{1,18})(?:,(\S+))?\s*")
_COUNT = re.compile(rb"\d{1,9}")
_NUMBERS = {symbol.encode(): number for symbol, number in atomic_numbers.items() if number > 0}
_LOGICALS = {b"T": True, b"F": False}


class FormatError(ValueError):
    """A file that is not what it should be; the message starts with `file:line:`."""


class Frame(NamedTuple):
    """One structure. N atoms."""

    numbers: NDArray[np.int64]  # (N,) atomic numbers
    pos: NDArray[np.float64]  # (N, 3)
    cell: NDArray[np.float64]  # (3, 3), lattice vectors in rows
    tags: NDArray[np.int64]  # (N,) 0 sub-surface, 1 surface, 2 adsorbate
    fixed: NDArray[np.bool_]  # (N,) held in place: the atoms whose move_mask is F
    energy: float | None
    forces: NDArray[np.float64] | None  # (N, 3)
    line: int  # where the frame starts


class LogLine(NamedTuple):
    """What the log says of one frame."""

    sid: int
    fid: int
    reference: float | None  # energy of the clean slab and the adsorbate molecule
    line: int


def read_frames(path: Path, *, labels: bool) -> Iterator[Frame]:
    """Yield the frames of an extended XYZ file, one at a time.

    Args:
        path: the file, `.extxyz` or `.extxyz.xz`.
        labels: whether every frame must have energy and forces; else both are left out even where they are there. The
            energy is `energy`, not `free_energy`, as ASE's `get_potential_energy` has it.

    Raises:
        FormatError: the file is damaged, cut short or not of OC20's dialect.
        OSError: it cannot be opened.
    """
    with closing(_Lines(path)) as lines:
        while count := lines.take(1):
            start = lines.number
            number = count[0].strip()
            if not _COUNT.fullmatch(number) or not 1 <= int(number) <= _MAX_ATOMS:
                raise FormatError(f"{path}:{start}: expected a number of atoms, not {_shown(number)}")
            header, *rows = lines.take(1 + int(number)) or [b""]
            if len(rows) < int(number):
                raise FormatError(f"{path}:{lines.number}: ends in the middle of the frame that starts in line {start}")
            cell, energy, columns = _parse_header(header, f"{path}:{start + 1}", labels)
            try:
                atoms = _parse_rows(rows, columns)
            except ValueError as error:
                raise _fault(rows, columns, f"{path}:", start + 2) from error
            numbers, pos, tags, fixed, forces = atoms
            yield Frame(numbers, pos, cell, tags, fixed, energy, forces, start)


def read_log(path: Path) -> Iterator[LogLine]:
    """Yield the lines of an id log, `.txt` or `.txt.xz`.

    Raises:
        FormatError: the file is damaged, or a line is not `random<sid>,frame<fid>` with or without `,<number>`.
        OSError: it cannot be opened.
    """
    with closing(_Lines(path)) as lines:
        while line := lines.take(1):
            match = _LOG_LINE.fullmatch(line[0])
            if match is None:
                wanted = "random<sid>,frame<fid>,<reference energy>"
                raise FormatError(f"{path}:{lines.number}: expected {wanted}, not {_shown(line[0])}")
            sid, fid, energy = match.groups()
            reference = None if energy is None else _finite(energy, "reference energy", f"{path}:{lines.number}")
            yield LogLine(int(sid), int(fid), reference, lines.number)


class _Lines:
    """The lines of a file, decompressed on the way; `number` is the number of the last one taken."""

    def __init__(self, path: Path):
        self._path = path
        self._is_xz = path.suffix == ".xz"
        raw = lzma.LZMAFile(path) if self._is_xz else io.FileIO(path)  # noqa: SIM115  # closed with self
        self._file = io.BufferedReader(raw, _BUFFER)
        self.number = 0

    def close(self) -> None:
        self._file.close()

    def take(self, count: int) -> list[bytes]:
        """The next `count` lines, fewer at the end of the file."""
        try:
            lines = list(islice(self._file, count))
        except (lzma.LZMAError, EOFError) as error:
            raise FormatError(f"{self._path}:{self.number + 1}: damaged or cut short from here on: {error}") from error
        self.number += len(lines)
        # The checksum of an xz file vouches for its end; a plain file may have been cut inside a number.
        if lines and not self._is_xz and not lines[-1].endswith(b"\n"):
            raise FormatError(f"{self._path}:{self.number}: ends without a line break, so it may have been cut short")
        return lines


class _Columns(NamedTuple):
    """First column of each property (None: not wanted), and how many columns a row has."""

    species: int
    pos: int
    move_mask: int
    tags: int
    forces: int | None
    width: int


def _parse_header(header: bytes, place: str, labels: bool) -> tuple[NDArray[np.float64], float | None, _Columns]:
    items: dict[bytes, bytes] = {}
    position, text = 0, header.rstrip() + b"\n"
    while match := _HEADER_ITEM.match(text, position):
        key, quoted, bare = match.groups()
        if key not in _HEADER_KEYS or key in items:
            what = "is there twice" if key in items else f"is not one of {_shown(b', '.join(_HEADER_KEYS))}"
            raise FormatError(f"{place}: the key {_shown(key)} {what}")
        items[key] = quoted if bare is None else bare
        position = match.end()
    if text[position:].strip():
        raise FormatError(f"{place}: expected key=value, not {_shown(text[position:])}")
    for key in (b"Lattice", b"Properties", *([b"energy"] if labels else [])):
        if key not in items:
            raise FormatError(f"{place}: has no {key.decode()}")
    if items.get(b"pbc", b"T T T").split() != [b"T"] * 3:  # ASE: periodic where there is a Lattice and no pbc
        raise FormatError(f"{place}: pbc is {_shown(items[b'pbc'])}; OC20 is periodic in all directions")
    lattice = [_finite(number, "Lattice", place) for number in items[b"Lattice"].split()]
    if len(lattice) != 9:
        raise FormatError(f"{place}: Lattice has {len(lattice)} numbers, not 9")
    energy = _finite(items[b"energy"], "energy", place) if labels else None
    try:
        columns = _parse_properties(items[b"Properties"], labels)
    except ValueError as error:
        raise FormatError(f"{place}: {error}") from None
    return np.array(lattice).reshape(3, 3), energy, columns


@lru_cache(maxsize=16)
def _parse_properties(text: bytes, labels: bool) -> _Columns:
    parts = text.split(b":")
    first: dict[str, int] = {}
    width = 0
    for name, *form in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
        if _COLUMNS.get(name) != b":".join(form) or name.decode() in first:
            known = ", ".join(f"{key.decode()}:{value.decode()}" for key, value in _COLUMNS.items())
            raise ValueError(f"Properties: {_shown(b':'.join((name, *form)))} is not one of {known}, each once")
        first[name.decode()] = width
        width += int(form[1])
    wanted = [name.decode() for name in _COLUMNS if labels or name != b"forces"]
    missing = [name for name in wanted if name not in first]
    if missing or len(parts) % 3:
        raise ValueError(f"Properties: {_shown(text)} " + (f"lacks {missing[0]}" if missing else "is incomplete"))
    species, pos, move_mask, tags = (first[name] for name in ("species", "pos", "move_mask", "tags"))
    return _Columns(species, pos, move_mask, tags, first["forces"] if labels else None, width)


def _parse_rows(
    rows: list[bytes], columns: _Columns
) -> tuple[
    NDArray[np.int64],
    NDArray[np.float64],
    NDArray[np.int64],
    NDArray[np.bool_],
    NDArray[np.float64] | None,
]:
    """Numbers, pos, tags, fixed, forces of the rows; ValueError if there is anything wrong with them, anywhere.

    Column by column with `float`, which rounds correctly, so the bits are those of any other correct reader.
    """
    text = b"".join(rows)
    fields = text.split()
    count, width = len(rows), columns.width
    if len(fields) != count * width:
        raise ValueError(f"expected {width} columns")
    if b"_" in text:
        raise ValueError("expected a number")  # Python's float takes 1_0, no other reader does
    try:
        numbers = np.array([_NUMBERS[symbol] for symbol in fields[columns.species :: width]])
        movable = np.array([_LOGICALS[value] for value in fields[columns.move_mask :: width]])
    except KeyError as error:
        what = "T or F" if error.args[0] in fields[columns.move_mask :: width] else "the symbol of an element"
        raise ValueError(f"expected {what}, not {_shown(error.args[0])}") from None
    try:
        tags = np.array([int(tag) for tag in fields[columns.tags :: width]], dtype=np.int64)
    except OverflowError:
        raise ValueError("expected a small number as tag") from None

    def vectors(first: int) -> NDArray[np.float64]:
        values = np.empty((count, 3))
        for axis in range(3):
            values[:, axis] = list(map(float, fields[first + axis :: width]))
        if not np.isfinite(values).all():
            raise ValueError("expected finite numbers")
        return values

    forces = None if columns.forces is None else vectors(columns.forces)
    return numbers, vectors(columns.pos), tags, ~movable, forces


def _fault(rows: list[bytes], columns: _Columns, file: str, line: int) -> FormatError:
    """The error of the first faulty row, found by reading them one by one."""
    for number, row in enumerate(rows, line):
        try:
            _parse_rows([row], columns)
        except ValueError as error:
            return FormatError(f"{file}{number}: {error}: {_shown(row)}")
    return FormatError(f"{file}{line}: the lines of this frame's atoms do not belong together")


def _finite(text: bytes, what: str, place: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or b"_" in text:
        raise FormatError(f"{place}: {what}: {_shown(text)} is not a finite number")
    return number


def _shown(text: bytes) -> str:
    """At most 80 characters of a file, safe to print."""
    return repr(text.strip()[:80].decode("ascii", "backslashreplace"))
