"""A checkpoint's predictions for ASE's Atoms, of many structures at once.

Atoms go through the data set's own functions: the same graph, the checkpoint's transforms and frames; so an energy is
the one that `--mode validate` finds for the same system. Graphs are built anew in every call (about 2 ms for 50 atoms),
so there is no state that could be out of date.

Tags are OC20's: 0 sub-surface, 1 surface, 2 adsorbate. ASE's slab builders number layers instead, so set them. Frames
follow the positions as they are given: atoms are not wrapped into the cell. The arithmetic is always in the full
precision of the model, also for a checkpoint that was trained with bfloat16 autocast.

Energies in eV, forces in eV/Angstrom, positions in Angstrom; n atoms of one structure.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from numpy.typing import NDArray
from torch import Tensor

from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.common.checks import choice
from faenet_ocp.common.elements import MAX_ATOMIC_NUMBER, describe
from faenet_ocp.common.files import expand_path
from faenet_ocp.config.messages import without_removed
from faenet_ocp.config.schema import Config, build_config
from faenet_ocp.data.atoms import atoms_to_data, fixed_atoms
from faenet_ocp.data.fields import NUM_ELEMENTS
from faenet_ocp.data.oc20 import DTYPES
from faenet_ocp.data.tags import CHOICES, METAL, Adsorbate
from faenet_ocp.data.transforms import Compose
from faenet_ocp.evaluation.evaluator import load_model
from faenet_ocp.evaluation.validation import predict
from faenet_ocp.frames import METHODS, compute_frames
from faenet_ocp.models.embedding import AtomEmbedding
from faenet_ocp.tasks.references import fits_from_dict
from faenet_ocp.tasks.tasks import unseen_elements

logger = logging.getLogger(__name__)

FORCE_SOURCES = ("prediction", "energy_gradient")
_HOW_TO_TAG = (
    "set OC20's tags with atoms.set_tags([...]): 0 for atoms below the surface, 1 for the surface, 2 for the adsorbate "
    "(ASE's slab builders number the layers instead; for a molecule use 2), or give the predictor tags='fixed' and "
    "adsorbate=..."
)


@dataclass(frozen=True)
class Prediction:
    """What the model says of one structure.

    Attributes:
        values: by name, in the units of `targets`: a number for a property of the system, (n,) or (n, 3) float64 for
            one of the atoms, zero where `seen` is False.
        seen: (n,) bool, False for atoms that the checkpoint's transforms remove (sub-surface atoms).
    """

    values: Mapping[str, Any]
    seen: NDArray[np.bool_]

    @property
    def energy(self) -> float:
        """In eV; nan if the checkpoint predicts none."""
        return self.values.get("energy", np.nan)

    @property
    def forces(self) -> NDArray[np.float64] | None:
        """(n, 3) eV/Angstrom, None if the checkpoint predicts none."""
        return self.values.get("forces")


class Predictor:
    """The model of a checkpoint with all that stands between Atoms and its predictions.

    Args:
        state: a checkpoint: its file, the folder of its run (whose best one is taken), or its content
            (`checkpoint.load_checkpoint`); its EMA weights are used where it has them.
        device: None takes a GPU if there is one.
        frames: full, canonical, det, stochastic or none. None takes what the checkpoint is evaluated with, but
            canonical in place of stochastic, whose energies would differ from call to call.
        forces: prediction (of the force head) or energy_gradient (-dE/dX, energy conserving); None takes what the
            checkpoint is evaluated with. Checkpoints without forces have neither.
        precision: float32 or float64; None takes the checkpoint's.
        seed: of stochastic frames and of random transforms; they have a generator of their own.
        tags: "file" takes the structures' own tags, which have to be OC20's; "fixed" makes 0 of fixed atoms and 1 of
            the others; "none" leaves them out. None: what the checkpoint was trained with (`dataset.tags`, or file) if
            the model embeds tags or its sub-surface atoms are removed, else none.
        adsorbate: which atoms get tag 2 whatever the rest is: indices, a function of the structure, or "metal", see
            `data.tags.adsorbate_of`; None: `tags` alone decides, or where that is not given either, what the checkpoint
            was trained with (`dataset.adsorbate`).
        keep_net_force: leave predicted forces as they are. Otherwise the mean force is taken out of systems that the
            model sees without any fixed atom, see `without_net_force`.

    Attributes:
        properties: names of what is predicted, e.g. ("energy", "forces").

    Raises:
        ValueError: an argument that is not one of the above, a device that is not there, or a checkpoint that cannot be
            read or does not fit its own configuration.
    """

    def __init__(
        self,
        state: Mapping[str, Any] | str | Path,
        *,
        device: str | torch.device | None = None,
        frames: str | None = None,
        forces: str | None = None,
        precision: str | None = None,
        seed: int = 0,
        tags: str | None = None,
        adsorbate: Adsorbate = None,
        keep_net_force: bool = False,
    ):
        self.device = _usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if isinstance(state, str | Path):
            state = load_checkpoint(checkpoint_file(state))
        if not isinstance(state, Mapping) or "config" not in state:
            raise ValueError(
                f"checkpoint: its file, its run's folder or its content is wanted, not {type(state).__name__}; "
                "structures come later: Predictor('runs/x/checkpoints/best.pt')([atoms])"
            )
        trained = build_config(without_removed(state["config"]))
        self.config = config = _inference_config(trained, frames, forces, precision)
        self.model, self.tasks = load_model(state, config, self.device)
        self.model.eval().requires_grad_(False)
        embeddings = [module for module in self.model.modules() if isinstance(module, AtomEmbedding)]
        self._known_elements = torch.arange(NUM_ELEMENTS) > 0
        for embedding in embeddings:
            self._known_elements &= embedding.known_elements.cpu()
        self._reads_tags = any(embedding.tag is not None for embedding in embeddings)
        self.properties = config.properties
        self.conservative = config.output("forces").eval_from == "energy_gradient"
        transforms = config.dataset.active_transforms
        self.transforms, self._removes_subsurface = Compose(transforms), "remove_subsurface" in transforms
        self.tags, self.adsorbate = self._choice_of_tags(tags, adsorbate), adsorbate
        if tags is None and adsorbate is None and self.tags != "none":
            self.adsorbate = config.dataset.adsorbate
        self.generator = torch.Generator().manual_seed(seed)
        self.keep_net_force = keep_net_force
        self._unseen_elements = unseen_elements(self.tasks, fits_from_dict(state.get("statistics")))
        self._warned: set[str] = set()

    @property
    def _trained_on_adsorbates(self) -> bool:
        dataset = self.config.dataset
        return dataset.tags != "fixed" or dataset.adsorbate is not None

    def _choice_of_tags(self, tags: str | None, adsorbate: Adsorbate) -> str:
        needs_tags = self._reads_tags or self._removes_subsurface
        if isinstance(adsorbate, str):
            choice("adsorbate", adsorbate, (METAL,))
        if tags is None:
            tags = (self.config.dataset.tags or "file") if needs_tags else "none"
        if choice("tags", tags, CHOICES) == "none" and needs_tags:
            raise ValueError("tags: none, but the checkpoint's model embeds tags or works without atoms of tag 0")
        if tags == "none" and adsorbate is not None:
            raise ValueError(f"adsorbate: {adsorbate!r} has no meaning with tags: none, or a model that needs no tags")
        return tags

    def __call__(self, structures: Iterable[Atoms]) -> list[Prediction]:
        """Predictions of several structures in one forward pass; they do not depend on each other.

        Raises:
            ValueError: no structures, or one that the model cannot take, with the reason.
        """
        structures = _checked_list(structures)
        samples = [self._named_sample(atoms) for atoms in structures]
        batch = atomicdata_list_to_batch(samples)
        if self.config.frames.evaluation_method == "stochastic":  # of the other kinds the model makes its own
            batch.frame_rot, batch.frame_weight = compute_frames(
                batch.pos, batch.batch, len(samples), generator=self.generator, **self.model.frames
            )
        ((_, physical, _),) = predict(self.model, self.tasks, [batch], conservative=self.conservative)
        if "forces" in physical and not self.keep_net_force:
            physical["forces"] = without_net_force(physical["forces"], batch.fixed, batch.batch, len(samples))
        outputs = {name: value.detach().double().cpu() for name, value in physical.items()}
        levels = {target.name: target.level for target in self.config.targets}
        natoms = [len(sample.pos) for sample in samples]
        parts = {
            name: value.split(natoms) if levels[name] == "atom" else value.tolist() for name, value in outputs.items()
        }
        predictions = [
            _prediction(len(atoms), sample.atom_id.numpy(), {name: values[place] for name, values in parts.items()})
            for place, (atoms, sample) in enumerate(zip(structures, samples, strict=True))
        ]
        for atoms, prediction in zip(structures, predictions, strict=True):
            if prediction.forces is not None and (~prediction.seen & ~fixed_atoms(atoms)).any():
                self._warn_once(
                    "the model does not see the atoms of tag 0 and predicts no forces on them (they are returned as "
                    "zero), but not all of these atoms are fixed; fix them with ase.constraints.FixAtoms"
                )
        return predictions

    def _named_sample(self, atoms: Atoms) -> AtomicData:
        try:
            return self.sample(atoms)
        except ValueError as error:
            raise ValueError(f"{_name(atoms)}: {error}") from error

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
            tags=self.tags,
            adsorbate=self.adsorbate,
            dtype=DTYPES[self.config.job.precision],
            dataset=self.config.dataset.name,
        )
        if self._reads_tags or self._removes_subsurface:
            self._check_tags(atoms, data.tags.numpy())
        if bool((unseen := (data.composition[0] > 0) & self._unseen_elements).any()):
            names = ", ".join(describe(number) for number in unseen.nonzero().flatten().tolist())
            self._warn_once(
                f"{atoms.get_chemical_formula()}: has elements that the training set did not have: {names}; they count "
                "as 0 in fitted element references, and the model has not learned them"
            )
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

    def _check_tags(self, atoms: Atoms, tags: NDArray[np.int64]) -> None:
        if not tags.any() and self._removes_subsurface:
            raise ValueError(
                "all tags are 0, and this checkpoint works without atoms of tag 0 (its transform remove_subsurface): "
                f"nothing would be left; {_HOW_TO_TAG}"
            )
        objection = _doubt_about_tags(atoms, tags, has_adsorbates=self._trained_on_adsorbates)
        if objection is not None:
            self._warn_once(f"{objection}; {_HOW_TO_TAG}", of=_name(atoms))

    def _knows(self, atomic_number: int) -> bool:
        return 0 < atomic_number <= MAX_ATOMIC_NUMBER and bool(self._known_elements[atomic_number])

    def _warn_once(self, message: str, of: str = "") -> None:
        """Logs a warning, the first time that it comes up, with the structure that it came up for."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s: %s", of, message) if of else logger.warning(message)


