"""What is measured: groups of rows, each compared with the first row of its group.

Every group is one JSON object: `name`, `task`, `mode` (inference or training step), and `rows` with the sizes of the
batch and raw times. A group that cannot run here says why instead.
"""

import contextlib
import dataclasses
import datetime
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch.optim import Optimizer
from tqdm import tqdm

from faenet_ocp.benchmark import models
from faenet_ocp.benchmark.counting import Counting
from faenet_ocp.benchmark.data import load_in_each_way
from faenet_ocp.benchmark.growth import evaluations_of_sizes, files_of_sizes
from faenet_ocp.benchmark.measure import measure
from faenet_ocp.benchmark.models import OC20_TASKS, Contender, Outputs
from faenet_ocp.benchmark.systems import make_batch, make_systems, read_systems, slab_sizes
from faenet_ocp.common.files import software_versions
from faenet_ocp.targets import TASKS

Group = dict[str, Any]
GROUPS = (
    "published",
    "peers",
    "frames",
    "forces",
    "batch sizes",
    "system sizes",
    "data",
    "records",
    "evaluation",
    "launches",
)
_FEW = 8
"""Systems at most, where a model or eight frames are slow."""


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        device: cpu or cuda.
        groups: of `GROUPS`.
        batch_size: systems of a batch, where sizes are not what is varied.
        batch_sizes: of the group of that name.
        system_sizes: atoms of one system, of the group of that name.
        counts: records of a file and systems of an evaluation, of the groups "records" and "evaluation".
        rounds: how often each row is timed.
        small: networks with few channels: for a check that everything runs.
        remove_subsurface: without the atoms of tag 0, as FAENet is trained.
        lmdb: systems of this file instead of generated slabs.
    """

    device: str = "cpu"
    groups: tuple[str, ...] = GROUPS
    batch_size: int = 32
    batch_sizes: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    system_sizes: tuple[int, ...] = (20, 50, 100, 225, 1000, 5000)
    counts: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    rounds: int = 5
    small: bool = False
    remove_subsurface: bool = True
    lmdb: Path | None = None

    def batch(self, task: str, size: int) -> AtomicData:
        """A batch of `size` systems with a task's graph and labels, on the device."""
        graph = {"remove_subsurface": self.remove_subsurface, **models.graph(task)}
        if self.lmdb is None:
            systems = make_systems(slab_sizes(size), **graph)
        else:
            systems = read_systems(self.lmdb, size, labels=TASKS[task], **graph)
        return make_batch(systems, torch.device(self.device))


QUICK = Settings(batch_size=2, batch_sizes=(1, 4), system_sizes=(20, 60), counts=(300, 1000), rounds=1, small=True)


