"""Compiled sums over edges: the same as in torch, in float32 and bfloat16, on any number of threads."""

import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from faenet_ocp.kernels import cpu_edges as edge_sums
from faenet_ocp.kernels import edge_kernels
from faenet_ocp.kernels.cpu_edges import Inputs, Knots, cubic_interpolation, filtered_sum

ATOMS, KNOTS, FILTERS = 23, 40, 12


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_sums, "EDGES_PER_BLOCK", 64)


def random_inputs(
    *, channels: int = 37, edges: int = 300, knots: bool = True, shared: int = 0, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Edges are in no order; the last `shared` have rows of e in common with others."""
    generator = torch.Generator().manual_seed(channels + shared)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    rows = edges - shared
    near, weight = cubic_interpolation(torch.rand(rows, generator=generator) * (KNOTS - 4))
    return Inputs(
        e=draw(rows, FILTERS),
        weight=draw(channels, FILTERS),
        nodes=draw(ATOMS, 2 * channels),
        values=draw(ATOMS, channels).float(),
        knot_values=draw(KNOTS, channels) if knots else None,
        near=near if knots else None,
        knot_weight=weight if knots else None,
        source=torch.randint(0, ATOMS, (edges,), generator=generator),
        target=torch.randint(0, ATOMS, (edges,), generator=generator),
        shared=torch.randint(0, rows, (shared,), generator=generator).sort()[0] if shared else None,
    )


def double(inputs: Inputs) -> Inputs:
    return Inputs(*(t.double() if t is not None and t.is_floating_point() else t for t in inputs))  # type: ignore[arg-type]


def sum_and_gradients(inputs: Inputs, act: Any = functional.silu) -> list[Tensor]:
    """m, and the gradients of a weighted sum of it by the first five inputs, as far as these are there."""
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in inputs[:5]]
    e, weight, nodes, values, knot_values = leaves
    knots = None if knot_values is None else Knots(knot_values, inputs.near, inputs.knot_weight)  # type: ignore[arg-type]
    m = filtered_sum(e, weight, nodes, values, inputs.source, inputs.target, act, knots, inputs.shared)  # type: ignore[arg-type]
    grad_m = torch.randn(m.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(m.dtype)
    return [m.detach(), *torch.autograd.grad(m, [leaf for leaf in leaves if leaf is not None], grad_m)]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernels have run."""
    seen: list[str] = []
    run = edge_kernels.run

    def counted(kernel: Any, *arguments: Any) -> None:
        seen.append(kernel.__name__)
        run(kernel, *arguments)

    monkeypatch.setattr(edge_kernels, "run", counted)
    return seen


@pytest.mark.parametrize("knots", [True, False])
@pytest.mark.parametrize("shared", [0, 90])
@pytest.mark.parametrize("channels", [1, 37, 384])
def test_sum_and_gradients_are_those_of_double_precision(
    knots: bool, shared: int, channels: int, runs: list[str]
) -> None:
    inputs = random_inputs(channels=channels, knots=knots, shared=shared)
    found = sum_and_gradients(inputs)
    assert {"add_messages", "add_gradients"} == set(runs)
    runs.clear()
    expected = sum_and_gradients(double(inputs))
    assert not runs  # torch computes in float64
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - exact).abs().max() / exact.abs().max()) < 2e-6


@pytest.mark.parametrize("knots", [True, False])
@pytest.mark.parametrize("shared", [0, 90])
def test_bfloat16_is_rounded_only_where_it_is_stored(knots: bool, shared: int, runs: list[str]) -> None:
    """Nearer to the exact result than the operations of torch, which round after each step."""
    inputs = random_inputs(knots=knots, shared=shared, dtype=torch.bfloat16)
    found = sum_and_gradients(inputs)
    assert runs
    exact = sum_and_gradients(double(inputs))
    stepwise = sum_and_gradients(inputs, act=lambda x: functional.silu(x))
    for ours, theirs, right in zip(found, stepwise, exact, strict=True):
        errors = [float((t - right).norm() / right.norm()) for t in (ours, theirs)]
        assert errors[0] < 0.01
        assert errors[0] < 1.05 * errors[1]


@pytest.mark.parametrize("act", [functional.relu, functional.gelu])
def test_other_activations_are_left_to_torch(act: Any, runs: list[str]) -> None:
    inputs = random_inputs()
    for ours, exact in zip(sum_and_gradients(inputs, act), sum_and_gradients(double(inputs), act), strict=True):
        assert float((ours - exact).abs().max() / exact.abs().max()) < 2e-6
    assert not runs


