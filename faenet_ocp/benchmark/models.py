"""The models that are compared, each with one way to predict from a batch.

Settings: FAENet's are the paper's (Table 7), SchNet's those of OCP's configs `is2re/all/schnet` and `s2ef/2M/schnet`,
eSCN-MD's a small setting of ours (4 layers, 128 channels, lmax 2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.models.base import HydraModel
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn.models import SchNet

from faenet_ocp.benchmark.published import build_published
from faenet_ocp.graph.neighbors import edge_vectors
from faenet_ocp.kernels import accelerate
from faenet_ocp.models import fairchem as faenet_models  # noqa: F401  # registers FAENet and its heads
from faenet_ocp.models.frame_averaging import FrameAveragedModel
from faenet_ocp.models.reference_weights import load_reference_state_dict

Outputs = dict[str, Tensor]
CUTOFF = 6.0
TASKS = ("is2re", "s2ef")
MAX_NEIGHBORS = {"is2re": 40, "s2ef": 30}
_ENERGY_HEAD = "weighted-av-final-embeds"
_FORCE_CHANNELS = 256
FAENET: dict[str, dict[str, Any]] = {
    "is2re": {
        "hidden_channels": 384,
        "num_filters": 480,
        "num_interactions": 5,
        "num_gaussians": 104,
        "tag_hidden_channels": 64,
        "pg_hidden_channels": 64,
        "phys_embeds": True,
        "mp_type": "base",
        "skip_co": "concat",
    },
    "s2ef": {
        "hidden_channels": 256,
        "num_filters": 480,
        "num_interactions": 7,
        "num_gaussians": 136,
        "tag_hidden_channels": 32,
        "pg_hidden_channels": 32,
        "phys_embeds": False,
        "mp_type": "updownscale_base",
        "skip_co": "none",
    },
}
_SCHNET: dict[str, dict[str, Any]] = {
    "is2re": {"hidden_channels": 384, "num_filters": 128, "num_interactions": 4, "num_gaussians": 100},
    "s2ef": {"hidden_channels": 1024, "num_filters": 256, "num_interactions": 5, "num_gaussians": 200},
}
_ESCN = {
    "sphere_channels": 128,
    "lmax": 2,
    "mmax": 2,
    "num_layers": 4,
    "hidden_channels": 128,
    "edge_channels": 128,
    "num_distance_basis": 64,
    "cutoff": CUTOFF,
}


@dataclass
class Contender:
    """A model under measurement.

    Attributes:
        name: in tables.
        module: the model.
        predict: energy (B,), and forces (N, 3) for S2EF, of a batch.
        settings: of the model.
        amp: bfloat16 autocast.
    """

    name: str
    module: nn.Module
    predict: Callable[[AtomicData], Outputs]
    settings: dict[str, Any]
    amp: bool = False

    def __call__(self, batch: AtomicData) -> Outputs:
        """Predict, under autocast if `amp`."""
        with torch.autocast(batch.pos.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return self.predict(batch)


def small(task: str) -> dict[str, Any]:
    """FAENet's options of a task with few channels and blocks: for quick checks."""
    sizes = {"num_filters": 32, "num_interactions": 2, "num_gaussians": 16}
    return {**FAENET[task], **sizes, "hidden_channels": 48, "tag_hidden_channels": 8, "pg_hidden_channels": 8}


def faenet(
    task: str,
    options: dict[str, Any],
    *,
    frames: dict[str, Any] | None = None,
    graph_norm: str = "batch",
    amp: bool = False,
    conservative: bool = False,
    name: str = "",
    seed: int = 0,
) -> Contender:
    """This package's FAENet; graph_norm "batch" is the published package's; `conservative`: forces are -dE/dX."""
    torch.manual_seed(seed)
    heads: dict[str, Any] = {
        "energy": {"module": "faenet_energy_head", "energy_head": _ENERGY_HEAD, "skip_co": options["skip_co"]}
    }
    if task == "s2ef":
        heads["forces"] = {"module": "faenet_force_head", "force_hidden_channels": _FORCE_CHANNELS}
    backbone = {"model": "faenet", **options, "complex_mp": True, "cutoff": CUTOFF, "graph_norm": graph_norm}
    model = FrameAveragedModel(backbone=backbone, heads=heads, frames=frames)
    accelerate(model)

    def predict(batch: AtomicData) -> Outputs:
        return {key: value[key] for key, value in model(batch).items()}

    def differentiate(batch: AtomicData) -> Outputs:
        batch = batch.clone()
        with torch.enable_grad():
            batch.pos.requires_grad_(True)
            energy = model(batch, through_frames=True)["energy"]["energy"]
            (gradient,) = torch.autograd.grad(energy.sum(), batch.pos)
        return {"energy": energy.detach(), "forces": -gradient}

    label = "FAENet, bf16" if amp else "FAENet"
    function = differentiate if conservative else predict
    return Contender(name or label, model, function, backbone | {"frames": frames}, amp)


