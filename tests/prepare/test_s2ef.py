"""From OC20's S2EF text files to LMDB shards: records compared with ASE's, interrupted and restarted."""

import fcntl
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.neighborlist import neighbor_list
from torch_geometric.data import Data

import processes
from data_sets import edge_set
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.prepare import s2ef as module
from faenet_ocp.prepare.extxyz import FormatError
from faenet_ocp.prepare.s2ef import Options, prepare
from neighbors_by_hand import cut_by_hand
from s2ef_raw import COLUMNS, by_ase, read, write, write_raw
from small_data import read_records

SCRIPT = processes.ROOT / "scripts" / "prepare_s2ef.py"
FIELDS = {"atomic_numbers", "pos", "cell", "natoms", "tags", "fixed", "sid", "fid"}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of four frames, compressed."""
    return write_raw(tmp_path_factory.mktemp("s2ef") / "raw")


@pytest.fixture
def own_raw(tmp_path: Path) -> Path:
    """Three uncompressed files of four frames, to be damaged."""
    return write_raw(tmp_path / "raw", xz=False)


def load(folder: Path) -> list[Data]:
    """All records; shards sorted by name."""
    return [record for path in sorted(folder.glob("*.lmdb")) for record in read_records(path)]


def metadata(folder: Path) -> dict[str, list[int]]:
    with np.load(folder / "metadata.npz") as arrays:
        return {name: array.tolist() for name, array in arrays.items()}


def contents(folder: Path) -> tuple[Any, ...]:
    """Everything a reader can see of a prepared folder, for comparison."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return names, [record.to_dict() for record in load(folder)], metadata(folder)


def assert_same(folder: Path, other: Path | tuple[Any, ...]) -> None:
    assert not processes.differences(contents(folder), contents(other) if isinstance(other, Path) else other)


def assert_same_records(records: list[Data], expected: list[tuple[ase.Atoms, list[str]]], *, reference: bool) -> None:
    """To the last bit, after the rounding to float32 of OC20's records."""
    assert len(records) == len(expected)
    for record, (atoms, log) in zip(records, expected, strict=True):
        assert set(record.keys()) == FIELDS | {"energy", "forces"}
        assert (record.sid, record.fid) == (int(log[0].removeprefix("random")), int(log[1].removeprefix("frame")))
        fixed = np.isin(np.arange(len(atoms)), atoms.constraints[0].index)
        energy = atoms.get_potential_energy() - (float(log[2]) if reference else 0.0)
        assert type(record.energy) is float and record.energy == energy
        arrays = {
            "pos": atoms.positions.astype(np.float32),
            "cell": atoms.cell.array.astype(np.float32)[None],
            "forces": atoms.get_forces(apply_constraint=False).astype(np.float32),
            "atomic_numbers": atoms.numbers.astype(np.float32),
            "fixed": fixed.astype(np.float32),
            "tags": atoms.get_tags().astype(np.int64),
        }
        assert record.natoms == len(atoms)
        for name, array in arrays.items():
            stored = record[name].numpy()
            assert stored.dtype == array.dtype and stored.tobytes() == array.tobytes(), name


# Records


@pytest.mark.parametrize("reference", [True, False])
def test_round_trip(raw: Path, tmp_path: Path, reference: bool) -> None:
    out = tmp_path / "out"
    assert prepare(raw, out, options=Options(ref_energy=reference)) == 12
    expected = by_ase(raw, tmp_path)
    assert_same_records(load(out), expected, reference=reference)
    assert metadata(out) == {"natoms": [len(atoms) for atoms, _ in expected]}


def test_round_trip_of_the_sample(oc20_sample: Path, tmp_path: Path) -> None:
    raw = oc20_sample / "s2ef_raw" / "s2ef_train_200K" / "s2ef_train_200K"
    assert prepare(raw, tmp_path / "out", options=Options()) == 40
    assert_same_records(load(tmp_path / "out"), by_ase(raw, tmp_path), reference=True)


