"""LMDB files: which are meant, how many records they hold, and damage that is named and never ends the process."""

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_sets import bare_fields, open_dataset
from faenet_ocp.common.checks import RecordError
from faenet_ocp.data.lmdb_files import LmdbFile, resolve_files
from small_data import dump_record, make_fields, write_items, write_lmdb


def labelled(path: Path, energies: Any, **options: Any) -> Path:
    return write_lmdb(path, [dump_record(bare_fields() | {"y": float(energy)}) for energy in energies], **options)


def energies_of(src: Any) -> list[float]:
    dataset = open_dataset(src)
    return [dataset[index].energy.item() for index in range(len(dataset))]


# Files, folders, globs, lists


def test_files_folders_globs_and_lists(tmp_path: Path) -> None:
    for number, energies in ((10, [3]), (2, [1, 2]), (1, [0])):
        labelled(tmp_path / "shards" / f"data.{number}.lmdb", energies)
    (tmp_path / "shards" / "notes.txt").write_text("no data")
    other = labelled(tmp_path / "other.lmdb", [9])
    shards = tmp_path / "shards"
    assert energies_of(str(shards)) == [0, 1, 2, 3]  # 1, 2, 10: natural order
    assert energies_of(str(shards / "data.*.lmdb")) == [0, 1, 2, 3]
    assert energies_of(str(tmp_path / "**" / "data.1*.lmdb")) == [0, 3]
    assert energies_of([other, str(shards / "data.2.lmdb")]) == [9, 1, 2]
    assert energies_of([shards, other]) == [0, 1, 2, 3, 9]
    odd = labelled(tmp_path / "run[1]*" / "data.lmdb", [5])  # names that look like globs
    assert energies_of(odd) == energies_of(odd.parent) == [5]
    assert resolve_files(str(odd.parent)) == [odd]


