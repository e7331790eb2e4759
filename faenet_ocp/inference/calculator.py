"""A checkpoint's predictions for ASE's Atoms: of many at once (`Predictor`), and as a calculator.

Atoms go through the data set's own functions: the graph of `graph.build_graph`, the checkpoint's transforms, its
frames; so an energy is the one that `--mode validate` finds for the same system. Graphs are built anew in every call
(about 2 ms for 50 atoms, half of it the cut to `max_neighbors` that a cached list would need as well), so there is no
state that could be out of date.

Tags are OC20's: 0 sub-surface, 1 surface, 2 adsorbate. ASE's slab builders number layers instead, so set them. Frames
follow the positions as they are given: atoms are not wrapped into the cell. The arithmetic is always in the full
precision of the model, also for a checkpoint that was trained with bfloat16 autocast.

Energies in eV, forces in eV/Angstrom, positions in Angstrom; n atoms of one structure.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.constraints import FixAtoms
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from numpy.typing import NDArray

from faenet_ocp import build
from faenet_ocp.checkpoint import load_checkpoint, load_weights
from faenet_ocp.common.elements import MAX_ATOMIC_NUMBER, describe
from faenet_ocp.config.schema import Config, build_config, nearest, without_removed
from faenet_ocp.data.oc20 import DTYPES, NUM_ELEMENTS
from faenet_ocp.data.transforms import Compose
from faenet_ocp.frames import METHODS, compute_frames
from faenet_ocp.graph.neighbors import build_graph
from faenet_ocp.models.base import NUM_TAGS
from faenet_ocp.models.embedding import AtomEmbedding
from faenet_ocp.tasks.references import CompositionFit
from faenet_ocp.tasks.tasks import conservative_outputs, load_tasks_state, make_tasks, tasks_to_device, to_physical

logger = logging.getLogger(__name__)

FORCE_SOURCES = ("prediction", "energy_gradient")
_HOW_TO_TAG = (
    "set OC20's tags with atoms.set_tags([...]): 0 for atoms below the surface, 1 for the surface, 2 for the adsorbate "
    "(ASE's slab builders number the layers instead; for a molecule use 2)"
)


class Prediction(NamedTuple):
    """What the model says of one structure.

    Attributes:
        energy: eV.
        forces: (n, 3) eV/Angstrom, None if the checkpoint predicts energies only. Zero where `seen` is False.
        seen: (n,) bool, False for atoms that the checkpoint's transforms remove (sub-surface atoms).
    """

    energy: float
    forces: NDArray[np.float64] | None
    seen: NDArray[np.bool_]


class Predictor:
    """The model of a checkpoint with all that stands between Atoms and its predictions.

    Args:
        state: content of a checkpoint (`checkpoint.load_checkpoint`); its EMA weights are used where it has them.
        device: None takes a GPU if there is one.
        frames: full, canonical, det, stochastic or none. None takes what the checkpoint is evaluated with, but
            canonical in place of stochastic, whose energies would differ from call to call.
        forces: prediction (of the force head) or energy_gradient (-dE/dX, energy conserving); None takes what the
            checkpoint is evaluated with. Checkpoints without forces have neither.
        precision: float32 or float64; None takes the checkpoint's.
        seed: of stochastic frames and of random transforms; they have a generator of their own.

    Attributes:
        properties: what is predicted, ("energy",) or ("energy", "forces").

    Raises:
        ValueError: an argument that is not one of the above, or a checkpoint that does not fit its own configuration.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        *,
        device: str | torch.device | None = None,
        frames: str | None = None,
        forces: str | None = None,
        precision: str | None = None,
        seed: int = 0,
    ):
        trained = build_config(without_removed(state["config"]))
        self.config = config = _inference_config(trained, frames, forces, precision)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with torch.random.fork_rng(devices=[]):  # the initial weights, replaced below, are drawn after seeding
            self.model = build.make_model(config)
        load_weights(self.model, state)
        embeddings = [module for module in self.model.modules() if isinstance(module, AtomEmbedding)]
        self._known_elements = torch.arange(NUM_ELEMENTS) > 0
        for embedding in embeddings:
            self._known_elements &= embedding.known_elements.cpu()
        self._reads_tags = any(embedding.tag is not None for embedding in embeddings)
        self.model.to(self.device).eval().requires_grad_(False)
        self.tasks = make_tasks(config.model_copy(update={"outputs": {}}), None)
        load_tasks_state(self.tasks, state["tasks"])
        tasks_to_device(self.tasks, self.device)
        self.properties = config.properties
        self.conservative = config.output("forces").eval_from == "energy_gradient"
        transforms = {name: given or {} for name, given in config.dataset.transforms.items() if given is not False}
        self.transforms = Compose(transforms)
        self._removes_subsurface = "remove_subsurface" in transforms
        self.generator = torch.Generator().manual_seed(seed)
        statistics = state.get("statistics")
        self._training_set = CompositionFit.from_dict(statistics) if statistics else None
        self._warned: set[str] = set()

    @torch.no_grad()
    def __call__(self, structures: Sequence[Atoms]) -> list[Prediction]:
        """Predictions of several structures in one forward pass; they do not depend on each other.

        Raises:
            ValueError: a structure that the model cannot take, with the reason.
        """
        samples = [self._named_sample(atoms) for atoms in structures]
        batch = atomicdata_list_to_batch(samples).to(self.device)
        if self.config.frames.evaluation_method == "stochastic":  # of the other kinds the model makes its own
            batch.frame_rot, batch.frame_weight = compute_frames(
                batch.pos, batch.batch, len(samples), generator=self.generator, **self.model.frames
            )
        raw = conservative_outputs(self.model, self.tasks, batch) if self.conservative else self.model(batch)
        outputs = to_physical(self.tasks, raw, batch)
        energies = outputs["energy"].detach().double().cpu().numpy()
        forces: Sequence[torch.Tensor | None] = [None] * len(samples)
        if "forces" in outputs:
            forces = outputs["forces"].double().cpu().split([len(sample.pos) for sample in samples])
        parts = zip(structures, samples, energies, forces, strict=True)
        return [_prediction(len(atoms), sample.atom_id.numpy(), energy, part) for atoms, sample, energy, part in parts]

    def _named_sample(self, atoms: Atoms) -> AtomicData:
        try:
            return self.sample(atoms)
        except ValueError as error:
            name = f" (sid {atoms.info['sid']})" if "sid" in atoms.info else ""
            raise ValueError(f"structure of {len(atoms)} atoms{name}: {error}") from error

    def sample(self, atoms: Atoms) -> AtomicData:
        """Structure to model input, as the data set makes it of a record.

        Raises:
            ValueError: no atoms, an element the model does not know, positions that are not finite, an impossible cell,
                or tags that are not OC20's where the checkpoint needs them.
        """
        self._check(atoms)
        data = atoms_to_data(
            atoms,
            cutoff=self.model.cutoff,
            max_neighbors=self.model.max_neighbors,
            dtype=DTYPES[self.config.job.precision],
            dataset=self.config.dataset.name,
        )
        if self._training_set is not None and bool(self._training_set.unseen(data.composition)):
            self._warn_once(f"{atoms.get_chemical_formula()}: has elements that the training set did not have")
        if not len(self.transforms):
            return data
        pos = data.pos
        data = self.transforms(data, self.generator)
        if not torch.equal(data.pos, pos[data.atom_id]):
            raise ValueError("a transform of the checkpoint moves atoms; its forces would belong to other positions")
        return data

    def _check(self, atoms: Atoms) -> None:
        if len(atoms) == 0:
            raise ValueError("the structure has no atoms")
        bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
        if len(bad):
            raise ValueError(f"positions of atoms {bad[:10].tolist()} are not finite")
        unknown = [z for z in np.unique(atoms.numbers).tolist() if not self._knows(z)]
        if unknown:
            raise ValueError(f"the model does not know {', '.join(describe(z) for z in unknown)}")
        tags = atoms.get_tags()
        strange = sorted(set(tags.tolist()) - set(range(NUM_TAGS)))
        if strange:
            raise ValueError(f"tags {strange} are not among OC20's; {_HOW_TO_TAG}")
        if not tags.any() and self._removes_subsurface:
            raise ValueError(
                "all tags are 0 (atoms.get_tags()), and this checkpoint works without atoms of tag 0 (its transform "
                f"remove_subsurface): nothing would be left; {_HOW_TO_TAG}"
            )
        if not tags.any() and self._reads_tags:
            self._warn_once(f"all tags are 0, so the model takes every atom for one below the surface; {_HOW_TO_TAG}")

    def _knows(self, atomic_number: int) -> bool:
        return 0 < atomic_number <= MAX_ATOMIC_NUMBER and bool(self._known_elements[atomic_number])

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


