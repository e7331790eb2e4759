"""Configuration to objects, by way of fairchem's registry: data sets and models.

Every name may be a registered short name or a dotted import path. Arguments are checked against the constructor of what
they are for, so that a misspelt option is an error before any work starts.
"""

import glob
import inspect
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairchem.core.common.registry import registry
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from faenet_ocp.common.checks import nearest, parameters, switched_off, whole_number
from faenet_ocp.config.schema import Config, SourceConfig
from faenet_ocp.data import ase_files, packed  # noqa: F401  # register the data sets
from faenet_ocp.data.held_out import hold_out
from faenet_ocp.models import fairchem as faenet_models  # noqa: F401  # registers FAENet and its heads
from faenet_ocp.models.frame_averaging import FrameAveragedModel

logger = logging.getLogger(__name__)

_GRAPH = {"cutoff": 6.0, "max_neighbors": 40}


def make_dataset(
    config: Config,
    source: SourceConfig,
    *,
    training: bool = False,
    labelled: bool = True,
    cache_dir: Path | None = None,
) -> Dataset:
    """The data set of one split, with the configured transforms and the frames of training or evaluation.

    Raises:
        ValueError: unknown format, missing path, wrong transform; names the key.
    """
    transforms = config.dataset.active_transforms
    return _open(config, source, transforms | _frame_transform(config, training=training), labelled, cache_dir)


def make_label_dataset(config: Config, source: SourceConfig, *, labelled: bool = True) -> Dataset:
    """A split without transforms and edges: for statistics of labels and compositions."""
    return _open(config, source, {}, labelled, None, edges="none")


def _open(
    config: Config,
    source: SourceConfig,
    transforms: Mapping[str, Any],
    labelled: bool,
    cache_dir: Path | None,
    edges: str | None = None,
) -> Dataset:
    shares = {name: split.from_train for name, split in config.dataset.val.items() if split.from_train is not None}
    if shares and (source.src is None or source is config.dataset.train):
        part = next((place for place, name in enumerate(shares) if config.dataset.val[name] is source), len(shares))
        folder = Path(config.job.run_dir) / ".cache"  # of all: the first that opens it reads which belong together
        whole = _open_files(config, config.dataset.train, transforms, labelled, folder, edges)
        chosen = _held_out(config, whole, shares)[part]
        if part < len(shares):
            name = list(shares)[part]
            _tell_of_share(name, shares[name], len(chosen), len(whole))
        return whole.select(chosen)
    return _open_files(config, source, transforms, labelled, cache_dir, edges)


@cache
def _tell_of_share(name: str, share: float, held_out: int, total: int) -> None:
    """Whole systems, of different sizes or few, can be far from the share that is asked for."""
    if not share / 2 <= held_out / total <= 2 * share:
        logger.warning(
            "dataset.val.%s.from_train: %g of the systems are %d of %d samples (%.2g of them): systems are few, or of"
            " different sizes",
            *(name, share, held_out, total, held_out / total),
        )


def _held_out(config: Config, dataset: Any, shares: Mapping[str, float]) -> list[NDArray[np.int64]]:
    """The samples of each split that is a share of the training set, and those that are left."""
    if not (hasattr(dataset, "groups") and hasattr(dataset, "select")):
        raise ValueError(f"dataset.val: from_train: {config.dataset.format} does not say which samples belong together")
    try:
        return hold_out(dataset.groups(), list(shares.values()), config.job.seed)
    except ValueError as error:
        raise ValueError(f"dataset.val.{'/'.join(shares)}.{error}") from error


