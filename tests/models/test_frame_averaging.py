"""Frame averaging around any fairchem model: around FAENet, and around a backbone that is not FAENet."""

import copy

import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.models.base import HeadInterface
from torch import Tensor, nn

from faenet_ocp.build import make_model
from faenet_ocp.config.schema import Config, build_config
from faenet_ocp.frames import compute_frames, frame_sizes
from faenet_ocp.kernels.exchange import FastEdgeEmbedding
from faenet_ocp.models.base import Backbone
from faenet_ocp.models.fairchem import FAENetBackbone, FairchemBackbone
from faenet_ocp.models.frame_averaging import FrameAveragedModel, ViewBatch
from faenet_ocp.targets import TARGETS, Target, resolve
from models.suite import SMALL_FAENET, ModelSuite, orthogonal, outputs_of, slab, slabs, to_batch


@registry.register_model("test_pull")
class PullBackbone(nn.Module, FairchemBackbone):
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
    """Scalars (B, 1), vectors (N, 3); and a by-product that nobody asked for."""

    def __init__(self, backbone: PullBackbone, prop: str = "energy"):
        super().__init__()
        self.prop, self.lin = prop, nn.Linear(8, 3 if prop == "forces" else 1)

    def forward(self, data: AtomicData, emb: dict[str, Tensor]) -> dict[str, Tensor]:
        out = self.lin(emb["h"].float() if emb["h"].dtype == torch.bfloat16 else emb["h"])
        if self.prop != "forces":
            out = torch.zeros(len(data.natoms)).to(out).index_add(0, data.batch, out.squeeze(1))
        return {self.prop: out, "embeddings": emb["h"]}


class TestAnotherBackbone(ModelSuite):
    name = "test_pull"
    heads = {name: {"module": "test_pull_head", "prop": name} for name in TARGETS}  # noqa: RUF012
    golden = (5.9309789, 4.5395471, 0.4595744, 0.5056231, -0.2809749)


class FAENetSuite(ModelSuite):
    name, options = "faenet", SMALL_FAENET


@pytest.fixture
def model() -> FrameAveragedModel:
    return FAENetSuite().model("full")


def test_frames_in_the_batch_are_used(model: FrameAveragedModel) -> None:
    """Those of the data transform give what the model's own give."""
    expected = outputs_of(model, slabs(3))[0]
    samples = [slab(index) for index in range(3)]
    for sample in samples:
        frames = compute_frames(sample.pos, sample.batch, 1, method="full", dim=3, group="E")
        sample.frame_rot, sample.frame_weight = frames.rot, frames.weight
    model.frames["method"] = "none"
    torch.testing.assert_close(outputs_of(model, to_batch(samples))[0], expected, rtol=0, atol=1e-12)
    assert (outputs_of(model, slabs(3))[0] - expected).abs().max() > 1e-4


def test_full_frames_are_the_mean_over_single_frames(model: FrameAveragedModel) -> None:
    """Against eq. (1) written out: one forward pass for each frame, rotated by hand."""
    batch = slabs(2)
    frames = compute_frames(batch.pos, batch.batch, 2, method="full", dim=3, group="E")
    averaged = outputs_of(model, batch)
    model.frames["method"] = "none"
    centre = torch.stack([batch.pos[batch.batch == b].mean(0) for b in range(2)])
    energies, forces = [], []
    for rot in frames.rot.unbind(1):
        turned = copy.deepcopy(batch)
        turned.pos = torch.einsum("ni,nij->nj", batch.pos - centre[batch.batch], rot[batch.batch])
        turned.cell = batch.cell @ rot
        energy, force = outputs_of(model, turned)
        energies.append(energy)
        forces.append(torch.einsum("nj,nij->ni", force, rot[batch.batch]))
    torch.testing.assert_close(averaged[0], torch.stack(energies).mean(0), rtol=0, atol=1e-10)
    torch.testing.assert_close(averaged[1], torch.stack(forces).mean(0), rtol=0, atol=1e-10)


