"""Reading S2EF text files: compared with ASE, and fed with damaged files."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from faenet_ocp.prepare.extxyz import FormatError, LogLine, read_frames, read_log
from faenet_ocp.prepare.s2ef import Options, prepare
from s2ef_raw import by_ase, read, write, write_raw


@pytest.fixture
def own_raw(tmp_path: Path) -> Path:
    """Three uncompressed files of four frames, to be damaged."""
    return write_raw(tmp_path / "raw", xz=False)


# The reader against ASE


def assert_reads_like_ase(folder: Path, tmp_path: Path) -> None:
    expected = by_ase(folder, tmp_path)
    paths = sorted(folder.glob("*.extxyz*"), key=lambda path: int(path.name.split(".")[0]))
    frames = [frame for path in paths for frame in read_frames(path, labels=True)]
    for frame, (atoms, _) in zip(frames, expected, strict=True):
        assert frame.energy == atoms.get_potential_energy()
        for ours, theirs in (
            (frame.pos, atoms.positions),
            (frame.cell, atoms.cell.array),
            (frame.forces, atoms.get_forces(apply_constraint=False)),
            (frame.numbers, atoms.numbers),
            (frame.tags, atoms.get_tags()),
            (np.flatnonzero(frame.fixed), atoms.constraints[0].index),
        ):
            assert ours is not None and np.array_equal(ours, theirs)
            assert np.array_equal(np.signbit(ours), np.signbit(theirs))  # also of zeros


def test_reads_like_ase(own_raw: Path, tmp_path: Path) -> None:
    assert_reads_like_ase(own_raw, tmp_path)


def test_columns_are_found_by_name_and_numbers_rounded_as_ase_does(tmp_path: Path) -> None:
    columns = "tags:I:1:forces:R:3:species:S:1:move_mask:L:1:pos:R:3"
    text = f"""2
energy=-1e-3 Properties={columns} Lattice="9 0 0 1.5 9 0 0 0 3e1"
2 -0.0 1e-300 0.1 H F 123456.123456789 0.30000000000000004 -7
0 1. +2 .5 Og T 1E2 9007199254740993 5e-324
"""
    path = write(tmp_path / "0.extxyz", text)
    log = write(tmp_path / "0.txt", "random1,frame2,3\n")
    assert_reads_like_ase(tmp_path, tmp_path)
    (frame,) = read_frames(path, labels=True)
    assert (frame.numbers.tolist(), frame.tags.tolist(), frame.fixed.tolist()) == ([1, 118], [2, 0], [True, False])
    assert frame.pos[0].tolist() == [123456.123456789, 0.30000000000000004, -7.0]
    assert frame.forces is not None and frame.forces[1].tolist() == [1.0, 2.0, 0.5]
    assert list(read_log(log)) == [LogLine(1, 2, 3.0, 1)]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for repeat in (200, 1000):
        folder = write_raw(tmp_path / str(repeat), files=1, repeat=repeat)
        tracemalloc.start()
        frames = sum(1 for _ in read_frames(folder / "0.extxyz.xz", labels=True))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert frames == 4 * repeat
    grown = 4 * len(read(tmp_path / "200" / "0.extxyz.xz"))
    assert peaks[1] - peaks[0] < 0.1 * grown


# Damaged files


@pytest.fixture
def xyz(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "raw", files=1, xz=False) / "0.extxyz"


def first_atom(xyz: Path, frame: int) -> int:
    """The line of a frame's first atom."""
    return frame * (2 + int(read(xyz).splitlines()[0])) + 3


def assert_named(path: Path, line: int | None, message: str) -> None:
    with pytest.raises(FormatError) as error:
        list(read_log(path) if ".txt" in path.name else read_frames(path, labels=True))
    assert str(error.value).startswith(f"{path}:" if line is None else f"{path}:{line}: ")
    assert message in str(error.value)
    assert str(error.value).isprintable()


