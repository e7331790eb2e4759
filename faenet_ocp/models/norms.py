"""Norm layers whose training statistics are those of the global batch, on any number of ranks.

On one rank they are the layers that they derive from; so they are when evaluating, where nothing is shared between
ranks. State dicts are the parents'. Sums over ranks are differentiable: the gradient of a rank's input holds the part
of every rank's loss.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch_geometric.nn.norm import GraphNorm

from faenet_ocp.models.functional import segment_sum

EQUIVALENT = 1e-3
"""Variance over mean square, of all channels of a system together, below which its atoms count as nearly equivalent.
Slabs with an adsorbate have 0.03 and more in all blocks, molecules 0.002 and more."""


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    """x summed over all ranks. All ranks call it equally often, in the same order, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SumOverRanks.apply(grad)


def _mean_over_ranks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the rows of x on all ranks, (C,), and their number, (); a rank may have none. Not in bf16."""
    x = x if x.dtype is torch.float64 else x.float()
    sums = _SumOverRanks.apply(torch.cat([x.sum(dim=0), x.new_full((1,), float(len(x)))]))
    count = sums[-1].detach().clamp(min=1)
    return sums[:-1] / count, count


class RankBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows (M, C) of all ranks; the running statistics are the same on each.

    Args:
        num_features: C; everything else as `nn.BatchNorm1d` has it by default.
    """

    num_batches_tracked: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def __init__(self, num_features: int):
        super().__init__(num_features)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or _world_size() == 1:
            return super().forward(x)
        mean, count = _mean_over_ranks(x)
        # From centred values: the difference of two large means would lose digits.
        var, _ = _mean_over_ranks((x - mean).square())
        unbiased = var * count / (count - 1).clamp(min=1)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return ((x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias).to(x.dtype)


class RankGraphNorm(GraphNorm):
    """GraphNorm; without systems (`batch` None) it normalises over all atoms of the batch, here of all ranks.

    Where the atoms of a system are equivalent (a clean slab, a crystal), x is the same on all of them, and what its
    deviations from the mean are divided by is sqrt(eps): rounding errors would come out 300 times larger from every
    block. So deviations fade out: with q their mean square over that of x and over `EQUIVALENT`, they are multiplied by
    1 - (1 - q)^2 where q < 1. Equivalent atoms stay equivalent, with finite derivatives; where atoms differ (q >= 1)
    every number is the published norm's.
    """

    def forward(
        self, x: Tensor, batch: Tensor | None = None, batch_size: int | None = None, share: Tensor | None = None
    ) -> Tensor:
        """Normalises x, (N, C), over the atoms of each system, or of all.

        Args:
            x: (N, C).
            batch: system of every atom, (N,); None: all are one.
            batch_size: B; found from `batch` unless given, for which a GPU is waited for.
            share: `share_of_an_atom`, where it is known already.
        """
        if batch is not None:
            size = int(batch.max()) + 1 if batch_size is None else batch_size
            return self._of_systems(x, batch, share_of_an_atom(x, batch, size) if share is None else share)
        if not self.training or _world_size() == 1:
            return super().forward(x, batch, batch_size)
        mean, _ = _mean_over_ranks(x)
        out = x - mean * self.mean_scale
        var, _ = _mean_over_ranks(out.square())
        return self.weight * out / (var + self.eps).sqrt() + self.bias

    def _of_systems(self, x: Tensor, batch: Tensor, share: Tensor) -> Tensor:
        size = len(share)
        mean = segment_sum(x, batch, size) * share
        deviations = x - mean.index_select(0, batch)
        variance = segment_sum(deviations.square(), batch, size) * share
        offset = mean * (1 - self.mean_scale)
        scale = self.weight * (variance + offset.square() + self.eps).rsqrt()
        spread = variance.sum(dim=1, keepdim=True)
        square = spread + mean.square().sum(dim=1, keepdim=True)
        q = (spread / (EQUIVALENT * square).clamp(min=1e-30)).clamp(max=1)
        of_deviations, constant = scale * (q * (2 - q)), scale * offset + self.bias
        return deviations * of_deviations.index_select(0, batch) + constant.index_select(0, batch)


def share_of_an_atom(x: Tensor, batch: Tensor, num_systems: int) -> Tensor:
    """One over the number of atoms of each system, (B, 1), in the precision of x, (N, C)."""
    return segment_sum(torch.ones_like(x[:, :1]), batch, num_systems).clamp(min=1).reciprocal()
