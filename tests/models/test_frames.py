"""Frames: axes, draws, how they are applied, wrong input, gradients, batching."""

import numpy as np
import pytest
import torch

from faenet_ocp import frames
from faenet_ocp.frames import (
    Frames,
    centroids,
    compute_frames,
    flatten_frames,
    num_frames,
    random_rotations,
    rotate,
    rotate_back,
)
from frame_systems import DIM_GROUP, frames_of, make_clouds, model, same_set


@pytest.fixture(scope="module")
def clouds():
    return make_clouds()


@pytest.mark.parametrize(("dim", "group"), DIM_GROUP)
@pytest.mark.parametrize("method", frames.METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_weights_and_orthonormality(clouds, dim, group, method, dtype):
    pos, batch, numbers = clouds
    result = frames_of((pos.to(dtype), batch, numbers), method=method, dim=dim, group=group)
    k = num_frames(dim, group) if method in ("full", "canonical") else 1
    assert result.rot.shape == (24, k, 3, 3) and result.weight.shape == (24, k)
    assert result.rot.dtype == result.weight.dtype == dtype
    torch.testing.assert_close(result.weight.sum(dim=1), torch.ones(24, dtype=dtype))
    gram = result.rot.transpose(-1, -2) @ result.rot
    assert (gram - torch.eye(3, dtype=dtype)).abs().max() < 1e-6
    if group == "SE":
        assert (torch.linalg.det(result.rot) - 1).abs().max() < 1e-6
    if dim == 2:
        assert torch.equal(result.rot[..., 2, :], torch.eye(3, dtype=dtype)[2].expand(24, k, 3))
        assert torch.equal(result.rot[..., :, 2], torch.eye(3, dtype=dtype)[2].expand(24, k, 3))


def test_number_of_frames():
    assert [num_frames(d, g) for d, g in DIM_GROUP] == [8, 4, 4, 2]


@pytest.mark.parametrize("dim", [2, 3])
def test_axes_are_eigenvectors_by_decreasing_variance(clouds, dim):
    pos, batch, _ = clouds
    full = frames_of(clouds, method="full", dim=dim, group="E")
    for i in range(24):
        x = pos[batch == i][:, :dim].numpy()
        x = x - x.mean(axis=0)
        values, vectors = np.linalg.eigh(x.T @ x)
        for rot in full.rot[i]:
            u = rot[:dim, :dim].numpy()
            np.testing.assert_allclose(np.abs(np.sum(u * vectors[:, ::-1], 0)), 1, atol=1e-10)
            np.testing.assert_allclose(np.diag(u.T @ x.T @ x @ u), values[::-1], rtol=1e-9)
    dets = torch.linalg.det(full.rot)
    assert torch.equal((dets > 0).sum(dim=1), torch.full((24,), num_frames(dim, "SE")))
    proper = frames_of(clouds, method="full", dim=dim, group="SE")
    for i in range(24):
        assert same_set(full.rot[i][dets[i] > 0], proper.rot[i], 1e-10)


@pytest.mark.parametrize("hand", [1, -1])
@pytest.mark.parametrize(("dim", "group"), DIM_GROUP)
@pytest.mark.parametrize("method", ["full", "stochastic", "det", "canonical"])
def test_hand_of_the_eigensolver_does_not_matter(clouds, dim, group, method, hand, monkeypatch):
    """All raw eigenvectors of one hand, then of the other: the same frames, SE of det +1."""
    options = {"method": method, "dim": dim, "group": group}
    expected = frames_of(clouds, generator=torch.Generator().manual_seed(0), **options)
    solve = torch.linalg.eigh

    def one_handed(matrix):
        values, vectors = solve(matrix)
        vectors = vectors.clone()
        vectors[:, :, 0] *= (torch.linalg.det(vectors.flip(2)) * hand).sign().unsqueeze(1)
        assert torch.allclose(torch.linalg.det(vectors.flip(2)), values.new_tensor(float(hand)))
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", one_handed)
    result = frames_of(clouds, generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(result.rot, expected.rot) and torch.equal(result.weight, expected.weight)
    if group == "SE":
        torch.testing.assert_close(torch.linalg.det(result.rot), torch.ones(result.rot.shape[:2]).double())


def test_origin(clouds):
    pos, batch, _ = clouds
    mean = torch.stack([pos[batch == i].mean(dim=0) for i in range(24)])
    torch.testing.assert_close(centroids(pos, batch, 24), mean)
    torch.testing.assert_close(centroids(pos, batch, 24, dim=2), mean * torch.tensor([1, 1, 0]))


def test_det_is_the_first_of_full_and_has_the_published_signs(clouds):
    for dim, group in DIM_GROUP:
        det = frames_of(clouds, method="det", dim=dim, group=group).rot[:, 0]
        full = frames_of(clouds, method="full", dim=dim, group=group).rot[:, 0]
        assert torch.equal(det, full)
        fixed = dim if group == "E" else dim - 1
        assert (det.sum(dim=1)[:, :fixed] >= 0).all()


def chi_square(counts):
    expected = counts.sum() / counts.numel()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize(
    ("dim", "group", "critical", "critical_pairs"),
    # chi-square at p = 0.001 for K - 1 and for K^2 - 1 degrees of freedom
    [
        (3, "E", 24.32, 103.44),
        (3, "SE", 16.27, 37.70),
        (2, "E", 16.27, 37.70),
        (2, "SE", 10.83, 16.27),
    ],
)
def test_stochastic_is_uniform_and_independent(clouds, dim, group, critical, critical_pairs):
    pos, batch, _ = clouds
    own = pos[batch == 0]
    count, k = 4096, num_frames(dim, group)
    pos, batch = own.repeat(count, 1), torch.arange(count).repeat_interleave(len(own))
    generator = torch.Generator().manual_seed(7)
    options = {"dim": dim, "group": group}
    full = compute_frames(pos[: len(own)], batch[: len(own)], 1, method="full", **options)
    picks = []
    for _ in range(2):
        drawn = compute_frames(pos, batch, count, method="stochastic", generator=generator, **options)
        match = (drawn.rot - full.rot).abs().amax(dim=(2, 3)) < 1e-12
        assert (match.sum(dim=1) == 1).all()  # always one of the full set
        picks.append(match.int().argmax(dim=1))
    for pick in picks:
        assert chi_square(torch.bincount(pick, minlength=k).double()) < critical
    neighbours = picks[0][:-1:2] * k + picks[0][1::2]
    calls = picks[0] * k + picks[1]
    for pairs in (neighbours, calls):
        assert chi_square(torch.bincount(pairs, minlength=k * k).double()) < critical_pairs


def test_stochastic_is_reproducible_and_leaves_global_state_alone(clouds):
    def draw(generator):
        return frames_of(clouds, method="stochastic", dim=3, group="E", generator=generator).rot

    state = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    first, second = draw(generator), draw(generator)
    assert torch.equal(first, draw(torch.Generator().manual_seed(5)))
    assert not torch.equal(first, second)
    assert not torch.equal(first, draw(torch.Generator().manual_seed(6)))
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        seeded = draw(None)
        torch.manual_seed(2)
        assert torch.equal(seeded, draw(None))


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_random_rotations(dim, reflect):
    options = {"dim": dim, "reflect": reflect, "dtype": torch.float64, "device": "cpu"}
    result = random_rotations(20000, generator=torch.Generator().manual_seed(1), **options)
    again = random_rotations(20000, generator=torch.Generator().manual_seed(1), **options)
    assert torch.equal(result.rot, again.rot)
    assert result.rot.shape == (20000, 1, 3, 3) and torch.equal(result.weight, torch.ones(20000, 1))
    rot = result.rot[:, 0]
    torch.testing.assert_close(rot @ rot.transpose(1, 2), torch.eye(3).double().expand_as(rot))
    det = torch.linalg.det(rot)
    assert abs((det < 0).double().mean().item() - 0.5 * reflect) < 0.02
    if dim == 2:
        assert torch.equal(rot[:, 2], torch.eye(3).double()[2].expand(20000, 3))
    # Haar measure: mean 0, second moment 1/d, and E[tr^2] = 1 (3D), 2 (SO(2)), 1 (O(2)).
    turn = rot[:, :dim, :dim]
    assert turn.mean(dim=0).abs().max() < 0.02
    assert ((turn**2).mean(dim=0) - 1 / dim).abs().max() < 0.02
    trace = turn.diagonal(dim1=1, dim2=2).sum(dim=1)
    assert abs((trace**2).mean().item() - (2 if dim == 2 and not reflect else 1)) < 0.05
    single = random_rotations(4, dim=dim, reflect=reflect, dtype=torch.float32, device="cpu")
    assert single.rot.dtype == single.weight.dtype == torch.float32


def test_rotate_positions_cells_and_back():
    generator = torch.Generator().manual_seed(0)
    rot = random_rotations(5, dim=3, reflect=True, generator=generator, dtype=torch.float64, device="cpu").rot[:, 0]
    vectors = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    cells = torch.randn(5, 3, 3, generator=generator, dtype=torch.float64)
    for i in range(5):
        torch.testing.assert_close(rotate(vectors, rot)[i], vectors[i] @ rot[i])
        torch.testing.assert_close(rotate(cells, rot)[i], cells[i] @ rot[i])
        torch.testing.assert_close(rotate_back(vectors, rot)[i], vectors[i] @ rot[i].T)
        torch.testing.assert_close(rotate_back(cells, rot)[i], cells[i] @ rot[i].T)
    torch.testing.assert_close(rotate_back(rotate(vectors, rot), rot), vectors)


def test_rotation_keeps_precision_under_autocast(clouds):
    pos, batch, numbers = clouds
    pos = pos.float()
    plain = frames_of((pos, batch, numbers), method="canonical", dim=3, group="SE")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = frames_of((pos, batch, numbers), method="canonical", dim=3, group="SE")
        turned = rotate(pos, plain.rot[batch, 0])
    assert torch.equal(plain.rot, mixed.rot)
    assert turned.dtype == torch.float32
    torch.testing.assert_close(turned, rotate(pos, plain.rot[batch, 0]), rtol=0, atol=0)


def test_flatten_frames():
    rot = torch.arange(3 * 2 * 9, dtype=torch.float64).reshape(3, 2, 3, 3)
    weight = torch.tensor([[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    views = flatten_frames(Frames(rot, weight))
    assert views.system.tolist() == [0, 0, 1, 2]
    assert views.weight.tolist() == [0.5, 0.5, 1.0, 1.0]
    assert torch.equal(views.rot, torch.stack([rot[0, 0], rot[0, 1], rot[1, 1], rot[2, 0]]))


def test_nothing_depends_on_the_companions(clouds):
    pos, batch, numbers = clouds
    for dim, group in DIM_GROUP:
        for method in ("full", "det", "canonical"):
            options = {"method": method, "dim": dim, "group": group}
            together = frames_of(clouds, **options)
            for i in (0, 11, 23):
                own = batch == i
                alone = frames_of((pos[own], batch[own] * 0, numbers[own]), **options)
                assert torch.equal(alone.rot[0], together.rot[i])
                assert torch.equal(alone.weight[0], together.weight[i])


def test_single_precision_input_loses_nothing(clouds):
    """Frames of rounded positions are exact for these, also far from the origin."""
    pos, batch, numbers = clouds
    for offset in (0.0, 1000.0):
        single = (pos + offset).float()
        options = {"method": "canonical", "dim": 3, "group": "E"}
        rounded = frames_of((single, batch, numbers), **options)
        exact = frames_of((single.double(), batch, numbers), **options)
        torch.testing.assert_close(rounded.rot, exact.rot.float(), atol=1e-7, rtol=0)
        assert torch.equal(rounded.weight.double(), exact.weight)


def test_empty_system_and_empty_batch():
    pos = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    batch, numbers = torch.tensor([0, 0, 2]), torch.tensor([1, 2, 3])
    for method in frames.METHODS:
        options = {"method": method, "dim": 3, "group": "SE"}
        result = compute_frames(pos, batch, 3, atomic_numbers=numbers, **options)
        assert result.rot.isfinite().all() and (result.weight.sum(dim=1) == 1).all()
        none = compute_frames(pos[:0], batch[:0], 0, atomic_numbers=numbers[:0], **options)
        assert len(none.rot) == len(none.weight) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "fulll"}, "method: 'fulll'.*stochastic"),
        ({"dim": 4}, "dim: 4.*2, 3"),
        ({"group": "O"}, "group: 'O'.*E, SE"),
        ({"pos": torch.zeros(5, 2)}, r"pos must be floating point \(N, 3\).*\(5, 2\)"),
        ({"pos": torch.zeros(5, 3, dtype=torch.long)}, "int64"),
        ({"batch": torch.zeros(4, dtype=torch.long)}, r"batch must be \(5,\)"),
        ({"atomic_numbers": None}, "canonical frames need atomic_numbers"),
        ({"atomic_numbers": torch.ones(4)}, r"\(5,\), not \(4,\)"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "pos": torch.randn(5, 3), "batch": torch.zeros(5, dtype=torch.long), "num_systems": 1,
        "method": "canonical", "dim": 3, "group": "E", "atomic_numbers": torch.ones(5),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        compute_frames(**(arguments | change))


@pytest.mark.parametrize("method", frames.METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_positions_that_are_not_finite_name_their_system(clouds, method, bad):
    pos, batch, numbers = clouds
    pos = pos.clone()
    pos[(batch == 7).nonzero()[0, 0], 1] = bad
    with pytest.raises(ValueError, match=r"systems \[7\] \(of 24\)"):
        frames_of((pos, batch, numbers), method=method, dim=3, group="E")


@pytest.mark.parametrize(("dim", "group"), DIM_GROUP)
@pytest.mark.parametrize("method", ["full", "canonical", "det"])
def test_frames_are_differentiable(clouds, dim, group, method):
    pos, batch, numbers = clouds
    own = batch < 2
    batch, numbers = batch[own], numbers[own]

    def energy(x):
        return model((x, batch, numbers), frames_of((x, batch, numbers), **options))[0]

    options = {"method": method, "dim": dim, "group": group}
    x = pos[own].clone().requires_grad_()
    assert torch.autograd.gradcheck(energy, (x,), fast_mode=True)
    held = frames_of((x.detach(), batch, numbers), **options)
    assert not held.rot.requires_grad and frames_of((x, batch, numbers), **options).rot.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", frames.METHODS)
def test_gpu_agrees_with_cpu(clouds, method):
    for dim, group in DIM_GROUP:
        on_cpu, on_gpu = (
            frames_of(
                tuple(t.to(device) for t in clouds), method=method, dim=dim, group=group,
                generator=torch.Generator().manual_seed(3),
            )
            for device in ("cpu", "cuda")
        )  # fmt: skip
        torch.testing.assert_close(on_gpu.rot.cpu(), on_cpu.rot, atol=1e-9, rtol=0)
        torch.testing.assert_close(on_gpu.weight.cpu(), on_cpu.weight)
    augmented = random_rotations(3, dim=3, reflect=True, dtype=torch.float32, device="cuda")
    assert augmented.rot.is_cuda
