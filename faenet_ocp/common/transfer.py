"""Numbers of a device fetched without waiting for it: asked for now, looked at when it has other work to do."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Fetched:
    """Tensors on their way to the CPU. Those that are there already are taken as they are.

    Args:
        tensors: by name, of one device.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensors = {name: self._fetch(tensor) for name, tensor in tensors.items()}
        if any(tensor.device.type == "cuda" for tensor in tensors.values()):
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @staticmethod
    def _fetch(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.to("cpu")
        # Into pinned memory: a copy to any other is waited for.
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    def wait(self) -> dict[str, Tensor]:
        """The tensors on the CPU, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
