"""Relaxation of many structures at a time: one model call for the forces of a batch, an optimiser for each structure.

The optimiser is ASE's LBFGS, fed with the forces of the batch. So a structure takes the same path as it would alone in
ASE, with all of ASE's constraints, and one that is finished makes room for the next.

Energies in eV, forces in eV/Angstrom, positions in Angstrom; n atoms of one structure.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.trajectory import TrajectoryWriter
from ase.optimize import LBFGS
from numpy.typing import NDArray

from faenet_ocp.common.files import TEMPORARY_SUFFIX, publish
from faenet_ocp.data.atoms import fixed_atoms
from faenet_ocp.inference.predictor import Prediction

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
        status: converged, max_steps, or failed (a prediction that is not finite; `atoms` is the step before).
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


def relax(
    structures: Iterable[tuple[int, Atoms]],
    evaluate: Evaluate,
    *,
    fmax: float = 0.03,
    max_steps: int = 300,
    batch_size: int = 32,
    max_step: float = 0.2,
    trajectories: Path | None = None,
) -> Iterator[Relaxed]:
    """Relaxes structures, `batch_size` at a time, and yields each when it is finished, in no particular order.

    Args:
        structures: index and Atoms, read only when there is room for them; the Atoms are changed.
        evaluate: energies and forces.
        fmax: a structure is converged when no force on an atom (after constraints) is larger, eV/Angstrom.
        max_steps: of one structure.
        batch_size: structures in a model call.
        max_step: longest step of an atom, Angstrom.
        trajectories: folder for `<index>.traj` files (ASE's format); they appear when they are complete.

    Raises:
        ValueError: a limit that is not positive; a structure that `evaluate` cannot take or gives no finite numbers for
            at its start, or with atoms that the model does not see and that are not fixed.
    """
    for name, value in (("fmax", fmax), ("max_steps", max_steps), ("batch_size", batch_size), ("max_step", max_step)):
        if not value > 0:
            raise ValueError(f"{name}: {value} is not positive")
    waiting = iter(structures)
    active: list[_Relaxation] = []
    while True:
        for index, atoms in islice(waiting, batch_size - len(active)):
            active.append(_Relaxation(index, atoms, max_step, trajectories))
        if not active:
            return
        predictions = evaluate([one.atoms for one in active])
        going = []
        for one, prediction in zip(active, predictions, strict=True):
            status = one.update(prediction, fmax)
            if status is None and one.steps == max_steps:
                status = "max_steps"
            if status is None:
                one.step()
                going.append(one)
            else:
                yield one.finish(status)
        active = going


class _Relaxation:
    """One structure under way."""

    def __init__(self, index: int, atoms: Atoms, max_step: float, trajectories: Path | None):
        self.index, self.atoms, self.max_step, self.steps = index, atoms, max_step, 0
        self.atoms.calc = None
        self.start = atoms.positions.copy()
        self.seen = np.ones(len(atoms), dtype=bool)
        self.initial_energy = self.fmax = np.nan
        self.optimizer = self._new_optimizer()
        self.trajectory: TrajectoryWriter | None = None
        if trajectories is not None:
            trajectories.mkdir(parents=True, exist_ok=True)
            self.path = trajectories / f"{index}.traj"
            self.unfinished = self.path.with_name(f".{self.path.name}{TEMPORARY_SUFFIX}")
            self.trajectory = TrajectoryWriter(str(self.unfinished), "w")

    def _new_optimizer(self) -> LBFGS:
        return LBFGS(self.atoms, maxstep=self.max_step, memory=_MEMORY)

    def update(self, prediction: Prediction, fmax: float) -> str | None:
        """Takes energy and forces at the present positions; returns the status if this is the end."""
        energy, forces = prediction.energy, prediction.forces
        if forces is None:
            raise ValueError(
                "relaxation needs forces, and this checkpoint predicts energies only (use one of task s2ef)"
            )
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            if self.atoms.calc is None:
                raise ValueError(f"structure {self.index}: energy or forces at its initial positions are not finite")
            self.atoms.positions = self.atoms.calc.atoms.positions
            return "failed"
        if self.atoms.calc is None:
            self._check_fixed(prediction.seen)
            self.seen = prediction.seen
            self.initial_energy = energy
        self.atoms.calc = SinglePointCalculator(self.atoms, energy=energy, forces=forces)
        if self.trajectory is not None:
            self.trajectory.write(self.atoms)
        self.fmax = float(np.linalg.norm(self.atoms.get_forces(), axis=1).max())
        return "converged" if self.fmax < fmax else None

    def _check_fixed(self, seen: NDArray[np.bool_]) -> None:
        loose = np.flatnonzero(~seen & ~fixed_atoms(self.atoms))
        if len(loose):
            raise ValueError(
                f"structure {self.index}: the model does not see atoms of tag 0 and predicts no forces on them, but "
                f"these are not fixed: {loose[:10].tolist()}; fix them with ase.constraints.FixAtoms"
            )

    def step(self) -> None:
        """Moves the atoms."""
        start = self.atoms.positions.copy()
        with np.errstate(divide="ignore", invalid="ignore"):
            self.optimizer.step()
        if not np.isfinite(self.atoms.positions).all():
            # The last step did not change the forces at all: LBFGS divides by zero. Begin its history anew.
            self.atoms.positions = start
            self.optimizer = self._new_optimizer()
            self.optimizer.step()
        self.steps += 1

    def finish(self, status: str) -> Relaxed:
        if self.trajectory is not None:
            self.trajectory.close()
            publish(self.unfinished, self.path)
        return Relaxed(
            index=self.index,
            atoms=self.atoms,
            initial_energy=self.initial_energy,
            steps=self.steps,
            fmax=self.fmax,
            status=status,
            common_displacement=float(np.linalg.norm((self.atoms.positions - self.start)[self.seen].mean(axis=0))),
        )
