"""`--mode symmetry`: a checkpoint's predictions beside those of moved copies, and the files in `results/`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairchem.core.common import distutils

from faenet_ocp import build
from faenet_ocp.common.files import software_versions, write_json, write_text
from faenet_ocp.config.schema import Config
from faenet_ocp.evaluation.evaluator import device_words, load_model
from faenet_ocp.evaluation.plots import plot_differences
from faenet_ocp.evaluation.results import dataset_label
from faenet_ocp.evidence.symmetry import measure
from faenet_ocp.evidence.symmetry_report import document, first_scalar, render_symmetry, rotated

_AT_ONCE = 32
"""Systems, on each rank: full frames make eight of each."""


def compare_with_copies(config: Config, folder: Path, state: Mapping[str, Any], checkpoint: str) -> None:
    """Writes `results/symmetry.json`, `.md` and `.png` of a run's folder.

    Args:
        config: of the comparison, `evaluation_metrics.symmetry` in it.
        folder: of the run.
        state: content of a checkpoint.
        checkpoint: its file, named in the results.
    """
    optim, given, frames = config.optim, config.evaluation_metrics.symmetry, config.frames
    split, dim = given.split or config.evaluation_metrics.primary_metric.split, given.dim or frames.dim
    model, tasks = load_model(state, config, distutils.get_device_for_local_rank())
    found = measure(
        model,
        tasks,
        build.make_dataset(config, config.dataset.val[split], cache_dir=folder / "cache"),
        transforms=config.dataset.active_transforms,
        dim=dim,
        max_systems=given.max_systems,
        batch_size=max(1, min(optim.eval_batch_size or optim.batch_size, _AT_ONCE)),
        seed=config.job.seed,
        amp=config.job.amp,
        conservative=config.output("forces").eval_from == "energy_gradient",
    )
    if found is None:
        return
    facts = {
        "task": config.task,
        "dataset": dataset_label(config.dataset.name, config.task, {split: found.num_systems})[0],
        "split": split,
        "dim": dim,
        "seed": config.job.seed,
        "precision": config.job.precision,
        "model": str(config.model["name"]),
        "checkpoint": checkpoint,
        "step": state["progress"]["num_steps_completed"],
        "trained_with": f"{frames.method}, dim {frames.dim}, group {frames.group}",
        "frames": build.frame_settings(config, frames.evaluation_method),
        "device": device_words(),
        "versions": software_versions(),
    }
    results = document(found, config.targets, facts)
    write_json(folder / "results" / "symmetry.json", results)
    write_text(folder / "results" / "symmetry.md", render_symmetry(results))
    target = first_scalar(config.targets)
    shown = {f"frames: {method}": values for method, values in rotated(found.differences, target.name).items()}
    title = f"{facts['dataset']}, {split}, rotated at random"
    plot_differences(shown, folder / "results" / "symmetry.png", title=title, target=target)
