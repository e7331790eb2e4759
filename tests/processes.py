"""Small runs in processes of their own, on data whose systems have different numbers of atoms."""

import contextlib
import json
import logging
import multiprocessing
import multiprocessing.context
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from fairchem.core.common import distutils

import small_data
from faenet_ocp.launch import cli, local_ranks
from faenet_ocp.launch.cli import main

ROOT = Path(__file__).resolve().parents[1]
MAIN = [sys.executable, str(ROOT / "main.py")]
MODEL = {
    "name": "faenet",
    "hidden_channels": 32,
    "num_filters": 16,
    "num_interactions": 2,
    "num_gaussians": 8,
    "tag_hidden_channels": 4,
    "pg_hidden_channels": 4,
    "cutoff": 4.0,
    "max_neighbors": 12,
}


def write_data(root: Path, *, num_train: int = 12, num_val: int = 5) -> Path:
    """`root/{train,val}.lmdb`: energies and forces of slabs of 1 to 4 layers, 5 to 18 atoms."""
    for number, (split, count) in enumerate((("train", num_train), ("val", num_val))):
        values = [
            small_data.dump_record(
                small_data.make_fields(i, task="s2ef", edges=False, seed=number, layers=1 + i % 4), layout="pyg2"
            )
            for i in range(count)
        ]
        small_data.write_lmdb(root / f"{split}.lmdb", values)
    return root


def write_config(path: Path, root: Path, *, task: str = "s2ef", **sections: dict[str, Any]) -> Path:
    """A configuration for the data of `write_data`; keyword arguments are merged into its sections."""
    config: dict[str, Any] = {
        "trainer": "faenet",
        "task": task,
        "dataset": {
            "name": "small",
            "root": str(root),
            "train": {"src": "train.lmdb"},
            "val": {"v": {"src": "val.lmdb"}},
        },
        "model": dict(MODEL),
        "frames": {"dim": 3, "group": "E", "method": "stochastic"},
        "outputs": {"energy": {"normalizer": "fit", "element_references": "fit"}},
        "evaluation_metrics": {"primary_metric": {"split": "v", "metric": "energy_mae"}},
        "optim": {"lr_initial": 0.002, "batch_size": 6, "max_epochs": 2, "warmup_steps": 2, "num_workers": 0},
        "logger": {"name": "none"},
        "job": {"cpu": True, "print_every": 1, "run_dir": str(path.parent)},
    }
    for name, section in sections.items():
        config[name] = config[name] | section if name in config and isinstance(section, dict) else section
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def start(arguments: Sequence[str], *, program: Sequence[str] = MAIN, **options: Any) -> subprocess.Popen:
    """A process of the command line; output and errors together in its stdout."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **options
    )


def run(arguments: Sequence[str], *, status: int = 0, timeout: float = 300, **options: Any) -> str:
    """Runs to the end and returns the output; the exit status must be the given one."""
    process = start(arguments, **options)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == status, f"status {process.returncode}, wanted {status}:\n{output[-4000:]}"
    return output


def run_script(name: str, *arguments: object) -> None:
    """A script of the project in this process: the seconds of imports are over. It may end by status 0."""
    with mock.patch.object(sys, "argv", [name, *map(str, arguments)]):
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{name}: status {end.code}"


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl without what depends on the clock."""
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    timed = ("train/samples_per_s", "train/data_wait_share")
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]


def on_ranks(world_size: int, function: Callable[[int], Any], folder: Path) -> list[Any]:
    """Calls `function(rank)` in forked processes that share a gloo group; what each returned."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def work(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world_size)
        queue.put((rank, function(rank)))
        dist.barrier()

    processes = [context.Process(target=work, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return [results[rank] for rank in range(world_size)]


def forked(
    arguments: Sequence[str], log: Path, *, prepare: Callable[[], None] | None = None, ranks: int = 1
) -> list[multiprocessing.context.ForkProcess]:
    """The command line in forked processes, one for each rank: real processes without seconds of imports.

    Args:
        arguments: of `cli.main`.
        log: file for stdout and stderr.
        prepare: called in each process first, e.g. to arrange its end.
        ranks: processes; they meet as torch elastic would have them meet.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(ranks):
        process = context.Process(target=_forked, args=(list(arguments), log, prepare, rank, ranks, port))
        process.start()
        started.append(process)
    return started


def _forked(
    arguments: list[str], log: Path, prepare: Callable[[], None] | None, rank: int, ranks: int, port: int
) -> None:
    os.setpgid(0, 0)
    stream = log.open("a", buffering=1)
    sys.stdout = sys.stderr = stream
    os.dup2(stream.fileno(), 2)
    logging.getLogger().handlers.clear()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    torch.set_num_threads(1)
    status: Any = 1
    try:
        if ranks > 1:
            from fairchem.core.launchers.slurm_launch import runner_wrapper

            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            arguments = [*arguments, "--num-gpus", str(ranks)]
            local_ranks._launch_ranks = runner_wrapper
            sleep_as_long_as_fairchem()
            if rank > 0:  # the folder belongs to the command, which here is the first rank
                cli._owned = lambda folder: contextlib.nullcontext()  # type: ignore[assignment]
        if prepare is not None:
            prepare()
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc(file=stream)
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()
        stream.flush()
        os._exit(status)


def elastic() -> None:
    """Has torch elastic fork its ranks: the real launcher without seconds of imports in each rank; for `prepare`."""
    from torch.distributed.launcher import api

    sleep_as_long_as_fairchem()
    api.LaunchConfig = partial(api.LaunchConfig, start_method="fork")  # type: ignore[misc, assignment]


def sleep_as_long_as_fairchem() -> None:
    """Undoes what `conftest` does for runs of one rank."""
    distutils.time = time


def main_on_ranks(arguments: Sequence[str], log: Path, *, ranks: int = 2, status: int = 0) -> str:
    """The command line with `--num-gpus`, through torch elastic; what it wrote, once it has ended with the status."""
    found = finish(forked([*arguments, "--num-gpus", str(ranks)], log, prepare=elastic))
    assert found == [status], (found, log.read_text()[-4000:])
    return log.read_text()


def finish(processes: Sequence[multiprocessing.context.ForkProcess], *, timeout: float = 240) -> list[int | None]:
    """Exit codes (negative: a signal) once all have ended; whoever has not in time is killed, code None.

    To `join` them would take until their loader workers have noticed as well, five seconds later.
    """
    deadline = time.monotonic() + timeout
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
    return codes


def ranks_of(launcher: int) -> list[int]:
    """The spawned ranks of a launcher: those of its children that are no resource tracker."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return sorted(int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes())


def wait_for(condition: Callable[[], Any], *, timeout: float = 240) -> Any:
    """Polls until the condition holds."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def differences(one: Any, two: Any, place: str = "") -> list[str]:
    """Where two states (nested containers with tensors) are not bit for bit the same."""
    if isinstance(one, torch.Tensor):
        same = isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
        return [] if same else [place]
    if isinstance(one, dict) and isinstance(two, dict):
        return [
            found
            for key in one.keys() | two.keys()
            for found in differences(one.get(key), two.get(key), f"{place}/{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        return [f for i, (a, b) in enumerate(zip(one, two, strict=True)) for f in differences(a, b, f"{place}/{i}")]
    return [] if one == two else [place]
