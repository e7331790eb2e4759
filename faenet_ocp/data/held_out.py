"""A share of the training set held out for validation: whole systems, chosen by the seed alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def hold_out(groups: NDArray[np.int64], shares: Sequence[float], seed: int) -> list[NDArray[np.int64]]:
    """Which samples are held out for each share, and at last which are left to train on, each in order.

    Args:
        groups: the system of each sample, (number of samples,); samples of one are not torn apart.
        shares: of the systems, between 0 and 1; at least one system is held out for each.
        seed: of the choice.

    Raises:
        ValueError: nothing would be left to train on.
    """
    systems = np.unique(groups)
    sizes = [max(1, round(share * len(systems))) for share in shares]
    if sum(sizes) >= len(systems):
        raise ValueError(
            f"from_train: {sum(sizes)} of {len(systems)} systems would be held out, and none left to train on"
        )
    parts = np.split(np.random.default_rng(seed).permutation(systems), np.cumsum(sizes))
    return [np.flatnonzero(np.isin(groups, part)) for part in parts]
