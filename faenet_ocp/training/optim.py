"""Optimiser, learning-rate schedule and average of the weights, as the section `optim:` asks for them."""

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from faenet_ocp.config.optim import OptimConfig, PlateauConfig


def total_steps(optim: OptimConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of a run."""
    total = optim.max_epochs * steps_per_epoch
    return min(total, optim.max_steps) if optim.max_steps else total


def warn_of_long_warmup(optim: OptimConfig, total_steps: int) -> None:
    """Says that the learning rate never gets to where it is to begin."""
    if optim.warmup_steps >= total_steps:
        message = "optim.warmup_steps: %d, but training has only %d steps: the learning rate never reaches lr_initial"
        logging.warning(message, optim.warmup_steps, total_steps)


def learning_rate_schedule(optim: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Factor of `lr_initial` by step: linear warm-up from `warmup_factor` to 1, then as `scheduler` says.

    A cosine goes down to `lr_min_factor` at the last step of training; milestones multiply by `gamma`; what a plateau
    brings is a factor of its own (`Plateau`). Steps count optimiser steps.
    """
    warmup = optim.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return optim.warmup_factor + (1 - optim.warmup_factor) * step / warmup
        if optim.multistep is not None:
            return optim.multistep.gamma ** sum(step >= milestone for milestone in optim.multistep.milestones)
        if optim.scheduler != "linear_warmup_cosine":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return optim.lr_min_factor + (1 - optim.lr_min_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


class Plateau:
    """What `optim.scheduler: reduce_on_plateau` makes of the learning rate, by PyTorch's scheduler of this name.

    Attributes:
        factor: of the learning rate, 1 at first.
    """

    def __init__(self, optim: OptimConfig, *, higher_is_better: bool):
        given = optim.plateau or PlateauConfig()
        self._optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # stands for the one whose rate also warms up
        self._scheduler = ReduceLROnPlateau(
            self._optimizer,
            mode="max" if higher_is_better else "min",
            factor=given.factor,
            patience=given.patience,
            min_lr=given.min_lr / optim.lr_initial,
        )

    @property
    def factor(self) -> float:
        return self._optimizer.param_groups[0]["lr"]

    def step(self, value: float) -> None:
        """Takes the metric of an evaluation."""
        self._scheduler.step(value)

    def state_dict(self) -> dict[str, Any]:
        """Factor, best value, and evaluations since."""
        scheduler = self._scheduler
        return {"factor": self.factor, "best": scheduler.best, "num_bad_epochs": scheduler.num_bad_epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; settings stay those of now."""
        self._optimizer.param_groups[0]["lr"] = state["factor"]
        self._scheduler.best, self._scheduler.num_bad_epochs = state["best"], state["num_bad_epochs"]


def make_optimizer(optim: OptimConfig, device: torch.device | str = "cpu") -> Callable[..., torch.optim.Optimizer]:
    """The optimiser of `torch.optim` that the config names, called with `params`.

    Args:
        optim: the `optim:` section.
        device: of the parameters; on a GPU an optimiser that can be `fused` is, unless `optimizer_params` says.

    Raises:
        ValueError: there is no such optimiser, or it does not take the given arguments.
    """
    cls = getattr(torch.optim, optim.optimizer, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueError(f"optim.optimizer: torch.optim has no optimiser {optim.optimizer!r}; e.g. AdamW, Adam, SGD")
    arguments = {"lr": optim.lr_initial, "weight_decay": optim.weight_decay, **optim.optimizer_params}
    if torch.device(device).type == "cuda" and "fused" in inspect.signature(cls).parameters:
        arguments = {"fused": True, **arguments}

    def build(params: Any) -> torch.optim.Optimizer:
        try:
            return cls(params, **arguments)
        except TypeError as error:
            raise ValueError(f"optim.optimizer_params: {optim.optimizer}: {error}") from error

    build.keywords = {}  # type: ignore[attr-defined]  # fairchem looks here for a decay to exempt parameters from
    return build


class WarmingEMA(AveragedModel):
    """EMA of weights whose decay grows from 0.1 to `decay` as (1 + n) / (10 + n): early ones are not the first weights.

    n stays on the CPU, so that nothing waits for the device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes the present weights into the average; buffers are copied."""
        n = int(self.n_averaged)
        weight = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), weight)
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
        self.n_averaged += 1
