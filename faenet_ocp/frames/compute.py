"""Frames of frame averaging: rotations that take a system to a coordinate system of its own.

Equations (1) to (5) of the FAENet paper, batched over systems, in row-vector convention:
``X' = (X - t) @ U``, ``cell' = cell @ U`` and back ``F = F' @ U^T``.

Shapes: pos (N, 3) Angstrom; batch (N,) index of the system of every atom, in any order; B systems;
K frames per system; V views (a view is one system in one frame); d = ``dim``, the number of
principal axes; ``rot`` (..., 3, 3) holds U, its axes as columns, by decreasing variance.

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
    With projections p_i of the atoms on an axis, three numbers change sign with that axis and with
    nothing else: the third moment, the Z-weighted third moment and the Z-weighted first moment,
    each divided by the same sum of absolute terms, so in [-1, 1]. The axis is turned so that the
    one of largest magnitude is positive. It stays undecided, and both signs are kept with equal
    weight, when all three are below ``tolerance``, when two of opposite sign tie (to within
    ``TIE * tolerance``, where rounding could pick the winner), or when the system has no extent
    along it (below ``tolerance`` times the largest one; nothing but rounding is left there).
    In SE groups one sign follows from det(U) = +1: the first d - 1 decided axes are fixed, in
    order of decreasing variance, and every right-handed frame that agrees with them is kept.
    Decisions are made from quantities that the group leaves unchanged, so the weighted set of
    frames moves with the system and the average over it is exactly equivariant.

Equal variances (square slabs, symmetric tops, cubes, single atoms)
    Where two variances are equal their axes are not defined, and next to that they turn quickly
    with the atoms. There ``full``, ``canonical`` and ``det`` average over all directions of the two
    axes: over their frames and over a ring of twelve rotations (and their mirror images in E), with
    weights that fade smoothly into each other (weighted frames: Dym, Lawrence and Siegel, 2024,
    arXiv 2402.16077). With g the difference of the two variances over their sum (plus
    ``LENGTH**2``, so that two axes without extent count as equal) the ring has the share
    (1 - (g/GAP)^2)^2, and none from g = ``GAP`` on: ordinary systems have the frames of eq. (2)
    alone. The ring begins where the atoms lie (`frames.rings`), so it turns with the system. In 3D each
    pair of neighbouring axes has its ring; where both pairs are equal, the 60 rotations of an
    icosahedron take the place of both. These do not turn with the system: the energy of a cube or
    a tetrahedron depends on its orientation, as far as 60 directions differ from all.
    ``stochastic`` draws from the principal axes as the eigensolver returns them.
    ``frame_report`` names the systems concerned.

Frames are computed in float64 whatever the precision of ``pos`` and returned in that of ``pos``.
Frames and weights can be differentiated once by the positions; derivatives are finite everywhere.
They are those of the average, with two exceptions: signs are constants (the average jumps where a
sign changes), and so is the beginning of a ring in a system without a direction to begin with.
Pass ``pos.detach()`` to hold frames and weights constant.
"""

from itertools import product
from math import prod

import torch
from torch import Tensor

from faenet_ocp.common.checks import choice
from faenet_ocp.frames.rings import MIN_EXTENT, RING, Part, PrincipalAxes, frame_parts, system_mean, system_sum
from faenet_ocp.frames.rotations import DIMS, Frames, Generators, Views, draw, embed

METHODS = ("full", "stochastic", "det", "canonical", "none")
GROUPS = ("E", "SE")

TIE = 1e-2
"""Share of ``tolerance`` by which the deciding odd invariant must lead one of opposite sign."""


