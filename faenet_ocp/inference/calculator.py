"""A checkpoint as ASE's calculator; energies in eV, forces in eV/Angstrom."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes

from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.data.atoms import fixed_atoms
from faenet_ocp.inference.predictor import Predictor


class FAENetCalculator(Calculator):
    """ASE calculator of a checkpoint: all that it was trained on (energy; forces in S2EF; scalars that it declares).

    Forces of atoms that the checkpoint's transforms remove (sub-surface atoms) are zero, because the model does not
    see them: fix these atoms. With `frames="stochastic"` every new calculation draws new frames.

    Args:
        predictor: see `from_checkpoint` for the usual way.
    """

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.predictor = predictor
        self.implemented_properties = ["free_energy", *predictor.properties]

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
        keep_net_force: bool = False,
    ) -> Self:
        """Calculator from a checkpoint file, in which nothing can run; arguments as for `Predictor`."""
        options: dict[str, Any] = {"device": device, "frames": frames, "forces": forces, "precision": precision}
        return cls(Predictor(load_checkpoint(path), **options, seed=seed, keep_net_force=keep_net_force))

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
        self.results: dict[str, Any] = {"free_energy": prediction.energy, **prediction.values}
        if prediction.forces is not None and (~prediction.seen & ~fixed_atoms(structure)).any():
            self.predictor.warn_once(
                "the model does not see the atoms of tag 0 and predicts no forces on them (they are returned as "
                "zero), but not all of these atoms are fixed; fix them with ase.constraints.FixAtoms"
            )

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """As in ASE; says why there are no forces.

        Raises:
            PropertyNotImplementedError: the checkpoint does not predict this.
        """
        if name == "forces" and name not in self.implemented_properties:
            raise PropertyNotImplementedError(
                f"forces: this checkpoint was trained for {self.predictor.config.task.upper()} and predicts "
                f"{', '.join(self.predictor.properties)} only; forces need one of task s2ef"
            )
        return super().get_property(name, atoms, allow_calculation)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last calculation; ASE itself does not look at tags."""
        changes = super().check_state(atoms, tol=tol)
        if self.atoms is not None and not np.array_equal(self.atoms.get_tags(), atoms.get_tags()):
            changes.append("tags")
        return changes