def test_stored_edges(raw: Path, tmp_path: Path) -> None:
    """Against ASE's neighbour list: exactly the 50 nearest within 6 A and all that are as far as the last of them.

    Our data set reads them, and builds the same.
    """
    out = tmp_path / "out"
    prepare(raw, out, options=Options(get_edges=True))
    config = {"src": str(out), "labels": ["energy", "forces"], "cutoff": 6.0, "max_neighbors": 50}
    stored, built = (OC20LmdbDataset({**config, "edges": edges}) for edges in ("stored", "recompute"))
    records = load(out)
    assert stored.natoms().tolist() == [record.natoms for record in records]
    for index, record in enumerate(records):
        data = stored[index]
        assert (data.sid, data.fid.item()) == ([str(record.sid)], record.fid)
        assert torch.equal(data.pos, record.pos) and torch.equal(data.forces, record.forces)
        assert data.energy.item() == pytest.approx(record.energy, rel=1e-6)
        atoms = ase.Atoms(record.atomic_numbers, record.pos.double(), cell=record.cell[0].double(), pbc=True)
        centre, neighbour, distance, shift = neighbor_list("ijdS", atoms, 6.0)
        kept = cut_by_hand(np.stack([neighbour, centre]), shift, distance, cutoff=6.0, max_neighbors=50)
        expected = set(zip(neighbour[kept], centre[kept], *shift[kept].T, strict=True))
        for found in (record, data, built[index]):
            assert edge_set(found.edge_index, found.cell_offsets) == expected
        source, target = record.edge_index
        vectors = record.pos[source] - record.pos[target] + record.cell_offsets @ record.cell[0]
        assert torch.allclose(record.distances, vectors.norm(dim=1), atol=1e-5)
        assert record.edge_index.dtype == torch.int64
        assert record.distances.dtype == record.cell_offsets.dtype == torch.float32
    assert metadata(out)["neighbors"] == [record.edge_index.shape[1] for record in records]


@pytest.mark.parametrize("labelled", [True, False])
def test_test_data_has_no_labels(tmp_path: Path, labelled: bool) -> None:
    raw = write_raw(tmp_path / "raw", files=1, log="reference" if labelled else "ids")
    if not labelled:
        frames = [atoms for atoms, _ in by_ase(raw, tmp_path)]
        for atoms in frames:
            atoms.calc = None
        ase.io.write(tmp_path / "text", frames, format="extxyz", columns=COLUMNS[:-1])
        assert "energy" not in (tmp_path / "text").read_text()
        write(raw / "0.extxyz.xz", (tmp_path / "text").read_text())
    prepare(raw, tmp_path / "out", options=Options(labels=False))
    records = load(tmp_path / "out")
    assert [set(record.keys()) for record in records] == [FIELDS] * 4
    assert [record.fid for record in records] == [0, 1, 2, 3]
    dataset = OC20LmdbDataset({"src": str(tmp_path / "out"), "labels": [], "edges": "none"})
    assert dataset[3].pos.shape == (records[3].natoms, 3)


def test_a_log_without_reference_energies_serves_where_none_is_subtracted(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", files=1, log="ids")
    with pytest.raises(FormatError, match=r"0\.txt\.xz:1: has no reference energy"):
        prepare(raw, tmp_path / "out", options=Options())
    prepare(raw, tmp_path / "raw_energies", options=Options(ref_energy=False))
    assert_same_records(load(tmp_path / "raw_energies"), by_ase(raw, tmp_path), reference=False)


# Shards


def test_files_map_to_shards_in_natural_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_raw(tmp_path / "raw", files=12, frames=1)
    prepare(raw, tmp_path / "each", options=Options())
    prepare(raw, tmp_path / "chunk", options=Options(), chunk=5)
    monkeypatch.setattr(module, "MAX_SHARDS", 5)
    prepare(raw, tmp_path / "few", options=Options())
    for name, shards in (("each", 12), ("chunk", 3), ("few", 4)):
        assert [record.sid for record in load(tmp_path / name)] == [100 + number for number in range(12)]
        found = sorted(path.name for path in (tmp_path / name).glob("*.lmdb"))
        assert found == [f"data.{number:04d}.lmdb" for number in range(shards)]


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file()}


def shard_times(out: Path) -> dict[str, int]:
    return {name: when for name, when in times(out).items() if name.endswith("lmdb")}


