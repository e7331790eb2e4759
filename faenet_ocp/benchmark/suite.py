"""What is measured: groups of rows, each compared with the first row of its group.

Every group is one JSON object: `name`, `task`, `mode` (inference or training step), sizes of the batch, and `rows` with
raw times. A row that cannot run here says why instead.
"""

import datetime
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor
from tqdm import tqdm

from faenet_ocp.benchmark import models
from faenet_ocp.benchmark.data import data_paths
from faenet_ocp.benchmark.measure import measure, ratio
from faenet_ocp.benchmark.models import FAENET, MAX_NEIGHBORS, Contender, Outputs
from faenet_ocp.benchmark.systems import make_batch, make_systems, read_systems, slab_sizes
from faenet_ocp.common.files import software_versions

logger = logging.getLogger(__name__)

MODES = ("inference", "training step")
GROUPS = ("published", "peers", "frames", "forces", "batch sizes", "system sizes", "data")


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        device: cpu or cuda.
        groups: of `GROUPS`.
        batch_size: systems of a batch, where sizes are not what is varied.
        batch_sizes: of the group of that name.
        system_sizes: atoms of one system, of the group of that name.
        rounds: how often each row is timed.
        small: networks with few channels: for a check that everything runs.
        remove_subsurface: without the atoms of tag 0, as FAENet is trained.
        lmdb: systems of this file instead of generated slabs.
    """

    device: str = "cpu"
    groups: tuple[str, ...] = GROUPS
    batch_size: int = 32
    batch_sizes: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    system_sizes: tuple[int, ...] = (50, 150, 500, 1500, 5000)
    rounds: int = 5
    small: bool = False
    remove_subsurface: bool = True
    lmdb: Path | None = None


QUICK = Settings(batch_size=2, batch_sizes=(1, 4), system_sizes=(20, 60), rounds=1, small=True)


def run(settings: Settings, *, save: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Measure everything; the result is what `report` shows and JSON keeps.

    Args:
        settings: what to run.
        save: called with the result so far after each group, because all of them take an hour on a slow machine.
    """
    device = torch.device(settings.device)
    groups: list[dict[str, Any]] = []
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "versions": software_versions(),
        "settings": {**settings.__dict__, "lmdb": settings.lmdb and settings.lmdb.name},
        "groups": groups,
    }
    makers: dict[str, Callable[[Settings], list[dict[str, Any]]]] = {
        "published": _published,
        "peers": _peers,
        "frames": _frames,
        "forces": _forces,
        "batch sizes": _batch_sizes,
        "system sizes": _system_sizes,
        "data": _data,
    }
    for name in tqdm(settings.groups, desc="benchmark", unit="group", disable=None):
        groups += makers[name](settings)
        if save is not None:
            save(result)
    return result


# ------------------------------------------------------------------------------------ groups
def _published(settings: Settings) -> list[dict[str, Any]]:
    """Against the published package with the same weights; outputs are checked to be equal first."""
    groups = []
    for task in models.TASKS:
        options = models.small(task) if settings.small else FAENET[task]
        batch = _batch(settings, task, settings.batch_size)
        try:
            reference = models.published(task, options)
        except ImportError as error:
            groups.append({"name": "published", "task": task, "unavailable": str(error)})
            continue
        contenders = [reference, models.faenet(task, options), models.faenet(task, options, amp=True)]
        for contender in contenders[1:]:
            models.same_weights(contender, reference)
        for mode in MODES:
            groups.append(_group("published", task, mode, settings, [(one, batch) for one in contenders]))
    return groups


def _peers(settings: Settings) -> list[dict[str, Any]]:
    """Against other models, random weights, our norm and one stochastic frame: what a user would run."""
    groups = []
    stochastic = {"method": "stochastic", "dim": 2, "group": "SE"}
    for task in models.TASKS:
        options = models.small(task) if settings.small else FAENET[task]
        batch = _batch(settings, task, min(settings.batch_size, 8))
        own = [models.faenet(task, options, frames=stochastic, graph_norm="system", amp=amp) for amp in (False, True)]
        schnet = [models.schnet(task, amp=amp) for amp in (False, True)]
        others = [models.escn_md()] if task == "is2re" else []
        for mode in MODES:
            groups.append(_group("peers", task, mode, settings, [(one, batch) for one in [*schnet, *own, *others]]))
    return groups


def _frames(settings: Settings) -> list[dict[str, Any]]:
    """One stochastic frame against none, canonical and all eight."""
    options = models.small("is2re") if settings.small else FAENET["is2re"]
    batch = _batch(settings, "is2re", min(settings.batch_size, 8))
    contenders = [
        models.faenet("is2re", options, frames={"method": method, "dim": 3, "group": "E"}, name=f"frames: {method}")
        for method in ("stochastic", "none", "canonical", "full")
    ]
    return [_group("frames", "is2re", mode, settings, [(one, batch) for one in contenders]) for mode in MODES]


def _forces(settings: Settings) -> list[dict[str, Any]]:
    """What -dE/dX costs in evaluation beside the predicted forces, in canonical frames."""
    options = models.small("s2ef") if settings.small else FAENET["s2ef"]
    batch = _batch(settings, "s2ef", min(settings.batch_size, 8))
    frames = {"method": "canonical", "dim": 2, "group": "SE"}
    contenders = [
        models.faenet("s2ef", options, frames=frames, graph_norm="system", conservative=conservative, name=name)
        for name, conservative in (("forces predicted", False), ("forces -dE/dX", True))
    ]
    return [_group("forces", "s2ef", "inference", settings, [(one, batch) for one in contenders])]


