"""Where the numbers of a run go: always to `logs/metrics.jsonl`, and to TensorBoard or Weights & Biases."""

import json
import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from faenet_ocp.common.files import write_text
from faenet_ocp.config.schema import LoggerConfig
from faenet_ocp.evaluation.log_names import LOSS


class _Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one rank needs it

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, settings: LoggerConfig, folder: Path, identifier: str, config: Mapping[str, Any]):
        import wandb
        from fairchem.core.common.logger import WandBSingletonLogger

        WandBSingletonLogger.init_wandb(
            config=dict(config),
            run_id=identifier,
            run_name=identifier,
            log_dir=str(folder),
            project=settings.project,
            entity=settings.entity,
            settings=wandb.Settings(mode=settings.mode),
        )
        # W&B's own step only grows, and drops what comes later for a smaller one, as metrics of an evaluation do.
        wandb.define_metric("step")
        wandb.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        import wandb

        wandb.log({"step": step, **values})

    def close(self) -> None:
        import wandb

        wandb.finish()


def check_logger(settings: LoggerConfig) -> None:
    """What a logger needs is there, before the work that it is to log.

    Raises:
        ValueError: a package or, for W&B, a login is missing.
    """
    if settings.name == "none":
        return
    package = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[settings.name]
    try:
        import_module(package)
    except ImportError as error:
        message = f"logger.name: {settings.name} cannot be imported ({error}); install it, or choose another logger"
        raise ValueError(message) from error
    if settings.name == "wandb" and settings.mode == "online":
        import wandb

        try:
            logged_in = wandb.login(verify=False)
        except wandb.errors.Error as error:
            raise ValueError(f"logger.name: wandb: {error}; {_OFFLINE}") from error
        if not logged_in:
            raise ValueError(f"logger.name: wandb: no login; {_OFFLINE}")


_OFFLINE = "`wandb login` once, set WANDB_API_KEY, or choose logger.mode: offline"


class MetricLogger:
    """Logs numbers by step on the first rank.

    `metrics.jsonl` holds one JSON object a line: `step`, `epoch` and values (`evaluation.log_names`).
    A resumed run drops the lines after the step that it goes on from, so that no step is there twice.

    Args:
        settings: the `logger:` section.
        folder: `logs/` of the run.
        identifier: name of the run.
        config: resolved configuration, shown by W&B.
        step: optimiser steps done so far.
        evaluated: false if the evaluation after that step was interrupted and will be repeated.
        lenient: a record that cannot be written (disk full) is a warning instead of an OSError.
    """

    def __init__(
        self,
        settings: LoggerConfig,
        folder: Path,
        *,
        identifier: str,
        config: Mapping[str, Any],
        step: int = 0,
        evaluated: bool = True,
        lenient: bool = False,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.lenient = lenient
        _keep_until(self.path, step, evaluated)
        self.file = self.path.open("ab", buffering=0)  # a line is there when `log` returns, or an error says so
        self.sink: _Sink | None = None
        if settings.name == "tensorboard":
            self.sink = _TensorBoard(folder, step)
        elif settings.name == "wandb":
            self.sink = _WandB(settings, folder, identifier, config)

    def log(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Writes the values of one step."""
        try:
            self.file.write((json.dumps({"step": step, "epoch": round(epoch, 6), **values}) + "\n").encode())
            if self.sink is not None:
                self.sink.write(step, {**values, "epoch": epoch})
        except OSError as error:
            message = f"metrics of step {step} could not be written: {error.strerror or error}, {self.path}"
            if not self.lenient:
                raise OSError(message) from error
            logging.warning("%s. Going on without", message)

    def close(self) -> None:
        """Flushes and closes."""
        self.file.close()
        if self.sink is not None:
            self.sink.close()


def _keep_until(path: Path, step: int, evaluated: bool) -> None:
    """Cuts a log to the records up to a step, with or without its evaluation; a half-written last line is dropped."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            logging.warning("%s: dropped an incomplete line", path)
            continue
        repeated = record["step"] == step and not evaluated and LOSS not in record
        if record["step"] <= step and not repeated:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