def checkpoint_file(path: str | Path) -> Path:
    """The file meant by a path, which may be the folder of a run; `~` and variables are expanded."""
    path = Path(expand_path(path))
    best = path / "checkpoints" / "best.pt"
    return best if best.is_file() else path


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        count = torch.cuda.device_count()
        raise ValueError(f"device: {str(device)!r} cannot be used here, with {count} GPUs: {reason}") from error
    return torch.device(device)


def _checked_list(structures: Iterable[Atoms]) -> list[Atoms]:
    wanted = "structures: a list of ase.Atoms is wanted, as in predictor([atoms])"
    if isinstance(structures, Atoms) or not isinstance(structures, Iterable):
        raise ValueError(f"{wanted}, not {type(structures).__name__}")
    found = list(structures)
    if not found:
        raise ValueError(f"{wanted}, but there is nothing in it")
    other = [item for item in found if not isinstance(item, Atoms)]
    if other:
        raise ValueError(f"{wanted}, but {type(other[0]).__name__} is in it")
    return found


def _name(atoms: Atoms) -> str:
    sid = f" (sid {atoms.info['sid']})" if "sid" in atoms.info else ""
    return f"structure of {len(atoms)} atoms{sid}"


def _doubt_about_tags(atoms: Atoms, tags: NDArray[np.int64], *, has_adsorbates: bool) -> str | None:
    """What makes it unlikely that the tags are OC20's; `has_adsorbates`: the training set had atoms of tag 2."""
    if not tags.any():
        return "all tags are 0, so the model takes every atom for one below the surface"
    if has_adsorbates and not (tags == 2).any():
        return "no atom has tag 2, which is right for a clean slab only"
    if tags.min() == 1:
        return "no atom has tag 0, though slabs of OC20 have fixed atoms below the surface"
    if not (tags == 2).any():
        return None
    normal = np.cross(atoms.cell[0], atoms.cell[1])
    if not normal.any():
        normal = np.array([0.0, 0.0, 1.0])
    heights = atoms.positions @ (normal if normal @ atoms.cell[2] >= 0 else -normal)
    if (tags == 1).any() and heights[tags == 2].max() <= heights[tags == 1].mean():
        return "no atom of tag 2, the adsorbate, lies above those of tag 1, the surface"
    return None