def num_frames(dim: int, group: str) -> int:
    """Number of frames of one system, eq. (2): 8 or 4 in 3D, 4 or 2 in 2D, for E or SE."""
    choice("dim", dim, DIMS)
    choice("group", group, GROUPS)
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
        pos: positions in Angstrom, (N, 3). Frames follow the positions as given, so wrapping
            atoms into another periodic image changes them.
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
        K = 1 otherwise; and those of the rings, except with ``stochastic``, if the batch has a system that is seen
        in them. Of the dtype and device of ``pos``.

    Raises:
        ValueError: unknown option, wrong shape, positions that are not finite, or no
            ``atomic_numbers`` for ``canonical``.
    """
    choice("method", method, METHODS)
    check_inputs(pos, batch, num_systems, dim, group)
    if method == "none":
        rot = torch.eye(3, dtype=pos.dtype, device=pos.device).repeat(num_systems, 1, 1, 1)
        return Frames(rot, torch.ones_like(rot[:, :, 0, 0]))

    principal = principal_axes(pos, batch, num_systems, dim, group)
    patterns = sign_patterns(dim, group, device=pos.device)
    if method == "stochastic":
        drawn = draw(len(patterns), num_systems, generator, pos.device)
        rot = embed(principal.axes * patterns[drawn].unsqueeze(1)).unsqueeze(1).to(pos.dtype)
        return Frames(rot, torch.ones_like(rot[:, :, 0, 0]))
    kept = torch.ones(num_systems, len(patterns), dtype=torch.bool, device=pos.device)
    if method == "canonical":
        kept = agreeing(patterns, sign_lead(principal, batch, atomic_numbers, tolerance), group)
    of_axes, *rings = frame_parts(principal, batch)
    frames = [_signed(of_axes, patterns[:1], kept[:, :1]) if method == "det" else _signed(of_axes, patterns, kept)]
    frames += [_signed(ring, patterns, torch.ones_like(kept)) for ring in rings]
    rot, weight = (torch.cat(tensors, dim=1) for tensors in zip(*frames, strict=True))
    rot = torch.where(weight[:, :, None, None] > 0, rot, torch.eye(3, dtype=rot.dtype, device=rot.device))
    return Frames(rot.to(pos.dtype), weight.to(pos.dtype))


def pad_frames(frames: Frames, *, dim: int, group: str) -> Frames:
    """The frames with others of weight 0, as many as any system can have, so that systems can be put together."""
    turns = RING if dim == 2 else 2 * RING + 15
    missing = num_frames(dim, group) * (1 + turns) - frames.rot.shape[1]
    others = torch.eye(3).to(frames.rot).expand(len(frames.rot), missing, 3, 3)
    return Frames(torch.cat([frames.rot, others], dim=1), torch.nn.functional.pad(frames.weight, (0, missing)))


def flatten_frames(frames: Frames, num_views: int | None = None) -> Views:
    """List the frames of non-zero weight, sorted by system; a GPU is waited for unless their number is given."""
    used = frames.weight > 0
    found = used.nonzero() if num_views is None else torch.nonzero_static(used, size=num_views)
    system, slot = found.unbind(dim=1)
    return Views(frames.rot[system, slot], frames.weight[system, slot], system)


def frame_sizes(weight: Tensor, natoms: Tensor, nedges: Tensor) -> list[tuple[int, int, int]]:
    """Frames of non-zero weight, of each system, and the atoms and edges in all of them: with them no GPU is asked.

    Args:
        weight: (B, K), on the CPU.
        natoms, nedges: of each system, (B,).
    """
    views = (weight > 0).sum(dim=1)
    return list(zip(*(counts.tolist() for counts in (views, views * natoms, views * nedges)), strict=True))


def centroids(pos: Tensor, batch: Tensor, num_systems: int, *, dim: int = 3) -> Tensor:
    """Origin t of the frames, (B, 3): the mean position; its z is 0 when ``dim`` is 2."""
    choice("dim", dim, DIMS)
    mean = system_mean(pos[:, :dim].double(), batch, num_systems)
    return torch.nn.functional.pad(mean, (0, 3 - dim)).to(pos.dtype)


def check_inputs(pos: Tensor, batch: Tensor, num_systems: int, dim: int, group: str) -> None:
    choice("dim", dim, DIMS)
    choice("group", group, GROUPS)
    if pos.dim() != 2 or pos.shape[1] != 3 or not pos.is_floating_point():
        raise ValueError(f"pos must be floating point (N, 3), not {pos.dtype} {tuple(pos.shape)}")
    if batch.shape != pos.shape[:1]:
        raise ValueError(f"batch must be ({len(pos)},) like pos, not {tuple(batch.shape)}")
    finite = pos.isfinite().all(dim=1)
    if not finite.all():
        systems = batch[~finite].unique().tolist()
        raise ValueError(f"pos of systems {systems} (of {num_systems}) holds nan or infinity")


def principal_axes(pos: Tensor, batch: Tensor, num_systems: int, dim: int, group: str) -> PrincipalAxes:
    """Diagonalise the covariance of every system; signs as in method ``det``."""
    coordinates = pos[:, :dim].double()
    centred = coordinates - system_mean(coordinates, batch, num_systems)[batch]
    covariance = system_mean(centred.unsqueeze(2) * centred.unsqueeze(1), batch, num_systems)
    with torch.no_grad():
        variance, axes = torch.linalg.eigh(covariance)
        variance, axes = variance.flip(1), axes.flip(2)
        # The eigensolver's signs differ between devices and batch sizes, these do not.
        signs = torch.where(axes.sum(dim=1) >= 0, 1.0, -1.0).to(axes.dtype)
        if group == "SE":
            signs[:, -1] *= torch.linalg.det(axes * signs.unsqueeze(1)).sign()
        axes = axes * signs.unsqueeze(1)
    projected = (centred.unsqueeze(2) * axes[batch]).sum(dim=1)
    return PrincipalAxes(axes, variance, projected, axes.transpose(1, 2) @ covariance @ axes)


def _signed(part: Part, patterns: Tensor, kept: Tensor) -> Frames:
    """The frames of a part, (B, T K, 3, 3), with the signs that are kept, (B, K)."""
    turned = part.axes.unsqueeze(1) @ part.turns  # (B, T, d, d)
    weight = part.share.unsqueeze(1) * kept / (kept.sum(dim=1, keepdim=True) * turned.shape[1])
    rot = (turned.unsqueeze(2) * patterns.unsqueeze(1)).flatten(1, 2)
    return Frames(embed(rot), weight.repeat(1, turned.shape[1]))


def sign_patterns(dim: int, group: str, device: torch.device) -> Tensor:
    """Signs of the axes in every frame, (K, d), no sign changed first; SE: only products of +1."""
    patterns = product((1.0, -1.0), repeat=dim)
    kept = [pattern for pattern in patterns if group == "E" or prod(pattern) > 0]
    return torch.tensor(kept, dtype=torch.float64, device=device)


def no_extent(variance: Tensor, tolerance: float) -> Tensor:
    """Axes along which a system has no extent, (B, d)."""
    extent = variance.clamp(min=0).sqrt()
    return extent <= (tolerance * extent[:, :1]).clamp(min=MIN_EXTENT)


@torch.no_grad()
def sign_lead(principal: PrincipalAxes, batch: Tensor, atomic_numbers: Tensor | None, tolerance: float) -> Tensor:
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
    scale = system_sum(terms.abs(), batch, num_systems).clamp(min=torch.finfo(terms.dtype).tiny)
    moments = system_sum(terms, batch, num_systems) / scale
    # Turning the axis swaps the two sides, so comparing them is invariant and treats ties alike.
    ahead, behind = moments.amax(dim=2), (-moments).amax(dim=2)
    lead = ahead - behind
    undecided = torch.maximum(ahead, behind) < tolerance
    undecided |= lead.abs() < TIE * tolerance
    undecided |= no_extent(principal.variance, tolerance)
    return lead.masked_fill(undecided, 0.0)


def agreeing(patterns: Tensor, lead: Tensor, group: str) -> Tensor:
    """Sign patterns that agree with the decided axes of every system, (B, K), at least one."""
    decided = lead != 0
    if group == "SE":
        decided = decided & (decided.cumsum(dim=1) < lead.shape[1])
    agrees = patterns.unsqueeze(0) * lead.unsqueeze(1) > 0
    return (agrees | ~decided.unsqueeze(1)).all(dim=2)