def test_views_have_every_field_by_its_level(model: FrameAveragedModel) -> None:
    batch = slabs(3)
    batch.energy, batch.forces, batch.dataset = torch.arange(3.0), batch.pos + 1, ["a", "b", "c"]
    frames = compute_frames(batch.pos, batch.batch, 3, method="full", dim=2, group="SE")
    views = ViewBatch(batch, frames, torch.zeros(3, 3, dtype=torch.float64))
    seen = views.data
    assert seen.natoms.tolist() == [n for n in batch.natoms.tolist() for _ in range(2)]
    assert seen.dataset == ["a", "a", "b", "b", "c", "c"] and seen.energy.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(seen.batch[seen.edge_index[0]], seen.batch[seen.edge_index[1]])
    for name in ("atomic_numbers", "forces"):
        assert torch.equal(seen[name], batch[name][views.atom])
    before, after = ((b.pos[b.edge_index[0]] - b.pos[b.edge_index[1]]).norm(dim=1) for b in (batch, seen))
    per_system = before.split(batch.nedges.tolist())
    torch.testing.assert_close(after, torch.cat([part for part in per_system for _ in range(2)]))
    batch.my_field = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'my_field' that is not known; .*register_field"):
        model(batch)


def test_views_are_the_same_where_their_sizes_are_known(model: FrameAveragedModel) -> None:
    """What the loader says of them keeps a GPU from being asked, and changes nothing; other edges make it void."""
    batch, origin = slabs(3), torch.zeros(3, 3, dtype=torch.float64)
    batch.dataset = ["a", "b", "c"]
    frames = compute_frames(batch.pos, batch.batch, 3, method="full", dim=2, group="E")
    frames = frames._replace(weight=torch.tensor([[0.5, 0, 0.5, 0], [0, 0, 0, 1.0], [0.25] * 4], dtype=torch.float64))
    sizes = frame_sizes(frames.weight, batch.natoms, batch.nedges)
    assert [views for views, _, _ in sizes] == [2, 1, 4]
    batch.frame_rot, batch.frame_weight = frames
    expected, asked = outputs_of(model, batch), ViewBatch(batch, frames, origin)
    batch.frame_sizes = sizes
    known = ViewBatch(batch, frames, origin, sizes=model._sizes(batch, frames, through_frames=False))
    assert all(torch.equal(a, b) for a, b in zip(asked.views, known.views, strict=True))
    assert known.data.dataset == asked.data.dataset == ["a", "a", "b", *["c"] * 4]
    for name in ("pos", "edge_index", "natoms", "nedges", "batch", "cell"):
        assert torch.equal(known.data[name], asked.data[name])
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(model, batch), expected, strict=True))
    batch.edge_index, batch.nedges = batch.edge_index[:, :0], batch.nedges * 0
    model.cutoff, model.max_neighbors = 5.0, 20
    torch.testing.assert_close(outputs_of(model, batch), expected, rtol=0, atol=1e-12)


def test_a_batch_without_edges_gets_its_graph(model: FrameAveragedModel) -> None:
    model.cutoff, model.max_neighbors = 5.0, 20
    batch, bare = slabs(2), slabs(2)
    bare.edge_index, bare.cell_offsets = batch.edge_index[:, :0], batch.cell_offsets[:0]
    bare.nedges = torch.zeros_like(batch.nedges)
    torch.testing.assert_close(outputs_of(model, bare)[0], outputs_of(model, batch)[0], rtol=0, atol=1e-12)


