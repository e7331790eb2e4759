"""Frame averaging around fairchem models: exact symmetry where it is promised, and its absence where it is not."""

import copy

import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.models.base import HeadInterface
from torch import Tensor, nn

import small_data
from faenet_ocp.frames import compute_frames, flatten_frames
from faenet_ocp.graph.neighbors import build_graph
from faenet_ocp.graph.vectors import edge_vectors
from faenet_ocp.models import fairchem as backbone
from faenet_ocp.models.fairchem import FrameAveragedModel, _PlainBackbone, view_batch

FAENET = {
    "model": "faenet",
    "hidden_channels": 48,
    "num_filters": 24,
    "num_interactions": 2,
    "num_gaussians": 10,
    "tag_hidden_channels": 8,
    "pg_hidden_channels": 4,
}
HEADS = {
    "energy": {"module": "faenet_energy_head"},
    "forces": {"module": "faenet_force_head", "force_hidden_channels": 16},
}


@registry.register_model("test_pull")
class PullBackbone(nn.Module, _PlainBackbone):
    """A backbone that is not FAENet and sees positions, cells and edges as any fairchem backbone does."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.lin = nn.Linear(7, channels)

    def forward(self, data: AtomicData) -> dict[str, Tensor]:
        j, i = data.edge_index
        shift = (data.cell_offsets[:, None, :] @ data.cell[data.batch[i]]).squeeze(1)
        vector = data.pos[j] - data.pos[i] + shift
        number = data.atomic_numbers[:, None].to(data.pos) / 50
        edge = torch.cat([vector, vector.norm(dim=1, keepdim=True), number[j]], dim=1)
        pulled = torch.zeros(len(data.pos), 5).to(data.pos).index_add(0, i, edge.sin())
        return {"h": self.lin(torch.cat([pulled, data.pos[:, 2:], number], dim=1)).tanh()}


@registry.register_model("test_pull_head")
class PullHead(nn.Module, HeadInterface):
    def __init__(self, backbone: PullBackbone, prop: str = "energy"):
        super().__init__()
        self.prop, self.lin = prop, nn.Linear(8, 3 if prop == "forces" else 1)

    def forward(self, data: AtomicData, emb: dict[str, Tensor]) -> dict[str, Tensor]:
        out = self.lin(emb["h"])
        if self.prop == "forces":
            return {"forces": out}
        return {"energy": torch.zeros(len(data.natoms)).to(out).index_add(0, data.batch, out.squeeze(1))}


OTHER = {"model": "test_pull"}
OTHER_HEADS = {"energy": {"module": "test_pull_head"}, "forces": {"module": "test_pull_head", "prop": "forces"}}


def _sample(index: int, dtype: torch.dtype = torch.float64, *, motion: Tensor | None = None) -> AtomicData:
    """A slab, moved by an orthogonal matrix and a shift, with its graph built anew."""
    atoms = small_data.make_slab(index)
    pos = torch.tensor(atoms.positions, dtype=dtype)
    cell = torch.tensor(atoms.cell.array, dtype=dtype)
    if motion is not None:
        pos, cell = pos @ motion.to(dtype) + torch.tensor([1.3, -0.4, 0.0], dtype=dtype), cell @ motion.to(dtype)
    edge_index, offsets = build_graph(pos, cell, torch.ones(3, dtype=torch.bool), cutoff=5.0, max_neighbors=20)
    n = len(atoms)
    return AtomicData(
        pos=pos,
        atomic_numbers=torch.tensor(atoms.numbers),
        cell=cell[None],
        pbc=torch.ones(1, 3, dtype=torch.bool),
        natoms=torch.tensor([n]),
        edge_index=edge_index,
        cell_offsets=offsets.to(dtype),
        nedges=torch.tensor([edge_index.shape[1]]),
        charge=torch.zeros(1, dtype=torch.long),
        spin=torch.zeros(1, dtype=torch.long),
        fixed=torch.zeros(n, dtype=torch.long),
        tags=torch.tensor(atoms.get_tags()),
        sid=[str(index)],
    )


def _model(kind: str, method: str, *, dim: int = 3, group: str = "E", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    backbone, heads = (FAENET, HEADS) if kind == "faenet" else (OTHER, OTHER_HEADS)
    model = FrameAveragedModel(backbone=backbone, heads=heads, frames={"method": method, "dim": dim, "group": group})
    model = model.to(dtype).eval()
    if kind == "faenet":  # so that the untrained norms do something
        for buffer_name, buffer in model.named_buffers():
            if "running_mean" in buffer_name:
                buffer.uniform_(-0.1, 0.1)
    return model


def _orthogonal(seed: int, *, dim: int, det: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()
    if torch.det(q) * det < 0:
        q[:, 0] = -q[:, 0]
    full = torch.eye(3, dtype=torch.float64)
    full[:dim, :dim] = q
    return full


def _errors(model: nn.Module, *, dim: int, det: float, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
    """Largest change of energies, and of forces turned back, over moved copies of a batch."""
    worst_energy = worst_forces = 0.0
    with torch.no_grad():
        before = model(atomicdata_list_to_batch([_sample(i, dtype) for i in range(3)]))
        for seed in range(3):
            motion = _orthogonal(seed, dim=dim, det=det)
            after = model(atomicdata_list_to_batch([_sample(i, dtype, motion=motion) for i in range(3)]))
            worst_energy = max(
                worst_energy, float((after["energy"]["energy"] - before["energy"]["energy"]).abs().max())
            )
            turned = before["forces"]["forces"] @ motion.to(dtype)
            worst_forces = max(worst_forces, float((after["forces"]["forces"] - turned).abs().max()))
    return worst_energy, worst_forces


@pytest.mark.parametrize("kind", ["faenet", "other"])
@pytest.mark.parametrize("method", ["full", "canonical"])
@pytest.mark.parametrize("dim", [2, 3])
def test_full_and_canonical_frames_are_exact(kind: str, method: str, dim: int) -> None:
    model = _model(kind, method, dim=dim)
    for det in (1.0, -1.0):
        energy, forces = _errors(model, dim=dim, det=det)
        assert energy < 1e-9
        assert forces < 1e-9


@pytest.mark.parametrize("kind", ["faenet", "other"])
def test_in_single_precision(kind: str) -> None:
    for method in ("full", "canonical"):
        energy, forces = _errors(_model(kind, method, dtype=torch.float32), dim=3, det=-1.0, dtype=torch.float32)
        assert energy < 1e-4
        assert forces < 1e-4


@pytest.mark.parametrize("kind", ["faenet", "other"])
def test_special_frames_are_exact_for_rotations_only(kind: str) -> None:
    model = _model(kind, "full", group="SE")
    assert max(_errors(model, dim=3, det=1.0)) < 1e-9
    assert max(_errors(model, dim=3, det=-1.0)) > 1e-4


@pytest.mark.parametrize("kind", ["faenet", "other"])
@pytest.mark.parametrize("method", ["none", "stochastic"])
def test_without_or_with_random_frames_symmetry_is_lost(kind: str, method: str) -> None:
    """The negative control: the same test has to fail."""
    energy, forces = _errors(_model(kind, method), dim=3, det=1.0)
    assert energy > 1e-4
    assert forces > 1e-4


def test_three_dimensional_motions_break_two_dimensional_frames() -> None:
    assert max(_errors(_model("faenet", "full", dim=2), dim=3, det=1.0)) > 1e-4


def test_frames_in_the_batch_are_used() -> None:
    """Frames from the data transform and frames made in the model are the same function."""
    model = _model("faenet", "full")
    samples = [_sample(i) for i in range(3)]
    expected = model(atomicdata_list_to_batch(samples))["energy"]["energy"]
    for sample in samples:
        frames = compute_frames(sample.pos, sample.batch, 1, method="full", dim=3, group="E")
        sample.frame_rot, sample.frame_weight = frames.rot, frames.weight
    model.frames["method"] = "none"
    attached = model(atomicdata_list_to_batch(samples))["energy"]["energy"]
    torch.testing.assert_close(attached, expected, rtol=0, atol=1e-12)
    plain = model(atomicdata_list_to_batch([_sample(i) for i in range(3)]))["energy"]["energy"]
    assert (plain - expected).abs().max() > 1e-4


def test_full_frames_are_the_mean_over_single_frames() -> None:
    """Against eq. (1) written out: one forward pass for each frame, rotated by hand."""
    model = _model("faenet", "none")
    batch = atomicdata_list_to_batch([_sample(i) for i in range(2)])
    frames = compute_frames(batch.pos, batch.batch, 2, method="full", dim=3, group="E")
    energies, forces = [], []
    for k in range(frames.rot.shape[1]):
        turned = copy.deepcopy(batch)
        rot = frames.rot[:, k]
        centre = torch.stack([batch.pos[batch.batch == b].mean(0) for b in range(2)])
        turned.pos = torch.einsum("ni,nij->nj", batch.pos - centre[batch.batch], rot[batch.batch])
        turned.cell = batch.cell @ rot
        out = model(turned)
        energies.append(out["energy"]["energy"])
        forces.append(torch.einsum("nj,nij->ni", out["forces"]["forces"], rot[batch.batch]))
    model.frames["method"] = "full"
    averaged = model(batch)
    torch.testing.assert_close(averaged["energy"]["energy"], torch.stack(energies).mean(0), rtol=0, atol=1e-10)
    torch.testing.assert_close(averaged["forces"]["forces"], torch.stack(forces).mean(0), rtol=0, atol=1e-10)


def _outputs_and_gradients(model: nn.Module, batch: AtomicData, *, through_frames: bool) -> list[Tensor]:
    batch = batch.clone()
    batch.pos.requires_grad_(through_frames)
    out = model(batch, through_frames=through_frames)
    results = [out["energy"]["energy"], out["forces"]["forces"]]
    wanted = [*model.parameters(), *([batch.pos] if through_frames else [])]
    loss = sum(result.square().sum() for result in results)
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*results, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("through_frames", [False, True])
@pytest.mark.parametrize(
    ("options", "dtype", "tolerance"),
    [({}, torch.float64, 1e-12), ({}, torch.float32, 1e-6)]
    + [({"mp_type": name}, torch.float64, 1e-12) for name in ("updownscale_base", "updown_local_env", "att")],
)
def test_opposite_frames_share_what_depends_on_edge_vectors(
    options: dict, dtype: torch.dtype, tolerance: float, through_frames: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every edge computed for itself; neighbours are cut, so that some edges have no reverse."""
    torch.manual_seed(1)
    frames = {"method": "full", "dim": 3, "group": "E"}
    model = FrameAveragedModel(backbone=FAENET | options, heads=HEADS, frames=frames).to(dtype)
    batch = atomicdata_list_to_batch([_sample(i, dtype) for i in (1, 3)])
    batch.nedges[1] -= 7
    batch.edge_index, batch.cell_offsets = batch.edge_index[:, :-7], batch.cell_offsets[:-7]
    seen = []
    monkeypatch.setattr(backbone, "view_batch", lambda *a, **k: seen.append(view_batch(*a, **k)) or seen[-1])

    shared = _outputs_and_gradients(model, batch, through_frames=through_frames)
    monkeypatch.setattr(backbone, "_frames_are_opposite", lambda *_: False)
    alone = _outputs_and_gradients(model, batch, through_frames=through_frames)

    num_edges, num_shared = batch.edge_index.shape[1], len(seen[0][0].shared_vectors)
    assert "shared_vectors" not in seen[1][0]
    assert 4 * num_edges - 4 * 40 < num_shared < 4 * num_edges
    assert len(shared) == len(alone) > 10
    for part, digits in ((slice(0, 1), 1), (slice(1, 2), 1), (slice(2, None), 10)):  # energies, forces, gradients
        one, other = (torch.cat([value.flatten() for value in values[part]]) for values in (shared, alone))
        assert (one - other).abs().max() < digits * tolerance * other.abs().max()