def change(path: Path, number: int, row: str) -> None:
    """Exchange a line."""
    lines = path.read_text().split("\n")
    lines[number - 1] = row
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Cu 0.0 0.0 0.0 T 1 0.0 0.0", "expected 9 columns"),
        ("Cu 0.0 0.0 0.0 T 1 0.0 0.0 0.0 0.0", "expected 9 columns"),
        ("", "expected 9 columns"),
        ("Cu 0.0 0.0 zero T 1 0.0 0.0 0.0", "could not convert"),
        ("Cu 0.0 0.0 nan T 1 0.0 0.0 0.0", "finite"),
        ("Cu 0.0 0.0 0.0 T 1 0.0 -inf 0.0", "finite"),
        ("Cu 0.0 0.0 1_0.0 T 1 0.0 0.0 0.0", "expected a number"),
        ("Xx 0.0 0.0 0.0 T 1 0.0 0.0 0.0", "symbol of an element, not 'Xx'"),
        ("29 0.0 0.0 0.0 T 1 0.0 0.0 0.0", "symbol of an element, not '29'"),
        ("Cu 0.0 0.0 0.0 1 1 0.0 0.0 0.0", "T or F, not '1'"),
        ("Cu 0.0 0.0 0.0 T 1.5 0.0 0.0 0.0", "invalid literal"),
        (f"Cu 0.0 0.0 0.0 T {10**30} 0.0 0.0 0.0", "small number"),
        ("\x00\xff garbage \x1b[31m", "expected 9 columns"),
    ],
)
@pytest.mark.parametrize("frame", [0, 3])
def test_a_garbage_row_is_named(xyz: Path, frame: int, row: str, message: str) -> None:
    number = first_atom(xyz, frame) + 5
    change(xyz, number, row)
    assert_named(xyz, number, message)


@pytest.mark.parametrize(
    ("line", "old", "new", "message"),
    [
        (1, "1", "-1", "expected a number of atoms"),
        (1, "1", "one", "expected a number of atoms"),
        (1, "1", "99999999999", "expected a number of atoms"),
        (1, "1", "1" * 5000, "expected a number of atoms"),
        (1, "1", "0 # 1", "expected a number of atoms"),
        (2, "Lattice", "lattice", "the key 'lattice' is not one of"),
        (2, "free_energy", "stress", "the key 'stress' is not one of"),
        (2, "free_energy", "energy", "the key 'energy' is there twice"),
        (2, " energy=", " free", "expected key=value"),
        (2, ' pbc="T T T"', ' pbc="T T T', "expected key=value"),
        (2, 'pbc="T T T"', 'pbc="T T F"', "periodic in all directions"),
        (2, 'Lattice="', 'Lattice="1.0 ', "10 numbers, not 9"),
        (2, 'Lattice="', 'Lattice="x', "is not a finite number"),
        (2, " energy=", " energy=1e999", "is not a finite number"),
        (2, "tags:I:1", "tags:R:1", "'tags:R:1' is not one of"),
        (2, "tags:I:1", "charge:R:1", "'charge:R:1' is not one of"),
        (2, "tags:I:1", "species:S:1", "'species:S:1' is not one of"),
        (2, ":tags:I:1", "", "lacks tags"),
        (2, ":forces:R:3", "", "lacks forces"),
        (2, "forces:R:3", "forces:R:3:", "is incomplete"),
        (2, "Properties", "energy", "the key 'energy' is there twice"),
    ],
)
def test_a_strange_header_is_named(xyz: Path, line: int, old: str, new: str, message: str) -> None:
    number = first_atom(xyz, 2) - 3 + line
    row = xyz.read_text().split("\n")[number - 1]
    assert old in row
    change(xyz, number, row.replace(old, new, 1))
    assert_named(xyz, number, message)


STRANGE = ("", "random7", "frame7,random7,1.0", "random,frame,1", f"random{10**30},frame7,1.0")


