"""ASE's effective-medium theory (EMT), fast enough for thousands of relaxations, with bond springs.

Legend: N atoms, P pairs of atoms closer than the cutoff. Angstrom, eV, eV/A.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import ase
import numpy as np
import vesin
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT, beta
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

SPRING_CONSTANT = 15.0
_SKIN = 0.5


class Spring(NamedTuple):
    """Pulls two atoms together when they are farther apart than `start` (A)."""

    first: int
    second: int
    start: float


class PairEMT(EMT):
    """ASE's EMT with its loop over atoms replaced by arrays over pairs, and springs; no stress.

    Five times as fast on 40 atoms; energies and forces agree to rounding.

    Args:
        springs: springs between atoms, without periodic images.
    """

    implemented_properties = ("energy", "free_energy", "forces")

    def __init__(self, springs: Sequence[Spring] = ()) -> None:
        super().__init__()
        self._springs = tuple(springs)
        self._found: Array | None = None  # positions that the list of pairs was made for

    def check_state(self, atoms: ase.Atoms, tol: float = 0.0) -> list[str]:
        """Say what has changed, exactly; ASE's tolerant comparison takes half of a step's time."""
        old = self.atoms
        if old is None or not np.array_equal(old.numbers, atoms.numbers):
            return list(all_changes)
        pairs = {
            "positions": (old.positions, atoms.positions),
            "cell": (old.cell.array, atoms.cell.array),
            "pbc": (old.pbc, atoms.pbc),
        }
        return [name for name, (a, b) in pairs.items() if not np.array_equal(a, b)]

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Compute energy and forces."""
        Calculator.calculate(self, atoms, properties, system_changes)
        if "numbers" in system_changes:
            self.initialize(self.atoms)  # ASE's: the parameters of the elements
        if set(system_changes) - {"positions"}:
            self._found = None
        self._update_pairs()
        energy, forces = self._pair_sums()
        for spring in self._springs:
            vector = self.atoms.positions[spring.second] - self.atoms.positions[spring.first]
            length = float(np.linalg.norm(vector))
            stretch = max(length - float(spring.start), 0.0)
            energy += 0.5 * SPRING_CONSTANT * stretch**2
            pull = SPRING_CONSTANT * stretch * vector / length
            forces[spring.first] += pull
            forces[spring.second] -= pull
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}

    def _update_pairs(self) -> None:
        """Find all pairs within the cutoff plus a skin, unless the last list is still valid."""
        positions, cell = self.atoms.positions, self.atoms.cell.array
        if self._found is not None:
            moved = np.square(positions - self._found).sum(axis=1).max()
            if moved < (0.5 * _SKIN) ** 2:
                return
        finder = vesin.NeighborList(cutoff=self.rc_list + _SKIN, full_list=False, n_threads=1)
        first, second, shifts = finder.compute(positions, cell, self.atoms.pbc, "ijS")
        self._first, self._second = first.astype(np.intp), second.astype(np.intp)
        self._shifts = shifts @ cell
        self._found = positions.copy()

    def _pair_sums(self) -> tuple[float, Array]:
        """Energy and forces of EMT, every pair once; names as in `ase.calculators.emt`."""
        natoms, positions = len(self.atoms), self.atoms.positions
        vectors = positions[self._second] - positions[self._first] + self._shifts
        r = np.sqrt(np.einsum("pk,pk->p", vectors, vectors))
        near = r < self.rc_list
        i, j, vectors, r = self._first[near], self._second[near], vectors[near], r[near]
        par = {name: values[self.ia2iz] for name, values in self.par.items()}
        eta2, kappa, s0, lam = par["eta2"], par["kappa"], par["s0"], par["lambda"]
        chi = self.chi[self.ia2iz[i], self.ia2iz[j]]
        w = 1.0 / (1.0 + np.exp(self.acut * (r - self.rc)))
        dwdroverw = self.acut * (w - 1.0)

        # What j contributes to the density at i, and i to that at j.
        sigma1_i = np.exp(-eta2[j] * (r - beta * s0[j])) * chi * w
        sigma1_j = np.exp(-eta2[i] * (r - beta * s0[i])) / chi * w
        sigma1 = np.bincount(i, sigma1_i, natoms) + np.bincount(j, sigma1_j, natoms)
        sigma1 = np.maximum(sigma1, 1e-300)  # an isolated atom: its energy becomes -E0, as in ASE
        ds = -np.log(sigma1 * par["inv12gamma1"]) / (beta * eta2)
        decay = np.exp(-lam * ds)
        repulsion = 6.0 * par["V0"] * np.exp(-kappa * ds)
        # Cohesive function and correction, relative to the isolated atom (ASAP's convention).
        energy = (par["E0"] * ((1.0 + lam * ds) * decay - 1.0) + repulsion).sum()
        deds = (par["E0"] * lam**2 * ds * decay + kappa * repulsion) / (beta * eta2 * sigma1)

        pair_i = par["neghalfv0overgamma2"][i] * np.exp(-kappa[j] * (r / beta - s0[j])) * chi * w
        pair_j = par["neghalfv0overgamma2"][j] * np.exp(-kappa[i] * (r / beta - s0[i])) / chi * w
        energy += (pair_i + pair_j).sum()

        dedr = pair_i * (dwdroverw - kappa[j] / beta) + pair_j * (dwdroverw - kappa[i] / beta)
        dedr += deds[i] * sigma1_i * (dwdroverw - eta2[j])
        dedr += deds[j] * sigma1_j * (dwdroverw - eta2[i])
        pulls = (dedr / r)[:, None] * vectors
        forces = np.empty((natoms, 3))
        for axis in range(3):
            forces[:, axis] = np.bincount(i, pulls[:, axis], natoms)
            forces[:, axis] -= np.bincount(j, pulls[:, axis], natoms)
        return float(energy), forces
