"""Checkpoints of small models, trained for two steps through the command line, and structures for them."""

from functools import cache
from pathlib import Path
from typing import Any

import ase
import numpy as np

import processes
import small_data
from faenet_ocp.launch.cli import main

_DATASETS: dict[str, dict[str, Any]] = {
    "is2re": {
        "key_mapping": {"y_relaxed": "energy"},
        "transforms": {"remove_subsurface": {}},
        "train": {"src": "is2re/all/train"},
        "val": {"val_id": {"src": "is2re/all/val_id"}},
    },
    "s2ef": {"train": {"src": "s2ef/2M/train"}, "val": {"val_id": {"src": "s2ef/all/val_id"}}},
}


@cache
def train(task: str, root: Path) -> Path:
    """Train on the data that `small_data` wrote to `root`, once a session; the checkpoint's path."""
    config = processes.write_config(
        root / "runs" / f"{task}.yml",
        root,
        task=task,
        dataset=_DATASETS[task],
        model={"cutoff": 6.0, "max_neighbors": 40},
        frames={"dim": 2, "group": "SE"},
        outputs={"energy": {"normalizer": "fit"} | ({"element_references": "fit"} if task == "is2re" else {})},
        evaluation_metrics={"primary_metric": {}},
        optim={"batch_size": 4, "max_steps": 2},
    )
    if main(["--config", str(config), "--identifier", task]) != 0:
        raise RuntimeError(f"training of {task} failed")
    return config.with_suffix("") / "checkpoints" / "best.pt"


def slab(index: int = 0, **options: Any) -> ase.Atoms:
    """`small_data.make_slab` with its tag-0 atoms fixed."""
    atoms = small_data.make_slab(index, **options)
    atoms.set_constraint(ase.constraints.FixAtoms(np.flatnonzero(atoms.get_tags() == 0)))
    return atoms
