"""Frame averaging around any HydraModel of fairchem.

Data flow: batch -> frames (those that the data transform attached, else computed here) -> views (a view is one system
in one frame) -> backbone and heads on the views -> rotated back and averaged over the views of each system, eq. (1).

Legend: N atoms, E edges, B systems, K frames of a system, V views. Row vectors: X' = (X - t) U, C' = C U, F = F' U^T.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.models.base import HydraModel
from torch import Tensor

from faenet_ocp.data.fields import level_of, shallow_copy
from faenet_ocp.frames import Frames, Views, centroids, compute_frames, flatten_frames, rotate, rotate_back
from faenet_ocp.graph.neighbors import build_graph
from faenet_ocp.models.base import Backbone
from faenet_ocp.targets import TARGETS, Target, scalar


@registry.register_model("frame_averaging")
class FrameAveragedModel(HydraModel):
    """A HydraModel that sees its data in frames: any fairchem backbone with heads for rows of `targets` or scalars.

    Args:
        backbone: fairchem's mapping, `{model: <registered name or dotted path>, **arguments}`.
        heads: fairchem's mapping of head name to `{module: <name>, **arguments}`.
        frames: `{method, dim, group, tolerance}` for batches that carry no frames (`frame_rot`, `frame_weight`).
        cutoff, max_neighbors: graph that is built for batches without edges; no cutoff: none is.
    """

    def __init__(
        self,
        *,
        backbone: dict[str, Any],
        heads: dict[str, Any],
        frames: Mapping[str, Any] | None = None,
        cutoff: float | None = 6.0,
        max_neighbors: int | None = 40,
        pass_through_head_outputs: bool = False,
    ):
        super().__init__(backbone=backbone, heads=heads, pass_through_head_outputs=pass_through_head_outputs)
        self.frames = {"method": "none", "dim": 3, "group": "E", "tolerance": 1e-3, **(frames or {})}
        self.cutoff, self.max_neighbors = cutoff, max_neighbors

    def forward(self, data: AtomicData, *, through_frames: bool = False) -> dict[str, Any]:
        """Predictions by head and property: energies (B,) and forces (N, 3), as symmetric as the frames are.

        Args:
            data: batch; with `pos.requires_grad` the outputs can be differentiated by the positions.
            through_frames: compute the frames here, as functions of the positions. Otherwise frames (U and t) are
                constants in derivatives, and those that the batch carries are used.

        Raises:
            ValueError: an output that cannot be averaged over frames, or a field that `data.fields` does not know.
        """
        reads_edges = "edges" in getattr(self.backbone, "needs", Backbone.needs)
        if reads_edges and self.cutoff is not None and data.edge_index.shape[1] == 0 and len(data.natoms):
            data = with_graph(data, self.cutoff, self.max_neighbors)
        frames = self.frames_for(data, through_frames=through_frames)
        if frames is None:
            return super().forward(data)
        origin = centroids(data.pos, data.batch, len(data.natoms), dim=self.frames["dim"])
        sizes = self._sizes(data, frames, through_frames=through_frames)
        views = ViewBatch(data, frames, origin if through_frames else origin.detach(), sizes=sizes)
        return views.average(super().forward(views.data), required=self.output_heads.keys())

    def _sizes(self, data: AtomicData, frames: Frames, *, through_frames: bool) -> "ViewSizes | None":
        """What is known of the views without asking a GPU for the weights of the frames."""
        if frames.rot.shape[1] == 1:
            return ViewSizes([1] * len(data.natoms), len(data.pos), data.edge_index.shape[1])
        if "frame_sizes" not in data or through_frames:
            return None
        views, atoms, edges = zip(*data.frame_sizes, strict=True)
        return ViewSizes(list(views), sum(atoms), sum(edges))

    def frames_for(self, data: AtomicData, *, through_frames: bool = False) -> Frames | None:
        """The frames that the batch carries, else those of its positions; None for `none`."""
        if "frame_rot" in data and not through_frames:
            return Frames(data.frame_rot, data.frame_weight)
        if self.frames["method"] == "none":
            return None
        return compute_frames(
            data.pos if through_frames else data.pos.detach(),
            data.batch,
            len(data.natoms),
            atomic_numbers=data.atomic_numbers,
            **self.frames,
        )


class ViewSizes(NamedTuple):
    """Sizes of a batch of views.

    Attributes:
        views: of each system, B numbers.
        atoms, edges: in all views.
    """

    views: list[int]
    atoms: int
    edges: int


class ViewBatch:
    """A batch whose systems are the views of those of another, with positions and cells in their frames.

    Args:
        data: batch of B systems.
        frames: of the systems.
        origin: t of each system, (B, 3).
        sizes: of the views, if they are known; a GPU is waited for otherwise.

    Attributes:
        data: batch of V systems with M atoms, eqs. (3) and (4).
        views: rot, weight and system of each.
        atom: for each of the M atoms, which atom of the given batch it is, (M,).
        atom_view: its view, (M,).

    Raises:
        ValueError: the batch has a field that `data.fields` does not know, so that it has no place in views.
    """

    def __init__(self, data: AtomicData, frames: Frames, origin: Tensor, *, sizes: ViewSizes | None = None) -> None:
        self.num_atoms, self.num_systems, self._sizes = len(data.pos), len(data.natoms), sizes
        num_views = None if sizes is None else sum(sizes.views)
        self.views = _all_views(frames) if num_views == frames.weight.numel() else flatten_frames(frames, num_views)
        self.data = _without(data, "frame_rot", "frame_weight", "frame_sizes")
        centred = data.pos - origin[data.batch]
        if len(self.views.system) == self.num_systems:  # one view each: the systems keep their places
            self.atom, self.atom_view = torch.arange(self.num_atoms, device=data.pos.device), data.batch
        else:
            self.atom, self.atom_view = self._members(data.natoms, None if sizes is None else sizes.atoms)
            self._repeat_systems(data)
        self.data.pos = rotate(centred[self.atom], self.views.rot[self.atom_view])
        self.data.cell = rotate(self.data.cell, self.views.rot)

    def _repeat_systems(self, data: AtomicData) -> None:
        """Every field for the views, by its level."""
        edge, edge_view = self._members(data.nedges, None if self._sizes is None else self._sizes.edges)
        rows = {"atom": self.atom, "edge": edge, "system": self.views.system}
        for name in self.data.keys():  # noqa: SIM118  # iterating over the batch gives values, too
            if name not in ("batch", "edge_index"):
                setattr(self.data, name, self._rows(getattr(data, name), rows[level_of(name)]))
        shift = _starts(self.data.natoms)[edge_view] - _starts(data.natoms)[self.views.system][edge_view]
        self.data.edge_index = data.edge_index[:, edge] + shift
        self.data.batch = self.atom_view

    def _members(self, counts: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
        """The rows of the views, `size` atoms or edges, system after system, and the view of each."""
        systems = self.views.system
        chosen = counts[systems]
        place = torch.repeat_interleave(torch.arange(len(systems), device=counts.device), chosen, output_size=size)
        within = torch.arange(len(place), device=counts.device) - _starts(chosen)[place]
        return _starts(counts)[systems][place] + within, place

    def _rows(self, values: Any, rows: Tensor) -> Any:
        """These rows of a tensor; a list, which has something for each system, for the views."""
        if isinstance(values, Tensor):
            return values[rows]
        if self._sizes is None:
            return [values[system] for system in self.views.system.tolist()]
        return [value for value, views in zip(values, self._sizes.views, strict=True) for _ in range(views)]

    def average(self, outputs: Mapping[str, Any], *, required: Collection[str]) -> dict[str, Any]:
        """Outputs of the views, by head and property, to those of the systems.

        Args:
            outputs: rows of `targets`, or other scalars of systems; nested mappings are gone through.
            required: names of outputs that have to be averaged; others that cannot be are by-products, and left out.

        Raises:
            ValueError: a required output is neither a row of `targets` nor a scalar of systems.
        """
        averaged: dict[str, Any] = {}
        for name, value in outputs.items():
            if isinstance(value, Mapping):
                averaged[name] = self.average(value, required=required)
            elif (target := self._target(name, value)) is not None:
                averaged[name] = self._mean(value, target)
            elif name in required:
                raise ValueError(
                    f"output {name!r} of shape {tuple(value.shape)}: frames can average {', '.join(TARGETS)} and other "
                    "scalars of systems"
                )
        return averaged

    def _target(self, name: str, value: Tensor) -> Target | None:
        """What an output predicts; None if it has not that shape."""
        target = TARGETS.get(name) or scalar(name, unit="")
        rows = len(self.views.system if target.level == "system" else self.atom)
        shapes = [(rows, 3)] if target.rank else [(rows,), (rows, 1)]
        return target if tuple(value.shape) in shapes else None

    def _mean(self, value: Tensor, target: Target) -> Tensor:
        """Weighted mean over the views of each system; vectors are rotated back first, eq. (1)."""
        place, rows, weight, rot = self.views.system, self.num_systems, self.views.weight, self.views.rot
        if target.level == "atom":
            place, rows, weight, rot = self.atom, self.num_atoms, weight[self.atom_view], rot[self.atom_view]
        if target.rank:
            value = rotate_back(value, rot.to(value.dtype))
        value = value * weight.to(value.dtype).view(-1, *[1] * (value.dim() - 1))
        return value.new_zeros(rows, *value.shape[1:]).index_add(0, place, value)


def with_graph(data: AtomicData, cutoff: float, max_neighbors: int | None) -> AtomicData:
    """The batch with edges from `graph.build_graph`, one system after the other."""
    edge_index, offsets, counts, first = [], [], [], 0
    positions, cells, pbc = data.pos.detach().cpu(), data.cell.detach().cpu(), data.pbc.cpu()
    for system, natoms in enumerate(data.natoms.tolist()):
        index, offset = build_graph(
            positions[first : first + natoms], cells[system], pbc[system], cutoff=cutoff, max_neighbors=max_neighbors
        )
        edge_index.append(index + first)
        offsets.append(offset)
        counts.append(index.shape[1])
        first += natoms
    result = _without(data, "frame_sizes")
    result.edge_index = torch.cat(edge_index, dim=1).to(data.pos.device)
    result.cell_offsets = torch.cat(offsets).to(data.pos)
    result.nedges = torch.tensor(counts, dtype=data.natoms.dtype, device=data.pos.device)
    return result


def _all_views(frames: Frames) -> Views:
    systems, views = frames.rot.shape[:2]
    system = torch.arange(systems, device=frames.rot.device).view(-1, 1).expand(-1, views)
    return Views(frames.rot.flatten(0, 1), frames.weight.flatten(), system.flatten())


def _without(data: AtomicData, *names: str) -> AtomicData:
    result = shallow_copy(data)
    for name in names:
        if name in result:
            del result[name]
    return result


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts
