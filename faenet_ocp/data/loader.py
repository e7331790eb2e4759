"""Batches: which samples, in which order, on which rank.

Batch sizes are in systems and over all ranks together. The order of an epoch depends only on (seed, epoch, number of
samples, batch size), never on the number of ranks or workers: global batch b is the same set of systems on 1 and on 8
ranks, and so is each of its micro-batches; ranks share them as evenly as possible.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from faenet_ocp.frames import frame_sizes

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
        num_chunks: micro-batches that each batch is cut into (gradient accumulation); ranks share each of them.
        sizes: atoms of each sample: ranks get as many systems as without, but chosen such that their atoms are
            about equally many. The global batches stay the same.

    Raises:
        ValueError: a rank would get no system in some step.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_chunks: int = 1,
        sizes: NDArray[np.integer] | None = None,
    ):
        self.num_samples = num_samples
        self.num_batches = -(-num_samples // batch_size)
        self.seed, self.rank, self.world_size, self.num_chunks = seed, rank, world_size, num_chunks
        self.sizes = sizes
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
            # A rank's shares of the chunks do not grow and differ by at most one: `collate` finds them by even_slice.
            chunks = (members[even_slice(len(members), self.num_chunks, chunk)] for chunk in range(self.num_chunks))
            yield [(self.epoch, int(index)) for chunk in chunks for index in self._share(chunk)]

    def _share(self, members: NDArray[np.integer]) -> NDArray[np.integer]:
        if self.sizes is None or self.world_size == 1:
            return members[even_slice(len(members), self.world_size, self.rank)]
        return members[balanced_shares(self.sizes[members], self.world_size)[self.rank]]

    def set_epoch_and_start_iteration(self, epoch: int, start: int) -> None:
        """Called by fairchem's unit at the start of an epoch, or in its middle when a run is resumed."""
        self.epoch, self.start = epoch, start


def balanced_shares(sizes: NDArray[np.integer], parts: int) -> list[NDArray[np.intp]]:
    """Items in `parts` shares of about equal total size; as many items in each as `even_slice` would give.

    The largest first, each to the share that is smallest so far and not full. Depends on the sizes only.
    """
    room = [len(range(*even_slice(len(sizes), parts, part).indices(len(sizes)))) for part in range(parts)]
    loads = [0] * parts
    shares: list[list[int]] = [[] for _ in range(parts)]
    for item in np.argsort(-sizes, kind="stable").tolist():
        part = min((p for p in range(parts) if len(shares[p]) < room[p]), key=lambda p: (loads[p], p))
        shares[part].append(item)
        loads[part] += int(sizes[item])
    return [np.array(sorted(share), dtype=np.intp) for share in shares]


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


def _same(item: Any) -> Any:
    return item


class Batches(list[AtomicData]):
    """The micro-batches of one step on one rank."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with one tensor in place of all: a process takes a third of a millisecond to hand one over."""
        size, segments = 0, []
        states: list[dict[str, Any]] = []
        for batch in self:
            states.append(state := dict(batch.__dict__))
            for name, value in batch.__dict__.items():
                if isinstance(value, Tensor):
                    state[name] = segment = _Segment(size, value.numel() * value.itemsize, value.dtype, value.shape)
                    segments.append((segment, value))
                    size += -(-segment.length // _ALIGNMENT) * _ALIGNMENT
        memory = torch.empty(size, dtype=torch.uint8)
        for segment, value in segments:
            segment.of(memory).copy_(value)
        return _unpickle_batches, (memory, states)

    def pin_memory(self) -> Self:
        """Called by the loader: tensors in page-locked memory, from where a GPU copies while it works."""
        for batch in self:
            batch.apply(Tensor.pin_memory)
        return self


_ALIGNMENT = 64


class _Segment(NamedTuple):
    """Of a piece of memory, where a tensor is: start and length in bytes, type, shape."""

    start: int
    length: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, memory: Tensor) -> Tensor:
        return memory[self.start : self.start + self.length].view(self.dtype).view(self.shape)


