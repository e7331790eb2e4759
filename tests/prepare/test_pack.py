"""What is packed already: known by its source, which may have been copied, or may have changed since."""

import logging
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from faenet_ocp.data.lmdb_files import resolve_files
from faenet_ocp.data.packed import PackedFile
from faenet_ocp.prepare import pack as packing
from faenet_ocp.prepare.pack import pack
from small_data import dump_record, make_fields, write_lmdb


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path, 0, 1, 2)


def write(folder: Path, *numbers: int) -> Path:
    (folder / "data.lmdb").unlink(missing_ok=True)
    return write_lmdb(folder / "data.lmdb", [dump_record(make_fields(number, edges=False)) for number in numbers])


def test_what_is_packed_already_is_left_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same file is not even read again, a copy is compared."""
    caplog.set_level(logging.INFO)
    pack(source, tmp_path / "packed")
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_compare", None)
        assert pack(source, tmp_path / "packed") == 3
    os.utime(source, ns=(0, 0))
    assert pack(source, tmp_path / "packed") == 3
    assert caplog.text.count("data.lmdb is packed already") == 2


def test_folders_that_lmdb_makes_by_default(source: Path, tmp_path: Path) -> None:
    for name in ("a.lmdb", "b.lmdb", "c"):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(source, tmp_path / "data" / name / "data.mdb")
    shutil.copy(source, tmp_path / "data")
    assert pack(tmp_path / "data", tmp_path / "packed") == 12
    for src, records in (("packed", 9), ("packed/c", 3)):
        assert sum(len(PackedFile(path)) for path in resolve_files(tmp_path / src)) == records


def test_other_contents_are_noticed(source: Path, tmp_path: Path) -> None:
    """Also where the file is as large and as old as before, or only begins like it."""
    pack(source, tmp_path / "packed")
    state = source.stat()
    write(tmp_path, 0, 1, 3)
    os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (source.stat().st_size, source.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    with pytest.raises(ValueError, match=r"was packed from another file than .*\(record 2 differs .*\); remove it"):
        pack(source, tmp_path / "packed")
    write(tmp_path, 0, 1)
    with pytest.raises(ValueError, match="it has not 2 records"):
        pack(source, tmp_path / "packed")


def test_what_was_begun_from_other_contents_is_begun_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "publish", Mock(side_effect=KeyboardInterrupt))
        pack(source, tmp_path / "packed")
    write(tmp_path, 0, 1, 3)
    pack(source, tmp_path / "packed")
    assert "was begun from another file and is begun again" in caplog.text
