"""Initial embeddings of FAENet: of atoms (section 4, appendix B.1) and of edges (equation 7).

Shapes: N atoms, E edges j -> i; C hidden_channels, F num_filters. Edge vectors in Angstrom.
"""

import math

import torch
from torch import Tensor, nn

from faenet_ocp.common.checks import ACTIVATIONS
from faenet_ocp.common.elements import (
    MAX_ATOMIC_NUMBER,
    NUM_GROUPS,
    NUM_PERIODS,
    PROPERTIES,
    element_table,
    standardised_properties,
)
from faenet_ocp.models.base import NUM_TAGS, check_elements
from faenet_ocp.models.message_passing import dense
from faenet_ocp.models.options import FAENetOptions

NUM_HARMONICS = 15


class AtomEmbedding(nn.Module):
    """h_i = act(MLP([Emb(Z) | Emb(tag) | properties | Emb(period) | Emb(group)])).

    All parts together have C channels; the embedding of Z has what the others leave. The 14 physical properties of
    `elements.PROPERTIES` enter as they are, or through a linear layer to `phys_hidden_channels`.

    Raises:
        ValueError: the parts leave no channel for the embedding of Z.
    """

    known_elements: Tensor
    period: Tensor
    group: Tensor
    properties: Tensor

    def __init__(self, options: FAENetOptions) -> None:
        super().__init__()
        self.act = ACTIVATIONS[options.act]
        channels, tag, pg = options.hidden_channels, options.tag_hidden_channels, options.pg_hidden_channels
        physical = (options.phys_hidden_channels or len(PROPERTIES)) if options.phys_embeds else 0
        others = tag + physical + 2 * pg
        if channels <= others:
            raise ValueError(
                f"hidden_channels: {channels} leaves no channel for the atomic number: tag {tag}, physical properties "
                f"{physical}, period and group 2 x {pg} take {others}"
            )
        num_elements = MAX_ATOMIC_NUMBER + 1
        self.register_buffer("known_elements", torch.arange(num_elements) > 0)
        self.element = nn.Embedding(num_elements, channels - others)
        self.tag = nn.Embedding(NUM_TAGS, tag) if tag else None
        self.has_properties = options.phys_embeds
        if self.has_properties:
            self.register_buffer("properties", standardised_properties())
        learnt = self.has_properties and options.phys_hidden_channels > 0
        self.lin_properties = dense(len(PROPERTIES), physical) if learnt else None
        self.has_period_group = pg > 0
        if self.has_period_group:
            self.register_buffer("period", element_table().period.clone())
            self.register_buffer("group", element_table().group.clone())
            self.period_embedding = nn.Embedding(NUM_PERIODS + 1, pg)
            self.group_embedding = nn.Embedding(NUM_GROUPS + 1, pg)
        self.lin = dense(channels, channels)
        self.lin_2 = dense(channels, channels) if options.second_layer_MLP else None

    def forward(self, atomic_numbers: Tensor, tags: Tensor | None) -> Tensor:
        """(N,) and (N,) -> (N, C).

        Raises:
            ValueError: an element that the model does not know, or tags are needed and missing.
        """
        check_elements(atomic_numbers, self.known_elements)
        parts = [self.element(atomic_numbers)]
        if self.tag is not None:
            if tags is None:
                raise ValueError("tags: the model embeds them (tag_hidden_channels > 0), but the data has none")
            parts.append(self.tag(tags))
        if self.has_properties:
            properties = self.properties[atomic_numbers]
            parts.append(properties if self.lin_properties is None else self.lin_properties(properties))
        if self.has_period_group:
            parts.append(self.period_embedding(self.period[atomic_numbers]))
            parts.append(self.group_embedding(self.group[atomic_numbers]))
        h = self.act(self.lin(torch.cat(parts, dim=1)))
        return h if self.lin_2 is None else self.act(self.lin_2(h))


