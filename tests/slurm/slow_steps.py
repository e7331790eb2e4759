"""A transform that holds training back, so that a test can interrupt it: jobs import it by its dotted path."""

import os
import time

import torch
from fairchem.core.datasets.atomic_data import AtomicData

from faenet_ocp.data.transforms import Transform


class Slow(Transform):
    """Takes `seconds` for each sample until the file `until` exists; changes nothing."""

    def __init__(self, *, seconds: float, until: str):
        self.seconds, self.until = seconds, until

    def __call__(self, data: AtomicData, generator: torch.Generator) -> AtomicData:
        if not os.path.exists(self.until):
            time.sleep(self.seconds)
        return data