def test_folders_that_lmdb_makes_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lmdb.open(name)` makes a folder with data.mdb and lock.mdb."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path / "shards"))
    for number in (10, 2):
        labelled(tmp_path / f"shards/data.{number}.lmdb/data.mdb", [number])
    labelled(tmp_path / "shards/data.1.lmdb", [1])
    (tmp_path / "shards/data.2.lmdb/lock.mdb").touch()
    for src in (tmp_path / "shards", "~/shards", "$WHERE", "${WHERE}/data.*.lmdb"):
        assert energies_of(src) == [1, 2, 10]
    assert energies_of("~/shards/data.2.lmdb") == energies_of("~/shards/data.2.lmdb/data.mdb") == [2]
    labelled(tmp_path / "shards/data.2.lmdb/other.lmdb", [3])
    with pytest.raises(ValueError, match=r"has data.mdb and other.lmdb; name one of them in src"):
        resolve_files("$WHERE")


@pytest.mark.parametrize(
    ("src", "error", "message"),
    [
        ("missing.lmdb", FileNotFoundError, "no file or folder .*missing.lmdb"),
        ("empty.lmdb", FileNotFoundError, r"no \*.lmdb file in the folder .*empty"),
        ("none*.lmdb", FileNotFoundError, "no file matches .*none"),
        ([], ValueError, "src must be a path or a list of paths"),
        (5, ValueError, "src must be a path"),
        (["a*.lmdb", "a.lmdb"], ValueError, "means .*a.lmdb twice"),
    ],
)
def test_sources_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, src: Any, error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    labelled(tmp_path / "a.lmdb", [0])
    (tmp_path / "empty.lmdb").mkdir()  # a folder with the name of a file
    with pytest.raises(error, match=message):
        resolve_files(src)


# How many records


@pytest.mark.parametrize("length", [True, False])
def test_the_length_key_is_optional(tmp_path: Path, length: bool) -> None:
    path = labelled(tmp_path / "data.lmdb", range(11), length=length)
    assert energies_of(path) == list(range(11))
    assert LmdbFile(path).numbers == range(11)  # not listed


@pytest.mark.parametrize("keys", [["0", "1", "2", "note"], ["0", "2", "11", "100"], ["7", "meta", "8"]])
def test_other_keys_and_gaps_without_length(tmp_path: Path, keys: list[str]) -> None:
    numbers = sorted(int(key) for key in keys if key.isdigit())
    items = {key.encode(): dump_record(bare_fields() | {"y": float(key)}) if key.isdigit() else b"x" for key in keys}
    assert energies_of(write_items(tmp_path / "data.lmdb", items)) == numbers


@pytest.mark.parametrize("length", [None, b"11", b" 11", pickle.dumps(11), pickle.dumps("11")])
def test_keys_of_one_width_and_lengths_as_text(tmp_path: Path, length: bytes | None) -> None:
    items = {b"%04d" % number: dump_record(bare_fields() | {"y": float(number)}) for number in range(11)}
    path = write_items(tmp_path / "data.lmdb", items | ({} if length is None else {b"length": length}))
    assert energies_of(path) == list(range(11))


RECORD = dump_record(make_fields(0))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({b"0": RECORD, b"1": RECORD, b"x": b"", b"length": pickle.dumps(4)}, "its length key says 4 records"),
        ({b"0": RECORD, b"1": RECORD, b"x": b"", b"length": pickle.dumps(3)}, "its length key says 3 records"),
        ({b"00": RECORD, b"01": RECORD, b"length": b"3"}, "its length key says 3 records"),
        ({b"0": b"x", b"length": b"twelve"}, "the length key "),
        ({b"0": b"x", b"length": pickle.dumps("x3")}, "the length key "),
        ({b"0": b"x", b"length": pickle.dumps(-3)}, "the length key "),
    ],
)
def test_wrong_lengths(tmp_path: Path, items: dict[bytes, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=rf"data.lmdb: {message}"):
        LmdbFile(write_items(tmp_path / "data.lmdb", items))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({b"random%d.extxyz" % n: RECORD for n in range(3)}, "3 entries with keys like random0.extxyz; expected 0, 1"),
        ({b"a": RECORD, b"b": RECORD, b"length": pickle.dumps(2)}, "2 entries with keys like a; expected 0, 1, 2, ..."),
        ({b"\x00\x01": RECORD}, r"1 entries with keys like b'\\x00\\x01'; expected 0, 1, 2"),
        ({b"00": RECORD, b"1": RECORD}, "keys of several kinds, 00 and 1"),
    ],
)
def test_keys_that_are_no_numbers_of_records(tmp_path: Path, items: dict[bytes, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=rf"data.lmdb: {message}"):
        LmdbFile(write_items(tmp_path / "data.lmdb", items))


@pytest.mark.parametrize("items", [{}, {b"length": pickle.dumps(0)}])
def test_files_without_records(tmp_path: Path, items: dict[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match=r"no records in .*data.lmdb"):
        open_dataset(write_items(tmp_path / "data.lmdb", items))


def test_a_gap_below_length_is_named_when_it_is_read_and_further_keys_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = {b"0": RECORD, b"2": dump_record(make_fields(2)), b"3": RECORD, b"x": b"", b"length": pickle.dumps(3)}
    dataset = open_dataset(write_items(tmp_path / "data.lmdb", items))
    assert len(dataset) == 3 and dataset[2].sid == ["2"]
    assert "data.lmdb: its length key says 3 records; 1 more entries are not read" in caplog.text
    with pytest.raises(RecordError, match=r"data.lmdb: record 1 is missing"):
        dataset[1]


# Damage


def damaged_copy(small_is2re: Path, folder: Path, change: Callable[[bytes], bytes]) -> Path:
    target = folder / "data.lmdb"
    target.write_bytes(change((small_is2re / "is2re/all/val_id/data.lmdb").read_bytes()))
    return target


@pytest.mark.parametrize("size", [0, 43, 4096, 20_000, -1])
def test_a_truncated_file_is_an_error_and_does_not_end_the_process(
    small_is2re: Path, tmp_path: Path, size: int
) -> None:
    path = damaged_copy(small_is2re, tmp_path, lambda data: data[:size])
    with pytest.raises(ValueError, match=r"data.lmdb: .*cut short"):
        LmdbFile(path)


def test_a_file_cut_after_it_was_opened_and_before_it_is_read(small_is2re: Path, tmp_path: Path) -> None:
    path = damaged_copy(small_is2re, tmp_path, lambda data: data)
    file = LmdbFile(path)
    os.truncate(path, 16384)
    with pytest.raises(ValueError, match="cut short: 16384 bytes of"):
        file.read(0)


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04" * 4000, bytes(30_000)])
def test_other_files_are_no_lmdb_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.lmdb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data.lmdb: .*LMDB"):
        LmdbFile(path)


def test_flipped_bytes_of_a_value_are_found_and_named(small_is2re: Path, tmp_path: Path) -> None:
    name = b"_rebuild_tensor_v2"
    path = damaged_copy(small_is2re, tmp_path, lambda data: data.replace(name, b"_rebuild_tensor_v0"))
    dataset = open_dataset(path)
    assert len(dataset) == 4
    with pytest.raises(RecordError, match=r"data.lmdb: record 2 names torch._utils._rebuild_tensor_v0, .*refused"):
        dataset[2]


# What is left where


def test_nothing_is_left_in_the_data_folder(small_is2re: Path) -> None:
    folder = small_is2re / "is2re/all/val_id"
    dataset = open_dataset(folder)
    _ = dataset[0], dataset.natoms()
    assert [path.name for path in folder.iterdir()] == ["data.lmdb"]


def test_a_read_only_folder_is_enough(small_is2re: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(small_is2re / "is2re/all/val_id/data.lmdb", folder)
        (folder / "data.lmdb").chmod(0o444)
        folder.chmod(0o555)
        child = os.fork()
        if child == 0:  # root may write anywhere, so the child reads as somebody else
            code = 1
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                code = 2 * os.access(folder, os.W_OK) + 4 * (len(LmdbFile(folder / "data.lmdb").read(0)) < 1000)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        folder.chmod(0o755)
        assert os.waitstatus_to_exitcode(status) == 0
        assert [path.name for path in folder.iterdir()] == ["data.lmdb"]
