"""torch.compile for FAENet: few compilations, kept across runs, and never a reason for a run to stop."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from faenet_ocp.message_passing import InteractionBlock

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/faenet-ocp/inductor")


def compile_model(model: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the interaction blocks of a model in place, for training and inference with batches of any size.

    The blocks are where the time goes, and are alike: one compilation serves them all, once for each of inference and
    training (and precision), whatever the numbers of atoms, edges and systems. Names of parameters stay. A copy of the
    model (an average of its weights) is not compiled. If compilation fails, a warning says so and the blocks run as
    they are. Compiled code is kept in `~/.cache/faenet-ocp/inductor`, or where TORCHINDUCTOR_CACHE_DIR says.

    On a CPU without bfloat16 this rarely pays: eager execution takes the edges in blocks that fit the cache.

    Args:
        model: has `InteractionBlock`s, anywhere.
        backend: of torch.compile.

    Returns:
        how many blocks were found.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE.expanduser()))
    found = [module for module in model.modules() if isinstance(module, InteractionBlock)]
    if not found:
        logger.warning("compile: the model has no FAENet block, nothing is compiled")
    for block in found:
        compiled = torch.compile(block._call_impl, dynamic=True, backend=backend)
        block._compiled_call_impl = _with_fallback(block, compiled)
    return len(found)


def _with_fallback(block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return compiled(*arguments, **named)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("compile: failed, so that a block runs as it is: %s", reason)
            block._compiled_call_impl = None
            return block(*arguments, **named)

    return call
