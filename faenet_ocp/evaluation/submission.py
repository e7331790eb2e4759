"""One file for OC20's leaderboard from the predictions of the four test splits.

Forces become float16, as OCP stores them: half the file for a relative error of at most 5e-4. Energies stay what they
are.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from faenet_ocp.common.files import write_bytes
from faenet_ocp.data.oc20 import OC20LmdbDataset

NAMES = ("id", "ood_ads", "ood_cat", "ood_both")
ARRAYS = {"is2re": ("ids", "energy"), "s2ef": ("ids", "energy", "forces", "chunk_idx")}


def make_submission(
    task: str, folder: Path, splits: Sequence[str], out: Path, *, sources: Sequence[str] | None = None
) -> dict[str, int]:
    """Joins `<split>.npz` files (`prediction.py`) to `<name>_<array>` entries of one npz.

    Args:
        task: is2re or s2ef.
        folder: where the files lie.
        splits: four file names, in the order id, ood_ads, ood_cat, ood_both.
        out: file to write; never overwritten.
        sources: LMDBs of the splits, in the same order; every id of theirs has to be predicted exactly once.

    Returns:
        systems by split.

    Raises:
        ValueError: a missing file or array, ids repeated, missing or unknown, arrays that do not fit each other, forces
            that are too large for float16.
    """
    if len(splits) != len(NAMES) or (sources is not None and len(sources) != len(NAMES)):
        raise ValueError(f"a submission has the four splits {', '.join(NAMES)}; got {', '.join(splits)}")
    if out.exists():
        raise ValueError(f"{out} is there already")
    arrays: dict[str, np.ndarray] = {}
    counts = {}
    for number, (name, split) in enumerate(zip(NAMES, splits, strict=True)):
        part = _load(folder / f"{split}.npz", task)
        if sources is not None:
            _check_ids(split, part["ids"], _expected_ids(sources[number], task))
        counts[split] = len(part["ids"])
        arrays |= {f"{name}_{key}": value for key, value in part.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_bytes(out, content.getvalue())
    return counts


def _load(path: Path, task: str) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; predict the split first (--mode predict)")
    with np.load(path) as content:
        missing = set(ARRAYS[task]) - set(content.files)
        if missing:
            raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}; is it of task {task}?")
        part = {name: content[name] for name in ARRAYS[task]}
    ids, repeats = np.unique(part["ids"], return_counts=True)
    if len(ids) != len(part["ids"]):
        raise ValueError(f"{path}: {int((repeats > 1).sum())} ids are there more than once, e.g. {ids[repeats > 1][0]}")
    if len(part["energy"]) != len(ids) or (task == "s2ef" and len(part["chunk_idx"]) != max(0, len(ids) - 1)):
        raise ValueError(f"{path}: {len(ids)} ids, but {len(part['energy'])} energies or chunks for another number")
    if task == "s2ef":
        largest = float(np.abs(part["forces"]).max(initial=0.0))
        if not largest < float(np.finfo(np.float16).max):
            raise ValueError(f"{path}: a force component of {largest:.4g} eV/A is too large for float16")
        part["forces"] = part["forces"].astype(np.float16)
    return part


def _check_ids(split: str, found: np.ndarray, expected: set[str]) -> None:
    predicted = set(found.tolist())
    for ids, what in ((expected - predicted, "have no prediction"), (predicted - expected, "are not in the split")):
        if ids:
            raise ValueError(f"split {split}: {len(ids)} ids {what}, e.g. {min(ids)}")


def _expected_ids(source: str, task: str) -> set[str]:
    dataset = OC20LmdbDataset({"src": source, "labels": [], "edges": "none"})
    ids = set()
    for index in tqdm(range(len(dataset)), desc=f"ids of {source}", unit="system", leave=False, disable=None):
        sample = dataset[index]
        ids.add(sample.sid[0] if task == "is2re" else f"{sample.sid[0]}_{int(sample.fid)}")
    return ids
