"""Frames: axes, draws, how they are applied, wrong input, gradients, batching."""

import numpy as np
import pytest
import torch

from faenet_ocp.frames import (
    METHODS,
    Frames,
    centroids,
    compute_frames,
    flatten_frames,
    num_frames,
    random_rotations,
    rotate,
    rotate_back,
)
from frames.systems import DIM_GROUP, NUM_FRAMES, averaged, frames_of, make_clouds, pack, same_set, special_systems


@pytest.fixture(scope="module")
def clouds():
    return make_clouds()


@pytest.mark.parametrize(("dim", "group"), DIM_GROUP)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frames_are_orthonormal_weighted_and_reproducible(clouds, dim, group, method, dtype):
    """Of systems with and without symmetries; of the group's number where there are none."""
    for kind, (pos, batch, numbers) in (("generic", clouds), ("special", pack(list(special_systems().values())))):
        result, again = (
            frames_of(
                (pos.to(dtype), batch, numbers),
                generator=torch.Generator().manual_seed(1),
                method=method,
                dim=dim,
                group=group,
            )
            for _ in range(2)
        )
        assert torch.equal(result.rot, again.rot) and torch.equal(result.weight, again.weight)
        assert result.rot.dtype == result.weight.dtype == dtype
        torch.testing.assert_close(result.weight.sum(dim=1), torch.ones(len(result.weight), dtype=dtype))
        eye = torch.eye(3, dtype=dtype)
        assert (result.rot.transpose(-1, -2) @ result.rot - eye).abs().max() < 1e-6
        if group == "SE":
            assert (torch.linalg.det(result.rot) - 1).abs().max() < 1e-6
        if dim == 2:
            assert (result.rot[..., 2, :] == eye[2]).all() and (result.rot[..., :, 2] == eye[2]).all()
        if kind == "generic":
            assert num_frames(dim, group) == NUM_FRAMES[dim, group]
            count = NUM_FRAMES[dim, group] if method in ("full", "canonical") else 1
            assert result.rot.shape == (24, count, 3, 3) and result.weight.shape == (24, count)


@pytest.mark.parametrize("dim", [2, 3])
def test_axes_are_eigenvectors_by_decreasing_variance(clouds, dim):
    """Half of the frames, those without reflection, are the ones of SE; det's is the first, of published signs."""
    pos, batch, _ = clouds
    full, proper = (frames_of(clouds, method="full", dim=dim, group=group) for group in ("E", "SE"))
    dets = torch.linalg.det(full.rot)
    for i in range(24):
        x = pos[batch == i][:, :dim].numpy()
        x = x - x.mean(axis=0)
        values, vectors = np.linalg.eigh(x.T @ x)
        for rot in full.rot[i]:
            u = rot[:dim, :dim].numpy()
            np.testing.assert_allclose(np.abs(np.sum(u * vectors[:, ::-1], 0)), 1, atol=1e-10)
            np.testing.assert_allclose(np.diag(u.T @ x.T @ x @ u), values[::-1], rtol=1e-9)
        assert same_set(full.rot[i][dets[i] > 0], proper.rot[i], 1e-10)
    for group, frames, fixed in (("E", full, dim), ("SE", proper, dim - 1)):
        det = frames_of(clouds, method="det", dim=dim, group=group).rot[:, 0]
        assert torch.equal(det, frames.rot[:, 0])
        assert (det.sum(dim=1)[:, :fixed] >= 0).all()


