"""FAENet and frame averaging for OC20, on fairchem-core 2.

Public names are loaded when first used, so `import faenet_ocp.frames` needs torch only. Importing
`faenet_ocp.training.trainer` registers everything in fairchem's registry: trainer `faenet`, models `faenet`, those of
`models/peers` and `frame_averaging`, data sets `oc20_lmdb` and `oc20_packed`.
"""

from importlib import import_module
from typing import Any

from faenet_ocp.common.log_setup import expect_no_driver

expect_no_driver()  # before anything imports fairchem, in every process

_PUBLIC = {
    "FAENet": "faenet_ocp.models.faenet",
    "EnergyHead": "faenet_ocp.models.heads",
    "ForceHead": "faenet_ocp.models.heads",
    "FAENetBackbone": "faenet_ocp.models.fairchem",
    "Backbone": "faenet_ocp.models.base",
    "NodeFeatures": "faenet_ocp.models.base",
    "Options": "faenet_ocp.models.base",
    "option": "faenet_ocp.models.base",
    "Readout": "faenet_ocp.models.peers.layers",
    "register_network": "faenet_ocp.models.fairchem",
    "FrameAveragedModel": "faenet_ocp.models.frame_averaging",
    "Frames": "faenet_ocp.frames",
    "compute_frames": "faenet_ocp.frames",
    "OC20LmdbDataset": "faenet_ocp.data.oc20",
    "OC20PackedDataset": "faenet_ocp.data.packed",
    "Transform": "faenet_ocp.data.transforms",
    "register_transform": "faenet_ocp.data.transforms",
    "Field": "faenet_ocp.data.fields",
    "register_field": "faenet_ocp.data.fields",
    "FAENetTrainer": "faenet_ocp.training.trainer",
    "FAENetCalculator": "faenet_ocp.inference.calculator",
    "Predictor": "faenet_ocp.inference.predictor",
    "relax": "faenet_ocp.inference.relaxation",
    "load_checkpoint": "faenet_ocp.checkpoint",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'faenet_ocp' has no attribute {name!r}")