def _unpickle_batches(memory: Tensor, states: list[dict[str, Any]]) -> Batches:
    batches = Batches()
    for state in states:
        batch = AtomicData.__new__(AtomicData)
        batch.__dict__ |= {n: v.of(memory) if isinstance(v, _Segment) else v for n, v in state.items()}
        batches.append(batch)
    return batches


def collate(samples: Sequence[AtomicData], num_chunks: int = 1) -> Batches:
    """Samples to `num_chunks` batches (micro-batches of one optimiser step)."""
    return Batches(atomicdata_list_to_batch(chunk) for chunk in _chunks(samples, num_chunks))


def _chunks(items: Sequence[Any], num_chunks: int) -> Iterator[Sequence[Any]]:
    return (items[even_slice(len(items), num_chunks, chunk)] for chunk in range(num_chunks))


class BatchSource(Dataset):
    """What a loader takes `Batches` from: keys in, batches out.

    A data set with a method ``load_batch(keys)`` makes a batch as a whole; the samples of others are read one by one.
    """

    def __init__(self, dataset: Dataset, num_chunks: int, convert: Callable[[Batches], Any]):
        self.dataset, self.num_chunks, self.convert = dataset, num_chunks, convert

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitems__(self, keys: Sequence[Key]) -> Any:
        """Called by torch's DataLoader with the keys of a batch; the text of the error if a sample cannot be used.

        An error itself would arrive in the training process with the worker's traceback as its text.
        """
        try:
            return self.convert(Batches(load_batch(self.dataset, chunk) for chunk in _chunks(keys, self.num_chunks)))
        except ValueError as error:
            return str(error)


def load_batch(dataset: Dataset, keys: Sequence[Key]) -> AtomicData:
    """One batch, from whichever data set; with several frames of a system it says how many (`frame_sizes`).

    Raises:
        ValueError: one of the samples cannot be used; which, and why.
    """
    batch = _load_batch(dataset, keys)
    if "frame_weight" in batch and batch.frame_weight.shape[1] > 1:
        batch.frame_sizes = frame_sizes(batch.frame_weight, batch.natoms, batch.nedges)
    return batch


def _load_batch(dataset: Dataset, keys: Sequence[Key]) -> AtomicData:
    if not hasattr(dataset, "load_batch"):
        return atomicdata_list_to_batch([dataset[key] for key in keys])
    try:
        return dataset.load_batch(keys)
    except ValueError:
        for key in keys:  # one by one, to say which it is
            dataset[key]
        raise


class Loader(DataLoader):
    """A DataLoader of `Batches` that ends with a ValueError at a sample that cannot be used."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batches in super().__iter__():
            if isinstance(batches, str):
                raise ValueError(batches)
            yield batches


def make_loader(
    dataset: Dataset,
    batch_sampler: Iterable[list[Key]],
    *,
    num_workers: int,
    num_chunks: int = 1,
    persistent: bool = False,
    context: str = "fork",
    pin_memory: bool = False,
    convert: Callable[[Batches], Any] = _same,
) -> Loader:
    """A loader of `Batches`.

    Args:
        dataset: see `BatchSource`.
        batch_sampler: lists of keys.
        num_workers: processes that load; 0: this one.
        num_chunks: micro-batches of each.
        persistent: keep the workers for the next epoch.
        context: how workers start. "fork" takes no time; "spawn" imports everything again (seconds in each), but
            does not inherit threads and locks.
        pin_memory: for training on a GPU.
        convert: what is wanted of each `Batches`, made where it is loaded; default: these themselves.
    """
    return Loader(
        BatchSource(dataset, num_chunks, convert),
        batch_sampler=batch_sampler,
        collate_fn=_same,
        num_workers=num_workers,
        persistent_workers=persistent and num_workers > 0,
        multiprocessing_context=context if num_workers > 0 else None,
        worker_init_fn=_begin_worker,
        pin_memory=pin_memory,
    )


def _begin_worker(_worker: int) -> None:
    """Ctrl-C and `timeout` signal the whole process group: the training process decides when its workers end.

    Without them it could not finish its step. Workers end when it closes the loader, and within seconds when it dies.
    What a forked worker inherits is not its to free: process groups wait for threads that it does not have.
    """
    os.setpgid(0, 0)
    gc.freeze()
