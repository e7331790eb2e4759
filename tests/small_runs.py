"""Checkpoints of small models, trained for two steps through the command line."""

from functools import cache
from pathlib import Path
from typing import Any

import ase
import numpy as np
import yaml

import small_data
from faenet_ocp.launch.cli import main

_MODEL = {
    "name": "faenet",
    "hidden_channels": 48,
    "num_filters": 24,
    "num_interactions": 2,
    "num_gaussians": 10,
    "tag_hidden_channels": 8,
    "pg_hidden_channels": 4,
    "cutoff": 6.0,
    "max_neighbors": 40,
}
_TASKS: dict[str, dict[str, Any]] = {
    "is2re": {
        "dataset": {
            "key_mapping": {"y_relaxed": "energy"},
            "transforms": {"remove_subsurface": {}},
            "train": {"src": "is2re/all/train"},
            "val": {"val_id": {"src": "is2re/all/val_id"}},
        },
        "outputs": {"energy": {"normalizer": "fit", "element_references": "fit"}},
    },
    "s2ef": {
        "dataset": {
            "train": {"src": "s2ef/2M/train"},
            "val": {"val_id": {"src": "s2ef/all/val_id"}},
        },
        "outputs": {"energy": {"normalizer": "fit"}},
    },
}


@cache
def train(task: str, root: Path) -> Path:
    """Train on the data that `small_data` wrote to `root`, once a session; the checkpoint's path."""
    folder = root / "runs"
    folder.mkdir()
    config = {
        "trainer": "faenet",
        "task": task,
        "model": _MODEL,
        "frames": {"dim": 2, "group": "SE", "method": "stochastic"},
        "optim": {"lr_initial": 0.002, "batch_size": 4, "max_epochs": 1, "max_steps": 2, "num_workers": 0},
        "logger": "none",
        "job": {"cpu": True, "run_dir": str(folder), "identifier": task},
        **_TASKS[task],
    }
    config["dataset"] = {"name": "small data", "root": str(root), **config["dataset"]}
    path = folder / f"{task}.yml"
    path.write_text(yaml.safe_dump(config))
    if main(["--config", str(path)]) != 0:
        raise RuntimeError(f"training of {task} failed")
    return folder / task / "checkpoints" / "best.pt"


def slab(index: int = 0, **options: Any) -> ase.Atoms:
    """`small_data.make_slab` with its tag-0 atoms fixed."""
    atoms = small_data.make_slab(index, **options)
    atoms.set_constraint(ase.constraints.FixAtoms(np.flatnonzero(atoms.get_tags() == 0)))
    return atoms
