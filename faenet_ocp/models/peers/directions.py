"""Directions in local frames and their spherical harmonics, for networks that look at angles and torsions.

A direction has the polar angle theta and the azimuth phi in a frame of unit vectors e1, e2, e3; here it is given by its
components (sin theta cos phi, sin theta sin phi, cos theta). Harmonics are polynomials of these, so no angle is ever
computed, and derivatives stay finite where an angle has none. A missing e1 is zero; what is left then is the average
over phi.

Shapes: M directions, E edges j -> i, L degrees (num_spherical), R radial functions.
"""

import copy
import functools
import math

import torch
from torch import Tensor
from torch_geometric.nn.models.dimenet import SphericalBasisLayer

STRAIGHT = 0.1
"""Sine of the angle to an axis, below which a direction has no azimuth around it: about 6 degrees."""


def unit(vectors: Tensor, *, shortest: float = 0.0) -> Tensor:
    """Vectors (M, 3) at length one; zero, with a zero derivative, where they are not longer than `shortest`."""
    square = vectors.square().sum(dim=-1, keepdim=True)
    long = square > shortest**2
    return vectors.where(long, 0) * square.where(long, 1).rsqrt()


def across(directions: Tensor, axis: Tensor) -> Tensor:
    """Unit vectors of the parts of unit vectors that are perpendicular to an axis; zero along it (`STRAIGHT`).

    Args:
        directions, axis: (M, 3), of length one or zero.
    """
    return unit(directions - (directions * axis).sum(dim=-1, keepdim=True) * axis, shortest=STRAIGHT)


def components(directions: Tensor, axis: Tensor, reference: Tensor) -> Tensor:
    """Components of directions in the frame with e3 the axis, and a reference direction at phi = 0.

    Args:
        directions: (M, 3), unit vectors.
        axis, reference: (M, 3), of length one or zero; the reference need not be perpendicular to the axis.

    Returns:
        (M, 3): sin theta cos phi, sin theta sin phi, cos theta; phi is counted counterclockwise around the axis.
    """
    e1 = across(reference, axis)
    frame = torch.stack([e1, torch.linalg.cross(axis, e1), axis], dim=1)
    return (frame * directions[:, None]).sum(dim=2)


def spherical_harmonics(direction: Tensor, num_spherical: int) -> Tensor:
    """Real Y_l^m(theta, phi) for l < num_spherical, normalised on the sphere, without the sign (-1)^m.

    Args:
        direction: (M, 3), from `components`.
        num_spherical: L.

    Returns:
        (M, L^2), in the order l = 0, 1, ... and m = -l to l; m > 0 goes with cos(m phi), m < 0 with sin(|m| phi).
    """
    x, y, z = direction.unbind(dim=1)
    cosine, sine = torch.ones_like(z), torch.zeros_like(z)  # of m phi, times sin(theta)^m
    columns = {}
    for m in range(num_spherical):
        for degree, value in enumerate(_legendre(z, m, num_spherical), start=m):
            columns[degree, m] = value * cosine
            if m > 0:
                columns[degree, -m] = value * sine
        cosine, sine = cosine * x - sine * y, sine * x + cosine * y
    return torch.stack([columns[degree, m] for degree in range(num_spherical) for m in _orders(degree)], dim=1)


def zonal_harmonics(cosine: Tensor, num_spherical: int) -> Tensor:
    """Y_l^0 for l < num_spherical, from the cosine of an angle: (M,) -> (M, L)."""
    return torch.stack(_legendre(cosine, 0, num_spherical), dim=1)


def degrees(num_spherical: int) -> list[int]:
    """l of every column of `spherical_harmonics`."""
    return [degree for degree in range(num_spherical) for _ in _orders(degree)]


def _orders(degree: int) -> range:
    return range(-degree, degree + 1)


def _legendre(z: Tensor, m: int, num_spherical: int) -> list[Tensor]:
    """P_l^m(z) / sin(theta)^m for l = m to L - 1 by recursion over l, times the constant of Y_l^m."""
    below, value = torch.zeros_like(z), torch.full_like(z, math.prod(range(1, 2 * m, 2)))
    found = []
    for degree in range(m, num_spherical):
        if degree > m:
            below, value = value, ((2 * degree - 1) * z * value - (degree + m - 1) * below) / (degree - m)
        square = (2 * degree + 1) / (4 * math.pi) * math.factorial(degree - m) / math.factorial(degree + m)
        found.append(value * math.sqrt(square * (2 if m else 1)))
    return found


def spherical_basis(num_spherical: int, num_radial: int, cutoff: float) -> SphericalBasisLayer:
    """PyTorch Geometric's layer, whose formulas take up to twenty seconds to derive: once in a process."""
    return copy.deepcopy(_spherical_basis(num_spherical, num_radial, cutoff))


_spherical_basis = functools.cache(SphericalBasisLayer)


def bessel_functions(layer: SphericalBasisLayer, distance: Tensor) -> Tensor:
    """j_l(z_ln d / cutoff), normalised on [0, cutoff] and zero at its end: (E,) -> (E, L, R).

    They are PyTorch Geometric's, without the envelope that its layer multiplies them by.
    """
    scaled = distance / layer.cutoff
    values = torch.stack([function(scaled) for function in layer.bessel_funcs], dim=1)
    return values.unflatten(1, (layer.num_spherical, -1))
