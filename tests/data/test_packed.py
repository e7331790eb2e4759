"""Packed files: the same samples to the last bit, damage that is noticed, a converter that can be killed."""

import json
import multiprocessing
import os
import pickletools
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch

import small_data
from data_sets import TRANSFORMS, assert_same, open_dataset, unrelaxed_slab, write
from faenet_ocp.common.checks import RecordError
from faenet_ocp.data import edges as edges_module
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.data.packed import OC20PackedDataset, PackedFile, decode_packed, encode_packed, prepare_edges
from faenet_ocp.data.records import decode_record
from faenet_ocp.prepare import pack as packing
from faenet_ocp.prepare.pack import pack
from small_data import dump_record, make_fields, write_lmdb

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pack.py"


def assert_equal_samples(original: Path, packed: Path, **config: Any) -> tuple[OC20LmdbDataset, OC20LmdbDataset]:
    """Of a shuffled batch in each format; that a batch is its samples is tested elsewhere."""
    left, right = open_dataset(original, **config), open_dataset(packed, OC20PackedDataset, **config)
    assert len(left) == len(right)
    keys = [(1, index) for index in np.random.default_rng(0).permutation(len(left)).tolist()]
    assert_same(right.load_batch(keys), left.load_batch(keys))
    return left, right


def contents(path: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        return dict(txn.cursor())


@pytest.fixture(scope="module")
def packed_is2re(small_is2re: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    assert pack(small_is2re, folder) == 12 + 4 * 4
    return folder


# The same samples


@pytest.mark.parametrize("config", [{}, {"key_mapping": {"y_init": "energy"}}, {"labels": []}, {"dtype": "float64"}])
@pytest.mark.parametrize("transforms", ["none", "stochastic"])
def test_is2re_samples_are_the_same(small_is2re: Path, packed_is2re: Path, config: dict, transforms: str) -> None:
    for path in ("is2re/all/train/data.lmdb", "is2re/all/val_id"):
        assert_equal_samples(small_is2re / path, packed_is2re / path, transforms=TRANSFORMS[transforms], **config)


@pytest.mark.parametrize("edges", ["stored", "recompute", "none"])
def test_s2ef_samples_of_all_eras_are_the_same(small_s2ef: Path, tmp_path: Path, edges: str) -> None:
    """Two shards: one with edges and old labels, one without edges and with new labels."""
    folder = small_s2ef / "s2ef/2M/train"
    pack(folder, tmp_path)
    options = {"labels": ["energy", "forces"], "edges": edges, "max_neighbors": 12}
    original, packed = assert_equal_samples(folder, tmp_path, **options)
    assert packed[0].fid.tolist() == [0] and packed[7].fid.tolist() == [7]
    assert packed.natoms().tolist() == original.natoms().tolist()
    with np.load(tmp_path / "metadata.npz") as metadata:
        assert metadata["natoms"].tolist() == original.natoms().tolist()
        records = [decode_record(file.read(position)) for file in original.files for position in range(len(file))]
        expected = [len(record["cell_offsets"]) if "cell_offsets" in record else 0 for record in records]
        assert metadata["neighbors"].tolist() == expected


def test_the_oc20_sample_is_the_same_and_small(oc20_sample: Path, tmp_path: Path) -> None:
    for path in ("is2re/all/train", "s2ef/2M/train"):
        pack(oc20_sample / path, tmp_path / path)
        labels = ["energy", "forces"] if path.startswith("s2ef") else ["energy"]
        assert_equal_samples(oc20_sample / path, tmp_path / path, transforms=TRANSFORMS["stochastic"], labels=labels)
    sizes = [(root / "is2re/all/train/data.lmdb").stat().st_size for root in (tmp_path, oc20_sample)]
    assert sizes[0] < sizes[1] / 3


@pytest.mark.parametrize("max_neighbors", [12, 40, 49, 50, 70])
def test_broken_shells_are_completed_without_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_neighbors: int
) -> None:
    source = write(tmp_path, *(unrelaxed_slab(np.random.default_rng(seed).permutation(16)) for seed in range(3)))
    pack(source, tmp_path / "packed")
    for dtype in ("float32", "float64"):
        options: dict[str, Any] = {"max_neighbors": max_neighbors, "dtype": dtype}
        original, packed = (
            open_dataset(source, **options),
            open_dataset(tmp_path / "packed", OC20PackedDataset, **options),
        )
        expected = original.load_batch([2, 0, 1])
        with monkeypatch.context() as patched:
            patched.setattr(edges_module, "find_edges", None)
            assert_same(packed.load_batch([2, 0, 1]), expected)
            if max_neighbors in (40, 49, 50):
                with pytest.raises(TypeError):  # negative control: without these edges there is a search
                    original.load_batch([2, 0, 1])


# Records


RECORDS = {
    "is2re": make_fields(0),
    "s2ef, no edges": make_fields(1, task="s2ef_new", edges=False),
    "test data": {name: item for name, item in make_fields(2).items() if not name.startswith(("y", "force", "pos_"))},
    "text": make_fields(0, edges=False) | {"sid": "zwölf", "pbc": torch.tensor([True, True, False])},
    "doubles": make_fields(0) | {"pos": torch.rand(13, 3, dtype=torch.float64)},
    "odd fields": {
        "pos": torch.rand(2, 3),
        "fixed": torch.tensor([0.5, 1.0]),
        "tags": torch.tensor([-1, 300]),
        "big": torch.tensor([2**40, -(2**40)]),
        "empty": torch.zeros(0, 4),
        "table": torch.rand(2, 5, 2),
        "flag": torch.tensor([True, False]),
        "nan": float("nan"),
        "half": torch.rand(3).half(),
        "number": -7,
    },
}


@pytest.mark.parametrize("kind", list(RECORDS))
def test_nothing_is_lost(kind: str) -> None:
    fields = decode_record(dump_record(RECORDS[kind]))
    packed = decode_packed(encode_packed(fields))
    assert packed.keys() == fields.keys() - {"distances"}
    for name, item in packed.items():
        assert type(item) is type(fields[name]), name
        assert np.array_equal(item, fields[name], equal_nan=name == "nan"), name
        assert np.shape(item) == np.shape(fields[name]), name


def test_a_packed_record_is_no_pickle_and_its_arrays_are_small() -> None:
    fields = decode_record(dump_record(make_fields(0)))
    value = encode_packed(fields)
    with pytest.raises((ValueError, IndexError)):
        list(pickletools.genops(value))
    packed = decode_packed(value)
    types = {name: packed[name].dtype.str for name in ("pos", "edge_index", "cell_offsets", "atomic_numbers", "tags")}
    assert types == {"pos": "<f4", "edge_index": "|u1", "cell_offsets": "|i1", "atomic_numbers": "|u1", "tags": "|u1"}
    assert encode_packed(packed) == value


def test_what_cannot_be_packed_is_an_error() -> None:
    with pytest.raises(RecordError, match="has a field 'notes' that is neither numbers nor text"):
        encode_packed({"pos": np.zeros((1, 3)), "notes": ["a"]})


def test_records_without_a_geometry_get_no_further_edges() -> None:
    fields = decode_record(dump_record(make_fields(0)))
    assert "shell_index" in prepare_edges(fields)
    odd = np.full((464, 3), np.nan)
    for wrong in ({"pos": odd[:13]}, {"cell": np.ones((1, 3, 3))}, {"cell_offsets": None}, {"cell_offsets": odd}):
        assert "shell_index" not in prepare_edges({**fields, **wrong})
    assert "shell_index" not in prepare_edges(decode_record(dump_record(make_fields(0, edges=False))))


def test_every_flipped_byte_is_noticed() -> None:
    value = encode_packed(decode_record(dump_record(make_fields(0))))
    for place in [*range(400), *range(400, len(value), 97), len(value) - 1]:
        with pytest.raises(RecordError):
            decode_packed(value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :])
    for wrong in (value[:-1], value + b"\x00", b"", value[:6]):
        with pytest.raises(RecordError):
            decode_packed(wrong)