@pytest.mark.parametrize(("dim", "group"), [(2, "E"), (2, "SE"), (3, "SE")])
def test_frames_without_opposites_share_nothing(dim: int, group: str) -> None:
    batch = atomicdata_list_to_batch([_sample(i) for i in range(2)])
    views = flatten_frames(compute_frames(batch.pos, batch.batch, 2, method="full", dim=dim, group=group))
    seen, _, _ = view_batch(batch, views, torch.zeros(2, 3, dtype=torch.float64), share=True)
    assert "shared_vectors" not in seen


def test_shared_vectors_are_equal() -> None:
    batch = atomicdata_list_to_batch([_sample(i) for i in range(3)])
    views = flatten_frames(compute_frames(batch.pos, batch.batch, 3, method="full", dim=3, group="E"))
    seen, _, _ = view_batch(batch, views, torch.zeros(3, 3, dtype=torch.float64), share=True)
    of_edge = seen.batch[seen.edge_index[1]]
    vectors = edge_vectors(seen.pos, seen.cell, seen.edge_index, seen.cell_offsets, of_edge)
    row = seen.shared_vectors
    assert 0.8 * len(vectors) < 2 * len(row) <= len(vectors)
    assert torch.equal(row, row.sort()[0]) and row.max() < len(vectors) - len(row)
    torch.testing.assert_close(vectors[len(vectors) - len(row) :], vectors[row], rtol=0, atol=1e-12)
    assert of_edge.bincount().tolist() == [n for n in batch.nedges.tolist() for _ in range(8)]


