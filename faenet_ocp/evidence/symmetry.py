"""How far predictions are from the symmetries of space (the paper's appendix D): systems beside moved copies of them.

Every system is moved at random, its graph is built anew, and both go through the model in each kind of frames. What
should be equal is compared: scalars as they are, vectors turned back, on the atoms that count.

Shapes: N atoms, B systems. Row vectors: X' = X R.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from fairchem.core.common import distutils
from fairchem.core.datasets.atomic_data import AtomicData
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from faenet_ocp.data.fields import exact_label, level_of, shallow_copy
from faenet_ocp.data.loader import even_slice, load_batch
from faenet_ocp.data.transforms import Compose
from faenet_ocp.evaluation.validation import predict
from faenet_ocp.frames import centroids
from faenet_ocp.frames.report import frame_report
from faenet_ocp.frames.rotations import random_rotations
from faenet_ocp.models.frame_averaging import FrameAveragedModel, with_graph
from faenet_ocp.targets import Target
from faenet_ocp.tasks.tasks import TargetTask

METHODS = ("none", "stochastic", "det", "full", "canonical")
MOTIONS = ("same", "rotated", "reflected", "translated", "permuted", "lattice", "wrapped")
"""`same` is the system once more: what is left of it comes from frames drawn at random. `lattice`: atoms moved by whole
lattice vectors, each by others; `wrapped`: into the cell."""
POSITIONS = "positions"
"""Beside the targets: distance in Angstrom between the sets of framed positions of both."""
_TURNS = ("rotated", "reflected")
Differences = dict[tuple[str, str, str], list[NDArray[np.float64]]]
"""By method, motion and target (or `POSITIONS`)."""


class Moved(NamedTuple):
    """A copy of a batch, and the orthogonal matrices that its systems were turned by, (B, 3, 3)."""

    batch: AtomicData
    rot: Tensor


class Found(NamedTuple):
    """What was measured.

    Attributes:
        differences: absolute ones.
        labels: mean absolute label of each scalar.
        num_systems: how many were looked at.
        degenerate, ambiguous: how many of them have two equal variances, or more than one canonical frame.
    """

    differences: dict[tuple[str, str, str], NDArray[np.float64]]
    labels: dict[str, float]
    num_systems: int
    degenerate: int
    ambiguous: int


def measure(
    model: FrameAveragedModel,
    tasks: Sequence[TargetTask],
    dataset: Dataset,
    *,
    transforms: Mapping[str, Any],
    dim: int,
    max_systems: int,
    batch_size: int,
    seed: int,
    **forward: bool,
) -> Found | None:
    """Differences between systems of a data set and their copies; on the first rank, None elsewhere.

    Args:
        model, tasks: as for `validation.predict`, with `forward`.
        dataset: without frames; has a method `plain` for its systems as they are on file.
        transforms: of the configuration, applied after the graph is built.
        dim: 2 turns about z and mirrors in planes that contain it, 3 in any way.
        max_systems: a random subset of this size.
        batch_size: systems at once, on each rank.
        seed: of subset and motions.

    Raises:
        ValueError: the data set cannot give systems without edges.
    """
    if not hasattr(dataset, "plain"):
        raise ValueError(f"--mode symmetry: {type(dataset).__name__} cannot give its systems without edges (plain)")
    systems, compose = dataset.plain("none"), Compose(transforms)
    total = len(systems)
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:max_systems])
    part = chosen[even_slice(len(chosen), distutils.get_world_size(), distutils.get_rank())]
    differences: Differences = {}
    labels: dict[str, list[float]] = {}
    counts = np.zeros(3, dtype=np.int64)
    torch.manual_seed(seed + 1 + distutils.get_rank())
    chunks = range(0, len(part), batch_size)
    for start in tqdm(chunks, desc="symmetry", disable=None if distutils.is_master() else True):
        indices = part[start : start + batch_size].tolist()
        base = load_batch(systems, [(0, index) for index in indices])
        base.atom_id = torch.arange(len(base.pos))
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + index) for index in indices]
        states = [generator.get_state() for generator in generators]

        def prepare(batch: AtomicData, states: list[Tensor] = states) -> AtomicData:
            """With its graph and after the transforms, which see the same random numbers for every copy."""
            if model.cutoff is not None:
                batch = with_graph(batch, model.cutoff, model.max_neighbors)
            fresh = [torch.Generator().set_state(state) for state in states]
            return _transformed(compose, batch, fresh)

        motions = {name: move(base, name, dim=dim, generators=generators) for name in MOTIONS}
        prepared = {name: Moved(prepare(moved.batch), moved.rot) for name, moved in motions.items()}
        original = prepare(base)
        counts += _count(model, original)
        for task in tasks:
            if task.target.rank == 0:
                labels.setdefault(task.name, []).extend(exact_label(original, task.name).abs().tolist())
        for key, values in _compare(model, tasks, original, prepared, **forward):
            differences.setdefault(key, []).append(values)
    return _gather(differences, labels, counts)


def _transformed(compose: Compose, batch: AtomicData, generators: Sequence[torch.Generator]) -> AtomicData:
    if len(generators) == 1 or compose.takes_batches:
        return compose.apply(batch, generators) if len(compose) else batch
    raise ValueError("--mode symmetry: a transform of the configuration takes single systems only")


def move(batch: AtomicData, name: str, *, dim: int, generators: Sequence[torch.Generator]) -> Moved:
    """A copy in which every system is moved as one of `MOTIONS` says, each by its own generator."""
    result = batch.clone()
    identity = torch.eye(3, dtype=batch.pos.dtype).repeat(len(batch.natoms), 1, 1)
    if name in _TURNS:
        draw = {"dtype": batch.pos.dtype, "device": "cpu", "generator": list(generators)}
        rot = random_rotations(len(batch.natoms), dim=dim, reflect=False, **draw).rot[:, 0]
        if name == "reflected":
            rot = identity * torch.tensor([-1.0, 1.0, 1.0]).to(rot) @ rot
        result.pos = torch.einsum("ni,nij->nj", batch.pos, rot[batch.batch])
        result.cell = batch.cell @ rot
        return Moved(result, rot)
    for system, generator in enumerate(generators):
        atoms = (batch.batch == system).nonzero().view(-1)
        if name == "translated":
            result.pos[atoms] += 10 * torch.rand(3, generator=generator).to(batch.pos) - 5
        elif name == "permuted":
            order = atoms[torch.randperm(len(atoms), generator=generator)]
            for field in batch.keys():  # noqa: SIM118  # it is no dict
                if field != "edge_index" and level_of(field) == "atom":
                    result[field][atoms] = batch[field][order]
        elif name in ("lattice", "wrapped") and bool(batch.pbc[system].all()):
            fractional = torch.linalg.solve(batch.cell[system].T.double(), batch.pos[atoms].T.double()).T
            steps = -fractional.floor()
            if name == "lattice":
                steps = torch.randint(-1, 2, (len(atoms), 3), generator=generator)
            result.pos[atoms] = (batch.pos[atoms].double() + steps.double() @ batch.cell[system].double()).to(batch.pos)
    return Moved(result, identity)


def _count(model: FrameAveragedModel, batch: AtomicData) -> NDArray[np.int64]:
    """Systems, those with two equal variances, and those with several canonical frames."""
    settings = {name: model.frames[name] for name in ("dim", "group", "tolerance")}
    report = frame_report(batch.pos, batch.batch, len(batch.natoms), atomic_numbers=batch.atomic_numbers, **settings)
    return np.array([len(batch.natoms), int(report.degenerate.sum()), int((report.num_frames > 1).sum())])


def _compare(
    model: FrameAveragedModel,
    tasks: Sequence[TargetTask],
    original: AtomicData,
    prepared: Mapping[str, Moved],
    **forward: bool,
) -> Iterator[tuple[tuple[str, str, str], NDArray[np.float64]]]:
    """All differences of a batch, by method, motion and target."""
    before, frames = model.frames, dict(model.frames)
    targets = {task.name: task.target for task in tasks}
    try:
        for method in METHODS:
            model.frames = frames | {"method": method}
            expected = _predicted(model, tasks, original, **forward)
            for name, moved in prepared.items():
                found = _predicted(model, tasks, moved.batch, **forward)
                for target, values in expected.items():
                    yield (
                        (method, name, target),
                        _difference(targets[target], values, found[target], original, moved).numpy(),
                    )
                if name in _TURNS:
                    yield (method, name, POSITIONS), _framed_distance(model, original, moved.batch)
    finally:
        model.frames = before


def _predicted(
    model: FrameAveragedModel, tasks: Sequence[TargetTask], batch: AtomicData, **forward: bool
) -> dict[str, Tensor]:
    ((_, predictions, _),) = predict(model, tasks, [shallow_copy(batch)], **forward)
    return {name: value.detach().cpu().double() for name, value in predictions.items()}


def _difference(target: Target, expected: Tensor, found: Tensor, original: AtomicData, moved: Moved) -> Tensor:
    """Absolute differences: a number for each system, or three for each free atom."""
    if target.level == "system":
        return (found - expected).abs().view(-1)
    place = torch.argsort(moved.batch.atom_id)[torch.argsort(torch.argsort(original.atom_id))]
    turned = expected
    if target.rank:
        turned = torch.einsum("ni,nij->nj", expected, moved.rot[original.batch].double())
    return (found[place] - turned).abs()[original.fixed == 0].reshape(-1)


def _framed_distance(model: FrameAveragedModel, original: AtomicData, moved: AtomicData) -> NDArray[np.float64]:
    """How far the framed positions of a copy are from the nearest of the original's, over all its frames, (B,)."""
    sets = [_framed(model, batch) for batch in (original, moved)]
    distances = [
        max(min(float((mine - theirs).abs().max()) for theirs in first) for mine in second)
        for first, second in zip(*sets, strict=True)
    ]
    return np.array(distances)


