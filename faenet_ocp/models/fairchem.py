"""The adapter between networks and fairchem: frame averaging around any HydraModel, FAENet as backbone and heads.

Data flow: batch -> frames (those that the data transform attached, else computed here) -> views (a view is one system
in one frame) -> backbone and heads on the views -> rotated back and averaged over the views of each system, eq. (1).

Legend: N atoms, E edges, B systems, K frames of a system, V views. Row vectors: X' = (X - t) U, C' = C U, F = F' U^T.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.models.base import BackboneInterface, HeadInterface, HydraModel
from torch import Tensor

from faenet_ocp.frames import Frames, Views, centroids, compute_frames, flatten_frames, rotate, rotate_back
from faenet_ocp.graph.neighbors import build_graph
from faenet_ocp.graph.vectors import edge_vectors
from faenet_ocp.models.faenet import EnergyHead, FAENet
from faenet_ocp.models.heads import ForceHead

_NODE_FIELDS = ("pos", "atomic_numbers", "tags", "fixed")
_SYSTEM_FIELDS = ("cell", "pbc", "natoms", "nedges", "charge", "spin")


class _PlainBackbone(BackboneInterface):
    """What fairchem asks a backbone for beside `forward`, where there is nothing special to say."""

    @classmethod
    def build_inference_settings(cls, settings: Any) -> dict:
        return {}

    def get_default_untrained_tasks(self, checkpoint_tasks: Any, inference_settings: Any) -> list:
        return []

    def validate_tasks(self, dataset_to_tasks: dict[str, list]) -> None:
        return None

    def prepare_for_inference(self, data: AtomicData, settings: Any) -> "_PlainBackbone":
        return self

    def on_predict_check(self, data: AtomicData) -> None:
        return None

    def validate_atoms_data(self, atoms: Any, task_name: str) -> None:
        return None


@registry.register_model("faenet")
class FAENetBackbone(FAENet, _PlainBackbone):
    """FAENet as a fairchem backbone: options as `faenet.FAENet`, input an AtomicData with edges."""

    def forward(self, data: AtomicData) -> dict[str, Any]:  # type: ignore[override]
        """The embeddings of a batch for the heads, `{"faenet": FAENetOutput}`."""
        shared = data.shared_vectors if "shared_vectors" in data else None
        own = slice(data.edge_index.shape[1] - (0 if shared is None else len(shared)))
        index, offsets = data.edge_index[:, own], data.cell_offsets[own]
        vectors = edge_vectors(data.pos, data.cell, index, offsets, data.batch[index[1]])
        output = super().forward(
            atomic_numbers=data.atomic_numbers,
            edge_index=data.edge_index,
            edge_vec=vectors,
            batch=data.batch,
            num_systems=len(data.natoms),
            tags=data.tags,
            shared=shared,
        )
        return {"faenet": output}


@registry.register_model("faenet_energy_head")
class FAENetEnergyHead(EnergyHead, HeadInterface):
    """`faenet.EnergyHead` in fairchem's form; sizes come from the backbone."""

    def __init__(
        self,
        backbone: FAENetBackbone,
        *,
        energy_head: str | bool = "weighted-av-final-embeds",
        skip_co: str | bool = "concat",
        act: str = "swish",
    ):
        super().__init__(
            hidden_channels=backbone.hidden_channels,
            num_interactions=backbone.num_interactions,
            energy_head=energy_head,
            skip_co=skip_co,
            act=act,
        )

    def forward(self, data: AtomicData, emb: dict[str, Any]) -> dict[str, Tensor]:  # type: ignore[override]
        """`{"energy": (B,)}`, normalised."""
        return {"energy": super().forward(emb["faenet"], data.batch, len(data.natoms))}


@registry.register_model("faenet_force_head")
class FAENetForceHead(ForceHead, HeadInterface):
    """`force_head.ForceHead` in fairchem's form; sizes come from the backbone."""

    def __init__(
        self,
        backbone: FAENetBackbone,
        *,
        force_decoder_type: str = "mlp",
        force_hidden_channels: int = 256,
        force_norm: str | None = "batch1d",
        act: str = "swish",
    ):
        super().__init__(
            hidden_channels=backbone.hidden_channels,
            force_decoder_type=force_decoder_type,
            force_hidden_channels=force_hidden_channels,
            force_norm=force_norm,
            act=act,
        )

    def forward(self, data: AtomicData, emb: dict[str, Any]) -> dict[str, Tensor]:  # type: ignore[override]
        """`{"forces": (N, 3)}`, normalised, in the frame."""
        return {"forces": super().forward(emb["faenet"].node_embedding)}


