"""Frames: symmetry with negative controls, canonical signs, degenerate systems."""

import numpy as np
import pytest
import torch

from faenet_ocp import frames
from faenet_ocp.frames import frame_report
from frame_systems import (
    DIM_GROUP,
    LOOSE,
    TIGHT,
    degenerate_systems,
    frames_of,
    make_clouds,
    pack,
    project,
    random_slabs,
    rotation,
    same_set,
    shift,
    symmetric_systems,
    symmetry_error,
)


@pytest.fixture(scope="module")
def clouds():
    return make_clouds()


@pytest.mark.parametrize(("dim", "group"), DIM_GROUP)
@pytest.mark.parametrize("method", ["full", "canonical"])
@pytest.mark.parametrize(("dtype", "tolerance"), [TIGHT, LOOSE])
def test_moved_copy_has_the_same_set(clouds, dim, group, method, dtype, tolerance):
    """Rotated, reflected (E), translated, atoms of all systems shuffled among each other."""
    pos, batch, numbers = clouds
    order = torch.randperm(len(pos), generator=torch.Generator().manual_seed(3))
    back = torch.argsort(order)
    start = frames_of((pos.to(dtype), batch, numbers), method=method, dim=dim, group=group)
    for reflect in [False, True] if group == "E" else [False]:
        move = rotation(dim, reflect=reflect)
        moved_pos = (pos @ move + shift(dim)).to(dtype)
        moved = frames_of((moved_pos[order], batch[order], numbers[order]), method=method, dim=dim, group=group)
        for i in range(24):
            old, new = (f.rot[i][f.weight[i] > 0] for f in (start, moved))
            assert same_set(old, move.to(dtype) @ new, tolerance)  # F(X R + t) = R^T F(X)
            members = (batch == i).nonzero()[:, 0]
            projected = project(pos.to(dtype), members, old, dim)
            projected_moved = project(moved_pos[order], back[members], new, dim)
            assert same_set(projected, projected_moved, tolerance * 10)


def test_set_differs_when_the_group_lacks_the_motion(clouds):
    """Negative control of the test above: reflections for SE, tilts and z shifts for 2D."""
    pos, batch, numbers = clouds

    def share_of_equal_sets(dim, group, moved_pos):
        start = frames_of(clouds, method="full", dim=dim, group=group)
        moved = frames_of((moved_pos, batch, numbers), method="full", dim=dim, group=group)
        equal = [
            same_set(
                project(pos, batch == i, start.rot[i], dim),
                project(moved_pos, batch == i, moved.rot[i], dim),
                1e-6,
            )
            for i in range(24)
        ]
        return np.mean(equal)

    assert share_of_equal_sets(3, "SE", pos @ rotation(3, reflect=True)) == 0
    assert share_of_equal_sets(2, "SE", pos @ rotation(2, reflect=True)) == 0
    assert share_of_equal_sets(2, "E", pos @ rotation(3)) == 0
    assert share_of_equal_sets(2, "E", pos + torch.tensor([0.0, 0.0, 1.0])) == 0
    assert share_of_equal_sets(2, "E", pos @ rotation(2, reflect=True) + shift(2)) == 1


@pytest.mark.parametrize("group", ["E", "SE"])
@pytest.mark.parametrize("name", symmetric_systems())
def test_undecided_axes_keep_both_signs_and_stay_exact(name, group):
    pos, numbers, undecided, frames_e, frames_se = symmetric_systems()[name]
    pos = torch.tensor(pos) @ rotation(3, seed=9) + shift(3)
    system = (pos, torch.zeros(len(pos), dtype=torch.long), torch.tensor(numbers))
    result = frames_of(system, method="canonical", dim=3, group=group)
    expected = frames_e if group == "E" else frames_se
    kept = result.weight[0] > 0
    assert kept.sum() == expected
    torch.testing.assert_close(result.weight[0][kept], torch.full((expected,), 1 / expected).double())
    assert torch.equal(result.rot[0][~kept], torch.eye(3).double().expand(int((~kept).sum()), 3, 3))
    report = frame_report(*system[:2], 1, dim=3, group=group, atomic_numbers=system[2])
    assert report.num_frames.item() == expected
    assert not report.degenerate.any()
    if undecided is not None:
        assert report.ambiguous[0].int().tolist() == undecided

    for method in ("canonical", "full"):

        def model_frames(s, method=method):
            return frames_of(s, method=method, dim=3, group=group)

        for seed in range(4):
            move = rotation(3, seed=seed, reflect=group == "E" and seed % 2 == 1)
            assert symmetry_error(system, move, 3, model_frames) < 1e-9