def chi_square(counts):
    expected = counts.sum() / counts.numel()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize(
    ("dim", "group", "critical", "critical_pairs"),
    # chi-square at p = 0.001 for K - 1 and for K^2 - 1 degrees of freedom
    [(3, "E", 24.32, 103.44), (3, "SE", 16.27, 37.70), (2, "E", 16.27, 37.70), (2, "SE", 10.83, 16.27)],
)
def test_stochastic_is_uniform_and_independent(clouds, dim, group, critical, critical_pairs):
    own = clouds[0][clouds[1] == 0]
    count, k = 4096, NUM_FRAMES[dim, group]
    pos, batch = own.repeat(count, 1), torch.arange(count).repeat_interleave(len(own))
    generator, options = torch.Generator().manual_seed(7), {"dim": dim, "group": group}
    full = compute_frames(own, batch[: len(own)], 1, method="full", **options)
    picks = []
    for _ in range(2):
        drawn = compute_frames(pos, batch, count, method="stochastic", generator=generator, **options)
        match = (drawn.rot - full.rot).abs().amax(dim=(2, 3)) < 1e-12
        assert (match.sum(dim=1) == 1).all()  # always one of the full set
        picks.append(match.int().argmax(dim=1))
        assert chi_square(torch.bincount(picks[-1], minlength=k).double()) < critical
    neighbours, calls = picks[0][:-1:2] * k + picks[0][1::2], picks[0] * k + picks[1]
    for pairs in (neighbours, calls):
        assert chi_square(torch.bincount(pairs, minlength=k * k).double()) < critical_pairs


def test_stochastic_leaves_global_state_alone_where_it_has_a_generator(clouds):
    def draw(generator):
        return frames_of(clouds, method="stochastic", dim=3, group="E", generator=generator).rot

    state, generator = torch.random.get_rng_state(), torch.Generator().manual_seed(5)
    first = draw(generator)
    assert not torch.equal(first, draw(generator)) and not torch.equal(first, draw(torch.Generator().manual_seed(6)))
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
    result, again = (random_rotations(20000, generator=torch.Generator().manual_seed(1), **options) for _ in range(2))
    assert torch.equal(result.rot, again.rot)
    assert result.rot.shape == (20000, 1, 3, 3) and torch.equal(result.weight, torch.ones(20000, 1))
    rot = result.rot[:, 0]
    torch.testing.assert_close(rot @ rot.transpose(1, 2), torch.eye(3).double().expand_as(rot))
    assert abs((torch.linalg.det(rot) < 0).double().mean().item() - 0.5 * reflect) < 0.02
    if dim == 2:
        assert torch.equal(rot[:, 2], torch.eye(3).double()[2].expand(20000, 3))
    # Haar measure: mean 0, second moment 1/d, and E[tr^2] = 1 (3D), 2 (SO(2)), 1 (O(2)).
    turn = rot[:, :dim, :dim]
    assert turn.mean(dim=0).abs().max() < 0.02
    assert ((turn**2).mean(dim=0) - 1 / dim).abs().max() < 0.02
    trace = turn.diagonal(dim1=1, dim2=2).sum(dim=1)
    assert abs((trace**2).mean().item() - (2 if dim == 2 and not reflect else 1)) < 0.05
    single = random_rotations(4, **options | {"dtype": torch.float32})
    assert single.rot.dtype == single.weight.dtype == torch.float32


