"""The network against independent computations of the paper's equations, and its promises."""

import itertools
import math

import ase
import numpy as np
import pytest
import torch
from ase.build import molecule
from torch.nn.functional import silu

from faenet_ocp.models.embedding import EDGE_EMBED_TYPES, GaussianSmearing, spherical_harmonics
from faenet_ocp.models.faenet import ENERGY_HEADS, ForceHead
from faenet_ocp.models.heads import FORCE_DECODERS, FORCE_NORMS
from faenet_ocp.models.message_passing import MP_TYPES, BlockOptions, Graph, segment_sum, sum_messages
from network_inputs import SMALL, build, energies, make_inputs, predict, slabs

TABLE_6 = {
    "FAENet": {},
    "only r_ij": {"edge_embed_type": "rij"},
    "only spherical harmonics": {"edge_embed_type": "sh"},
    "all": {"edge_embed_type": "all"},
    "two layers in the embedding MLPs": {"second_layer_MLP": True},
    "simple MP": {"mp_type": "simple"},
    "basic MP": {"mp_type": "basic", "num_filters": 40},
    "updownscale MP": {"mp_type": "updownscale"},
    "updownscale MP, filter from atoms too": {"mp_type": "updownscale_base"},
    "attention": {"mp_type": "base_with_att", "att_heads": 2},
    "no complex MP": {"complex_mp": False},
    "simple energy head": {"energy_head": "sum"},
    "no jumping connections": {"skip_co": "none"},
}
OTHERS = {
    "local environment": {"mp_type": "updown_local_env"},
    "graph transformer": {"mp_type": "att"},
    "weights from initial embeddings": {"energy_head": "weighted-av-initial-embeds"},
    "jumping connections added": {"skip_co": "add"},
    "jumping connections of atoms": {"skip_co": "concat_atom"},
    "no norm": {"graph_norm": "none"},
    "learnt properties": {"phys_hidden_channels": 6},
    "no properties": {"phys_embeds": False},
    "no tags, periods and groups": {"tag_hidden_channels": 0, "pg_hidden_channels": 0},
}


@pytest.fixture(scope="module")
def batch():
    return make_inputs(slabs(4))


# --- Equations ---


def naive_message(kind, block, h, edge_index, e):
    """m_i by a loop over edges, straight from the table in message_passing.py."""
    act = silu
    messages = {}
    for edge, (j, i) in enumerate(edge_index.T.tolist()):
        if kind in ("base", "updownscale_base"):
            f = act(block.filter.lin(torch.cat([e[edge], h[j], h[i]])))
        elif kind in ("simple", "updownscale"):
            f = act(block.filter.lin(e[edge]))
        elif kind == "updown_local_env":
            f = block.lin_filter(e[edge])
        else:
            f = e[edge]
        v = act(block.lin_down(h[j])) if kind.startswith("updown") else h[j]
        messages.setdefault(i, []).append(f * v)
    zero = torch.zeros_like(f)
    return torch.stack([sum(messages.get(i, []), zero) for i in range(len(h))])


def naive_attention(kind, block, h, edge_index, e):
    """Messages of `att` and `base_with_att`, atom by atom and head by head."""
    channels = h.shape[1]
    key_bias = torch.randn(block.heads * channels, dtype=h.dtype)  # makes no difference
    m = torch.zeros_like(h)
    for i in range(len(h)):
        edges = (edge_index[1] == i).nonzero().flatten()
        if not len(edges):
            continue
        neighbours = h[edge_index[0, edges]]
        heads = [slice(k * channels, (k + 1) * channels) for k in range(block.heads)]
        for head in heads:
            w = block.lin_edge(e[edges])[:, head]
            key = (block.lin_key(neighbours) + key_bias)[:, head]
            value = block.lin_value(neighbours)[:, head]
            query = block.lin_query(h[i])[head]
            scores = (key if kind == "base_with_att" else key + w) @ query / math.sqrt(channels)
            message = value * w if kind == "base_with_att" else value + w
            m[i] += (torch.softmax(scores, 0) @ message) / block.heads
    return m


