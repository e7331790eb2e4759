"""A checkpoint as ASE's calculator; energies in eV, forces in eV/Angstrom."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes

from faenet_ocp.data.atoms import fixed_atoms
from faenet_ocp.data.tags import Adsorbate
from faenet_ocp.inference.predictor import Predictor


class _Calculation(threading.local):
    """The last calculation of each thread; copies and pickles begin without one."""

    def __init__(self) -> None:
        self.atoms: Atoms | None = None
        self.results: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        return _Calculation, ()


class FAENetCalculator(Calculator):
    """ASE calculator of a checkpoint: all that it was trained on (energy, forces, scalars that it declares).

    Forces of atoms that the checkpoint's transforms remove (sub-surface atoms) are zero, because the model does not
    see them: fix these atoms. With `frames="stochastic"` every new calculation draws new frames. One calculator may
    serve many threads: each has its own `atoms` and `results`.

    With `forces="energy_gradient"` forces are the exact slope of the energy. The energy itself has small steps where an
    atom's list of neighbours (at the cutoff, and at `max_neighbors`) or the sign of an axis changes, so that total
    energies of long dynamics may drift. Frames and per-system statistics see the cell: energies per atom of a crystal
    in supercells of different size differ by some meV.

    Programs that drive calculators set no tags, or the same for all atoms; a model that was trained with OC20's then
    needs `tags="fixed"` and `adsorbate=...` (see `Predictor`, and docs/calculator.md).

    Changed tags are noticed here, but not by calculators of ASE that combine others: a SumCalculator keeps the results
    that it had before `atoms[-1].tag = 2`. Set tags first, or make a new one.

    Args:
        checkpoint: its file, its run's folder, its content, or a `Predictor`.
        options: of `Predictor`, unless that is given.
    """

    def __init__(self, checkpoint: Predictor | Mapping[str, Any] | str | Path, **options: Any):
        self._calculation = _Calculation()
        super().__init__()
        if isinstance(checkpoint, Predictor) and options:
            raise ValueError(f"{', '.join(options)}: give them to the Predictor")
        self.predictor = checkpoint if isinstance(checkpoint, Predictor) else Predictor(checkpoint, **options)
        energy = ["free_energy"] if "energy" in self.predictor.properties else []
        self.implemented_properties = [*energy, *self.predictor.properties]

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        frames: str | None = None,
        forces: str | None = None,
        precision: str | None = None,
        seed: int = 0,
        tags: str | None = None,
        adsorbate: Adsorbate = None,
        keep_net_force: bool = False,
    ) -> Self:
        """Calculator from a checkpoint file, in which nothing can run; arguments as for `Predictor`."""
        options: dict[str, Any] = {"device": device, "frames": frames, "forces": forces, "precision": precision}
        options |= {"tags": tags, "adsorbate": adsorbate}
        return cls(path, **options, seed=seed, keep_net_force=keep_net_force)

    @property
    def atoms(self) -> Atoms | None:
        """What the last calculation of this thread was of."""
        return self._calculation.atoms

    @atoms.setter
    def atoms(self, atoms: Atoms | None) -> None:
        self._calculation.atoms = atoms

    @property
    def results(self) -> dict[str, Any]:
        """What it gave."""
        return self._calculation.results

    @results.setter
    def results(self, results: dict[str, Any]) -> None:
        self._calculation.results = results

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Predicts everything for `atoms`; called by ASE."""
        super().calculate(atoms, properties, system_changes)
        structure: Atoms = self.atoms  # the parent has just set it
        (prediction,) = self.predictor([structure])
        energy = {"free_energy": prediction.energy} if "energy" in prediction.values else {}
        self.results = energy | dict(prediction.values)

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """As in ASE; says why there are no forces.

        Raises:
            PropertyNotImplementedError: the checkpoint does not predict this.
        """
        if name in ("energy", "forces") and name not in self.implemented_properties:
            raise PropertyNotImplementedError(
                f"{name}: this checkpoint (task {self.predictor.config.task}) predicts "
                f"{', '.join(self.predictor.properties)} only"
            )
        return super().get_property(name, atoms, allow_calculation)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last calculation; ASE itself looks at neither tags nor constraints."""
        changes = super().check_state(atoms, tol=tol)
        if self.atoms is not None and not np.array_equal(self.atoms.get_tags(), atoms.get_tags()):
            changes.append("tags")
        if self.atoms is not None and any(self.atoms.info.get(x) != atoms.info.get(x) for x in ("charge", "spin")):
            changes.append("info")  # some models read them
        if self.atoms is not None and not np.array_equal(fixed_atoms(self.atoms), fixed_atoms(atoms)):
            changes.append("constraints")  # they decide on tags ("fixed") and on the net force
        return changes
