"""Shards of a prepared data set, written by several processes: progress, and the faults of all at the end."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm import tqdm

from faenet_ocp.common.pool import ordered_map

logger = logging.getLogger(__name__)
Shard = TypeVar("Shard")


def write_shards(
    write: Callable[[Shard], int | ValueError],
    shards: Sequence[Shard],
    *,
    num_workers: int,
    inputs: Callable[[Shard], int],
    unit: str,
    records: str,
) -> None:
    """Writes all shards; a fault costs its own shard only, and is logged when it is found.

    Args:
        write: writes one, and returns how many records it has, or what is wrong with its input.
        shards: what there is to write.
        num_workers: processes.
        inputs: how many a shard is made from.
        unit: an input, for the progress bar.
        records: what a record is called there.

    Raises:
        ValueError: of the kind of the first fault, with a line for each.
    """
    faults: list[ValueError] = []
    written = 0
    total = sum(map(inputs, shards))
    with tqdm(total=total, unit=unit, desc="preparing", smoothing=0.05, disable=not shards) as bar:
        results = ordered_map(write, [(shard,) for shard in shards], num_workers)
        for shard, result in zip(shards, results, strict=True):
            if isinstance(result, ValueError):
                faults.append(result)
                logger.error("%s", result)
            else:
                written += result
            bar.set_postfix({records: written}, refresh=False)
            bar.update(inputs(shard))
    if faults:
        raise type(faults[0])("\n".join(map(str, faults)))
