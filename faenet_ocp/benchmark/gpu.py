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
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from faenet_ocp.benchmark.counting import Counting
from faenet_ocp.benchmark.gpu_batch import MadeBatch, Network, loss_of, made_batch, make_faenet
from faenet_ocp.benchmark.gpu_speed import MATMUL, MODES, Result, Settings, limits, precision, speed, training_step

_EXACT = torch.float64


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
        for name in ("fp32", "bf16") if device.type == "cpu" else MATMUL:
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
        save: called with the result so far after each part, the longest (compiling) last: time may run out.
        trainer: whether to run it.
    """
    result: Result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(settings.device) if settings.device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "settings": {**dataclasses.asdict(settings), "device": str(settings.device)},
    }
    parts: dict[str, Callable[[Settings], Any]] = {"limits": limits, "equality": equality, "waits": waits}
    parts |= {"ranks": ranks} | ({"trainer": _trainer} if trainer else {})
    with tqdm(total=len(parts) + len(MODES), desc="benchmark", unit="part", disable=None) as bar:
        for name, part in parts.items():
            try:
                result[name] = part(settings)
            except Exception as error:  # the others are worth having all the same
                if name == "limits":
                    raise
                result[name] = {"unavailable": f"{type(error).__name__}: {error}"}
            save(result)
            bar.update()
        result["speed"] = []
        for rows in speed(settings, result["limits"]):
            result["speed"] += rows
            save(result)
            bar.update()
    return result


def _trainer(settings: Settings) -> Result:
    try:
        from faenet_ocp.benchmark.gpu_trainer import train_on
    except ImportError as error:
        return {"unavailable": str(error)}
    return train_on(settings.device, small=settings.small)


def markdown(result: Result) -> str:
    """The result as tables."""
    lines = [f"{result['device']}, torch {result['torch']}, {result['date'][:10]}", ""]
    heads = ("mode", "model", "precision", "samples/s", "peak MB", "of arithmetic", "of memory", "launches")
    lines += [_line((*heads, "first call, s")), _line(["---"] * 3 + ["---:"] * 6)]
    for row in result.get("speed", []):
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
