"""A function over many tasks in several processes, results in order."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

_AHEAD = 2


def ordered_map(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], num_workers: int) -> Iterator[Any]:
    """Yields ``function(*task)`` for each task, computed in `num_workers` processes (1, or one task: in this one).

    A process has one torch thread. Two tasks for each are under way or done before the first result is taken, no more.
    The processes end with the loop over the results, and with this process, however that ends.

    Raises:
        RuntimeError: a process died.
        Exception: what the function raised, at its place among the results.
    """
    if min(num_workers, len(tasks)) <= 1:  # starting a process takes seconds
        for task in tasks:
            yield function(*task)
        return
    context = _context(function)
    workers = []
    idle: SimpleQueue[Any] = SimpleQueue()

    def ask(task: tuple[Any, ...]) -> Any:
        process, pipe = idle.get()
        try:
            pipe.send(task)
            failed, result = pipe.recv()
        except (EOFError, ConnectionError):
            process.join()
            reason = f"a process ended with exit code {process.exitcode}; -9 often means out of memory"
            raise RuntimeError(reason) from None
        finally:
            idle.put((process, pipe))
        if failed:
            raise result
        return result

    threads = ThreadPoolExecutor(num_workers)
    try:
        for _ in range(min(num_workers, len(tasks))):
            ours, theirs = context.Pipe()
            workers.append(context.Process(target=_work, args=(theirs, function), daemon=True))
            with _without_interrupts():
                workers[-1].start()
            theirs.close()
            idle.put((workers[-1], ours))
        answers: deque[Future[Any]] = deque()
        for task in tasks:
            answers.append(threads.submit(ask, task))
            if len(answers) == _AHEAD * num_workers:
                yield answers.popleft().result()
        while answers:
            yield answers.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in workers:
            process.terminate()
            process.join()


def _context(function: Callable[..., Any]) -> ForkServerContext | SpawnContext:
    """How processes start: not forked from this one, but each holding one end of its own pipe only.

    So each side notices when the other is gone. On Linux they are forked from a process that has done nothing but the
    imports, which take seconds, once for all of them.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    while isinstance(function, partial):
        function = function.func
    context.set_forkserver_preload([name for name in (__name__, function.__module__) if name != "__main__"])
    return context


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """What is started here does not see Ctrl-C, which reaches all: the parent ends it, without a traceback."""
    resource_tracker.ensure_running()  # starting that would let the signal in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, function: Callable[..., Any]) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):  # the parent was killed
        while True:
            task = pipe.recv()
            try:
                answer = (False, function(*task))
            except Exception as error:
                answer = (True, error)
            pipe.send(answer)


def _end_with_parent() -> None:
    """Ends this process with its parent, also in the middle of a task."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
