"""Reads every record of data sets and lists what cannot be used: `--mode check`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from faenet_ocp.common.pool import ordered_map
from faenet_ocp.data.loader import load_batch

_AT_ONCE = 256
"""Systems of one task: what memory holds of a data set of any size, in each process."""


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


def check(datasets: Mapping[str, Dataset], num_workers: int) -> dict[str, list[Problem]]:
    """`check_split` of each split, with a progress bar."""
    return {split: check_split(dataset, num_workers, progress=split) for split, dataset in datasets.items()}


def check_split(dataset: Dataset, num_workers: int, progress: str | None = None) -> list[Problem]:
    """Makes every sample of a data set as a training would, with edges, labels and transforms.

    Args:
        dataset: picklable.
        num_workers: processes; 1: this one.
        progress: what the progress bar calls it; None: no bar.

    Returns:
        the samples that cannot be used, in order.

    Raises:
        RuntimeError: a process died.
    """
    found: list[Problem] = []
    size = len(dataset)  # type: ignore[arg-type]
    tasks = [(start, min(start + _AT_ONCE, size)) for start in range(0, size, _AT_ONCE)]
    results = ordered_map(partial(_problems, dataset), tasks, num_workers)
    with tqdm(total=size, desc=progress, unit="system", disable=progress is None, mininterval=1.0) as bar:
        for (start, stop), problems in zip(tasks, results, strict=True):
            found += problems
            bar.update(stop - start)
            bar.set_postfix(unusable=len(found), refresh=False)
    return found


def _problems(dataset: Dataset, start: int, stop: int) -> list[Problem]:
    """Those of some samples; read one by one only if they cannot be read together."""
    keys = [(0, index) for index in range(start, stop)]
    reason = _failure(load_batch, dataset, keys)
    if reason is None:
        return []
    reasons = {key[1]: _failure(dataset.__getitem__, key) for key in keys}
    found = {index: reason for index, reason in reasons.items() if reason is not None} or {start: reason}
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
