"""A GPU is not waited for: not in the forward pass, the losses and their gradients, nor in the step around them."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core.datasets.atomic_data import AtomicData

import processes
from faenet_ocp.benchmark import models
from faenet_ocp.benchmark.counting import Counting
from faenet_ocp.benchmark.systems import make_batch, make_systems
from faenet_ocp.config.schema import build_config
from faenet_ocp.evaluation import validation
from faenet_ocp.frames import compute_frames, frame_sizes
from faenet_ocp.launch.cli import main
from faenet_ocp.targets import TASKS
from faenet_ocp.tasks.losses import task_loss
from faenet_ocp.tasks.tasks import make_tasks
from faenet_ocp.training import nonfinite
from faenet_ocp.training.nonfinite import FiniteSteps, Step
from faenet_ocp.training.unit import OCPTrainUnit

META = torch.device("meta")
STOCHASTIC = {"method": "stochastic", "dim": 2, "group": "SE"}
FULL = {"method": "full", "dim": 3, "group": "E"}
CANONICAL = {"method": "canonical", "dim": 3, "group": "E", "tolerance": 0.3}  # two or four frames of each system


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device without numbers has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def _step(task: str, model: str, *, frames: Mapping[str, Any] | None) -> tuple[Counting, torch.nn.Module]:
    """Forward, losses and gradients on a device that has no numbers to wait for."""
    batch = make_batch(make_systems([30, 50], remove_subsurface=True, **models.graph(task)), torch.device("cpu"))
    contender = models.shipped(task, model, small=True, frames=frames)
    raw = models._shipped(task, model, small=True)
    units = {"normalizer": {"mean": 0.0, "stdev": 1.0}, "element_references": None}
    tasks = make_tasks(build_config(raw | {"outputs": dict.fromkeys(TASKS[task], units)}), {})
    if frames is not None:
        found = compute_frames(batch.pos, batch.batch, 2, atomic_numbers=batch.atomic_numbers, **frames)
        batch.frame_rot, batch.frame_weight = found.rot, found.weight
        batch.frame_sizes = frame_sizes(found.weight, batch.natoms, batch.nedges)
    contender.module.to(META)
    for one in tasks:
        one.normalizer.to(META)
    on_device = batch.to(META)
    with Counting() as counted:
        outputs = {name: {name: value} for name, value in contender.predict(on_device).items()}
        torch.stack([task_loss(one, outputs, on_device) for one in tasks]).sum().backward()
    return counted, contender.module


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("frames", [None, STOCHASTIC, FULL, CANONICAL])
@pytest.mark.parametrize("task", ["is2re", "s2ef"])
def test_forward_losses_and_gradients_wait_for_nothing(task: str, frames: Mapping[str, Any] | None) -> None:
    counted, module = _step(task, "faenet", frames=frames)
    assert counted.waits == []
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_several_canonical_frames_need_the_sizes_that_the_loader_knows() -> None:
    """Of what the test above would ask a GPU for without them: some frames are used, not all."""
    batch = make_batch(make_systems([30, 50], remove_subsurface=True, **models.graph("is2re")), torch.device("cpu"))
    weight = compute_frames(batch.pos, batch.batch, 2, atomic_numbers=batch.atomic_numbers, **CANONICAL).weight
    views = [number for number, _, _ in frame_sizes(weight, batch.natoms, batch.nedges)]
    assert 2 < sum(views) < weight.numel()
    with pytest.raises(NotImplementedError, match="nonzero"):
        (weight.to(META) > 0).nonzero()


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("model", ["painn", "egnn", "forcenet", "gns"])
def test_nor_do_other_models_of_this_package(model: str) -> None:
    assert _step("s2ef", model, frames=None)[0].waits == []


@pytest.mark.usefixtures("no_autocast")
def test_evaluation_keeps_labels_on_the_host_and_a_batch_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of a batch are looked at when the next one has been given to the device."""
    monkeypatch.setattr(validation, "Fetched", _Made)
    contender = models.shipped("is2re", small=True)
    contender.module.to(META)
    tasks = make_tasks(build_config(models._shipped("is2re", small=True) | {"outputs": _UNITS}), {})
    for one in tasks:
        one.normalizer.to(META)
    order = []

    def batches() -> Iterator[AtomicData]:
        for number in range(3):
            order.append(f"taken {number}")
            yield make_batch(make_systems([20], remove_subsurface=False, **models.graph("is2re")), torch.device("cpu"))

    for number, (batch, predictions, _) in enumerate(validation.predict(contender.module, tasks, batches())):
        order.append(f"given {number}")
        assert {value.device.type for _, value in batch if isinstance(value, torch.Tensor)} == {"cpu"}
        assert predictions["energy"].shape == (1,)
    assert order == ["taken 0", "taken 1", "given 0", "taken 2", "given 1", "given 2"]


