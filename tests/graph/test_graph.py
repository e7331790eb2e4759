"""Graphs equal those of a brute-force search and of ASE, and do not depend on orientation, order or rounding."""

import itertools

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, fcc100, fcc111, molecule
from ase.neighborlist import neighbor_list

from faenet_ocp.graph import neighbors
from faenet_ocp.graph.lists import ROUNDING, SHELL_TOLERANCE
from faenet_ocp.graph.neighbors import build_graph
from faenet_ocp.graph.vectors import edge_vectors
from neighbors_by_hand import cut_by_hand

UNLIMITED = 10**6


def graph_of(atoms: ase.Atoms, *, cutoff=6.0, max_neighbors=UNLIMITED, dtype=torch.float64):
    return build_graph(
        torch.tensor(atoms.positions, dtype=dtype),
        torch.tensor(atoms.cell.array, dtype=dtype),
        torch.tensor(atoms.pbc),
        cutoff=cutoff,
        max_neighbors=max_neighbors,
    )


def edge_set(edge_index, offsets) -> list[tuple[int, ...]]:
    return sorted(map(tuple, torch.cat([edge_index.T, offsets.long()], 1).tolist()))


def brute_force(pos, cell, pbc, cutoff, images) -> list[tuple[int, ...]]:
    """(source, target, shift) of all pairs, by trying every shift up to `images`."""
    found = []
    for shift in itertools.product(*[range(-images, images + 1) if periodic else (0,) for periodic in pbc]):
        vectors = pos[None] - pos[:, None] + np.array(shift) @ cell
        for target, source in zip(*np.nonzero(np.linalg.norm(vectors, axis=-1) <= cutoff), strict=True):
            if source != target or any(shift):
                found.append((int(source), int(target), *shift))
    return sorted(found)


# Building


@pytest.mark.parametrize("seed", range(40))
def test_any_cell_and_periodicity_against_brute_force(seed):
    """Tilted and tiny cells (cutoff up to twice the cell), atoms outside, any mix of periodic directions."""
    rng = np.random.default_rng(seed)
    size = rng.choice([3.0, 5.0, 12.0])
    cell = np.eye(3) * size + rng.uniform(-0.3, 0.3, (3, 3)) * size
    pbc = np.array([seed & 1, seed & 2, seed & 4]) > 0
    for direction in range(3):
        if not pbc[direction] and rng.random() < 0.4:
            cell[direction] = 0  # what ASE stores for molecules and slabs
    pos = rng.uniform(-0.6, 1.6, (int(rng.integers(1, 8)), 3)) * size
    cutoff = float(rng.choice([2.3, 4.1, 6.0]))
    atoms = ase.Atoms("H" * len(pos), positions=pos, cell=cell, pbc=pbc)
    assert edge_set(*graph_of(atoms, cutoff=cutoff)) == brute_force(pos, cell, pbc, cutoff, images=9)


@pytest.mark.parametrize(
    "atoms",
    [
        fcc111("Cu", size=(3, 2, 3), vacuum=8.0),  # ASE: periodic in the plane only
        fcc111("Pt", size=(2, 2, 4), vacuum=8.0, orthogonal=True),
        bulk("Fe"),  # one atom, cell of 2.5 A
        molecule("CH3CH2OH"),
    ],
    ids=["slab", "orthogonal slab", "primitive cell", "molecule"],
)
def test_edges_and_their_vectors_against_ase(atoms):
    cutoff = 5.9  # not the length of any of these edges
    target, source, vectors, shift = neighbor_list("ijDS", atoms, cutoff)
    expected = {(s, t, *map(int, k)): v for s, t, v, k in zip(source, target, vectors, shift, strict=True)}
    edge_index, offsets = graph_of(atoms, cutoff=cutoff)
    assert edge_set(edge_index, offsets) == sorted(expected)
    pos, cell = torch.tensor(atoms.positions), torch.tensor(atoms.cell.array)
    found = edge_vectors(pos, cell[None], edge_index, offsets)
    for edge, shift_, vector in zip(edge_index.T.tolist(), offsets.long().tolist(), found.numpy(), strict=True):
        assert np.allclose(vector, expected[(*edge, *shift_)], atol=1e-12)


def test_an_atom_alone_has_no_edges_and_sees_its_images_when_periodic():
    alone = ase.Atoms("H", positions=[[0, 0, 0]])
    edge_index, offsets = graph_of(alone)
    assert edge_index.shape == (2, 0) and offsets.shape == (0, 3)
    alone.cell, alone.pbc = [4, 9, 9], True
    assert edge_set(*graph_of(alone)) == [(0, 0, -1, 0, 0), (0, 0, 1, 0, 0)]


