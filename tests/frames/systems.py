"""Systems and independent computations for the tests of frames."""

import numpy as np
import torch
from ase.build import add_adsorbate, fcc100, fcc111, fcc211, molecule

from faenet_ocp.frames import compute_frames, flatten_frames, frame_report

NUM_FRAMES = {(3, "E"): 8, (3, "SE"): 4, (2, "E"): 4, (2, "SE"): 2}
DIM_GROUP = list(NUM_FRAMES)


def pack(systems):
    """List of (positions, numbers) -> the tensors of a batch."""
    pos = torch.tensor(np.concatenate([p for p, _ in systems]), dtype=torch.float64)
    numbers = torch.tensor(np.concatenate([z for _, z in systems]))
    sizes = torch.tensor([len(p) for p, _ in systems])
    return pos, torch.arange(len(systems)).repeat_interleave(sizes), numbers


def make_clouds():
    """24 generic systems of 4 to 20 atoms, away from the origin, with distinct variances."""
    rng = np.random.default_rng(0)
    systems = []
    for _ in range(24):
        n = rng.integers(4, 21)
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        pos = rng.normal(size=(n, 3)) * [3.0, 2.0, 1.2] @ turn + rng.normal(size=3) * 4
        systems.append((pos, rng.integers(1, 80, size=n)))
    pos, batch, numbers = pack(systems)
    report = frame_report(pos, batch, 24, dim=3, group="E", atomic_numbers=numbers, tolerance=1e-2)
    assert not report.degenerate.any()
    return pos, batch, numbers


