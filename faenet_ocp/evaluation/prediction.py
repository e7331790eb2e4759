"""Predictions of splits without labels, in files that `submission.py` joins to one for OC20's leaderboard.

`<split>.npz`, in the order of the data set:

| array | IS2RE | S2EF |
| --- | --- | --- |
| `ids` | `<sid>` | `<sid>_<fid>` |
| `energy` (systems,) | eV, float64 | the same |
| `forces` (free atoms, 3) | - | eV/Angstrom, float32, of free atoms, one system after the other |
| `chunk_idx` (systems - 1,) | - | where `numpy.split` cuts `forces` into systems |
| any other scalar (systems,) | in its unit, float64 | the same |

A split is predicted in parts (at most 2,000 systems), each written whole to a folder beside the final file; ranks share
the parts, an interrupted run goes on with those that are missing, and the last step joins them under the final name.
"""

import io
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from fairchem.core.common import distutils
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from faenet_ocp.common.files import write_bytes
from faenet_ocp.data.loader import EvalBatchSampler, Key
from faenet_ocp.evaluation.metrics import UnseenElements
from faenet_ocp.evaluation.results import unseen_in_words
from faenet_ocp.evaluation.validation import predict, reduced
from faenet_ocp.tasks.tasks import TargetTask

_LARGEST_PART = 2_000
_PARTS = 64  # of a small split: enough for any number of ranks, and the same for all

Arrays = dict[str, np.ndarray]


def predict_split(
    model: nn.Module,
    tasks: Sequence[TargetTask],
    dataset: Dataset,
    path: Path,
    *,
    key: str,
    make_loader: Callable[[Iterable[list[Key]]], DataLoader],
    batch_size: int,
    unseen: UnseenElements | None = None,
    amp: bool = False,
    conservative: bool = False,
) -> int:
    """Predicts every system of a split once and writes `path`.

    Args:
        model, tasks, amp, conservative: as in `validation.predict`.
        dataset: the split; labels are not looked at.
        path: `<split>.npz`.
        key: stands for weights, settings and data: parts of another key are not taken over.
        make_loader: a loader for batches of the data set.
        batch_size: systems in a batch on this rank.
        unseen: counts elements that the training set lacks, for a warning; None: nothing is known of it.

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
    missing = [part for part in parts if not part[0].exists()]
    if len(missing) < len(parts):
        logging.info("%s: %d of %d parts are there already", path.name, len(parts) - len(missing), len(parts))
    distutils.synchronize()  # all ranks have seen the same parts
    mine = missing[distutils.get_rank() :: distutils.get_world_size()]
    batches = [list(EvalBatchSampler(indices, batch_size)) for _, indices in mine]
    loaded = chain.from_iterable(make_loader(list(chain.from_iterable(batches))))
    predicted = predict(model, tasks, loaded, amp=amp, conservative=conservative)
    hidden = None if distutils.is_master() else True
    with tqdm(total=sum(len(r) for _, r in mine), desc=path.stem, unit="system", leave=False, disable=hidden) as bar:
        for (part, _), keys in zip(mine, batches, strict=True):
            rows = []
            for batch, values, _ in islice(predicted, len(keys)):
                rows.append(_rows(tasks, batch, values))
                if unseen is not None:
                    unseen.update(batch)
                bar.update(len(batch.natoms))
            arrays = _concatenated(rows)
            _check_finite(tasks, arrays, path.stem)
            _write(part, arrays)
    distutils.synchronize()
    if unseen is not None:
        unseen.sums = reduced(unseen.sums, "sum")
        if (counts := unseen.compute()) and distutils.is_master():
            logging.warning(unseen_in_words(path.stem, counts))
    if distutils.is_master():
        _join([part for part, _ in parts], path)
        shutil.rmtree(folder)
    distutils.synchronize()
    return total


def _rows(tasks: Sequence[TargetTask], batch: AtomicData, predictions: dict[str, Tensor]) -> Arrays:
    """The arrays of a part for one batch; `free` counts the atoms of each system that have vectors."""
    with_atoms = any(task.level == "atom" for task in tasks)
    rows = {"ids": np.array(_ids(batch, with_frames=with_atoms))}
    free = batch.fixed == 0
    for task in tasks:
        values = predictions[task.name]
        rows[task.name] = (values[free].float() if task.level == "atom" else values.double()).numpy()
    if with_atoms:
        _check_complete(batch)
        per_system = torch.zeros_like(batch.natoms).index_add(0, batch.batch, free.to(batch.natoms.dtype))
        rows["free"] = per_system.numpy()
    return rows


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


def _check_finite(tasks: Sequence[TargetTask], arrays: Arrays, split: str) -> None:
    for name in (task.name for task in tasks):
        bad = int((~np.isfinite(arrays[name])).reshape(len(arrays[name]), -1).any(axis=1).sum())
        if bad:
            raise ValueError(f"split {split!r}: {bad} of {len(arrays[name])} predicted {name} are not finite")


def _concatenated(rows: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _write(path: Path, arrays: Arrays, *, compress: bool = False) -> None:
    content = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(content, **arrays)  # type: ignore[arg-type]
    write_bytes(path, content.getvalue())


def _join(parts: Sequence[Path], path: Path) -> None:
    loaded = []
    for part in parts:
        with np.load(part) as content:
            loaded.append({name: content[name] for name in content.files})
    arrays = _concatenated(loaded)
    ids, counts = np.unique(arrays["ids"], return_counts=True)
    if counts.max() > 1:
        logging.warning(
            "%s: %d of %d ids belong to several systems, %s to %d: sid (and fid) of the records do not tell them "
            "apart; the order is that of the data set",
            *(path.name, (counts > 1).sum(), len(ids), ids[counts.argmax()], counts.max()),
        )
    if "free" in arrays:
        arrays["chunk_idx"] = np.cumsum(arrays.pop("free"))[:-1]
    _write(path, arrays, compress=True)