class _Made:
    """Stands for numbers that a device without any cannot give."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        assert {tensor.device for tensor in tensors.values()} == {META}
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def wait(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}


_UNITS = {"energy": {"normalizer": {"mean": 0.0, "stdev": 1.0}, "element_references": None}}


def test_waits_are_seen() -> None:
    x = torch.arange(4.0)
    with Counting() as counted:
        x[x > 1]
        float(x.sum())
        x.nonzero()
        torch.repeat_interleave(torch.tensor([1, 2]))
        torch.repeat_interleave(torch.tensor([1, 2]), output_size=3)
        x.to(META)
        x.to(META, non_blocking=True)
        x.index_select(0, torch.tensor([1]))
    names = [name for name, _ in counted.waits]
    assert names == ["index", "_local_scalar_dense", "nonzero", "repeat_interleave", "_to_copy"]
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty(3, device=META).sum().item()


def test_launches_and_bytes() -> None:
    x, index = torch.zeros(100, 8), torch.zeros(1000, dtype=torch.long)
    with Counting() as counted:
        x.t().view(8, 100)[:, :5]
        torch.empty(10)
        y = x.index_select(0, index)
        y + y[:1]
    assert [launch.name for launch in counted.launches] == ["index_select", "add"]
    gathered, added = counted.launches
    assert gathered.num_bytes == 2 * 1000 * 32 + 8000
    assert added.num_bytes == 2 * 1000 * 32 + 32
    assert [launch.result for launch in counted.largest(1)] == ["(1000, 8) float32"]
    assert sum(counted.bytes_by_place().values()) == gathered.num_bytes + added.num_bytes


def test_a_block_keeps_three_numbers_of_an_edge_and_channel() -> None:
    """Until its gradient is taken: the filter before and after its activation, and what it is multiplied by."""
    batch = make_batch(make_systems([30, 50], remove_subsurface=True, **models.graph("is2re")), torch.device("cpu"))
    contender = models.shipped("is2re", small=True, plain=True)
    options = contender.module.backbone.options
    shape, kept = (batch.edge_index.shape[1], options.hidden_channels), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        contender(batch)
    assert len(kept) == 3 * options.num_interactions


def test_a_step_of_training_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: what is read there is known to the host before the batch leaves it, or read on a CPU alone."""
    waits: set[str] = set()
    step = OCPTrainUnit.train_step

    def counted_step(*arguments: object) -> None:
        with Counting() as counted:
            step(*arguments)  # type: ignore[arg-type]
        waits.update(place for _, place in counted.waits)

    monkeypatch.setattr(OCPTrainUnit, "train_step", counted_step)
    optim = {"batch_size": 4, "max_steps": 3, "ema_decay": 0.9, "num_workers": 0}
    data = processes.write_data(tmp_path)
    config = processes.write_config(tmp_path / "c.yml", data, optim=optim, job={"print_every": 1000})
    assert main(["--config", str(config), "--identifier", "run"]) == 0
    on_the_host = {"training/unit.py:_counts", "training/unit.py:_share", "training/optim.py:update_parameters"}
    on_cpus_alone = {"training/nonfinite.py:take", "models/base.py:check_elements"}
    last_step = {"training/unit.py:_by_name", "training/unit.py:_report"}
    assert waits <= on_the_host | on_cpus_alone | last_step
    assert waits >= on_cpus_alone


# --- Steps that are not finite ---


@pytest.fixture
def weights() -> Iterator[torch.nn.Parameter]:
    yield torch.nn.Parameter(torch.ones(3))


def _take(steps: FiniteSteps, parameter: torch.nn.Parameter, gradient: float, number: int) -> bool:
    parameter.grad = torch.full((3,), gradient)
    return steps.take(Step(number, [], torch.zeros(1)), parameter.grad.norm())


@pytest.mark.parametrize("decides_on_device", [False, True])
def test_steps_that_are_not_finite_are_left_out(weights: torch.nn.Parameter, decides_on_device: bool) -> None:
    """The device's way can be tried on a CPU: its fused optimisers know it, too."""
    optimizer = torch.optim.AdamW([weights], lr=0.1, fused=True)
    plain = torch.nn.Parameter(torch.ones(3))
    expected = torch.optim.AdamW([plain], lr=0.1, fused=True)
    steps = FiniteSteps(optimizer, torch.device("cpu"))
    steps.decides_on_device = decides_on_device
    named = []
    for number, gradient in enumerate([1.0, torch.inf, 2.0, torch.nan, 3.0]):
        taken = _take(steps, weights, gradient, number)
        assert taken or not decides_on_device
        before = len(named)
        named += [step.number for step in steps.left_out(all_steps=number == 4)]
        if decides_on_device and number < 4:
            assert all(found <= number - nonfinite.LAG for found in named[before:])
        if gradient < torch.inf:
            plain.grad = torch.full((3,), gradient)
            expected.step()
        assert torch.equal(weights, plain)
    assert named == [1, 3]
