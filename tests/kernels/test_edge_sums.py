"""Sums over edges in blocks: equal to the plain formula, with all derivatives; interpolation of the distance part."""

import copy

import pytest
import torch
from torch.nn.functional import silu

from faenet_ocp.kernels import cpu_edges as edge_sums
from faenet_ocp.kernels.cpu_edges import Inputs, Knots, cubic_interpolation, filtered_sum
from faenet_ocp.models.embedding import GaussianSmearing
from network_inputs import build, energies, make_inputs, predict, slabs

NUM_EDGES, NUM_ATOMS, NUM_KNOTS, CHANNELS, FILTERS = 11, 4, 9, 3, 5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, the last of them shorter."""
    monkeypatch.setattr(edge_sums, "EDGES_PER_BLOCK", 4)


def random_arguments(dtype=torch.float64):
    torch.manual_seed(3)
    sizes = [(NUM_EDGES, FILTERS), (CHANNELS, FILTERS), (NUM_ATOMS, 2 * CHANNELS), (NUM_ATOMS, CHANNELS)]
    tensors = [torch.randn(size, dtype=dtype, requires_grad=True) for size in [*sizes, (NUM_KNOTS, CHANNELS)]]
    source = torch.randint(0, NUM_ATOMS, (NUM_EDGES,))
    target = torch.randint(0, NUM_ATOMS, (NUM_EDGES,)).sort()[0]
    near, weight = cubic_interpolation(torch.rand(NUM_EDGES, dtype=dtype) * (NUM_KNOTS - 4))
    return tensors, source, target, near, weight


def naive(e, weight, nodes, values, knots, source, target, near, knot_weight):
    """One edge after the other."""
    sums = torch.zeros(NUM_ATOMS, CHANNELS, dtype=values.dtype)
    a, b = nodes[:, :CHANNELS], nodes[:, CHANNELS:]
    for edge, (j, i) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        linear = weight @ e[edge] + a[j] + b[i]
        if knots is not None:
            linear = linear + sum(knot_weight[edge, k] * knots[near[edge, k]] for k in range(4))
        sums = sums + torch.nn.functional.one_hot(torch.tensor(i), NUM_ATOMS)[:, None] * (silu(linear) * values[j])
    return sums


@pytest.mark.parametrize("with_knots", [True, False])
def test_blocks_of_edges_give_the_sum_over_each_edge(with_knots):
    (e, weight, nodes, values, at_knots), source, target, near, knot_weight = random_arguments()
    inputs = (e, weight, nodes, values, at_knots) if with_knots else (e, weight, nodes, values)

    def ours(e, weight, nodes, values, at_knots=None):
        knots = None if at_knots is None else Knots(at_knots, near, knot_weight)
        return filtered_sum(e, weight, nodes, values, source, target, silu, knots)

    expected = naive(*inputs, *(() if with_knots else (None,)), source, target, near, knot_weight)
    torch.testing.assert_close(ours(*inputs), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


@pytest.mark.parametrize("with_knots", [True, False])
def test_edges_that_share_an_embedding(with_knots):
    (e, weight, nodes, values, at_knots), source, target, near, knot_weight = random_arguments()
    shared = torch.tensor([0, 2, 3, 3, 4])  # of two blocks; one row has three edges
    own = NUM_EDGES - len(shared)
    row = torch.cat([torch.arange(own), shared])
    e = e[:own].detach().requires_grad_()
    inputs = (e, weight, nodes, values, at_knots) if with_knots else (e, weight, nodes, values)

    def ours(e, weight, nodes, values, at_knots=None):
        knots = None if at_knots is None else Knots(at_knots, near[:own], knot_weight[:own])
        return filtered_sum(e, weight, nodes, values, source, target, silu, knots, shared)

    rest = () if with_knots else (None,)
    expected = naive(e[row], *inputs[1:], *rest, source, target, near[row], knot_weight[row])
    torch.testing.assert_close(ours(*inputs), expected, rtol=1e-12, atol=1e-12)
    knots = (at_knots, near[:own], knot_weight[:own]) if with_knots else (None, None, None)
    plain = edge_sums.plain_filtered_sum(Inputs(e, weight, nodes, values, *knots, source, target, shared), silu)
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


def test_one_argument_computed_from_another_is_not_counted_twice():
    """In a network the values are embeddings from which `nodes` was computed."""
    (e, weight, _, values, _), source, target, *_ = random_arguments()
    mix = torch.randn(CHANNELS, 2 * CHANNELS, dtype=torch.float64)

    def ours(values):
        return filtered_sum(e, weight, values @ mix, values, source, target, silu)

    assert torch.autograd.gradcheck(ours, values)
    assert torch.autograd.gradgradcheck(ours, values)


def test_only_what_is_needed_gets_a_gradient():
    (e, weight, nodes, values, _), source, target, *_ = random_arguments()
    filtered_sum(e.detach(), weight, nodes, values, source, target, silu).sum().backward()

    assert e.grad is None
    assert all(x.grad is not None for x in (weight, nodes, values))


def test_nothing_is_kept_without_gradients(monkeypatch):
    (e, weight, nodes, values, _), source, target, *_ = random_arguments()
    kept = []
    monkeypatch.setattr(torch.autograd.function.FunctionCtx, "save_for_backward", lambda ctx, *x: kept.append(x[-1]))
    filtered_sum(e, weight, nodes, values, source, target, silu)
    with torch.no_grad():
        filtered_sum(e.detach(), weight, nodes.detach(), values.detach(), source, target, silu)

    assert [len(tensor) for tensor in kept] == [NUM_EDGES, 0]


def test_no_edges():
    (e, weight, nodes, values, _), source, target, *_ = random_arguments()
    m = filtered_sum(e[:0], weight, nodes, values, source[:0], target[:0], silu)
    m.sum().backward()

    assert torch.equal(m, torch.zeros_like(values))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_interpolation_is_exact_for_cubics_only():
    place = torch.rand(50, dtype=torch.float64) * 10
    knots = torch.arange(-1.0, 13.0, dtype=torch.float64)
    near, weight = cubic_interpolation(place)

    for power in range(4):
        torch.testing.assert_close((knots[near] ** power * weight).sum(1), place**power)
    error = ((knots[near] ** 4 * weight).sum(1) - place**4).abs().max()
    assert 0.3 < error <= 24 * 9 / 384 * 1.001


def test_knots_reach_from_zero_to_where_the_gaussians_vanish():
    smearing = GaussianSmearing(cutoff=6.0, num_gaussians=104)
    knots = smearing.knots()

    assert len(knots) == smearing.num_knots
    assert knots[1] == 0
    assert smearing(knots[-3:]).max() < 1e-13
    near, weight = cubic_interpolation(smearing.place(torch.tensor([0.0, 6.0, 100.0])))
    assert near.min() >= 0
    assert near.max() < smearing.num_knots
    torch.testing.assert_close(weight.sum(1), torch.ones(3))


def compare_with_and_without_knots(monkeypatch, scale=1.0, **options):
    """Predictions of a network, and gradients of its parameters, with the distance interpolated and not."""
    monkeypatch.setattr(edge_sums, "EDGES_PER_BLOCK", 256)
    inputs = make_inputs(slabs(16))
    results = []
    for interpolated in (True, False):
        parts = build(**options)
        with torch.no_grad():
            parts[0].edge_embedding.lin_rbf.weight *= scale
        embedding = parts[0].edge_embedding
        assert embedding.tabulates(inputs.edge_vec)
        if not interpolated:
            monkeypatch.setattr(embedding, "tabulates", lambda edge_vec: False)
        energy, forces = predict(parts, inputs)
        (energy.square().sum() + forces.square().sum()).backward()
        gradients = [p.grad for part in parts[:2] for p in part.parameters() if p.grad is not None]
        results.append([energy.detach(), forces.detach(), *gradients])
    assert len(results[0]) > 20
    return [((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("kind", ["base", "simple", "updownscale", "updownscale_base"])
def test_interpolated_distances_change_nothing_in_single_precision(kind, monkeypatch):
    errors = compare_with_and_without_knots(monkeypatch, mp_type=kind)

    assert max(errors[:2]) < 2e-6
    assert max(errors) < 1e-4


def test_nor_with_large_weights(monkeypatch):
    assert max(compare_with_and_without_knots(monkeypatch, scale=10.0)[:2]) < 1e-5


@pytest.mark.parametrize(
    "options, dtype",
    [({}, torch.float64), ({"second_layer_MLP": True}, torch.float32), ({"edge_embed_type": "all"}, torch.float32)],
)
def test_where_nothing_is_interpolated(options, dtype):
    inputs = make_inputs(slabs(16), dtype)
    assert not build(dtype, **options)[0].edge_embedding.tabulates(inputs.edge_vec)


def test_derivatives_by_the_positions_are_not_of_an_interpolation():
    inputs = make_inputs(slabs(16))
    parts = build()
    vectors = inputs.edge_vec.clone().requires_grad_()
    assert not parts[0].edge_embedding.tabulates(vectors)

    energies(parts, inputs._replace(edge_vec=vectors)).sum().backward()
    assert (vectors.grad.abs().sum(1) > 0).all()


def test_few_edges_are_worth_it_only_where_the_knots_serve_many_batches():
    embedding, few = build()[0].edge_embedding, make_inputs(slabs(1)).edge_vec[:10]
    assert not embedding.tabulates(few)
    with torch.no_grad():
        assert embedding.tabulates(few)


@pytest.fixture
def computed(monkeypatch):
    """An entry for every time that knots are computed."""
    calls, knots = [], GaussianSmearing.knots
    monkeypatch.setattr(GaussianSmearing, "knots", lambda self: calls.append(1) or knots(self))
    return calls


def test_knots_are_computed_once_for_many_batches_in_evaluation(computed):
    parts, inputs = build(), make_inputs(slabs(2))
    with torch.no_grad():
        first = energies(parts, inputs)
        assert torch.equal(energies(parts, inputs), first)
    assert len(computed) == 1


@pytest.mark.parametrize("name", ["lin_rbf.weight", "lin_rbf.bias", "block"])
def test_knots_follow_the_weights(name, computed):
    """Also past autograd's count of changes, as averages of weights are swapped in."""
    parts, inputs = build(), make_inputs(slabs(2))
    weight = parts[0].blocks[0].filter.lin.weight
    changed = weight if name == "block" else parts[0].edge_embedding.get_parameter(name)
    with torch.no_grad():
        energies(parts, inputs)
    changed.data.add_(0.1)
    with torch.no_grad():
        after = energies(parts, inputs)
    fresh = build()
    for part, other in zip(fresh, parts, strict=True):
        part.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(after, energies(fresh, inputs), rtol=0, atol=0)
    assert len(computed) == (2 if name == "block" else 3)


def test_a_copy_has_knots_of_its_own(computed):
    """As of a model whose weights are averaged: the copy is right from the start, and after its weights change."""
    parts, inputs = build(), make_inputs(slabs(2))
    with torch.no_grad():
        before = energies(parts, inputs)
        copies = copy.deepcopy(parts)
        assert torch.equal(energies(copies, inputs), before)
        assert len(computed) == 1
        copies[0].edge_embedding.lin_rbf.weight += 0.1
        assert not torch.equal(energies(copies, inputs), before)
        assert torch.equal(energies(parts, inputs), before)


def test_knots_follow_autocast_and_training():
    parts, inputs = build(), make_inputs(slabs(2))
    with torch.no_grad():
        exact = energies(parts, inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not torch.equal(energies(parts, inputs), exact)
        assert torch.equal(energies(parts, inputs), exact)
    energies(parts, inputs).sum().backward()
    assert bool(parts[0].edge_embedding.lin_rbf.weight.grad.any())


def test_an_embedding_without_a_distance_part_cannot_be_interpolated():
    inputs = make_inputs(slabs(1))
    with pytest.raises(ValueError, match="depend on the distance alone"):
        build(edge_embed_type="rij")[0].edge_embedding.with_knots(inputs.edge_vec)
