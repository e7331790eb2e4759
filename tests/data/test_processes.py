"""Samples are the same in any process and thread; sizes of systems are read once."""

import logging
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from data_sets import TRANSFORMS, assert_same, open_dataset
from faenet_ocp.common.checks import RecordError
from faenet_ocp.data import oc20
from faenet_ocp.data.lmdb_files import LmdbFile
from faenet_ocp.data.loader import make_loader
from small_data import dump_record, make_fields, write_items

KEYS = [(5, index) for index in range(12)]


@pytest.mark.parametrize(
    ("context", "num_workers", "already_read"),
    [("fork", 1, True), ("fork", 2, True), ("fork", 2, False), ("spawn", 1, True)],
)
def test_workers_give_the_samples_of_one_process(
    small_is2re: Path, context: str, num_workers: int, already_read: bool
) -> None:
    """Also when the parent has read before the fork, and when it reads meanwhile."""
    dataset, other = (
        open_dataset(small_is2re / "is2re/all/train", transforms=TRANSFORMS["stochastic"], seed=3) for _ in range(2)
    )
    if already_read:
        _ = dataset[0]
    loader = make_loader(dataset, [[key] for key in KEYS], num_workers=num_workers, context=context)
    for key, (batch,) in zip(KEYS, loader, strict=True):
        assert_same(batch, other.load_batch([key]))
        assert_same(dataset.load_batch([key]), batch)


def test_two_readers_and_many_threads_at_once(small_is2re: Path) -> None:
    path = small_is2re / "is2re/all/train/data.lmdb"
    first, second = open_dataset(path), open_dataset(path)
    expected = [first[key] for key in KEYS]
    read: list[int] = []

    def compare() -> None:
        for key, sample in zip(KEYS, expected, strict=True):
            assert_same(first[key], sample)
            assert_same(second[key], sample)
            read.append(key[1])

    threads = [threading.Thread(target=compare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 4 * len(KEYS)


def test_pickled_data_sets_open_their_files_anew(small_is2re: Path) -> None:
    dataset = open_dataset(small_is2re / "is2re/all/val_id", transforms=TRANSFORMS["stochastic"])
    sample = dataset[1]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.files[0]._env is None and dataset.files[0]._env is not None
    assert_same(copy[1], sample)


# Sizes


def test_opening_reads_no_record(small_is2re: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LmdbFile, "read", None)
    monkeypatch.setattr(oc20, "decode_record", None)
    dataset = open_dataset([small_is2re / "is2re/all/train", small_is2re / "is2re/all/val_id"])
    assert len(dataset) == 16
    assert not dataset.metadata_hasattr("natoms")
    assert dataset.indices.tolist() == list(range(16))


def test_sizes_come_from_metadata_beside_the_files(
    small_is2re: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val_id"):
        shutil.copytree(small_is2re / "is2re/all" / split, tmp_path / split)
    folders = [tmp_path / "train", tmp_path / "val_id"]
    true = [int(sample.natoms) for sample in open_dataset(folders)]
    np.savez(tmp_path / "train/metadata.npz", natoms=np.array(true[:12]), neighbors=np.arange(12))
    assert not open_dataset(folders).metadata_hasattr("natoms")  # one folder lacks it
    np.savez(tmp_path / "val_id/metadata.npz", natoms=np.array(true[12:]))
    monkeypatch.setattr(LmdbFile, "read", None)
    dataset = open_dataset(folders)
    assert dataset.natoms().tolist() == true
    assert dataset.get_metadata("natoms", [0, 13]) == [true[0], true[13]]
    assert not dataset.metadata_hasattr("neighbors")


def test_metadata_are_in_the_order_of_the_folder(small_is2re: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("data.0.lmdb", "data.1.lmdb")]
    for split, file in zip(("train", "val_id"), files, strict=True):
        shutil.copy(small_is2re / "is2re/all" / split / "data.lmdb", file)
    true = [[int(sample.natoms) for sample in open_dataset(file)] for file in files]
    np.savez(tmp_path / "metadata.npz", natoms=np.concatenate(true))
    assert open_dataset(tmp_path).natoms().tolist() == true[0] + true[1]
    assert open_dataset(files[::-1]).natoms().tolist() == true[1] + true[0]


def test_metadata_that_does_not_fit_would_run_something_or_is_damaged(
    small_is2re: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(small_is2re / "is2re/all/val_id", tmp_path / "a")
    path = tmp_path / "a/metadata.npz"
    np.savez(path, natoms=np.arange(5))
    with caplog.at_level(logging.WARNING):
        assert not open_dataset(tmp_path / "a").metadata_hasattr("natoms")
    assert "metadata.npz is not used: it has no natoms for exactly the 4 records" in caplog.text
    np.savez(path, natoms=np.array([{}, 1, 2, 3], dtype=object))
    with pytest.raises(ValueError, match=r"metadata.npz: cannot be read: .*allow_pickle"):
        open_dataset(tmp_path / "a").natoms()
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"metadata.npz: cannot be read"):
        open_dataset(tmp_path / "a").natoms()


def test_sizes_are_collected_once_and_cached_until_the_file_changes(
    small_is2re: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_is2re / "is2re/all/val_id", tmp_path / "data")
    path, cache = tmp_path / "data/data.lmdb", tmp_path / "run/cache"
    dataset = open_dataset(path, cache_dir=str(cache), transforms={"remove_subsurface": {}})
    true = [int(sample.natoms) for sample in open_dataset(path)]
    assert not cache.exists()  # nothing is collected unless asked for
    assert dataset.natoms().tolist() == true  # before transforms
    assert dataset.metadata_hasattr("natoms") and dataset.get_metadata("natoms", 2) == true[2]
    (kept,) = cache.iterdir()
    assert kept.suffix == ".npy" and [p.name for p in path.parent.iterdir()] == ["data.lmdb"]
    with monkeypatch.context() as patch:
        patch.setattr(LmdbFile, "read", None)
        assert open_dataset(path, cache_dir=str(cache)).natoms().tolist() == true
    state, before = path.stat(), dataset.fingerprint()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # as large and as old as before
    after = dataset.fingerprint()
    assert after["files"] != before["files"] and after["content"] == before["content"]
    assert not open_dataset(path, cache_dir=str(cache)).metadata_hasattr("natoms")
    assert open_dataset(path, cache_dir=str(cache)).natoms().tolist() == true
    assert len(list(cache.iterdir())) == 2


def test_collecting_sizes_names_a_bad_record(tmp_path: Path) -> None:
    path = write_items(tmp_path / "data.lmdb", {b"0": dump_record(make_fields(0)), b"1": b"nothing"})
    with pytest.raises(RecordError, match=r"data.lmdb: record 1 "):
        open_dataset(path).natoms()
