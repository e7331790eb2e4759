"""ComENet and SphereNet: the shared suite, and their geometry and layers by plain loops over atoms and angles."""

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor
from torch.nn.functional import silu

from faenet_ocp.models.fairchem import inputs_of
from faenet_ocp.models.peers.comenet import edge_geometry, reference_edges
from faenet_ocp.models.peers.dimenetpp import triplets
from faenet_ocp.models.peers.directions import degrees, spherical_harmonics, zonal_harmonics
from faenet_ocp.models.peers.spherenet import triplet_geometry
from models.suite import (
    ModelSuite,
    check_supercell,
    gradients_of,
    make_sample,
    orthogonal,
    outputs_of,
    slab,
    slabs,
    to_batch,
)


class TestComENet(ModelSuite):
    name, symmetric = "comenet", "SE"
    golden = (-0.7483726, -0.7072692, -0.0158451, 0.0008622, -9.27e-05)
    options: ClassVar[dict[str, Any]] = {
        "hidden_channels": 16,
        "middle_channels": 8,
        "num_blocks": 2,
        "num_output_layers": 2,
        "cutoff": 5.0,
    }


class TestSphereNet(ModelSuite):
    name, symmetric = "spherenet", "SE"
    golden = (10.5425861, 132.5372065, 0.1835861, -0.7858784, 5.7479113)
    options: ClassVar[dict[str, Any]] = {
        "hidden_channels": 12,
        "num_blocks": 2,
        "int_emb_size": 8,
        "basis_emb_size": 4,
        "out_emb_channels": 10,
    }
    options |= {"num_spherical": 3, "num_radial": 4, "num_output_layers": 1, "cutoff": 5.0}


BOTH = [TestComENet, TestSphereNet]
CELL = [[3.1, 0.0, 0.0], [0.7, 3.3, 0.0], [0.4, -0.6, 3.6]]


def few_atoms() -> AtomicData:
    """Three atoms in a small cell: every one is its own neighbour, in several images."""
    pos = torch.tensor([[0.0, 0.0, 0.0], [1.5, 1.3, 0.4], [0.3, 1.1, 2.0]], dtype=torch.float64)
    return make_sample(pos, [29, 8, 1], [1, 2, 2], torch.tensor(CELL, dtype=torch.float64), cutoff=3.9)


def cluster() -> AtomicData:
    """A chiral molecule: no rotation makes it its mirror image."""
    pos = [[0.0, 0.0, 0.0], [1.1, 0.1, -0.2], [-0.5, 1.3, 0.1], [-0.6, -0.7, 1.2], [0.2, -1.0, -1.4]]
    return make_sample(torch.tensor(pos, dtype=torch.float64), [6, 1, 9, 17, 35], [2] * 5)


def edges_of(batch: AtomicData) -> tuple[Tensor, Tensor]:
    """edge_index, and vectors i -> j from positions and images."""
    source, target = batch.edge_index
    images = torch.einsum("ec,ecd->ed", batch.cell_offsets, batch.cell[batch.batch[target]])
    return batch.edge_index, batch.pos[source] + images - batch.pos[target]


def sine(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.cross(a, b).norm() / (a.norm() * b.norm()))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def torsion(start: Tensor, axis: Tensor, end: Tensor) -> float:
    """Angle in [0, 2 pi) from the plane of `start` to that of `end`, counterclockwise around the axis."""
    one, other = torch.linalg.cross(axis, start), torch.linalg.cross(axis, end)
    angle = math.acos(max(-1.0, min(1.0, cosine(one, other))))
    return 2 * math.pi - angle if float(torch.linalg.cross(one, other) @ axis) < 0 else angle


def as_components(theta: float, phi: float) -> list[float]:
    return [math.sin(theta) * math.cos(phi), math.sin(theta) * math.sin(phi), math.cos(theta)]


def references(vectors: Tensor, target: list[int], atom: int) -> list[Tensor]:
    """To the nearest neighbour and the second one of an atom; none of them may be almost as near as another."""
    near = sorted((vector for vector, i in zip(vectors, target, strict=True) if i == atom), key=torch.linalg.norm)
    bent = [vector for vector in near if sine(vector, near[0]) > 0.1]
    for first, next_one in (near[:2], bent[:2]):
        assert float(next_one.norm() - first.norm()) > 2e-3
    return [near[0], bent[0]]