def rotation(dim, seed=1, reflect=False):
    """A random orthogonal matrix by QR, independent of the package, z kept in 2D."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    if (np.linalg.det(turn) < 0) != reflect:
        turn[:, 0] *= -1
    full = np.eye(3)
    full[:dim, :dim] = turn
    return torch.tensor(full)


def motions(dim, group, count=4):
    """Rotations, in E every second one with a reflection."""
    return [rotation(dim, seed, reflect=group == "E" and seed % 2 == 1) for seed in range(count)]


def shift(dim):
    return torch.tensor([3.0, -7.0, 5.0 if dim == 3 else 0.0], dtype=torch.float64)


def frames_of(system, **options):
    pos, batch, numbers = system
    return compute_frames(pos, batch, int(batch.max()) + 1, atomic_numbers=numbers, **options)


def same_set(a, b, tolerance):
    """Whether two lists of arrays agree one to one in some order."""
    distance = (a.flatten(1)[:, None] - b.flatten(1)[None]).abs().amax(dim=2)
    close = distance < tolerance
    return a.shape == b.shape and bool((close.sum(0) == 1).all() and (close.sum(1) == 1).all())


def averaged(system, frames):
    """An energy and forces with no symmetry at all, averaged over frames, eq. (1)."""
    pos, batch, numbers = system
    weights = torch.linspace(-1.0, 1.3, 18, dtype=torch.float64).reshape(3, 6).sin().to(pos)
    head = torch.linspace(0.3, 2.1, 18, dtype=torch.float64).reshape(6, 3).cos().to(pos)
    energy, forces = pos.new_zeros(len(frames.rot)), torch.zeros_like(pos)
    for rot, weight, system_id in zip(*flatten_frames(frames), strict=True):
        own = batch == system_id
        x = pos[own] - pos[own].mean(dim=0)
        hidden = torch.tanh(0.5 * x @ rot @ weights + 0.02 * numbers[own, None] + 0.1)
        energy[system_id] += weight * (hidden.sum(dim=1) * numbers[own] / 40).sum()
        forces[own] += weight * torch.tanh(hidden @ head) @ rot.T
    return energy, forces


def symmetry_error(system, move, **options):
    """Largest change of averaged energies and forces (moved back) when the system is moved."""
    pos, batch, numbers = system
    moved = (pos @ move + shift(options["dim"]), batch, numbers)
    energy, forces = averaged(system, frames_of(system, **options))
    energy_moved, forces_moved = averaged(moved, frames_of(moved, **options))
    return max(float((energy - energy_moved).abs().max()), float((forces - forces_moved @ move.T).abs().max()))


def symmetric_systems():
    """Positions, numbers, undecided axes (3D), and numbers of canonical frames for E(3) and SE(3)."""
    rng = np.random.default_rng(5)
    half = rng.normal(size=(5, 3)) * [3.0, 2.0, 1.0]
    species = rng.integers(1, 50, size=5)
    flat = half * [1, 1, 0]
    water = molecule("H2O")
    two_fold = np.concatenate([half, half * [-1, -1, 1]])  # C2 axis along z, chiral
    mirror = np.concatenate([half, half * [-1, 1, 1]])
    chain = np.array([[0.0, 0, 0], [1.1, 0, 0], [2.9, 0, 0]])
    doubled = np.concatenate([species, species])
    return {
        "inversion": (np.concatenate([half, -half]), doubled, [1, 1, 1], 8, 4),
        "coplanar": (flat, species, [0, 0, 1], 2, 1),
        "water": (water.positions, water.numbers, [1, 0, 1], 4, 2),
        "two-fold axis": (two_fold, doubled, [1, 1, 0], 4, 2),
        "mirror": (mirror, doubled, None, 2, 1),
        "linear": (chain, np.array([6, 8, 1]), [0, 1, 1], 48, 24),
        "centred linear": (np.outer([-1.2, 0, 1.2], [0, 0, 1]), np.array([8, 6, 8]), [1, 1, 1], 48, 24),
        "one atom": (np.array([[1.0, 2.0, 3.0]]), np.array([29]), [1, 1, 1], 120, 60),
        "one point": (np.full((11, 3), 0.1), np.arange(1, 12), [1, 1, 1], 120, 60),
    }


def degenerate_systems():
    """With equal variances of two axes along which they extend."""
    corners = np.array([[i, j, k] for i in (-1.0, 1) for j in (-1.0, 1) for k in (-1.0, 1)])
    square = np.array([[1.0, 1, 0], [1, -1, 0], [-1, -1, 0], [-1, 1, 0]])
    return {
        "cube": (corners, np.full(8, 29)),
        "cube with a heavy corner": (corners, np.array([79] + [29] * 7)),
        "symmetric top": (molecule("NH3").positions, molecule("NH3").numbers),
        "tetrahedron": (molecule("CH4").positions, molecule("CH4").numbers),
        "square": (square, np.full(4, 6)),
    }


def special_systems():
    return {**{name: system[:2] for name, system in symmetric_systems().items()}, **degenerate_systems()}


def random_slabs(count):
    """Adsorbates on rattled slabs of several surfaces, sizes and metals, turned about z."""
    rng = np.random.default_rng(11)
    species = ["Cu", "Pt", "Ag", "Al", "Ni", "Pd"]
    systems = []
    for _ in range(count):
        surface = [fcc111, fcc100, fcc211][rng.integers(3)]
        width = 3 if surface is fcc211 else int(rng.integers(2, 5))
        metals = rng.choice(species, size=2)
        atoms = surface(str(metals[0]), (width, int(rng.integers(2, 5)), 4), a=rng.uniform(3.6, 4.1), vacuum=8)
        atoms.symbols[rng.random(len(atoms)) < rng.choice([0.0, 0.3])] = str(metals[1])
        adsorbate = molecule(str(rng.choice(["CO", "OH", "NH3", "CH3", "H2O", "O"])))
        adsorbate.rotate(rng.uniform(0, 360), rng.normal(size=3))
        place = rng.random(2) @ atoms.cell.array[:2, :2]
        atoms.info["adsorbate_info"] = {}
        add_adsorbate(atoms, adsorbate, 2.0, position=tuple(place))
        atoms.positions += rng.normal(size=(len(atoms), 3)) * 0.02
        atoms.rotate(rng.uniform(0, 360), "z")
        systems.append((atoms.positions, atoms.numbers))
    return pack(systems)
