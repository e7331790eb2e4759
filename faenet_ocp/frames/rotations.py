"""Rotations in row-vector convention, `X' = X @ U`: applying them, drawing them at random, and frames made of them.

Shapes: B systems, M vectors; `rot` (..., 3, 3) holds U, its axes as columns.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from faenet_ocp.common.checks import choice

Generators = torch.Generator | Sequence[torch.Generator] | None
DIMS = (2, 3)


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
        dtype: of the result.
        device: of the result.

    Returns:
        K = 1 frame per system, uniform (Haar measure) on SO(dim), or on O(dim) with ``reflect``.
    """
    choice("dim", dim, DIMS)
    normals = _each(generator, num_systems, device, partial(torch.randn, dtype=torch.float64), 4)
    if dim == 3:
        axes = rotation_from_quaternion(normals / normals.norm(dim=1, keepdim=True))
    else:
        cos, sin = (normals[:, :2] / normals[:, :2].norm(dim=1, keepdim=True)).unbind(1)
        axes = torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)
    if reflect:
        sign = 1 - 2 * draw(2, num_systems, generator, normals.device)
        axes = torch.cat([axes[:, :, :1] * sign[:, None, None], axes[:, :, 1:]], dim=2)
    rot = embed(axes).to(device=device, dtype=dtype).unsqueeze(1)
    return Frames(rot, torch.ones_like(rot[:, :, 0, 0]))


def draw(upper: int, count: int, generator: Generators, device: torch.device) -> Tensor:
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


def embed(axes: Tensor) -> Tensor:
    """(..., d, d) to (..., 3, 3), z kept when d is 2."""
    if axes.shape[-1] == 3:
        return axes
    z = torch.tensor([0.0, 0.0, 1.0], dtype=axes.dtype, device=axes.device)
    wide = torch.nn.functional.pad(axes, (0, 1))
    return torch.cat([wide, z.expand(*axes.shape[:-2], 1, 3)], dim=-2)


def rotation_from_quaternion(q: Tensor) -> Tensor:
    """Unit quaternions (B, 4) to rotation matrices (B, 3, 3)."""
    w, x, y, z = q.unbind(1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=1).reshape(-1, 3, 3)
