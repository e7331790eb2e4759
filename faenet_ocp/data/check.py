"""Lists all records of data sets that cannot be used (`--mode check`); edges and tags that cannot be meant."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from faenet_ocp.common.pool import ordered_map
from faenet_ocp.data.loader import load_batch
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.graph.lists import ROUNDING
from faenet_ocp.graph.vectors import edge_lengths

_AT_ONCE = 256
"""Systems of one task: what a process holds in memory, however large the data sets are."""

_FEW_TASKS = 8
"""So many are done before processes have started."""

_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Problem:
    """A sample that cannot be used.

    Attributes:
        index: in its data set.
        file: where it is stored; empty if the data set does not say.
        reason: what is wrong, with file, record and sid as far as they are known.
    """

    index: int
    file: str
    reason: str


def check(datasets: Mapping[str, Dataset], num_workers: int, *, progress: bool = True) -> dict[str, list[Problem]]:
    """Makes every sample of all splits as a training would, with edges, labels and transforms.

    Args:
        datasets: by split; picklable.
        num_workers: processes; 1, or few systems: this one.
        progress: show a bar.

    Returns:
        the samples of each split that cannot be used, in order.

    Raises:
        RuntimeError: a process died.
    """
    sizes = {split: len(dataset) for split, dataset in datasets.items()}  # type: ignore[arg-type]
    tasks = [
        (split, start, min(start + _AT_ONCE, size))
        for split, size in sizes.items()
        for start in range(0, size, _AT_ONCE)
    ]
    found: dict[str, list[Problem]] = {split: [] for split in datasets}
    workers = num_workers if len(tasks) > _FEW_TASKS else 1
    results = ordered_map(partial(_problems, datasets), tasks, workers)
    with tqdm(total=sum(sizes.values()), unit="system", disable=not progress, mininterval=1.0) as bar:
        for (split, start, stop), problems in zip(tasks, results, strict=True):
            found[split] += problems
            bar.set_description(f"checking {split}", refresh=False)
            bar.set_postfix(unusable=sum(map(len, found.values())), refresh=False)
            bar.update(stop - start)
    return found


def _problems(datasets: Mapping[str, Dataset], split: str, start: int, stop: int) -> list[Problem]:
    """Those of some samples, which are read one by one only if they cannot be read together."""
    dataset = datasets[split]
    keys = [(0, index) for index in range(start, stop)]
    together = _failure(load_batch, dataset, keys)
    if together is None:
        return []
    reasons = {key[1]: _failure(dataset.__getitem__, key) for key in keys}
    found = {index: reason for index, reason in reasons.items() if reason is not None} or {start: together}
    locate = getattr(dataset, "locate", None)
    return [Problem(index, str(locate(index)[0].path) if locate else "", reason) for index, reason in found.items()]


def _failure(function: Callable[..., Any], *arguments: Any) -> str | None:
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    except Exception as error:  # e.g. of a transform of the user's own; the rest shall be looked at all the same
        return f"{type(error).__name__}: {error}"
    return None


def sample_of(dataset: Dataset, size: int) -> AtomicData:
    """A batch of so many samples, spread evenly, or of all where there are fewer."""
    return load_batch(dataset, [(0, index) for index in _spread(len(dataset), size)])  # type: ignore[arg-type]


def _spread(total: int, size: int) -> list[int]:
    used = min(total, size)
    return [number * total // used for number in range(used)]


def compare_edges(dataset: OC20LmdbDataset, size: int) -> list[str]:
    """Looks for stored edges that are not those which `edges: recompute` gives, cut to the same limits.

    They may end too early, be those of another geometry, or have another direction or sign. An edge as long as the
    cutoff may be there or not, whatever its last digits are.

    Args:
        dataset: its transforms do not matter.
        size: records to look at, spread evenly.

    Returns:
        for each record that differs which it is and how.
    """
    stored, built = dataset.plain("stored"), dataset.plain("recompute")
    cutoff, found = dataset.config["cutoff"], []
    for index in _spread(len(dataset), size):
        try:
            given, expected = stored[index], built[index]
        except ValueError:
            continue  # who uses the record says what is wrong, or uses its edges where none can be searched for
        if torch.equal(given.edge_index, expected.edge_index) and torch.equal(
            given.cell_offsets, expected.cell_offsets
        ):
            continue
        (ours, sure_ours), (whole, sure_whole) = _edge_sets(given, cutoff), _edge_sets(expected, cutoff)
        missing, others, doubled = len(sure_whole - ours), len(sure_ours - whole), int(given.nedges) - len(ours)
        if missing or others or doubled:
            file, position = dataset.locate(index)
            lengths = edge_lengths(given.pos, given.cell, given.edge_index, given.cell_offsets)
            found.append(
                f"{file.path}: record {file.numbers[position]} lacks {missing} of {len(whole)} edges and has {others} "
                f"others and {doubled} twice; its longest is {max(lengths, default=0):.2f} A, and an atom has at most "
                f"{max(given.edge_index[1].bincount(), default=0)}"
            )
    return found


def _edge_sets(data: AtomicData, cutoff: float) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """All edges, and those that are shorter than the cutoff by more than rounding."""
    edges = torch.cat([data.edge_index.T, data.cell_offsets.long()], 1)
    is_sure = edge_lengths(data.pos, data.cell, data.edge_index, data.cell_offsets) < cutoff - 2 * ROUNDING
    return set(map(tuple, edges.tolist())), set(map(tuple, edges[is_sure].tolist()))


def suspicious_tags(batch: AtomicData) -> Iterator[str]:
    """What nearly all systems with an adsorbate have, and cannot be meant, in words.

    Args:
        batch: with sub-surface atoms; tags are OC20's: 0 below the surface, 1 surface, 2 adsorbate.
    """
    if not bool(batch.tags.any()):
        yield "all atoms have tag 0, or none: to the model, all are below the surface"
    looked_at, found = 0, {"low": 0, "held": 0, "upside down": 0}
    atoms = (batch.tags, batch.fixed, (batch.pos * _up(batch.cell)[batch.batch]).sum(dim=1))
    for tags, fixed, z in zip(*(values.split(batch.natoms.tolist()) for values in atoms), strict=True):
        adsorbate, buried = tags == 2, tags == 0
        surface = tags == 1 if (tags == 1).any() else buried
        if adsorbate.any() and surface.any():
            looked_at += 1
            found["low"] += bool(z[adsorbate].max() <= z[surface].mean())
            found["held"] += bool(fixed[adsorbate].all())
            found["upside down"] += bool(buried.any() and z[buried].mean() > z[~buried].mean())
    words = {
        "low": "no atom of tag 2 (adsorbate) lies above the surface (tag 1)",
        "held": "all atoms of tag 2 (adsorbate) are fixed",
        "upside down": "atoms of tag 0 (below the surface) lie above the others",
    }
    for name, count in found.items():
        if looked_at and count >= _NEARLY_ALL * looked_at:
            yield f"in {count} of {looked_at} systems {words[name]}"


def _up(cell: Tensor) -> Tensor:
    """The direction out of the surface, (B, 3): normal to the first two lattice vectors, towards the third, or z."""
    normal = torch.linalg.cross(cell[:, 0], cell[:, 1])
    normal = torch.where((normal * cell[:, 2]).sum(dim=1, keepdim=True) < 0, -normal, normal)
    return torch.where((normal == 0).all(dim=1, keepdim=True), normal.new_tensor([0.0, 0.0, 1.0]), normal)
