"""FAENet: the suite of all models, independent computations of the paper's equations, and its promises."""

import math

import pytest
import torch
from torch.nn.functional import silu

from faenet_ocp.kernels import accelerate
from faenet_ocp.models.embedding import GaussianSmearing, spherical_harmonics
from faenet_ocp.models.message_passing import BLOCKS, Graph
from faenet_ocp.models.options import (
    ATTENTION,
    EDGE_EMBED_TYPES,
    ENERGY_HEADS,
    MP_TYPES,
    SKIP_CONNECTIONS,
    FAENetOptions,
)
from models.suite import SMALL_FAENET, ModelSuite
from network_inputs import SMALL, VARIANTS, build, energies, make_inputs, predict, slabs


class TestForEnergies(ModelSuite):
    name, options = "faenet", SMALL_FAENET
    golden = (0.5091953, 0.4759349, -0.0489037, -0.1643064, -0.0999273)


class TestForForces(ModelSuite):
    """The paper's options for S2EF (Table 7)."""

    name, options = "faenet", SMALL_FAENET | {"mp_type": "updownscale_base", "skip_co": "none", "phys_embeds": False}
    golden = (-0.828767, 0.1284352, 0.1204707, 0.0861952, 0.1400431)


class TestGraphTransformer(ModelSuite):
    name, options = "faenet", SMALL_FAENET | {"mp_type": "att", "att_heads": 2, "edge_embed_type": "all", "act": "gelu"}
    golden = (0.3863871, 0.6187521, -0.1199078, -0.1049015, 0.1206539)


@pytest.fixture(scope="module")
def batch():
    return make_inputs(slabs(4))


# --- Equations ---


def naive_message(kind, block, h, edge_index, e):
    """m_i by a loop over edges, straight from the table in message_passing.py."""
    messages = {}
    for edge, (j, i) in enumerate(edge_index.T.tolist()):
        if kind in ("base", "updownscale_base"):
            f = silu(block.filter.lin(torch.cat([e[edge], h[j], h[i]])))
        elif kind in ("simple", "updownscale"):
            f = silu(block.filter.lin(e[edge]))
        elif kind == "updown_local_env":
            f = block.lin_filter(e[edge])
        else:
            f = e[edge]
        v = silu(block.lin_down(h[j])) if kind.startswith("updown") else h[j]
        messages.setdefault(i, []).append(f * v)
    zero = torch.zeros_like(f)
    return torch.stack([sum(messages.get(i, []), zero) for i in range(len(h))])


def naive_norm(m, norm, batch):
    out = torch.empty_like(m)
    for system in batch.unique():
        rows = batch == system
        centred = m[rows] - norm.mean_scale * m[rows].mean(0)
        out[rows] = norm.weight * centred / (centred.square().mean(0) + 1e-5).sqrt() + norm.bias
    return out


@pytest.mark.parametrize("complex_mp", [True, False])
@pytest.mark.parametrize("graph_norm", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in MP_TYPES if kind not in ATTENTION])
def test_interaction_block_is_equation_8(kind, graph_norm, complex_mp):
    """Attention: against PyG's graph transformer in test_reference_parity.py."""
    torch.manual_seed(1)
    channels, filters = 6, (6 if kind == "basic" else 5)
    sizes = {"hidden_channels": channels, "num_filters": filters}
    options = FAENetOptions(mp_type=kind, complex_mp=complex_mp, graph_norm=graph_norm, **sizes)
    block = BLOCKS[kind](options).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    system = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    edge_index = torch.tensor([[1, 2, 0, 3, 0, 0, 5, 6], [0, 0, 1, 1, 2, 2, 4, 4]])
    h = torch.randn(7, channels, dtype=torch.float64)
    e = torch.randn(edge_index.shape[1], filters, dtype=torch.float64)
    local_env = torch.stack([e[edge_index[1] == i].sum(0) for i in range(7)])

    m = naive_message(kind, block, h, edge_index, e)
    if graph_norm:
        m = silu(naive_norm(m, block.norm, system))
    m = block.lin_out(torch.cat([m, local_env], 1)) if kind == "updown_local_env" else silu(block.lin_out(m))
    expected = h + (silu(block.lin_complex(m)) if complex_mp else m)
    got = block(h, Graph(edge_index[0], edge_index[1], e, system, 2))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_distances_are_expanded_in_gaussians_up_to_the_cutoff():
    got = GaussianSmearing(cutoff=6.0, num_gaussians=4)(torch.tensor([0.0, 3.0, 6.0]))
    expected = [[math.exp(-0.5 * ((d - c) / 2.0) ** 2) for c in (0.0, 2.0, 4.0, 6.0)] for d in (0.0, 3.0, 6.0)]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_spherical_harmonics_are_those_of_e3nn():
    o3 = pytest.importorskip("e3nn.o3")
    v = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = o3.spherical_harmonics([1, 2, 3], v, normalize=False, normalization="component")
    torch.testing.assert_close(spherical_harmonics(v), expected)


@pytest.mark.parametrize("kind", EDGE_EMBED_TYPES)
def test_edge_embedding_is_equation_7(kind):
    embedding = build(torch.float64, edge_embed_type=kind, second_layer_MLP=True)[0].edge_embedding
    r = torch.tensor([[1.0, -2.0, 2.0], [0.1, 0.0, -0.5]], dtype=torch.float64)
    d = torch.tensor([3.0, math.hypot(0.1, 0.5)], dtype=torch.float64)
    rbf, harmonics = embedding.smearing(d), spherical_harmonics((r / d[:, None] + 1) / 2)
    features = {"rij": r, "sh": harmonics, "all": torch.cat([r, harmonics, rbf], 1)}
    if kind == "all_rij":
        first = torch.cat([embedding.lin(r), embedding.lin_rbf(rbf)], 1)
    else:
        first = embedding.lin(features[kind])
    torch.testing.assert_close(embedding(r), silu(embedding.lin_2(silu(first))))