def naive_norm(m, norm, batch):
    out = torch.empty_like(m)
    for system in batch.unique():
        rows = batch == system
        centred = m[rows] - norm.mean_scale * m[rows].mean(0)
        out[rows] = norm.weight * centred / (centred.square().mean(0) + 1e-5).sqrt() + norm.bias
    return out


@pytest.mark.parametrize("complex_mp", [True, False])
@pytest.mark.parametrize("graph_norm", [True, False])
@pytest.mark.parametrize("kind", MP_TYPES)
def test_interaction_block_is_equation_8(kind, graph_norm, complex_mp):
    torch.manual_seed(1)
    channels, filters = 6, (6 if kind == "basic" else 5)
    options = BlockOptions(channels, filters, silu, complex_mp, graph_norm, att_heads=2)
    block = MP_TYPES[kind](options).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    system = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    edge_index = torch.tensor([[1, 2, 0, 3, 0, 0, 5, 6], [0, 0, 1, 1, 2, 2, 4, 4]])
    h = torch.randn(7, channels, dtype=torch.float64)
    e = torch.randn(edge_index.shape[1], filters, dtype=torch.float64)
    local_env = torch.stack([e[edge_index[1] == i].sum(0) for i in range(7)])
    graph = Graph(edge_index[0], edge_index[1], e, local_env, system, 2)

    naive = naive_attention if kind in ("att", "base_with_att") else naive_message
    m = naive(kind, block, h, edge_index, e)
    if graph_norm:
        m = silu(naive_norm(m, block.norm, system))
    m = block.lin_out(torch.cat([m, local_env], 1)) if kind == "updown_local_env" else silu(block.lin_out(m))
    expected = h + (silu(block.lin_complex(m)) if complex_mp else m)

    torch.testing.assert_close(block(h, graph), expected, rtol=1e-10, atol=1e-10)


def test_distances_are_expanded_in_gaussians_up_to_the_cutoff():
    smearing = GaussianSmearing(cutoff=6.0, num_gaussians=4)
    got = smearing(torch.tensor([0.0, 3.0, 6.0]))

    expected = [[math.exp(-0.5 * ((d - c) / 2.0) ** 2) for c in (0.0, 2.0, 4.0, 6.0)] for d in (0.0, 3.0, 6.0)]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_spherical_harmonics_have_their_norms_and_are_orthogonal():
    torch.manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(200_000, 3, dtype=torch.float64), dim=1)
    harmonics = spherical_harmonics(v)

    for degree, part in zip((1, 2, 3), harmonics.split([3, 5, 7], dim=1), strict=True):
        expected = torch.full((len(v),), 2.0 * degree + 1, dtype=torch.float64)
        torch.testing.assert_close(part.square().sum(1), expected)
    gram = harmonics.T @ harmonics / len(v)
    torch.testing.assert_close(gram, torch.eye(15, dtype=torch.float64), atol=0.03, rtol=0)


def test_spherical_harmonics_are_those_of_e3nn():
    o3 = pytest.importorskip("e3nn.o3")
    torch.manual_seed(0)
    v = torch.randn(20, 3, dtype=torch.float64)

    expected = o3.spherical_harmonics([1, 2, 3], v, normalize=False, normalization="component")
    torch.testing.assert_close(spherical_harmonics(v), expected)


@pytest.mark.parametrize("kind", EDGE_EMBED_TYPES)
def test_edge_embedding_is_equation_7(kind):
    embedding = build(torch.float64, edge_embed_type=kind, second_layer_MLP=True)[0].edge_embedding
    r = torch.tensor([[1.0, -2.0, 2.0], [0.1, 0.0, -0.5]], dtype=torch.float64)
    d = torch.tensor([3.0, math.hypot(0.1, 0.5)], dtype=torch.float64)
    rbf = embedding.smearing(d)
    harmonics = spherical_harmonics((r / d[:, None] + 1) / 2)
    features = {"rij": r, "sh": harmonics, "all": torch.cat([r, harmonics, rbf], 1)}
    if kind == "all_rij":
        first = torch.cat([embedding.lin(r), embedding.lin_rbf(rbf)], 1)
    else:
        first = embedding.lin(features[kind])

    torch.testing.assert_close(embedding(r), silu(embedding.lin_2(silu(first))))