@pytest.mark.parametrize(("group", "expected"), [("E", [4, 2, 1]), ("SE", [2, 1, 1])])
def test_canonical_in_two_dimensions(group, expected):
    """Two-fold axis along z, mirror line, nothing; heights differ and must not matter."""
    rng = np.random.default_rng(8)
    half, species = rng.normal(size=(5, 3)) * [3.0, 1.5, 1.0], rng.integers(1, 50, size=5)
    doubled = np.concatenate([species, species])
    system = pack([
        (np.concatenate([half, half * [-1, -1, 1]]), doubled),
        (np.concatenate([half, half * [1, -1, 1]]), doubled),
        (half, species),
    ])  # fmt: skip
    result = frames_of(system, method="canonical", dim=2, group=group)
    assert (result.weight > 0).sum(dim=1).tolist() == expected

    def model_frames(s):
        return frames_of(s, method="canonical", dim=2, group=group)

    for seed in range(4):
        move = rotation(2, seed=seed, reflect=group == "E" and seed % 2 == 1)
        assert symmetry_error(system, move, 2, model_frames) < 1e-9


def test_sign_follows_the_largest_invariant():
    """Each of the three invariants decides where the two others are zero or weaker."""

    def sign_along_x(x, numbers):
        pos = torch.tensor([[v, 0.0, 0.0] for v in x], dtype=torch.float64)
        system = (pos, torch.zeros(len(x), dtype=torch.long), torch.tensor(numbers))
        result = frames_of(system, method="canonical", dim=2, group="E")
        return set(result.rot[0][result.weight[0] > 0][:, 0, 0].sign().tolist())

    assert sign_along_x([-1.0, -1.0, 2.0], [1, 1, 1]) == {1.0}  # third moment
    assert sign_along_x([-2.0, 1.0, 1.0], [1, 1, 1]) == {-1.0}
    x = [-2.0, -1.0, 1.0, 2.0]  # third moment 0
    assert sign_along_x(x, [1, 3, 1, 2]) == {1.0}  # weighted first moment 0, weighted third > 0
    assert sign_along_x(x, [2, 1, 3, 1]) == {-1.0}
    assert sign_along_x(x, [1, 9, 1, 2]) == {-1.0}  # weighted third moment 0, weighted first < 0
    assert sign_along_x(x, [2, 1, 9, 1]) == {1.0}
    # third moment -0.09, weighted third moment -0.22, weighted first moment +0.05: largest wins
    x, numbers = np.array([-2.0, -0.5, -0.5, 1.4, 1.6]), np.array([9, 1, 1, 8, 6])
    moments = [(w * x**p).sum() / (w * np.abs(x) ** p).sum() for w, p in [(np.ones(5), 3), (numbers, 3), (numbers, 1)]]
    assert moments[0] < 0 < moments[2] < -moments[1]
    assert sign_along_x(x.tolist(), numbers.tolist()) == {-1.0}
    assert sign_along_x([-1.0, 1.0], [8, 8]) == {-1.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tolerance_decides_what_counts_as_symmetric(dtype):
    """An inversion centre broken by 1e-4 A: symmetric at 1e-3, one frame at 1e-6."""
    pos, numbers = symmetric_systems()["inversion"][:2]
    pos = torch.tensor(pos)
    pos[0] += 1e-4
    system = ((pos @ rotation(3)).to(dtype), torch.zeros(10).long(), torch.tensor(numbers))

    def kept(tolerance):
        options = {"method": "canonical", "dim": 3, "group": "E", "tolerance": tolerance}
        return int((frames_of(system, **options).weight > 0).sum())

    assert (kept(1e-3), kept(1e-6)) == (8, 1)


def test_tie_of_opposite_invariants_keeps_both_signs():
    """Rounding would pick the winner of a tie, so a tie counts as undecided."""

    def moments(a):
        x = np.array([-1.0, -a, 1.0 + a])
        z = np.array([3.0, 3.0, 1.0])
        cubes = [(w * x**3).sum() / (w * np.abs(x) ** 3).sum() for w in (np.ones(3), z)]
        return max(cubes), min(*cubes, (z * x).sum() / (z * np.abs(x)).sum())

    low, high = 0.0, 1.0  # the third moment is positive, the weighted first moment negative
    balance = {a: sum(moments(a)) for a in (low, high)}
    assert balance[low] * balance[high] < 0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(moments(middle)) * balance[0.0] > 0 else (low, middle)
    numbers = torch.tensor([3, 3, 1])
    for a, expected in [(low, 4), (low + 0.05, 2), (low - 0.05, 2)]:
        assert min(abs(m) for m in moments(a)) > 0.1  # far from being below tolerance
        pos = torch.tensor([[-1.0, 0, 0], [-a, 0, 0], [1 + a, 0, 0]], dtype=torch.float64)
        report = frame_report(
            pos @ rotation(2), torch.zeros(3, dtype=torch.long), 1,
            dim=2, group="E", atomic_numbers=numbers,
        )  # fmt: skip
        assert report.num_frames.item() == expected


def test_slabs_have_one_canonical_frame_and_stay_exact():
    system = random_slabs(500)
    pos, batch, numbers = system
    for dim, group in DIM_GROUP:
        report = frame_report(pos, batch, 500, dim=dim, group=group, atomic_numbers=numbers)
        # At most 1 % of small, nearly symmetric slabs; measured here: 1 (2D), 0 (3D) of 500.
        assert report.ambiguous.any(dim=1).sum() <= 5
        assert not report.degenerate.any()
        assert (report.num_frames > 1).sum() <= (0.025 * 500 if dim == 3 else 5)

        def model_frames(s, dim=dim, group=group):
            return frames_of(s, method="canonical", dim=dim, group=group)

        move = rotation(dim, reflect=group == "E")
        assert symmetry_error(system, move, dim, model_frames) < 1e-8


def test_degenerate_systems_are_finite_orthonormal_deterministic_and_reported():
    named = {**{k: v[:2] for k, v in symmetric_systems().items()}, **degenerate_systems()}
    system = pack(list(named.values()))
    count = len(named)
    for dtype in (torch.float32, torch.float64):
        cast = (system[0].to(dtype), *system[1:])
        for dim, group in DIM_GROUP:
            for method in frames.METHODS:
                options = {"method": method, "dim": dim, "group": group}
                first = frames_of(cast, generator=torch.Generator().manual_seed(1), **options)
                again = frames_of(cast, generator=torch.Generator().manual_seed(1), **options)
                assert torch.equal(first.rot, again.rot) and torch.equal(first.weight, again.weight)
                assert first.rot.isfinite().all() and first.weight.isfinite().all()
                gram = first.rot.transpose(-1, -2) @ first.rot
                assert (gram - torch.eye(3, dtype=dtype)).abs().max() < 1e-6
                if group == "SE":
                    assert (torch.linalg.det(first.rot) - 1).abs().max() < 1e-6
        report = frame_report(*cast[:2], count, dim=3, group="E", atomic_numbers=system[2], tolerance=1e-3)
        assert dict(zip(named, report.degenerate.tolist(), strict=True)) == {
            name: name in degenerate_systems() for name in named
        }


def test_equivariance_where_variances_are_equal():
    """Exact where one axis is unique, that is always in 2D; as far as 60 rotations go for a cube."""

    def errors(name, dim, group):
        pos, numbers = degenerate_systems()[name]
        system = (torch.tensor(pos), torch.zeros(len(pos)).long(), torch.tensor(numbers))
        options = {"method": "canonical", "dim": dim, "group": group}
        moves = [rotation(dim, seed, reflect=group == "E" and seed % 2 == 1) for seed in range(5)]
        return [symmetry_error(system, move, dim, lambda s: frames_of(s, **options)) for move in moves]

    for group in ("E", "SE"):
        for name in ("cube", "cube with a heavy corner", "symmetric top", "square"):
            assert max(errors(name, 2, group)) < 1e-9, name
        for name in ("symmetric top", "square"):
            assert max(errors(name, 3, group)) < 1e-9, name
        assert 1e-9 < max(errors("tetrahedron", 3, group)) < 0.05
