"""Reads demo data with lmdb, pickle and csv only, for the tests."""

import csv
import pickle
from pathlib import Path
from typing import Any

import lmdb
import torch
from torch_geometric.data import Data

from faenet_ocp.prepare.demo.generate import DemoSettings

SETTINGS = DemoSettings(num_train=24, num_val=8, frames_per_system=3, seed=3)


def read_records(path: Path) -> list[Data]:
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        length = pickle.loads(txn.get(b"length"))
        assert env.stat()["entries"] == length + 1
        return [pickle.loads(txn.get(str(i).encode())) for i in range(length)]


def is2re(root: Path, split: str) -> list[Data]:
    return read_records(root / "is2re" / "all" / split / "data.lmdb")


def s2ef_folder(root: Path, split: str) -> Path:
    return root / "s2ef" / ("2M" if split == "train" else "all") / split


def s2ef(root: Path, split: str) -> list[Data]:
    shards = sorted(s2ef_folder(root, split).glob("*.lmdb"))
    return [record for shard in shards for record in read_records(shard)]


def table(root: Path) -> dict[int, dict[str, str]]:
    with (root / "systems.csv").open() as file:
        return {int(row["sid"]): row for row in csv.DictReader(file)}


def everything(root: Path) -> dict[str, list[dict[str, Any]]]:
    """All records of all shards; the bytes themselves hold memory addresses."""
    return {
        str(path.relative_to(root)): [record.to_dict() for record in read_records(path)]
        for path in sorted(root.rglob("*.lmdb"))
    }


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second