def test_edges_as_long_as_the_cutoff_are_kept_on_all_sides_despite_rounding():
    """Simple cubic, a = 3: six images exactly at 6 A."""
    cell = torch.eye(3) * 3
    for turn in range(20):
        rot = random_rotation(turn).float()
        edge_index, offsets = build_graph(
            torch.ones(1, 3), cell @ rot, torch.tensor([True] * 3), cutoff=6.0, max_neighbors=99
        )
        assert edge_index.shape[1] == 6 + 12 + 8 + 6
        assert (edge_index.dtype, offsets.dtype) == (torch.int64, torch.float32) and edge_index.is_contiguous()
    assert ROUNDING < SHELL_TOLERANCE


@pytest.mark.parametrize(
    ("pos", "cell", "message"),
    [
        ([[0.0, 0.0, float("nan")]], torch.eye(3), "not finite"),
        ([[0.0, 0.0, 1e12]], torch.eye(3), "beyond"),  # a neighbour list may end the process on these
        ([[0.0, 0.0, 0.0]], torch.zeros(3, 3), "span no cell"),
        ([[0.0, 0.0, 0.0]], torch.ones(3, 3), "span no cell"),
        ([[0.0, 0.0, 0.0]], torch.eye(3) * float("inf"), "span no cell"),
        ([[0.0, 0.0, 0.0]], torch.eye(3) * 0.01, "too small for cutoff 6.0"),
    ],
)
def test_impossible_geometries_are_value_errors(pos, cell, message):
    with pytest.raises(ValueError, match=message):
        build_graph(torch.tensor(pos), cell, torch.tensor([True] * 3), cutoff=6.0, max_neighbors=40)


@pytest.mark.parametrize(("cutoff", "max_neighbors"), [(0.0, 40), (-1.0, 40), (float("nan"), 40), (6.0, 0)])
def test_limits_must_be_positive(cutoff, max_neighbors):
    with pytest.raises(ValueError, match="must be positive"):
        build_graph(torch.zeros(1, 3), torch.eye(3), torch.zeros(3), cutoff=cutoff, max_neighbors=max_neighbors)


# Limiting


@pytest.mark.parametrize("max_neighbors", [1, 3, 8, 100])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_limit_against_a_loop_over_atoms(max_neighbors: int, step: float) -> None:
    """On a grid with many equal distances, or anywhere; some atoms are alone."""
    rng = np.random.default_rng(max_neighbors)
    pos = rng.uniform(-2, 2, (40, 3))
    pos = np.unique((pos / step).round(), axis=0) * step if step else pos
    pos = rng.permutation(np.vstack([pos, [[20.0, 0, 0], [-20.0, 0, 0]]]))
    index, _ = graph_of(ase.Atoms("H" * len(pos), positions=pos), cutoff=2.5, max_neighbors=max_neighbors)
    source, target = np.nonzero(~np.eye(len(pos), dtype=bool))
    lengths = np.linalg.norm(pos[source] - pos[target], axis=1)
    edges = np.stack([source, target])
    kept = cut_by_hand(edges, np.zeros((len(source), 3)), lengths, cutoff=2.5, max_neighbors=max_neighbors)
    assert index.tolist() == edges[:, kept].tolist()
    assert len(set(index[1].tolist())) == len(pos) - 2


def test_a_chain_of_close_distances_is_not_followed():
    """Each is within the tolerance of the one before, but only the first within that of the last one kept."""
    angles = np.arange(4)
    arms = np.c_[np.cos(angles), np.sin(angles), 0 * angles] * np.array([[2.0], [2.006], [2.012], [2.018]])
    index, _ = graph_of(ase.Atoms("H5", positions=np.vstack([np.zeros(3), arms])), max_neighbors=1)
    assert index[0, index[1] == 0].tolist() == [1, 2]


# The same graph for a moved copy


def random_rotation(seed: int, *, reflect: bool = False) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    q[:, 0] *= torch.sign(torch.linalg.det(q)) * (-1 if reflect else 1)
    return q


def slabs() -> list[ase.Atoms]:
    """Unrelaxed slabs, full of equal distances, with the 40th neighbour inside a shell."""
    result = [fcc111("Cu", size=(3, 3, 4), vacuum=8.0), fcc100("Pt", size=(3, 3, 4), vacuum=8.0)]
    for atoms in result:
        atoms.pbc = True
        atoms.append(ase.Atom("O", atoms.positions[-1] + [0.1, 0.2, 1.5]))
    return result


def moved(atoms: ase.Atoms, seed: int, dtype: torch.dtype):
    """A rotated, reflected, shifted and permuted copy of a system, rounded to dtype, and its permutation."""
    rot = random_rotation(seed, reflect=seed % 2 == 1)
    order = torch.randperm(len(atoms), generator=torch.Generator().manual_seed(seed))
    shift = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5
    pos = torch.tensor(atoms.positions)[order] @ rot + shift
    return pos.to(dtype), (torch.tensor(atoms.cell.array) @ rot).to(dtype), order


