"""Networks to compare with that have no symmetry built in: the shared suite, and their equations atom by atom."""

import math
from typing import Any, ClassVar

import pytest
import torch
from scipy.special import sph_harm_y
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from faenet_ocp.models.peers.directions import spherical_harmonics
from faenet_ocp.models.peers.forcenet import ForceNet, atomic_radii
from faenet_ocp.models.peers.gns import GNS
from models import test_peers as peers
from models.suite import ModelSuite, outputs_of, single_atom, slab, to_batch


class TestForceNet(ModelSuite):
    name = "forcenet"
    golden = (-3.9989631, -1.2643532, -1.5806659, 2.741098, 4.5656258)
    options: ClassVar[dict[str, Any]] = {
        "hidden_channels": 16,
        "decoder_hidden_channels": 12,
        "num_interactions": 2,
        "num_freqs": 8,
        "cutoff": 5.0,
    }


class TestForceNetOfSines(TestForceNet):
    golden = (-0.8316989, 0.9437364, 0.1117818, 0.583877, 0.0472142)
    options: ClassVar[dict[str, Any]] = TestForceNet.options | {"basis": "powersine"}


class TestGNS(ModelSuite):
    name = "gns"
    golden = (-0.9189829, -0.8281969, -0.3744957, 0.0735205, -0.237555)
    options: ClassVar[dict[str, Any]] = {
        "hidden_channels": 16,
        "num_interactions": 3,
        "group_size": 2,
        "num_radial": 8,
        "tag_hidden_channels": 4,
        "cutoff": 5.0,
    }


LOCAL = [TestForceNet, TestForceNetOfSines, TestGNS]


@pytest.mark.parametrize("suite", LOCAL)
def test_a_supercell_has_the_energy_of_its_cells(suite: type[ModelSuite]) -> None:
    peers.test_a_supercell_has_the_energy_of_its_cells(suite)


@pytest.mark.parametrize("suite", LOCAL)
def test_one_system_of_many_atoms_can_be_trained_on(suite: type[ModelSuite]) -> None:
    energy, forces = outputs_of(suite().model().train(), to_batch([slab(0)]))
    assert energy.isfinite().all() and forces.isfinite().all()


@pytest.mark.parametrize(
    "network, options, message",
    [
        (ForceNet, {"basis": "sphalmul"}, "basis: 'sphalmul' is not one of .* did you mean 'sphallmul'"),
        (ForceNet, {"max_n": 0}, "max_n: 0"),
        (ForceNet, {"depth_mlp_node": 0}, "depth_mlp_node: 0"),
        (GNS, {"group_size": 0}, "group_size: 0"),
        (GNS, {"cutoff": -1.0}, "cutoff: -1.0"),
    ],
)
def test_wrong_options_are_value_errors(network: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**options)