# Files


def test_a_damaged_header_or_version_is_named(packed_is2re: Path, tmp_path: Path) -> None:
    items = contents(packed_is2re / "is2re/all/val_id/data.lmdb")
    header = items[b"packed"]
    for name, wrong, message in (
        ("a", header[:-1] + b"?", "its header is damaged"),
        ("b", _with_checksum(json.dumps({**json.loads(header[4:]), "version": 7}).encode()), "in version 7"),
        ("c", _with_checksum(json.dumps({**json.loads(header[4:]), "count": 9}).encode()), "9 records, but some are"),
    ):
        small_data.write_items(tmp_path / f"{name}.lmdb", {**items, b"packed": wrong})
        with pytest.raises(ValueError, match=message):
            PackedFile(tmp_path / f"{name}.lmdb")


def _with_checksum(text: bytes) -> bytes:
    return zlib.crc32(text).to_bytes(4, "little") + text


def test_the_wrong_format_is_named(small_is2re: Path, packed_is2re: Path) -> None:
    path = "is2re/all/train/data.lmdb"
    with pytest.raises(ValueError, match=r"is a packed file: dataset\.format: oc20_packed"):
        open_dataset(packed_is2re / path)
    with pytest.raises(ValueError, match=r"is no file of scripts/pack.py; try dataset.format: oc20_lmdb"):
        open_dataset(small_is2re / path, OC20PackedDataset)


