"""Optimiser, learning-rate schedule and average of the weights, as the section `optim:` asks for them."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from faenet_ocp.config.schema import OptimConfig

_Tensors = tuple[Tensor, ...] | list[Tensor]


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
    """Factor of `lr_initial` by step: linear warm-up from `warmup_factor` to 1, then a cosine down to `lr_min_factor`.

    Steps count optimiser steps; the cosine ends at the last step of training.
    """
    warmup = optim.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return optim.warmup_factor + (1 - optim.warmup_factor) * step / warmup
        if optim.scheduler == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return optim.lr_min_factor + (1 - optim.lr_min_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def make_optimizer(optim: OptimConfig) -> Callable[..., torch.optim.Optimizer]:
    """The optimiser of `torch.optim` that the config names, called with `params`.

    Raises:
        ValueError: there is no such optimiser, or it does not take the given arguments.
    """
    cls = getattr(torch.optim, optim.optimizer, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueError(f"optim.optimizer: torch.optim has no optimiser {optim.optimizer!r}; e.g. AdamW, Adam, SGD")
    arguments = {"lr": optim.lr_initial, "weight_decay": optim.weight_decay, **optim.optimizer_params}

    def build(params: Any) -> torch.optim.Optimizer:
        try:
            return cls(params, **arguments)
        except TypeError as error:
            raise ValueError(f"optim.optimizer_params: {optim.optimizer}: {error}") from error

    build.keywords = {}  # type: ignore[attr-defined]  # fairchem looks here for a decay to exempt parameters from
    return build


def warming_ema(decay: float) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    """EMA whose decay grows from 0.1 to `decay` as (1 + n) / (10 + n): early averages are not the initial weights."""

    @torch.no_grad()
    def update(averages: _Tensors, currents: _Tensors, num_averaged: Tensor | int) -> None:
        n = float(num_averaged)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        for average, current in zip(averages, currents, strict=True):
            if torch.is_floating_point(average):
                average.lerp_(current.to(average.dtype), weight)
            else:
                average.copy_(current)

    return update