def test_declared_scalars_have_heads_and_are_averaged() -> None:
    heads = FAENetBackbone.default_heads([TARGETS["energy"], resolve("gap", unit="eV")])
    frames = {"method": "full", "dim": 3, "group": "E"}
    model = FrameAveragedModel(backbone={"model": "faenet", **SMALL_FAENET}, heads=heads, frames=frames).double()
    outputs = model(slabs(3))
    assert {head: list(output) for head, output in outputs.items()} == {"energy": ["energy"], "gap": ["gap"]}
    assert outputs["gap"]["gap"].shape == (3,) and (outputs["gap"]["gap"] - outputs["energy"]["energy"]).abs().min() > 0
    moved = model(slabs(3, motion=orthogonal(0, dim=3, det=-1.0)))["gap"]["gap"]
    torch.testing.assert_close(moved, outputs["gap"]["gap"], rtol=0, atol=1e-9)


def test_a_target_that_there_is_no_head_for() -> None:
    with pytest.raises(ValueError, match=r"outputs\.charges: FAENet has no head for it; name one in model\.heads"):
        FAENetBackbone.default_heads([Target("charges", "atom", 0, "e", ())])


def test_what_heads_do_not_say_is_as_in_the_backbone() -> None:
    def head(**options: object) -> nn.Module:
        energy = {"module": "faenet_energy_head", **options}
        backbone = {"model": "faenet", **SMALL_FAENET, "skip_co": "none", "act": "relu"}
        return FrameAveragedModel(backbone=backbone, heads={"energy": energy}).output_heads["energy"]

    assert (head().options.skip_co, head().options.act) == ("none", "relu")
    assert (head(skip_co="add", act="gelu").options.skip_co, head(skip_co=None).options.skip_co) == ("add", "none")


def test_outputs_that_cannot_be_averaged_are_refused_and_by_products_left_out() -> None:
    heads = {"stress": {"module": "test_pull_head"}, "energy": {"module": "test_pull_head"}}
    model = FrameAveragedModel(backbone={"model": "test_pull"}, heads=heads, frames={"method": "full"}).double()
    assert list(model(slabs(1))["energy"]) == ["energy"]
    model.output_heads["stress"].forward = lambda data, emb: {"stress": torch.zeros(len(data.natoms), 9)}
    with pytest.raises(ValueError, match=r"output 'stress' of shape \(8, 9\): frames can average energy, forces and"):
        model(slabs(1))


def test_what_a_model_needs() -> None:
    assert Backbone.needs == ("edges",)
    assert FAENetBackbone(**SMALL_FAENET).needs == ("edges", "tags")
    assert FAENetBackbone(**(SMALL_FAENET | {"tag_hidden_channels": 0})).needs == ("edges",)


def _config(**changes: object) -> Config:
    dataset = {"root": "data", "train": {"src": "train"}, "val": {"val_id": {"src": "val"}}}
    optim = {"lr_initial": 0.001, "batch_size": 2, "max_epochs": 1}
    model = {"name": "faenet", **SMALL_FAENET}
    given = {"trainer": "faenet", "task": "s2ef", "dataset": dataset, "model": model, "optim": optim}
    return build_config(given | changes)


def test_a_configured_model_is_fast_and_has_heads_with_its_options() -> None:
    options = {"name": "faenet", **SMALL_FAENET, "energy_head": "sum", "force_norm": "layer", "skip_co": "add"}
    model = make_model(_config(model=options, outputs={"gap": {"unit": "eV"}}))
    assert list(model.output_heads) == ["energy", "forces", "gap"]
    assert {model.output_heads[name].options.energy_head for name in ("energy", "gap")} == {"sum"}
    assert model.output_heads["gap"].options.skip_co == "add"
    assert model.output_heads["forces"].options.force_norm == "layer"
    assert isinstance(model.backbone.edge_embedding, FastEdgeEmbedding)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"name": "test_pull"}, r"model\.heads: missing; test_pull has no default heads"),
        ({"name": "faenet", "force_nrm": "layer"}, r"model\.force_nrm: unknown key; did you mean force_norm"),
        ({"name": "faenet", "prop": "gap"}, r"model\.prop: unknown key"),
        ({"name": "faenet", "mp_type": "bas"}, r"model: mp_type: 'bas' is not one of"),
    ],
)
def test_models_that_cannot_be_made(model: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(_config(model=model))
