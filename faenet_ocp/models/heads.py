"""Output blocks of FAENet (section 4, figure 1; Table 7): energies of systems, forces on atoms.

Heads see the system in its frame, and forces are in that frame: F = F' U^T turns them back. Fairchem calls them
outside autocast: they are cheap, and sums.

Shapes: N atoms, B systems; C hidden_channels, H force_hidden_channels.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from faenet_ocp.models.base import NodeFeatures
from faenet_ocp.models.functional import ACTIVATIONS, segment_sum
from faenet_ocp.models.norms import RankBatchNorm
from faenet_ocp.models.options import EnergyHeadOptions, ForceHeadOptions


class EnergyHead(nn.Module):
    """A scalar of every system, as the energy: the sum over its atoms of weight times atom energy.

        E = sum_i alpha_i W2 act(W1 h_i)

    Keyword arguments are those of `options.EnergyHeadOptions`.

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = given = EnergyHeadOptions(**options)
        self.act = ACTIVATIONS[given.act]
        self.lin_1 = nn.Linear(given.hidden_channels, given.hidden_channels // 2)
        self.lin_2 = nn.Linear(given.hidden_channels // 2, 1)
        self.lin_weight = None if given.energy_head == "sum" else nn.Linear(given.hidden_channels, 1)
        self.lin_skip = nn.Linear(given.num_interactions + 1, 1) if given.skip_co == "concat" else None

    def forward(self, features: NodeFeatures, batch: Tensor, num_systems: int) -> Tensor:
        """Energies (B,).

        Args:
            features: of `FAENet`.
            batch: system of every atom, (N,).
            num_systems: B.
        """
        jumping = self.options.skip_co in ("concat", "add")
        states = features.hidden_states if jumping else (features.node_embedding,)
        h = torch.stack(states, dim=1)  # (N, S, C), S states
        atom_energies = self.lin_2(self.act(self.lin_1(h)))  # (N, S, 1)
        if self.lin_weight is not None:
            by_initial = self.options.energy_head == "weighted-av-initial-embeds"
            atom_energies = atom_energies * self.lin_weight(features.hidden_states[0].unsqueeze(1) if by_initial else h)
        energies = segment_sum(atom_energies.squeeze(2), batch, num_systems)  # (B, S)
        if self.lin_skip is not None:
            return self.lin_skip(energies).squeeze(1)
        return energies.sum(dim=1)


class ForceHead(nn.Module):
    """A vector for every atom, as the force on it, from its embedding alone.

    With dense(a, b) = act(norm(linear from a to b channels)):

        simple       F = W act(linear(C, H)), without norm
        mlp          F = W dense(C, H)
        res          F = W dense(C, H) of h + dense(C, C) dense(C, C) h
        res_updown   F = W dense(C, H) of h + dense(H, C) dense(H, H) dense(C, H) h

    Keyword arguments are those of `options.ForceHeadOptions`.

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = given = ForceHeadOptions(**options)
        kind, channels, inner = given.force_decoder_type, given.hidden_channels, given.force_hidden_channels
        sizes = {"res": (channels,) * 3, "res_updown": (channels, inner, inner, channels)}
        self.residual = _mlp(sizes[kind], given) if kind in sizes else None
        self.hidden = _mlp((channels, inner), given)
        self.out = nn.Linear(inner, 3)

    def forward(self, node_embedding: Tensor) -> Tensor:
        """(N, C) -> forces in the frame, (N, 3)."""
        h = node_embedding
        if self.residual is not None:
            h = h + self.residual(h)
        return self.out(self.hidden(h))


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def _mlp(sizes: tuple[int, ...], options: ForceHeadOptions) -> nn.Sequential:
    """Linear layers between these numbers of channels, each with its norm and activation."""
    norm = None if options.force_decoder_type == "simple" else _NORMS[str(options.force_norm)]
    layers: list[nn.Module] = []
    for in_channels, out_channels in pairwise(sizes):
        layers.append(nn.Linear(in_channels, out_channels))
        if norm is not None:
            layers.append(norm(out_channels))
        layers.append(_Activation(options.act))
    return nn.Sequential(*layers)


_NORMS: dict[str, type[nn.Module] | None] = {"batch1d": RankBatchNorm, "layer": nn.LayerNorm, "none": None}