def _framed(model: FrameAveragedModel, batch: AtomicData) -> list[list[Tensor]]:
    """The positions of every system in each of its frames, in the order of `atom_id`."""
    frames, num_systems = model.frames_for(batch), len(batch.natoms)
    centred = (
        batch.pos - centroids(batch.pos, batch.batch, num_systems, dim=model.frames["dim"])[batch.batch]
    ).double()
    framed = []
    for system in range(num_systems):
        atoms = (batch.batch == system).nonzero().view(-1)
        positions = centred[atoms[torch.argsort(batch.atom_id[atoms])]]
        if frames is None:
            framed.append([positions])
        else:
            used = frames.rot[system][frames.weight[system] > 0]
            framed.append([positions @ rot.double() for rot in used])
    return framed


def _gather(differences: Differences, labels: Mapping[str, list[float]], counts: NDArray[np.int64]) -> Found | None:
    """Those of all ranks, on the first."""
    mine = ({key: np.concatenate(parts) for key, parts in differences.items()}, dict(labels), counts)
    gathered: list[Any] = [mine]
    if distutils.get_world_size() > 1:
        gathered = [None] * distutils.get_world_size()
        dist.all_gather_object(gathered, mine)
    if not distutils.is_master():
        return None
    keys = dict.fromkeys(key for found, _, _ in gathered for key in found)
    names = dict.fromkeys(name for _, found, _ in gathered for name in found)
    num_systems, degenerate, ambiguous = sum(counts for _, _, counts in gathered).tolist()
    return Found(
        {key: np.concatenate([found[key] for found, _, _ in gathered if key in found]) for key in keys},
        {name: float(np.mean([value for _, found, _ in gathered for value in found.get(name, [])])) for name in names},
        num_systems,
        degenerate,
        ambiguous,
    )


Summary = Callable[[NDArray[np.float64]], float]
SUMMARIES: dict[str, Summary] = {
    "mean": lambda values: float(values.mean()),
    "p95": lambda values: float(np.percentile(values, 95)),
    "max": lambda values: float(values.max()),
}