def test_spherical_harmonics_are_those_of_scipy() -> None:
    """sqrt(2) (-1)^m times real and imaginary part of scipy's, which are complex with the Condon-Shortley phase."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    direction = torch.cat([random / random.norm(dim=1, keepdim=True), torch.eye(3).double(), -torch.eye(3).double()])
    polar, azimuth = direction[:, 2].clamp(-1, 1).acos(), torch.atan2(direction[:, 1], direction[:, 0])
    expected = []
    for degree in range(5):
        for m in range(-degree, degree + 1):
            value = torch.from_numpy(sph_harm_y(degree, abs(m), polar.numpy(), azimuth.numpy()))
            part = value.imag if m < 0 else value.real
            expected.append(part * ((-1) ** m * 2**0.5 if m else 1))
    found = spherical_harmonics(direction, 5)
    torch.testing.assert_close(found, torch.stack(expected, dim=1), rtol=1e-12, atol=1e-12)


def test_spherical_harmonics_have_finite_slopes_at_the_poles() -> None:
    pole = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(spherical_harmonics(pole, 4).sum(), pole)
    assert slope.isfinite().all()


def test_every_element_has_a_radius() -> None:
    radii = atomic_radii()
    assert radii[[1, 6, 29, 54]].tolist() == pytest.approx([0.25, 0.70, 1.35, 1.31])
    assert radii[1:].min() >= 0.25 and radii[1:].max() < 3


def test_atoms_nearer_than_their_radii_count_as_touching() -> None:
    """Two of platinum, of 1.35 Angstrom each: what is left of their distance ends at a thousandth of the cutoff."""
    network, seen = TestForceNet().model().backbone, []
    network.basis.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    inputs = {"atomic_numbers": torch.tensor([78, 78]), "edge_index": torch.tensor([[1, 0], [0, 1]])}
    for distance in (1.0, 2.0, 3.0):
        vector = torch.tensor([[0.0, 0.6, 0.8], [0.0, -0.6, -0.8]], dtype=torch.float64) * distance
        ForceNet.forward(network, edge_vec=vector, **inputs)
    expected = [[0.2, 1e-3, 1e-3, 1e-3], [0.4, 0.13, 0.13, 1e-3], [0.6, 0.33, 0.33, 0.06]]
    for found, numbers in zip(seen, expected, strict=True):
        assert found[0].tolist() == pytest.approx(numbers, rel=1e-6) and found[1].equal(found[0])


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer.weight @ x + (0 if layer.bias is None else layer.bias)


def _normed(layer: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """With the statistics of training."""
    return (x - layer.running_mean) / (layer.running_var + layer.eps).sqrt() * layer.weight + layer.bias


def _harmonics(n: Tensor) -> Tensor:
    """Degrees 0 to 2 of one direction, written out."""
    x, y, z = n
    first, second = (3 / (4 * torch.pi)) ** 0.5, (15 / torch.pi) ** 0.5 / 2
    zonal = (5 / torch.pi) ** 0.5 / 4 * (3 * z * z - 1)
    parts = [torch.tensor(1 / (4 * torch.pi)).double().sqrt(), first * y, first * z, first * x]
    parts += [second * x * y, second * y * z, zonal, second * x * z, second / 2 * (x * x - y * y)]
    return torch.stack(parts)


@pytest.mark.parametrize("suite", [TestForceNet, TestForceNetOfSines])
def test_forcenet_follows_its_equations(suite: type[TestForceNet]) -> None:
    """The equations of the module, atom by atom."""
    batch, model = to_batch([slab(0)]), suite().model()
    network = model.backbone
    numbers, cutoff = batch.atomic_numbers.tolist(), 5.0
    edges = list(zip(*batch.edge_index.tolist(), peers.vectors_of(batch), strict=True))
    h = network.embedding(batch.atomic_numbers)
    for block in network.blocks:
        own = [_linear(block.source, part) for part in h]
        received = [block.self_weight[0] * part for part in own]
        for j, i, vector in edges:
            d, r_j, r_i = vector.norm(), network.radii[numbers[j]], network.radii[numbers[i]]
            q = [max(float(x / cutoff), 1e-3) for x in (d, d - r_j, d - r_i, d - r_j - r_i)]
            arguments = [float(x) for x in vector / d] + q if suite is TestForceNetOfSines else q
            sines = torch.tensor([x * 1.1**k for x in arguments for k in range(8)]).double().sin()
            if suite is TestForceNet:
                sines = torch.outer(_harmonics(vector / d), _linear(network.basis.mix, sines)).flatten()
            w = torch.cat([_linear(block.basis, sines), h[j], h[i]])
            for layer in block.filter:
                w = _linear(layer, w) if isinstance(layer, nn.Linear) else silu(w)
            received[i] = received[i] + torch.cos(torch.pi * d / (2 * cutoff)) * w * own[j]
        first, norm, _, last = block.update
        h = torch.stack(
            [x + _linear(last, silu(_normed(norm, _linear(first, m)))) for x, m in zip(h, received, strict=True)]
        )
    a = [silu(_linear(network.output, x)) for x in h]
    energy, forces = outputs_of(model, batch)
    weight = model.output_heads["energy"].output.layers[0]
    hidden, norm, _, last = model.output_heads["forces"].output.layers
    expected = torch.stack([_linear(last, silu(_normed(norm, _linear(hidden, x)))) for x in a])
    torch.testing.assert_close(energy, sum(_linear(weight, x) for x in a), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(forces, expected, rtol=1e-6, atol=1e-6)


def _mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Linear layers, shifted softplus and a LayerNorm, on one vector."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            x = _linear(layer, x)
        elif isinstance(layer, nn.LayerNorm):
            x = (x - x.mean()) / (x.var(correction=0) + layer.eps).sqrt() * layer.weight + layer.bias
        else:
            x = softplus(x) - math.log(2)
    return x


def test_gns_follows_its_equations() -> None:
    """Encoding, three blocks of which the third has the weights of the first, and decoding, atom by atom."""
    batch, model = to_batch([slab(0)]), TestGNS().model()
    network, tags = model.backbone, batch.tags.tolist()
    pairs, e = list(zip(*batch.edge_index.tolist(), strict=True)), []
    for vector in peers.vectors_of(batch):
        d = vector.norm()
        sines = torch.stack([torch.sin(n * torch.pi * d / 5.0) / d for n in range(1, 9)])
        e.append(_mlp(network.encode_edge, torch.cat([sines, vector / d])))
    atoms = zip(network.embedding(batch.atomic_numbers), tags, strict=True)
    first = h = [_mlp(network.encode_node, torch.cat([x, network.tag.weight[tag]])) for x, tag in atoms]
    assert len(network.blocks) == 2
    for block in (network.blocks[0], network.blocks[1], network.blocks[0]):
        u = [_mlp(block.edge, torch.cat([e[k], h[j], h[i]])) for k, (j, i) in enumerate(pairs)]
        received = [torch.zeros(16, dtype=torch.float64)] * len(h)
        for k, (_, i) in enumerate(pairs):
            received[i] = received[i] + u[k]
        h = [x + _mlp(block.node, torch.cat([x, m])) for x, m in zip(h, received, strict=True)]
        e = [old + new for old, new in zip(e, u, strict=True)]
    output, decoder = model.output_heads["energy"].output, model.output_heads["forces"].output
    expected = sum(_mlp(output.last, x) + _mlp(output.first, x0) for x, x0 in zip(h, first, strict=True))
    energy, forces = outputs_of(model, batch)
    torch.testing.assert_close(energy, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(forces, torch.stack([_mlp(decoder.layers, x) for x in h]), rtol=1e-7, atol=1e-7)


def test_gns_without_tags_reads_none() -> None:
    network = GNS(hidden_channels=8, num_interactions=1, num_radial=4)
    assert network.needs == ("edges",) and len(network.blocks) == 1
    batch = to_batch([single_atom(29)])
    inputs = {"atomic_numbers": batch.atomic_numbers, "edge_index": batch.edge_index, "batch": batch.batch}
    inputs |= {"edge_vec": torch.zeros(0, 3), "num_systems": 1}
    assert network(**inputs).node_embedding.shape == (1, 8)
    with pytest.raises(ValueError, match="tags: missing"):
        GNS(hidden_channels=8, num_interactions=1, num_radial=4, tag_hidden_channels=2)(**inputs)