def _open_files(
    config: Config,
    source: SourceConfig | None,
    transforms: Mapping[str, Any],
    labelled: bool,
    cache_dir: Path | None,
    edges: str | None,
) -> Any:
    given = [] if source is None or source.src is None else source.src
    settings = {
        "src": [_below(config.dataset.root, path) for path in ([given] if isinstance(given, str) else given)],
        "key_mapping": config.dataset.key_mapping or None,
        "transforms": transforms,
        "edges": edges or edges_of(config),
        "labels": list(config.properties) if labelled else [],
        "dataset_name": config.dataset.name,
        "seed": config.job.seed,
        "dtype": config.job.precision,
        "cache_dir": None if cache_dir is None else str(cache_dir),
        **{name: config.model.get(name, default) for name, default in _GRAPH.items()},
    }
    cls = _registered("dataset.format", config.dataset.format, registry.get_dataset_class, "dataset_name_mapping")
    if cls.__module__.startswith("fairchem."):
        raise ValueError(
            f"dataset.format: {config.dataset.format!r} is a data set of fairchem's own, whose samples this trainer "
            "cannot use; `ase` reads all files that ASE reads, and .aselmdb"
        )
    settings |= _tags(config, cls)
    try:
        dataset = cls(settings)
        return dataset if source is None or source.index is None else _chosen(dataset, config, source.index)
    except FileNotFoundError as error:
        if Path(config.dataset.root).is_absolute():
            raise
        where = f"dataset.root: {config.dataset.root!r} is a folder below the working folder, {Path.cwd()}"
        raise FileNotFoundError(f"{error}; {where}") from error


def _chosen(dataset: Any, config: Config, index: str) -> Any:
    """The samples of a data set that an index file lists."""
    path = Path(_below(config.dataset.root, index))
    if not path.is_file():
        raise ValueError(f"{path}: there is no such index file")
    try:
        numbers = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: is no file of NumPy's ({error})") from error
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not len(numbers):
        raise ValueError(f"{path}: expected the numbers of samples, got an array of {numbers.dtype}, {numbers.shape}")
    if numbers.min() < 0 or numbers.max() >= len(dataset) or len(np.unique(numbers)) < len(numbers):
        raise ValueError(f"{path}: lists samples {numbers.min()} to {numbers.max()} of {len(dataset)}, or some twice")
    return dataset.select(numbers.astype(np.int64))


def _tags(config: Config, cls: type) -> dict[str, str | None]:
    """How a data set that can choose takes tags: as configured, else the file's if the model needs any."""
    choice, needed, adsorbate = config.dataset.tags, needs_tags(config), config.dataset.adsorbate
    if "tags" not in getattr(cls, "_keys", ()):
        if adsorbate is not None:
            raise ValueError(f"dataset.adsorbate: is for format ase; {config.dataset.format} has OC20's tags")
        if choice not in (None, "file"):
            raise ValueError(f"dataset.tags: {choice!r} is for format ase; {config.dataset.format} has OC20's tags")
        return {}
    if choice == "none" and needed:
        raise ValueError(f"dataset.tags: none, but {needed}; that needs tags: file or fixed")
    if adsorbate is not None and not needed and choice is None:
        raise ValueError("dataset.adsorbate: has no effect, as the model needs no tags")
    return {"tags": choice or ("file" if needed else "none"), "adsorbate": adsorbate}


def edges_of(config: Config) -> str:
    """What samples get for edges: what `dataset.edges` says, and none where the model says that it uses none.

    Raises:
        ValueError: the model uses edges, and the configuration says none.
    """
    needs = getattr(registry.get_model_class(config.model["name"]), "needs", None)  # of others it is not known
    if needs is not None and "edges" not in needs:
        return "none"
    if needs is not None and config.dataset.edges == "none":
        raise ValueError(f"dataset.edges: none, but {config.model['name']} needs edges: stored, or recompute")
    return config.dataset.edges


def needs_tags(config: Config) -> str:
    """What of a configuration needs OC20's tags, in words; empty if nothing does."""
    if config.dataset.transforms.get("remove_subsurface", False) is not False:
        return "dataset.transforms has remove_subsurface"
    options = inspect.signature(registry.get_model_class(config.model["name"])).parameters
    embeds = options.get("tag_hidden_channels")
    channels = config.model.get("tag_hidden_channels", None if embeds is None else embeds.default)
    return f"the model embeds tags (tag_hidden_channels: {channels})" if embeds is not None and channels else ""


def _below(root: str, path: str) -> str:
    """A path below the root; in a pattern, only the path's own brackets and stars mean more than themselves."""
    is_pattern = glob.has_magic(path) and not (Path(root) / path).exists()
    return str(Path(glob.escape(root) if is_pattern else root) / path)


def fingerprint(config: Config, source: SourceConfig) -> dict[str, Any]:
    """What tells the data of a split from others: `OC20LmdbDataset.fingerprint`; of other data sets, size and names."""
    dataset = make_label_dataset(config, source)
    if hasattr(dataset, "fingerprint"):
        return dataset.fingerprint()
    names = f"{source.src} {config.dataset.root} {config.dataset.format} {config.dataset.key_mapping}"
    return {"num_systems": len(dataset), "content": names, "files": names}  # type: ignore[arg-type]