# The converter


@pytest.mark.slow
def test_processes_do_not_change_what_is_written(small_is2re: Path, packed_is2re: Path, tmp_path: Path) -> None:
    source = small_is2re / "is2re/all/train"
    command = [sys.executable, str(SCRIPT), "--data-path", str(source), "--out-path", str(tmp_path)]
    command += ["--num-workers", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "12 records" in result.stderr and "packing data.lmdb: 100%" in result.stderr
    assert contents(tmp_path / "data.lmdb") == contents(packed_is2re / "is2re/all/train/data.lmdb")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".packing.lock", "data.lmdb", "metadata.npz"]


def _pack_and_die(source: Path, out: Path, calls: int) -> None:
    """Packs a few records at a time and is killed in the middle."""
    encode, done = packing._encode, []

    def deadly(*task: Any) -> Any:
        if len(done) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(task)
        return encode(*task)

    packing._RECORDS_PER_TASK, packing._encode = 2, deadly
    pack(source, out)


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_a_killed_converter_is_resumed(
    small_is2re: Path, packed_is2re: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    source = small_is2re / "is2re/all/train"
    process = multiprocessing.get_context("fork").Process(target=_pack_and_die, args=(source, tmp_path, calls))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.lmdb")) and (tmp_path / ".data.lmdb.partial").exists()
    with pytest.raises(FileNotFoundError):
        open_dataset(tmp_path, OC20PackedDataset)
    encoded: list[int] = []
    encode = packing._encode
    monkeypatch.setattr(
        packing, "_encode", lambda file, start, stop: encoded.append(start) or encode(file, start, stop)
    )
    assert pack(source, tmp_path) == 12
    assert encoded == [2 * calls]  # what was there is not packed again
    assert contents(tmp_path / "data.lmdb") == contents(packed_is2re / "is2re/all/train/data.lmdb")
    assert not list(tmp_path.glob(".*partial"))


def test_what_was_written_wrongly_gets_no_name(
    small_is2re: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_is2re / "is2re/all/val_id"

    def wrong(fields: dict[str, Any]) -> bytes:
        return encode_packed({**fields, "pos": fields["pos"] + (fields["sid"] == 1002)})

    with monkeypatch.context() as patched:
        patched.setattr(packing, "encode_packed", wrong)
        with pytest.raises(RuntimeError, match=r"record 2 differs from .*data.lmdb in pos; remove .*partial"):
            pack(source, tmp_path)
    assert not list(tmp_path.glob("*.lmdb")) and not (tmp_path / "metadata.npz").exists()


def test_a_record_that_cannot_be_read_is_named(small_is2re: Path, tmp_path: Path) -> None:
    values = [dump_record(make_fields(0)), dump_record(make_fields(1))[:-20]]
    source = write_lmdb(tmp_path / "data.lmdb", values)
    with pytest.raises(ValueError, match=r"data.lmdb: record 1 "):
        pack(source, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("*.lmdb"))


def test_wrong_places(small_is2re: Path, packed_is2re: Path, tmp_path: Path) -> None:
    source = small_is2re / "is2re/all/train"
    with pytest.raises(ValueError, match="is the folder of the data"):
        pack(source, source)
    with pytest.raises(ValueError, match=r"no file \(\*.lmdb"):
        pack(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="num_workers: 0"):
        pack(source, tmp_path, num_workers=0)
    (tmp_path / "out").mkdir()
    shutil.copy(packed_is2re / "is2re/all/val_id/data.lmdb", tmp_path / "out" / "data.lmdb")
    with pytest.raises(ValueError, match="was packed from another file"):
        pack(source, tmp_path / "out")
    lock = packing.exclusive(tmp_path / packing.LOCK_NAME, tmp_path)
    with lock, pytest.raises(ValueError, match="another process is writing there"):
        pack(source, tmp_path)
