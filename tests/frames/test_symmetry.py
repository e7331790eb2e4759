"""Frames: symmetry with negative controls, canonical signs, systems with equal variances."""

import numpy as np
import pytest
import torch

from faenet_ocp.frames import frame_report
from frames.systems import (
    DIM_GROUP,
    degenerate_systems,
    frames_of,
    make_clouds,
    motions,
    pack,
    random_slabs,
    rotation,
    same_set,
    shift,
    special_systems,
    symmetric_systems,
    symmetry_error,
)


@pytest.fixture(scope="module")
def clouds():
    return make_clouds()


@pytest.fixture(scope="module")
def slabs():
    return random_slabs(500)


def share_of_equal_sets(clouds, move, *, method, dim, group, dtype=torch.float64, tolerance=1e-9):
    """F(X R + t) = R^T F(X): how many of the systems have it, with the atoms of all shuffled among each other."""
    pos, batch, numbers = clouds
    order = torch.randperm(len(pos), generator=torch.Generator().manual_seed(3))
    moved = ((pos @ move + shift(dim)).to(dtype)[order], batch[order], numbers[order])
    start, moved = (
        frames_of(system, method=method, dim=dim, group=group) for system in ((pos.to(dtype), *clouds[1:]), moved)
    )
    sets = [[frames.rot[i][frames.weight[i] > 0] for frames in (start, moved)] for i in range(24)]
    return np.mean([same_set(old, move.to(dtype) @ new, tolerance) for old, new in sets])