@registry.register_model("frame_averaging")
class FrameAveragedModel(HydraModel):
    """A HydraModel that sees its data in frames: any fairchem backbone with any heads for energies and forces.

    Args:
        backbone: fairchem's mapping, `{model: <registered name or dotted path>, **arguments}`.
        heads: fairchem's mapping of head name to `{module: <name>, **arguments}`.
        frames: `{method, dim, group, tolerance}` for batches that carry no frames (`frame_rot`, `frame_weight`).
        cutoff, max_neighbors: graph that is built for batches without edges.
    """

    def __init__(
        self,
        *,
        backbone: dict[str, Any],
        heads: dict[str, Any],
        frames: Mapping[str, Any] | None = None,
        cutoff: float = 6.0,
        max_neighbors: int = 40,
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
        """
        if data.edge_index.shape[1] == 0 and len(data.natoms):
            data = with_graph(data, self.cutoff, self.max_neighbors)
        frames = self.frames_of(data, through_frames=through_frames)
        if frames is None:
            return super().forward(data)
        views = _views(frames)
        origin = centroids(data.pos, data.batch, len(data.natoms), dim=self.frames["dim"])
        share = isinstance(self.backbone, FAENetBackbone) and data.pos.device.type == "cpu"
        origin = origin if through_frames else origin.detach()
        seen, atom, atom_view = view_batch(data, views, origin, share=share)
        outputs = super().forward(seen)
        return _average(outputs, views, atom, atom_view, num_systems=len(data.natoms), num_atoms=len(data.pos))

    def frames_of(self, data: AtomicData, *, through_frames: bool = False) -> Frames | None:
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


def with_graph(data: AtomicData, cutoff: float, max_neighbors: int) -> AtomicData:
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
    result = _shallow_copy(data)
    result.edge_index = torch.cat(edge_index, dim=1).to(data.pos.device)
    result.cell_offsets = torch.cat(offsets).to(data.pos)
    result.nedges = torch.tensor(counts, dtype=data.natoms.dtype, device=data.pos.device)
    return result


def view_batch(
    data: AtomicData, views: Views, origin: Tensor, *, share: bool = False
) -> tuple[AtomicData, Tensor, Tensor]:
    """The batch whose systems are the views, with positions and cells in their frames, eqs. (3) and (4).

    Args:
        data: batch of B systems.
        views: see `frames.flatten_frames`.
        origin: t of each system, (B, 3).
        share: put edges last whose vector is that of another edge, and say of which in `shared_vectors`; see
            `_share_vectors`.

    Returns:
        the batch of V systems; for each of its M atoms, which atom of `data` it is (M,) and its view (M,).
    """
    centred = data.pos - origin[data.batch]
    seen = _shallow_copy(data)
    for name in ("frame_rot", "frame_weight"):
        if name in seen:
            del seen[name]
    if len(views.system) == len(data.natoms):  # one view each: the systems keep their places
        atom = torch.arange(len(data.pos), device=data.pos.device)
        atom_view = data.batch
    else:
        atom, atom_view = _members(data.natoms, views.system)
        edge, edge_view = _members(data.nedges, views.system)
        for name in _NODE_FIELDS:
            setattr(seen, name, getattr(data, name)[atom])
        for name in _SYSTEM_FIELDS:
            setattr(seen, name, getattr(data, name)[views.system])
        if share and _frames_are_opposite(views, len(data.natoms)):
            order, seen.shared_vectors = _share_vectors(data, edge, edge_view, len(views.system) // len(data.natoms))
            edge, edge_view = edge[order], edge_view[order]
        shift = _starts(seen.natoms)[edge_view] - _starts(data.natoms)[views.system][edge_view]
        seen.edge_index = data.edge_index[:, edge] + shift
        seen.cell_offsets = data.cell_offsets[edge]
        seen.batch = atom_view
        centred = centred[atom]
    seen.pos = rotate(centred, views.rot[atom_view])
    seen.cell = rotate(seen.cell, views.rot)
    return seen, atom, atom_view


def _frames_are_opposite(views: Views, num_systems: int) -> bool:
    """Whether all systems have equally many frames, the last the opposite of the first (U and -U), and so on."""
    if not num_systems or len(views.system) % (2 * num_systems):
        return False
    rot = views.rot.view(num_systems, -1, 3, 3)
    evenly = torch.arange(num_systems, device=rot.device).repeat_interleave(rot.shape[1])
    return torch.equal(views.system, evenly) and torch.equal(rot, -rot.flip(1))


def _share_vectors(data: AtomicData, edge: Tensor, edge_view: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    """Which edges have the vector of another edge: a frame sees r where the opposite one sees -r, that of i -> j.

    Args:
        data: the batch of systems.
        edge: edge of `data` that each edge of the views is, (E,), in the order of the views.
        edge_view: view of each, (E,).
        num_frames: K; the last frame of a system is the opposite of the first, and so on.

    Returns:
        the edges of the views, those with vectors of their own first (E,); for each of the others, in ascending order,
        the one among the first that has its vector (S,).
    """
    frame = edge_view % num_frames
    reverse = _reverse_edges(data)[edge]
    own = (2 * frame < num_frames) | (reverse < 0)
    # The edges of a system are in the same order in all of its views.
    edges_before = _starts(data.nedges)[data.batch[data.edge_index[1]]][edge]
    opposite = edge_view + num_frames - 1 - 2 * frame
    counts = data.nedges.repeat_interleave(num_frames)
    partner = _starts(counts)[opposite] + reverse - edges_before
    others = (~own).nonzero().squeeze(1)
    row, order = (own.cumsum(0) - 1)[partner[others]].sort()
    return torch.cat([own.nonzero().squeeze(1), others[order]]), row


def _reverse_edges(data: AtomicData) -> Tensor:
    """The edge i -> j of every edge j -> i, by atoms and periodic images, (E,); -1 where there is none."""
    source, target = data.edge_index
    images = data.cell_offsets.round().long()
    span = 2 * int(images.abs().max()) + 1 if len(images) else 1
    code = (images[:, 0] * span + images[:, 1]) * span + images[:, 2]  # -images has the code -code
    atoms, codes = len(data.pos), span**3
    key = (source * atoms + target) * codes + code
    ordered, edge = key.sort()
    wanted = (target * atoms + source) * codes - code
    place = torch.searchsorted(ordered, wanted).clamp(max=max(0, len(key) - 1))
    return edge[place].where(ordered[place] == wanted, -1)


def _views(frames: Frames) -> Views:
    if frames.rot.shape[1] == 1:  # no need to look at the weights, which would wait for the device
        systems = torch.arange(len(frames.rot), device=frames.rot.device)
        return Views(frames.rot[:, 0], frames.weight[:, 0], systems)
    return flatten_frames(frames)


def _average(
    outputs: Any, views: Views, atom: Tensor, atom_view: Tensor, *, num_systems: int, num_atoms: int, name: str = ""
) -> Any:
    """Weighted mean over the views of each system; vectors are rotated back first, eq. (1)."""
    if isinstance(outputs, dict):
        return {
            key: _average(value, views, atom, atom_view, num_systems=num_systems, num_atoms=num_atoms, name=key)
            for key, value in outputs.items()
        }
    if "energy" in name and len(outputs) == len(views.system):
        weighted = outputs * views.weight.to(outputs).view(-1, *[1] * (outputs.dim() - 1))
        return outputs.new_zeros(num_systems, *outputs.shape[1:]).index_add(0, views.system, weighted)
    if "forces" in name and outputs.shape == (len(atom), 3):
        turned = rotate_back(outputs, views.rot.to(outputs.dtype)[atom_view])
        weighted = turned * views.weight.to(outputs.dtype)[atom_view, None]
        return outputs.new_zeros(num_atoms, 3).index_add(0, atom, weighted)
    raise ValueError(
        f"output {name!r} of shape {tuple(outputs.shape)}: frames can average energies (one for each system) and "
        f"forces (three for each atom)"
    )


def _shallow_copy(data: AtomicData) -> AtomicData:
    """Another AtomicData with the same tensors, whose fields can be replaced."""
    result = copy.copy(data)
    result.__keys__ = set(data.__keys__)
    return result


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def _members(counts: Tensor, systems: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (atoms or edges) of the listed systems, in that order, and the place in the list of each."""
    chosen = counts[systems]
    place = torch.repeat_interleave(torch.arange(len(systems), device=counts.device), chosen)
    within = torch.arange(len(place), device=counts.device) - _starts(chosen)[place]
    return _starts(counts)[systems][place] + within, place
