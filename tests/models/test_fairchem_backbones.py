"""fairchem's own backbones in frames: EScAIP, which is not equivariant, and eSCN-MD, which is under rotations."""

from typing import Any

import pytest
import torch

from faenet_ocp.models.frame_averaging import FrameAveragedModel
from models.suite import orthogonal, outputs_of, slabs

_ESCAIP = "fairchem.core.models.escaip.EScAIP"
_ESCN = "fairchem.core.models.uma.escn_md"
BACKBONES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "escaip": (
        {
            "model": f"{_ESCAIP}.EScAIPBackbone",
            "regress_forces": True,
            "direct_forces": True,
            "hidden_size": 32,
            "num_layers": 2,
            "atten_name": "math",
            "atten_num_heads": 4,
            "use_compile": False,
            "use_padding": False,
            "use_frequency_embedding": False,
            "use_pbc": True,
            "max_num_elements": 100,
            "max_atoms": 100,
            "max_batch_size": 8,
            "max_radius": 5.0,
            "knn_k": 12,
            "knn_soft": True,
            "knn_sigmoid_scale": 0.2,
            "knn_lse_scale": 0.1,
            "knn_use_low_mem": False,
            "knn_pad_size": 20,
        },
        {
            "energy": {"module": f"{_ESCAIP}.EScAIPEnergyHead"},
            "forces": {"module": f"{_ESCAIP}.EScAIPDirectForceHead"},
        },
    ),
    "escn_md": (
        {
            "model": f"{_ESCN}.eSCNMDBackbone",
            "sphere_channels": 16,
            "hidden_channels": 16,
            "edge_channels": 16,
            "num_layers": 1,
            "num_distance_basis": 16,
            "cutoff": 5.0,
            "otf_graph": True,
            "always_use_pbc": False,
            "use_dataset_embedding": False,
        },
        {
            "energy": {"module": f"{_ESCN}.MLP_Energy_Head"},
            "forces": {"module": f"{_ESCN}.Linear_Force_Head"},
        },
    ),
}


def make(name: str, method: str) -> FrameAveragedModel:
    backbone, heads = BACKBONES[name]
    torch.manual_seed(1)
    frames = {"method": method, "dim": 3, "group": "E"}
    return FrameAveragedModel(backbone=backbone, heads=heads, frames=frames, cutoff=None).eval()


def errors(model: FrameAveragedModel, det: float) -> tuple[float, float]:
    """Largest change of energies, and of forces turned back, relative to the largest force, of turned copies."""
    motion = orthogonal(3, dim=3, det=det)
    with torch.no_grad():
        energy, forces = outputs_of(model, slabs(3, torch.float32))
        moved_energy, moved_forces = outputs_of(model, slabs(3, torch.float32, motion=motion))
    change = (moved_forces - forces @ motion.float()).abs().max() / forces.abs().max()
    return float((moved_energy - energy).abs().max() / energy.abs().max()), float(change)


@pytest.mark.parametrize("det", [1.0, -1.0])
@pytest.mark.parametrize("name", BACKBONES)
def test_frames_make_both_exact(name: str, det: float) -> None:
    for method in ("canonical", "full"):
        assert max(errors(make(name, method), det)) < 1e-3
    alone = errors(make(name, "none"), det)
    if name == "escn_md" and det > 0:
        assert max(alone) < 1e-3
    else:  # forces, which frames mend: of EScAIP all, of eSCN-MD those of mirror images
        assert alone[1] > 0.01


@pytest.mark.parametrize("name", BACKBONES)
def test_what_no_head_uses_passes_through_frames(name: str) -> None:
    outputs = make(name, "full")(slabs(2, torch.float32))
    assert set(outputs) >= {"energy", "forces"}
    assert outputs["energy"]["energy"].shape[0] == 2 and outputs["forces"]["forces"].shape[1] == 3
    assert "embeddings" not in outputs["energy"]


@pytest.mark.parametrize("name", BACKBONES)
def test_edges_of_the_batch_are_not_needed(name: str) -> None:
    """`dataset.edges: none` gives batches without; the backbone finds its own, and none are built for it."""
    model, batch = make(name, "canonical"), slabs(2, torch.float32)
    expected = outputs_of(model, batch)
    batch.edge_index, batch.cell_offsets = batch.edge_index[:, :0], batch.cell_offsets[:0]
    batch.nedges = torch.zeros_like(batch.nedges)
    found = outputs_of(model, batch)
    for ours, theirs in zip(found, expected, strict=True):  # eSCN-MD turns edges at random
        assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
