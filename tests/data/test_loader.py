"""Samplers: every sample exactly once, the same global batches on any number of ranks."""

import pytest

from faenet_ocp.data.loader import EvalBatchSampler, TrainBatchSampler, even_slice


def _epoch(world: int, *, n: int = 103, batch: int = 16, epoch: int = 3, start: int = 0) -> list[set]:
    ranks = []
    for rank in range(world):
        sampler = TrainBatchSampler(n, batch, seed=5, rank=rank, world_size=world)
        sampler.set_epoch_and_start_iteration(epoch, start)
        ranks.append(list(sampler))
    assert len({len(batches) for batches in ranks}) == 1
    for step in zip(*ranks, strict=True):
        sizes = [len(share) for share in step]
        assert max(sizes) - min(sizes) <= 1
    return [set().union(*step) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_sample_once_and_the_same_batches_on_any_ranks(world: int) -> None:
    batches = _epoch(world)
    assert batches == _epoch(1)
    keys = [key for batch in batches for key in batch]
    assert sorted(keys) == [(3, i) for i in range(103)]
    assert {len(batch) for batch in batches} == {14, 15}


def test_epochs_differ_and_the_middle_of_one_can_be_entered() -> None:
    assert _epoch(2, epoch=4) != _epoch(2, epoch=3)
    assert _epoch(2, start=4) == _epoch(2)[4:]


def test_real_sizes() -> None:
    sampler = TrainBatchSampler(460_328, 256, seed=0)
    assert len(sampler) == 1799
    assert len(next(iter(sampler))) == 256


def test_a_rank_without_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"optim.batch_size: 8 systems of 9 give batches of 4, too few for 5 rank"):
        TrainBatchSampler(9, 8, seed=0, world_size=5)
    with pytest.raises(ValueError, match="2 accumulation step"):
        TrainBatchSampler(5, 1, seed=0, num_chunks=2)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_counts_each_sample_once(world: int) -> None:
    seen = [
        key for rank in range(world) for b in EvalBatchSampler(range(7), 4, rank=rank, world_size=world) for key in b
    ]
    assert sorted(seen) == [(0, i) for i in range(7)]
    for rank in range(world):
        sampler = EvalBatchSampler(range(7), 4, rank=rank, world_size=world)
        assert len(sampler) == len(list(sampler))


def test_even_slices_cover_without_overlap() -> None:
    for total in range(20):
        parts = [list(range(total))[even_slice(total, 6, part)] for part in range(6)]
        assert [x for part in parts for x in part] == list(range(total))
