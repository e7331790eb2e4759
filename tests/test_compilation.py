"""torch.compile: equal numbers, few compilations, a fall-back, and training that goes the same way."""

import copy
import logging

import pytest
import torch

from faenet_ocp import compilation
from faenet_ocp.compilation import compile_model
from network_inputs import build, make_inputs, predict, slabs

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own tracing
SYSTEMS = slabs(6)


class Counter:
    """A backend that compiles nothing and counts how often it is asked."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return graph.forward


@pytest.fixture(params=["cpu", "other"])
def device_kind(request, monkeypatch):
    """On other devices than a CPU the sum over edges is compiled too, which works here as well, only slowly."""
    if request.param == "other":
        monkeypatch.setattr(compilation, "EdgeFilter", ())
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batches():
    """Of changing numbers of systems, atoms and edges."""
    return [make_inputs(SYSTEMS[:count]) for count in (2, 3, 5, 4, 6)]


def train(parts, steps=3):
    losses = []
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=1e-3)
    for step in range(steps):
        energy, forces = predict(parts, batches()[step % 5])
        loss = energy.square().mean() + forces.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_numbers_of_compilations_do_not_grow_with_shapes(device_kind):
    parts, counter = [part.eval() for part in build(num_interactions=3)], Counter()
    assert compile_model(parts[0], backend=counter) == 3

    with torch.no_grad():
        for inputs in batches():
            predict(parts, inputs)
    inference = counter.count
    pieces = {"cpu": 3, "other": 1}[device_kind]  # before, in and after the sum over edges
    assert 1 <= inference <= pieces  # the same for all three blocks
    train(parts, steps=5)
    assert inference < counter.count <= 2 * pieces


def test_outputs_and_training_are_those_of_eager_execution(device_kind, caplog):
    eager, compiled = build(), build()
    compile_model(compiled[0], backend="aot_eager")

    for inputs in batches():
        for got, expected in zip(predict(compiled, inputs), predict(eager, inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert train(compiled) == pytest.approx(train(eager), rel=1e-4)
    assert "compile: failed" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True])
def test_with_inductor(amp, device_kind, caplog):
    eager, compiled = build(), build()
    compile_model(compiled[0])

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        for inputs in batches():
            for got, expected in zip(predict(compiled, inputs), predict(eager, inputs), strict=True):
                tolerance = 0.03 * expected.abs().max().item() if amp else 1e-5
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=tolerance)
        assert train(compiled) == pytest.approx(train(eager), rel=0.2 if amp else 1e-4)
    assert "compile: failed" not in caplog.text


def test_a_failing_compiler_is_a_warning_only(caplog):
    def broken(graph, example_inputs):
        raise RuntimeError("no compiler here")

    parts, inputs = build(), make_inputs(SYSTEMS[:2])
    expected = predict(parts, inputs)
    compile_model(parts[0], backend=broken)
    with caplog.at_level(logging.WARNING):
        got = predict(parts, inputs)

    assert "compile: failed" in caplog.text
    assert torch.equal(got[0], expected[0])
    assert torch.equal(predict(parts, inputs)[0], expected[0])


def test_names_stay_and_copies_are_independent():
    parts, inputs = build(), make_inputs(SYSTEMS[:2])
    names = list(parts[0].state_dict())
    compile_model(parts[0], backend="aot_eager")
    predict(parts, inputs)
    other = copy.deepcopy(parts[0])

    assert list(parts[0].state_dict()) == names
    with torch.no_grad():
        for parameter in parts[0].parameters():
            parameter.zero_()
    assert predict((other, *parts[1:]), inputs)[1].std() > 0


def test_a_model_without_blocks_is_said_to_have_none(caplog):
    assert compile_model(torch.nn.Linear(2, 2)) == 0
    assert "no FAENet block" in caplog.text