@pytest.mark.parametrize(("dim", "group"), DIM_GROUP)
@pytest.mark.parametrize("method", ["full", "canonical"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_frames_move_with_the_system(clouds, dim, group, method, dtype, tolerance):
    options = {"method": method, "dim": dim, "group": group, "dtype": dtype, "tolerance": tolerance}
    for move in motions(dim, group, 2):
        assert share_of_equal_sets(clouds, move, **options) == 1


@pytest.mark.parametrize(
    ("dim", "group", "move"),
    [(3, "SE", rotation(3, reflect=True)), (2, "SE", rotation(2, reflect=True)), (2, "E", rotation(3))],
)
def test_frames_do_not_follow_motions_that_the_group_lacks(clouds, dim, group, move):
    """Negative control of the test above."""
    assert share_of_equal_sets(clouds, move, method="full", dim=dim, group=group, tolerance=1e-6) == 0


@pytest.mark.parametrize("group", ["E", "SE"])
@pytest.mark.parametrize("name", symmetric_systems())
def test_undecided_axes_keep_both_signs_and_stay_exact(name, group):
    pos, numbers, undecided, *counts = symmetric_systems()[name]
    pos = torch.tensor(pos) @ rotation(3, seed=9) + shift(3)
    system, count = (pos, torch.zeros(len(pos), dtype=torch.long), torch.tensor(numbers)), counts[group == "SE"]
    result = frames_of(system, method="canonical", dim=3, group=group)
    kept = result.weight[0] > 0
    torch.testing.assert_close(result.weight[0][kept], torch.full((count,), 1 / count).double())
    assert torch.equal(result.rot[0][~kept], torch.eye(3).double().expand(int((~kept).sum()), 3, 3))
    report = frame_report(*system[:2], 1, dim=3, group=group, atomic_numbers=system[2])
    assert report.num_frames.item() == count and not report.degenerate.any()
    assert undecided is None or report.ambiguous[0].int().tolist() == undecided
    for method in ("canonical", "full"):
        for move in motions(3, group):
            assert symmetry_error(system, move, method=method, dim=3, group=group) < 1e-9


@pytest.mark.parametrize(("group", "expected"), [("E", [4, 2, 1]), ("SE", [2, 1, 1])])
def test_canonical_in_two_dimensions(group, expected):
    """Two-fold axis along z, mirror line, nothing; heights differ and must not matter."""
    rng = np.random.default_rng(8)
    half, species = rng.normal(size=(5, 3)) * [3.0, 1.5, 1.0], rng.integers(1, 50, size=5)
    doubled = np.concatenate([species, species])
    pairs = [(np.concatenate([half, half * image]), doubled) for image in ([-1, -1, 1], [1, -1, 1])]
    system, options = pack([*pairs, (half, species)]), {"method": "canonical", "dim": 2, "group": group}
    assert (frames_of(system, **options).weight > 0).sum(dim=1).tolist() == expected
    assert max(symmetry_error(system, move, **options) for move in motions(2, group)) < 1e-9


X = [-2.0, -1.0, 1.0, 2.0]  # third moment 0
# Third moment -0.09, weighted third moment -0.22, weighted first moment +0.05.
UNEQUAL = ([-2.0, -0.5, -0.5, 1.4, 1.6], [9, 1, 1, 8, 6])


@pytest.mark.parametrize(
    ("x", "numbers", "signs"),
    [
        ([-1.0, -1.0, 2.0], [1, 1, 1], {1.0}),  # third moment
        ([-2.0, 1.0, 1.0], [1, 1, 1], {-1.0}),
        (X, [1, 3, 1, 2], {1.0}),  # weighted first moment 0, weighted third > 0
        (X, [2, 1, 3, 1], {-1.0}),
        (X, [1, 9, 1, 2], {-1.0}),  # weighted third moment 0, weighted first < 0
        (X, [2, 1, 9, 1], {1.0}),
        (*UNEQUAL, {-1.0}),
        (X, [8, 17, 3, 12], {-1.0, 1.0}),  # weighted third moment 0.1, weighted first -0.1: rounding would decide
        (X, [8, 17, 3, 13], {1.0}),
        (X, [8, 18, 3, 12], {-1.0}),
        ([-1.0, 1.0], [8, 8], {-1.0, 1.0}),
    ],
)
def test_sign_follows_the_largest_invariant_and_a_tie_keeps_both(x, numbers, signs):
    pos = torch.tensor([[v, 0.0, 0.0] for v in x], dtype=torch.float64)
    system = (pos, torch.zeros(len(x), dtype=torch.long), torch.tensor(numbers))
    result = frames_of(system, method="canonical", dim=2, group="E")
    assert set(result.rot[0][result.weight[0] > 0][:, 0, 0].sign().tolist()) == signs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tolerance_decides_what_counts_as_symmetric(dtype):
    """An inversion centre broken by 1e-4 Angstrom."""
    pos, numbers = symmetric_systems()["inversion"][:2]
    pos = torch.tensor(pos)
    pos[0] += 1e-4
    system = ((pos @ rotation(3)).to(dtype), torch.zeros(10).long(), torch.tensor(numbers))
    for tolerance, count in ((1e-3, 8), (1e-6, 1)):
        frames = frames_of(system, method="canonical", dim=3, group="E", tolerance=tolerance)
        assert (frames.weight > 0).sum() == count


@pytest.mark.parametrize(("dim", "group"), DIM_GROUP)
def test_slabs_have_one_canonical_frame_and_stay_exact(slabs, dim, group):
    """But for at most 1 % of small, nearly symmetric slabs, and in 3D 2.5 % with a ring."""
    pos, batch, numbers = slabs
    report = frame_report(pos, batch, 500, dim=dim, group=group, atomic_numbers=numbers)
    assert report.ambiguous.any(dim=1).sum() <= 5 and not report.degenerate.any()
    assert (report.num_frames > 1).sum() <= (12 if dim == 3 else 5)
    move = rotation(dim, reflect=group == "E")
    assert symmetry_error((pos, batch, numbers), move, method="canonical", dim=dim, group=group) < 1e-8


def test_equal_variances_are_reported():
    named = special_systems()
    pos, batch, numbers = pack(list(named.values()))
    for dtype in (torch.float32, torch.float64):
        report = frame_report(pos.to(dtype), batch, len(named), dim=3, group="E", atomic_numbers=numbers)
        assert [name for name, found in zip(named, report.degenerate, strict=True) if found] == [*degenerate_systems()]


@pytest.mark.parametrize("group", ["E", "SE"])
def test_equivariance_where_variances_are_equal(group):
    """Exact where one axis is unique, that is always in 2D; as far as 60 rotations go for a tetrahedron."""

    def error(name, dim):
        system = pack([degenerate_systems()[name]])
        options = {"method": "canonical", "dim": dim, "group": group}
        return max(symmetry_error(system, move, **options) for move in motions(dim, group, 5))

    for name in ("cube", "cube with a heavy corner", "symmetric top", "square"):
        assert error(name, 2) < 1e-9, name
    for name in ("symmetric top", "square"):
        assert error(name, 3) < 1e-9, name
    assert 1e-9 < error("tetrahedron", 3) < 0.05
