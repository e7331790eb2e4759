"""Steps whose gradient is not finite are left out, and a GPU need not be waited for to do so.

On a CPU one looks at the norm of the gradient. On a GPU that look would let it run dry in every step, so it decides by
itself: optimisers that are `fused` leave the weights as they are where `found_inf` says so (torch's own way, see
`torch.amp.GradScaler`), and the host hears of it `LAG` steps later, when the number has long arrived.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor

from faenet_ocp.common.transfer import Fetched

LAG = 2
"""Steps that the host may be ahead of what it knows of the device."""


class Step(NamedTuple):
    """What is known of a training step.

    Attributes:
        number: of the step.
        batches: its micro-batches.
        losses: of this rank, by term.
    """

    number: int
    batches: Sequence[AtomicData]
    losses: Tensor


class FiniteSteps:
    """An optimiser that takes steps with a finite gradient only.

    Args:
        optimizer: with all its parameters on one device.
        device: of the parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.decides_on_device = device.type != "cpu" and getattr(optimizer, "_step_supports_amp_scaling", False)
        self._pending: deque[tuple[Step, Fetched]] = deque()

    def take(self, step: Step, grad_norm: Tensor) -> bool:
        """Takes the step unless `grad_norm` is not finite.

        Returns:
            whether it was taken, as far as that is known; `left_out` has the others.
        """
        finite = grad_norm.isfinite()
        if self.decides_on_device:
            self.optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
            self.optimizer.step()
            self._pending.append((step, Fetched({"finite": finite})))
            return True
        taken = bool(finite)
        if taken:
            self.optimizer.step()
        else:
            self._pending.append((step, Fetched({"finite": finite})))
        return taken

    def left_out(self, *, all_steps: bool) -> Iterator[Step]:
        """Steps that were not taken and not yet named; `all_steps`: also of the last ones, which may take a wait."""
        lag = LAG if self.decides_on_device and not all_steps else 0
        while len(self._pending) > lag:
            step, fetched = self._pending.popleft()
            if not fetched.wait()["finite"]:
                yield step
