"""A checkpoint as a file that fairchem's own predict unit and FAIRChemCalculator load.

fairchem's inference checkpoints are another format: a pickled `MLIPInferenceCheckpoint`, read with
`torch.load(weights_only=False)`, so open only files that you trust. What fairchem does differently from
`calculator.FAENetCalculator`, and what follows for an exported checkpoint:

- it knows no transforms, so checkpoints with `remove_subsurface` (all IS2RE configs) cannot be exported;
- it wraps atoms into the cell, and frames follow the positions: energies are equal for structures that are wrapped
  already, and may jump when an atom crosses the border of the cell;
- its "default" inference settings compile the model; load with `inference_settings="batch"`;
- it does not check elements and tags.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fairchem.core.models.uma.escn_md import GradRegressConfig
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

from faenet_ocp import build
from faenet_ocp.backbone import FrameAveragedModel
from faenet_ocp.calculator import Predictor
from faenet_ocp.checkpoint import save_file
from faenet_ocp.config import build_config

_UNIT = "fairchem.core.units.mlip_unit.mlip_unit"