@pytest.mark.parametrize("skip_co", ["concat", "add", "concat_atom", "none"])
@pytest.mark.parametrize("weights", ENERGY_HEADS)
def test_energy_is_the_weighted_sum_of_atom_energies(weights, skip_co, batch):
    net, head, _ = build(energy_head=weights, skip_co=skip_co)
    output = net(**batch.arguments)

    assert len(output.hidden_states) == 1 + SMALL["num_interactions"]
    if skip_co == "concat_atom":
        mixed = silu(net.lin_skip(torch.cat(output.hidden_states, 1)))
        torch.testing.assert_close(output.node_embedding, mixed)
    else:
        assert output.node_embedding is output.hidden_states[-1]
    states = output.hidden_states if skip_co in ("concat", "add") else [output.node_embedding]
    columns = []
    for h in states:
        atom = head.lin_2(silu(head.lin_1(h)))[:, 0]
        if weights == "weighted-av-final-embeds":
            atom = atom * head.lin_weight(h)[:, 0]
        elif weights == "weighted-av-initial-embeds":
            atom = atom * head.lin_weight(output.hidden_states[0])[:, 0]
        columns.append(torch.stack([atom[batch.batch == s].sum() for s in range(len(batch.atoms))]))
    stacked = torch.stack(columns, 1)
    expected = head.lin_skip(stacked)[:, 0] if skip_co == "concat" else stacked.sum(1)
    torch.testing.assert_close(head(output, batch.batch, len(batch.atoms)), expected)


def test_sums_over_an_index():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    got = segment_sum(values, torch.tensor([2, 0, 2]), 4)

    assert got.tolist() == [[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [0.0, 0.0]]


def test_message_sum_is_differentiable_twice():
    torch.manual_seed(0)
    source, target = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 0, 2, 2, 2])
    filters = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def function(f, v):
        return sum_messages(f, v, Graph(source, target, f, None, None, 1)).sin()

    assert torch.autograd.gradcheck(function, (filters, values))
    assert torch.autograd.gradgradcheck(function, (filters, values))


# --- Promises ---


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("options", [{}, {"mp_type": "updownscale_base", "skip_co": "concat_atom"}, {"mp_type": "att"}])
def test_predictions_do_not_depend_on_the_batch(options, dtype, tolerance):
    systems = [*slabs(5), ase.Atoms("Cu", cell=[9, 9, 9]), molecule("CH3CH2OH")]
    parts = [part.eval() for part in build(dtype, norm="batch1d", **options)]
    together = predict(parts, make_inputs(systems, dtype))
    starts = np.cumsum([0] + [len(atoms) for atoms in systems])
    scale = together[0].detach().abs().max()

    for order in ([i] for i in range(7)), [[6, 2, 5, 0, 4, 1, 3]], [[3, 5], [6, 1]]:
        for chosen in order:
            energy, forces = predict(parts, make_inputs([systems[i] for i in chosen], dtype))
            rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])
            torch.testing.assert_close(energy, together[0][chosen], rtol=0, atol=tolerance * float(scale))
            torch.testing.assert_close(forces, together[1][rows], rtol=0, atol=tolerance)


def test_batch_norm_mode_depends_on_the_batch(batch):
    """Negative control of the test above, and the reason for the warning."""
    with pytest.warns(UserWarning, match="depends on the other systems in the batch"):
        parts = build(graph_norm="batch")
    alone = energies(parts, make_inputs(batch.atoms[:1]))

    assert (alone - energies(parts, batch)[:1]).abs() > 1e-3


