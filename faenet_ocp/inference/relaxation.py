"""Relaxation of many structures at a time: one model call for the forces of a batch, an optimiser for each structure.

The optimiser is ASE's LBFGS, fed with the forces of the batch. So a structure takes the same path as it would alone in
ASE, with all of ASE's constraints, and one that is finished makes room for the next.

Energies in eV, forces in eV/Angstrom, positions in Angstrom; n atoms of one structure.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.trajectory import TrajectoryWriter
from ase.optimize import LBFGS

from faenet_ocp.common.files import TEMPORARY_SUFFIX, publish
from faenet_ocp.data.atoms import fixed_atoms
from faenet_ocp.inference.predictor import Prediction

logger = logging.getLogger(__name__)

Evaluate = Callable[[Sequence[Atoms]], Sequence[Prediction]]
"""Energies and forces of several structures, e.g. a `predictor.Predictor`."""

_MEMORY = 50


@dataclass(frozen=True, kw_only=True)
class Relaxed:
    """One finished relaxation.

    Attributes:
        index: place of the structure in the input.
        atoms: where it ended, with energy and forces there.
        initial_energy: eV.
        steps: steps taken.
        fmax: largest force on an atom that may move, eV/Angstrom.
        status: converged, max_steps, failed (no finite prediction after a step, or constraints that cannot be kept;
            `atoms` is the step before), or unusable (no finite prediction at the start, or atoms that the model does
            not see and that are not fixed).
        reason: why it is failed or unusable.
        common_displacement: by how much the atoms that the model sees have moved together, their mean displacement in
            Angstrom; with fixed atoms that it does not see, this has cost nothing.
    """

    index: int
    atoms: Atoms
    initial_energy: float
    steps: int
    fmax: float
    status: str
    common_displacement: float = 0.0
    reason: str | None = None


def relax(
    structures: Iterable[tuple[int, Atoms]],
    evaluate: Evaluate,
    *,
    fmax: float = 0.03,
    max_steps: int = 300,
    batch_size: int = 32,
    max_step: float = 0.2,
    trajectories: Path | None = None,
    strict: bool = True,
) -> Iterator[Relaxed]:
    """Relaxes structures, `batch_size` at a time, and yields each when it is finished, in no particular order.

    Args:
        structures: index and Atoms, read only when there is room for them; the Atoms are changed.
        evaluate: energies and forces.
        fmax: a structure is converged when no force on an atom (after constraints) is larger, eV/Angstrom.
        max_steps: of one structure; with 0 they are evaluated where they are.
        batch_size: structures in a model call.
        max_step: longest step of an atom, Angstrom.
        trajectories: folder for `<index>.traj` files (ASE's format); they appear when they are complete.
        strict: an unusable structure is an error, not a status.

    Raises:
        ValueError: a limit that is not positive, a structure that is unusable, or `evaluate` gives no forces.
    """
    for name, value in (("fmax", fmax), ("batch_size", batch_size), ("max_step", max_step)):
        if not value > 0:
            raise ValueError(f"{name}: {value} is not positive")
    if max_steps < 0:
        raise ValueError(f"max_steps: {max_steps} is negative")
    waiting = iter(structures)
    active: list[_Relaxation] = []
    while True:
        for index, atoms in islice(waiting, batch_size - len(active)):
            active.append(_Relaxation(index, atoms, max_step, trajectories, moves=max_steps > 0))
        if not active:
            return
        going = []
        for one, outcome in zip(active, _outcomes(evaluate, [one.atoms for one in active]), strict=True):
            status = one.update(outcome, fmax)
            if status == "unusable" and strict:
                raise ValueError(f"structure {one.index}: {one.reason}")
            if status is None and one.steps == max_steps:
                status = "max_steps"
            status = status or one.step()
            if status is None:
                going.append(one)
            else:
                yield one.finish(status)
        active = going


def _outcomes(evaluate: Evaluate, structures: Sequence[Atoms]) -> list[Prediction | ValueError]:
    """The prediction of each structure, or the error that it gives alone."""
    try:
        return list(evaluate(structures))
    except ValueError as error:
        if len(structures) == 1:
            return [error]
    return [outcome for atoms in structures for outcome in _outcomes(evaluate, [atoms])]


class _Relaxation:
    """One structure under way."""

    def __init__(self, index: int, atoms: Atoms, max_step: float, trajectories: Path | None, *, moves: bool):
        self.index, self.atoms, self.max_step, self.moves, self.steps = index, atoms, max_step, moves, 0
        self.atoms.calc = None
        self.start = atoms.positions.copy()
        self.seen = np.ones(len(atoms), dtype=bool)
        self.initial_energy = self.fmax = np.nan
        self.reason: str | None = None
        self.optimizer = self._new_optimizer()
        self.trajectory = None if trajectories is None else trajectories / f"{index}.traj"

    def _new_optimizer(self) -> LBFGS:
        return LBFGS(self.atoms, maxstep=self.max_step, memory=_MEMORY)

    def update(self, outcome: Prediction | ValueError, fmax: float) -> str | None:
        """Takes energy and forces at the present positions; returns the status if this is the end."""
        is_start = self.atoms.calc is None
        self.reason = self._objection(outcome, is_start=is_start)
        if self.reason is not None or isinstance(outcome, ValueError):
            if is_start:
                return "unusable"
            self.atoms.positions = self.atoms.calc.atoms.positions
            return "failed"
        if is_start:
            self.initial_energy, self.seen = outcome.energy, outcome.seen
        results = {name: outcome.values[name] for name in ("energy", "forces") if name in outcome.values}
        self.atoms.calc = SinglePointCalculator(self.atoms, **results)
        if self.trajectory is not None:
            self._write_to(self.trajectory, "w" if is_start else "a")
        if outcome.forces is None:
            return None
        try:
            forces = self.atoms.get_forces()
        except RuntimeError as error:  # of ASE's iterative constraints
            return self._stuck(error)
        self.fmax = float(np.linalg.norm(forces, axis=1).max())
        return "converged" if self.fmax < fmax else None

    def _objection(self, outcome: Prediction | ValueError, *, is_start: bool) -> str | None:
        if isinstance(outcome, ValueError):
            return str(outcome)
        forces = outcome.forces
        if forces is None and self.moves:
            raise ValueError(
                "relaxation needs forces, and this checkpoint predicts energies only (use one of task s2ef)"
            )
        if not all(np.isfinite(value).all() for value in outcome.values.values()):
            return f"energy or forces {'at its initial positions ' if is_start else ''}are not finite"
        loose = np.flatnonzero(~outcome.seen & ~fixed_atoms(self.atoms))
        if self.moves and len(loose):
            return (
                "the model does not see atoms of tag 0 and predicts no forces on them, but these are not fixed: "
                f"{loose[:10].tolist()}; fix them with ase.constraints.FixAtoms"
            )
        return None

    def _write_to(self, path: Path, mode: str) -> None:
        """Not kept open: there may be more structures under way than a process may have open files."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with TrajectoryWriter(str(_unfinished(path)), mode) as file:
            file.write(self.atoms)

    def step(self) -> str | None:
        """Moves the atoms; returns the status if constraints do not let it."""
        start = self.atoms.positions.copy()
        try:
            with np.errstate(divide="ignore", invalid="ignore"):
                self.optimizer.step()
        except RuntimeError as error:
            self.atoms.positions = start
            return self._stuck(error)
        if not np.isfinite(self.atoms.positions).all():
            # The last step did not change the forces at all: LBFGS divides by zero. Begin its history anew.
            self.atoms.positions = start
            self.optimizer = self._new_optimizer()
            self.optimizer.step()
        self.steps += 1
        return None

    def _stuck(self, error: RuntimeError) -> str:
        self.reason = f"its constraints cannot be kept ({error})"
        return "failed"

    def finish(self, status: str) -> Relaxed:
        if self.trajectory is not None and status != "unusable":
            publish(_unfinished(self.trajectory), self.trajectory)
        if self.reason is not None:
            logger.warning("structure %d is %s: %s", self.index, status, self.reason)
        return Relaxed(
            index=self.index,
            atoms=self.atoms,
            initial_energy=self.initial_energy,
            steps=self.steps,
            fmax=self.fmax,
            status=status,
            common_displacement=float(np.linalg.norm((self.atoms.positions - self.start)[self.seen].mean(axis=0))),
            reason=self.reason,
        )


def _unfinished(trajectory: Path) -> Path:
    return trajectory.with_name(f".{trajectory.name}{TEMPORARY_SUFFIX}")
