"""Configurations of OCP 1.x and of the published faenet package, recognised and said in this package's words."""

from collections.abc import Mapping
from typing import Any

import yaml

_TRAINERS = ("energy", "forces", "ocp", "single_trainer")
_OPTIM = ("lr_milestones", "lr_gamma", "energy_coefficient", "force_coefficient", "loss_energy", "loss_force")
_SAME_OPTIM = (
    "batch_size eval_batch_size num_workers max_epochs lr_initial warmup_steps warmup_factor optimizer weight_decay"
)
_SAME_OPTIM += " ema_decay clip_grad_norm eval_every checkpoint_every optimizer_params"
_NO_OPTIONS = ("use_pbc", "use_pbc_single", "regress_forces", "otf_graph", "direct_forces", "max_num_neighbors")


def is_ocp1(raw: Mapping[str, Any]) -> bool:
    """Whether a configuration is written in OCP 1.x's words."""
    dataset, optim = raw.get("dataset"), raw.get("optim")
    train = dataset.get("train") if isinstance(dataset, Mapping) else None
    return (
        isinstance(dataset, list)
        or isinstance(raw.get("task"), Mapping)
        or raw.get("trainer") in _TRAINERS
        or (isinstance(train, Mapping) and "normalize_labels" in train)
        or (isinstance(optim, Mapping) and any(key in optim for key in _OPTIM))
    )


def in_our_words(raw: Mapping[str, Any]) -> str:
    """The same settings as YAML that this package takes; what has no place here is listed above it, as comments."""
    raw, left = dict(raw), []
    model, optim = dict(raw.get("model") or {}), dict(raw.get("optim") or {})
    splits = _splits(raw.get("dataset"))
    train = splits.get("train", {})
    with_forces = raw.get("trainer") == "forces" or "grad_target_std" in train or bool(model.get("regress_forces"))
    ours: dict[str, Any] = {"trainer": "faenet", "task": "s2ef" if with_forces else "is2re"}
    ours["dataset"] = {"root": ".", "format": "oc20_lmdb", "train": {"src": train.get("src", "FILE OR FOLDER")}}
    ours["dataset"]["val"] = {name: {"src": part.get("src")} for name, part in splits.items() if name != "train"}
    known = {key: value for key, value in model.items() if key not in _NO_OPTIONS}
    if "max_num_neighbors" in model:
        known["max_neighbors"] = model["max_num_neighbors"]
    ours["model"] = known
    left += [f"model.{key}: {model[key]!r}" for key in _NO_OPTIONS[:-1] if key in model]
    ours["outputs"] = _outputs(train, raw.get("task"), with_forces=with_forces)
    if losses := _losses(optim, with_forces=with_forces):
        ours["loss_functions"] = losses
    ours["optim"], others = _optim(optim)
    left += others
    if raw.get("logger"):
        ours["logger"] = raw["logger"] if raw["logger"] in ("wandb", "tensorboard") else "none"
    seen = ("trainer", "dataset", "model", "optim", "task", "logger")
    left += [f"{key}: {value!r}" for key, value in raw.items() if key not in seen]
    comments = ["# batch sizes: OCP's count one GPU, these all GPUs together"] + [
        f"# no place here: {one}" for one in left
    ]
    return "\n".join(comments) + "\n" + yaml.safe_dump(ours, sort_keys=False)


def _splits(dataset: Any) -> dict[str, dict[str, Any]]:
    """By name; OCP's list is train, val, test, and its val splits are named by their folders."""
    if isinstance(dataset, Mapping):
        return {str(name): dict(part) for name, part in dataset.items() if isinstance(part, Mapping) and "src" in part}
    parts = [dict(part) for part in dataset or [] if isinstance(part, Mapping)]
    names = ["train", *(_name(str(part.get("src", ""))) for part in parts[1:])]
    return dict(zip(names, parts, strict=False))


def _name(src: str) -> str:
    return next((part for part in reversed(src.split("/")) if part.startswith(("val", "test"))), "val")


def _outputs(train: Mapping[str, Any], task: Any, *, with_forces: bool) -> dict[str, Any]:
    energy, forces = {}, {}
    if train.get("normalize_labels"):
        energy = {"normalizer": {"mean": train.get("target_mean", 0.0), "stdev": train.get("target_std", 1.0)}}
        forces = {"normalizer": {"mean": 0.0, "stdev": train.get("grad_target_std", 1.0)}}
    for key in ("train_on_free_atoms", "eval_on_free_atoms"):
        if isinstance(task, Mapping) and key in task:
            forces[key] = task[key]
    return {"energy": energy} | ({"forces": forces} if with_forces else {})


def _losses(optim: Mapping[str, Any], *, with_forces: bool) -> list[dict[str, Any]]:
    if not any(key in optim for key in _OPTIM[2:]):
        return []
    losses = [{"energy": {"fn": optim.get("loss_energy", "mae"), "coefficient": optim.get("energy_coefficient", 1)}}]
    if with_forces:
        names = {"l2mae": "l2mae", "atomwisel2": "l2mae", "mse": "mse"}
        fn = names.get(str(optim.get("loss_force", "mae")), "mae")
        losses.append({"forces": {"fn": fn, "coefficient": optim.get("force_coefficient", 30)}})
    return losses


def _optim(optim: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    ours = {key: optim[key] for key in _SAME_OPTIM.split() if key in optim}
    if "lr_milestones" in optim:
        ours["scheduler"] = "multistep"
        ours["multistep"] = {"milestones": optim["lr_milestones"], "gamma": optim.get("lr_gamma", 0.1)}
    elif optim.get("scheduler") == "ReduceLROnPlateau":
        ours["scheduler"] = "reduce_on_plateau"
        ours["plateau"] = {key: optim[key] for key in ("factor", "patience", "min_lr") if key in optim}
    gone = {*ours, *_OPTIM, "scheduler", "factor", "patience", "min_lr", "mode"}
    return ours, [f"optim.{key}: {value!r}" for key, value in optim.items() if key not in gone]
