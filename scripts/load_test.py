#!/usr/bin/env python
"""Shows that a data set of a million records opens at once and is read in little memory, also by several processes.

    python scripts/load_test.py --folder FOLDER [--records 1000000] [--readers 4]

Writes `FOLDER/data.0000.lmdb` (once) with a few small systems under changed ids, then measures opening, a full pass
(memory of the process without the page cache that it shares with all others), and readers at once. Exits with 1 where
a limit is passed: 2 s to open, 200 MB of growth.
"""

import argparse
import pickle
import sys
import time
from pathlib import Path

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
    from faenet_ocp.common.pool import ordered_map  # not before: --help does not wait for torch

    path = flags.folder / "data.0000.lmdb"
    if not path.exists():
        write(path, flags.records)
    passed = True
    for readers in (1, flags.readers):
        start = time.perf_counter()
        results = list(ordered_map(read, [(path, reader, readers) for reader in range(readers)], readers))
        seconds, count = time.perf_counter() - start, sum(count for count, _, _ in results)
        opening, growth = (max(result[column] for result in results) for column in (1, 2))
        passed &= opening < _OPEN_SECONDS and growth < _GROWTH_MB
        rate = f"{count:,} samples in {seconds:.0f} s"
        sys.stdout.write(f"{readers} readers: opened in {opening:.3f} s, {rate}, growth {growth:.1f} MB at most\n")
    return 0 if passed else 1


def write(path: Path, count: int) -> None:
    """Writes `count` records: the bytes of a few systems of 2 to 7 atoms, in which only the id differs."""
    import torch
    from torch_geometric.data import Data
    from tqdm import tqdm

    from faenet_ocp.prepare.lmdb_writer import LmdbShardWriter, encode_record

    sid = _FIRST_SID + 123_456_789
    values = []
    for number in range(_SYSTEMS):
        atoms = 2 + number % 6
        forces = torch.rand(atoms, 3)
        fields = {"pos": 4 * torch.rand(atoms, 3), "cell": 8 * torch.eye(3)[None], "y": float(number), "force": forces}
        fields |= {"atomic_numbers": torch.randint(1, 80, (atoms,)).float(), "tags": torch.ones(atoms).long()}
        record = Data(**fields, natoms=atoms, fixed=torch.zeros(atoms), fid=0, sid=sid)
        values.append(encode_record(record).split(pickle.BININT + sid.to_bytes(4, "little")))
    with LmdbShardWriter(path) as writer:
        for index in tqdm(range(count), desc="writing", mininterval=2.0, disable=None):
            head, tail = values[index % _SYSTEMS]
            writer.append(head + pickle.BININT + (_FIRST_SID + index).to_bytes(4, "little") + tail)


def read(path: Path, reader: int, readers: int) -> tuple[int, float, float]:
    """Reads every `readers`-th sample in random order, as training does: samples, seconds to open, growth in MB."""
    import numpy as np

    from faenet_ocp.data.oc20 import OC20LmdbDataset

    start = time.perf_counter()
    dataset = OC20LmdbDataset({"src": str(path), "labels": ["energy", "forces"], "edges": "none"})
    opening = time.perf_counter() - start
    largest = before = 0.0
    order = np.random.default_rng(reader).permutation(np.arange(reader, len(dataset), readers)).tolist()
    for count, index in enumerate(order):
        sample = dataset[index]
        if sample.sid != [str(_FIRST_SID + index)] or float(sample.energy) != index % _SYSTEMS:
            raise ValueError(f"record {index} is that of {sample.sid}, {float(sample.energy)} eV")
        if count % 10_000 == 0 or count == len(order) - 1:
            largest = max(largest, private_megabytes())
        if count == min(1000, len(order) - 1):  # code and caches are there
            before = largest = private_megabytes()
    return len(order), opening, largest - before


def private_megabytes() -> float:
    """Memory that belongs to this process alone (unique set size): not the pages of files, which the system caches."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty:", "Private_Hugetlb:"))) / 1024


if __name__ == "__main__":
    sys.exit(main())
