"""torch.compile for FAENet: few compilations, kept across runs, and never a reason for a run to stop."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from faenet_ocp.message_passing import EdgeFilter, InteractionBlock

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/faenet-ocp/inductor")
_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compile_model(model: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the interaction blocks of a model in place, for training and inference with batches of any size.

    The blocks are where the time goes, and are alike: one compilation serves them all, once for each of inference and
    training (and precision), whatever the numbers of atoms, edges and systems. Names of parameters stay. A copy of the
    model (an average of its weights) is not compiled. If compilation fails, a warning says so and all blocks run
    as they are. Compiled code is kept in `~/.cache/faenet-ocp/inductor`, or where TORCHINDUCTOR_CACHE_DIR says.

    Three of torch's settings are changed for the whole process: gradients can be taken twice from one forward pass (as
    the gradient term of eq. (9) needs), a backward pass that cannot be compiled fails in the forward pass, where the
    block can still run as it is, and DDP does not cut blocks in pieces.

    On a CPU the sum over edges is left as it is, because compiled it takes three to four times as long, and little is
    gained.

    Args:
        model: has `InteractionBlock`s, anywhere.
        backend: of torch.compile.

    Returns:
        how many blocks were found.
    """
    _choose_cache()
    _change_settings()
    found = [module for module in model.modules() if isinstance(module, InteractionBlock)]
    if not found:
        logger.warning("compile: the model has no FAENet block, nothing is compiled")
    for block in found:
        for module in block.modules():
            if isinstance(module, EdgeFilter):
                module.opaque_on_cpu = True
        compiled = torch.compile(block._call_impl, dynamic=True, backend=backend)
        block._compiled_call_impl = _with_fallback(block, compiled, found)
    return len(found)


def _choose_cache() -> None:
    # The import of torch_geometric sets the variable to torch's default, among temporary files, if it is not set.
    if os.environ.get(_CACHE_VARIABLE) not in (None, default_cache_dir()):
        return
    try:
        folder = CACHE.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        logger.warning("compile: compiled code is not kept in %s: %s", CACHE, error)
        return
    os.environ[_CACHE_VARIABLE] = str(folder)


def _change_settings() -> None:
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.optimize_ddp = False
    if hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):  # not in all versions of torch
        torch._functorch.config.force_non_lazy_backward_lowering = True


def _with_fallback(block: nn.Module, compiled: Callable[..., Any], found: Sequence[nn.Module]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return compiled(*arguments, **named)
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:  # OSError: the cache, the compiler
            cause = getattr(error, "inner_exception", error)
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            logger.warning("compile: failed, so that the model runs as it is: %s", reason)
            for other in found:
                other._compiled_call_impl = None
            return block(*arguments, **named)

    return call