@pytest.mark.parametrize("system", [few_atoms, cluster])
def test_comenets_angles(system: Any) -> None:
    batch = to_batch([system()])
    (index, vectors), size = edges_of(batch), len(batch.pos)
    (source, target), axes = index.tolist(), [references(vectors, index[1].tolist(), atom) for atom in range(size)]
    local, cos_tau = edge_geometry(batch.atomic_numbers, index, vectors)
    for edge, (j, i, vector) in enumerate(zip(source, target, vectors, strict=True)):
        (f_i, s_i), (f_j, s_j) = axes[i], axes[j]
        theta = math.acos(max(-1.0, min(1.0, cosine(vector, f_i))))
        phi = torsion(s_i, f_i, vector) if theta > 1e-6 else 0.0
        assert local[edge].tolist() == pytest.approx(as_components(theta, phi), abs=1e-7)
        ends = [f if sine(f, vector) > 0.1 else s for f, s in ((f_i, s_i), (f_j, s_j))]
        assert float(cos_tau[edge]) == pytest.approx(math.cos(torsion(ends[0], vector, ends[1])), abs=1e-9)
    own_images = sum(j == i for j, i in zip(source, target, strict=True))
    assert own_images == 0 if system is cluster else own_images > 6


@pytest.mark.parametrize("system", [few_atoms, cluster, lambda: slab(2)])
def test_spherenets_angles(system: Any) -> None:
    """Every torsion against a search for the smallest one of all neighbours."""
    batch = to_batch([system()])
    index, vectors = edges_of(batch)
    kj, ji = triplets(index, vectors, len(batch.pos))
    local, around = triplet_geometry(vectors, kj, ji), {edge: kj[ji == edge] for edge in ji.unique().tolist()}
    checked = torch.randperm(len(kj), generator=torch.Generator().manual_seed(0))[:300].tolist()
    for triplet in checked:
        axis, to_k = -vectors[ji[triplet]], vectors[kj[triplet]]
        theta = math.acos(max(-1.0, min(1.0, cosine(axis, to_k))))
        if sine(axis, to_k) < 0.1:
            assert local[triplet].tolist() == pytest.approx([0.0, 0.0, math.cos(theta)], abs=1e-9)
            continue
        others = [vectors[edge] for edge in around[int(ji[triplet])] if sine(vectors[edge], axis) > 0.1]
        angles = [torsion(to_k, axis, other) for other in others]
        phi = min((angle for angle in angles if 1e-4 < angle < 2 * math.pi - 1e-4), default=0.0)
        assert local[triplet].tolist() == pytest.approx(as_components(theta, phi), abs=1e-6)


def test_spherical_harmonics_are_orthonormal_and_known() -> None:
    nodes, weights = (torch.tensor(x) for x in np.polynomial.legendre.leggauss(8))
    phi = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    z, azimuth = nodes.repeat_interleave(16), phi.repeat(8)
    x, y = (1 - z**2).sqrt() * azimuth.cos(), (1 - z**2).sqrt() * azimuth.sin()
    values = spherical_harmonics(torch.stack([x, y, z], dim=1), 5)
    weight = weights.repeat_interleave(16) * (2 * math.pi / 16)
    torch.testing.assert_close(values.T @ (values * weight[:, None]), torch.eye(25, dtype=torch.float64))
    known = [y, z, x]  # times sqrt(3 / 4 pi)
    torch.testing.assert_close(values[:, 1:4], math.sqrt(3 / (4 * math.pi)) * torch.stack(known, dim=1))
    torch.testing.assert_close(values[:, 6], math.sqrt(5 / (16 * math.pi)) * (3 * z**2 - 1))
    torch.testing.assert_close(zonal_harmonics(z, 5), values[:, [0, 2, 6, 12, 20]])
    assert degrees(3) == [0, 1, 1, 1, 2, 2, 2, 2, 2]