def run(settings: Settings, *, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure everything; the result is what `report` shows and JSON keeps.

    Args:
        settings: what to run.
        save: called with the result so far after each group, because all of them take an hour on a slow machine.
    """
    groups: list[Group] = []
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": _device_name(torch.device(settings.device)),
        "threads": torch.get_num_threads(),
        "versions": software_versions(),
        "settings": {**asdict(settings), "lmdb": settings.lmdb and settings.lmdb.name},
        "groups": groups,
    }
    network = (_published, _peers, _frames, _forces, _batch_sizes, _system_sizes)
    makers = (*network, _data, _records, _evaluation, _launches)
    chosen = dict(zip(GROUPS, makers, strict=True))
    for name in tqdm(settings.groups, desc="benchmark", unit="group", disable=None):
        for group in chosen[name](settings):
            groups.append(group)
            save(result)
    return result


# ------------------------------------------------------------------------------------ groups
def _published(settings: Settings) -> Iterator[Group]:
    """Against the published package with the same weights; the difference of the outputs is shown."""
    for task in OC20_TASKS:
        try:
            reference = models.published(task, small=settings.small)
        except ImportError as error:
            yield {"name": "published", "task": task, "unavailable": str(error)}
            continue
        ours = models.shipped(task, small=settings.small, graph_norm="batch")
        models.same_weights(ours, reference)
        batch = settings.batch(task, settings.batch_size)
        yield from _groups("published", task, settings, [(one, batch) for one in (reference, ours, ours.in_bf16())])


def _peers(settings: Settings) -> Iterator[Group]:
    """All models beside the first, random weights, FAENet in one stochastic frame: what a user would run."""
    stochastic = {"method": "stochastic", "dim": 2, "group": "SE"}
    for task in OC20_TASKS:
        batch = settings.batch(task, min(settings.batch_size, _FEW))
        contenders = [
            models.shipped(task, model, small=settings.small, frames=stochastic if model == "faenet" else None)
            for model in models.PEERS
        ]
        rows = [(one, batch) for contender in contenders for one in (contender, contender.in_bf16())]
        yield from _groups("peers", task, settings, rows)


def _frames(settings: Settings) -> Iterator[Group]:
    """One stochastic frame against none, canonical and all eight."""
    batch = settings.batch("is2re", min(settings.batch_size, _FEW))
    rows = []
    for method in ("stochastic", "none", "canonical", "full"):
        frames = {"method": method, "dim": 3, "group": "E"}
        rows.append((models.shipped("is2re", small=settings.small, frames=frames, name=f"frames: {method}"), batch))
    return _groups("frames", "is2re", settings, rows)


def _forces(settings: Settings) -> Iterator[Group]:
    """What -dE/dX costs in evaluation beside the predicted forces, in canonical frames."""
    batch = settings.batch("s2ef", min(settings.batch_size, _FEW))
    frames = {"method": "canonical", "dim": 2, "group": "SE"}
    rows = []
    for name, conservative in (("forces predicted", False), ("forces -dE/dX", True)):
        contender = models.shipped("s2ef", small=settings.small, frames=frames, conservative=conservative, name=name)
        rows.append((contender, batch))
    return _groups("forces", "s2ef", settings, rows, modes=("inference",))


def _batch_sizes(settings: Settings) -> Iterator[Group]:
    rows = [
        (models.shipped("is2re", small=settings.small, name=f"{size} systems"), settings.batch("is2re", size))
        for size in settings.batch_sizes
    ]
    return _groups("batch sizes", "is2re", settings, rows)


def _system_sizes(settings: Settings) -> Iterator[Group]:
    """One slab of many atoms, or as many slabs of fewer as make up 500."""
    rows = []
    for size in settings.system_sizes:
        systems = make_systems([size] * max(1, 500 // size), remove_subsurface=False, **models.graph("is2re"))
        contender = models.shipped("is2re", small=settings.small, name=f"{size} atoms each")
        rows.append((contender, make_batch(systems, torch.device(settings.device))))
    return _groups("system sizes", "is2re", settings, rows)


def _data(settings: Settings) -> Iterator[Group]:
    """Records on disk to batches; on the CPU in any case."""
    rows = load_in_each_way(
        lmdb=settings.lmdb,
        batch_size=settings.batch_size,
        rounds=settings.rounds,
        remove_subsurface=settings.remove_subsurface,
        **models.graph("is2re"),
    )
    yield {"name": "data", "task": "is2re", "mode": "loading", "rows": rows}


def _records(settings: Settings) -> Iterator[Group]:
    """Small and large files: start, memory and speed of a process that loads; on the CPU in any case."""
    rows = files_of_sizes(settings.counts, rounds=settings.rounds, **models.graph("is2re"))
    yield {"name": "records", "task": "is2re", "mode": "loading", "rows": rows}


def _evaluation(settings: Settings) -> Iterator[Group]:
    """Small and large splits, all but the model; on the CPU in any case."""
    rows = evaluations_of_sizes(settings.counts, rounds=settings.rounds)
    yield {"name": "evaluation", "task": "is2re", "mode": "all but the model", "rows": rows}


def _launches(settings: Settings) -> Iterator[Group]:
    """What a GPU would be given to do: operations of forward and backward, and the bytes that these move."""
    for task in OC20_TASKS:
        contenders = [models.shipped(task, small=settings.small, plain=True)]
        with contextlib.suppress(ImportError):
            contenders.insert(0, models.published(task, small=settings.small))
        batch, rows = settings.batch(task, settings.batch_size), []
        for contender in contenders:
            with Counting() as forward:
                outputs = contender(batch)
            with Counting() as backward:
                sum(value.sum() for value in outputs.values()).backward()  # type: ignore[union-attr]
            moved = [sum(launch.num_bytes for launch in part.launches) for part in (forward, backward)]
            counts = {"launches": [forward.num_launches, backward.num_launches], "moved_bytes": moved}
            largest = [dataclasses.asdict(launch) for launch in forward.largest(3)]
            found = {"bytes_by_place": forward.bytes_by_place(), "largest": largest}
            rows.append(_describe(contender, batch) | counts | found)
        yield {"name": "launches", "task": task, "mode": "forward and backward", "rows": rows}


# ------------------------------------------------------------------------------------ one group
def _groups(
    name: str,
    task: str,
    settings: Settings,
    rows: Sequence[tuple[Contender, AtomicData]],
    modes: Sequence[str] = ("inference", "training step"),
) -> Iterator[Group]:
    device = torch.device(settings.device)
    for mode in modes:
        for contender, _ in rows:
            contender.module.to(device).train(mode != "inference")
        steps: list[Callable[[], Any]]
        if mode == "inference":
            steps = [_inference(*row) for row in rows]
        else:
            networks = {contender.module for contender, _ in rows}  # some rows share theirs
            optimizers = {one: torch.optim.AdamW(one.parameters(), lr=1e-9, weight_decay=0) for one in networks}
            steps = [_training_step(*row, optimizers[row[0].module]) for row in rows]
        times = measure(steps, device, settings.rounds)
        shown = [_describe(*row) | time for row, time in zip(rows, times, strict=True)]
        if name == "published" and mode == "inference":
            expected = _inference(*rows[0])()
            for row, described in zip(rows, shown, strict=True):
                described["difference"] = _difference(expected, _inference(*row)())
        yield {"name": name, "task": task, "mode": mode, "rows": shown}


def _describe(contender: Contender, batch: AtomicData) -> dict[str, Any]:
    return {
        "model": contender.name,
        "settings": contender.settings,
        "parameters": sum(p.numel() for p in contender.module.parameters()),
        "precision": "bf16" if contender.amp else "fp32",
        "systems": len(batch.natoms),
        "atoms": len(batch.pos),
        "edges": batch.edge_index.shape[1],
    }


def _inference(contender: Contender, batch: AtomicData) -> Callable[[], Outputs]:
    def function() -> Outputs:
        with torch.no_grad():
            return contender(batch)

    return function


def _training_step(contender: Contender, batch: AtomicData, optimizer: Optimizer) -> Callable[[], None]:
    """Forward, loss, backward and optimiser, on weights that hardly change."""

    def function() -> None:
        optimizer.zero_grad(set_to_none=True)
        outputs = contender(batch)
        loss = (outputs["energy"].view(-1).float() - batch.energy).abs().mean()
        if "forces" in outputs:
            loss = loss + (outputs["forces"].float() - batch.forces).norm(dim=1).mean()
        loss.backward()
        optimizer.step()

    return function


def _difference(expected: Outputs, got: Outputs) -> dict[str, float]:
    """Largest difference of each output, as a share of the largest expected value."""
    return {
        name: float((got[name].float() - value.float()).abs().max() / value.float().abs().max())
        for name, value in expected.items()
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    if not cpu.is_file():
        return platform.processor() or platform.machine()
    lines = [line.split(":", 1) for line in cpu.read_text().split("\n\n")[0].splitlines() if ":" in line]
    fields = {key.strip(): value.strip() for key, value in lines}
    flags = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return ", ".join([fields.get("model name", platform.machine()), *flags])
