"""Layers that several of the networks share.

Shapes: N atoms, E edges j -> i; C channels. Distances in Angstrom.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from faenet_ocp.common.checks import whole_number
from faenet_ocp.common.elements import MAX_ATOMIC_NUMBER
from faenet_ocp.models.base import NodeFeatures, check_elements


def at_least(minimum: int) -> Callable[[str, Any], int]:
    """A check of an option: a whole number, not below `minimum`."""
    return partial(whole_number, minimum=minimum)


class ElementEmbedding(nn.Module):
    """A learnt vector for each element."""

    known: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("known", torch.arange(MAX_ATOMIC_NUMBER + 1) > 0, persistent=False)
        self.embedding = nn.Embedding(MAX_ATOMIC_NUMBER + 1, channels)

    def forward(self, atomic_numbers: Tensor) -> Tensor:
        """(N,) -> (N, C).

        Raises:
            ValueError: a number that is no element's.
        """
        check_elements(atomic_numbers, self.known)
        return self.embedding(atomic_numbers.long())


class SineBasis(nn.Module):
    """sin(n pi d / cutoff) / d for n = 1 to num_radial (Gasteiger et al. 2020, eq. 7, without its constant).

    Args:
        cutoff: Angstrom.
        num_radial: number of functions.
    """

    order: Tensor

    def __init__(self, *, cutoff: float, num_radial: int) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.register_buffer("order", torch.arange(1, num_radial + 1), persistent=False)

    def forward(self, distance: Tensor) -> Tensor:
        """(E,) -> (E, num_radial)."""
        return torch.sin(distance[:, None] * (math.pi / self.cutoff) * self.order) / distance[:, None]


def cosine_cutoff(distance: Tensor, cutoff: float) -> Tensor:
    """(1 + cos(pi d / cutoff)) / 2, which is zero with its derivative at the cutoff and beyond (Behler 2011)."""
    return 0.5 * (1 + torch.cos(distance * (math.pi / cutoff))) * (distance < cutoff)


def mlp(*sizes: int, act: type[nn.Module] = nn.SiLU, last: type[nn.Module] | None = None) -> nn.Sequential:
    """Linear layers between these numbers of channels with activations between them, and `last` at the end."""
    layers: list[nn.Module] = []
    for place in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[place], sizes[place + 1]), act()]
    layers[-1:] = [] if last is None else [last()]
    return nn.Sequential(*layers)


class Readout(nn.Module):
    """An MLP of the node embedding: the output block of most networks."""

    def __init__(self, *sizes: int, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.layers = mlp(*sizes, act=act)

    def forward(self, features: NodeFeatures) -> Tensor:
        """-> (N, last of the sizes)."""
        return self.layers(features.node_embedding)