def test_rotate_positions_cells_and_back(clouds):
    """Exact under autocast, too."""
    generator = torch.Generator().manual_seed(0)
    rot = random_rotations(5, dim=3, reflect=True, generator=generator, dtype=torch.float64, device="cpu").rot[:, 0]
    for shape in ((5, 3), (5, 3, 3)):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(rotate(values, rot), torch.stack([v @ u for v, u in zip(values, rot, strict=True)]))
        torch.testing.assert_close(rotate_back(rotate(values, rot), rot), values)
    vectors, single = torch.randn(5, 3, generator=generator), rot.float()
    pos, *others = clouds
    frames = [frames_of((pos.float(), *others), method="canonical", dim=3, group="SE")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turned = rotate(vectors, single)
        frames.append(frames_of((pos.float(), *others), method="canonical", dim=3, group="SE"))
    assert turned.dtype == torch.float32 and torch.equal(turned, rotate(vectors, single))
    assert torch.equal(frames[0].rot, frames[1].rot)


def test_origin_and_views(clouds):
    pos, batch, _ = clouds
    mean = torch.stack([pos[batch == i].mean(dim=0) for i in range(24)])
    torch.testing.assert_close(centroids(pos, batch, 24), mean)
    torch.testing.assert_close(centroids(pos, batch, 24, dim=2), mean * torch.tensor([1, 1, 0]))
    rot = torch.arange(3 * 2 * 9, dtype=torch.float64).reshape(3, 2, 3, 3)
    views = flatten_frames(Frames(rot, torch.tensor([[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]])))
    assert views.system.tolist() == [0, 0, 1, 2] and views.weight.tolist() == [0.5, 0.5, 1.0, 1.0]
    assert torch.equal(views.rot, torch.stack([rot[0, 0], rot[0, 1], rot[1, 1], rot[2, 0]]))


@pytest.mark.parametrize(("dim", "group"), DIM_GROUP)
@pytest.mark.parametrize("method", ["full", "det", "canonical"])
def test_nothing_depends_on_the_companions(clouds, dim, group, method):
    pos, batch, numbers = clouds
    together, own = frames_of(clouds, method=method, dim=dim, group=group), batch == 11
    alone = frames_of((pos[own], batch[own] * 0, numbers[own]), method=method, dim=dim, group=group)
    assert torch.equal(alone.rot[0], together.rot[11]) and torch.equal(alone.weight[0], together.weight[11])


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_frames_of_rounded_positions_are_exact(clouds, offset):
    single = (clouds[0] + offset).float()
    options = {"method": "canonical", "dim": 3, "group": "E"}
    rounded, exact = (frames_of((pos, *clouds[1:]), **options) for pos in (single, single.double()))
    torch.testing.assert_close(rounded.rot, exact.rot.float(), atol=1e-7, rtol=0)
    assert torch.equal(rounded.weight.double(), exact.weight)


@pytest.mark.parametrize("method", METHODS)
def test_empty_system_and_empty_batch(method):
    pos, batch, numbers = torch.rand(3, 3), torch.tensor([0, 0, 2]), torch.tensor([1, 2, 3])
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
        ({"pos": torch.tensor([[torch.nan] * 3] * 5), "batch": torch.full((5,), 7)}, r"systems \[7\] \(of 8\)"),
        ({"pos": torch.tensor([[torch.inf] * 3] * 5), "method": "none"}, r"systems \[0\] .*nan or infinity"),
        ({"batch": torch.zeros(4, dtype=torch.long)}, r"batch must be \(5,\)"),
        ({"atomic_numbers": None}, "canonical frames need atomic_numbers"),
        ({"atomic_numbers": torch.ones(4)}, r"\(5,\), not \(4,\)"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"pos": torch.randn(5, 3), "batch": torch.zeros(5, dtype=torch.long), "num_systems": 8}
    arguments |= {"method": "canonical", "dim": 3, "group": "E", "atomic_numbers": torch.ones(5)}
    with pytest.raises(ValueError, match=message):
        compute_frames(**(arguments | change))


@pytest.mark.parametrize(("dim", "group"), DIM_GROUP)
@pytest.mark.parametrize("method", ["full", "canonical", "det"])
def test_frames_are_differentiable(clouds, dim, group, method):
    pos, batch, numbers = (values[clouds[1] < 2] for values in clouds)

    def frames(x):
        return frames_of((x, batch, numbers), method=method, dim=dim, group=group)

    x = pos.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: averaged((x, batch, numbers), frames(x))[0], (x,), fast_mode=True)
    assert frames(x).rot.requires_grad and not frames(x.detach()).rot.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dim", "group"), DIM_GROUP)
@pytest.mark.parametrize("method", METHODS)
def test_gpu_agrees_with_cpu(clouds, dim, group, method):
    options = {"method": method, "dim": dim, "group": group}
    on_cpu, on_gpu = (
        frames_of([t.to(device) for t in clouds], generator=torch.Generator().manual_seed(3), **options)
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(on_gpu.rot.cpu(), on_cpu.rot, atol=1e-9, rtol=0)
    torch.testing.assert_close(on_gpu.weight.cpu(), on_cpu.weight)
    assert random_rotations(3, dim=3, reflect=True, dtype=torch.float32, device="cuda").rot.is_cuda
