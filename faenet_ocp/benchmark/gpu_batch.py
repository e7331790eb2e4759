"""Batches and networks for `benchmark gpu`, from torch, torch_geometric and numpy alone."""

from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from faenet_ocp.models.faenet import FAENet
from faenet_ocp.models.functional import segment_sum
from faenet_ocp.models.heads import EnergyHead, ForceHead
from faenet_ocp.models.peers.schnet import SchNet

_NEIGHBOURS, _CUTOFF = 40, 6.0


class MadeBatch(NamedTuple):
    """B made systems of N atoms with E edges, and labels.

    Attributes:
        atomic_numbers, batch, tags: (N,).
        pos: (N, 3).
        edge_index: (2, E), sorted by target.
        edge_vec: (E, 3).
        energy: (B,).
        forces: (N, 3).
    """

    atomic_numbers: Tensor
    batch: Tensor
    tags: Tensor
    pos: Tensor
    edge_index: Tensor
    edge_vec: Tensor
    energy: Tensor
    forces: Tensor

    def on(self, device: torch.device) -> "MadeBatch":
        """A copy on a device."""
        return MadeBatch(*(tensor.to(device) for tensor in self))

    def in_precision(self, dtype: torch.dtype) -> "MadeBatch":
        """With vectors and labels in another precision."""
        return MadeBatch(*(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in self))

    def part(self, start: int, stop: int) -> "MadeBatch":
        """Systems from `start` to before `stop`."""
        atoms = (self.batch >= start) & (self.batch < stop)
        edges, first = atoms[self.edge_index[1]], int(atoms.nonzero()[0])
        of_atoms = (self.atomic_numbers[atoms], self.batch[atoms] - start, self.tags[atoms], self.pos[atoms])
        index = self.edge_index[:, edges] - first
        return MadeBatch(*of_atoms, index, self.edge_vec[edges], self.energy[start:stop], self.forces[atoms])


def made_batch(num_systems: int, *, largest: int = 225, seed: int = 0) -> MadeBatch:
    """Jittered lattices of OC20's sizes and density (5 to 225 atoms, mean 78), with up to 40 neighbours within 6 A."""
    rng = np.random.default_rng(seed)
    parts: list[tuple[Tensor, ...]] = []
    first = 0
    for system in range(num_systems):
        size = int(np.clip(rng.gamma(3.6, 21.0), 5, largest))
        side = int(np.ceil(size ** (1 / 3)))
        sites = np.stack(np.unravel_index(np.arange(size), (side,) * 3), axis=1)
        pos = torch.from_numpy(2.5 * sites + rng.normal(0, 0.1, (size, 3)))
        distances = torch.cdist(pos, pos).fill_diagonal_(torch.inf)
        nearest, source = distances.topk(min(_NEIGHBOURS, size - 1), largest=False)
        target = torch.arange(size)[:, None].expand_as(source)[nearest < _CUTOFF]
        source = source[nearest < _CUTOFF]
        numbers = torch.from_numpy(rng.choice([1, 6, 8, 29, 46, 78], size))
        tags = torch.from_numpy(rng.integers(1, 3, size))
        labels = torch.from_numpy(rng.normal(size=1)), torch.from_numpy(rng.normal(size=(size, 3)))
        index = torch.stack([source, target])
        parts.append(
            (numbers, torch.full((size,), system), tags, pos, index + first, pos[source] - pos[target], *labels)
        )
        first += size
    tensors = [torch.cat(part, dim=1 if place == 4 else 0) for place, part in enumerate(zip(*parts, strict=True))]
    return MadeBatch(*tensors).in_precision(torch.float32)


