"""Samples that cannot be read or used: an error, or (`dataset.on_bad_sample: skip`) counted, listed and left out.

Loader workers do not fail on such a sample but send a `BadSample` in its place, so that the training process decides,
and in the same step on all ranks.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

Key = tuple[int, int]
"""(epoch, index): what a dataset is asked for; the epoch decides its random transforms."""


@dataclass(frozen=True)
class BadSample:
    """Stands for a sample that cannot be used.

    Attributes:
        index: in the data set.
        reason: the message of its error, which names file, record and sid.
    """

    index: int
    reason: str


class BadSampleError(ValueError):
    """A sample that cannot be used, or more of them than allowed."""


class Tolerant(Dataset):
    """A data set that gives a `BadSample` where another raises a ValueError."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Key) -> Any:
        try:
            return self.dataset[key]
        except ValueError as error:
            return BadSample(index=key[1], reason=str(error))


class BadSamples:
    """Counts and lists the bad samples of one split.

    Args:
        split: its name.
        total: its number of samples.
        max_share: the largest part of them that may be left out; None: the first one is an error.
        path: `bad_samples.jsonl` of the run: one object a line, `split`, `index`, `reason`; each sample once, though
            two ranks that meet it at once may both write it.

    Attributes:
        count: samples left out so far, on all ranks (`add`).
    """

    def __init__(self, split: str, total: int, *, max_share: float | None = None, path: Path | None = None):
        self.split, self.total, self.max_share, self.path = split, total, max_share, path
        self.count = 0

    def note(self, found: Sequence[BadSample]) -> None:
        """Lists what this rank met.

        Raises:
            BadSampleError: no sample may be left out; names file, record and sid.
        """
        if found and self.max_share is None:
            raise BadSampleError(found[0].reason)
        if not found or self.path is None:
            return
        listed = _read(self.path)
        for sample in found:
            entry = {"split": self.split, **asdict(sample)}
            if (self.split, sample.index) not in listed:
                logging.warning("%s: left out: %s", self.split, sample.reason)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")

    def add(self, count: int) -> None:
        """Counts what all ranks met together.

        Raises:
            BadSampleError: they are more than `max_share` allows (on all ranks, if all are given the same counts).
        """
        self.count += count
        if self.count > (self.max_share or 0.0) * self.total:
            raise BadSampleError(
                f"split {self.split!r}: {self.count} of {self.total} samples cannot be used, more than "
                f"dataset.max_bad_share: {self.max_share} allows" + (f"; see {self.path}" if self.path else "")
            )


def _read(path: Path) -> set[tuple[str, int]]:
    if not path.is_file():
        return set()
    found = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            found.add((entry["split"], entry["index"]))
        except (ValueError, KeyError, TypeError):
            continue  # half a line of a run that was killed
    return found
