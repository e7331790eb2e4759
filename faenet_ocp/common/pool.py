"""A function over many tasks in several processes, results in order."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

_AHEAD = 2


def ordered_map(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], num_workers: int) -> Iterator[Any]:
    """Yield ``function(*task)`` for each task, computed in `num_workers` processes (1: in this one).

    Raises:
        RuntimeError: a process died.
        Exception: what the function raised, at its place among the results.
    """
    if num_workers == 1:
        for task in tasks:
            yield function(*task)
        return
    # Spawned, not forked: a process then holds one end of its own pipe only, so it notices when this one is killed.
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    try:
        for _ in range(min(num_workers, len(tasks))):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_work, args=(theirs, function), daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        ahead = _AHEAD * len(pipes)
        for number, task in enumerate(tasks[:ahead]):
            pipes[number % len(pipes)].send(task)
        for number in range(len(tasks)):
            pipe = pipes[number % len(pipes)]
            try:
                failed, result = pipe.recv()
            except EOFError:
                process = processes[number % len(pipes)]
                process.join()
                reason = f"a process ended with exit code {process.exitcode}; -9 often means out of memory"
                raise RuntimeError(reason) from None
            if failed:
                raise result
            if number + ahead < len(tasks):
                pipe.send(tasks[number + ahead])
            yield result
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _work(pipe: Connection, function: Callable[..., Any]) -> None:
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError, KeyboardInterrupt):  # the parent was killed, or the user interrupted all
        while True:
            task = pipe.recv()
            try:
                answer = (False, function(*task))
            except Exception as error:
                answer = (True, error)
            pipe.send(answer)
