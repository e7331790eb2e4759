"""FAENet, the network of the paper (section 4, figure 1), from atoms and edges to features of atoms.

    AtomEmbedding     h_i  from atomic number, tag, properties, period, group   (embedding.py)
    EdgeEmbedding     e_ij from the edge vector and its length, equation (7)    (embedding.py)
    InteractionBlock  h_i <- h_i + messages, equation (8)                       (message_passing.py)
    EnergyHead        atom energies times learnt weights, summed; jumping connections     (heads.py)
    ForceHead         forces from the node embedding                                      (heads.py)

No symmetry is built in: edge vectors enter as they are, in the frame that frame averaging chose, and forces come out in
that frame.

Shapes: N atoms, E edges j -> i (row 0 of edge_index is j, row 1 is i), B systems; C hidden_channels.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from faenet_ocp.models.base import Backbone, NodeFeatures
from faenet_ocp.models.embedding import AtomEmbedding, EdgeEmbedding
from faenet_ocp.models.functional import ACTIVATIONS
from faenet_ocp.models.message_passing import BLOCKS, Graph, dense, polynomial_envelope
from faenet_ocp.models.norms import share_of_an_atom
from faenet_ocp.models.options import FAENetOptions
from faenet_ocp.targets import Target


class FAENet(Backbone):
    """The network up to the node embeddings. Keyword arguments are those of `options.FAENetOptions`."""

    options_class = FAENetOptions
    options: FAENetOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        given = self.options
        self.needs = ("edges", "tags") if given.tag_hidden_channels else ("edges",)
        self.act = ACTIVATIONS[given.act]
        self.atom_embedding = AtomEmbedding(given)
        self.edge_embedding = EdgeEmbedding(given)
        self.blocks = nn.ModuleList(BLOCKS[given.mp_type](given) for _ in range(given.num_interactions))
        channels, states = given.hidden_channels, given.num_interactions + 1
        self.lin_skip = dense(states * channels, channels) if given.skip_co == "concat_atom" else None

    def forward(
        self,
        *,
        atomic_numbers: Tensor,
        edge_index: Tensor,
        edge_vec: Tensor,
        batch: Tensor,
        num_systems: int,
        tags: Tensor | None = None,
    ) -> NodeFeatures:
        """Embed the atoms of a batch of systems; see `Backbone.forward`.

        Raises:
            ValueError: an element that the model does not know, or tags are needed and missing.
        """
        envelope = None
        if self.options.envelope == "polynomial":
            envelope = polynomial_envelope(torch.linalg.vector_norm(edge_vec, dim=1), self.options.cutoff)
        by_system = self.options.graph_norm == "system"
        graph = Graph(
            source=edge_index[0],
            target=edge_index[1],
            edge_embedding=self.edge_embedding(edge_vec),  # e_ij, (E, F)
            envelope=envelope,
            norm_batch=batch if by_system else None,
            num_systems=num_systems,
            norm_share=share_of_an_atom(edge_vec.new_empty(len(batch), 1), batch, num_systems) if by_system else None,
        )
        h = self.atom_embedding(atomic_numbers.long(), tags).to(edge_vec.dtype)  # (N, C), as precise as the positions
        hidden_states = [h]
        for block in self.blocks:
            h = block(h, graph)
            hidden_states.append(h)
        if self.lin_skip is not None:
            h = self.act(self.lin_skip(torch.cat(hidden_states, dim=1))).to(h.dtype)
        return NodeFeatures(h, tuple(hidden_states))

    @classmethod
    def default_heads(cls, targets: Iterable[Target]) -> dict[str, dict[str, Any]]:
        """An energy head for every scalar of systems, a force head for vectors of atoms."""
        heads = {}
        for target in targets:
            modules = {("system", 0): "faenet_energy_head", ("atom", 1): "faenet_force_head"}
            module = modules.get((target.level, target.rank))
            if module is None:
                raise ValueError(f"outputs.{target.name}: FAENet has no head for it; name one in model.heads")
            heads[target.name] = {"module": module, "prop": target.name}
        return heads
