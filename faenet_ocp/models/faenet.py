"""FAENet, the network of the paper (section 4, figure 1), from atoms and edges to energies.

    AtomEmbedding     h_i  from atomic number, tag, properties, period, group   (embedding.py)
    EdgeEmbedding     e_ij from the edge vector and its length, equation (7)    (embedding.py)
    InteractionBlock  h_i <- h_i + messages, equation (8)                       (message_passing.py)
    EnergyHead        atom energies times learnt weights, summed; jumping connections
    ForceHead         forces from the node embedding                            (force_head.py)

No symmetry is built in: edge vectors enter as they are, in the frame that frame averaging chose,
and forces come out in that frame.

Shapes: N atoms, E edges j -> i (row 0 of edge_index is j, row 1 is i), B systems; C
hidden_channels, F num_filters. Edge vectors are pos[j] - pos[i] + image, in Angstrom.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from faenet_ocp.common.checks import activation, choice, flag, positive, switched_off, whole_number
from faenet_ocp.kernels.cpu_edges import segment_sum
from faenet_ocp.models.embedding import EDGE_EMBED_TYPES, AtomEmbedding, EdgeEmbedding
from faenet_ocp.models.heads import ForceHead
from faenet_ocp.models.message_passing import MP_TYPES, TABULATED, BlockOptions, Graph, dense

__all__ = ["EnergyHead", "FAENet", "FAENetOutput", "ForceHead"]

GRAPH_NORMS = ("system", "batch", "none")
SKIP_CONNECTIONS = ("concat", "add", "concat_atom", "none")
ENERGY_HEADS = ("weighted-av-final-embeds", "weighted-av-initial-embeds", "sum")
ATTENTION = ("base_with_att", "att")


class FAENetOutput(NamedTuple):
    """What the heads get.

    Attributes:
        node_embedding: final embedding of every atom, (N, C).
        hidden_states: embeddings before the first block and after each block, each (N, C).
    """

    node_embedding: Tensor
    hidden_states: tuple[Tensor, ...]


class FAENet(nn.Module):
    """The network up to the node embeddings. Defaults are the paper's for IS2RE (Table 7).

    Args:
        hidden_channels: C, channels of a node embedding.
        num_filters: F, channels of an edge embedding. `mp_type: basic` multiplies edge and node
            embeddings, and takes C instead.
        num_interactions: number of interaction blocks.
        num_gaussians: Gaussians of the distance expansion, at least 2.
        cutoff: end of the distance expansion, Angstrom; the cutoff of the graph.
        tag_hidden_channels: channels of the tag embedding; 0 for data without tags.
        pg_hidden_channels: channels of the period embedding, and of the group embedding; or 0.
        phys_embeds: whether atoms are described by physical properties too.
        phys_hidden_channels: channels of a learnt layer on these properties; 0 for none.
        second_layer_MLP: two layers instead of one in the MLPs of both embeddings.
        edge_embed_type: features of an edge: all_rij, rij, sh or all (see `EdgeEmbedding`).
        mp_type: form of the messages (see `message_passing`).
        att_heads: attention heads of the `att` and `base_with_att` types.
        complex_mp: two layers instead of one in the update of an interaction block.
        graph_norm: GraphNorm of the messages, with statistics over each "system" (or true), over
            the whole "batch", or "none" (or false). "batch" is what the published code does, and
            is there for its weights: a prediction then depends on what else is in the batch.
        skip_co: "concat_atom" computes the final embedding from those of all blocks. The other
            jumping connections are of the energies: give `EnergyHead` the same value.
        act: activation function.

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    def __init__(
        self,
        *,
        hidden_channels: int = 384,
        num_filters: int = 480,
        num_interactions: int = 5,
        num_gaussians: int = 104,
        cutoff: float = 6.0,
        tag_hidden_channels: int = 64,
        pg_hidden_channels: int = 64,
        phys_embeds: bool = True,
        phys_hidden_channels: int = 0,
        second_layer_MLP: bool = False,
        edge_embed_type: str = "all_rij",
        mp_type: str = "base",
        att_heads: int = 1,
        complex_mp: bool = True,
        graph_norm: str | bool = "system",
        skip_co: str | bool = "concat",
        act: str = "swish",
    ) -> None:
        super().__init__()
        self.hidden_channels = whole_number("hidden_channels", hidden_channels, minimum=1)
        self.num_interactions = whole_number("num_interactions", num_interactions, minimum=1)
        self.cutoff = positive("cutoff", cutoff)
        self.mp_type = choice("mp_type", mp_type, tuple(MP_TYPES))
        self.graph_norm = _graph_norm(graph_norm)
        self.act = activation("act", act)
        if whole_number("att_heads", att_heads, minimum=1) > 1 and mp_type not in ATTENTION:
            _warn(f"att_heads: {att_heads} has no effect with mp_type {mp_type!r}")
        if whole_number("num_filters", num_filters, minimum=2) != hidden_channels and mp_type == "basic":
            _warn(f"num_filters: {num_filters} has no effect with mp_type 'basic': it is hidden_channels there")
            num_filters = hidden_channels
        if whole_number("phys_hidden_channels", phys_hidden_channels, minimum=0) and not phys_embeds:
            _warn(f"phys_hidden_channels: {phys_hidden_channels} has no effect without phys_embeds")

        self.atom_embedding = AtomEmbedding(
            hidden_channels=hidden_channels,
            tag_hidden_channels=whole_number("tag_hidden_channels", tag_hidden_channels, minimum=0),
            pg_hidden_channels=whole_number("pg_hidden_channels", pg_hidden_channels, minimum=0),
            phys_embeds=flag("phys_embeds", phys_embeds),
            phys_hidden_channels=phys_hidden_channels,
            second_layer=flag("second_layer_MLP", second_layer_MLP),
            act=self.act,
        )
        self.edge_embedding = EdgeEmbedding(
            edge_embed_type=choice("edge_embed_type", edge_embed_type, EDGE_EMBED_TYPES),
            num_filters=num_filters,
            num_gaussians=whole_number("num_gaussians", num_gaussians, minimum=2),
            cutoff=self.cutoff,
            second_layer=flag("second_layer_MLP", second_layer_MLP),
            act=self.act,
        )
        options = BlockOptions(
            hidden_channels=hidden_channels,
            num_filters=num_filters,
            act=self.act,
            complex_mp=flag("complex_mp", complex_mp),
            graph_norm=self.graph_norm != "none",
            att_heads=att_heads,
        )
        self.blocks = nn.ModuleList(MP_TYPES[mp_type](options) for _ in range(num_interactions))
        self.lin_skip = (
            dense((num_interactions + 1) * hidden_channels, hidden_channels)
            if _skip_co(skip_co) == "concat_atom"
            else None
        )

    def forward(
        self,
        *,
        atomic_numbers: Tensor,
        edge_index: Tensor,
        edge_vec: Tensor,
        batch: Tensor,
        num_systems: int,
        tags: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> FAENetOutput:
        """Embed the atoms of a batch of systems.

        Args:
            atomic_numbers: (N,) integers from 1 to 118.
            edge_index: (2, E), j and i of every edge; best sorted by i.
            edge_vec: (E, 3) vectors from i to j, in the frame; not zero.
            batch: system of every atom, (N,).
            num_systems: B.
            tags: (N,) integers 0, 1 or 2; needed when the model embeds them.
            shared: (S,) rows of edge_vec, ascending, which then has E - S rows: the vectors of the last S edges, too.

        Raises:
            ValueError: an element that the model does not know, or tags are needed and missing.
        """
        atomic_numbers = atomic_numbers.long()
        self.atom_embedding.check_elements(atomic_numbers)
        source, target = edge_index
        knots = None
        if self.mp_type in TABULATED and self.edge_embedding.tabulates(edge_vec):
            e, knots = self.edge_embedding.with_knots(edge_vec)
        else:
            e = self.edge_embedding(edge_vec)
        if shared is not None and self.mp_type not in TABULATED:
            e, shared = torch.cat([e, e.index_select(0, shared)]), None
        # Under autocast, embeddings and sums over atoms stay in the precision of the input.
        h = self.atom_embedding(atomic_numbers, tags).to(edge_vec.dtype)
        graph = Graph(
            source=source,
            target=target,
            edge_embedding=e,
            local_env=(segment_sum(e.to(h.dtype), target, h.shape[0]) if self.mp_type == "updown_local_env" else None),
            norm_batch=batch if self.graph_norm == "system" else None,
            num_systems=num_systems,
            knots=knots,
            shared=shared,
        )
        hidden_states = [h]
        for block in self.blocks:
            h = block(h, graph)
            hidden_states.append(h)
        if self.lin_skip is not None:
            h = self.act(self.lin_skip(torch.cat(hidden_states, dim=1))).to(edge_vec.dtype)
        return FAENetOutput(h, tuple(hidden_states))


class EnergyHead(nn.Module):
    """Energy of every system: the sum over its atoms of weight times energy.

        E = sum_i alpha_i W2 act(W1 h_i)

    Args:
        hidden_channels: C, as in `FAENet`.
        num_interactions: as in `FAENet`.
        energy_head: the weights alpha_i: a linear function of the embedding h_i
            ("weighted-av-final-embeds"), of the initial embedding ("weighted-av-initial-embeds"),
            or one ("sum", or false).
        skip_co: jumping connections: energies are computed from the embeddings before the first
            block and after each, and combined by a linear layer ("concat") or summed ("add").
            "none" (or false) and "concat_atom" use the final embedding alone.
        act: activation function.

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    def __init__(
        self,
        *,
        hidden_channels: int = 384,
        num_interactions: int = 5,
        energy_head: str | bool = "weighted-av-final-embeds",
        skip_co: str | bool = "concat",
        act: str = "swish",
    ) -> None:
        super().__init__()
        self.energy_head = "sum" if switched_off(energy_head) else choice("energy_head", energy_head, ENERGY_HEADS)
        self.skip_co = _skip_co(skip_co)
        self.act = activation("act", act)
        whole_number("hidden_channels", hidden_channels, minimum=2)
        whole_number("num_interactions", num_interactions, minimum=1)
        self.lin_1 = nn.Linear(hidden_channels, hidden_channels // 2)
        self.lin_2 = nn.Linear(hidden_channels // 2, 1)
        self.lin_weight = None if self.energy_head == "sum" else nn.Linear(hidden_channels, 1)
        self.lin_skip = nn.Linear(num_interactions + 1, 1) if self.skip_co == "concat" else None

    def forward(self, output: FAENetOutput, batch: Tensor, num_systems: int) -> Tensor:
        """Energies (B,). In full precision also under autocast: it is cheap, and a sum.

        Args:
            output: of `FAENet`.
            batch: system of every atom, (N,).
            num_systems: B.
        """
        jumping = self.skip_co in ("concat", "add")
        states = output.hidden_states if jumping else (output.node_embedding,)
        with torch.autocast(batch.device.type, enabled=False):
            atom_energies = [self._atom_energy(h, output.hidden_states[0]) for h in states]
            energies = segment_sum(torch.cat(atom_energies, dim=1), batch, num_systems)
            if self.lin_skip is not None:
                return self.lin_skip(energies).squeeze(1)
            return energies.sum(dim=1)

    def _atom_energy(self, h: Tensor, initial: Tensor) -> Tensor:
        """Weighted atom energies, (N, 1)."""
        energy = self.lin_2(self.act(self.lin_1(h)))
        if self.lin_weight is None:
            return energy
        return energy * self.lin_weight(initial if self.energy_head == "weighted-av-initial-embeds" else h)


def _graph_norm(value: str | bool) -> str:
    """Name of the normalisation; true stands for "system"."""
    if switched_off(value):
        return "none"
    name = choice("graph_norm", "system" if value is True else value, GRAPH_NORMS)
    if name == "batch":
        _warn(
            "graph_norm 'batch' normalises over all atoms of a batch: a prediction depends on the "
            "other systems in the batch. Use it for weights of the published code only"
        )
    return name


def _skip_co(value: str | bool) -> str:
    return "none" if switched_off(value) else choice("skip_co", value, SKIP_CONNECTIONS)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
