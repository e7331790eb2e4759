"""What grows with the data: files of many records, and evaluations of many systems.

Both are given made data, small and many, because their number is what is looked at.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor, nn

from faenet_ocp.benchmark.data import slab_records
from faenet_ocp.benchmark.measure import measure
from faenet_ocp.benchmark.systems import make_batch, make_systems
from faenet_ocp.config.schema import build_config
from faenet_ocp.data.loader import TrainBatchSampler
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.evaluation.validation import run_split
from faenet_ocp.prepare.lmdb_writer import LmdbShardWriter, encode_record
from faenet_ocp.tasks.references import fit_labels
from faenet_ocp.tasks.tasks import make_tasks

_ATOMS = (5, 6, 7, 8)
"""Of the made records: as few as OC20's smallest systems have."""
_BATCH = 256
_READ = 20_000
"""Records that are read of each file, drawn from all of it."""


def files_of_sizes(counts: Sequence[int], *, rounds: int, cutoff: float, max_neighbors: int) -> list[dict[str, Any]]:
    """Opens files of so many records each, and reads shuffled batches of them, in a process of its own for each file.

    Args:
        counts: records of each file.
        rounds: how often batches of 20,000 records in all (or of the whole file) are read.
        cutoff, max_neighbors: of the graph.

    Returns:
        a row for each file: `systems`, `atoms` and `edges` read in a round; `seconds` and `wall_seconds` of each round;
        `start_seconds` to open the file and to have the order of an epoch and its first batch; `peak_bytes`, what the
        process holds more than before, without pages of the file; `bytes` of what was read, on disk.
    """
    rows: list[dict[str, Any]] = []
    records = slab_records(_ATOMS, cutoff=cutoff, max_neighbors=max_neighbors)
    values, graph = [*map(encode_record, records)], {"cutoff": cutoff, "max_neighbors": max_neighbors}
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "data.lmdb"
            with LmdbShardWriter(path) as writer:
                for number in range(count):
                    writer.append(values[number % len(values)])
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
                found = worker.submit(_read, str(path), graph, rounds).result()
            rows.append({"model": f"{count:,} records", **found})
            rows[-1]["bytes"] = path.stat().st_size * found["systems"] / count
    return _with_speed_up(rows)


def _read(path: str, graph: dict[str, Any], rounds: int) -> dict[str, Any]:
    """What `files_of_sizes` says of one file."""
    torch.set_num_threads(1)
    frames = {"frame_averaging": {"dim": 2, "group": "SE", "method": "stochastic"}}
    config = {"src": path, **graph, "labels": ["energy"], "transforms": frames}
    OC20LmdbDataset(config).load_batch([0])  # libraries are loaded and code is compiled by then
    before, start = _private_bytes(), time.perf_counter()
    dataset = OC20LmdbDataset(config)
    batches = list(_epoch(len(dataset)))
    dataset.load_batch(batches[0])
    found: dict[str, Any] = {"start_seconds": time.perf_counter() - start, "seconds": [], "wall_seconds": []}
    for _ in range(rounds):
        wall, processor, sizes = time.perf_counter(), time.process_time(), []
        for keys in batches:
            batch = dataset.load_batch(keys)
            sizes.append((len(batch.natoms), len(batch.pos), batch.edge_index.shape[1]))
        found["seconds"].append(time.process_time() - processor)
        found["wall_seconds"].append(time.perf_counter() - wall)
    found |= dict(zip(("systems", "atoms", "edges"), np.sum(sizes, axis=0).tolist(), strict=True))
    after = _private_bytes()
    return found | {"peak_bytes": None if before is None or after is None else after - before}


def _epoch(count: int) -> Iterator[list[tuple[int, int]]]:
    """Batches of an epoch, as many as hold 20,000 records."""
    sampler = TrainBatchSampler(count, min(_BATCH, count), seed=0)
    for keys, _ in zip(sampler, range(-(-_READ // _BATCH)), strict=False):
        yield keys


def _private_bytes() -> int | None:
    """Memory of this process alone, without the pages of mapped files; None where unknown."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.is_file():
        return None
    sizes = [line.split() for line in rollup.read_text().splitlines()]
    return 1024 * sum(int(words[1]) for words in sizes if words[0] == "Anonymous:")


def evaluations_of_sizes(counts: Sequence[int], *, rounds: int) -> list[dict[str, Any]]:
    """Evaluates splits of so many systems, with a model that costs nothing: all the rest of an evaluation.

    Args:
        counts: systems of each split.
        rounds: how often each is evaluated.

    Returns:
        a row for each: `systems`, `atoms` and `edges`, and what `measure` gives.
    """
    config = {"trainer": "faenet", "task": "is2re", "dataset": {}, "model": {"name": "faenet"}}
    outputs = {"energy": {"level": "system", "normalizer": {"mean": 0.0, "stdev": 1.0}}}
    optim = {"lr_initial": 1.0, "batch_size": 1, "max_epochs": 1}
    tasks = make_tasks(build_config(config | {"outputs": outputs, "optim": optim}), {})
    sizes = [_ATOMS[number % len(_ATOMS)] for number in range(_BATCH)]
    systems = make_systems(sizes, cutoff=2.0, max_neighbors=1, remove_subsurface=False)
    batch = make_batch(systems, torch.device("cpu"))
    fits = fit_labels([(batch.composition, {"energy": batch.energy})], ["energy"])
    splits = [[[batch]] * max(1, count // _BATCH) for count in counts]
    model = _Constant()

    def evaluate(split: list[list[AtomicData]]) -> None:
        run_split(model, tasks, split, split="made", fits=fits)  # type: ignore[arg-type]

    times = measure([lambda split=split: evaluate(split) for split in splits], torch.device("cpu"), rounds)  # type: ignore[misc]
    rows = []
    for split, found in zip(splits, times, strict=True):
        number = {"systems": len(batch.natoms), "atoms": len(batch.pos), "edges": batch.edge_index.shape[1]}
        number = {name: size * len(split) for name, size in number.items()}
        rows.append({"model": f"{number['systems']:,} systems", **number, **found})
    return rows


class _Constant(nn.Module):
    """The same energy for all systems."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Parameter(torch.zeros(()))

    def forward(self, batch: AtomicData) -> dict[str, dict[str, Tensor]]:
        return {"energy": {"energy": self.energy.expand(len(batch.natoms))}}


def _with_speed_up(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds systems/s beside those of the first row, as `measure` does where all rows are the same work."""
    for name, ratio in (("seconds", "speed_up"), ("wall_seconds", "speed_up_wall")):
        rates = [row["systems"] / median(row[name]) for row in rows]
        for row, rate in zip(rows, rates, strict=True):
            row[ratio] = rate / rates[0]
    return rows
