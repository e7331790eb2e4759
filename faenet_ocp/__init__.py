"""FAENet and frame averaging for OC20, on fairchem-core 2.

Public names are loaded when first used, so `import faenet_ocp.frames` needs torch only. Importing `faenet_ocp.trainer`
registers everything in fairchem's registry: trainer `faenet`, models `faenet` and `frame_averaging`, data sets
`oc20_lmdb` and `oc20_packed`.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "FAENet": "faenet_ocp.faenet",
    "EnergyHead": "faenet_ocp.faenet",
    "ForceHead": "faenet_ocp.force_head",
    "FAENetBackbone": "faenet_ocp.backbone",
    "FrameAveragedModel": "faenet_ocp.backbone",
    "Frames": "faenet_ocp.frames",
    "compute_frames": "faenet_ocp.frames",
    "OC20LmdbDataset": "faenet_ocp.lmdb_dataset",
    "OC20PackedDataset": "faenet_ocp.packed_dataset",
    "register_transform": "faenet_ocp.transforms",
    "FAENetTrainer": "faenet_ocp.trainer",
    "FAENetCalculator": "faenet_ocp.calculator",
    "Predictor": "faenet_ocp.calculator",
    "relax": "faenet_ocp.relaxation",
    "load_checkpoint": "faenet_ocp.checkpoint",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'faenet_ocp' has no attribute {name!r}")