class GaussianSmearing(nn.Module):
    """RBF(d): Gaussians of distances, centred at equal steps on [0, cutoff], one step wide.

    Args:
        cutoff: largest centre, Angstrom.
        num_gaussians: number of centres, at least 2.
    """

    offset: Tensor

    def __init__(self, *, cutoff: float, num_gaussians: int) -> None:
        super().__init__()
        self.register_buffer("offset", torch.linspace(0.0, cutoff, num_gaussians))
        self.cutoff = cutoff
        self.coefficient = -0.5 * ((num_gaussians - 1) / cutoff) ** 2

    def forward(self, distance: Tensor) -> Tensor:
        """(E,) -> (E, num_gaussians)."""
        return torch.exp(self.coefficient * (distance[:, None] - self.offset).square())


def spherical_harmonics(vectors: Tensor) -> Tensor:
    """Real spherical harmonics of degree 1, 2 and 3 as homogeneous polynomials.

    Polar axis y; for unit vectors the squares of a degree l sum to 2l + 1 (e3nn's convention).

    Args:
        vectors: (E, 3).

    Returns:
        (E, 15), by degree, then by order -l to l.
    """
    x, y, z = vectors.unbind(dim=1)
    xx, yy, zz = x * x, y * y, z * z
    ring = 4 * yy - xx - zz
    columns = [
        math.sqrt(3) * x,
        math.sqrt(3) * y,
        math.sqrt(3) * z,
        math.sqrt(15) * x * z,
        math.sqrt(15) * x * y,
        math.sqrt(5) * (yy - (xx + zz) / 2),
        math.sqrt(15) * y * z,
        math.sqrt(15) / 2 * (zz - xx),
        math.sqrt(70) / 4 * x * (3 * zz - xx),
        math.sqrt(105) * x * y * z,
        math.sqrt(42) / 4 * x * ring,
        math.sqrt(7) / 2 * y * (2 * yy - 3 * (xx + zz)),
        math.sqrt(42) / 4 * z * ring,
        math.sqrt(105) / 2 * y * (zz - xx),
        math.sqrt(70) / 4 * z * (zz - 3 * xx),
    ]
    return torch.stack(columns, dim=1)


class EdgeEmbedding(nn.Module):
    """e_ij = act(MLP(features of the edge vector)), equation (7).

    Features by `edge_embed_type` (Table 6):

        all_rij   r_ij and RBF(d_ij), each through a linear layer to half of the channels (baseline)
        rij       r_ij
        sh        spherical harmonics of the direction, degrees 1 to 3
        all       r_ij, spherical harmonics and RBF(d_ij)

    As in the authors' code, the harmonics are those of (r_ij / d_ij + 1) / 2.
    """

    def __init__(self, options: FAENetOptions) -> None:
        super().__init__()
        self.act = ACTIVATIONS[options.act]
        self.edge_embed_type, filters, gaussians = options.edge_embed_type, options.num_filters, options.num_gaussians
        self.smearing = GaussianSmearing(cutoff=options.cutoff, num_gaussians=gaussians)
        features = {"all_rij": 3, "rij": 3, "sh": NUM_HARMONICS, "all": 3 + NUM_HARMONICS + gaussians}
        half = filters // 2 if self.edge_embed_type == "all_rij" else 0
        self.lin = dense(features[self.edge_embed_type], half or filters)
        self.lin_rbf = dense(gaussians, filters - half) if half else None
        self.lin_2 = dense(filters, filters) if options.second_layer_MLP else None

    def forward(self, edge_vec: Tensor) -> Tensor:
        """(E, 3) -> (E, F)."""
        e = self.act(self._first_layer(edge_vec))
        return e if self.lin_2 is None else self.act(self.lin_2(e))

    def _first_layer(self, edge_vec: Tensor) -> Tensor:
        if self.edge_embed_type == "rij":
            return self.lin(edge_vec)
        distance = torch.linalg.vector_norm(edge_vec, dim=1)
        if self.lin_rbf is not None:
            return torch.cat([self.lin(edge_vec), self.lin_rbf(self.smearing(distance))], dim=1)
        harmonics = spherical_harmonics((edge_vec / distance[:, None] + 1) / 2)
        if self.edge_embed_type == "sh":
            return self.lin(harmonics)
        return self.lin(torch.cat([edge_vec, harmonics, self.smearing(distance)], dim=1))
