"""A look at some records of each split before a run begins: fixed atoms, tags and edges that cannot be meant."""

import logging
from collections.abc import Mapping

from fairchem.core.datasets.atomic_data import AtomicData
from torch.utils.data import Dataset

from faenet_ocp import build
from faenet_ocp.config.schema import Config, SourceConfig
from faenet_ocp.data.check import compare_edges, sample_of, suspicious_tags
from faenet_ocp.data.oc20 import OC20LmdbDataset

_SYSTEMS, _GRAPHS = 64, 32
_MANY = 0.1


def check_samples(config: Config, sources: Mapping[str, SourceConfig], *, mode: str) -> None:
    """Warns of tags and edges that cannot be meant, and of splits without a force to count.

    Args:
        config: of the run.
        sources: by split.
        mode: of the command line.

    Raises:
        ValueError: no force of a whole split counts, so that a run of this mode could only end in an error; or the
            stored edges of a split are not those that the configuration asks for.
    """
    for split, source in sources.items():
        dataset = build.make_label_dataset(config, source, labelled=False)
        try:
            batch = sample_of(dataset, _SYSTEMS)
        except ValueError:
            if mode == "check":
                continue  # it will be in the list
            raise
        if config.model.get("tag_hidden_channels") != 0 or _removes_subsurface(config):
            for reason in suspicious_tags(batch):
                logging.warning(
                    "dataset, split %s: %s. Tags are 0 below the surface, 1 surface, 2 adsorbate: are these others? "
                    "(%d systems looked at)",
                    *(split, reason, len(batch.natoms)),
                )
        _check_edges(config, split, dataset, mode)
        missing = _no_forces(config, batch, training=source is config.dataset.train)
        if missing is None or mode == "predict":
            continue
        message = f"dataset, split {split}: no atom of {len(batch.natoms)} systems looked at {missing}"
        if mode == "check" or len(batch.natoms) < len(dataset):  # type: ignore[arg-type]
            logging.warning(message)
        else:
            raise ValueError(message)


def _check_edges(config: Config, split: str, dataset: Dataset, mode: str) -> None:
    """Models see the graph of their limits everywhere; what is stored may end before them.

    Raises:
        ValueError: many systems have other stored edges; for a few there is a warning.
    """
    if config.dataset.edges != "stored" or not isinstance(dataset, OC20LmdbDataset):
        return
    looked_at = min(len(dataset), _GRAPHS)
    if found := compare_edges(dataset, looked_at):
        limits = (
            f"model.cutoff ({dataset.config['cutoff']}) and model.max_neighbors ({dataset.config['max_neighbors']})"
        )
        message = (
            f"dataset, split {split}: stored edges are not those within {limits} in {len(found)} of {looked_at} "
            f"systems looked at ({found[0]}); dataset.edges: recompute builds them anew"
        )
        if len(found) >= _MANY * looked_at and mode != "check":
            raise ValueError(message)
        logging.warning(message)


def _no_forces(config: Config, batch: AtomicData, *, training: bool) -> str | None:
    """Why no force of a batch counts in training or evaluation; None if some do."""
    forces = config.output("forces")
    key = "train_on_free_atoms" if training else "eval_on_free_atoms"
    if "forces" not in config.properties or not getattr(forces, key):
        return None
    free = batch.fixed == 0
    if not bool(free.any()):
        return f"is free (`fixed` is 1 for all): no forces to count; outputs.forces.{key}: false counts all atoms"
    if _removes_subsurface(config) and not bool((free & (batch.tags != 0)).any()):
        return "is free and left by remove_subsurface: all free atoms have tag 0, so no forces to count"
    return None


def _removes_subsurface(config: Config) -> bool:
    return config.dataset.transforms.get("remove_subsurface", False) is not False
