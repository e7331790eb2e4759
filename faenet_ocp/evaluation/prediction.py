"""Predictions of splits without labels, in the files that OC20's leaderboard takes.

`<split>.npz`, in the order of the data set:

| array | IS2RE | S2EF |
| --- | --- | --- |
| `ids` | `<sid>` | `<sid>_<fid>` |
| `energy` (systems,) | eV, float64 | eV, float16 as OCP stores it |
| `forces` (free atoms, 3) | - | eV/Angstrom, float16, of free atoms, one system after the other |
| `chunk_idx` (systems - 1,) | - | where `numpy.split` cuts `forces` into systems |

A split is predicted in parts (at most 2,000 systems), each written whole to a folder beside the final file; ranks share
the parts, an interrupted run goes on with those that are missing, and the last step joins them under the final name.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from fairchem.core.common import distutils
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.units.mlip_unit.mlip_unit import Task
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from faenet_ocp.data.loader import Batches, EvalBatchSampler, Key
from faenet_ocp.tasks.tasks import conservative_outputs, to_physical

_LARGEST_PART = 2_000
_PARTS = 64  # of a small split: enough for any number of ranks, and the same for all


def predict_split(
    model: nn.Module,
    tasks: Sequence[Task],
    dataset: Dataset,
    path: Path,
    *,
    key: str,
    make_loader: Callable[[Sampler[list[Key]]], DataLoader],
    batch_size: int,
    amp: bool = False,
    conservative: bool = False,
) -> int:
    """Predicts every system of a split once and writes `path`.

    Args:
        model, tasks, amp, conservative: as in `validation.run_split`.
        dataset: the split; labels are not looked at.
        path: `<split>.npz`.
        key: stands for weights and settings: parts of another key are not taken over.
        make_loader: a loader for a batch sampler on the data set.
        batch_size: systems in a batch on this rank.

    Returns:
        number of systems.

    Raises:
        ValueError: the file is there already, or a prediction is not finite.
    """
    if path.exists():
        raise ValueError(f"{path} is there already; choose another --identifier or move it away")
    total = len(dataset)  # type: ignore[arg-type]
    folder = path.with_name(f"{path.stem}.{key}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    size = min(_LARGEST_PART, -(-total // _PARTS))
    parts = [(folder / f"{start:010d}.npz", range(start, min(start + size, total))) for start in range(0, total, size)]
    distutils.synchronize()
    missing = [part for part in parts if not part[0].exists()]
    if len(missing) < len(parts):
        logging.info("%s: %d of %d parts are there already", path.name, len(parts) - len(missing), len(parts))
    distutils.synchronize()
    mine = missing[distutils.get_rank() :: distutils.get_world_size()]
    hidden = None if distutils.is_master() else True
    samplers = [EvalBatchSampler(indices, batch_size) for _, indices in mine]
    batches = iter(make_loader(_InTurn(samplers)))
    with tqdm(total=sum(len(r) for _, r in mine), desc=path.stem, unit="system", leave=False, disable=hidden) as bar:
        for (part, _), sampler in zip(mine, samplers, strict=True):
            its = islice(batches, len(sampler))
            arrays = _predict(model, tasks, its, bar, amp=amp, conservative=conservative)
            _check_finite(arrays, path.stem)
            _write(part, arrays)
    distutils.synchronize()
    if distutils.is_master():
        _join([part for part, _ in parts], path)
        shutil.rmtree(folder)
    distutils.synchronize()
    return total


class _InTurn(Sampler[list[Key]]):
    """The batches of one sampler after the other."""

    def __init__(self, samplers: Sequence[EvalBatchSampler]):
        self.samplers = samplers

    def __len__(self) -> int:
        return sum(map(len, self.samplers))

    def __iter__(self) -> Iterator[list[Key]]:
        return chain.from_iterable(self.samplers)


@torch.no_grad()
def _predict(
    model: nn.Module,
    tasks: Sequence[Task],
    loader: Iterable[Batches],
    bar: tqdm,
    *,
    amp: bool,
    conservative: bool,
) -> dict[str, np.ndarray]:
    device = torch.device(distutils.get_device_for_local_rank())
    with_forces = any(task.name == "forces" for task in tasks)
    names = ("ids", "energy", "forces", "free") if with_forces else ("ids", "energy")
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    model.eval()
    for batches in loader:
        for batch in batches:
            batch = batch.to(device)
            with torch.autocast(device_type=device.type, dtype=torch.bfloat16, enabled=amp):
                outputs = conservative_outputs(model, tasks, batch) if conservative else model(batch)
            physical = to_physical(tasks, outputs, batch)
            rows["ids"].append(np.array(_ids(batch, with_frames=with_forces)))
            rows["energy"].append(physical["energy"].double().cpu().numpy())
            if with_forces:
                _check_complete(batch)
                free = batch.fixed == 0
                per_system = torch.zeros_like(batch.natoms).index_add(0, batch.batch, free.to(batch.natoms.dtype))
                rows["forces"].append(physical["forces"][free].double().cpu().numpy())
                rows["free"].append(per_system.cpu().numpy())
            bar.update(len(batch.natoms))
    return {name: np.concatenate(arrays) for name, arrays in rows.items()}


def _ids(batch: AtomicData, *, with_frames: bool) -> list[str]:
    """`<sid>`, for S2EF `<sid>_<fid>`."""
    if not with_frames:
        return list(batch.sid)
    return [f"{sid}_{fid}" for sid, fid in zip(batch.sid, batch.fid.tolist(), strict=True)]


def _check_complete(batch: AtomicData) -> None:
    """The leaderboard wants a force for every free atom."""
    if "removed_free" in batch and bool(batch.removed_free.any()):
        system = int(batch.removed_free.argmax())
        raise ValueError(
            f"sid {batch.sid[system]}: {int(batch.removed_free[system])} free atoms are of tag 0, and "
            "remove_subsurface takes them out, so that they get no forces. Only fixed atoms can be taken out: "
            "predict with a model trained without dataset.transforms.remove_subsurface"
        )


def _check_finite(arrays: dict[str, np.ndarray], split: str) -> None:
    for name in ("energy", "forces"):
        if name in arrays:
            bad = int((~np.isfinite(arrays[name])).reshape(len(arrays[name]), -1).any(axis=1).sum())
            if bad:
                raise ValueError(f"split {split!r}: {bad} of {len(arrays[name])} predicted {name} are not finite")


def _write(path: Path, arrays: dict[str, np.ndarray], *, compress: bool = False) -> None:
    """Writes under a temporary name and renames: a file with the final name is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        (np.savez_compressed if compress else np.savez)(file, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


def _join(parts: Sequence[Path], path: Path) -> None:
    loaded: dict[str, list[np.ndarray]] = {}
    for part in parts:
        with np.load(part) as content:
            for name in content.files:
                loaded.setdefault(name, []).append(content[name])
    arrays = {name: np.concatenate(chunks) for name, chunks in loaded.items()}
    if "forces" in arrays:
        arrays["chunk_idx"] = np.cumsum(arrays.pop("free"))[:-1]
        arrays["energy"], arrays["forces"] = arrays["energy"].astype(np.float16), arrays["forces"].astype(np.float16)
    _write(path, arrays, compress=True)
