"""Shards are whole or absent, in OC20's layout, written in few transactions with bounded memory."""

import os
import pickle
import stat
import sys
import tracemalloc
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from torch_geometric.data import Data

import processes
from faenet_ocp.common.files import remove_leftovers
from faenet_ocp.prepare import lmdb_writer
from faenet_ocp.prepare.lmdb_writer import LmdbShardWriter, encode_record, write_metadata


def read_all(path: Path) -> tuple[list[bytes], int]:
    """The records of a shard by their keys, and the number of its transactions, read with lmdb only."""
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment, environment.begin() as reading:
        content = dict(reading.cursor())
        transactions = environment.info()["last_txnid"]
    count = pickle.loads(content.pop(b"length"))
    assert content.keys() == {b"%d" % key for key in range(count)}
    return [content[b"%d" % key] for key in range(count)], transactions


def write(path: Path, *values: bytes | Data, **options: object) -> None:
    with LmdbShardWriter(path, **options) as writer:
        assert [writer.append(value) for value in values] == list(range(len(values)))
        assert len(writer) == len(values)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("count", [12, 0])
def test_layout_of_a_shard(tmp_path: Path, count: int) -> None:
    path, values = tmp_path / "train" / "data.lmdb", [b"record %d" % i for i in range(count)]
    write(path, *values)
    assert read_all(path)[0] == values
    assert names(path.parent) == ["data.lmdb"]  # no lock file, no temporary file
    assert path.stat().st_mode & 0o777 == 0o644


def test_data_is_pickled_in_the_pyg_2_layout(tmp_path: Path) -> None:
    record = Data(pos=torch.arange(6.0).view(2, 3), natoms=2, sid=7, y_relaxed=-1.25, tags=torch.tensor([1, 2]))
    with LmdbShardWriter(tmp_path / "data.lmdb") as writer:
        writer.append(record)
        writer.append(encode_record(record))
        with pytest.raises(ValueError, match="bytes or Data, got dict"):
            writer.append({"pos": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="already closed"):
        writer.append(b"late")
    values = read_all(tmp_path / "data.lmdb")[0]
    assert len(values) == 2
    for value in values:
        assert value[:1] == b"\x80" and value[1] >= 4  # pickle protocol
        loaded = pickle.loads(value)
        assert "_store" in loaded.__dict__
        assert not processes.differences(loaded.to_dict(), record.to_dict())


def test_many_records_go_into_few_transactions(tmp_path: Path) -> None:
    values = [os.urandom(1000) for _ in range(500)]
    for batch_bytes, at_least, at_most in ((1 << 25, 1, 1), (100_000, 2, 6), (1, 501, 501)):
        path = tmp_path / f"{batch_bytes}.lmdb"
        write(path, *values, batch_bytes=batch_bytes)
        found, transactions = read_all(path)
        assert found == values and at_least <= transactions <= at_most


def test_the_map_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the file is as large as its content needs, not as the map."""
    monkeypatch.setattr(lmdb_writer, "_INITIAL_MAP_SIZE", 1 << 16)
    values = [bytes([i]) * (50_000 * (i + 1)) for i in range(30)]  # the first is nearly the map
    write(tmp_path / "data.lmdb", *values, batch_bytes=200_000)
    assert read_all(tmp_path / "data.lmdb")[0] == values
    assert (tmp_path / "data.lmdb").stat().st_size < 2 * sum(map(len, values))


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        with LmdbShardWriter(tmp_path / "data.lmdb", batch_bytes=1 << 20) as writer:
            for i in range(2000):
                writer.append(bytes([i % 256]) * 20_000)  # 40 MB
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


def test_the_name_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "data.lmdb"
    writer = LmdbShardWriter(path, batch_bytes=1)
    writer.append(b"old")
    assert list(tmp_path.glob("*.lmdb")) == []
    writer.close()
    writer.close()  # again: nothing happens
    with pytest.raises(FileExistsError, match=r"data\.lmdb"):
        LmdbShardWriter(path)
    with pytest.raises(KeyError), LmdbShardWriter(path, overwrite=True, batch_bytes=1) as writer:
        writer.append(b"new")
        raise KeyError
    assert read_all(path)[0] == [b"old"]
    write(path, b"new", overwrite=True)
    assert read_all(path)[0] == [b"new"]
    assert names(tmp_path) == ["data.lmdb"]


def test_a_shard_finished_by_another_writer_in_the_meantime_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "data.lmdb"
    slow = LmdbShardWriter(path)
    slow.append(b"slow")
    write(path, b"quick")
    with pytest.raises(FileExistsError):
        slow.close()
    assert read_all(path)[0] == [b"quick"] and names(tmp_path) == ["data.lmdb"]


def test_data_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    write(tmp_path / "data.lmdb", b"value")
    assert calls == ["fsync file", "replace", "fsync folder"]


def test_a_killed_writer_leaves_only_a_hidden_file(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from faenet_ocp.prepare.lmdb_writer import LmdbShardWriter\n"
        "writer = LmdbShardWriter(sys.argv[1], batch_bytes=1)\n"
        "for i in range(100):\n"
        "    writer.append(b'x' * 10_000)\n"
        "print('written', flush=True)\n"
        "time.sleep(600)\n"
    )
    path = tmp_path / "data.lmdb"
    with processes.start([str(path)], program=[sys.executable, "-c", code], cwd=processes.ROOT) as process:
        assert process.stdout.readline() == "written\n"
        process.kill()
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].startswith(".data.lmdb.")
    assert list(tmp_path.glob("*.lmdb")) == []
    (tmp_path / "notes.tmp").write_text("not ours")
    write(path, b"value")
    assert remove_leftovers(tmp_path) == 1
    assert names(tmp_path) == ["data.lmdb", "notes.tmp"]
    assert read_all(path)[0] == [b"value"]


def test_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    assert write_metadata(folder, natoms=[3, 4, 5]) == folder / "metadata.npz"
    with np.load(write_metadata(folder, natoms=np.array([3, 4]), neighbors=[30, 40]), allow_pickle=False) as metadata:
        assert {name: item.tolist() for name, item in metadata.items()} == {"natoms": [3, 4], "neighbors": [30, 40]}
    assert names(folder) == ["metadata.npz"]
    for wrong in ({"natoms": [3, 4], "neighbors": [30]}, {"natoms": [[3, 4]]}):
        with pytest.raises(ValueError, match="one number per record"):
            write_metadata(folder, **wrong)  # type: ignore[arg-type]