def _batch_sizes(settings: Settings) -> list[dict[str, Any]]:
    options = models.small("is2re") if settings.small else FAENET["is2re"]
    rows = []
    for size in settings.batch_sizes:
        contender = models.faenet("is2re", options, graph_norm="system", name=f"{size} systems")
        rows.append((contender, _batch(settings, "is2re", size)))
    return [_group("batch sizes", "is2re", "inference", settings, rows)]


def _system_sizes(settings: Settings) -> list[dict[str, Any]]:
    """One slab of many atoms, or as many slabs of fewer as make up 500."""
    options = models.small("is2re") if settings.small else FAENET["is2re"]
    rows = []
    for size in settings.system_sizes:
        systems = make_systems(
            [size] * max(1, 500 // size), cutoff=models.CUTOFF, max_neighbors=40, remove_subsurface=False
        )
        contender = models.faenet("is2re", options, graph_norm="system", name=f"{size} atoms each")
        rows.append((contender, make_batch(systems, torch.device(settings.device))))
    return [_group("system sizes", "is2re", "inference", settings, rows)]


def _data(settings: Settings) -> list[dict[str, Any]]:
    """Records on disk to batches; on the CPU in any case."""
    paths = data_paths(
        lmdb=settings.lmdb,
        batch_size=settings.batch_size,
        rounds=settings.rounds,
        max_neighbors=MAX_NEIGHBORS["is2re"],
        remove_subsurface=settings.remove_subsurface,
    )
    return [{"name": "data", "task": "is2re", "mode": "loading", **paths}]


# ------------------------------------------------------------------------------------ one group
def _group(
    name: str, task: str, mode: str, settings: Settings, rows: Sequence[tuple[Contender, AtomicData]]
) -> dict[str, Any]:
    device = torch.device(settings.device)
    for contender, _ in rows:
        contender.module.to(device).train(mode != "inference")
    step = _inference if mode == "inference" else _training_step
    times = measure([step(contender, batch) for contender, batch in rows], device, settings.rounds)
    shown = [_row(contender, batch, time) for (contender, batch), time in zip(rows, times, strict=True)]
    expected = _predictions(*rows[0])
    for row, (contender, batch) in zip(shown, rows, strict=True):
        row["speed_up"] = ratio(shown[0], row)
        row["speed_up_wall"] = ratio(shown[0], row, "wall_seconds")
        if name == "published" and mode == "inference":
            row["difference"] = _difference(expected, _predictions(contender, batch))
    return {"name": name, "task": task, "mode": mode, "rows": shown}


def _row(contender: Contender, batch: AtomicData, times: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": contender.name,
        "settings": contender.settings,
        "parameters": sum(p.numel() for p in contender.module.parameters()),
        "precision": "bf16" if contender.amp else "fp32",
        "systems": len(batch.natoms),
        "atoms": len(batch.pos),
        "edges": batch.edge_index.shape[1],
        **times,
    }


def _inference(contender: Contender, batch: AtomicData) -> Callable[[], Outputs]:
    def function() -> Outputs:
        with torch.no_grad():
            return contender(batch)

    return function


def _training_step(contender: Contender, batch: AtomicData) -> Callable[[], None]:
    """Forward, loss, backward and AdamW, on weights that hardly change."""
    optimizer = torch.optim.AdamW(contender.module.parameters(), lr=1e-9, weight_decay=0)

    def function() -> None:
        optimizer.zero_grad(set_to_none=True)
        outputs = contender(batch)
        loss = (outputs["energy"].view(-1).float() - batch.energy).abs().mean()
        if "forces" in outputs:
            loss = loss + (outputs["forces"].float() - batch.forces).norm(dim=1).mean()
        loss.backward()
        optimizer.step()

    return function


def _predictions(contender: Contender, batch: AtomicData) -> Outputs:
    with torch.no_grad():
        return {name: value.float() for name, value in contender(batch).items()}


def _difference(expected: Outputs, got: Outputs) -> dict[str, float]:
    """Largest difference of each output, as a share of the largest expected value."""

    def share(name: str) -> float:
        largest: Tensor = expected[name].abs().max()
        return float((got[name] - expected[name]).abs().max() / largest)

    return {name: share(name) for name in expected}


def _batch(settings: Settings, task: str, size: int) -> AtomicData:
    graph: dict[str, Any] = {"cutoff": models.CUTOFF, "max_neighbors": MAX_NEIGHBORS[task]}
    if settings.lmdb is not None:
        labels = ["energy", "forces"] if task == "s2ef" else ["energy"]
        systems = read_systems(
            settings.lmdb, size, remove_subsurface=settings.remove_subsurface, labels=labels, **graph
        )
    else:
        systems = make_systems(slab_sizes(size), remove_subsurface=settings.remove_subsurface, **graph)
    return make_batch(systems, torch.device(settings.device))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        fields = dict(line.split(":", 1) for line in cpu.read_text().split("\n\n")[0].splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        flags = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in named.get("flags", "").split()]
        return ", ".join([named.get("model name", platform.machine()), *flags])
    return platform.processor() or platform.machine()
