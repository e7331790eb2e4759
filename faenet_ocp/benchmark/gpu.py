"""What a machine with a GPU has to tell of this package, in one command of a few minutes.

    python -m faenet_ocp.benchmark gpu --output gpu.json
    python -m faenet_ocp.benchmark gpu --device cpu --quick --output quick.json     # small: a check that it runs

Its first part, the network, needs torch, torch_geometric and numpy; its second (`gpu_trainer`) all that the package
needs. What cannot be had here is in the tables with its reason. Writes OUTPUT and, beside it, tables (.md).
"""

import argparse
import dataclasses
import datetime
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from faenet_ocp.benchmark.counting import Counting, generated_launches
from faenet_ocp.benchmark.gpu_batch import (
    MadeBatch,
    Network,
    loss_of,
    made_batch,
    make_faenet,
    make_published,
    make_schnet,
)
from faenet_ocp.benchmark.measure import measure

Result = dict[str, Any]
_EXACT = torch.float64
_MATMUL = {"fp32": "highest", "tf32": "high", "bf16": "high"}
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
    torch.set_float32_matmul_precision(_MATMUL[name])
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- Equal numbers ---


def equality(settings: Settings) -> list[Result]:
    """Outputs and gradients on the device and on the CPU, each against float64 on the CPU.

    `outputs` and `gradients` are the largest differences as shares of the largest number of each tensor; the gradient
    is that of a parameter.
    """
    batch = made_batch(min(settings.systems, 8), largest=settings.largest)
    network = make_faenet(small=settings.small)
    exact = _outputs_and_gradients(network.double(), batch.in_precision(_EXACT))
    network.float()
    rows = []
    for device in dict.fromkeys((torch.device("cpu"), settings.device)):
        network.to(device)
        for name in ("fp32", "bf16") if device.type == "cpu" else _MATMUL:
            with precision(name, device):
                found = _outputs_and_gradients(network, batch.on(device))
            errors = {kind: _error(found[kind], exact[kind]) for kind in exact}
            rows.append({"device": device.type, "precision": name, **errors})
    return rows


def _outputs_and_gradients(network: Network, batch: MadeBatch) -> dict[str, list[Tensor]]:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    outputs = network(batch)
    gradients = torch.autograd.grad(loss_of(network, batch), parameters)
    found = {"outputs": outputs, "gradients": gradients}
    return {kind: [tensor.detach().to("cpu", _EXACT) for tensor in tensors] for kind, tensors in found.items()}