def strict(pos, cell, pbc, *, cutoff, max_neighbors):
    """The cut that is not used: exactly max_neighbors, whichever of equal ones come first."""
    edge_index, offsets = build_graph(pos, cell, pbc, cutoff=cutoff, max_neighbors=UNLIMITED)
    distance = edge_vectors(pos, cell[None], edge_index, offsets).norm(dim=1)
    order = np.lexsort((distance.numpy(), edge_index[1].numpy()))
    rank = np.arange(len(order)) - np.searchsorted(edge_index[1].numpy()[order], edge_index[1].numpy()[order])
    kept = torch.tensor(order[rank < max_neighbors])
    return edge_index[:, kept], offsets[kept]


def graphs_of_copies(build, atoms, dtype, copies=8) -> list:
    pbc, limits = torch.tensor(atoms.pbc), {"cutoff": 6.0, "max_neighbors": 40}
    graphs = []
    for seed in range(copies):
        pos, cell, order = moved(atoms, seed, dtype)
        edge_index, offsets = build(pos, cell, pbc, **limits)
        graphs.append(edge_set(order[edge_index], offsets))  # in the numbering of the original
    return graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [0, 1])
def test_moved_copies_have_the_same_graph(number, dtype):
    first, *others = graphs_of_copies(build_graph, slabs()[number], dtype)
    assert all(other == first for other in others)
    counts = np.bincount([edge[1] for edge in first])
    assert counts.max() > 40  # a shell was kept whole


@pytest.mark.parametrize("number", [0, 1])
def test_a_strict_cut_gives_moved_copies_other_graphs(number):
    """Negative control."""
    first, *others = graphs_of_copies(strict, slabs()[number], torch.float32)
    assert any(other != first for other in others)


# Vectors


def test_edge_vectors_of_a_batch_equal_those_of_its_systems_and_are_differentiable():
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64)
    pos = torch.randn(9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    edge_index = torch.randint(0, 3, (2, 12), generator=generator)
    batch = torch.arange(3).repeat_interleave(4)
    offsets = torch.randint(-2, 3, (12, 3), generator=generator)
    edges = edge_index + 3 * batch
    vectors = edge_vectors(pos, cells, edges, offsets, batch)
    for edge in range(12):
        j, i = edges[:, edge]
        assert torch.allclose(vectors[edge], pos[j] - pos[i] + offsets[edge].double() @ cells[batch[edge]])
    (gradient,) = torch.autograd.grad(vectors.sum(), pos)
    assert torch.allclose(gradient.sum(0), torch.zeros(3, dtype=torch.float64))
    for system in range(3):
        of_system = batch == system
        one = edge_vectors(pos, cells[system : system + 1], edges[:, of_system], offsets[of_system])
        assert torch.allclose(one, vectors[of_system])


@pytest.mark.parametrize("systems", [1, 2])
def test_edge_vectors_are_as_exact_under_autocast(systems: int) -> None:
    """A product of matrices would round the cells of crossing edges to bf16, by hundredths of an Angstrom."""
    generator = torch.Generator().manual_seed(0)
    pos, cell = torch.rand(8, 3, generator=generator), 20 * torch.rand(systems, 3, 3, generator=generator)
    batch = torch.arange(8) % systems
    source, target = torch.arange(64) % 8, torch.arange(64) // 8 // systems * systems + torch.arange(64) % systems
    offsets = torch.randint(-2, 3, (64, 3), generator=generator)
    edges = torch.stack([source, target])
    exact = edge_vectors(pos.double(), cell.double(), edges, offsets, batch[target])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = edge_vectors(pos, cell, edges, offsets, batch[target])
        rounded = offsets[:, None].float() @ cell[batch[target]]
    assert (found - exact).abs().max() < 2e-5
    assert (rounded[:, 0] - (exact - pos.double()[source] + pos.double()[target])).abs().max() > 0.01


def test_edge_vectors_of_several_systems_need_their_batch():
    with pytest.raises(ValueError, match="edge_batch"):
        edge_vectors(torch.zeros(2, 3), torch.zeros(2, 3, 3), torch.zeros(2, 1).long(), torch.zeros(1, 3))


@pytest.mark.parametrize("num_atoms", [1, 2, 20, 64])
@pytest.mark.parametrize("max_neighbors", [None, 6])
def test_small_molecules_have_the_graph_of_large_ones(
    num_atoms: int, max_neighbors: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pairs are looked at, in place of a search."""
    pos = 1.5 * num_atoms ** (1 / 3) * torch.rand(num_atoms, 3, generator=torch.Generator().manual_seed(0))
    geometry = pos, torch.zeros(3, 3), torch.zeros(3, dtype=torch.bool)
    found = build_graph(*geometry, cutoff=2.0, max_neighbors=max_neighbors)
    monkeypatch.setattr(neighbors, "_FEW_ATOMS", 0)
    expected = build_graph(*geometry, cutoff=2.0, max_neighbors=max_neighbors)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert num_atoms < 20 or found[0].shape[1] < num_atoms * (num_atoms - 1)