def _frame_transform(config: Config, *, training: bool) -> dict[str, dict[str, Any]]:
    frames = config.frames
    method = frames.method if training else frames.evaluation_method
    if method == "none":
        return {}
    if method == "data_augmentation":
        return {"data_augmentation": {"dim": frames.dim, "reflect": frames.group == "E"}}
    return {"frame_averaging": frame_settings(config, method)}


def frame_settings(config: Config, method: str) -> dict[str, Any]:
    """Arguments of `frames.compute_frames`."""
    frames = config.frames
    return {"method": method, "dim": frames.dim, "group": frames.group, "tolerance": frames.tolerance}


def make_model(config: Config, *, device: torch.device | str = "cpu") -> FrameAveragedModel:
    """The configured model with seeded initial weights, on the CPU.

    Args:
        config: validated configuration.
        device: where it will run: for a CPU it is accelerated (see `kernels`), others take it as it is.

    `model:` holds the options of the backbone and of its default heads; other heads are named in `model.heads` as
    fairchem does.

    Raises:
        ValueError: unknown model, option or value; names the key.
    """
    torch.manual_seed(config.job.seed)
    name = config.model["name"]
    cls = _registered("model.name", name, registry.get_model_class, "model_name_mapping")
    options = {key: value for key, value in config.model.items() if key not in ("name", "heads")}
    graph = {key: options.get(key, default) for key, default in _GRAPH.items()}
    if (
        not switched_off(envelope := options.get("envelope"))
        and envelope != "none"
        and graph["max_neighbors"] is not None
    ):
        raise ValueError(
            f"model.max_neighbors: {graph['max_neighbors']} cuts graphs by number, which model.envelope: "
            f"{envelope} is to make smooth; write max_neighbors: null"
        )
    if graph["max_neighbors"] is not None:
        whole_number("model.max_neighbors", graph["max_neighbors"], minimum=1)
    heads, head_options = config.model.get("heads"), set[str]()
    if heads is None:
        heads, head_options = _default_heads(name, cls, config, options)
        if "gradient" in config.losses and "forces" not in heads:
            raise ValueError(f"loss_functions.gradient: the forces of {name} are -dE/dX already")
    allowed = parameters(cls)
    backbone = {key: value for key, value in options.items() if allowed is None or key in allowed}
    known = {*(options if allowed is None else allowed), *_GRAPH, *head_options}
    for key in options:
        if key not in known:
            raise ValueError(f"model.{key}: unknown key{nearest(key, sorted({*known, 'name', 'heads'}))}")
    if edges_of(config) == "none":
        graph["cutoff"] = None
    try:
        model = FrameAveragedModel(
            backbone={"model": name, **backbone},
            heads=heads,
            frames=frame_settings(config, config.frames.evaluation_method),
            **graph,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {error}") from error
    if torch.device(device).type == "cpu":
        from faenet_ocp.kernels import accelerate

        accelerate(model)
    return model.double() if config.job.precision == "float64" else model


def _default_heads(
    name: str, cls: type, config: Config, options: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """A backbone's heads for the configured targets with those of the options that they know; all that they know."""
    if not hasattr(cls, "default_heads"):
        raise ValueError(f"model.heads: missing; {name} has no default heads, name one for each of {config.properties}")
    heads: dict[str, dict[str, Any]] = cls.default_heads(config.targets)
    known: set[str] = set()
    for head in heads.values():
        own = (parameters(registry.get_model_class(head["module"])) or set()) - {"backbone", *head}
        head.update({key: options[key] for key in own & set(options)})
        known |= own
    return heads, known


def _registered(key: str, name: str, getter: Any, mapping: str) -> type:
    try:
        return getter(name)
    except (RuntimeError, KeyError, ValueError) as error:
        known = [str(known) for known in registry.mapping[mapping]]
        raise ValueError(f"{key}: {name!r} is not registered{nearest(name, known)}; or a dotted import path") from error


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters, also in those that training leaves as they are."""
    return sum(parameter.numel() for parameter in model.parameters())
