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
import yaml
from ase.build import fcc111
from faenet_ocp.data.lmdb_records import RecordError, decode_record
from faenet_ocp.data.packed_records import decode_packed, encode_packed, prepare_edges
from test_batch_path import TRANSFORMS, assert_same

import processes
import small_data
from faenet_ocp import build
from faenet_ocp.config.schema import build_config
from faenet_ocp.config.yaml import load_yaml
from faenet_ocp.data import edges as record_edges
from faenet_ocp.data.lmdb_files import LmdbFile
from faenet_ocp.data.loader import TrainBatchSampler, make_loader
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.data.packed import OC20PackedDataset, PackedFile
from faenet_ocp.graph import lists as edge_lists
from faenet_ocp.prepare import pack as packing
from faenet_ocp.prepare.pack import pack
from small_data import dump_record, make_fields, write_lmdb

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "pack_lmdb.py"
GRAPH = {"cutoff": 6.0, "max_neighbors": 40}


def both(original: Path, packed: Path, **config: Any) -> tuple[OC20LmdbDataset, OC20PackedDataset]:
    return (
        OC20LmdbDataset({"src": str(original), **GRAPH, **config}),
        OC20PackedDataset({"src": str(packed), **GRAPH, **config}),
    )


def assert_equal_samples(original: OC20LmdbDataset, packed: OC20PackedDataset) -> None:
    assert len(original) == len(packed)
    for index in range(len(original)):
        left, right = original[1, index], packed[1, index]
        assert left.keys() == right.keys()
        for name, value in left:
            same = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
            assert same, name
    keys = [(1, index) for index in np.random.default_rng(0).permutation(len(original)).tolist()]
    assert_same(packed.load_batch(keys), original.load_batch(keys))


