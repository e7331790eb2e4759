"""Reads demo data with lmdb, pickle and csv only, for the tests."""

import csv
from pathlib import Path

from torch_geometric.data import Data

from faenet_ocp.prepare.demo.generate import DemoSettings
from small_data import read_records

SETTINGS = DemoSettings(num_train=24, num_val=8, frames_per_system=3, seed=3)


def is2re(root: Path, split: str) -> list[Data]:
    return read_records(root / "is2re" / "all" / split / "data.lmdb")


def s2ef_folder(root: Path, split: str) -> Path:
    return root / "s2ef" / ("2M" if split == "train" else "all") / split


def s2ef(root: Path, split: str) -> list[Data]:
    return [record for shard in sorted(s2ef_folder(root, split).glob("*.lmdb")) for record in read_records(shard)]


def table(root: Path) -> dict[int, dict[str, str]]:
    with (root / "systems.csv").open() as file:
        return {int(row["sid"]): row for row in csv.DictReader(file)}