def _error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest difference of all tensors, as a share of the largest number among those of its kind."""
    scale = max(float(tensor.abs().max()) for tensor in exact)
    return max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)) / scale


# --- Waits and launches ---


def waits(settings: Settings) -> Result:
    """How often a training step waits for the device, and where; what it launches, and the bytes that these move."""
    batch = made_batch(2, largest=min(settings.largest, 60)).on(settings.device)
    step = training_step(make_faenet(small=settings.small).to(settings.device), batch, "fp32")
    step()
    with Counting() as counted:
        step()
    found = [f"{name} in {place}" for name, place in counted.waits]
    if settings.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = [f"{one.filename}:{one.lineno}" for one in caught if "synchronizing" in str(one.message)]
    return {"waits": found, "launches": counted.num_launches, "bytes_by_place": counted.bytes_by_place()}


# --- Speed ---


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


def speed(settings: Settings, limits: dict[str, float]) -> list[Result]:
    """Samples per second of FAENet, as it is and compiled, of the published package where it is installed, and of
    SchNet, whose row is the first of each mode."""
    batch = made_batch(settings.systems, largest=settings.largest).on(settings.device)
    networks: dict[str, nn.Module] = {
        "SchNet": make_schnet(small=settings.small),
        "FAENet": make_faenet(small=settings.small),
    }
    rows: list[Result] = []
    try:
        networks["published faenet 0.1.3"] = make_published(small=settings.small)
    except ImportError as error:
        rows.append({"mode": "both", "model": "published faenet", "precision": "", "unavailable": str(error)})
    for mode, make in (("inference", inference), ("training step", training_step)):
        functions: list[Callable[[], Any]] = []
        shown: list[Result] = []
        for model, network in networks.items():
            network.to(settings.device).train(mode != "inference")
            work = _work(network, batch, make)
            for name in _MATMUL:
                functions.append(make(network, batch, name))
                shown.append({"mode": mode, "model": model, "precision": name, **work})
        torch.compiler.reset()
        for name, shapes in (("fp32", "dynamic"), ("fp32", "static"), ("bf16", "dynamic")):
            row: Result = {"mode": mode, "model": f"FAENet, torch.compile, {shapes} shapes", "precision": name}
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
    return rows


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
    with patch.object(GraphLowering, "save_output_code", sources.add):
        step()
    seconds = time.perf_counter() - start
    return {"first_call_seconds": seconds, "launches": sum(map(generated_launches, sources)) or None}


def _work(network: nn.Module, batch: MadeBatch, make: Callable[..., Callable[[], Any]]) -> dict[str, int]:
    """Multiplications and additions in products of matrices, bytes read and written, and launches of one step."""
    step = make(network, batch, "fp32")
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
    for name in _MATMUL:

        def product(name: str = name) -> None:
            with precision(name, settings.device):
                a @ a

        (times,) = measure([product], settings.device, 5)
        found[f"{name}_flops"] = 2 * side**3 / median(times["seconds"])
    (times,) = measure([lambda: target.copy_(source)], settings.device, 5)
    return found | {"bytes_per_s": 8 * numbers / median(times["seconds"])}


# --- Ranks ---


def ranks(settings: Settings) -> list[Result]:
    """Gradients of DDP on two ranks through gloo (one device), on one through nccl, against those of one process."""
    rows = []
    for backend, world in (("gloo", 2), ("nccl", 1)):
        if backend == "nccl" and settings.device.type != "cuda":
            rows.append({"backend": backend, "ranks": world, "unavailable": "no CUDA"})
            continue
        context = torch.multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        arguments = (world, backend, str(settings.device), settings.small, _free_port(), queue)
        torch.multiprocessing.start_processes(_rank, arguments, nprocs=world, start_method="spawn")
        rows.append({"backend": backend, "ranks": world, "gradients": queue.get()})
    return rows


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _rank(rank: int, world: int, backend: str, device_name: str, small: bool, port: int, queue: Any) -> None:
    device = torch.device(device_name)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group(backend, rank=rank, world_size=world)
    whole = made_batch(4, largest=40).on(device)
    network = make_faenet(small=small).to(device)
    ddp = nn.parallel.DistributedDataParallel(network)
    share = 4 // world
    loss_of(ddp, whole.part(rank * share, (rank + 1) * share)).backward()
    together = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad()
    loss_of(network, whole).backward()
    alone = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    if rank == 0:
        queue.put(_error([one.cpu() for one in together], [one.cpu() for one in alone]))
    dist.destroy_process_group()


# --- The command ---


def run(settings: Settings, *, save: Callable[[Result], None], trainer: bool = True) -> Result:
    """Everything; the result is what `markdown` shows and JSON keeps.

    Args:
        settings: what to run.
        save: called with the result before the trainer and after it.
        trainer: whether to run it.
    """
    reached = limits(settings)
    result: Result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(settings.device) if settings.device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "settings": {**dataclasses.asdict(settings), "device": str(settings.device)},
        "limits": reached,
        "equality": equality(settings),
        "waits": waits(settings),
        "speed": speed(settings, reached),
        "ranks": ranks(settings),
    }
    save(result)
    if trainer:
        try:
            from faenet_ocp.benchmark.gpu_trainer import train_on

            result["trainer"] = train_on(settings.device, small=settings.small)
        except ImportError as error:
            result["trainer"] = {"unavailable": str(error)}
        save(result)
    return result


def markdown(result: Result) -> str:
    """The result as tables."""
    lines = [f"{result['device']}, torch {result['torch']}, {result['date'][:10]}", ""]
    heads = ("mode", "model", "precision", "samples/s", "peak MB", "of arithmetic", "of memory", "launches")
    lines += [_line((*heads, "first call, s")), _line(["---"] * 3 + ["---:"] * 6)]
    for row in result["speed"]:
        start = [row["mode"], row["model"], row["precision"]]
        if "unavailable" in row:
            lines.append(_line([*start, row["unavailable"], "", "", "", "", ""]))
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        shares = [f"{row[key]:.0%}" if key in row else "" for key in ("share_of_arithmetic", "share_of_memory")]
        first = f"{row['first_call_seconds']:.0f}" if "first_call_seconds" in row else ""
        launches = str(row["launches"] or "")
        lines.append(_line([*start, f"{row['samples_per_s']:.0f}", peak, *shares, launches, first]))
    for name in ("equality", "waits", "ranks", "limits", "trainer"):
        if name in result:
            lines += ["", f"{name}: `{json.dumps(result[name])}`"]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes the files and prints the tables.

    Raises:
        ValueError, OSError: no such device, or a file that cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m faenet_ocp.benchmark gpu", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="JSON to write; tables (.md) go beside it")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--systems", type=int, default=64, help="of a batch (default 64)")
    add("--rounds", type=int, default=20, help="how often each row is timed (default 20)")
    add("--quick", action="store_true", help="small networks and batches, one round")
    add("--network-only", action="store_true", help="without the trainer, for which fairchem-core is needed")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; --device cpu --quick tries the command")
    settings = Settings(torch.device(args.device), args.systems, rounds=args.rounds)
    if args.quick:
        settings = dataclasses.replace(settings, systems=4, largest=40, rounds=1, small=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)

    def save(result: Result) -> None:
        args.output.write_text(json.dumps(result, indent=1))
        args.output.with_suffix(".md").write_text(markdown(result))

    sys.stdout.write(markdown(run(settings, save=save, trainer=not args.network_only)))
