"""Shards are whole or absent, in OC20's layout, written in few transactions with bounded memory."""

import os
import pickle
import signal
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from faenet_ocp.common.files import remove_leftovers
from faenet_ocp.prepare import lmdb_writer
from faenet_ocp.prepare.lmdb_writer import LmdbShardWriter, encode_record, write_metadata


def read_all(path: Path) -> dict[bytes, bytes]:
    """Everything in a shard, read with lmdb only."""
    with (
        lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        return dict(transaction.cursor())


def number_of_transactions(path: Path) -> int:
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment:
        return environment.info()["last_txnid"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_layout_of_a_shard(tmp_path: Path) -> None:
    for count in (12, 0):
        path = tmp_path / str(count) / "data.lmdb"
        values = [b"record %d" % i for i in range(count)]
        with LmdbShardWriter(path) as writer:
            assert [writer.append(value) for value in values] == list(range(count))
            assert len(writer) == count
        content = read_all(path)
        assert pickle.loads(content.pop(b"length")) == count
        assert content == {str(i).encode(): value for i, value in enumerate(values)}
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
    content = read_all(tmp_path / "data.lmdb")
    assert pickle.loads(content[b"length"]) == 2
    for key in (b"0", b"1"):
        assert content[key][:1] == b"\x80" and content[key][1] >= 4  # pickle protocol
        loaded = pickle.loads(content[key])
        assert "_store" in loaded.__dict__
        assert loaded.to_dict().keys() == record.to_dict().keys()
        assert torch.equal(loaded.pos, record.pos) and torch.equal(loaded.tags, record.tags)
        assert (loaded.natoms, loaded.sid, loaded.y_relaxed) == (2, 7, -1.25)


def test_many_records_go_into_few_transactions(tmp_path: Path) -> None:
    values = [os.urandom(1000) for _ in range(500)]
    for batch_bytes, at_most in ((1 << 25, 1), (100_000, 6), (1, 501)):
        path = tmp_path / f"{batch_bytes}.lmdb"
        with LmdbShardWriter(path, batch_bytes=batch_bytes) as writer:
            for value in values:
                writer.append(value)
        content = read_all(path)
        assert [content[b"%d" % i] for i in range(500)] == values
        assert number_of_transactions(path) <= at_most
    assert number_of_transactions(path) == 501  # the count does see one transaction a record


def test_the_map_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_writer, "_INITIAL_MAP_SIZE", 1 << 16)
    values = [bytes([i]) * (50_000 * (i + 1)) for i in range(30)]  # the first is nearly the map
    with LmdbShardWriter(tmp_path / "data.lmdb", batch_bytes=200_000) as writer:
        for value in values:
            writer.append(value)
    content = read_all(tmp_path / "data.lmdb")
    assert pickle.loads(content[b"length"]) == 30
    assert [content[b"%d" % i] for i in range(30)] == values
    # The file is as large as its content needs, not as the map.
    assert (tmp_path / "data.lmdb").stat().st_size < 2 * sum(map(len, values))


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    batch_bytes = 1 << 20
    tracemalloc.start()
    try:
        with LmdbShardWriter(tmp_path / "data.lmdb", batch_bytes=batch_bytes) as writer:
            for i in range(2000):
                writer.append(bytes([i % 256]) * 20_000)  # 40 MB
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * batch_bytes


def test_the_name_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "data.lmdb"
    writer = LmdbShardWriter(path, batch_bytes=1)
    writer.append(b"old")
    assert not path.exists() and list(tmp_path.glob("*.lmdb")) == []
    writer.close()
    writer.close()  # again: nothing happens
    assert read_all(path)[b"0"] == b"old"

    with pytest.raises(FileExistsError, match=r"data\.lmdb"):
        LmdbShardWriter(path)
    with pytest.raises(KeyError), LmdbShardWriter(path, overwrite=True, batch_bytes=1) as writer:
        writer.append(b"new")
        assert read_all(path)[b"0"] == b"old"
        raise KeyError
    assert read_all(path)[b"0"] == b"old"
    with LmdbShardWriter(path, overwrite=True) as writer:
        writer.append(b"new")
    assert read_all(path)[b"0"] == b"new"
    assert names(tmp_path) == ["data.lmdb"]


def test_a_shard_finished_by_another_writer_in_the_meantime_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "data.lmdb"
    slow, quick = LmdbShardWriter(path), LmdbShardWriter(path)
    slow.append(b"slow")
    quick.append(b"quick")
    quick.close()
    with pytest.raises(FileExistsError):
        slow.close()
    assert read_all(path)[b"0"] == b"quick"
    assert names(tmp_path) == ["data.lmdb"]


def test_data_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    with LmdbShardWriter(tmp_path / "data.lmdb") as writer:
        writer.append(b"value")
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
    command = [sys.executable, "-c", code, str(path)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].startswith(".data.lmdb.")
    assert list(tmp_path.glob("*.lmdb")) == []

    (tmp_path / "notes.tmp").write_text("not ours")
    with LmdbShardWriter(path) as writer:
        writer.append(b"value")
    assert remove_leftovers(tmp_path) == 1
    assert names(tmp_path) == ["data.lmdb", "notes.tmp"]
    assert read_all(path)[b"0"] == b"value"


def test_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    path = write_metadata(folder, natoms=[3, 4, 5])
    assert path == folder / "metadata.npz"
    path = write_metadata(folder, natoms=np.array([3, 4]), neighbors=[30, 40])
    with np.load(path, allow_pickle=False) as metadata:
        assert {name: metadata[name].tolist() for name in metadata.files} == {
            "natoms": [3, 4],
            "neighbors": [30, 40],
        }
    assert names(folder) == ["metadata.npz"]
    with pytest.raises(ValueError, match="one number per record"):
        write_metadata(folder, natoms=[3, 4], neighbors=[30])
    with pytest.raises(ValueError, match="one number per record"):
        write_metadata(folder, natoms=[[3, 4]])  # type: ignore[list-item]