def test_double_precision_and_other_devices_are_left_to_torch() -> None:
    inputs = random_inputs()
    assert edge_kernels.usable(inputs.e, None, inputs.values)
    assert not edge_kernels.usable(inputs.e, inputs.values.double())
    assert not edge_kernels.usable(inputs.e.to("meta"))


@pytest.mark.parametrize("end", ["source", "target"])
@pytest.mark.parametrize("atom", [-1, ATOMS])
def test_edges_of_atoms_that_are_not_there_are_refused(end: str, atom: int) -> None:
    inputs = random_inputs()
    getattr(inputs, end)[5] = atom
    with pytest.raises(IndexError, match=f"outside 0 to {ATOMS - 1}"):
        sum_and_gradients(inputs)


def test_no_edges() -> None:
    inputs = random_inputs(edges=0)
    assert all(not bool(tensor.any()) for tensor in sum_and_gradients(inputs))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(threads: None) -> None:
    inputs = random_inputs(channels=130, shared=40)
    arrays = _kernel_arguments(inputs)
    results = []
    for count in (1, 2, 3, 64):
        torch.set_num_threads(count)
        m = np.zeros((ATOMS, 130), np.float32)
        edge_kernels.run(edge_kernels.add_messages, 130, m, *arrays, 0, 0, len(inputs.source))
        results.append(m.tobytes())
    assert len(set(results)) == 1
    assert any(results[0])


def _kernel_arguments(inputs: Inputs) -> list[Any]:
    """All of `add_messages` but m and the ranges."""
    none = torch.empty(0, inputs.values.shape[1])
    common = inputs.e @ inputs.weight.t()
    return edge_kernels.arrays(none, common, inputs.knot_values, inputs.nodes, *edge_sums._of_edges(inputs))  # type: ignore[arg-type]


def test_a_forked_process_has_threads_of_its_own(threads: None) -> None:
    """Those of its parent are not there, and work given to them would never end."""
    torch.set_num_threads(4)
    inputs = random_inputs(channels=130)
    arrays = _kernel_arguments(inputs)

    def work() -> None:
        m = np.zeros((ATOMS, 130), np.float32)
        edge_kernels.run(edge_kernels.add_messages, 130, m, *arrays, 0, 0, len(inputs.source))

    work()
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    alive = child.is_alive()
    child.kill()
    assert not alive
    assert child.exitcode == 0


def test_positions_that_are_not_finite_give_nan_and_read_nothing_else() -> None:
    inputs = random_inputs()
    place = torch.rand(300) * 30
    place[7] = torch.nan
    near, weight = cubic_interpolation(place)
    assert not 0 <= int(near[7, 0]) < KNOTS  # what a kernel would read without a look at it
    inputs = inputs._replace(near=near, knot_weight=weight)
    m, *gradients = sum_and_gradients(inputs)
    assert bool(m[inputs.target[7]].isnan().all())
    assert int(m.isnan().any(dim=1).sum()) == 1
    assert bool(gradients[0][7].isnan().all())
    assert int(gradients[0].isnan().any(dim=1).sum()) == 1


def test_silu_from_end_to_end() -> None:
    x = torch.cat([torch.linspace(-120, 120, 24_001), torch.tensor([-1e30, -1e4, 0.0, 1e4, 1e30, torch.inf])])
    m = _through_one_edge(x, torch.empty(0, len(x)))
    expected = functional.silu(x.double())
    finite = expected.isfinite() & (expected.abs() > 1e-30)
    assert float(((m - expected) / expected)[finite].abs().max()) < 3e-7
    assert bool((m[~finite & (x < 0)].abs() < 1e-7).all())
    assert m[-1] == torch.inf


def _through_one_edge(filters: Tensor, kept: Tensor) -> Tensor:
    """m of one edge with these filters to a value of 1: their silu."""
    m, index = torch.zeros(1, len(filters)), torch.zeros(1, dtype=torch.long)
    none = torch.empty(0, len(filters))
    inputs = Inputs(none, none, torch.zeros(1, 2 * len(filters)), m + 1, None, None, None, index, index, None)
    arrays = edge_kernels.arrays(m, kept, filters[None], none, inputs.nodes, *edge_sums._of_edges(inputs))
    edge_kernels.run(edge_kernels.add_messages, len(filters), *arrays, 0, 0, 1)
    return m[0]


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).int()
    ties = (torch.arange(0, 2**16, dtype=torch.int64) << 16 | 0x8000).int()
    x = torch.cat([bits, ties]).view(torch.float32)
    x = torch.cat([x[x.abs() < 1e38], torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])])
    kept = torch.empty(1, len(x), dtype=torch.bfloat16)
    _through_one_edge(x, kept)
    torch.testing.assert_close(kept[0], x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
