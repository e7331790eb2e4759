"""Rings of frames where two variances of a system are nearly equal; `frames` says what they are for.

Shapes: N atoms, B systems, d axes, T rotations. Everything is float64.
"""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from faenet_ocp.frames.rotations import rotation_from_quaternion

MIN_EXTENT = 1e-6
"""Angstrom (root mean square): below it a system has no extent along an axis."""

GAP = 0.02
"""Relative difference of two variances below which a system is also seen in a ring of frames. With half of it gradient
forces in between grow by a third, with twice of it they stay as they are. Slabs: none of 500 in 2D, 2 % in 3D."""

LENGTH = 0.1
"""Angstrom (root mean square): differences of extent that are small beside it count as small."""

RING = 6
"""Rotations of a ring, over half a turn. With the opposite frames twelve, so that the directions of a square or a
triangle, as `_ring` finds them, all begin the same ring."""

DIRECTED = 0.1
"""Least sum over the atoms of the moment that a ring begins with, over the sum of magnitudes, to be differentiated."""


class PrincipalAxes(NamedTuple):
    """Float64: U (B, d, d) and variances (B, d) in Angstrom^2, decreasing, as constants.

    And with this constant U as functions of the positions: (X - t) U, (N, d), and U^T C U, (B, d, d), of the
    covariance C.
    """

    axes: Tensor
    variance: Tensor
    projected: Tensor
    covariance: Tensor


class Part(NamedTuple):
    """Frames that share their weight: T rotations (B or 1, T, d, d) of the axes (B, d, d), and their share (B,)."""

    axes: Tensor
    turns: Tensor
    share: Tensor


def frame_parts(principal: PrincipalAxes, batch: Tensor) -> list[Part]:
    """Principal axes, and as far as any system needs them the rings of neighbouring pairs, and in 3D all rotations."""
    dim = principal.axes.shape[1]
    variance = principal.covariance.diagonal(dim1=1, dim2=2)
    larger, smaller = variance[:, :-1], variance[:, 1:]
    gap = (larger - smaller) / (larger + smaller + LENGTH**2)
    ring = (1 - (gap / GAP).square().clamp(max=1)).square()  # (B, d - 1), the share of each if it were alone
    one = torch.eye(dim, dtype=gap.dtype, device=gap.device).expand(1, 1, dim, dim)
    parts = [Part(_moving_axes(principal), one, (1 - ring).prod(dim=1))]
    if not bool(ring.any()):
        return parts
    for pair in range(dim - 1):
        share = ring[:, pair]
        if dim == 3:
            share = share * (1 - ring[:, 1 - pair])
        parts.append(Part(_moving_axes(principal, (pair, pair + 1)), _ring(principal, batch, pair), share))
    if dim == 3:
        parts.append(Part(one[0].expand_as(principal.axes), _icosahedral_turns(one), ring.prod(dim=1)))
    return parts


def _moving_axes(principal: PrincipalAxes, still: tuple[int, int] | None = None) -> Tensor:
    """U as a function of the positions, to first order; two axes can be held still against each other.

    Not by ``torch.linalg.eigh``, whose derivative is nan where variances are equal.
    """
    axes, variance, _, covariance = principal
    if not covariance.requires_grad:
        return axes
    difference = variance.unsqueeze(1) - variance.unsqueeze(2)
    size = variance.unsqueeze(1) + variance.unsqueeze(2) + LENGTH**2
    # The share of axes with equal variances falls faster than their derivative rises.
    moves = difference.abs() > 1e-12 * size
    if still is not None:
        moves[:, still, still[::-1]] = False
    turn = torch.where(moves, covariance / difference.where(moves, 1.0), 0.0)
    return axes + axes @ (turn - turn.detach())


def _ring(principal: PrincipalAxes, batch: Tensor, pair: int) -> Tensor:
    """Rotations of two neighbouring axes over half a turn, (B, RING, d, d).

    The first is in the direction in which the atoms lie around the third axis, up to a twelfth of a turn: the phase of
    sum_i (x_i + i y_i)^12, which has one in every system with a three-, four- or six-fold axis, and does not turn
    quickly where the two variances are nearly equal. Where that sum nearly vanishes, its derivative is left out.
    """
    num_systems = len(principal.axes)
    z = torch.complex(principal.projected[:, pair], principal.projected[:, pair + 1])
    with torch.no_grad():
        size = system_mean(z.abs().square(), batch, num_systems).sqrt().clamp(min=MIN_EXTENT)
    z = z / size[batch]
    sixth = (z * z * z) * (z * z * z)
    twelfth = sixth * sixth
    moment = system_sum(twelfth, batch, num_systems)
    with torch.no_grad():
        directed = moment.abs() > DIRECTED * system_sum(twelfth.abs(), batch, num_systems).clamp(min=1)
    angle = torch.where(directed, moment, moment.detach()).angle() / 12
    angle = angle.unsqueeze(1) + torch.arange(RING, dtype=angle.dtype, device=angle.device) * (torch.pi / RING)
    cos, sin = angle.cos(), angle.sin()
    turns = torch.eye(principal.axes.shape[1], dtype=cos.dtype, device=cos.device).repeat(*angle.shape, 1, 1)
    turns[..., pair, pair], turns[..., pair, pair + 1] = cos, -sin
    turns[..., pair + 1, pair], turns[..., pair + 1, pair + 1] = sin, cos
    return turns


def _icosahedral_turns(like: Tensor) -> Tensor:
    """The 60 rotations of an icosahedron, up to half turns about the three axes, (1, 15, 3, 3)."""
    golden = (1 + 5**0.5) / 2
    cycle = like.new_tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0]])
    # A fifth of a turn about (0, 1, golden), as a quaternion.
    fifth = rotation_from_quaternion(like.new_tensor([[golden / 2, 0, 0.5 / golden, 0.5]]))[0]
    powers = ([torch.linalg.matrix_power(turn, k) for k in range(n)] for turn, n in ((fifth, 5), (cycle, 3)))
    return torch.stack([one @ other for one, other in product(*powers)]).unsqueeze(0)


def system_sum(values: Tensor, batch: Tensor, num_systems: int) -> Tensor:
    """Sum over the atoms of every system: (N, ...) -> (B, ...)."""
    return values.new_zeros(num_systems, *values.shape[1:]).index_add(0, batch, values)


def system_mean(values: Tensor, batch: Tensor, num_systems: int) -> Tensor:
    """Mean over the atoms of every system: (N, ...) -> (B, ...)."""
    count = system_sum(values.new_ones(len(values)), batch, num_systems).clamp(min=1)
    return system_sum(values, batch, num_systems) / count.reshape(-1, *[1] * (values.dim() - 1))
