"""The networks that FAENet is compared with: the shared suite, and equal numbers on equal weights elsewhere."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from ase.build import molecule
from torch import Tensor, nn
from torch.nn.functional import silu
from torch_geometric.nn import models as pyg

import small_data
from faenet_ocp.graph.vectors import edge_vectors
from faenet_ocp.models.peers.dimenetpp import triplets
from models.suite import ModelSuite, check_supercell, make_sample, outputs_of, slab, slabs, to_batch


class TestSchNet(ModelSuite):
    name, symmetric = "schnet", True
    golden = (2.2883277, -2.0006653, -0.0026233, 0.0009817, 0.0219135)
    options: ClassVar[dict[str, Any]] = {
        "hidden_channels": 16,
        "num_filters": 12,
        "num_interactions": 2,
        "num_gaussians": 10,
        "cutoff": 5.0,
    }


class TestDimeNetPlusPlus(ModelSuite):
    name, symmetric = "dimenetpp", True
    golden = (41.5238886, -54.0782568, 0.439046, -0.4188821, 4.4343446)
    options: ClassVar[dict[str, Any]] = {
        "hidden_channels": 12,
        "num_blocks": 2,
        "int_emb_size": 8,
        "basis_emb_size": 4,
        "out_emb_channels": 10,
    }
    options |= {"num_spherical": 3, "num_radial": 4, "num_output_layers": 1, "cutoff": 5.0}


class TestPaiNN(ModelSuite):
    name, symmetric = "painn", True
    golden = (4.0869508, 0.0389622, -2.7e-06, -1.59e-05, 0.0008923)
    options: ClassVar[dict[str, Any]] = {"hidden_channels": 16, "num_interactions": 2, "num_radial": 8, "cutoff": 5.0}


class TestEGNN(ModelSuite):
    name, symmetric = "egnn", True
    golden = (3.2217496, 1.3927282, 0.0022056, -0.0027094, 0.0136321)
    options: ClassVar[dict[str, Any]] = {"hidden_channels": 16, "num_interactions": 2, "cutoff": 5.0}


LOCAL = [TestSchNet, TestDimeNetPlusPlus, TestPaiNN, TestEGNN]


def vectors_of(batch: Any) -> Tensor:
    index = batch.edge_index
    return edge_vectors(batch.pos, batch.cell, index, batch.cell_offsets, batch.batch[index[1]])


def molecules() -> Any:
    """Three molecules, a batch in float64."""
    found = [molecule(name) for name in ("CH3CH2OH", "C6H6", "H2O")]
    samples = [make_sample(torch.tensor(m.positions), m.numbers.tolist(), [0] * len(m)) for m in found]
    return to_batch(samples)


def copy_weights(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    """Ours into theirs, by parts of names."""
    state = ours.state_dict()
    for old, new in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            value = state.pop(name)
            parameter.copy_(value[: len(parameter)])  # tables of elements end earlier


@pytest.mark.parametrize("suite", LOCAL)
def test_a_supercell_has_the_energy_of_its_cells(suite: type[ModelSuite]) -> None:
    check_supercell(suite())


def test_schnet_equals_pygs_on_equal_weights() -> None:
    batch, ours = slabs(3), TestSchNet().model()
    graph = (batch.edge_index, vectors_of(batch).norm(dim=1))
    theirs = pyg.SchNet(**TestSchNet.options, interaction_graph=lambda pos, of_atom: graph).double()
    names = {"backbone.": "", "embedding.embedding": "embedding"}
    names |= {f"output_heads.energy.output.layers.{place}": name for place, name in ((0, "lin1"), (2, "lin2"))}
    copy_weights(ours, theirs, names)
    expected = theirs(batch.atomic_numbers, batch.pos, batch.batch)[:, 0]
    torch.testing.assert_close(outputs_of(ours, batch)[0], expected, rtol=1e-10, atol=1e-10)


def test_dimenetpp_equals_pygs_on_equal_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, ours = molecules(), TestDimeNetPlusPlus().model()
    monkeypatch.setattr("torch_geometric.nn.models.dimenet.radius_graph", lambda *_, **__: batch.edge_index)
    monkeypatch.setattr("torch_geometric.nn.models.dimenet.triplets", _pyg_triplets)  # its own needs torch_sparse
    options: ClassVar[dict[str, Any]] = {
        name: value for name, value in TestDimeNetPlusPlus.options.items() if name != "num_output_layers"
    }
    theirs = pyg.DimeNetPlusPlus(out_channels=1, num_output_layers=1, **options).double()
    names = {"backbone.": "", "embedding.emb.embedding": "embedding.emb", "interactions": "interaction_blocks"}
    names |= {"embedding.": "emb.", "emb.emb.": "emb.emb."}
    for block in range(3):
        names[f"gates.{block}."] = f"output_blocks.{block}.lin_rbf."
        for place, name in ((0, "lin_up"), (1, "lins.0"), (3, "lin")):
            names[f"output_heads.energy.output.blocks.{block}.{place}."] = f"output_blocks.{block}.{name}."
    copy_weights(ours, theirs, names)
    expected = theirs(batch.atomic_numbers, batch.pos, batch.batch)[:, 0]
    torch.testing.assert_close(outputs_of(ours, batch)[0], expected, rtol=1e-9, atol=1e-9)


def _pyg_triplets(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, ...]:
    """What PyTorch Geometric's function of this name returns, for molecules."""
    edges = edge_index.T.tolist()
    found = [(ji, kj) for ji, (j, i) in enumerate(edges) for kj, (k, end) in enumerate(edges) if end == j and k != i]
    ji, kj = torch.tensor(found).T
    source, target = edge_index
    return target, source, target[ji], source[ji], source[kj], kj, ji


