"""Loss curves of the same training in different precisions and ways of execution."""

from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData

from faenet_ocp.benchmark import models
from faenet_ocp.benchmark.systems import make_batch, make_systems, slab_sizes
from faenet_ocp.graph import edge_vectors

LEARNING_RATE = 1e-3
_SYSTEMS_PER_BATCH = 8


def convergence(steps: int, device: torch.device) -> list[dict[str, Any]]:
    """Mean absolute error of each step of a small network's training, by variant: `model` and `losses`.

    The first also has `bf16_change`: how much its energies, once trained, change when they are computed in bf16 (mean
    and largest change, as a share of the standard deviation of the labels).

    All variants begin with the same weights and see the same batches of generated slabs in one stochastic frame each.
    The second row differs from the first by its seed alone: the noise that the others are to be compared with.
    """
    batches = _batches(min(steps, 8), device)
    variants: dict[str, dict[str, Any]] = {
        "fp32": {},
        "fp32, another seed": {"seed": 1},
        "bf16": {"amp": True},
        "fp32, compiled": {"compiled": True},
        "bf16, compiled": {"amp": True, "compiled": True},
    }
    return [{"model": name, **_train(batches, steps, **variant)} for name, variant in variants.items()]


def _batches(count: int, device: torch.device) -> list[AtomicData]:
    """Their energies are the mean length of the edges, standardised: something that can be learnt."""
    sizes = slab_sizes(count * _SYSTEMS_PER_BATCH)
    systems = make_systems(sizes, cutoff=models.CUTOFF, max_neighbors=40, remove_subsurface=True)
    lengths = [
        edge_vectors(data.pos, data.cell, data.edge_index, data.cell_offsets).norm(dim=1).mean() for data in systems
    ]
    energies = torch.stack(lengths)
    for data, energy in zip(systems, (energies - energies.mean()) / energies.std(), strict=True):
        data.energy = energy.view(1)
    return [make_batch(systems[start::count], device) for start in range(count)]


def _train(
    batches: list[AtomicData], steps: int, *, seed: int = 0, amp: bool = False, compiled: bool = False
) -> dict[str, Any]:
    frames = {"method": "stochastic", "dim": 2, "group": "SE"}
    contender = models.faenet(
        "is2re", models.small("is2re"), frames=frames, graph_norm="system", amp=amp, compiled=compiled, seed=seed
    )
    contender.module.to(batches[0].pos.device).train()
    optimizer = torch.optim.AdamW(contender.module.parameters(), lr=LEARNING_RATE)
    torch.manual_seed(seed)  # of the frames
    losses = []
    for step in range(steps):
        batch = batches[step % len(batches)]
        loss = (contender(batch)["energy"].float() - batch.energy).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if amp or compiled or seed:
        return {"losses": losses}
    contender.module.eval()
    energies = []
    for contender.amp in (False, True):
        torch.manual_seed(seed)
        with torch.no_grad():
            energies.append(torch.cat([contender(batch)["energy"].float() for batch in batches]))
    change = (energies[1] - energies[0]).abs()
    return {"losses": losses, "bf16_change": {"mean": float(change.mean()), "largest": float(change.max())}}