def test_comenets_block_follows_its_equations() -> None:
    batch, network = to_batch([few_atoms()]), TestComENet().model().backbone
    (index, vectors), block = edges_of(batch), network.blocks[0]
    local, cos_tau = edge_geometry(batch.atomic_numbers, index, vectors)
    x = silu(block.first(silu(network.embedding(batch.atomic_numbers))))
    sums = [[torch.zeros(16, dtype=torch.float64) for _ in x] for _ in range(2)]
    zeros = [[math.pi, 2 * math.pi, 3 * math.pi], [4.493409457909064, 7.725251836937707, 10.904121659428899]]
    for edge, (j, i) in enumerate(index.T.tolist()):
        torsions, angles = [], []
        for degree, orders in ((0, 1), (1, 3)):
            radial = [_bessel(degree, zero, float(vectors[edge].norm()) / 5.0) for zero in zeros[degree]]
            tau = [1 / math.sqrt(4 * math.pi), math.sqrt(3 / (4 * math.pi)) * float(cos_tau[edge])][degree]
            angles += [value * tau for value in radial]
            for order in range(orders):
                part = [1.0] if degree == 0 else [float(local[edge, axis]) for axis in (1, 2, 0)]
                torsions += [value * part[order] * math.sqrt((2 * degree + 1) / (4 * math.pi)) for value in radial]
        for place, (branch, feature) in enumerate(zip(block.branches, (torsions, angles), strict=True)):
            first, second = branch.weights
            gate = second.weight @ (first.weight @ torch.tensor(feature, dtype=torch.float64))
            sums[place][i] = sums[place][i] + gate * x[j]
    parts = []
    for branch, received in zip(block.branches, sums, strict=True):
        mixed = torch.stack(received) @ branch.received.weight.T + branch.received.bias + x @ branch.own.weight.T
        parts.append(silu(branch.last(mixed)))
    y = block.join(torch.cat(parts, dim=1)) + x
    for layer in block.layers:
        y = y + silu(layer(y))
    y = (y - y.mean(dim=0)) / (y.var(dim=0, unbiased=False) + 1e-5).sqrt()
    expected = block.last(y)
    features = network.edge_features(batch.atomic_numbers, index, vectors)
    given = (silu(network.embedding(batch.atomic_numbers)), features, index, batch.batch, 1)
    torch.testing.assert_close(block(*given), expected, rtol=1e-6, atol=1e-6)  # PyG rounds zeros to float32


def _bessel(degree: int, zero: float, scaled: float) -> float:
    """j_l(z x) for l = 0 or 1, normalised: its square times x^2 has the integral 1 over [0, 1]."""
    x, after = zero * scaled, [math.cos(zero), math.sin(zero)][degree] / zero  # |j_(l+1)(z)|, up to a sign
    value = math.sin(x) / x if degree == 0 else math.sin(x) / x**2 - math.cos(x) / x
    return value * math.sqrt(2) / abs(after)


