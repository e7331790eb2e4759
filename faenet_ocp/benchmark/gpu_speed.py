"""How fast networks are on a device: samples per second, memory, launches, and shares of what the device reaches.

Part of `gpu`; needs torch, torch_geometric and numpy alone.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from faenet_ocp.benchmark.counting import Counting, generated_launches
from faenet_ocp.benchmark.gpu_batch import MadeBatch, loss_of, made_batch, make_faenet, make_published, make_schnet
from faenet_ocp.benchmark.measure import measure

Result = dict[str, Any]
MATMUL = {"fp32": "highest", "tf32": "high", "bf16": "high"}
"""torch's precision of products of float32 matrices; bf16 is autocast."""


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        device: cuda or cpu.
        systems: of a batch.
        largest: atoms of a system.
        rounds: how often each row is timed.
        small: networks with few channels, and little of everything.
    """

    device: torch.device
    systems: int = 64
    largest: int = 225
    rounds: int = 20
    small: bool = False


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Inside: fp32, tf32 or bf16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(MATMUL[name])
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def training_step(network: nn.Module, batch: MadeBatch, name: str) -> Callable[[], None]:
    """Forward, loss, backward and AdamW, on weights that hardly change."""
    device = batch.pos.device
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-9, weight_decay=0, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision(name, device):
            loss = loss_of(network, batch)
        loss.backward()
        optimizer.step()

    return step


def inference(network: nn.Module, batch: MadeBatch, name: str) -> Callable[[], Any]:
    """A forward pass without gradients."""

    def step() -> Any:
        with torch.no_grad(), precision(name, batch.pos.device):
            return network(batch)

    return step


def speed(settings: Settings, limits: dict[str, float]) -> Iterator[list[Result]]:
    """Samples per second of FAENet, as it is and compiled, of the published package where it is installed, and of
    SchNet, whose row is the first of each mode; the rows of a mode together."""
    batch = made_batch(settings.systems, largest=settings.largest).on(settings.device)
    networks: dict[str, nn.Module] = {
        "SchNet": make_schnet(small=settings.small),
        "FAENet": make_faenet(small=settings.small),
    }
    try:
        networks["published faenet 0.1.3"] = make_published(batch, small=settings.small)
    except ImportError as error:
        yield [{"mode": "both", "model": "published faenet", "precision": "", "unavailable": str(error)}]
    for mode, make in MODES.items():
        rows: list[Result] = []
        functions: list[Callable[[], Any]] = []
        shown: list[Result] = []
        for model, network in networks.items():
            network.to(settings.device).train(mode != "inference")
            for name in MATMUL:
                row = {"mode": mode, "model": model, "precision": name}
                try:
                    shown.append({**row, **_work(network, batch, make, name)})
                except RuntimeError as error:  # out of memory
                    rows.append({**row, "unavailable": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
                    continue
                functions.append(make(network, batch, name))
        torch.compiler.reset()
        for name, shapes in (("fp32", "dynamic"), ("fp32", "static"), ("bf16", "dynamic")):
            row = {"mode": mode, "model": f"FAENet, torch.compile, {shapes} shapes", "precision": name}
            try:
                compiled = _compiled(networks["FAENet"], dynamic=shapes == "dynamic", small=settings.small)
                step = make(compiled, batch, name)
                first = _first_call(step)
            except Exception as error:  # no compiler, or one that fails: the row says so
                rows.append({**row, "unavailable": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
                continue
            functions.append(step)
            shown.append({**row, **first})
        for described, times in zip(shown, measure(functions, settings.device, settings.rounds), strict=True):
            rows.append({**described, **times, **_rates(described, median(times["seconds"]), settings, limits)})
        yield rows


MODES = {"inference": inference, "training step": training_step}


def _rates(row: Result, seconds: float, settings: Settings, limits: dict[str, float]) -> Result:
    """Samples per second, and shares of what the device reaches."""
    rates = {"samples_per_s": settings.systems / seconds}
    if "flops" in row:
        rates["share_of_arithmetic"] = row["flops"] / limits[f"{row['precision']}_flops"] / seconds
        rates["share_of_memory"] = row["bytes"] / limits["bytes_per_s"] / seconds
    return rates


def _compiled(network: nn.Module, *, dynamic: bool, small: bool) -> Any:
    """The network, compiled when it is first called; `small`: traced, but nothing is generated."""
    return torch.compile(network, dynamic=dynamic, fullgraph=True, backend="eager" if small else "inductor")


def _first_call(step: Callable[[], Any]) -> Result:
    """How long the first call takes, in which it is compiled, and the launches of what was: of the network alone."""
    from torch._inductor.graph import GraphLowering

    sources: set[str] = set()
    start = time.perf_counter()
    fresh = patch.object(torch.compiler.config, "force_disable_caches", True)  # nothing of an earlier run
    with fresh, patch.object(GraphLowering, "save_output_code", sources.add), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*force disabled", category=UserWarning)  # as is meant
        step()
    seconds = time.perf_counter() - start
    return {"first_call_seconds": seconds, "launches": sum(map(generated_launches, sources)) or None}


def _work(network: nn.Module, batch: MadeBatch, make: Callable[..., Callable[[], Any]], name: str) -> dict[str, int]:
    """Multiplications and additions in products of matrices, bytes read and written, and launches of one step."""
    step = make(network, batch, name)
    with FlopCounterMode(display=False) as flops:
        step()
    with Counting() as counted:
        step()
    moved = sum(launch.num_bytes for launch in counted.launches)
    return {"flops": flops.get_total_flops(), "bytes": moved, "launches": counted.num_launches}


def limits(settings: Settings) -> dict[str, float]:
    """What the device reaches: operations a second in a large product of matrices, bytes a second in a large copy."""
    side, numbers = (256, 2**20) if settings.small else (8192, 2**28)
    a, source = torch.randn(side, side, device=settings.device), torch.zeros(numbers, device=settings.device)
    target, found = torch.empty_like(source), {}
    for name in MATMUL:
        factor = a.bfloat16() if name == "bf16" else a

        def product(name: str = name, factor: Tensor = factor) -> None:
            with precision(name, settings.device):
                factor @ factor

        (times,) = measure([product], settings.device, 5)
        found[f"{name}_flops"] = 2 * side**3 / median(times["seconds"])
    (times,) = measure([lambda: target.copy_(source)], settings.device, 5)
    return found | {"bytes_per_s": 8 * numbers / median(times["seconds"])}
