"""A checkpoint as a file that fairchem's own predict unit and FAIRChemCalculator load.

fairchem's inference checkpoints are another format than ours: a pickled `MLIPInferenceCheckpoint`, which it reads with
`torch.load(weights_only=False)`, so open only files that you trust. What fairchem does differently from
`calculator.FAENetCalculator`:

- it knows no transforms, so checkpoints with `remove_subsurface` (the IS2RE configs) cannot be exported;
- it wraps atoms into the cell, and frames follow the positions: energies are equal where nothing is to be wrapped, and
  may jump when an atom crosses the border of the cell;
- its "default" inference settings compile the model: load with `inference_settings="batch"`;
- it does not look at elements and tags.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fairchem.core.models.uma.escn_md import GradRegressConfig
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

from faenet_ocp import build
from faenet_ocp.backbone import FrameAveragedModel
from faenet_ocp.calculator import Predictor
from faenet_ocp.config import build_config

_TASKS = "fairchem.core.units.mlip_unit.mlip_unit"


def export_fairchem(state: Mapping[str, Any], path: Path, *, frames: str | None = None) -> None:
    """Writes a checkpoint for `fairchem.core.units.mlip_unit.load_predict_unit`.

    The calculator's `task_name` is the checkpoint's `dataset.name`. Forces are those of the force head.

    Args:
        state: content of a checkpoint (`checkpoint.load_checkpoint`).
        path: file to write; appears when it is complete.
        frames: as for `calculator.Predictor`.

    Raises:
        ValueError: the checkpoint has transforms.
    """
    predictor = Predictor(state, device="cpu", frames=frames)
    config = predictor.config
    if len(predictor.transforms):
        names = ", ".join(name for name, _ in predictor.transforms.steps)
        raise ValueError(f"the checkpoint's transforms ({names}) would be missing: fairchem's calculator has none")
    backbone = type(predictor.model.backbone)
    weights = predictor.model.state_dict()
    content = MLIPInferenceCheckpoint(
        model_config={
            "_target_": f"{__name__}.make_exported_model",
            "_convert_": "all",
            "backbone": {"model": f"{backbone.__module__}.{backbone.__qualname__}"},
            "config": config.model_dump(mode="json", exclude_none=True),
        },
        model_state_dict=weights,
        ema_state_dict={"n_averaged": torch.tensor(1)} | {f"module.{key}": value for key, value in weights.items()},
        tasks_config=[
            _task_config(name, values, config.dataset.name, config.job.precision)
            for name, values in state["tasks"].items()
        ],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    torch.save(content, temporary)
    temporary.replace(path)


def make_exported_model(backbone: Mapping[str, Any], config: Mapping[str, Any]) -> FrameAveragedModel:
    """The model of an exported checkpoint, without its weights; called by fairchem.

    Args:
        backbone: `{model: class}`, with which fairchem finds the backbone's class; the options are in `config`.
        config: the checkpoint's configuration.

    Raises:
        ValueError: the loader wants to override options of the backbone.
    """
    if set(backbone) != {"model"}:
        raise ValueError(f"the backbone of an exported checkpoint takes no overrides, got {sorted(backbone)}")
    model = build.make_model(build_config(config))
    if not hasattr(model.backbone, "regress_config"):  # fairchem asks for it: there is nothing to differentiate
        model.backbone.regress_config = GradRegressConfig(direct_forces=True)
    return model


def _task_config(name: str, values: Mapping[str, Any], dataset: str, dtype: str) -> dict[str, Any]:
    """A task in the form that hydra instantiates; `values` as `tasks.tasks_state` makes them."""
    references = values["element_references"]
    if references is not None:
        coefficients = {"_target_": "torch.tensor", "data": references}
        references = {"_target_": "faenet_ocp.tasks.CompositionReferences", "coefficients": coefficients}
    is_energy = name == "energy"
    return {
        "_target_": f"{_TASKS}.Task",
        "name": name,
        "property": name,
        "level": "system" if is_energy else "atom",
        "out_spec": {"_target_": f"{_TASKS}.OutputSpec", "dim": [1] if is_energy else [3], "dtype": dtype},
        "normalizer": {
            "_target_": "fairchem.core.modules.normalization.normalizer.Normalizer",
            "mean": values["mean"],
            "rmsd": values["stdev"],
        },
        "datasets": [dataset],
        "element_references": references,
        "loss_fn": None,
        "metrics": [],
    }