class Network(nn.Module):
    """A backbone with an energy and a force for each atom: what training and inference of S2EF do."""

    def __init__(self, backbone: nn.Module, energy: nn.Module, forces: nn.Module) -> None:
        super().__init__()
        self.backbone, self.energy, self.forces = backbone, energy, forces

    def forward(self, batch: MadeBatch) -> tuple[Tensor, Tensor]:
        """Energies (B,) and forces (N, 3)."""
        features = self.backbone(
            atomic_numbers=batch.atomic_numbers,
            edge_index=batch.edge_index,
            edge_vec=batch.edge_vec,
            batch=batch.batch,
            num_systems=len(batch.energy),
            tags=batch.tags,
        )
        return self.energy(features, batch.batch, len(batch.energy)), self.forces(features.node_embedding)


class _SummedReadout(nn.Module):
    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.output = output

    def forward(self, features: Any, batch: Tensor, num_systems: int) -> Tensor:
        return segment_sum(self.output(features)[:, 0], batch, num_systems)


def make_faenet(*, small: bool) -> Network:
    """FAENet with the paper's settings for IS2RE (Table 7) and a force head; `small`: few channels."""
    torch.manual_seed(0)
    sizes = {"hidden_channels": 48, "num_interactions": 2} if small else {}
    others = {"num_filters": 32, "num_gaussians": 16, "tag_hidden_channels": 8, "pg_hidden_channels": 8}
    backbone = FAENet(**sizes, **(others if small else {}))
    given = backbone.options
    energy = EnergyHead(hidden_channels=given.hidden_channels, num_interactions=given.num_interactions)
    return Network(backbone, energy, ForceHead(hidden_channels=given.hidden_channels, force_norm="layer"))


def make_schnet(*, small: bool) -> Network:
    """PyTorch Geometric's SchNet with OCP's settings for IS2RE, and the same force head."""
    torch.manual_seed(0)
    backbone = SchNet(**({"hidden_channels": 32, "num_filters": 16, "num_interactions": 1} if small else {}))
    channels = backbone.options.hidden_channels
    energy = _SummedReadout(backbone.scalar_output())
    return Network(backbone, energy, ForceHead(hidden_channels=channels, force_norm="layer"))


class _Published(nn.Module):
    """The published network on one batch, whose input is made once: its steps hold nothing of ours."""

    def __init__(self, network: nn.Module, batch: MadeBatch) -> None:
        super().__init__()
        self.network = network
        # No neighbour lies in another cell.
        edges, systems = batch.edge_index.shape[1], len(batch.energy)
        self.data = Data(
            **{name: getattr(batch, name) for name in ("pos", "atomic_numbers", "tags", "batch", "edge_index")},
            cell=torch.eye(3).to(batch.pos).repeat(systems, 1, 1),
            cell_offsets=batch.pos.new_zeros(edges, 3),
            neighbors=torch.bincount(batch.batch[batch.edge_index[1]], minlength=systems),
        )

    def forward(self, batch: MadeBatch) -> tuple[Tensor, Tensor]:
        """Energies (B,) and forces (N, 3), of the batch that it was made for."""
        outputs = self.network(self.data, mode="inference")
        return outputs["energy"][:, 0], outputs["forces"]


def make_published(batch: MadeBatch, *, small: bool) -> nn.Module:
    """The published package's network with the settings of `make_faenet`, for this batch.

    Raises:
        ImportError: the package is not installed.
    """
    from faenet_ocp.benchmark.published import build_published

    torch.manual_seed(0)
    network: Any = make_faenet(small=small)
    options = asdict(network.backbone.options) | asdict(network.energy.options)
    options["force_hidden_channels"] = network.forces.options.force_hidden_channels
    return _Published(build_published(options, forces=True), batch)


def loss_of(network: nn.Module, batch: MadeBatch) -> Tensor:
    """Mean absolute error of energies plus that of the forces' components summed over each system: equal shares of a
    batch with equally many systems have it as their mean."""
    energy, forces = network(batch)
    per_system = (forces.to(batch.forces) - batch.forces).abs().sum() / (50 * len(batch.energy))
    return (energy.to(batch.energy) - batch.energy).abs().mean() + per_system