@pytest.mark.parametrize("kind", MP_TYPES)
def test_order_of_atoms_and_edges_does_not_matter(kind, batch):
    options = {"num_filters": 40} if kind == "basic" else {}
    parts = build(torch.float64, mp_type=kind, **options)
    inputs = make_inputs(batch.atoms, torch.float64)
    torch.manual_seed(3)
    edges = torch.randperm(inputs.edge_index.shape[1])
    atoms = torch.cat([rows[torch.randperm(len(rows))] for rows in torch.arange(len(inputs.batch)).split(
        [len(a) for a in inputs.atoms])])  # fmt: skip
    new_place = torch.empty_like(atoms)
    new_place[atoms] = torch.arange(len(atoms))
    shuffled = inputs._replace(
        atomic_numbers=inputs.atomic_numbers[atoms],
        tags=inputs.tags[atoms],
        edge_index=new_place[inputs.edge_index[:, edges]],
        edge_vec=inputs.edge_vec[edges],
    )
    got, expected = predict(parts, shuffled), predict(parts, inputs)

    torch.testing.assert_close(got[0], expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got[1], expected[1][atoms], rtol=1e-10, atol=1e-12)


def test_norm_does_not_lose_precision_to_a_large_mean():
    """Mean square minus squared mean, in float32, would leave little of the variance here."""
    block = MP_TYPES["base"](BlockOptions(4, 4, silu, True, True))
    torch.manual_seed(0)
    m = 3000.0 + torch.randn(60, 4)
    expected = naive_norm(m.double(), block.norm.double(), torch.zeros(60, dtype=torch.long))

    got = block.norm.float()(m)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-3)
    assert (m.square().mean(0) - m.mean(0).square() - m.double().var(0)).abs().max() > 0.05


