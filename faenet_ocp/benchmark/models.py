"""The models that are compared, each with one way to predict from a batch.

Settings: FAENet's are those of `configs/<task>/faenet.yml` (the paper's Table 7), SchNet's those of OCP's configs
`is2re/all/schnet` and `s2ef/2M/schnet`, eSCN-MD's a small setting of ours (4 layers, 128 channels, lmax 2).
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

from faenet_ocp import build
from faenet_ocp.benchmark.published import build_published
from faenet_ocp.config.schema import build_config
from faenet_ocp.config.yaml import find_config, load_yaml
from faenet_ocp.graph.vectors import edge_vectors
from faenet_ocp.models.reference_weights import load_reference_state_dict
from faenet_ocp.targets import TASKS
from faenet_ocp.tasks.tasks import conservative_outputs, make_tasks

Outputs = dict[str, Tensor]
OC20_TASKS = ("is2re", "s2ef")
_SMALL = {"num_filters": 32, "num_interactions": 2, "num_gaussians": 16}
_SMALL |= {"hidden_channels": 48, "tag_hidden_channels": 8, "pg_hidden_channels": 8}
_SCHNET: dict[str, dict[str, Any]] = {
    "is2re": {"hidden_channels": 384, "num_filters": 128, "num_interactions": 4, "num_gaussians": 100},
    "s2ef": {"hidden_channels": 1024, "num_filters": 256, "num_interactions": 5, "num_gaussians": 200},
}
_ESCN = {"sphere_channels": 128, "lmax": 2, "mmax": 2, "num_layers": 4, "hidden_channels": 128}
_ESCN |= {"edge_channels": 128, "num_distance_basis": 64}


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


def _shipped(task: str, *, small: bool) -> dict[str, Any]:
    """The shipped configuration of a task; `small`: with few channels and blocks, for quick checks."""
    config = load_yaml(find_config(f"configs/{task}/faenet.yml"))
    config["model"] |= _SMALL if small else {}
    return config


def graph(task: str) -> dict[str, Any]:
    """`cutoff` and `max_neighbors` of a task's FAENet; all models get the same graph."""
    return {name: _shipped(task, small=False)["model"][name] for name in ("cutoff", "max_neighbors")}


def faenet(
    task: str,
    *,
    small: bool = False,
    frames: dict[str, Any] | None = None,
    graph_norm: str = "system",
    amp: bool = False,
    conservative: bool = False,
    name: str = "",
) -> Contender:
    """This package's FAENet; graph_norm "batch" is the published package's; `conservative`: forces are -dE/dX."""
    raw = _shipped(task, small=small)
    raw["model"]["graph_norm"] = graph_norm
    raw["frames"] = frames or {"method": "none"}
    config = build_config(raw)
    model, tasks = build.make_model(config), make_tasks(config, {})

    def predict(batch: AtomicData) -> Outputs:
        outputs = conservative_outputs(model, tasks, batch.clone()) if conservative else model(batch)
        return {key: value[key] for key, value in outputs.items()}

    settings = {**config.model, "frames": frames}
    return Contender(name or "FAENet" + (", bf16" if amp else ""), model, predict, settings, amp)


def published(task: str, *, small: bool = False) -> Contender:
    """The published package's FAENet, without frames.

    Raises:
        ImportError: the package is not installed.
    """
    torch.manual_seed(0)
    options = _shipped(task, small=small)["model"]
    model = build_published(options, forces=task == "s2ef")

    def predict(batch: AtomicData) -> Outputs:
        fields = ("pos", "atomic_numbers", "tags", "batch", "edge_index", "cell", "cell_offsets")
        data = Data(**{name: getattr(batch, name) for name in fields}, neighbors=batch.nedges)
        outputs = model(data, mode="inference")
        return {key: outputs[key][:, 0] if key == "energy" else outputs[key] for key in TASKS[task]}

    return Contender("published faenet 0.1.3", model, predict, options)


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
    edges: dict[str, Tensor] = {}
    model = SchNet(
        **_SCHNET[task],
        cutoff=graph(task)["cutoff"],
        interaction_graph=lambda pos, batch: (edges["edge_index"], edges["distance"]),
    )

    def predict(batch: AtomicData) -> Outputs:
        forces = task == "s2ef"
        with torch.set_grad_enabled(torch.is_grad_enabled() or forces):
            pos = batch.pos.detach().requires_grad_(forces)
            of_edge = batch.batch[batch.edge_index[1]]
            vectors = edge_vectors(pos, batch.cell, batch.edge_index, batch.cell_offsets, of_edge)
            edges.update(edge_index=batch.edge_index, distance=vectors.norm(dim=1))
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
    settings = {**_ESCN, "cutoff": graph("is2re")["cutoff"]}
    switches = {"direct_forces": True}
    switches |= dict.fromkeys(("otf_graph", "regress_forces", "always_use_pbc", "use_dataset_embedding"), False)
    model = HydraModel(
        backbone={"model": f"{path}.eSCNMDBackbone", **settings, **switches},
        heads={"energy": {"module": f"{path}.MLP_Energy_Head"}},
    )

    def predict(batch: AtomicData) -> Outputs:
        return {"energy": model(batch)["energy"]["energy"]}

    return Contender("eSCN-MD, small (fairchem)", model, predict, settings)
