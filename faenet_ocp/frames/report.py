"""Which systems have frames that are not unique."""

from typing import NamedTuple

from torch import Tensor

from faenet_ocp.frames.compute import check_inputs, compute_frames, no_extent, principal_axes, sign_lead


class FrameReport(NamedTuple):
    """Systems in which frames are not unique.

    Attributes:
        ambiguous: axes, by decreasing variance, whose canonical sign is undecided, (B, d) bool.
        degenerate: two axes along which the system extends have equal variances, (B,) bool.
        num_frames: frames that ``canonical`` averages, (B,) int64.
    """

    ambiguous: Tensor
    degenerate: Tensor
    num_frames: Tensor


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
    """Say which systems have undecided canonical axes or a degenerate spectrum.

    Args:
        pos, batch, num_systems, dim, group, atomic_numbers: as in ``compute_frames``.
        tolerance: as in ``compute_frames``; two variances whose relative difference is below it
            count as equal.

    Raises:
        ValueError: as ``compute_frames``.
    """
    check_inputs(pos, batch, num_systems, dim, group)
    principal = principal_axes(pos.detach(), batch, num_systems, dim, group)
    lead = sign_lead(principal, batch, atomic_numbers, tolerance)
    larger, smaller = principal.variance[:, :-1], principal.variance[:, 1:]
    extended = ~no_extent(principal.variance, tolerance)[:, :-1]
    equal = (larger - smaller <= tolerance * larger) & extended
    frames = compute_frames(
        pos,
        batch,
        num_systems,
        method="canonical",
        dim=dim,
        group=group,
        atomic_numbers=atomic_numbers,
        tolerance=tolerance,
    )
    return FrameReport(lead == 0, equal.any(dim=1), (frames.weight > 0).sum(dim=1))
