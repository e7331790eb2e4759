"""The models that are compared, each with one way to predict from a batch.

Settings are those of `configs/<task>/<model>.yml`, whose first lines say where they come from; FAENet's are the paper's
Table 7.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor, nn
from torch_geometric.data import Data

from faenet_ocp import build
from faenet_ocp.benchmark.published import build_published
from faenet_ocp.config.schema import build_config
from faenet_ocp.config.yaml import find_config, load_yaml
from faenet_ocp.data.fields import shallow_copy
from faenet_ocp.models.reference_weights import load_reference_state_dict
from faenet_ocp.targets import TASKS
from faenet_ocp.tasks.tasks import (
    conservative_outputs,
    energy_gradient_forces,
    has_no_forces_of_its_own,
    make_tasks,
)

Outputs = dict[str, Tensor]
OC20_TASKS = ("is2re", "s2ef")
PEERS = (
    "schnet",
    "faenet",
    "painn",
    "egnn",
    "forcenet",
    "gns",
    "comenet",
    "dimenetpp",
    "spherenet",
    "escn_md",
    "escaip",
)
"""Files of `configs/<task>`; the first is what the others are compared with."""
_SMALL: dict[str, dict[str, Any]] = {
    "faenet": {"num_filters": 32, "num_interactions": 2, "num_gaussians": 16, "hidden_channels": 48},
    "schnet": {"hidden_channels": 16, "num_filters": 16, "num_interactions": 1},
    "painn": {"hidden_channels": 16, "num_interactions": 1},
    "egnn": {"hidden_channels": 16, "num_interactions": 1},
    "forcenet": {"hidden_channels": 16, "decoder_hidden_channels": 16, "num_interactions": 1},
    "gns": {"hidden_channels": 16, "num_interactions": 1, "num_radial": 16},
    "comenet": {"hidden_channels": 16},
    "dimenetpp": {"hidden_channels": 16, "num_blocks": 1},
    "spherenet": {"hidden_channels": 16},
    "escn_md": {"sphere_channels": 16, "hidden_channels": 16, "num_layers": 1},
    "escaip": {"hidden_size": 32, "num_layers": 1},
}
_SMALL["faenet"] |= {"tag_hidden_channels": 8, "pg_hidden_channels": 8}


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

    def in_bf16(self) -> "Contender":
        """The same network under autocast."""
        return dataclasses.replace(self, name=f"{self.name}, bf16", amp=True)


def _shipped(task: str, model: str = "faenet", *, small: bool) -> dict[str, Any]:
    """The shipped configuration of a task; `small`: with few channels and blocks, for quick checks."""
    config = load_yaml(find_config(f"configs/{task}/{model}.yml"))
    config["model"] |= _SMALL[model] if small else {}
    return config


def graph(task: str) -> dict[str, Any]:
    """`cutoff` and `max_neighbors` of a task's FAENet; all models get the same graph."""
    return {name: _shipped(task, small=False)["model"][name] for name in ("cutoff", "max_neighbors")}


def shipped(
    task: str,
    model: str = "faenet",
    *,
    small: bool = False,
    frames: dict[str, Any] | None = None,
    conservative: bool = False,
    plain: bool = False,
    name: str = "",
    **options: Any,
) -> Contender:
    """A model of this package's configurations, with random weights.

    Args:
        task, model: `configs/<task>/<model>.yml`.
        small: with few channels and blocks.
        frames: of the batches; None: no frames.
        conservative: forces are -dE/dX through the frames, though there is a head for them.
        plain: not accelerated for a CPU: as it is on a GPU.
        name: in tables.
        options: of the network, in place of those of the file.
    """
    raw = _shipped(task, model, small=small)
    raw["model"] |= options
    raw["frames"] = frames or {"method": "none"}
    config = build_config(raw)
    network, tasks = build.make_model(config, device="meta" if plain else "cpu"), make_tasks(config, {})
    from_energy = has_no_forces_of_its_own(network, tasks)

    def predict(batch: AtomicData) -> Outputs:
        if conservative:
            outputs = conservative_outputs(network, tasks, batch.clone())
        elif from_energy:
            with torch.enable_grad():
                batch = batch.clone()
                batch.pos.requires_grad_()
                outputs = dict(network(batch))
                forces = energy_gradient_forces(tasks, outputs, batch.pos, differentiable=network.training)
            outputs["forces"] = {"forces": forces}
        else:
            outputs = network(shallow_copy(batch))  # eSCN-MD writes its graph into it
        return {key: outputs[key][key] for key in TASKS[task]}

    label = {"faenet": "FAENet"}.get(model, model)
    return Contender(name or label, network, predict, {**config.model, "frames": frames})


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