@pytest.mark.parametrize("skip_co", SKIP_CONNECTIONS)
@pytest.mark.parametrize("weights", ENERGY_HEADS)
def test_energy_is_the_weighted_sum_of_atom_energies(weights, skip_co, batch):
    net, head, _ = build(energy_head=weights, skip_co=skip_co)
    output = net(**batch.arguments)
    initial, final = output.hidden_states[0], output.node_embedding
    assert len(output.hidden_states) == 1 + SMALL["num_interactions"]
    if skip_co == "concat_atom":
        torch.testing.assert_close(final, silu(net.lin_skip(torch.cat(output.hidden_states, 1))))
    else:
        assert final is output.hidden_states[-1]
    columns = []
    for h in output.hidden_states if skip_co in ("concat", "add") else [final]:
        atom = head.lin_2(silu(head.lin_1(h)))[:, 0]
        if weights != "sum":
            atom = atom * head.lin_weight(h if weights == "weighted-av-final-embeds" else initial)[:, 0]
        columns.append(torch.stack([atom[batch.batch == s].sum() for s in range(len(batch.atoms))]))
    stacked = torch.stack(columns, 1)
    expected = head.lin_skip(stacked)[:, 0] if skip_co == "concat" else stacked.sum(1)
    torch.testing.assert_close(head(output, batch.batch, len(batch.atoms)), expected)


# --- Promises ---


def test_batch_norm_mode_depends_on_the_batch(batch):
    """The reason for the warning."""
    with pytest.warns(UserWarning, match="depends on the other systems in the batch"):
        parts = build(graph_norm="batch")
    alone = energies(parts, make_inputs(batch.atoms[:1]))
    assert (alone - energies(parts, batch)[:1]).abs() > 1e-3


@pytest.mark.parametrize("kind", MP_TYPES)
def test_order_of_atoms_and_edges_does_not_matter(kind, batch):
    parts, inputs = build(torch.float64, mp_type=kind, num_filters=40), make_inputs(batch.atoms, torch.float64)
    torch.manual_seed(3)
    edges = torch.randperm(inputs.edge_index.shape[1])
    systems = torch.arange(len(inputs.batch)).split([len(atoms) for atoms in inputs.atoms])
    atoms = torch.cat([rows[torch.randperm(len(rows))] for rows in systems])
    shuffled = inputs._replace(
        atomic_numbers=inputs.atomic_numbers[atoms],
        tags=inputs.tags[atoms],
        edge_index=atoms.argsort()[inputs.edge_index[:, edges]],
        edge_vec=inputs.edge_vec[edges],
    )
    (energy, forces), expected = predict(parts, shuffled), predict(parts, inputs)
    torch.testing.assert_close(energy, expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(forces, expected[1][atoms], rtol=1e-10, atol=1e-12)


def test_norm_does_not_lose_precision_to_a_large_mean():
    """Mean square minus squared mean, in float32, would leave little of the variance here."""
    norm = BLOCKS["base"](FAENetOptions(hidden_channels=4, num_filters=4)).norm
    m = 3000.0 + torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    expected = naive_norm(m.double(), norm.double(), torch.zeros(60, dtype=torch.long))
    torch.testing.assert_close(norm.float()(m).double(), expected, rtol=0, atol=2e-3)
    assert (m.square().mean(0) - m.mean(0).square() - m.double().var(0)).abs().max() > 0.05


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_receives_a_gradient(name, batch):
    parts = build(**VARIANTS[name])
    energy, forces = predict(parts, batch)
    (energy.square().sum() + forces.square().sum()).backward()
    gradients = {key: parameter.grad for part in parts for key, parameter in part.named_parameters()}
    assert not [key for key, gradient in gradients.items() if gradient is None or not gradient.any()]
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("accelerated", [False, True])
def test_derivatives_by_positions_match_finite_differences(accelerated):
    """First ones are forces, second ones the gradient term of equation (9)."""
    atoms = slabs(1)[0]
    inputs, parts = make_inputs([atoms], torch.float64), build(torch.float64)
    if accelerated:
        accelerate(parts[0])
    source, target = inputs.edge_index
    image = inputs.edge_vec - torch.from_numpy(atoms.positions[source] - atoms.positions[target])

    def energy(pos):
        return energies(parts, inputs._replace(edge_vec=pos[source] - pos[target] + image))

    pos = torch.from_numpy(atoms.positions.copy()).requires_grad_()
    assert torch.autograd.gradcheck(energy, pos, fast_mode=True)
    assert torch.autograd.gradgradcheck(energy, pos, fast_mode=True)


@pytest.mark.parametrize("kind", MP_TYPES)
def test_autocast_keeps_sums_in_full_precision(kind, batch):
    parts = build(mp_type=kind, num_filters=40)
    exact, sums = predict(parts, batch)[0], []
    for block in parts[0].blocks:
        block.norm.register_forward_hook(lambda module, arguments, output: sums.append(arguments[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        energy, forces = predict(parts, batch)
    assert {energy.dtype, forces.dtype, *sums} == {torch.float32}
    assert 0 < (energy - exact).abs().max() < 0.05 * exact.abs().max()
