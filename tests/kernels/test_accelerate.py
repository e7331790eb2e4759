"""Accelerated models: equal to the plain ones in values and all gradients, whatever happens to their weights."""

import copy
import io
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import ase
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from faenet_ocp.kernels import accelerate, edge_kernels, filtered_sum
from faenet_ocp.kernels.exchange import FastEdgeEmbedding, Tabulated
from network_inputs import VARIANTS, Inputs, build, energies, make_inputs, predict, slabs

Parts = tuple[nn.Module, ...]
EXACT = torch.float64


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of them shorter."""
    monkeypatch.setattr(filtered_sum, "NUMBERS_PER_BLOCK", 300 * 40)


@pytest.fixture(scope="module")
def batch() -> Inputs:
    return make_inputs(slabs(8))


@pytest.fixture(scope="module")
def few() -> Inputs:
    return make_inputs(slabs(2))


def accelerated(dtype: torch.dtype = torch.float32, **options: Any) -> Parts:
    parts = build(dtype, **options)
    accelerate(parts[0])
    return parts


def inputs_in(dtype: torch.dtype, inputs: Inputs) -> Inputs:
    return inputs._replace(edge_vec=inputs.edge_vec.to(dtype))


def values_and_gradients(parts: Parts, inputs: Inputs) -> list[Tensor]:
    """Energies, forces, and the gradients of a loss on both by the parameters."""
    energy, forces = predict(parts, inputs)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    loss = energy.square().sum() + forces.square().sum()
    return [energy.detach(), forces.detach(), *torch.autograd.grad(loss, parameters)]


def second_gradients(parts: Parts, inputs: Inputs) -> list[Tensor]:
    """dE/d(edge vectors), and the gradients of a loss on it: the gradient term of equation (9)."""
    vectors = inputs.edge_vec.clone().requires_grad_()
    energy = energies(parts, inputs._replace(edge_vec=vectors)).sum()
    (gradient,) = torch.autograd.grad(energy, vectors, create_graph=True)
    parameters = list(parts[0].parameters())
    return [gradient.detach(), *torch.autograd.grad(gradient.square().sum(), parameters, materialize_grads=True)]


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference, relative to the largest number of each tensor."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-4)) for a, b in pairs)


# --- Equal to the plain model ---


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "function, dtype, tolerance",
    [
        (values_and_gradients, torch.float32, 1e-4),
        (values_and_gradients, EXACT, 1e-10),
        (second_gradients, torch.float32, 1e-3),
        (second_gradients, EXACT, 1e-10),
    ],
)
def test_accelerated_equals_plain(
    name: str, function: Callable, dtype: torch.dtype, tolerance: float, batch: Inputs
) -> None:
    plain, fast = build(dtype, **VARIANTS[name]), accelerated(dtype, **VARIANTS[name])
    assert [part.state_dict().keys() for part in fast] == [part.state_dict().keys() for part in plain]
    inputs = inputs_in(dtype, batch)
    assert error(function(fast, inputs), function(plain, inputs)) < tolerance
    with torch.no_grad():
        assert error([energies(fast, inputs)], [energies(plain, inputs)]) < tolerance / 10


@pytest.mark.parametrize(
    "options, dtype, compiled, interpolated",
    [
        ({}, torch.float32, True, True),
        ({"mp_type": "updownscale"}, torch.float32, True, True),
        ({"second_layer_MLP": True}, torch.float32, True, False),
        ({"edge_embed_type": "all"}, torch.float32, True, False),
        ({"act": "gelu"}, torch.float32, False, False),
        ({}, EXACT, False, False),
        ({"mp_type": "att"}, torch.float32, False, False),
    ],
)
def test_what_is_fast_where(
    options: dict,
    dtype: torch.dtype,
    compiled: bool,
    interpolated: bool,
    batch: Inputs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels, run = set(), edge_kernels.run
    monkeypatch.setattr(edge_kernels, "run", lambda kernel, *a: kernels.add(kernel.__name__) or run(kernel, *a))
    parts, inputs = accelerated(dtype, **options), inputs_in(dtype, batch)
    values_and_gradients(parts, inputs)
    assert kernels == ({"add_messages", "add_gradients"} if compiled else set())
    embedding, vectors = parts[0].edge_embedding, inputs.edge_vec
    assert isinstance(embedding(vectors), Tabulated) == interpolated
    if interpolated:  # not for derivatives by the positions; few edges only if the table serves many batches
        assert not isinstance(embedding(vectors.clone().requires_grad_()), Tabulated)
        assert not isinstance(embedding(vectors[:10]), Tabulated)
        with torch.no_grad():
            assert isinstance(embedding(vectors[:10]), Tabulated)


def test_large_weights_are_interpolated_as_well(batch: Inputs) -> None:
    plain, fast = build(), accelerated()
    for part in (plain[0], fast[0]):
        part.edge_embedding.lin_rbf.weight.data *= 10
    assert error(values_and_gradients(fast, batch)[:2], values_and_gradients(plain, batch)[:2]) < 1e-5


@pytest.mark.parametrize("act", ["swish", "gelu"])
def test_bfloat16_is_no_less_exact_than_plain(act: str, batch: Inputs) -> None:
    exact = values_and_gradients(build(EXACT, act=act), inputs_in(EXACT, batch))
    errors = []
    for parts in (accelerated(act=act), build(act=act)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = values_and_gradients(parts, batch)
        assert {tensor.dtype for tensor in found} == {torch.float32}
        errors.append(sum(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(found, exact, strict=True)))
    assert errors[0] < 1.2 * errors[1]


def test_no_edges() -> None:
    inputs = make_inputs([ase.Atoms("Cu"), ase.Atoms("O2", positions=[[0, 0, 0], [9, 0, 0]])])
    assert error(values_and_gradients(accelerated(), inputs), values_and_gradients(build(), inputs)) < 1e-5


def test_positions_that_are_not_finite_spoil_their_system_only(batch: Inputs) -> None:
    vectors, spoilt = batch.edge_vec.clone(), batch.batch == 3
    vectors[spoilt[batch.edge_index[1]]] = torch.nan
    inputs = batch._replace(edge_vec=vectors)
    with torch.no_grad():
        assert energies(accelerated(), inputs).isnan().nonzero().flatten().tolist() == [3]
    assert torch.equal(values_and_gradients(accelerated(), inputs)[1].isnan().any(dim=1), spoilt)


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("atom", [-1, 10_000])
def test_edges_of_atoms_that_are_not_there_are_refused(end: int, atom: int, batch: Inputs) -> None:
    index = batch.edge_index.clone()
    index[end, 500] = atom
    with pytest.raises(IndexError, match="edge_index: edges of atoms outside 0 to"):
        energies(accelerated(), batch._replace(edge_index=index))


def test_few_tensors_per_edge_are_kept_for_the_gradient(batch: Inputs) -> None:
    """One a block (filters before the activation), besides the edge embedding's."""
    channels, kept = 40, {}
    net = accelerated(num_interactions=3, num_filters=channels, graph_norm="none", edge_embed_type="rij")[0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 4 * batch.edge_index.shape[1] * channels:
            kept[storage.data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert net(**batch.arguments).node_embedding.requires_grad
    assert len(kept) == 2 + 3


# --- Weights change ---


def _load(net: nn.Module, inputs: Inputs) -> None:
    net.load_state_dict({name: tensor + 0.01 if "lin" in name else tensor for name, tensor in net.state_dict().items()})


def _swap(net: nn.Module, inputs: Inputs) -> None:
    """As averages of weights are swapped in: past autograd's count of changes."""
    net.blocks[0].filter.lin.weight.data.add_(0.1)
    net.edge_embedding.lin_rbf.bias.data.add_(0.1)


def _train(net: nn.Module, inputs: Inputs) -> None:
    net.requires_grad_(True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with torch.enable_grad():
        net(**inputs.arguments).node_embedding.square().mean().backward()
    optimizer.step()


def _cast(net: nn.Module, inputs: Inputs) -> None:
    net.to(torch.bfloat16).to(torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("change", [_load, _swap, _train, _cast])
def test_what_is_kept_follows_the_weights(change: Callable[[nn.Module, Inputs], None], few: Inputs) -> None:
    parts = accelerated()
    parts[0].requires_grad_(False)
    before = energies(parts, few)
    change(parts[0], few)
    fresh = accelerated()
    for part, other in zip(fresh, parts, strict=True):
        part.load_state_dict(other.state_dict())
    assert torch.equal(energies(parts, few), energies(fresh, few))
    assert not torch.equal(energies(parts, few), before)


@torch.no_grad()
def test_what_is_kept_follows_the_precision(few: Inputs) -> None:
    parts, doubled = accelerated(), inputs_in(EXACT, few)
    exact = energies(parts, few)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(energies(parts, few), exact)
    assert torch.equal(energies(parts, few), exact)
    for part in parts:
        part.double()
    torch.testing.assert_close(energies(parts, doubled), energies(build(EXACT), doubled), rtol=1e-6, atol=0)


@torch.no_grad()
def test_it_is_computed_once_for_many_batches(few: Inputs) -> None:
    parts, calls = accelerated(), []
    parts[0].edge_embedding.smearing.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(energies(parts, few), energies(parts, few))
    assert len(calls) == 1


def _pickled(parts: Any) -> Any:
    file = io.BytesIO()
    torch.save(parts, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_a_copy_is_fast_and_on_its_own(copied: Callable, few: Inputs) -> None:
    """As of a model whose weights are averaged: it is right from the start, and after its weights change."""
    parts = accelerated()
    before, copies = energies(parts, few), copied(parts)
    assert isinstance(copies[0].edge_embedding, FastEdgeEmbedding)
    assert torch.equal(energies(copies, few), before)
    copies[0].edge_embedding.lin_rbf.weight += 0.1
    assert not torch.equal(energies(copies, few), before)
    assert torch.equal(energies(parts, few), before)


# --- Parts ---


@torch.no_grad()
def test_distances_from_zero_to_beyond_the_gaussians() -> None:
    vectors = functional.pad(torch.linspace(0, 40, 400)[:, None], (0, 2))
    parts = accelerated()[0].edge_embedding(vectors)
    channels = (parts.knots.values[parts.knots.near] * parts.knots.weight[:, :, None]).sum(1)
    expected = build()[0].edge_embedding(vectors)
    torch.testing.assert_close(torch.cat([parts.vector_part, channels], dim=1), expected, rtol=1e-6, atol=1e-6)


def _add_messages(
    linear: Tensor, nodes: Tensor, values: Tensor, source: Tensor, target: Tensor, kept: Tensor | None = None
) -> Tensor:
    """m of edges (E, M) from the kernel, without knots."""
    (edges, channels), m = linear.shape, torch.zeros_like(values)
    none, knots = torch.empty(0, channels), (torch.empty(0, dtype=torch.int32), torch.empty(0, 4))
    arrays = edge_kernels.arrays(m, none if kept is None else kept, linear, none, nodes, values, source, target, *knots)
    edge_kernels.run(edge_kernels.add_messages, channels, *arrays, 0, edges)
    return m


def _message_sums() -> bytes:
    """m of 200 edges between 23 atoms."""
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(size, generator=generator) for size in ((200, 130), (23, 260), (23, 130)))
    return _add_messages(*tensors, *torch.randint(0, 23, (2, 200), generator=generator)).numpy().tobytes()


def _through_one_edge(x: Tensor, kept: Tensor | None = None) -> Tensor:
    """m of one edge with these filters to a value of 1: their silu."""
    index = torch.zeros(1, dtype=torch.long)
    return _add_messages(x[None], torch.zeros(1, 2 * len(x)), torch.ones(1, len(x)), index, index, kept)[0]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(threads: None) -> None:
    results = set()
    for count in (1, 2, 3, 64):
        torch.set_num_threads(count)
        results.add(_message_sums())
    assert len(results) == 1 and any(results.pop())


def test_a_forked_process_has_threads_of_its_own(threads: None) -> None:
    """Those of its parent are not there, and work given to them would never end."""
    torch.set_num_threads(4)
    _message_sums()
    child = multiprocessing.get_context("fork").Process(target=_message_sums)
    child.start()
    child.join(60)
    child.kill()  # no effect on one that has ended
    child.join()
    assert child.exitcode == 0


def test_silu_from_end_to_end() -> None:
    x = torch.cat([torch.linspace(-120, 120, 24_001), torch.tensor([-1e30, -1e4, 0.0, 1e4, 1e30, torch.inf])])
    m, expected = _through_one_edge(x), functional.silu(x.double())
    finite = expected.isfinite() & (expected.abs() > 1e-30)
    assert float(((m - expected) / expected)[finite].abs().max()) < 3e-7
    assert bool((m[~finite & (x < 0)].abs() < 1e-7).all())
    assert m[-1] == torch.inf


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).int()
    ties = (torch.arange(0, 2**16, dtype=torch.int64) << 16 | 0x8000).int()
    x = torch.cat([bits, ties]).view(torch.float32)
    x = torch.cat([x[x.abs() < 1e38], torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])])
    kept = torch.empty(1, len(x), dtype=torch.bfloat16)
    _through_one_edge(x, kept)
    torch.testing.assert_close(kept[0], x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
