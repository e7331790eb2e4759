"""The trainer on a device: the same short run on the CPU and there, whose losses have to be the same."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from faenet_ocp.benchmark.data import write_slabs

_STEPS = 20
_COMMAND = "import sys; from faenet_ocp.launch.entry import main; sys.exit(main())"


def train_on(device: torch.device, *, small: bool) -> dict[str, Any]:
    """Trains FAENet's configuration for IS2RE on generated slabs, on the CPU and on the device.

    Args:
        device: to compare with the CPU; where it is the CPU, that is compared with itself.
        small: a small network.

    Returns:
        `steps`, `largest_difference` of the losses as a share of the loss, and `samples_per_s` by device.

    Raises:
        RuntimeError: a run failed; what it wrote says why.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_slabs(folder / "slabs.lmdb", 16 if small else 128, 6.0)
        there = device.type if device.type != "cpu" else "cpu_again"
        runs = {kind: _run(folder, kind, small=small) for kind in ("cpu", there)}
    losses = [torch.tensor([record["train/loss"] for record in run]) for run in runs.values()]
    difference = (losses[-1] - losses[0]).abs() / losses[0].abs()
    speed = {kind: median(record["train/samples_per_s"] for record in run) for kind, run in runs.items()}
    return {"steps": len(losses[0]), "largest_difference": float(difference.max()), "samples_per_s": speed}


def _run(folder: Path, kind: str, *, small: bool) -> list[dict[str, float]]:
    """The records of the losses of a run."""
    source = {"src": "slabs.lmdb"}
    network: dict[str, Any] = {"hidden_channels": 48, "num_filters": 32, "num_interactions": 2, "num_gaussians": 16}
    network |= {"tag_hidden_channels": 8, "pg_hidden_channels": 8}
    config = {
        "trainer": "faenet",
        "task": "is2re",
        "logger": "none",
        "dataset": {
            "name": "slabs",
            "root": str(folder),
            "key_mapping": {"y_relaxed": "energy"},
            "transforms": {"remove_subsurface": {}},
            "train": source,
            "val": {"val": source},
        },
        "model": {"name": "faenet", **(network if small else {})},
        "frames": {"dim": 2, "group": "SE", "method": "stochastic"},
        "evaluation_metrics": {"primary_metric": {"split": "val"}},
        "optim": {"batch_size": 8, "max_steps": _STEPS, "max_epochs": 100, "num_workers": 0, "lr_initial": 1e-4},
        "job": {"cpu": kind.startswith("cpu"), "run_dir": str(folder / "runs"), "print_every": 1},
    }
    path = folder / f"{kind}.yml"
    path.write_text(yaml.safe_dump(config))
    arguments = ["--config", str(path), "--identifier", kind]
    done = subprocess.run([sys.executable, "-c", _COMMAND, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"training on {kind} failed: {done.stderr.strip()}")
    lines = (folder / "runs" / kind / "logs" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "train/loss" in record]
