"""Frames of frame averaging: rotations that take a system to a coordinate system of its own.

Equations (1) to (5) of the FAENet paper, batched over systems, in row-vector convention:
``X' = (X - t) @ U``, ``cell' = cell @ U`` and back ``F = F' @ U^T``.

Shapes: pos (N, 3) Angstrom; batch (N,) index of the system of every atom, in any order; B systems; K frames per system;
V views (a view is one system in one frame); d = ``dim``, the number of principal axes; ``rot`` (..., 3, 3) holds U, its
axes as columns, by decreasing variance.

``dim=3``: principal axes of all coordinates, t is the centroid.
``dim=2``: principal axes of x and y, t = (mean x, mean y, 0). z is kept exactly as it is, it is
neither rotated nor centred, so a shift along z is no symmetry here.

Methods
    full        every sign of every axis: 8 (E) or 4 (SE) frames in 3D, 4 or 2 in 2D
    stochastic  one of these, drawn uniformly and independently for every system
    det         the published code's fixed choice, the first of ``full``: no axis has a negative
                sum of components (SE: the last axis follows from det(U) = +1). Not equivariant
    canonical   the sign of an axis is fixed by the odd invariants of the system (below)
    none        the identity

In the SE groups det(U) = +1 for every frame, also when the eigenvectors come out left-handed.

Canonical signs
    With projections p_i of the atoms on an axis, three numbers change sign with that axis and with nothing else: the
    third moment, the Z-weighted third moment and the Z-weighted first moment, each divided by the same sum of absolute
    terms, so in [-1, 1]. The axis is turned so that the one of largest magnitude is positive. It stays undecided, and
    both signs are kept with equal weight, when all three are below ``tolerance``, when two of opposite sign tie (to
    within ``TIE * tolerance``, where rounding could pick the winner), or when the system has no extent along it (below
    ``tolerance`` times the largest one; nothing but rounding is left there). In SE groups one sign follows from det(U)
    = +1: the first d - 1 decided axes are fixed, in order of decreasing variance, and every right-handed frame that
    agrees with them is kept. Decisions are made from quantities that the group leaves unchanged, so the weighted set of
    frames moves with the system and the average over it is exactly equivariant.

Degenerate spectra (two equal variances, up to symmetric tops and perfect cubes)
    Frames are always finite and orthonormal, and the same input gives the same frames. Within a degenerate eigenspace
    the basis is whatever the eigensolver returns: it does not move with the system, so no method is equivariant there.
    The exception is an eigenspace in which the system has no extent (linear molecules, one atom, all atoms at one
    point): every basis projects it on the same coordinates, and ``full`` and ``canonical`` stay equivariant because
    they contain both signs of such an axis. A coplanar system with distinct in-plane variances is not degenerate.
    ``frame_report`` names the systems concerned.

Frames are computed in float64 whatever the precision of ``pos`` and returned in that of ``pos``. They are
differentiable (signs are constants) except where the spectrum is degenerate: gradients there are infinite or nan. Pass
``pos.detach()`` to hold the frames constant.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
METHODS = ("full", "stochastic", "det", "canonical", "none")
DIMS = (2, 3)
GROUPS = ("E", "SE")

TIE = 1e-2
"""Share of ``tolerance`` by which the deciding odd invariant must lead one of opposite sign."""

MIN_EXTENT = 1e-6
"""Angstrom (root mean square): below it a system has no extent along an axis."""


class Frames(NamedTuple):
    """K frames for each of B systems.

    Attributes:
        rot: U of every frame, (B, K, 3, 3); the identity where the weight is 0.
        weight: share of every frame in the average, (B, K). Rows sum to 1; 0 marks padding.
    """

    rot: Tensor
    weight: Tensor


class Views(NamedTuple):
    """The frames that count, one after the other, sorted by system.

    Attributes:
        rot: (V, 3, 3).
        weight: (V,), sums to 1 over the views of a system.
        system: index of the system seen, (V,).
    """

    rot: Tensor
    weight: Tensor
    system: Tensor


class FrameReport(NamedTuple):
    """Systems in which frames are not unique.

    Attributes:
        ambiguous: axes, by decreasing variance, whose canonical sign is undecided, (B, d) bool.
        degenerate: two axes along which it extends have equal variances: no method is equivariant, (B,) bool.
        num_frames: frames that ``canonical`` averages, (B,) int64.
    """

    ambiguous: Tensor
    degenerate: Tensor
    num_frames: Tensor


class _PrincipalAxes(NamedTuple):
    """Float64: U (B, d, d), variances (B, d) in Angstrom^2, decreasing, and (X - t) U (N, d)."""

    axes: Tensor
    variance: Tensor
    projected: Tensor


def num_frames(dim: int, group: str) -> int:
    """Number of frames of one system, eq. (2): 8 or 4 in 3D, 4 or 2 in 2D, for E or SE."""
    _check_choice("dim", dim, DIMS)
    _check_choice("group", group, GROUPS)
    return 2**dim if group == "E" else 2 ** (dim - 1)


def compute_frames(
    pos: Tensor,
    batch: Tensor,
    num_systems: int,
    *,
    method: str,
    dim: int,
    group: str,
    atomic_numbers: Tensor | None = None,
    generator: Generators = None,
    tolerance: float = 1e-3,
) -> Frames:
    """Compute the frames of every system of a batch, eqs. (2) and (5).

    Args:
        pos: positions in Angstrom, (N, 3), as given: wrapping atoms into another image changes their frames.
        batch: index of the system of every atom, (N,) int64.
        num_systems: B.
        method: one of ``METHODS``, described at the head of this module.
        dim: 3, or 2 to keep z.
        group: "E" (with reflections) or "SE" (rotations only).
        atomic_numbers: (N,), read by ``canonical`` only.
        generator: source of the draws of ``stochastic``, or one for each system; torch's own if None.
        tolerance: canonical: odd invariants and relative extents below it count as 0.

    Returns:
        K = ``num_frames(dim, group)`` frames for ``full`` and ``canonical`` (padded with weight 0),
        K = 1 otherwise; of the dtype and device of ``pos``.

    Raises:
        ValueError: unknown option, wrong shape, positions that are not finite, or no ``atomic_numbers`` (canonical).
    """
    _check_choice("method", method, METHODS)
    _check_inputs(pos, batch, num_systems, dim, group)
    if method == "none":
        rot = torch.eye(3, dtype=pos.dtype, device=pos.device).repeat(num_systems, 1, 1, 1)
        return Frames(rot, torch.ones_like(rot[:, :, 0, 0]))

    principal = _principal_axes(pos, batch, num_systems, dim, group)
    patterns = _sign_patterns(dim, group, device=pos.device)
    if method == "canonical":
        lead = _sign_lead(principal, batch, atomic_numbers, tolerance)
        kept = _agreeing(patterns, lead, group)
    else:
        kept = torch.ones(num_systems, len(patterns), dtype=torch.bool, device=pos.device)
    rot = _embed(principal.axes.unsqueeze(1) * patterns.unsqueeze(1))
    if method == "det":
        rot, kept = rot[:, :1], kept[:, :1]
    elif method == "stochastic":
        drawn = _draw(len(patterns), num_systems, generator, pos.device)
        rot, kept = rot[torch.arange(num_systems, device=pos.device), drawn, None], kept[:, :1]
    rot = torch.where(kept[:, :, None, None], rot, torch.eye(3, dtype=rot.dtype, device=rot.device))
    weight = kept.to(pos.dtype) / kept.sum(dim=1, keepdim=True)
    return Frames(rot.to(pos.dtype), weight)


def frame_report(
    pos: Tensor,
    batch: Tensor,
    num_systems: int,
    *,
    dim: int,
    group: str,
    atomic_numbers: Tensor,
    tolerance: float = 1e-3,
) -> FrameReport:
    """Say which systems have undecided canonical axes or a degenerate spectrum; raises as ``compute_frames``.

    Args:
        pos, batch, num_systems, dim, group, atomic_numbers: as in ``compute_frames``.
        tolerance: as in ``compute_frames``; variances whose relative difference is below it count as equal.
    """
    _check_inputs(pos, batch, num_systems, dim, group)
    principal = _principal_axes(pos.detach(), batch, num_systems, dim, group)
    lead = _sign_lead(principal, batch, atomic_numbers, tolerance)
    kept = _agreeing(_sign_patterns(dim, group, device=pos.device), lead, group)
    larger, smaller = principal.variance[:, :-1], principal.variance[:, 1:]
    extended = ~_no_extent(principal.variance, tolerance)[:, :-1]
    equal = (larger - smaller <= tolerance * larger) & extended
    return FrameReport(ambiguous=lead == 0, degenerate=equal.any(dim=1), num_frames=kept.sum(dim=1))


def random_rotations(
    num_systems: int,
    *,
    dim: int,
    reflect: bool,
    generator: Generators = None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Frames:
    """Draw one random rotation per system, for data augmentation.

    Args:
        num_systems: B.
        dim: 3 for any rotation, 2 for rotations about z.
        reflect: also draw reflections: half of the matrices then have determinant -1.
        generator: source of randomness, or one for each system; torch's own if None.
        dtype, device: of the result.

    Returns:
        K = 1 frame per system, uniform (Haar measure) on SO(dim), or on O(dim) with ``reflect``.
    """
    _check_choice("dim", dim, DIMS)
    normals = _each(generator, num_systems, device, partial(torch.randn, dtype=torch.float64), 4)
    if dim == 3:
        axes = _rotation_from_quaternion(normals / normals.norm(dim=1, keepdim=True))
    else:
        cos, sin = (normals[:, :2] / normals[:, :2].norm(dim=1, keepdim=True)).unbind(1)
        axes = torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)
    if reflect:
        sign = 1 - 2 * _draw(2, num_systems, generator, normals.device)
        axes = torch.cat([axes[:, :, :1] * sign[:, None, None], axes[:, :, 1:]], dim=2)
    rot = _embed(axes).to(device=device, dtype=dtype).unsqueeze(1)
    return Frames(rot, torch.ones_like(rot[:, :, 0, 0]))


def flatten_frames(frames: Frames) -> Views:
    """List the frames of non-zero weight, sorted by system."""
    system, slot = (frames.weight > 0).nonzero(as_tuple=True)
    return Views(frames.rot[system, slot], frames.weight[system, slot], system)


def centroids(pos: Tensor, batch: Tensor, num_systems: int, *, dim: int = 3) -> Tensor:
    """Origin t of the frames, (B, 3): the mean position; its z is 0 when ``dim`` is 2."""
    _check_choice("dim", dim, DIMS)
    mean = _mean(pos[:, :dim].double(), batch, num_systems)
    return torch.nn.functional.pad(mean, (0, 3 - dim)).to(pos.dtype)


def rotate(vectors: Tensor, rot: Tensor) -> Tensor:
    """Take row vectors into frames, eq. (3): ``v @ U``.

    Elementwise on purpose: a matrix product would lose digits under autocast or TF32.

    Args:
        vectors: one vector per matrix, (M, 3), or a cell's three lattice rows, (M, 3, 3).
        rot: U, (M, 3, 3).
    """
    if vectors.dim() == 3:
        rot = rot.unsqueeze(1)
    return (vectors.unsqueeze(-1) * rot).sum(dim=-2)


def rotate_back(vectors: Tensor, rot: Tensor) -> Tensor:
    """Take row vectors out of frames again: ``v @ U^T``. Arguments as for ``rotate``."""
    return rotate(vectors, rot.transpose(-1, -2))


def _check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def _check_inputs(pos: Tensor, batch: Tensor, num_systems: int, dim: int, group: str) -> None:
    _check_choice("dim", dim, DIMS)
    _check_choice("group", group, GROUPS)
    if pos.dim() != 2 or pos.shape[1] != 3 or not pos.is_floating_point():
        raise ValueError(f"pos must be floating point (N, 3), not {pos.dtype} {tuple(pos.shape)}")
    if batch.shape != pos.shape[:1]:
        raise ValueError(f"batch must be ({len(pos)},) like pos, not {tuple(batch.shape)}")
    finite = pos.isfinite().all(dim=1)
    if not finite.all():
        systems = batch[~finite].unique().tolist()
        raise ValueError(f"pos of systems {systems} (of {num_systems}) holds nan or infinity")


def _sum(values: Tensor, batch: Tensor, num_systems: int) -> Tensor:
    """Sum over the atoms of every system: (N, ...) -> (B, ...)."""
    return values.new_zeros(num_systems, *values.shape[1:]).index_add(0, batch, values)


def _mean(values: Tensor, batch: Tensor, num_systems: int) -> Tensor:
    count = _sum(values.new_ones(len(values)), batch, num_systems).clamp(min=1)
    return _sum(values, batch, num_systems) / count.reshape(-1, *[1] * (values.dim() - 1))


def _principal_axes(pos: Tensor, batch: Tensor, num_systems: int, dim: int, group: str) -> _PrincipalAxes:
    """Diagonalise the covariance of every system; signs as in method ``det``."""
    coordinates = pos[:, :dim].double()
    centred = coordinates - _mean(coordinates, batch, num_systems)[batch]
    covariance = _mean(centred.unsqueeze(2) * centred.unsqueeze(1), batch, num_systems)
    variance, axes = torch.linalg.eigh(covariance)
    variance, axes = variance.flip(1), axes.flip(2)
    with torch.no_grad():
        # The eigensolver's signs differ between devices and batch sizes, these do not.
        signs = torch.where(axes.sum(dim=1) >= 0, 1.0, -1.0).to(axes.dtype)
        if group == "SE":
            signs[:, -1] *= torch.linalg.det(axes * signs.unsqueeze(1)).sign()
    axes = axes * signs.unsqueeze(1)
    projected = (centred.unsqueeze(2) * axes[batch]).sum(dim=1)
    return _PrincipalAxes(axes, variance, projected)


def _sign_patterns(dim: int, group: str, device: torch.device) -> Tensor:
    """Signs of the axes in every frame, (K, d), no sign changed first; SE: only products of +1."""
    patterns = product((1.0, -1.0), repeat=dim)
    kept = [pattern for pattern in patterns if group == "E" or prod(pattern) > 0]
    return torch.tensor(kept, dtype=torch.float64, device=device)


def _no_extent(variance: Tensor, tolerance: float) -> Tensor:
    """Axes along which a system has no extent, (B, d)."""
    extent = variance.clamp(min=0).sqrt()
    return extent <= (tolerance * extent[:, :1]).clamp(min=MIN_EXTENT)


@torch.no_grad()
def _sign_lead(principal: _PrincipalAxes, batch: Tensor, atomic_numbers: Tensor | None, tolerance: float) -> Tensor:
    """By how much the odd invariants favour the present direction of an axis, (B, d).

    Positive: keep the direction; negative: turn the axis; exactly 0: undecided.
    """
    if atomic_numbers is None or atomic_numbers.shape != batch.shape:
        shape = None if atomic_numbers is None else tuple(atomic_numbers.shape)
        raise ValueError(f"canonical frames need atomic_numbers ({len(batch)},), not {shape}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r} must lie between 0 and 1")
    charge = atomic_numbers.to(torch.float64).unsqueeze(1)
    cube = principal.projected**3
    terms = torch.stack([cube, charge * cube, charge * principal.projected], dim=2)
    num_systems = len(principal.variance)
    scale = _sum(terms.abs(), batch, num_systems).clamp(min=torch.finfo(terms.dtype).tiny)
    moments = _sum(terms, batch, num_systems) / scale
    # Turning the axis swaps the two sides, so comparing them is invariant and treats ties alike.
    ahead, behind = moments.amax(dim=2), (-moments).amax(dim=2)
    lead = ahead - behind
    undecided = torch.maximum(ahead, behind) < tolerance
    undecided |= lead.abs() < TIE * tolerance
    undecided |= _no_extent(principal.variance, tolerance)
    return lead.masked_fill(undecided, 0.0)


def _agreeing(patterns: Tensor, lead: Tensor, group: str) -> Tensor:
    """Sign patterns that agree with the decided axes of every system, (B, K), at least one."""
    decided = lead != 0
    if group == "SE":
        decided = decided & (decided.cumsum(dim=1) < lead.shape[1])
    agrees = patterns.unsqueeze(0) * lead.unsqueeze(1) > 0
    return (agrees | ~decided.unsqueeze(1)).all(dim=2)


def _draw(upper: int, count: int, generator: Generators, device: torch.device) -> Tensor:
    """Uniform integers below ``upper``, (count,), drawn where the generator lives."""
    return _each(generator, count, device, partial(torch.randint, upper)).to(device)


def _each(
    generator: Generators, count: int, device: torch.device | str, draw: Callable[..., Tensor], *shape: int
) -> Tensor:
    """Draws (count, *shape), from one generator or a row from each of `count`."""
    if generator is None or isinstance(generator, torch.Generator):
        source = torch.device(device) if generator is None else generator.device
        return draw((count, *shape), generator=generator, device=source)
    return torch.cat([draw((1, *shape), generator=one, device=one.device) for one in generator])


def _embed(axes: Tensor) -> Tensor:
    """(..., d, d) to (..., 3, 3), z kept when d is 2."""
    if axes.shape[-1] == 3:
        return axes
    z = torch.tensor([0.0, 0.0, 1.0], dtype=axes.dtype, device=axes.device)
    wide = torch.nn.functional.pad(axes, (0, 1))
    return torch.cat([wide, z.expand(*axes.shape[:-2], 1, 3)], dim=-2)


def _rotation_from_quaternion(q: Tensor) -> Tensor:
    """Unit quaternions (B, 4) to rotation matrices (B, 3, 3)."""
    w, x, y, z = q.unbind(1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=1).reshape(-1, 3, 3)
