"""Initial embeddings of FAENet: of atoms (section 4, appendix B.1) and of edges (equation 7).

Shapes: N atoms, E edges j -> i; C hidden_channels, F num_filters. Edge vectors in Angstrom.
"""

import math

import torch
from torch import Tensor, nn

from faenet_ocp.common.elements import (
    MAX_ATOMIC_NUMBER,
    NUM_GROUPS,
    NUM_PERIODS,
    PROPERTIES,
    describe,
    element_table,
    standardised_properties,
)
from faenet_ocp.kernels.cpu_edges import Activation, Knots, Remembered, cubic_interpolation
from faenet_ocp.models.message_passing import dense

EDGE_EMBED_TYPES = ("all_rij", "rij", "sh", "all")
KNOTS_PER_GAUSSIAN = 24
"""The interpolation is then as exact as float32: the error is below 3e-7 of the function's size, for smooth weights."""
NUM_TAGS = 3
NUM_HARMONICS = 15


class AtomEmbedding(nn.Module):
    """h_i = act(MLP([Emb(Z) | Emb(tag) | properties | Emb(period) | Emb(group)])).

    All parts together have C channels; the embedding of Z has what the others leave.

    Args:
        hidden_channels: C.
        tag_hidden_channels: channels of the tag (OC20: 0 sub-surface, 1 surface, 2 adsorbate).
        pg_hidden_channels: channels of the period, and as many of the group.
        phys_embeds: whether to use the 14 physical properties of `elements.PROPERTIES`.
        phys_hidden_channels: channels of a learnt linear layer on them; 0 takes them as they are.
        second_layer: whether the MLP has two layers.
        act: activation function.

    Raises:
        ValueError: the parts leave no channel for the embedding of Z.
    """

    known_elements: Tensor
    period: Tensor
    group: Tensor
    properties: Tensor

    def __init__(
        self,
        *,
        hidden_channels: int,
        tag_hidden_channels: int,
        pg_hidden_channels: int,
        phys_embeds: bool,
        phys_hidden_channels: int,
        second_layer: bool,
        act: Activation,
    ) -> None:
        super().__init__()
        self.act = act
        phys_channels = (phys_hidden_channels or len(PROPERTIES)) if phys_embeds else 0
        others = tag_hidden_channels + phys_channels + 2 * pg_hidden_channels
        if hidden_channels <= others:
            raise ValueError(
                f"hidden_channels: {hidden_channels} leaves no channel for the atomic number: tag "
                f"{tag_hidden_channels}, physical properties {phys_channels}, period and group "
                f"2 x {pg_hidden_channels} take {others}"
            )
        num_elements = MAX_ATOMIC_NUMBER + 1
        known = torch.arange(num_elements) > 0
        self.register_buffer("known_elements", known)
        self.element = nn.Embedding(num_elements, hidden_channels - others)
        self.tag = nn.Embedding(NUM_TAGS, tag_hidden_channels) if tag_hidden_channels else None
        self.has_properties = phys_embeds
        if phys_embeds:
            self.register_buffer("properties", standardised_properties())
        self.lin_properties = dense(len(PROPERTIES), phys_channels) if phys_embeds and phys_hidden_channels else None
        self.has_period_group = pg_hidden_channels > 0
        if self.has_period_group:
            self.register_buffer("period", element_table().period.clone())
            self.register_buffer("group", element_table().group.clone())
            self.period_embedding = nn.Embedding(NUM_PERIODS + 1, pg_hidden_channels)
            self.group_embedding = nn.Embedding(NUM_GROUPS + 1, pg_hidden_channels)
        self.lin = dense(hidden_channels, hidden_channels)
        self.lin_2 = dense(hidden_channels, hidden_channels) if second_layer else None

    def forward(self, atomic_numbers: Tensor, tags: Tensor | None) -> Tensor:
        """(N,) and (N,) -> (N, C)."""
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

    def check_elements(self, atomic_numbers: Tensor) -> None:
        """Refuse atomic numbers that have no row, or whose row was never trained.

        On the CPU this raises at once. Elsewhere looking at the values would make the host wait
        for the device in every step, so the device checks by itself: the error comes later and
        names no element. Check there where the data still is on the CPU to have it named.

        Raises:
            ValueError: naming the elements (on the CPU).
        """
        if atomic_numbers.device.type != "cpu" or torch.compiler.is_compiling():
            known = self.known_elements[atomic_numbers].all()
            torch._assert_async(known, "atomic_numbers: an element that the model does not know")
            return
        in_table = (atomic_numbers > 0) & (atomic_numbers <= MAX_ATOMIC_NUMBER)
        known = in_table & self.known_elements.cpu()[atomic_numbers.where(in_table, 0)]
        if not known.all():
            names = [describe(z) for z in atomic_numbers[~known].unique().tolist()]
            raise ValueError(f"atomic_numbers: the model has no trained embedding for {', '.join(names)}")


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
        self.coefficient = -0.5 * ((num_gaussians - 1) / cutoff) ** 2
        self.spacing = cutoff / (num_gaussians - 1) / KNOTS_PER_GAUSSIAN
        # Eight widths beyond the last centre, all Gaussians are below 1e-13, and a knot more on either side.
        self.num_knots = (num_gaussians - 1 + 8) * KNOTS_PER_GAUSSIAN + 4

    def knots(self) -> Tensor:
        """Distances to interpolate between, (K,): from one step below 0 to where all Gaussians have vanished."""
        steps = torch.arange(-1, self.num_knots - 1, device=self.offset.device)
        return steps.to(self.offset.dtype) * self.spacing

    def place(self, distance: Tensor) -> Tensor:
        """Distances in steps between knots, (E,), no farther than the knots reach."""
        return (distance / self.spacing).clamp(max=self.num_knots - 4)

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

    Args:
        edge_embed_type: see above.
        num_filters: F.
        num_gaussians: Gaussians of the RBF.
        cutoff: end of the RBF, Angstrom.
        second_layer: whether the MLP has two layers.
        act: activation function.
    """

    def __init__(
        self,
        *,
        edge_embed_type: str,
        num_filters: int,
        num_gaussians: int,
        cutoff: float,
        second_layer: bool,
        act: Activation,
    ) -> None:
        super().__init__()
        self.act = act
        self.edge_embed_type = edge_embed_type
        self.smearing = GaussianSmearing(cutoff=cutoff, num_gaussians=num_gaussians)
        num_features = {
            "all_rij": 3,
            "rij": 3,
            "sh": NUM_HARMONICS,
            "all": 3 + NUM_HARMONICS + num_gaussians,
        }[edge_embed_type]
        half = num_filters // 2 if edge_embed_type == "all_rij" else 0
        self.lin = dense(num_features, half or num_filters)
        self.lin_rbf = dense(num_gaussians, num_filters - half) if half else None
        self.lin_2 = dense(num_filters, num_filters) if second_layer else None
        self.at_knots = Remembered()

    def forward(self, edge_vec: Tensor) -> Tensor:
        """(E, 3) -> (E, F)."""
        e = self.act(self._first_layer(edge_vec))
        return e if self.lin_2 is None else self.act(self.lin_2(e))

    def tabulates(self, edge_vec: Tensor) -> bool:
        """Whether `with_knots` may be taken instead of `forward`, and is faster.

        It is where arithmetic is what costs, on a CPU, if there are more edges than knots, or the same knots serve many
        batches. In float64, and for derivatives by the positions, it would not be exact enough.
        """
        usable = self.lin_rbf is not None and self.lin_2 is None and not edge_vec.requires_grad
        many = len(edge_vec) > 2 * self.smearing.num_knots or not torch.is_grad_enabled()
        fast = edge_vec.device.type == "cpu" and many
        return usable and fast and edge_vec.dtype != torch.float64 and not torch.compiler.is_compiling()

    def with_knots(self, edge_vec: Tensor) -> tuple[Tensor, Knots]:
        """The first channels of e_ij, those of r_ij, (E, F // 2), and the others as a function of the distance.

        Raises:
            ValueError: the embedding is not `all_rij` in one layer.
        """
        if self.lin_rbf is None or self.lin_2 is not None:
            raise ValueError("no channels of the edge embedding depend on the distance alone")
        place = self.smearing.place(torch.linalg.vector_norm(edge_vec, dim=1))
        lin_rbf, smearing = self.lin_rbf, self.smearing
        values = self.at_knots(lambda: self.act(lin_rbf(smearing(smearing.knots()))), lin_rbf.weight, lin_rbf.bias)
        return self.act(self.lin(edge_vec)), Knots(values, *cubic_interpolation(place))

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
