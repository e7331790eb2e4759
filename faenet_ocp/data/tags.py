"""OC20's tags (0 below the surface, 1 surface, 2 adsorbate) for structures that come from elsewhere.

Programs give atoms other tags (ASE's builders count layers), the same tag (1 for all), or none. A model that was
trained with OC20's would take them for what they are not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

from faenet_ocp.common.checks import RecordError, choice

CHOICES = ("file", "fixed", "none")
METAL = "metal"
Adsorbate = str | Sequence[int] | Callable[[Any], Sequence[int]] | None
_NON_METALS = [atomic_numbers[symbol] for symbol in "H He B C N O F Ne Si P S Cl Ar As Se Br Kr Te I Xe At Rn".split()]


def assign_tags(
    tags: NDArray[Any] | None, fixed: NDArray[np.bool_], how: str, *, adsorbate: NDArray[np.int64] | None = None
) -> NDArray[np.int64] | None:
    """Tags as OC20 means them, (n,), or None.

    Args:
        tags: of the structure, (n,); None if it has none.
        fixed: which atoms are fixed, (n,).
        how: "file": the structure's own; "fixed": 0 for fixed atoms, 1 for others; "none".
        adsorbate: indices of the atoms that get tag 2 whatever the rest is.

    Raises:
        RecordError: "file", and there are none, or others than 0, 1 and 2; names the choices.
    """
    if choice("tags", how, CHOICES) == "none":
        return None
    if how == "fixed":
        result = np.where(fixed, 0, 1)
    else:
        if tags is None:
            raise RecordError(f"has no tags, which the model needs; {_CHOICES_IN_WORDS}")
        if not np.isin(tags, (0, 1, 2)).all():
            found = ", ".join(map(str, np.unique(tags)[:6]))
            raise RecordError(f"has tags that are not OC20's 0, 1 and 2, but {found}; {_CHOICES_IN_WORDS}")
        result = tags.astype(np.int64)
    if adsorbate is not None:
        result[adsorbate] = 2
    return result


_CHOICES_IN_WORDS = (
    "tags: file takes OC20's (0 below the surface, 1 surface, 2 adsorbate), fixed makes 0 of fixed atoms and 1 of the "
    "others, none leaves them out (for a model with tag_hidden_channels: 0 and no remove_subsurface)"
)


def non_metals(numbers: NDArray[Any], fixed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Indices of the atoms that a slab of the metal alone would not have: not fixed, and of a non-metal."""
    return np.flatnonzero(~fixed & np.isin(numbers, _NON_METALS))


def adsorbate_of(atoms: Any, which: Adsorbate, fixed: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    """Indices of the adsorbate's atoms.

    Args:
        atoms: structure of ASE.
        which: indices; a function of the structure that returns them; "metal": the atoms that a slab of the metal alone
            would not have, which are those of non-metals (H, B, C, N, O, Si, P, S, ..., halogens, noble gases) that are
            not fixed; None: not known.
        fixed: which atoms are fixed, (n,).

    Raises:
        ValueError: no such atoms, or another word.
    """
    if which is None:
        return None
    if isinstance(which, str):
        choice("adsorbate", which, (METAL,))
        return non_metals(atoms.numbers, fixed)
    found = np.asarray(which(atoms) if callable(which) else which)
    found = np.flatnonzero(found) if found.dtype == bool and found.shape == (len(atoms),) else found
    if found.ndim != 1 or (
        found.size and (found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= len(atoms))
    ):
        raise ValueError(f"adsorbate: expected indices of the {len(atoms)} atoms, got {found!r}")
    return found.astype(np.int64)
