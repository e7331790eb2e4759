"""THE table of what can be predicted; a new target is a row of it.

Heads, losses, averaging over frames, metrics, columns of tables, plots, normalisers, predictions and the calculator
follow from a target's level (one value for each system, or for each atom) and rank (0: scalar, the mean over the frames
is taken; 1: vector, rotated back before). Any other scalar of systems can be predicted if the configuration declares
its unit (`outputs: {gap: {unit: eV}}`): `resolve`.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["system", "atom"]


@dataclass(frozen=True)
class Metric:
    """One number that says how good predictions are.

    Attributes:
        name: key in results, logs and `primary_metric`.
        unit: of its values; "%" and "1" for shares and cosines.
        title: in tables and plots; empty: it is in the results only.
        higher_is_better: direction.
        digits: decimals in tables.
        milli: tables and plots show thousandths of the unit.
        beside: another target that has to be predicted, too.
    """

    name: str
    unit: str
    title: str = ""
    higher_is_better: bool = False
    digits: int = 4
    milli: bool = False
    beside: str | None = None

    @property
    def scale(self) -> float:
        """What tables and plots multiply values by."""
        return 1e3 if self.milli else 1.0

    @property
    def shown_unit(self) -> str:
        """The unit of tables and plots."""
        return f"m{self.unit}" if self.milli else self.unit

    @property
    def header(self) -> str:
        """Title and unit."""
        return self.title if self.unit in ("%", "1") else f"{self.title} [{self.shown_unit}]"

    def text(self, value: float | None) -> str:
        """A value as tables show it; "-" where there is none."""
        if value is None:
            return "-"
        return f"{value * self.scale:.{self.digits}f}{'%' if self.unit == '%' else ''}"


@dataclass(frozen=True)
class Target:
    """One predicted property.

    Attributes:
        name: in YAML, checkpoints, results, and of the label.
        level: "system", shape (B, dimension), or "atom", (N, dimension).
        rank: 0 scalar (without the axis of the dimension), 1 vector.
        unit: physical unit of labels and predictions.
        metrics: computed by ``evaluation.metrics``; the first is the one that learning curves show.
        threshold: largest error that counts as a hit, in `unit`; None: there is no such metric.
        extensive: grows with the system, so that element references make sense.
        aliases: names that the label has had in OC20's files, besides those of `dataset.key_mapping`.
    """

    name: str
    level: Level
    rank: Literal[0, 1]
    unit: str
    metrics: tuple[Metric, ...]
    threshold: float | None = None
    extensive: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def dimension(self) -> int:
        """Numbers for each system or atom."""
        return 3 if self.rank else 1

    @property
    def has_statistics(self) -> bool:
        """Whether training labels are summed up for baselines and fitted normalisers: scalars of systems."""
        return self.level == "system" and self.rank == 0


def scalar(name: str, unit: str, *, milli: bool = False, extensive: bool = False) -> Target:
    """A scalar of systems that has no row of its own."""
    mse_title = "" if milli else f"{name} MSE"
    return Target(
        name=name,
        level="system",
        rank=0,
        unit=unit,
        metrics=(
            Metric(f"{name}_mae", unit, title=f"{name} MAE", digits=1 if milli else 4, milli=milli),
            Metric(f"{name}_mse", f"{unit}^2", title=mse_title),
        ),
        extensive=extensive,
        aliases=(name,),
    )


TARGETS: dict[str, Target] = {
    "energy": Target(
        name="energy",
        level="system",
        rank=0,
        unit="eV",
        metrics=(
            Metric("energy_mae", "eV", title="Energy MAE"),
            Metric("energy_mse", "eV^2"),
            Metric("energy_within_threshold", "%", title="EwT", higher_is_better=True, digits=2),
        ),
        threshold=0.02,
        extensive=True,
        aliases=("y_relaxed", "energy", "y"),
    ),
    "forces": Target(
        name="forces",
        level="atom",
        rank=1,
        unit="eV/A",
        metrics=(
            Metric("forces_mae", "eV/A", title="Force MAE", digits=1, milli=True),
            Metric("forces_cosine_similarity", "1", title="Force cosine", higher_is_better=True, digits=3),
            Metric("forces_magnitude_error", "eV/A", title="Magnitude error", digits=1, milli=True),
            Metric(
                "energy_forces_within_threshold", "%", title="EFwT", higher_is_better=True, digits=2, beside="energy"
            ),
        ),
        threshold=0.03,
        aliases=("forces", "force"),
    ),
}
"""By name. IS2RE labels are called y_relaxed, those of fairchem 1.x energy and forces, earlier ones y and force."""


QM9: dict[str, Target] = {
    target.name: target
    for target in (
        scalar("mu", "D"),
        scalar("alpha", "a0^3", extensive=True),
        scalar("homo", "eV", milli=True),
        scalar("lumo", "eV", milli=True),
        scalar("gap", "eV", milli=True),
        scalar("R2", "a0^2"),
        scalar("ZPVE", "eV", milli=True, extensive=True),
        scalar("U0", "eV", milli=True, extensive=True),
        scalar("U", "eV", milli=True, extensive=True),
        scalar("H", "eV", milli=True, extensive=True),
        scalar("G", "eV", milli=True, extensive=True),
        scalar("Cv", "cal/(mol K)", extensive=True),
    )
}
"""The targets of QM9 in the order of the paper's Table 8, in eV where tables show meV."""


