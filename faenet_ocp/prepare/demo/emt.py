"""ASE's effective-medium theory (EMT), fast enough for thousands of relaxations, with bond springs. A, eV, eV/A."""

from collections.abc import Sequence
from typing import Any

import ase
import numpy as np
import vesin
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT, beta
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

SPRING_CONSTANT = 15.0


Spring = tuple[int, int, float]
"""Two atoms that are pulled together when they are farther apart than a length (A)."""


class PairEMT(EMT):
    """ASE's EMT with its loop over atoms replaced by arrays over pairs, and springs without images; no stress.

    Several times as fast on 40 atoms; energies and forces agree to rounding.
    """

    implemented_properties = ("energy", "free_energy", "forces")

    def __init__(self, springs: Sequence[Spring] = ()) -> None:
        super().__init__()
        self._springs = springs

    def check_state(self, atoms: ase.Atoms, tol: float = 0.0) -> list[str]:
        """Say what has changed, exactly; ASE's tolerant comparison takes half of a step's time."""
        if self.atoms is None or not np.array_equal(self.atoms.numbers, atoms.numbers):
            return list(all_changes)
        return [] if self.atoms == atoms else ["positions", "cell", "pbc"]

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        """Compute energy and forces."""
        Calculator.calculate(self, atoms, properties, system_changes)
        if "numbers" in system_changes:
            self.initialize(self.atoms)  # ASE's: the parameters of the elements
        energy, forces = self._pair_sums()
        for first, second, start in self._springs:
            vector = self.atoms.positions[second] - self.atoms.positions[first]
            length = float(np.linalg.norm(vector))
            stretch = max(length - start, 0.0)
            energy += 0.5 * SPRING_CONSTANT * stretch**2
            forces[[first, second]] += SPRING_CONSTANT * stretch / length * np.array([vector, -vector])
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}

    def _pair_sums(self) -> tuple[float, Array]:
        """Energy and forces of EMT, every pair once; names as in `ase.calculators.emt`."""
        finder = vesin.NeighborList(cutoff=self.rc_list, full_list=False, n_threads=1)
        atoms = self.atoms
        i, j, r, vectors = finder.compute(atoms.positions, atoms.cell.array, atoms.pbc, "ijdD")
        i, j = i.astype(np.intp), j.astype(np.intp)
        par = {name: values[self.ia2iz] for name, values in self.par.items()}
        eta2, kappa, s0, lam = (par[name] for name in ("eta2", "kappa", "s0", "lambda"))
        chi = par["n0"][j] / par["n0"][i]
        w = 1.0 / (1.0 + np.exp(self.acut * (r - self.rc)))
        dwdroverw = self.acut * (w - 1.0)

        # What j contributes to the density at i, and i to that at j. An isolated atom's energy becomes -E0, as in ASE.
        sigma1_i = np.exp(-eta2[j] * (r - beta * s0[j])) * chi * w
        sigma1_j = np.exp(-eta2[i] * (r - beta * s0[i])) / chi * w
        sigma1 = np.bincount(i, sigma1_i, len(atoms)) + np.bincount(j, sigma1_j, len(atoms))
        sigma1 = np.maximum(sigma1, 1e-300)
        ds = -np.log(sigma1 * par["inv12gamma1"]) / (beta * eta2)
        decay = par["E0"] * np.exp(-lam * ds)
        repulsion = 6.0 * par["V0"] * np.exp(-kappa * ds)
        pair_i = par["neghalfv0overgamma2"][i] * np.exp(-kappa[j] * (r / beta - s0[j])) * chi * w
        pair_j = par["neghalfv0overgamma2"][j] * np.exp(-kappa[i] * (r / beta - s0[i])) / chi * w
        energy = ((1.0 + lam * ds) * decay - par["E0"] + repulsion).sum() + (pair_i + pair_j).sum()

        deds = (lam**2 * ds * decay + kappa * repulsion) / (beta * eta2 * sigma1)
        dedr = pair_i * (dwdroverw - kappa[j] / beta) + pair_j * (dwdroverw - kappa[i] / beta)
        dedr += deds[i] * sigma1_i * (dwdroverw - eta2[j]) + deds[j] * sigma1_j * (dwdroverw - eta2[i])
        pulls = (dedr / r)[:, None] * vectors
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, i, pulls)
        np.subtract.at(forces, j, pulls)
        return float(energy), forces