def test_spherenets_interaction_follows_its_equations() -> None:
    """Messages of triplets one by one."""
    batch, network = to_batch([few_atoms()]), TestSphereNet().model().backbone
    (index, vectors), block = edges_of(batch), network.interactions[0]
    distance, (kj, ji) = vectors.norm(dim=1), triplets(*edges_of(batch), len(batch.pos))
    rbf, basis = network.rbf(distance), network.triplet_basis(distance, vectors, kj, ji)
    message = network.embedding(batch.atomic_numbers, rbf, index[1], index[0])
    radial = network.sbf(distance, torch.zeros_like(distance), torch.arange(len(distance)))
    radial = radial / network.sbf.envelope(distance / 5.0)[:, None]  # j_l Y_l^0(0)
    down = silu(block.lin_down(silu(block.lin_kj(message)) * block.lin_rbf2(block.lin_rbf1(rbf))))
    harmonics = spherical_harmonics(triplet_geometry(vectors, kj, ji), 3)
    (a1, a2), (t1, t2) = block.lin_sbf2.parts
    sums = [torch.zeros(8, dtype=torch.float64) for _ in message]
    for triplet, (first, last) in enumerate(zip(kj.tolist(), ji.tolist(), strict=True)):
        bessel = (
            radial[first].view(3, 4) / torch.tensor([math.sqrt((2 * n + 1) / (4 * math.pi)) for n in range(3)])[:, None]
        )
        torsions = torch.cat([bessel[degree] * harmonics[triplet, row] for row, degree in enumerate(degrees(3))])
        angles = torch.cat([bessel[degree] * harmonics[triplet, row] for degree, row in enumerate((0, 2, 6))])
        sums[last] = sums[last] + down[first] * a2(a1(angles)) * t2(t1(torsions))
    h = silu(block.lin_ji(message)) + silu(block.lin_up(torch.stack(sums)))
    for layer in block.layers_before_skip:
        h = layer(h)
    h = silu(block.lin(h)) + message
    for layer in block.layers_after_skip:
        h = layer(h)
    torch.testing.assert_close(block(message, rbf, basis, kj, ji), h, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("suite", BOTH)
def test_a_supercell_has_the_energy_of_its_cells(suite: type[ModelSuite]) -> None:
    check_supercell(suite())


@pytest.mark.parametrize("suite", BOTH)
def test_mirror_images_are_distinguished(suite: type[ModelSuite]) -> None:
    """And rotated copies are not, nor is a flat molecule from its mirror image, which is a rotated copy."""
    model, chiral = suite().model(), cluster()
    flat = chiral.pos * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    for pos, is_chiral in ((chiral.pos, True), (flat, False)):
        copies = [pos, pos @ orthogonal(3, dim=3, det=1.0), pos @ orthogonal(4, dim=3, det=-1.0)]
        samples = [make_sample(copy, chiral.atomic_numbers.tolist(), [2] * 5) for copy in copies]
        energy, turned, mirrored = outputs_of(model, to_batch(samples))[0].tolist()
        assert turned == pytest.approx(energy, abs=1e-9)
        assert (abs(mirrored - energy) > 1e-5) if is_chiral else mirrored == pytest.approx(energy, abs=1e-9)


@pytest.mark.parametrize("suite", BOTH)
def test_one_neighbour_and_straight_lines_have_finite_derivatives(suite: type[ModelSuite]) -> None:
    line = torch.tensor([[0.0, 0.0, 0.0], [1.1, 0.0, 0.0], [2.4, 0.0, 0.0]], dtype=torch.float64)
    samples = [make_sample(line[:count], [8, 6, 7][:count], [2] * count) for count in (1, 2, 3)]
    model, batch = suite().model(), to_batch(samples)
    assert all(output.isfinite().all() for output in outputs_of(model, batch))
    assert all(part.isfinite().all() for part in gradients_of(model, batch).values() if part is not None)


@pytest.mark.parametrize("suite", BOTH)
def test_forces_are_the_slope_of_the_energy(suite: type[ModelSuite]) -> None:
    model, sample, step = suite().model(), cluster(), 1e-5
    forces = outputs_of(model, to_batch([sample]))[1].detach()
    for atom, axis in ((0, 0), (2, 1), (4, 2)):
        energies = []
        for sign in (1, -1):
            moved = sample.clone()
            moved.pos[atom, axis] += sign * step
            energies.append(outputs_of(model, to_batch([moved]))[0].item())
        assert float(forces[atom, axis]) == pytest.approx(-(energies[0] - energies[1]) / (2 * step), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("suite", BOTH)
def test_the_order_of_edges_does_not_matter(suite: type[ModelSuite]) -> None:
    model, batch = suite().model().backbone, slabs(2)
    inputs = inputs_of(model, batch)
    order = torch.randperm(len(inputs["edge_vec"]), generator=torch.Generator().manual_seed(0))
    expected = type(model).__mro__[1].forward(model, **inputs).node_embedding
    inputs |= {"edge_index": inputs["edge_index"][:, order], "edge_vec": inputs["edge_vec"][order]}
    found = type(model).__mro__[1].forward(model, **inputs).node_embedding
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_equally_near_neighbours_are_told_apart_by_what_is_around() -> None:
    """Two at the same distance; the heavier side comes first, in whatever order the edges are."""
    pos = torch.tensor([[0.0, 0.0, 0.0], [1.5, 0.0, 0.0], [0.0, 1.5, 0.0]], dtype=torch.float64)
    numbers, index = torch.tensor([6, 1, 8]), torch.tensor([[1, 2], [0, 0]])
    for order in ([0, 1], [1, 0]):
        nearest, second = reference_edges(numbers, index[:, order], (pos[index[0]] - pos[0])[order])
        assert [order[int(edge[0])] for edge in (nearest, second)] == [1, 0]
        assert nearest[1:].tolist() == second[1:].tolist() == [2, 2]  # none