class FAENetCalculator(Calculator):
    """ASE calculator of a checkpoint: energy, and forces if it was trained on them (S2EF).

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
    ) -> Self:
        """Calculator from a checkpoint file, in which nothing can run; arguments as for `Predictor`."""
        state = load_checkpoint(path)
        return cls(Predictor(state, device=device, frames=frames, forces=forces, precision=precision, seed=seed))

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
        self.results: dict[str, Any] = {"energy": prediction.energy, "free_energy": prediction.energy}
        if prediction.forces is not None:
            self.results["forces"] = prediction.forces
            if (~prediction.seen & ~fixed_atoms(structure)).any():
                self.predictor._warn_once(
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


def atoms_to_data(
    atoms: Atoms, *, cutoff: float, max_neighbors: int, dtype: torch.dtype = torch.float32, dataset: str = "oc20"
) -> AtomicData:
    """Atoms to a sample with the fields of `lmdb_dataset.OC20LmdbDataset`, before transforms.

    Args:
        atoms: any structure; positions are taken as they are. Atoms in a FixAtoms constraint are `fixed`.
        cutoff, max_neighbors: see `graph.build_graph`.
        dtype: of positions; the graph is that of the positions in this precision.
        dataset: name of the data set.

    Returns:
        the sample; `atom_id` (n,) numbers its atoms.
    """
    pos = torch.tensor(atoms.positions, dtype=dtype)
    cell = torch.tensor(atoms.cell.array, dtype=dtype).view(1, 3, 3)
    pbc = torch.tensor(atoms.pbc).view(1, 3)
    edge_index, cell_offsets = build_graph(pos, cell, pbc, cutoff=cutoff, max_neighbors=max_neighbors)
    atomic_numbers = torch.tensor(atoms.numbers, dtype=torch.long)
    data = AtomicData(
        pos=pos,
        atomic_numbers=atomic_numbers,
        cell=cell,
        pbc=pbc,
        natoms=torch.tensor([len(atoms)]),
        edge_index=edge_index,
        cell_offsets=cell_offsets,
        nedges=torch.tensor([edge_index.shape[1]]),
        charge=torch.zeros(1, dtype=torch.long),
        spin=torch.zeros(1, dtype=torch.long),
        tags=torch.tensor(atoms.get_tags(), dtype=torch.long),
        fixed=torch.tensor(fixed_atoms(atoms), dtype=torch.long),
        sid=[str(atoms.info.get("sid", ""))],
    )
    data.fid = torch.tensor([-1])
    data.dataset = dataset  # see lmdb_dataset: the constructor would make a list of it
    data.composition = torch.bincount(atomic_numbers, minlength=NUM_ELEMENTS).view(1, -1).float()
    data.atom_id = torch.arange(len(atoms))
    return data


def fixed_atoms(atoms: Atoms) -> NDArray[np.bool_]:
    """Which atoms a FixAtoms constraint holds, (n,) bool."""
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            fixed[constraint.index] = True
    return fixed


def _prediction(num_atoms: int, atom_id: NDArray[np.int64], energy: float, forces: torch.Tensor | None) -> Prediction:
    """Puts the values of the atoms that the model saw (m of n) in their places."""
    seen = np.zeros(num_atoms, dtype=bool)
    seen[atom_id] = True
    if forces is None:
        return Prediction(float(energy), None, seen)
    placed = np.zeros((num_atoms, 3))
    placed[atom_id] = forces.numpy()
    return Prediction(float(energy), placed, seen)


def _inference_config(config: Config, frames: str | None, forces: str | None, precision: str | None) -> Config:
    """The checkpoint's configuration with what is asked for instead of what it is evaluated with."""
    if frames is None:
        frames = config.frames.evaluation_method
        frames = "canonical" if frames == "stochastic" else frames
    _choice("frames", frames, METHODS)
    precision = _choice("precision", precision or config.job.precision, tuple(DTYPES))
    update: dict[str, Any] = {
        "frames": config.frames.model_copy(update={"eval_method": frames}),
        "job": config.job.model_copy(update={"precision": precision, "amp": False}),
    }
    if forces is not None:
        if "forces" not in config.properties:
            raise ValueError(f"forces: {forces!r}, but the checkpoint (task {config.task}) predicts no forces")
        output = config.output("forces").model_copy(update={"eval_from": _choice("forces", forces, FORCE_SOURCES)})
        update["outputs"] = config.outputs | {"forces": output}
    config = config.model_copy(update=update)
    if frames == "stochastic" and config.output("forces").eval_from == "energy_gradient":
        raise ValueError("forces: energy_gradient conserves no energy with frames that change from call to call")
    return config


def _choice(key: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{key}: {value!r} is not known{nearest(value, allowed)}")
    return value
