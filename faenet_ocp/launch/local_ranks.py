"""Ranks on this machine: starting them, stopping them by signals, and saying why they failed.

One rank runs in this process, more as children of it under torch elastic. SIGINT and SIGTERM ask for a checkpoint and
an orderly end; the same signal again ends the run at once:

| who | SIGINT (Ctrl-C) | SIGTERM | SIGUSR1 |
| --- | --- | --- | --- |
| the only rank | stop | stop | - |
| this process, with several ranks | passed on as SIGUSR1 | passed on as SIGUSR1 | - |
| each of several ranks | stop if the parent is gone, else nothing | stop | stop |

Ctrl-C in a terminal and tools like `timeout` signal all processes of a group, so that ranks would see the signal and
its passed-on form: two different signals, and only a repeated one means haste.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from faenet_ocp.common.log_setup import set_up_logging

if TYPE_CHECKING:
    from omegaconf import DictConfig

_STOP = (signal.SIGINT, signal.SIGTERM)
_PASSED_ON = signal.SIGUSR1
LOCK = ".rank0.lock"
"""In a run's folder: held by its first rank, which may live longer than the command that started it."""
WRONG_INPUT = 2
"""Exit status after a ValueError: configuration or data are at fault."""


class RunError(RuntimeError):
    """A run that began and failed; the message says why and the log has the details."""


def fairchem_config(job_and_runner: dict[str, Any]) -> "DictConfig":
    """fairchem's own configuration of a run, saved in the run's folder as fairchem does."""
    from fairchem.core._cli import get_canonical_config
    from fairchem.core.launchers.api import JobConfig
    from omegaconf import OmegaConf

    config = get_canonical_config(OmegaConf.merge({"job": OmegaConf.structured(JobConfig)}, job_and_runner))
    os.makedirs(config.job.metadata.log_dir, exist_ok=True)
    OmegaConf.save(config, config.job.metadata.config_path)
    return config


def launch(config: "DictConfig") -> None:
    """Runs fairchem's job: in this process for one rank, through torch elastic for more.

    Raises:
        ValueError, OSError, ...: whatever the only rank raised.
        ValueError: of several ranks, the first to fail had a ValueError.
        RunError: the first of several ranks to fail had another error, or died.
        SystemExit: stopped by a signal, status 128 + its number.
    """
    from fairchem.core.common import distutils
    from fairchem.core.launchers.slurm_launch import local_launch

    if config.job.scheduler.ranks_per_node > 1:
        _launch_ranks(config)
        return
    with _handlers({}):
        try:
            local_launch(config, config.job.metadata.log_dir)
        except BaseException:  # fairchem leaves the process group behind then
            distutils.cleanup()
            raise


def _launch_ranks(config: "DictConfig") -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.utils.distributed import get_free_port
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.job.scheduler.ranks_per_node,
        run_id=config.job.run_name,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{get_free_port()}",
        max_restarts=0,
        signals_to_handle="SIGHUP,SIGQUIT",  # elastic would kill the ranks after 30 s: too few for a step and a save
    )
    # Each rank has logged its own error, and what elastic adds is no help.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    received: list[int] = []

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        for rank in multiprocessing.active_children():
            if rank.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, _PASSED_ON)

    failure: Exception | None = None
    with _handlers(dict.fromkeys(_STOP, pass_on)):
        try:
            elastic_launch(settings, _run_rank)(config)
        except ChildFailedError as error:
            failure = _explain(error)
    if received:
        raise SystemExit(128 + received[0])
    if failure is not None:
        raise failure


def _run_rank(config: "DictConfig") -> None:
    """What a new process does as one of several ranks: it logs as a single one would, and the first speaks for all."""
    set_up_logging(force=True, level=logging.INFO if os.environ["RANK"] == "0" else logging.WARNING)
    from fairchem.core.launchers.slurm_launch import runner_wrapper

    runner_wrapper(config)


def _explain(error: Any) -> Exception:
    """The first failure of a rank as an error of this process."""
    rank, failure = error.get_first_failure()
    if failure.exitcode > 128:
        raise SystemExit(failure.exitcode)  # the rank itself was asked to stop
    if failure.exitcode < 0:
        return RunError(f"rank {rank} (process {failure.pid}) was killed by {signal.Signals(-failure.exitcode).name}")
    reason = failure.message
    message = f"rank {rank}: {reason.get('message', reason) if isinstance(reason, dict) else reason}"
    return ValueError(message) if failure.exitcode == WRONG_INPUT else RunError(message)


@contextlib.contextmanager
def rank_errors() -> Iterator[None]:
    """Around the work of a rank: under torch elastic, notes the error for `launch`, logs it, and ends the process."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        yield
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        yield
    except Exception as error:
        get_error_handler().record_exception(error)
        if isinstance(error, ValueError):
            raise SystemExit(WRONG_INPUT) from error
        logging.exception("rank %s failed", os.environ.get("RANK"))
        raise SystemExit(1) from error


@contextlib.contextmanager
def stop_signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Around the work of a rank: the first signal calls `stop`, the same one again ends the work by SystemExit.

    `stop` is given the exit status: 128 + the signal's number, or 0 where the parent knows it. It may raise SystemExit.
    """
    parent, seen = os.getppid(), set[int]()
    under_elastic = "TORCHELASTIC_RUN_ID" in os.environ

    def handle(signum: int, _frame: FrameType | None) -> None:
        if under_elastic and signum == signal.SIGINT and os.getppid() == parent:
            return  # Ctrl-C: the parent has it too; when the parent dies, its ranks get SIGINT from the kernel
        status = 0 if signum == _PASSED_ON else 128 + signum
        first, again = not seen, signum in seen
        seen.add(signum)
        if again:
            raise SystemExit(status)
        if first:
            stop(status)

    signals = (*_STOP, _PASSED_ON) if under_elastic else _STOP
    for number in signals:
        signal.signal(number, handle)
    try:
        yield
    finally:  # fairchem's handlers, which were there before, would end the process with status 0, or hang
        for number in signals:
            signal.signal(number, signal.SIG_DFL)


def say(message: str) -> None:
    """A line on stderr from a signal handler, which may have interrupted the very write that logging would need."""
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())


@contextlib.contextmanager
def _handlers(handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in (*_STOP, *handlers)}  # fairchem leaves handlers behind
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)