def without_net_force(forces: Tensor, fixed: Tensor, batch: Tensor, num_systems: int) -> Tensor:
    """Forces (N, 3) less their mean over a system, where the model sees no fixed atom of it.

    The energy does not change when all atoms that the model sees move together, so the forces of its gradient add up to
    zero; predicted ones do not, and would push adsorbate and surface along together without end. Where fixed atoms are
    among those that the model sees, they take up the net force.

    Args:
        forces: eV/Angstrom, of the atoms that the model sees.
        fixed: (N,), not zero for fixed atoms.
        batch: system of every atom, (N,).
        num_systems: B.
    """
    zeros = forces.new_zeros(num_systems, 3)
    count = forces.new_zeros(num_systems).index_add(0, batch, torch.ones_like(forces[:, 0]))
    held = forces.new_zeros(num_systems).index_add(0, batch, (fixed != 0).to(forces))
    mean = zeros.index_add(0, batch, forces) / count.clamp(min=1).unsqueeze(1)
    return forces - mean.where(held.unsqueeze(1) == 0, zeros)[batch]


def _prediction(num_atoms: int, atom_id: NDArray[np.int64], values: Mapping[str, float | Tensor]) -> Prediction:
    """Puts the values of the atoms that the model saw (m of n) in their places."""
    seen = np.zeros(num_atoms, dtype=bool)
    seen[atom_id] = True
    placed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            placed[name] = np.zeros((num_atoms, *value.shape[1:]))
            placed[name][atom_id] = value.numpy()
        else:
            placed[name] = value
    return Prediction(placed, seen)


def _inference_config(config: Config, frames: str | None, forces: str | None, precision: str | None) -> Config:
    """The checkpoint's configuration with what is asked for instead of what it is evaluated with."""
    if frames is None:
        frames = config.frames.evaluation_method
        frames = "canonical" if frames == "stochastic" else frames
    precision = choice("precision", precision or config.job.precision, tuple(DTYPES))
    update: dict[str, Any] = {
        "frames": config.frames.model_copy(update={"eval_method": choice("frames", frames, METHODS)}),
        "job": config.job.model_copy(update={"precision": precision, "amp": False}),
    }
    if forces is not None:
        if "forces" not in config.properties:
            raise ValueError(f"forces: {forces!r}, but the checkpoint (task {config.task}) predicts no forces")
        output = config.output("forces").model_copy(update={"eval_from": choice("forces", forces, FORCE_SOURCES)})
        update["outputs"] = config.outputs | {"forces": output}
    config = config.model_copy(update=update)
    if frames == "stochastic" and config.output("forces").eval_from == "energy_gradient":
        raise ValueError("forces: energy_gradient conserves no energy with frames that change from call to call")
    return config
