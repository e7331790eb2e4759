"""Vectors of surface and of adsorbate atoms apart, component by component: holes that a mean over all atoms hides.

Forces in the plane of the surface on few adsorbate atoms can be missing altogether while the mean error looks fine.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from faenet_ocp.evaluation.metrics import Array, Sums, pair_of
from faenet_ocp.targets import Target

ADSORBATE = 2
"""OC20's tag."""
_AXES = ("x", "y", "z")
_SUMS = 6  # of each component: prediction, label, their squares, their product, absolute error
_ENOUGH = 50
_LITTLE, _UNRELATED = 0.2, 0.3


class ByAtoms(Sums):
    """Error, correlation and spread of each component, for surface and adsorbate atoms.

    Args:
        target: of rank 1.
    """

    size = 2 * (1 + 3 * _SUMS)

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def update(self, pred: Array, label: Array, counted: Tensor, tags: Tensor) -> None:
        """Adds atoms: vectors (N, 3), which count (N,) bool, and their tags (N,)."""
        pred, label = pair_of(self.target, pred, label)
        parts = [pred, label, pred.square(), label.square(), pred * label, (pred - label).abs()]
        per_atom = torch.cat([torch.ones_like(pred[:, :1]), *parts], dim=1)
        groups = [counted & (tags != ADSORBATE), counted & (tags == ADSORBATE)]
        self._add(*(per_atom.where(group[:, None], 0.0).sum(dim=0) for group in groups))

    def compute(self) -> dict[str, dict[str, Any]]:
        """By group ("surface", "adsorbate"; "all" where no atom is an adsorbate's): see `_values`."""
        surface, adsorbate = self.sums.view(2, -1).cpu()
        if not adsorbate[0]:
            return {"all": _values(surface)} if surface[0] else {}
        found = {"surface": surface, "adsorbate": adsorbate}
        return {name: _values(sums) for name, sums in found.items() if sums[0]}


def _values(sums: Tensor) -> dict[str, Any]:
    """num_atoms; mae over components; by component (x, y, z) correlation with the labels, standard deviation of the
    labels, and spread: the predictions' standard deviation over it. None where the labels do not vary."""
    count = float(sums[0])
    pred, label, pred2, label2, product, error = (sums[1:] / count).view(_SUMS, 3)
    var_pred, var_label = (pred2 - pred.square()).clamp(min=0), (label2 - label.square()).clamp(min=0)
    known = var_label > 1e-12 * label2.clamp(min=1e-12)
    correlation = (product - pred * label) / (var_pred * var_label).sqrt().clamp(min=1e-300)
    spread = (var_pred / var_label.clamp(min=1e-300)).sqrt()

    def shown(values: Tensor) -> list[float | None]:
        return [float(value) if there else None for value, there in zip(values, known, strict=True)]

    return {
        "num_atoms": int(count),
        "mae": float(error.mean()),
        "correlation": shown(correlation),
        "spread": shown(spread),
        "label_stdev": var_label.sqrt().tolist(),
    }


def not_learnt(target: Target, groups: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Which components are not learnt, in words.

    That is where predictions vary less than 0.2 as much as labels or correlate with them by less than 0.3; groups of
    fewer than 50 atoms and components that vary less than the target's threshold are not judged.
    """
    for group, values in groups.items():
        of_group = f" of {group} atoms" if group != "all" else ""
        for place, axis in enumerate(_AXES):
            correlation, spread = values["correlation"][place], values["spread"][place]
            small = values["label_stdev"][place] < (target.threshold or 0.0)
            if correlation is None or values["num_atoms"] < _ENOUGH or small:
                continue
            if spread < _LITTLE or correlation < _UNRELATED:
                yield (
                    f"{target.name}{of_group} along {axis} are not learnt: predictions vary {spread:.2f} as much as "
                    f"labels, correlation {correlation:.2f}"
                )