def contents(path: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        return dict(txn.cursor())


def write(folder: Path, *records: dict[str, Any]) -> Path:
    return write_lmdb(folder / "data.lmdb", [dump_record(record) for record in records])


@pytest.fixture(scope="module")
def packed_is2re(small_is2re: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    assert pack(small_is2re, folder) == 12 + 4 * 4
    return folder


# The same samples


@pytest.mark.parametrize("config", [{}, {"key_mapping": {"y_init": "energy"}}, {"labels": []}, {"dtype": "float64"}])
@pytest.mark.parametrize("transforms", ["none", "stochastic"])
def test_is2re_samples_are_the_same(small_is2re: Path, packed_is2re: Path, config: dict, transforms: str) -> None:
    for split in ("train", "val_id"):
        path = f"is2re/all/{split}/data.lmdb"
        config = {**config, "transforms": TRANSFORMS[transforms]}
        assert_equal_samples(*both(small_is2re / path, packed_is2re / path, **config))


@pytest.mark.parametrize("edges", ["stored", "recompute", "none"])
def test_s2ef_samples_of_all_eras_are_the_same(small_s2ef: Path, tmp_path: Path, edges: str) -> None:
    """Two shards: one with edges and old labels, one without edges and with new labels."""
    folder = small_s2ef / "s2ef/2M/train"
    pack(folder, tmp_path)
    original, packed = both(folder, tmp_path, labels=["energy", "forces"], edges=edges, max_neighbors=12)
    assert_equal_samples(original, packed)
    assert packed[0].fid.tolist() == [0] and packed[7].fid.tolist() == [7]
    assert packed.natoms().tolist() == original.natoms().tolist()
    with np.load(tmp_path / "metadata.npz") as metadata:
        assert metadata["natoms"].tolist() == original.natoms().tolist()
        records = [decode_record(file.read(position)) for file in original.files for position in range(len(file))]
        expected = [len(record["cell_offsets"]) if "cell_offsets" in record else 0 for record in records]
        assert metadata["neighbors"].tolist() == expected


def test_the_oc20_sample_is_the_same_and_small(oc20_sample: Path, tmp_path: Path) -> None:
    assert pack(oc20_sample, tmp_path) == 72 + 48 + 4 * len(
        OC20LmdbDataset({"src": str(oc20_sample / "s2ef/all/val_id"), "edges": "none"})
    )
    for path in ("is2re/all/train", "is2re/all/val_ood_cat", "s2ef/2M/train"):
        labels = ["energy", "forces"] if path.startswith("s2ef") else ["energy"]
        assert_equal_samples(
            *both(oc20_sample / path, tmp_path / path, transforms=TRANSFORMS["stochastic"], labels=labels)
        )
    sizes = [(root / "is2re/all/train/data.lmdb").stat().st_size for root in (tmp_path, oc20_sample)]
    assert sizes[0] < sizes[1] / 3


def unrelaxed_slab(seed: int) -> dict[str, Any]:
    """A slab full of equal distances, with OC20's strict cut at 50 neighbours, inside a shell of inner atoms."""
    atoms = fcc111("Cu", size=(2, 2, 4), vacuum=8.0)
    atoms.pbc = True
    atoms = atoms[np.random.default_rng(seed).permutation(16)]
    edge_index, shift, _ = small_data.stored_edges(atoms)
    fields = {"pos": atoms.positions, "cell": atoms.cell.array, "atomic_numbers": atoms.numbers, "y": np.array([0.5])}
    fields |= {"tags": np.arange(16) % 3, "edge_index": edge_index, "cell_offsets": shift.astype(np.float32)}
    return {name: torch.tensor(item) for name, item in fields.items()}


@pytest.mark.parametrize("max_neighbors", [12, 40, 48, 49, 50, 51, 70])
def test_broken_shells_are_completed_without_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_neighbors: int
) -> None:
    source = write(tmp_path, *(unrelaxed_slab(seed) for seed in range(3)))
    pack(source, tmp_path / "packed")
    for dtype in ("float32", "float64"):
        original, packed = both(source, tmp_path / "packed", max_neighbors=max_neighbors, dtype=dtype)
        keys = [(0, 2), (0, 0), (0, 1)]
        expected = original.load_batch(keys)
        with monkeypatch.context() as patched:
            patched.setattr(record_edges, "find_edges", None)
            patched.setattr(edge_lists, "search", None)
            assert_same(packed.load_batch(keys), expected)
            if max_neighbors in (40, 48, 49, 50):
                with pytest.raises(TypeError):  # negative control: without these edges there is a search
                    original.load_batch(keys)


def test_shuffled_batches_from_several_workers_are_the_same(small_is2re: Path, packed_is2re: Path) -> None:
    path = "is2re/all/train"
    original, packed = both(small_is2re / path, packed_is2re / path, transforms=TRANSFORMS["stochastic"])
    found = []
    for dataset, num_workers in ((original, 0), (packed, 2)):
        sampler = TrainBatchSampler(len(dataset), 5, seed=3)
        sampler.set_epoch_and_start_iteration(4, 0)
        found.append([batch for (batch,) in make_loader(dataset, sampler, num_workers=num_workers)])
    for expected, batch in zip(*found, strict=True):
        assert_same(batch, expected)


def test_the_config_names_the_format(small_is2re: Path, packed_is2re: Path, tmp_path: Path) -> None:
    raw = load_yaml(ROOT / "configs/is2re/faenet.yml")
    raw["dataset"] |= {"format": "oc20_packed", "root": str(packed_is2re)}
    config = build_config(raw)
    dataset = build.make_dataset(config, config.dataset.train, training=True)
    assert type(dataset) is OC20PackedDataset
    assert dataset[0].frame_rot.shape == (1, 1, 3, 3)


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
    for wrong in ({"pos": np.full((13, 3), np.nan)}, {"cell": np.zeros((1, 3, 3))}, {"cell_offsets": None}):
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


def test_a_flipped_byte_is_named(packed_is2re: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.lmdb"
    shutil.copy(packed_is2re / "is2re/all/train/data.lmdb", path)
    content = bytearray(path.read_bytes())
    record = contents(path)[b"3"]
    content[content.index(record[:200]) + len(record) // 2] ^= 4
    path.write_bytes(content)
    dataset = OC20PackedDataset({"src": str(path), **GRAPH})
    with pytest.raises(RecordError, match=r"data.lmdb: record 3 is damaged: its checksum is wrong .*sid 3\)"):
        dataset[3]
    assert dataset[4].sid == ["4"]
    (batches,) = make_loader(dataset, [[(0, 2), (0, 3)]], num_workers=0)  # type: ignore[arg-type]
    assert batches.kept == [0] and "checksum" in batches.bad[0].reason


def test_a_truncated_file_is_named(packed_is2re: Path, tmp_path: Path) -> None:
    content = (packed_is2re / "is2re/all/train/data.lmdb").read_bytes()
    (tmp_path / "data.lmdb").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"data\.lmdb: is cut short"):
        OC20PackedDataset({"src": str(tmp_path), **GRAPH})


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
        OC20LmdbDataset({"src": str(packed_is2re / path), **GRAPH})
    with pytest.raises(ValueError, match=r"is no file of scripts/pack_lmdb.py; try dataset.format: oc20_lmdb"):
        OC20PackedDataset({"src": str(small_is2re / path), **GRAPH})


# The converter


def test_processes_do_not_change_what_is_written(small_is2re: Path, packed_is2re: Path, tmp_path: Path) -> None:
    source = small_is2re / "is2re/all/train"
    command = [
        sys.executable,
        str(SCRIPT),
        "--data-path",
        str(source),
        "--out-path",
        str(tmp_path),
        "--num-workers",
        "2",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "12 records" in result.stderr and "packing data.lmdb: 100%" in result.stderr
    assert contents(tmp_path / "data.lmdb") == contents(packed_is2re / "is2re/all/train/data.lmdb")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".packing.lock", "data.lmdb", "metadata.npz"]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "data.lmdb is packed already" in again.stderr


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
        OC20PackedDataset({"src": str(tmp_path), **GRAPH})
    encoded: list[int] = []
    encode = packing._encode
    monkeypatch.setattr(
        packing, "_encode", lambda file, start, stop: encoded.append(start) or encode(file, start, stop)
    )
    assert pack(source, tmp_path) == 12
    assert encoded == [2 * calls]  # what was there is not packed again
    assert contents(tmp_path / "data.lmdb") == contents(packed_is2re / "is2re/all/train/data.lmdb")
    assert not list(tmp_path.glob(".*partial"))


def test_a_file_begun_from_another_source_is_begun_again(small_is2re: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_pack_and_die, args=(small_is2re / "is2re/all/train", tmp_path, 2)
    )
    process.start()
    process.join(60)
    source = small_is2re / "is2re/all/val_id"
    assert pack(source, tmp_path) == 4
    assert_equal_samples(*both(source, tmp_path))


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
    with pytest.raises(ValueError, match=r"no \*.lmdb file"):
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


def test_a_run_on_packed_data_trains_as_on_the_original(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from faenet_ocp.launch.cli import main

    root = processes.write_data(tmp_path / "data", num_train=12)
    pack(root, tmp_path / "packed")
    losses = []
    for name, form in (("data", "oc20_lmdb"), ("packed", "oc20_packed")):
        config = processes.write_config(tmp_path / f"{name}.yml", tmp_path / name)
        content = yaml.safe_load(config.read_text())
        content["dataset"]["format"] = form
        config.write_text(yaml.safe_dump(content))
        assert main(["--config", str(config), "--identifier", name]) == 0, capsys.readouterr().err
        (path,) = tmp_path.rglob(f"{name}/results/metrics.json")
        losses.append(json.loads(path.read_text())["splits"])
    for split, values in losses[0].items():
        assert {k: v for k, v in values.items() if "mae" in k} == {
            k: v for k, v in losses[1][split].items() if "mae" in k
        }


def test_the_source_is_only_read(small_is2re: Path, tmp_path: Path) -> None:
    before = sorted(path for path in small_is2re.rglob("*"))
    pack(small_is2re / "is2re/all/val_id", tmp_path)
    assert sorted(path for path in small_is2re.rglob("*")) == before
    assert len(LmdbFile(small_is2re / "is2re/all/val_id/data.lmdb")) == 4
