"""SphereNet: spherical message passing (Liu et al., ICLR 2022, arXiv:2102.05013), a DimeNet++ with torsions.

A neighbour k of j is seen in spherical coordinates around the edge j -> i: distance d_kj, angle theta = kji, and the
torsion phi of the plane of k to the next plane, counterclockwise around the edge, in which j has a neighbour (section
3.1). Torsions of all neighbours around an edge add up to 2 pi.

    m_ji <- f(m_ji, sum_k g(m_kj, R(d_kj)) * W A(d_kj, theta) * W' T(d_kj, theta, phi))
    A = j_l(z_ln d / c) Y_l^0(theta),     T = j_l(z_ln d / c) Y_l^m(theta, phi)

E is a sum over atoms and blocks, as of DimeNet++; forces are -dE/dX.

Invariant under rotations, not under reflections: the next plane is then the one before. Discontinuous where two
neighbours get into one plane with the edge, because both then change the plane that they refer to. Neighbours within
0.0001 of one azimuth are taken as one plane, and the torsion is to the next: images of atoms are exactly in a plane,
and rounding must not decide. A neighbour on the line of the edge has no plane; it stays without torsion.

Shapes: E edges j -> i, T triplets k -> j -> i, L degrees, R radial functions.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad
from torch_geometric.nn.inits import glorot_orthogonal

from faenet_ocp.common.checks import positive
from faenet_ocp.models.base import option
from faenet_ocp.models.peers import directions as geometry
from faenet_ocp.models.peers.dimenetpp import DimeNetPlusPlus, DimeNetPlusPlusOptions
from faenet_ocp.models.peers.layers import at_least

_SAME_PLANE = 1e-4
"""Radian."""


@dataclass(frozen=True, kw_only=True)
class SphereNetOptions(DimeNetPlusPlusOptions):
    """Options of `SphereNet`; the defaults are those of the authors' example for QM9, with OC20's cutoff.

    Attributes:
        hidden_channels: channels of the messages of edges.
        num_blocks: number of interaction blocks.
        int_emb_size, basis_emb_size: channels that triplets, and their basis functions, are projected to.
        out_emb_channels: channels of the output blocks.
        num_spherical, num_radial: L and R, basis functions of angles and torsions, and of distances.
        num_before_skip, num_after_skip: residual layers of an interaction block.
        num_output_layers: layers of the output blocks.
        cutoff: Angstrom.
    """

    hidden_channels: int = option(128, at_least(2))
    num_blocks: int = option(4, at_least(1))
    out_emb_channels: int = option(256, at_least(1))
    num_spherical: int = option(3, at_least(2))
    cutoff: float = option(6.0, positive)


class SphereNet(DimeNetPlusPlus):
    """The network up to sums of messages at atoms. Keyword arguments are those of `SphereNetOptions`."""

    options_class = SphereNetOptions
    options: SphereNetOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for interaction in self.interactions:  # what it multiplies the messages of triplets by
            interaction.lin_sbf1, interaction.lin_sbf2 = nn.Identity(), TripletGate(self.options)

    def triplet_basis(self, distance: Tensor, edge_vec: Tensor, kj: Tensor, ji: Tensor) -> Tensor:
        """A and T of every triplet side by side, (T, L R + L^2 R)."""
        size = self.options.num_spherical
        of_degree = geometry.degrees(size)
        harmonics = geometry.spherical_harmonics(triplet_geometry(edge_vec, kj, ji), size)[:, :, None]
        radial = geometry.bessel_functions(self.sbf, distance)[kj]
        angle = radial * harmonics[:, [degree * (degree + 1) for degree in range(size)]]
        return torch.cat([angle.flatten(1), (radial[:, of_degree] * harmonics).flatten(1)], dim=1)


class TripletGate(nn.Module):
    """The product of what two layers make of the basis of angles, and two others of that of torsions."""

    def __init__(self, options: SphereNetOptions) -> None:
        super().__init__()
        functions = options.num_spherical * options.num_radial
        self.sizes = [functions, functions * options.num_spherical]
        self.parts = nn.ModuleList()
        for size in self.sizes:
            layers = [nn.Linear(size, options.basis_emb_size, bias=False)]
            layers.append(nn.Linear(options.basis_emb_size, options.int_emb_size, bias=False))
            for layer in layers:
                glorot_orthogonal(layer.weight, scale=2.0)
            self.parts.append(nn.Sequential(*layers))

    def forward(self, basis: Tensor) -> Tensor:
        """(T, L R + L^2 R) -> (T, int_emb_size)."""
        angle, torsion = (part(given) for part, given in zip(self.parts, basis.split(self.sizes, 1), strict=True))
        return angle * torsion


def triplet_geometry(edge_vec: Tensor, kj: Tensor, ji: Tensor) -> Tensor:
    """Where k is, seen along the edge from j to i: sin theta cos phi, sin theta sin phi, cos theta, (T, 3).

    Args:
        edge_vec: (E, 3), as for `Backbone.forward`.
        kj, ji: numbers of edges, (T,), from `triplets`.
    """
    direction = geometry.unit(edge_vec)
    axis = -direction[ji]
    reference = pad(direction, (0, 0, 0, 1))[next_planes(direction, kj, ji)]
    local = geometry.components(direction[kj], axis, reference)
    return local * local.new_tensor([1, -1, 1])  # from k to the reference, not from the reference to k


@torch.no_grad()
def next_planes(direction: Tensor, kj: Tensor, ji: Tensor) -> Tensor:
    """For every triplet k -> j -> i another edge to j, the next one counterclockwise around the axis from j to i.

    It is the edge itself if no other is in another plane.

    Args:
        direction: of edges, (E, 3), unit vectors.
        kj, ji: numbers of edges, (T,).

    Returns:
        numbers of edges, (T,); E where k is on the axis and has no plane.
    """
    azimuth, has_plane = _azimuths(direction, kj, ji)
    triplet = torch.nonzero(has_plane)[:, 0]
    triplet = triplet[torch.argsort(azimuth[triplet])]
    triplet = triplet[torch.argsort(ji[triplet], stable=True)]  # around one edge after the other
    azimuth, axis, place = azimuth[triplet], ji[triplet], torch.arange(len(triplet), device=ji.device)
    count = torch.bincount(axis, minlength=len(direction))
    end = count.cumsum(0)[axis]
    begin = end - count[axis]
    before = torch.where(place == begin, end, place) - 1
    is_new = torch.remainder(azimuth - azimuth[before], 2 * math.pi) > _SAME_PLANE  # not in the plane of the one before
    start = pad(place.where(is_new, len(place)), (0, 1), value=len(place))
    start = start.flip(0).cummin(0).values.flip(0)  # the first new plane from here on
    following = start[place + 1]
    following = following.where(following < end, start[begin])
    following = following.where(following < end, place)
    result = torch.full_like(kj, len(direction))
    result[triplet] = kj[triplet[following]]
    return result


def _azimuths(direction: Tensor, kj: Tensor, ji: Tensor) -> tuple[Tensor, Tensor]:
    """Azimuths of k around the axes from j to i, (T,), from an arbitrary zero of each axis; whether k has one, (T,)."""
    axis = -direction
    zero = geometry.across(one_hot(axis.abs().argmin(dim=1), 3).to(axis), axis)
    perpendicular = geometry.across(direction[kj], axis[ji])
    cosine = (perpendicular * zero[ji]).sum(dim=1)
    sine = (perpendicular * torch.linalg.cross(axis, zero)[ji]).sum(dim=1)
    return torch.atan2(sine, cosine), perpendicular.any(dim=1)