def test_triplets_know_images_apart() -> None:
    """Against a search over all pairs of edges; in a cell of few atoms the same two are neighbours in many images."""
    atoms = small_data.make_slab(2)
    system = make_sample(
        torch.tensor(atoms.positions), atoms.numbers.tolist(), [1] * len(atoms), torch.tensor(atoms.cell.array)
    )
    batch = to_batch([system])
    (source, target), offsets = batch.edge_index.tolist(), batch.cell_offsets.tolist()
    ends = list(zip(source, target, map(tuple, offsets), strict=True))
    expected = Counter()
    for ji, (j, i, image) in enumerate(ends):
        for kj, (k, middle, other) in enumerate(ends):
            back = k == i and all(a == -b for a, b in zip(image, other, strict=True))
            if middle == j and not back:
                expected[kj, ji] += 1
    shuffled = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    place = shuffled.argsort()
    for order in (torch.arange(len(source)), shuffled):
        kj, ji = triplets(batch.edge_index[:, order], vectors_of(batch)[order], len(atoms))
        assert Counter(zip(order[kj].tolist(), order[ji].tolist(), strict=True)) == expected
    assert place[shuffled].equal(torch.arange(len(source)))


def test_painn_follows_its_equations() -> None:
    """Equations 7 to 10 atom by atom."""
    batch, network = to_batch([slab(0)]), TestPaiNN().model().backbone
    found = network(batch)["features"]
    (source, target), vectors = batch.edge_index.tolist(), vectors_of(batch)
    s, channels = network.embedding(batch.atomic_numbers), 16
    v = torch.zeros(len(s), 3, channels, dtype=torch.float64)
    for filters, message, update in zip(network.filters, network.messages, network.updates, strict=True):
        new_s, new_v = list(s), list(v)
        for j, i, vector in zip(source, target, vectors, strict=True):
            d = vector.norm()
            basis = torch.stack([torch.sin(n * torch.pi * d / 5.0) / d for n in range(1, 9)])
            phi = message.phi[2].weight @ silu(message.phi[0].weight @ s[j] + message.phi[0].bias) + message.phi[2].bias
            w = (filters.weight @ basis + filters.bias) * 0.5 * (torch.cos(torch.pi * d / 5.0) + 1)
            to_s, to_r, to_v = (phi * w).split(channels)
            new_s[i] = new_s[i] + to_s
            new_v[i] = new_v[i] + torch.outer(vector / d, to_r) + v[j] * to_v
        s, v = torch.stack(new_s), torch.stack(new_v)
        big_v, big_u = (v @ part.T for part in update.mix.weight.split(channels))
        norms = (big_v.square().sum(dim=1) + 1e-8).sqrt()
        a_ss, a_vv, a_sv = update.a(torch.cat([s, norms], dim=1)).split(channels, dim=1)
        s = s + a_ss + a_sv * (big_u * big_v).sum(dim=1)
        v = v + a_vv[:, None] * big_u
    torch.testing.assert_close(found.node_embedding, s, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.vectors, v, rtol=1e-10, atol=1e-10)