def published(task: str, options: dict[str, Any], *, amp: bool = False) -> Contender:
    """The published package's FAENet, without frames.

    Raises:
        ImportError: the package is not installed.
    """
    torch.manual_seed(0)
    arguments = {
        **options,
        "complex_mp": True,
        "second_layer_MLP": False,
        "energy_head": _ENERGY_HEAD,
        "cutoff": CUTOFF,
    }
    model = build_published(arguments, forces=task == "s2ef", force_hidden_channels=_FORCE_CHANNELS)

    def predict(batch: AtomicData) -> Outputs:
        fields = ("pos", "atomic_numbers", "tags", "batch", "edge_index", "cell", "cell_offsets")
        data = Data(**{name: getattr(batch, name) for name in fields}, neighbors=batch.nedges)
        outputs = model(data, mode="inference")
        return {key: value[:, 0] if key == "energy" else value for key, value in outputs.items() if key in _KEYS[task]}

    return Contender("published faenet 0.1.3" + (", bf16" if amp else ""), model, predict, arguments, amp)


_KEYS = {"is2re": ("energy",), "s2ef": ("energy", "forces")}


def same_weights(ours: Contender, theirs: Contender) -> None:
    """Give ours the weights of the published package's."""
    model: Any = ours.module
    load_reference_state_dict(
        theirs.module.state_dict(),
        model=model.backbone,
        energy_head=model.output_heads["energy"],
        force_head=dict(model.output_heads.items()).get("forces"),
    )


def schnet(task: str, *, amp: bool = False) -> Contender:
    """PyG's SchNet on the batch's graph; forces of S2EF are -dE/dX, as in OCP."""
    torch.manual_seed(0)
    graph: dict[str, Tensor] = {}
    model = SchNet(
        **_SCHNET[task],
        cutoff=CUTOFF,
        interaction_graph=lambda pos, batch: (graph["edge_index"], graph["distance"]),
    )

    def predict(batch: AtomicData) -> Outputs:
        forces = task == "s2ef"
        with torch.set_grad_enabled(torch.is_grad_enabled() or forces):
            pos = batch.pos.detach().requires_grad_(forces)
            of_edge = batch.batch[batch.edge_index[1]]
            vectors = edge_vectors(pos, batch.cell, batch.edge_index, batch.cell_offsets, of_edge)
            graph.update(edge_index=batch.edge_index, distance=vectors.norm(dim=1))
            energy = model(batch.atomic_numbers, pos, batch.batch)[:, 0]
            if not forces:
                return {"energy": energy}
            (gradient,) = torch.autograd.grad(energy.sum(), pos, create_graph=model.training)
        return {"energy": energy, "forces": -gradient}

    return Contender("SchNet (PyG)" + (", bf16" if amp else ""), model, predict, _SCHNET[task], amp)


def escn_md() -> Contender:
    """fairchem's eSCN-MD at a small size, energy only, on the batch's graph."""
    torch.manual_seed(0)
    path = "fairchem.core.models.uma.escn_md"
    switches = {
        "otf_graph": False,
        "direct_forces": True,
        "regress_forces": False,
        "always_use_pbc": False,
        "use_dataset_embedding": False,
    }
    model = HydraModel(
        backbone={"model": f"{path}.eSCNMDBackbone", **_ESCN, **switches},
        heads={"energy": {"module": f"{path}.MLP_Energy_Head"}},
    )

    def predict(batch: AtomicData) -> Outputs:
        return {"energy": model(batch)["energy"]["energy"]}

    return Contender("eSCN-MD, small (fairchem)", model, predict, _ESCN)
