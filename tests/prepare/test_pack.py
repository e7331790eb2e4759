"""What is packed already: known by its source, which may have been copied, or may have changed since."""

import logging
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import ase.io
import pytest
from ase import Atoms
from ase.constraints import FixAtoms

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


def test_tags_belong_to_what_is_packed(tmp_path: Path) -> None:
    atoms = Atoms("CuO", positions=[[0, 0, 0], [0, 0, 2]], tags=[1, 1], constraint=FixAtoms([0]))
    ase.io.write(tmp_path / "a.traj", atoms)
    pack(tmp_path / "a.traj", tmp_path / "packed", source_format="ase", tags="file")
    with pytest.raises(ValueError, match=r"differs from .* in tags\); remove it"):
        pack(tmp_path / "a.traj", tmp_path / "packed", source_format="ase", tags="fixed")


def test_links_to_folders_are_followed_and_the_packed_ones_left_out(source: Path, tmp_path: Path) -> None:
    for folder in ("data/val_id", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(source, tmp_path / folder)
    (tmp_path / "data" / "val_ood").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").mkdir()
    (tmp_path / "data" / "again" / "val_ood").symlink_to(tmp_path / "elsewhere")  # a split of its own
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "data")
    shutil.copy(source, tmp_path / "data")
    for _ in range(2):
        assert pack(tmp_path / "data", tmp_path / "data" / "packed") == 12


def test_what_is_left_of_a_source_that_is_gone_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.lmdb", "b.lmdb"):
        shutil.copy(source, tmp_path / "data" / name)
    pack(tmp_path / "data", tmp_path / "packed")
    (tmp_path / "data" / "b.lmdb").unlink()
    with pytest.raises(ValueError, match=r"packed: b\.lmdb is packed from no file that is there now; remove it"):
        pack(tmp_path / "data", tmp_path / "packed")


def test_a_name_that_cannot_be_kept_is_said_at_once(tmp_path: Path) -> None:
    atoms = Atoms("O", info={"total-energy": 1.0})
    ase.io.write(tmp_path / "a.extxyz", atoms)
    with pytest.raises(ValueError, match=r"a\.extxyz: structure 0 has a field 'total-energy'; names in packed files"):
        pack(tmp_path / "a.extxyz", tmp_path / "packed", source_format="ase", tags="fixed")