def test_predictions_do_not_depend_on_companions() -> None:
    for method in ("full", "canonical", "none"):
        model = _model("faenet", method)
        alone = [model(atomicdata_list_to_batch([_sample(i)]))["energy"]["energy"] for i in range(4)]
        together = model(atomicdata_list_to_batch([_sample(i) for i in (2, 0, 3, 1)]))["energy"]["energy"]
        torch.testing.assert_close(together, torch.cat([alone[i] for i in (2, 0, 3, 1)]), rtol=0, atol=1e-10)


def test_views_keep_systems_edges_and_lists_together() -> None:
    batch = atomicdata_list_to_batch([_sample(i) for i in range(3)])
    views = flatten_frames(compute_frames(batch.pos, batch.batch, 3, method="full", dim=2, group="SE"))
    seen, atom, atom_view = view_batch(batch, views, torch.zeros(3, 3, dtype=torch.float64))
    assert seen.natoms.tolist() == [n for n in batch.natoms.tolist() for _ in range(2)]
    assert torch.equal(seen.batch, atom_view)
    assert torch.equal(seen.batch[seen.edge_index[0]], seen.batch[seen.edge_index[1]])
    assert torch.equal(seen.atomic_numbers, batch.atomic_numbers[atom])
    before = (batch.pos[batch.edge_index[0]] - batch.pos[batch.edge_index[1]]).norm(dim=1)
    after = (seen.pos[seen.edge_index[0]] - seen.pos[seen.edge_index[1]]).norm(dim=1)
    per_system = before.split(batch.nedges.tolist())
    torch.testing.assert_close(after, torch.cat([part for part in per_system for _ in range(2)]))
    assert "frame_rot" not in seen


def test_a_batch_without_edges_gets_its_graph() -> None:
    model = _model("faenet", "canonical")
    model.cutoff, model.max_neighbors = 5.0, 20
    batch = atomicdata_list_to_batch([_sample(i) for i in range(2)])
    expected = model(batch)["energy"]["energy"]
    bare = copy.deepcopy(batch)
    bare.edge_index, bare.cell_offsets = batch.edge_index[:, :0], batch.cell_offsets[:0]
    bare.nedges = torch.zeros_like(batch.nedges)
    torch.testing.assert_close(model(bare)["energy"]["energy"], expected, rtol=0, atol=1e-12)


def test_outputs_that_cannot_be_averaged_are_refused() -> None:
    heads = {"stress": {"module": "test_pull_head", "prop": "energy"}}
    model = FrameAveragedModel(backbone=OTHER, heads=heads, frames={"method": "full", "dim": 3, "group": "E"}).double()
    model.output_heads["stress"].forward = lambda data, emb: {"stress": torch.zeros(len(data.natoms), 9)}
    with pytest.raises(ValueError, match=r"output 'stress' of shape \(8, 9\): frames can average energies"):
        model(atomicdata_list_to_batch([_sample(0)]))