@pytest.mark.parametrize("line", [*STRANGE, *(f"random7,frame7,{energy}" for energy in ("", "1.0,2.0", "x", "nan"))])
def test_a_strange_log_line_is_named(tmp_path: Path, line: str) -> None:
    log = write(tmp_path / "0.txt", f"random1,frame0,1.0\nrandom1,frame1\n{line}\nrandom1,frame2,1.0\n")
    assert_named(log, 3, "")


@pytest.mark.parametrize("kind", ["extxyz", "txt"])
def test_files_that_were_cut_are_refused(tmp_path: Path, kind: str) -> None:
    """Inside a number, between two lines, inside compressed data, or changed there."""
    raw = write_raw(tmp_path / "raw", files=1, repeat=40)
    path, text = raw / f"0.{kind}", read(raw / f"0.{kind}.xz")
    count = len(text.splitlines())
    write(path, text[:-3])
    assert_named(path, count, "ends without a line break")
    if kind == "extxyz":
        write(path, "".join(text.splitlines(keepends=True)[:-1]))
        assert_named(
            path, count - 1, f"ends in the middle of the frame that starts in line {first_atom(path, 159) - 2}"
        )
    data = bytearray((raw / f"0.{kind}.xz").read_bytes())
    for damaged in (data[:-30], data[: len(data) // 2] + b"?" + data[len(data) // 2 + 1 :]):
        (raw / f"0.{kind}.xz").write_bytes(damaged)
        assert_named(raw / f"0.{kind}.xz", None, "damaged or cut short from here on")


# Files that do not belong together


def test_counts_that_differ_are_named(own_raw: Path, tmp_path: Path) -> None:
    log, frames = own_raw / "0.txt", own_raw / "2.extxyz"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    text = frames.read_text().splitlines(keepends=True)
    frames.write_text("".join(text[: 3 * (len(text) // 4)]))
    with pytest.raises(FormatError) as error:
        prepare(own_raw, tmp_path / "out", options=Options())
    first, second = str(error.value).splitlines()  # both are found in one go
    start = 3 * (len((own_raw / "0.extxyz").read_text().splitlines()) // 4) + 1
    assert first == f"{own_raw / '0.extxyz'}:{start}: has no id: {log} ends after 3 lines"
    assert second == f"{own_raw / '2.txt'}:4: has no frame: {frames} ends after 3 frames"
    assert [path.name for path in (tmp_path / "out").glob("*.*z")] == []
    assert [path.name for path in (tmp_path / "out").glob("*.lmdb")] == ["data.0001.lmdb"]


def test_ids_that_belong_to_other_structures_are_named(own_raw: Path, tmp_path: Path) -> None:
    """A frame of another size under the same sid: the log is shifted or from elsewhere."""
    sizes = [int((own_raw / f"{number}.extxyz").read_text().split("\n")[0]) for number in range(3)]
    other = next(number for number in range(3) if sizes[number] != sizes[0])
    with (own_raw / "0.extxyz").open("a") as file:
        file.write((own_raw / f"{other}.extxyz").read_text())
    with (own_raw / "0.txt").open("a") as file:
        file.writelines(f"random100,frame{fid},-1.0\n" for fid in range(4, 8))
    with pytest.raises(FormatError, match=r"0\.extxyz:\d+: has \d+ atoms, .*random100, .*0\.txt:5 and line 1") as error:
        prepare(own_raw, tmp_path / "out", options=Options())
    assert f":{4 * (2 + sizes[0]) + 1}: " in str(error.value)


def test_a_cell_without_volume_is_named_where_edges_are_wanted(own_raw: Path, tmp_path: Path) -> None:
    path = own_raw / "1.extxyz"
    number = first_atom(path, 1) - 1
    header = path.read_text().split("\n")[number - 1].split('" ', 1)[1]
    change(path, number, 'Lattice="1 0 0 2 0 0 0 0 9" ' + header)
    with pytest.raises(FormatError, match=rf"1\.extxyz:{number - 1}: "):
        prepare(own_raw, tmp_path / "out", options=Options(get_edges=True))
