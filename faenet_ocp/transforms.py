"""Transforms of a sample on its way out of the data set: AtomicData -> AtomicData, chosen in YAML.

    transforms: {remove_subsurface: {}, frame_averaging: {dim: 2, group: SE, method: stochastic}}

They run in the order of the file. Each is called with the sample and a generator that belongs to this sample and epoch
alone, the only source of randomness allowed. A transform of your own is a subclass of ``Transform`` with keyword-only
arguments, named by ``@register_transform("name")`` or by its dotted import path.
"""

import difflib
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor

from faenet_ocp.frames import DIMS, GROUPS, METHODS, compute_frames, random_rotations, rotate

TRANSFORMS: dict[str, type["Transform"]] = {}


class Transform(ABC):
    """Changes one sample; picklable, and deterministic given the generator."""

    @abstractmethod
    def __call__(self, data: AtomicData, generator: torch.Generator) -> AtomicData:
        """Return `data`, changed in place or replaced; ValueError if it cannot be."""


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
        for name, transform in self.steps:
            try:
                data = transform(data, generator)
            except ValueError as error:
                raise ValueError(f"transform {name}: {error}") from error
        return data


def _build(name: str, arguments: Mapping[str, Any]) -> Transform:
    cls = _find(name)
    if not isinstance(arguments, Mapping):
        raise ValueError(f"transforms.{name}: arguments must be a mapping, not {arguments!r}")
    allowed = list(inspect.signature(cls).parameters)
    for key in arguments:
        if key not in allowed:
            raise ValueError(f"transforms.{name}.{key}: unknown key; {_suggestion(str(key), allowed)}")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"transforms.{name}: {error}") from error


def _find(name: str) -> type[Transform]:
    if name in TRANSFORMS:
        return TRANSFORMS[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"transforms.{name}: unknown transform; {_suggestion(name, list(TRANSFORMS))}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"transforms.{name}: cannot be imported: {error}") from error
    # A config must not be able to call just anything that can be imported.
    if not (inspect.isclass(found) and issubclass(found, Transform)):
        raise ValueError(f"transforms.{name}: is no subclass of {Transform.__module__}.Transform")
    return found


def _suggestion(name: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(sorted(allowed)) or 'none'}"


@register_transform("remove_subsurface")
class RemoveSubsurface(Transform):
    """Removes the atoms of tag 0 (below the surface) and their edges.

    The edges left are those of the full system's graph: atoms do not get new neighbours instead of the removed ones.
    Every per-atom field is cut; `composition` goes on counting the whole system.
    """

    def __call__(self, data: AtomicData, generator: torch.Generator) -> AtomicData:
        _require_no_frames(data)
        keep = data.tags != 0
        if not bool(keep.any()):
            raise ValueError("no atom would be left: all tags are 0")
        return _keep_atoms(data, keep)


def _keep_atoms(data: AtomicData, keep: Tensor) -> AtomicData:
    num_atoms = len(keep)
    edge_kept = keep[data.edge_index].all(dim=0)
    new_index = torch.cumsum(keep, 0) - 1
    edges = {"edge_index": new_index[data.edge_index[:, edge_kept]], "cell_offsets": data.cell_offsets[edge_kept]}
    for name, value in data:
        # Fields of the system have a leading dimension of 1, which only a one-atom system (kept whole) shares.
        if name not in edges and isinstance(value, Tensor) and value.dim() > 0 and len(value) == num_atoms:
            data[name] = value[keep]
    for name, value in edges.items():
        data[name] = value
    data.natoms = torch.full_like(data.natoms, len(data.pos))
    data.nedges = torch.full_like(data.nedges, data.edge_index.shape[1])
    return data


@register_transform("frame_averaging")
class FrameAveraging(Transform):
    """Attaches the frames of the sample: frame_rot (1, K, 3, 3) and frame_weight (1, K).

    Positions stay as they are: the model rotates them. ``frames.compute_frames`` describes the arguments.
    """

    def __init__(self, *, dim: int = 3, group: str = "E", method: str = "stochastic", tolerance: float = 1e-3):
        _check_choice("dim", dim, DIMS)
        _check_choice("group", group, GROUPS)
        _check_choice("method", method, METHODS)
        self.dim, self.group, self.method, self.tolerance = dim, group, method, tolerance

    def __call__(self, data: AtomicData, generator: torch.Generator) -> AtomicData:
        _require_no_frames(data)
        frames = compute_frames(
            data.pos,
            data.batch,
            1,
            method=self.method,
            dim=self.dim,
            group=self.group,
            atomic_numbers=data.atomic_numbers,
            generator=generator,
            tolerance=self.tolerance,
        )
        data.frame_rot, data.frame_weight = frames.rot, frames.weight
        return data


@register_transform("data_augmentation")
class DataAugmentation(Transform):
    """Rotates the sample by a random rotation: positions, cell and force labels, X' = X @ U.

    Args:
        dim: 3, or 2 to rotate about z only.
        reflect: reflect half of the samples as well.
    """

    def __init__(self, *, dim: int = 3, reflect: bool = False):
        _check_choice("dim", dim, DIMS)
        _check_choice("reflect", reflect, (True, False))
        self.dim, self.reflect = dim, reflect

    def __call__(self, data: AtomicData, generator: torch.Generator) -> AtomicData:
        _require_no_frames(data)
        frames = random_rotations(
            1, dim=self.dim, reflect=self.reflect, generator=generator, dtype=data.pos.dtype, device=data.pos.device
        )
        rot = frames.rot[:, 0]
        data.pos = rotate(data.pos, rot)
        data.cell = rotate(data.cell, rot)
        if "forces" in data:
            data.forces = rotate(data.forces, rot)
        return data


def _require_no_frames(data: AtomicData) -> None:
    if "frame_rot" in data:
        raise ValueError("must come before frame_averaging: the frames belong to the atoms as they were")


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
