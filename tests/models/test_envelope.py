"""A smooth energy surface: `envelope: polynomial`, and graphs that are not cut by number."""

import numpy as np
import pytest
import torch
from ase import Atoms

from faenet_ocp.data.atoms import atoms_to_data
from faenet_ocp.kernels import accelerate
from faenet_ocp.models.options import ATTENTION, MP_TYPES
from network_inputs import CUTOFF, SMALL, build, make_inputs

SAME_CHANNELS = {"num_filters": SMALL["hidden_channels"]}
STEP = 1e-11


def jump(envelope: str, *, fast: bool = False, **options) -> tuple[float, float]:
    """How far energy and its gradient by edge vectors change while an atom passes the cutoff of another."""
    network, head, _ = build(torch.float64, envelope=envelope, **SAME_CHANNELS, **options)
    if fast:
        accelerate(network)
    results = []
    for x in (CUTOFF - STEP, CUTOFF + STEP):
        atoms = Atoms("CuCuO", [[0, 0, 0], [1.5, 2, 0], [x, 0, 0]], tags=[0, 1, 2])
        inputs = make_inputs([atoms], torch.float64)
        pos = torch.from_numpy(atoms.positions).requires_grad_()
        j, i = inputs.edge_index
        features = network(**inputs.arguments | {"edge_vec": pos[j] - pos[i]})
        energy = head(features, inputs.batch, 1).sum()
        results.append((energy, torch.autograd.grad(energy, pos)[0], len(j)))
    (before, slope, more), (after, other_slope, fewer) = results
    assert more == fewer + 2  # the pair has left
    return float((before - after).detach().abs()), float((slope - other_slope).abs().max())


@pytest.mark.parametrize("mp_type", [name for name in MP_TYPES if name not in ATTENTION])
def test_energy_and_forces_are_continuous_at_the_cutoff_with_an_envelope_only(mp_type):
    energy, slope = jump("polynomial", mp_type=mp_type)
    moved = jump("polynomial", mp_type=mp_type, fast=True)
    plain = jump("none", mp_type=mp_type)
    assert max(moved[0], energy) < 1e-9 and max(moved[1], slope) < 1e-9
    assert plain[0] > 1e-6 and plain[1] > 1e-6


def test_attention_is_refused():
    for mp_type in ATTENTION:
        with pytest.raises(ValueError, match="does not make mp_type"):
            build(envelope="polynomial", mp_type=mp_type)


def test_null_keeps_all_neighbours():
    atoms = Atoms("Cu20", np.random.default_rng(0).uniform(0, 5, (20, 3)), tags=1)
    everything = atoms_to_data(atoms, cutoff=20.0, max_neighbors=None)
    assert everything.edge_index.shape[1] == 20 * 19
    assert atoms_to_data(atoms, cutoff=20.0, max_neighbors=5).edge_index.shape[1] < 20 * 19
