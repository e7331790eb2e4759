"""Transforms of a sample on its way out of the data set: AtomicData -> AtomicData, chosen in YAML.

    transforms: {remove_subsurface: {}, frame_averaging: {dim: 2, group: SE, method: stochastic}}

They run in the order of the file. Each is called with the sample and a generator that belongs to this sample and epoch
alone, the only source of randomness allowed. A transform of your own is a subclass of ``Transform`` with keyword-only
arguments, named by ``@register_transform("name")`` or by its dotted import path. Loading is faster with a subclass of
``BatchTransform``. If it adds a field to the sample, ``register_field`` says what that is.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor

from faenet_ocp.common.checks import choice, flag, nearest, parameters
from faenet_ocp.data.fields import level_of
from faenet_ocp.frames import DIMS, GROUPS, METHODS, compute_frames, pad_frames, random_rotations, rotate
from faenet_ocp.targets import TARGETS

TRANSFORMS: dict[str, type["Transform"]] = {}


class Transform(ABC):
    """Changes one sample; picklable, and deterministic given the generator."""

    @abstractmethod
    def __call__(self, data: AtomicData, generator: torch.Generator) -> AtomicData:
        """Return `data`, changed in place or replaced; ValueError if it cannot be."""


class BatchTransform(Transform):
    """A transform that changes any number of samples at once, each as if it were alone."""

    @abstractmethod
    def batch(self, data: AtomicData, generators: Sequence[torch.Generator]) -> AtomicData:
        """Return the batch `data`, changed in place or replaced; ValueError if one of its samples cannot be.

        Args:
            data: B systems.
            generators: (B,) one for each, as it would get alone.
        """

    def __call__(self, data: AtomicData, generator: torch.Generator) -> AtomicData:
        return self.batch(data, [generator])


def register_transform(name: str) -> Callable[[type[Transform]], type[Transform]]:
    """Class decorator: makes a transform known to YAML under `name`; a name that is taken is a ValueError."""

    def register(cls: type[Transform]) -> type[Transform]:
        known = TRANSFORMS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"transform {name!r} is already {known.__module__}.{known.__qualname__}")
        TRANSFORMS[name] = cls
        return cls

    return register


class Compose:
    """The transforms of a config, one after the other.

    Args:
        specs: name (or dotted import path) to keyword arguments, in the order in which they run; None for no arguments.

    Raises:
        ValueError: unknown name or argument (with the nearest that exists), or a value that the transform refuses.
    """

    def __init__(self, specs: Mapping[str, Mapping[str, Any] | None]):
        self.steps = [(name, _build(name, arguments or {})) for name, arguments in specs.items()]

    def __len__(self) -> int:
        return len(self.steps)

    def __call__(self, data: AtomicData, generator: torch.Generator) -> AtomicData:
        return self.apply(data, [generator])

    @property
    def takes_batches(self) -> bool:
        """Whether `apply` takes more than one sample; not if a transform changes samples in a way of its own."""
        return all(type(transform).__call__ is BatchTransform.__call__ for _, transform in self.steps)

    @property
    def removes_subsurface_first(self) -> bool:
        """Whether the first step is `RemoveSubsurface` as it is here: edges of these atoms need not be made."""
        return bool(self.steps) and type(self.steps[0][1]) is RemoveSubsurface

    def apply(self, data: AtomicData, generators: Sequence[torch.Generator]) -> AtomicData:
        """Transform all samples of `data`, each with its generator; one sample unless `takes_batches`."""
        for name, transform in self.steps:
            try:
                if isinstance(transform, BatchTransform) and len(generators) > 1:
                    data = transform.batch(data, generators)
                else:
                    data = transform(data, *generators)
                for field in data.keys():  # noqa: SIM118  # it is no dict
                    level_of(field)
            except ValueError as error:
                raise ValueError(f"transform {name}: {error}") from error
        return data


def _build(name: str, arguments: Mapping[str, Any]) -> Transform:
    cls = _find(name)
    if not isinstance(arguments, Mapping):
        raise ValueError(f"transforms.{name}: arguments must be a mapping, not {arguments!r}")
    allowed = parameters(cls)
    for key in arguments:
        if allowed is not None and key not in allowed:
            raise ValueError(f"transforms.{name}.{key}: unknown key{nearest(str(key), allowed)}")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"transforms.{name}: {error}") from error


def _find(name: str) -> type[Transform]:
    if name in TRANSFORMS:
        return TRANSFORMS[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"transforms.{name}: unknown transform{nearest(name, TRANSFORMS)}; or a dotted import path")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"transforms.{name}: cannot be imported: {error}") from error
    # A config must not be able to call just anything that can be imported.
    if not (isinstance(found, type) and issubclass(found, Transform)):
        raise ValueError(f"transforms.{name}: is no subclass of {Transform.__module__}.Transform")
    return found


@register_transform("remove_subsurface")
class RemoveSubsurface(BatchTransform):
    """Removes the atoms of tag 0 (below the surface) and their edges.

    The edges left are those of the full system's graph: atoms do not get new neighbours instead of the removed ones.
    Every per-atom field is cut; `composition` goes on counting the whole system, and `removed_free` (1,) says how many
    of the removed atoms were not fixed: forces on these are lost.
    """

    def batch(self, data: AtomicData, generators: Sequence[torch.Generator]) -> AtomicData:
        _require_no_frames(data)
        lost = (data.tags == 0) & (data.fixed == 0)
        data.removed_free = torch.bincount(data.batch[lost], minlength=len(data.natoms))
        return _keep_atoms(data, data.tags != 0)


def _keep_atoms(data: AtomicData, keep: Tensor) -> AtomicData:
    num_systems = len(data.natoms)
    natoms = torch.bincount(data.batch[keep], minlength=num_systems)
    if bool((natoms == 0).any()):
        raise ValueError("no atom would be left: all tags are 0")
    source, target = data.edge_index
    edges = torch.nonzero(keep[source] & keep[target]).view(-1)
    rows = {"atom": torch.nonzero(keep).view(-1), "edge": edges}
    new_index = torch.cumsum(keep, 0) - 1
    data.edge_index = torch.stack([new_index[source[edges]], new_index[target[edges]]])
    for name, value in data:
        if name != "edge_index" and (level := level_of(name)) in rows:
            data[name] = value.index_select(0, rows[level])
    data.natoms = natoms
    data.nedges = torch.bincount(data.batch[data.edge_index[1]], minlength=num_systems)
    return data


@register_transform("frame_averaging")
class FrameAveraging(BatchTransform):
    """Attaches the frames of the sample: frame_rot (1, K, 3, 3) and frame_weight (1, K).

    Positions stay as they are: the model rotates them. ``frames.compute_frames`` describes the arguments.
    """

    def __init__(self, *, dim: int = 3, group: str = "E", method: str = "stochastic", tolerance: float = 1e-3):
        self.dim, self.group = choice("dim", dim, DIMS), choice("group", group, GROUPS)
        self.method, self.tolerance = choice("method", method, METHODS), tolerance

    def batch(self, data: AtomicData, generators: Sequence[torch.Generator]) -> AtomicData:
        _require_no_frames(data)
        frames = compute_frames(
            data.pos,
            data.batch,
            len(data.natoms),
            method=self.method,
            dim=self.dim,
            group=self.group,
            atomic_numbers=data.atomic_numbers,
            generator=generators,
            tolerance=self.tolerance,
        )
        if self.method not in ("none", "stochastic"):
            frames = pad_frames(frames, dim=self.dim, group=self.group)
        data.frame_rot, data.frame_weight = frames
        return data


@register_transform("data_augmentation")
class DataAugmentation(BatchTransform):
    """Rotates the sample by a random rotation: positions, cell and vectors to predict, X' = X @ U.

    Args:
        dim: 3, or 2 to rotate about z only.
        reflect: reflect half of the samples as well.
    """

    def __init__(self, *, dim: int = 3, reflect: bool = False):
        self.dim, self.reflect = choice("dim", dim, DIMS), flag("reflect", reflect)

    def batch(self, data: AtomicData, generators: Sequence[torch.Generator]) -> AtomicData:
        _require_no_frames(data)
        frames = random_rotations(
            len(data.natoms),
            dim=self.dim,
            reflect=self.reflect,
            generator=generators,
            dtype=data.pos.dtype,
            device=data.pos.device,
        )
        rot = frames.rot[:, 0]
        data.pos = rotate(data.pos, rot[data.batch])
        data.cell = rotate(data.cell, rot)
        for target in TARGETS.values():
            if target.rank == 1 and target.name in data:
                data[target.name] = rotate(data[target.name], rot[data.batch])
        return data


def _require_no_frames(data: AtomicData) -> None:
    if "frame_rot" in data:
        raise ValueError("must come before frame_averaging: the frames belong to the atoms as they were")