TASKS: dict[str, tuple[str, ...]] = {
    "is2re": ("energy",),
    "s2ef": ("energy", "forces"),
    "qm7x": ("energy", "forces"),
    "qm9": (),
    "properties": (),
}
"""What each task predicts, at least. `qm9` is one of `QM9` (`dataset.target`), `properties` what `outputs` names."""


def _in_milli(target: Target) -> Target:
    """The target with its first metric as Table 2 of the paper shows it."""
    first, *others = target.metrics
    return replace(target, metrics=(replace(first, milli=True, digits=2), *others))


QM7X = {name: _in_milli(TARGETS[name]) for name in TASKS["qm7x"]}
ROWS: dict[str, dict[str, Target]] = {"qm7x": QM7X, "qm9": QM9}
"""Rows that belong to one task, besides `TARGETS`."""


def resolve(name: str, *, task: str = "", level: str | None = None, unit: str | None = None) -> Target:
    """The row of a name, or a scalar of systems with the declared unit.

    Args:
        name: as in `outputs:`.
        task: whose own rows count, too.
        level, unit: what the configuration says of it; None: nothing.

    Raises:
        ValueError: no row and no unit, or a level or unit other than that of the row; says what would be right.
    """
    rows = TARGETS | ROWS.get(task, {})
    row = rows.get(name)
    if row is None:
        if unit is None:
            near = difflib.get_close_matches(name, rows, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(rows)}"
            raise ValueError(f"outputs.{name}: unknown; {hint}; any other scalar of systems needs its `unit`")
        if level not in (None, "system"):
            raise ValueError(f"outputs.{name}.level: {level!r}; only scalars of the system can be declared")
        return scalar(name, unit)
    if level not in (None, row.level):
        raise ValueError(f"outputs.{name}.level: {name} is a property of the {row.level}, got {level!r}")
    if unit not in (None, row.unit):
        raise ValueError(f"outputs.{name}.unit: {name} is in {row.unit}, got {unit!r}")
    return row


def metrics_of(targets: Iterable[Target]) -> dict[str, Metric]:
    """All metrics of some targets by name, in their order."""
    targets = list(targets)
    beside = {None, *(target.name for target in targets)}
    return {metric.name: metric for target in targets for metric in target.metrics if metric.beside in beside}


def targets_of(units: Mapping[str, str], task: str = "") -> list[Target]:
    """The targets whose metrics have these units, by name of the metric: the inverse of `metrics_of` for results."""
    known_rows = TARGETS | ROWS.get(task, {})
    rows = [row for row in known_rows.values() if row.metrics[0].name in units]
    known = metrics_of(rows)
    declared = [name.removesuffix("_mae") for name in units if name not in known and name.endswith("_mae")]
    return rows + [scalar(name, units[f"{name}_mae"]) for name in declared]
