#!/usr/bin/env python
"""Shows that a data set of a million records opens at once and is read in little memory, also by several processes.

    python scripts/load_test.py --folder FOLDER [--records 1000000] [--readers 4]

Writes `FOLDER/data.0000.lmdb` (once: about 1.4 kB a record) with the values of a few small systems under changed ids,
then measures opening, a full pass (memory of the process without the page cache that it shares with all others), and
readers at once. Exits with 1 where a limit is passed: 2 s to open, 200 MB of growth.
"""

import argparse
import multiprocessing
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch_geometric.data import Data
from tqdm import tqdm

from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.prepare.lmdb_writer import LmdbShardWriter, encode_record

_OPEN_SECONDS, _GROWTH_MB = 2.0, 200.0
_FIRST_SID = 1_000_000_000
_SYSTEMS = 50


def main() -> int:
    """Runs the command line; exit status 0: within the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--readers", type=int, default=4)
    flags = parser.parse_args()
    path = flags.folder / "data.0000.lmdb"
    if not path.exists():
        seconds = _timed(write, path, flags.records)
        _say(f"wrote {flags.records:,} records in {seconds:.0f} s ({flags.records / seconds:,.0f} a second)")
    _say(f"file: {path.stat().st_size / 1e9:.2f} GB")

    start = time.perf_counter()
    dataset = open_dataset(path)
    opening = time.perf_counter() - start
    _say(f"opened {len(dataset):,} records in {opening:.3f} s")

    for index in range(0, len(dataset), max(1, len(dataset) // 1000)):  # code and caches are there, before counting
        check(dataset, index)
    before = private_megabytes()
    start, largest = time.perf_counter(), before
    for index in tqdm(range(len(dataset)), desc="full pass", mininterval=2.0, disable=None):
        check(dataset, index)
        if index % 10_000 == 0:
            largest = max(largest, private_megabytes())
    seconds = time.perf_counter() - start
    largest = max(largest, private_megabytes())
    _say(f"full pass in {seconds:.0f} s ({len(dataset) / seconds:,.0f} samples a second)")
    _say(f"private memory: {before:.1f} MB before, at most {largest:.1f} MB: growth {largest - before:.1f} MB")

    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(flags.readers) as pool:
        jobs = [(path, reader, flags.readers, min(len(dataset), 100_000)) for reader in range(flags.readers)]
        results = pool.starmap(read_share, jobs)
    read = sum(count for count, _ in results)
    growth = max(growth for _, growth in results)
    seconds = time.perf_counter() - start
    _say(f"{flags.readers} readers at once: {read:,} samples in {seconds:.0f} s, largest growth {growth:.1f} MB")
    passed = opening < _OPEN_SECONDS and max(largest - before, growth) < _GROWTH_MB
    _say("within the limits" if passed else "LIMITS PASSED")
    return 0 if passed else 1


def write(path: Path, count: int) -> None:
    """Writes `count` records: the bytes of a few, in which only the id differs."""
    generator = torch.Generator().manual_seed(0)
    values = [_split_at_sid(_system(number, generator)) for number in range(min(_SYSTEMS, count))]
    with LmdbShardWriter(path) as writer:
        for index in tqdm(range(count), desc="writing", mininterval=2.0, disable=None):
            head, tail = values[index % len(values)]
            writer.append(head + (_FIRST_SID + index).to_bytes(4, "little") + tail)


def _system(number: int, generator: torch.Generator) -> Data:
    """2 to 7 atoms with energy and forces."""
    atoms = 2 + number % 6
    return Data(
        pos=4 * torch.rand(atoms, 3, generator=generator),
        cell=8 * torch.eye(3)[None],
        atomic_numbers=torch.randint(1, 80, (atoms,), generator=generator).float(),
        natoms=atoms,
        tags=torch.ones(atoms, dtype=torch.long),
        fixed=torch.zeros(atoms),
        y=float(number),
        force=torch.rand(atoms, 3, generator=generator),
        fid=0,
        sid=_FIRST_SID + 123_456_789,
    )


def _split_at_sid(record: Data) -> tuple[bytes, bytes]:
    """The encoded record before and after the four bytes of its id."""
    head, separator, tail = encode_record(record).partition(pickle.BININT + int(record.sid).to_bytes(4, "little"))
    if not separator or pickle.BININT + int(record.sid).to_bytes(4, "little") in tail:
        raise ValueError("the id is not where it was expected in the record")
    return head + pickle.BININT, tail


def open_dataset(path: Path) -> OC20LmdbDataset:
    """The data set as training opens it, but for edges, which would only cost time here."""
    return OC20LmdbDataset({"src": str(path), "labels": ["energy", "forces"], "edges": "none"})


def check(dataset: OC20LmdbDataset, index: int) -> None:
    """Reads a sample; ValueError unless it is the right one."""
    sample = dataset[index]
    if sample.sid != [str(_FIRST_SID + index)] or float(sample.energy) != index % _SYSTEMS:
        raise ValueError(f"record {index} is that of {sample.sid}, {float(sample.energy)} eV")


def read_share(path: Path, reader: int, readers: int, count: int) -> tuple[int, float]:
    """One of several readers: every `readers`-th of the first `count` samples, in random order; samples, growth."""
    torch.set_num_threads(1)
    dataset = open_dataset(path)
    check(dataset, reader)
    before, order = private_megabytes(), np.random.default_rng(reader).permutation(np.arange(reader, count, readers))
    for index in order.tolist():
        check(dataset, index)
    return len(order), private_megabytes() - before


def private_megabytes() -> float:
    """Memory that belongs to this process alone (unique set size): not the pages of files, which the system caches."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty:", "Private_Hugetlb:"))) / 1024


def _timed(function: object, *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)  # type: ignore[operator]
    return time.perf_counter() - start


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
