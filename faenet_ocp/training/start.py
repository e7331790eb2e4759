"""What a run begins with: the data that it remembers, what it may go on with, targets after fine-tuning."""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor, nn

from faenet_ocp import build
from faenet_ocp.checkpoint import load_newest
from faenet_ocp.config.changes import OTHERWISE, changes, check_changes
from faenet_ocp.config.messages import without_removed
from faenet_ocp.config.schema import Config, SourceConfig, build_config
from faenet_ocp.data.check import sample_of
from faenet_ocp.tasks.losses import normalised_label, task_loss
from faenet_ocp.tasks.references import CompositionFit, fits_from_dict
from faenet_ocp.tasks.tasks import (
    TargetTask,
    load_tasks_state,
    training_outputs,
)
from faenet_ocp.training.optim import total_steps

_SYSTEMS = 256


def fingerprints(config: Config) -> dict[str, dict[str, Any]]:
    """What tells the training and validation data from others, by key of the configuration."""
    sources = {"dataset.train": config.dataset.train}
    sources |= {f"dataset.val.{split}": source for split, source in config.dataset.val.items()}
    return {key: build.fingerprint(config, source) for key, source in sources.items() if source is not None}


def check_resumption(config: Config, folder: Path, checkpoint: str | None) -> list[str]:
    """Checks that a run can go on with a configuration, where its folder holds checkpoints.

    Returns:
        what changes, one line each.

    Raises:
        ValueError: keys or data that may not change have changed (see `config.changes`), or the run has done more steps
            than it is to have.
    """
    found = load_newest(folder / "checkpoints")
    if found is None:
        return [] if checkpoint is None else [f"beginning with the weights of {checkpoint}"]
    path, state = found
    if checkpoint is not None:
        logging.warning("--checkpoint %s is not used: the run goes on from its own, %s", checkpoint, path)
    step = state["progress"]["num_steps_completed"]
    differing = changes(_with_defaults(state["config"]), config.model_dump(mode="json"))
    check_changes(differing)
    data = fingerprints(config)
    for key, before in state.get("data", {}).items():
        for what, name in (("num_systems", "systems"), ("content", "content")):
            if data[key][what] != before[what]:
                raise ValueError(
                    f"{key}: these are not the data that the run began with ({name}: {before[what]}, now "
                    f"{data[key][what]}); {OTHERWISE}"
                )
    total = total_steps(config.optim, -(-data["dataset.train"]["num_systems"] // config.optim.batch_size))
    if step > total:
        raise ValueError(f"optim.max_epochs, optim.max_steps: {total} steps, but the run has done {step}; {OTHERWISE}")
    lines = [f"from step {step} on: {key}: {new!r}, before {old!r}" for key, (old, new) in differing.items()]
    for line in lines:
        logging.info("%s", line)
    return lines


def _with_defaults(before: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in a checkpoint as this version would write it: keys may have been added since."""
    known = without_removed(before)
    try:
        return build_config(known).model_dump(mode="json")
    except ValueError:
        return known


def check_held_out(config: Config, state: Mapping[str, Any]) -> None:
    """Checks that what is held out from the training set was not trained on by a checkpoint's run, as far as it says.

    Raises:
        ValueError: that run held out others of its training set, or trained on the same files.
    """
    shares = {f"dataset.val.{split}": found for split, found in config.dataset.val.items() if found.from_train}
    if not shares or config.dataset.train is None:
        return
    known, before = state.get("data", {}), state["config"]["dataset"].get("val", {}).values()
    held_out = any((split or {}).get("from_train") for split in before)
    files = build.fingerprint(config, config.dataset.train)["files"]
    if not held_out and known.get("dataset.train", {}).get("files") != files:
        return
    for key, source in shares.items():
        found = build.fingerprint(config, source)
        if any(known.get(key, {}).get(what) != found[what] for what in ("num_systems", "content")):
            raise ValueError(
                f"{key}.from_train: these are not the systems that the checkpoint's run held out, and it may have been "
                "trained on them; give its from_train and --seed, or other data as src"
            )


def check_statistics(fits: Mapping[str, CompositionFit], state: Mapping[str, Any]) -> None:
    """Labels of all systems are those that the run began with, whatever has happened to the files.

    Raises:
        ValueError: their mean has changed.
    """
    for name, before in fits_from_dict(state["statistics"]).items():
        mean = fits[name].mean if name in fits else before.mean
        if not math.isclose(mean, before.mean, rel_tol=1e-9, abs_tol=1e-9 * before.stdev):
            raise ValueError(
                f"dataset.train: other labels than those that the run began with (mean {name}: {before.mean:.9g}, now "
                f"{mean:.9g}); {OTHERWISE}"
            )


def freeze_unused(model: nn.Module, tasks: Sequence[TargetTask], batch: AtomicData) -> None:
    """Parameters on which no loss depends are no longer to be trained: several ranks would wait for their gradients.

    Networks of others have such, and those whose last layers serve a head that is not there.
    """
    was_training = model.training
    model.eval()
    outputs = training_outputs(model, tasks, batch)
    loss = torch.stack([task_loss(task, outputs, batch) for task in tasks if task.loss_fn is not None]).sum()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    unused = [name for name, gradient in zip(named, found, strict=True) if gradient is None]
    for name in unused:
        named[name].requires_grad_(False)
    if unused:
        logging.info("%d parameters have no part in what is predicted and are not trained: %s", len(unused), unused)
    model.train(was_training)


def announce_shifts(
    config: Config, source: SourceConfig, tasks: Sequence[TargetTask], state: Mapping[str, Any]
) -> None:
    """Warns of targets that are much different, in this run's units, from what a checkpoint's weights were trained on.

    Args:
        config, source: of the training set, of which 256 systems are looked at.
        tasks: of this run.
        state: the checkpoint's `tasks`.
    """
    dataset = build.make_label_dataset(config, source)
    batch = sample_of(dataset, _SYSTEMS)
    for task in tasks:
        if task.name not in state:
            continue
        load_tasks_state([before := copy.copy(task)], state)
        (mean, stdev), (old_mean, old_stdev) = (_spread(normalised_label(units, batch)) for units in (task, before))
        if abs(old_mean - mean) > 0.5 * stdev or not 2 / 3 < old_stdev / max(stdev, 1e-12) < 3 / 2:
            logging.warning(
                "outputs.%s: normalised, as this configuration says, targets are %.4g +- %.4g (mean and standard "
                "deviation of %d systems); in the units that the checkpoint's weights were trained for, they would be "
                "%.4g +- %.4g. The weights are kept; the first steps have to make up for it",
                *(task.name, mean, stdev, len(batch.natoms), old_mean, old_stdev),
            )


def _spread(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std(unbiased=False))