def cut(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: (out / "data.0001.lmdb").unlink(),
        lambda out: cut(out / "data.0001.lmdb"),
        lambda out: (out / "data.0001.lmdb").write_bytes(b""),
        lambda out: (out / ".prepare_s2ef" / "data.0001.npz").unlink(),
        lambda out: np.savez(out / ".prepare_s2ef" / "data.0001.npz", natoms=np.zeros(4), neighbors=np.zeros(4)),
        lambda out: cut(out / ".prepare_s2ef" / "data.0001.npz"),
    ],
    ids=["shard missing", "shard cut", "shard empty", "sizes missing", "sizes of an earlier version", "sizes cut"],
)
def test_only_what_is_missing_or_damaged_is_written(raw: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    out = tmp_path / "out"
    prepare(raw, out, options=Options())
    expected, before = contents(out), shard_times(out)
    spoil(out)
    (out / "metadata.npz").unlink()
    (out / ".data.0001.lmdb.0123.tmp").write_bytes(b"left by a killed process")
    prepare(raw, out, options=Options())
    assert_same(out, expected)
    assert not list(out.glob(".*.tmp"))
    assert {name for name, when in shard_times(out).items() if when != before[name]} == {"data.0001.lmdb"}


def test_a_shard_whose_input_has_changed_is_written_again(own_raw: Path, tmp_path: Path) -> None:
    """Also where one digit is another and the file has the old size and time; a copy is no change."""
    out = tmp_path / "out"
    prepare(own_raw, out, options=Options())
    before = times(out)
    copy = shutil.copytree(own_raw, tmp_path / "copy", copy_function=shutil.copyfile)
    for folder in (own_raw, copy):
        assert prepare(folder, out, options=Options()) == 12
        assert times(out) == before
    frames = own_raw / "2.extxyz"
    state, energy = frames.stat(), load(out)[-1].energy
    head, mark, tail = frames.read_text().rpartition(" energy=")
    frames.write_text(f"{head}{mark}{'9' if tail[0] != '9' else '8'}{tail[1:]}")
    os.utime(frames, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (frames.stat().st_size, frames.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    prepare(own_raw, out, options=Options())
    assert load(out)[-1].energy != energy
    assert {name for name, when in shard_times(out).items() if when != before[name]} == {"data.0002.lmdb"}


def test_other_settings_are_refused(own_raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(own_raw, out, options=Options(), chunk=1)
    before = contents(out)
    for options, chunk, what in (
        (Options(get_edges=True), 1, "get_edges = False, not True"),
        (Options(ref_energy=False), 1, "ref_energy = True, not False"),
        (Options(labels=False), 1, "labels = True, not False"),
        (Options(), 2, "chunk = 1, not 2"),
    ):
        with pytest.raises(ValueError, match=f"was begun with {what}"):
            prepare(own_raw, out, options=options, chunk=chunk)
    for kind in ("extxyz", "txt"):
        (own_raw / f"3.{kind}").write_text((own_raw / f"2.{kind}").read_text())
    with pytest.raises(ValueError, match="was begun with other input files"):
        prepare(own_raw, out, options=Options(), chunk=1)
    assert_same(out, before)


def test_folders_of_others_and_a_second_process_are_refused(raw: Path, tmp_path: Path) -> None:
    foreign, out = tmp_path / "foreign" / "data.0000.lmdb", tmp_path / "out"
    foreign.parent.mkdir()
    foreign.write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"data\.0000\.lmdb: is not from an earlier preparation"):
        prepare(raw, foreign.parent, options=Options())
    assert list(foreign.parent.iterdir()) == [foreign] and foreign.read_bytes() == b"precious"
    prepare(raw, out, options=Options())
    with (out / ".prepare_s2ef" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process"):
            prepare(raw, out, options=Options())


@pytest.mark.slow
def test_killed_and_restarted(tmp_path: Path) -> None:
    """The command, killed in the middle of a shard; its processes must not go on without it.

    The second file of shard 2 is a pipe that nothing comes out of, so it is known how far the command gets.
    """
    raw = write_raw(tmp_path / "raw", files=12, frames=2)
    out, pipe = tmp_path / "out", raw / "5.txt"
    log = read(raw / "5.txt.xz")
    (raw / "5.txt.xz").unlink()
    os.mkfifo(pipe)
    our_end = os.open(pipe, os.O_RDWR)
    arguments = ["--data-path", str(raw), "--out-path", str(out), "--chunk", "2", "--get-edges", "--num-workers", "2"]
    process = processes.start(arguments, program=[sys.executable, str(SCRIPT)])
    expected = [f"data.{number:04d}.lmdb" for number in (0, 1, 3, 4, 5)]
    processes.wait_for(
        lambda: out.exists() and sorted(shard_times(out)) == expected and list(out.glob(".data.0002.*.tmp"))
    )
    process.kill()
    process.communicate(timeout=60)  # returns when none of its processes is left, not even the one that waits
    os.close(our_end)
    finished = shard_times(out)
    assert sorted(finished) == expected
    assert not (out / "metadata.npz").exists()

    pipe.unlink()
    pipe.write_text(log)
    options = Options(get_edges=True)
    prepare(raw, out, options=options, chunk=2)
    assert {name: shard_times(out)[name] for name in finished} == finished
    prepare(raw, tmp_path / "whole", options=options, chunk=2)
    assert_same(out, tmp_path / "whole")
    assert not list(out.glob(".*.tmp"))


def test_faults_are_reported_from_all_processes_and_mended_by_a_restart(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", files=6, xz=False)
    good = {number: (raw / f"{number}.txt").read_text() for number in (1, 4)}
    for number in good:
        (raw / f"{number}.txt").write_text("nonsense\n")
    out = tmp_path / "out"
    with pytest.raises(FormatError) as error:
        prepare(raw, out, options=Options(), num_workers=2)
    assert [line.split(": ")[0] for line in str(error.value).splitlines()] == [f"{raw / f'{n}.txt'}:1" for n in (1, 4)]
    assert sorted(shard_times(out)) == [f"data.000{number}.lmdb" for number in (0, 2, 3, 5)]
    assert not (out / "metadata.npz").exists() and not list(out.glob(".*.tmp"))
    for number, text in good.items():
        (raw / f"{number}.txt").write_text(text)
    prepare(raw, out, options=Options())
    prepare(raw, tmp_path / "whole", options=Options())
    assert_same(out, tmp_path / "whole")


def test_incomplete_folders_are_refused(own_raw: Path, tmp_path: Path) -> None:
    def refused(message: str, folder: Path = own_raw) -> None:
        with pytest.raises(ValueError, match=message):
            prepare(folder, tmp_path / "out", options=Options())
        assert not (tmp_path / "out").exists()

    (own_raw / "README.txt").write_text("about these files")  # does no harm
    refused("is no folder", tmp_path / "nowhere")
    refused(r"no \*\.extxyz\(\.xz\) files; did you mean .*/raw\?", tmp_path)
    write(own_raw / "1.txt.xz", read(own_raw / "1.txt"))
    refused(r"both 1\.txt.* and 1\.txt")
    (own_raw / "1.txt.xz").unlink()
    (own_raw / "1.txt").rename(own_raw / "7.txt")
    refused(r"1\.extxyz: has no 1\.txt\(\.xz\) beside it")
    (own_raw / "7.txt").rename(own_raw / "1.txt")
    (own_raw / "2.extxyz").unlink()
    refused(r"2\.txt: has no 2\.extxyz\(\.xz\) beside it")
    (own_raw / "2.txt").unlink()
    for wrong in ({"num_workers": 0}, {"chunk": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            prepare(own_raw, tmp_path / "out", options=Options(), **wrong)
    (own_raw / "1.extxyz").write_text("")
    (own_raw / "1.txt").write_text("")
    with pytest.raises(FormatError, match=r"1\.extxyz:1: is empty"):
        prepare(own_raw, tmp_path / "out", options=Options())


# Command line


def test_command_line(raw: Path, tmp_path: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    paths = ["--data-path", str(raw), "--out-path"]
    main([*paths, str(tmp_path / "a")])
    assert_same_records(load(tmp_path / "a"), by_ase(raw, tmp_path), reference=True)
    main([*paths, str(tmp_path / "b"), "--no-ref-energy", "--chunk", "3"])
    assert_same_records(load(tmp_path / "b"), by_ase(raw, tmp_path), reference=False)
    main([*paths, str(tmp_path / "c"), "--test-data", "--get-edges"])
    assert set(load(tmp_path / "c")[0].keys()) == FIELDS | {"edge_index", "cell_offsets", "distances"}
    with pytest.raises(SystemExit, match=r"error: .*was begun with"):
        main([*paths, str(tmp_path / "a"), "--get-edges"])