@pytest.mark.parametrize("kind", MP_TYPES)
def test_single_atoms_and_atoms_without_edges_are_finite(kind):
    options = {"num_filters": 40} if kind == "basic" else {}
    parts = build(mp_type=kind, **options)
    inputs = make_inputs([ase.Atoms("Cu"), ase.Atoms("O2", positions=[[0, 0, 0], [9, 0, 0]])])
    assert inputs.edge_index.shape == (2, 0)

    energy, forces = predict(parts, inputs)
    (energy.sum() + forces.sum()).backward()

    assert energy.isfinite().all() and forces.isfinite().all()
    gradients = [p.grad for part in parts for p in part.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", TABLE_6 | OTHERS)
def test_every_parameter_receives_a_gradient(name, batch):
    parts = build(**(TABLE_6 | OTHERS)[name])
    energy, forces = predict(parts, batch)
    (energy.square().sum() + forces.square().sum()).backward()

    without = [
        key
        for part in parts
        for key, parameter in part.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not without
    assert all(parameter.grad.isfinite().all() for part in parts for parameter in part.parameters())


def test_options_combine(batch):
    """Message passing, norm, embedding and skip connection are independent of each other."""
    choices = itertools.product(MP_TYPES, EDGE_EMBED_TYPES, ["system", "none"], ["concat", "concat_atom"])
    for mp_type, edge_embed_type, graph_norm, skip_co in choices:
        parts = build(
            mp_type=mp_type,
            num_filters=40,
            edge_embed_type=edge_embed_type,
            graph_norm=graph_norm,
            skip_co=skip_co,
        )
        energy, forces = predict(parts, batch)
        (energy.sum() + forces.sum()).backward()
        assert all(parameter.grad is not None for part in parts for parameter in part.parameters())
        assert energy.isfinite().all()


@pytest.mark.parametrize("norm", FORCE_NORMS)
@pytest.mark.parametrize("kind", FORCE_DECODERS)
def test_force_decoders(kind, norm):
    torch.manual_seed(0)
    head = ForceHead(hidden_channels=10, force_decoder_type=kind, force_hidden_channels=7, force_norm=norm)
    h = torch.randn(9, 10)
    forces = head(h)
    forces.square().sum().backward()

    assert forces.shape == (9, 3)
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
    residual = {"res": [10, 10], "res_updown": [7, 7, 10]}.get(kind, [])
    layers = [layer.out_features for layer in head.modules() if isinstance(layer, torch.nn.Linear)]
    assert layers == [*residual, 7, 3]
    has_norm = any(isinstance(m, torch.nn.BatchNorm1d | torch.nn.LayerNorm) for m in head.modules())
    assert has_norm == (norm != "none" and kind != "simple")


def test_forces_from_the_energy_match_finite_differences():
    """And a loss on them can be differentiated: the gradient term of equation (9)."""
    atoms = slabs(1)[0]
    inputs = make_inputs([atoms], torch.float64)
    parts = build(torch.float64)
    source, target = inputs.edge_index
    image = inputs.edge_vec - torch.from_numpy(atoms.positions[source] - atoms.positions[target])

    def energy(pos):
        return energies(parts, inputs._replace(edge_vec=pos[source] - pos[target] + image))

    pos = torch.from_numpy(atoms.positions.copy()).requires_grad_()
    gradient = torch.autograd.grad(energy(pos).sum(), pos, create_graph=True)[0]
    for atom, axis, step in (0, 2, 1e-4), (8, 0, 1e-4):
        shift = torch.zeros_like(pos)
        shift[atom, axis] = step
        with torch.no_grad():
            numeric = (energy(pos + shift) - energy(pos - shift)) / (2 * step)
        assert gradient[atom, axis].item() == pytest.approx(numeric.item(), rel=1e-6, abs=1e-9)

    gradient.square().sum().backward()
    parameter = parts[0].blocks[0].filter.lin.weight
    analytic = parameter.grad[2, 3].item()

    def loss():
        again = torch.autograd.grad(energy(pos).sum(), pos)[0]
        return again.square().sum().item()

    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            parameter[2, 3] += step
        values.append(loss())
        with torch.no_grad():
            parameter[2, 3] -= step
    assert analytic == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_few_tensors_per_edge_are_kept_for_the_gradient(batch):
    """One a block (filters before the activation), besides the edge embedding's."""
    channels, kept = 40, {}
    net, _, _ = build(num_interactions=3, num_filters=channels, graph_norm="none")
    large = batch.edge_index.shape[1] * channels

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() == 4 * large:
            kept[storage.data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net(**batch.arguments)
    assert output.node_embedding.requires_grad
    assert len(kept) == 2 + 3


@pytest.mark.parametrize("kind", MP_TYPES)
def test_autocast_keeps_sums_in_full_precision(kind, batch):
    parts = build(mp_type=kind, num_filters=40)
    exact = predict(parts, batch)
    sums = []
    for block in parts[0].blocks:
        block.norm.register_forward_hook(lambda module, arguments, output: sums.append(arguments[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        energy, forces = predict(parts, batch)
        embedding = parts[0](**batch.arguments).node_embedding

    assert {energy.dtype, forces.dtype, embedding.dtype, *sums} == {torch.float32}
    assert 0 < (energy - exact[0]).abs().max() < 0.05 * exact[0].abs().max()


def test_the_network_is_traced_without_graph_breaks(batch):
    parts = build()
    compiled = torch.compile(parts[0], fullgraph=True, backend="eager", dynamic=True)

    got = compiled(**batch.arguments).node_embedding
    torch.testing.assert_close(got, parts[0](**batch.arguments).node_embedding)
    parts[0].atom_embedding.known_elements[int(batch.atomic_numbers[0])] = False
    with pytest.raises(RuntimeError, match="an element that the model does not know"):
        compiled(**batch.arguments)


# --- Golden numbers ---


def test_golden_numbers():
    """Of seeded networks. When a change of the numbers is intended, print `got` and replace them."""
    inputs = make_inputs([molecule("CH3CH2OH"), molecule("H2O")])
    inputs = inputs._replace(tags=torch.arange(len(inputs.batch)) % 3)
    parts = build(norm="none")
    got = [*energies(parts, inputs).tolist()]
    parts = build(norm="none", mp_type="updownscale_base", skip_co="none")
    energy, forces = predict(parts, inputs)
    got += [*energy.tolist(), forces[0, 0].item()]

    assert got == pytest.approx(GOLDEN, rel=1e-4, abs=1e-5)


GOLDEN = [-0.590571, -0.230057, -0.319227, -0.188617, -0.131390]
