"""Batches: which samples, in which order, on which rank.

Batch sizes are in systems and over all ranks together. The order of an epoch depends only on (seed, epoch, number of
samples, batch size), never on the number of ranks or workers: global batch b is the same set of systems on 1 and on 8
ranks, split between them as evenly as possible.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from torch.utils.data import DataLoader, Dataset, Sampler

Key = tuple[int, int]
"""(epoch, index): what a dataset is asked for; the epoch decides its random transforms."""


def even_slice(total: int, parts: int, part: int) -> slice:
    """Part `part` of `total` items cut into `parts` runs whose lengths differ by at most one."""
    base, extra = divmod(total, parts)
    start = part * base + min(part, extra)
    return slice(start, start + base + (part < extra))


class TrainBatchSampler(Sampler[list[Key]]):
    """Every sample exactly once an epoch, in batches of `batch_size` systems over all ranks.

    The epoch is cut into ceil(num_samples / batch_size) global batches whose sizes differ by at most one (460,328
    systems at 256 give 1,799 batches of 255 or 256), so nothing is dropped or repeated.

    Args:
        num_samples: size of the training set.
        batch_size: systems in a global batch.
        seed: of the order; epoch e is shuffled with (seed, e).
        rank: this process.
        world_size: number of processes.
        num_chunks: micro-batches that each rank's share is cut into (gradient accumulation).

    Raises:
        ValueError: a rank would get no system in some step.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1, num_chunks: int = 1
    ):
        self.num_samples = num_samples
        self.num_batches = -(-num_samples // batch_size)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = self.start = 0
        smallest = num_samples // self.num_batches if num_samples else 0
        if smallest < world_size * num_chunks:
            raise ValueError(
                f"optim.batch_size: {batch_size} systems of {num_samples} give batches of {smallest}, too few for "
                f"{world_size} rank(s) x {num_chunks} accumulation step(s)"
            )

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_samples)
        for batch in range(self.start, self.num_batches):
            members = order[even_slice(self.num_samples, self.num_batches, batch)]
            mine = members[even_slice(len(members), self.world_size, self.rank)]
            yield [(self.epoch, int(index)) for index in mine]

    def set_epoch_and_start_iteration(self, epoch: int, start: int) -> None:
        """Called by fairchem's unit at the start of an epoch, or in its middle when a run is resumed."""
        self.epoch, self.start = epoch, start


class EvalBatchSampler(Sampler[list[Key]]):
    """Rank r of w takes the samples r, r + w, r + 2w, ... of `indices` in order: each sample once, no padding."""

    def __init__(self, indices: Sequence[int], batch_size: int, *, rank: int = 0, world_size: int = 1):
        self.indices = indices[rank::world_size]
        self.batch_size = max(1, batch_size // world_size)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, int(index)) for index in self.indices[start : start + self.batch_size]]


def collate(samples: Sequence[AtomicData], num_chunks: int = 1) -> list[AtomicData]:
    """Samples to `num_chunks` batches (micro-batches of one optimiser step)."""
    return [atomicdata_list_to_batch(list(samples[even_slice(len(samples), num_chunks, i)])) for i in range(num_chunks)]


def make_loader(
    dataset: Dataset,
    batch_sampler: Sampler[list[Key]],
    *,
    num_workers: int,
    num_chunks: int = 1,
    persistent: bool = False,
    collate_fn: Callable[..., Any] = collate,
) -> DataLoader:
    """A loader of lists of batches; workers are forked, as spawned ones would import everything again."""
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=partial(collate_fn, num_chunks=num_chunks),
        num_workers=num_workers,
        persistent_workers=persistent and num_workers > 0,
        multiprocessing_context="fork" if num_workers > 0 else None,
    )