def test_egnn_follows_its_equations() -> None:
    """Equations 3 to 6 and 8 atom by atom, on positions: images are atoms of their own that move as theirs do."""
    batch, network = to_batch([slab(0)]), TestEGNN().model().backbone
    (source, target), image = batch.edge_index.tolist(), batch.cell_offsets @ batch.cell[0]
    h, x = network.embedding(batch.atomic_numbers), batch.pos
    for block in network.blocks:
        block.phi_x[2].weight.data[0] *= 300  # as after training: moves that matter
        received, moved = [torch.zeros(16, dtype=torch.float64)] * len(h), [[] for _ in x]
        for j, i, shift in zip(source, target, image, strict=True):
            difference = x[i] - (x[j] + shift)
            m = block.phi_e(torch.cat([h[i], h[j], difference.square().sum()[None]]))
            m = m * torch.sigmoid(block.weight(m))
            received[i] = received[i] + m
            moved[i].append(difference * block.phi_x(m)[0])
        x = x + torch.stack([torch.stack(parts).mean(dim=0) for parts in moved])
        h = h + block.phi_h(torch.cat([h, torch.stack(received)], dim=1))
    found = network(batch)["features"].node_embedding
    torch.testing.assert_close(found, h, rtol=1e-9, atol=1e-9)
    assert (x - batch.pos).abs().max() > 1e-3


def test_painn_equals_schnetpacks_on_equal_weights() -> None:
    """schnetpack asks for a sympy that torch does not allow: `pip install --no-deps schnetpack`, in parts, will do."""
    reference = _schnetpack_painn()
    batch, ours = slabs(3), TestPaiNN().model().backbone
    radial = nn.Module()
    radial.n_rbf = 8
    radial.forward = lambda d: ours.basis(d)  # type: ignore[method-assign]
    theirs = reference.PaiNN(16, 2, radial, reference.snn.CosineCutoff(5.0)).double()
    with torch.no_grad():
        theirs.embedding.weight.copy_(ours.embedding.embedding.weight[: len(theirs.embedding.weight)])
        theirs.filter_net.weight.copy_(torch.cat([layer.weight for layer in ours.filters]))
        theirs.filter_net.bias.copy_(torch.cat([layer.bias for layer in ours.filters]))
        for block in range(2):
            theirs.mixing[block].mu_channel_mix.weight.copy_(ours.updates[block].mix.weight)
            pairs = [(ours.messages[block].phi, theirs.interactions[block].interatomic_context_net)]
            pairs.append((ours.updates[block].a, theirs.mixing[block].intraatomic_context_net))
            for own, other in pairs:
                for place in (0, 1):
                    other[place].weight.copy_(own[2 * place].weight)
                    other[place].bias.copy_(own[2 * place].bias)
    index = batch.edge_index
    found = theirs(
        {"_atomic_numbers": batch.atomic_numbers, "_Rij": vectors_of(batch), "_idx_i": index[1], "_idx_j": index[0]}
    )
    expected = ours(batch)["features"]
    torch.testing.assert_close(found["scalar_representation"], expected.node_embedding, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["vector_representation"], expected.vectors, rtol=1e-10, atol=1e-10)


def _schnetpack_painn() -> Any:
    """schnetpack's module of PaiNN, without what its packages import beside it."""
    spec = importlib.util.find_spec("schnetpack")
    if spec is None or spec.origin is None:
        pytest.skip("schnetpack is not installed")
    folder = Path(spec.origin).parent
    for name in ("schnetpack", "schnetpack.representation"):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    from schnetpack.representation import painn

    return painn
