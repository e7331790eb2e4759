"""Networks for fairchem: registered backbones and heads, thin around `base.Backbone` and FAENet's heads."""

from collections.abc import Callable
from typing import Any

from fairchem.core.common.registry import registry
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.models.base import BackboneInterface, HeadInterface
from torch import Tensor, nn

from faenet_ocp.common.checks import choice
from faenet_ocp.graph.vectors import edge_vectors
from faenet_ocp.models.base import Backbone, NodeFeatures
from faenet_ocp.models.faenet import FAENet
from faenet_ocp.models.functional import segment_sum
from faenet_ocp.models.heads import EnergyHead, ForceHead
from faenet_ocp.models.peers.comenet import ComENet
from faenet_ocp.models.peers.dimenetpp import DimeNetPlusPlus
from faenet_ocp.models.peers.egnn import EGNN
from faenet_ocp.models.peers.forcenet import ForceNet
from faenet_ocp.models.peers.gns import GNS
from faenet_ocp.models.peers.painn import PaiNN
from faenet_ocp.models.peers.schnet import SchNet
from faenet_ocp.models.peers.spherenet import SphereNet


class FairchemBackbone(BackboneInterface):
    """What fairchem asks a backbone for beside `forward`, where there is nothing special to say."""

    @classmethod
    def build_inference_settings(cls, settings: Any) -> dict:
        return {}

    def get_default_untrained_tasks(self, checkpoint_tasks: Any, inference_settings: Any) -> list:
        return []

    def validate_tasks(self, dataset_to_tasks: dict[str, list]) -> None:
        return None

    def prepare_for_inference(self, data: AtomicData, settings: Any) -> "FairchemBackbone":
        return self

    def on_predict_check(self, data: AtomicData) -> None:
        return None

    def validate_atoms_data(self, atoms: Any, task_name: str) -> None:
        return None


def inputs_of(network: Backbone, data: AtomicData) -> dict[str, Any]:
    """Arguments of `Backbone.forward` from a batch with edges."""
    index = data.edge_index
    return {
        "atomic_numbers": data.atomic_numbers,
        "edge_index": index,
        "edge_vec": edge_vectors(data.pos, data.cell, index, data.cell_offsets, data.batch[index[1]]),
        "batch": data.batch,
        "num_systems": len(data.natoms),
        "tags": data.tags if "tags" in network.needs else None,
    }


def register_network(name: str) -> Callable[[type[Backbone]], type[Backbone]]:
    """Decorator that makes a network a model of fairchem, for `model.name` in YAML: it then takes batches."""

    def register(network: type[Backbone]) -> type[Backbone]:
        def forward(self: Any, data: AtomicData) -> dict[str, NodeFeatures]:
            return {"features": network.forward(self, **inputs_of(self, data))}

        members = {"forward": forward, "__module__": network.__module__, "__doc__": network.__doc__}
        return registry.register_model(name)(type(network.__name__, (network, FairchemBackbone), members))

    return register


def _register(name: str, network: type[Backbone]) -> type[Backbone]:
    """One of this package's: the network keeps its name, the model has another, under which pickles find it."""
    model = register_network(name)(network)
    model.__module__, model.__name__ = __name__, f"{network.__name__}Backbone"
    model.__qualname__ = model.__name__
    return model


FAENetBackbone = _register("faenet", FAENet)
SchNetBackbone = _register("schnet", SchNet)
DimeNetPlusPlusBackbone = _register("dimenetpp", DimeNetPlusPlus)
PaiNNBackbone = _register("painn", PaiNN)
EGNNBackbone = _register("egnn", EGNN)
ForceNetBackbone = _register("forcenet", ForceNet)
GNSBackbone = _register("gns", GNS)
ComENetBackbone = _register("comenet", ComENet)
SphereNetBackbone = _register("spherenet", SphereNet)


@registry.register_model("scalar_head")
class ScalarHead(nn.Module, HeadInterface):
    """A scalar of systems: the backbone's `scalar_output`, summed over the atoms of each, or their mean."""

    def __init__(self, backbone: Backbone, *, prop: str = "energy", pooling: str = "sum"):
        super().__init__()
        self.prop, self.pooling = prop, choice("pooling", pooling, ("sum", "mean"))
        self.output = backbone.scalar_output()

    def forward(self, data: AtomicData, emb: dict[str, Any]) -> dict[str, Tensor]:
        """`{prop: (B,)}`, normalised."""
        values = segment_sum(self.output(emb["features"])[:, 0], data.batch, len(data.natoms))
        return {self.prop: values / data.natoms if self.pooling == "mean" else values}


@registry.register_model("vector_head")
class VectorHead(nn.Module, HeadInterface):
    """A vector of atoms: the backbone's `vector_output`."""

    def __init__(self, backbone: Backbone, *, prop: str = "forces"):
        super().__init__()
        self.prop = prop
        self.output = backbone.vector_output()

    def forward(self, data: AtomicData, emb: dict[str, Any]) -> dict[str, Tensor]:
        """`{prop: (N, 3)}`, normalised, in the frame."""
        return {self.prop: self.output(emb["features"])}


_LIKE_BACKBONE: Any = object()
"""The default of an option of a head that the backbone has, too."""


def _like(backbone: FAENet, **given: Any) -> dict[str, Any]:
    """Options of a head, those that are not given as the backbone has them."""
    own = backbone.options
    return {name: getattr(own, name) if value is _LIKE_BACKBONE else value for name, value in given.items()}


@registry.register_model("faenet_energy_head")
class FAENetEnergyHead(EnergyHead, HeadInterface):
    """`heads.EnergyHead` in fairchem's form, for the energy or another scalar of systems, `prop`."""

    def __init__(
        self,
        backbone: FAENet,
        *,
        prop: str = "energy",
        energy_head: str | bool | None = "weighted-av-final-embeds",
        skip_co: str | bool | None = _LIKE_BACKBONE,
        act: str = _LIKE_BACKBONE,
    ):
        own = backbone.options
        sizes = {"hidden_channels": own.hidden_channels, "num_interactions": own.num_interactions}
        super().__init__(**sizes, energy_head=energy_head, **_like(backbone, skip_co=skip_co, act=act))
        self.prop = prop

    def forward(self, data: AtomicData, emb: dict[str, Any]) -> dict[str, Tensor]:  # type: ignore[override]
        """`{prop: (B,)}`, normalised."""
        return {self.prop: super().forward(emb["features"], data.batch, len(data.natoms))}


@registry.register_model("faenet_force_head")
class FAENetForceHead(ForceHead, HeadInterface):
    """`heads.ForceHead` in fairchem's form, for forces or another vector of atoms, `prop`."""

    def __init__(
        self,
        backbone: FAENet,
        *,
        prop: str = "forces",
        force_decoder_type: str = "mlp",
        force_hidden_channels: int = 256,
        force_norm: str | None = "batch1d",
        act: str = _LIKE_BACKBONE,
    ):
        super().__init__(
            hidden_channels=backbone.options.hidden_channels,
            force_decoder_type=force_decoder_type,
            force_hidden_channels=force_hidden_channels,
            force_norm=force_norm,
            **_like(backbone, act=act),
        )
        self.prop = prop

    def forward(self, data: AtomicData, emb: dict[str, Any]) -> dict[str, Tensor]:  # type: ignore[override]
        """`{prop: (N, 3)}`, normalised, in the frame."""
        return {self.prop: super().forward(emb["features"].node_embedding)}
