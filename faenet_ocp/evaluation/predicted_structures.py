"""The structures of a split with what was predicted of them, as extended XYZ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from torch.utils.data import Dataset
from tqdm import tqdm

from faenet_ocp.common.files import publish, temporary_path
from faenet_ocp.data.atoms import data_to_atoms
from faenet_ocp.tasks.tasks import TargetTask


def write_extxyz(dataset: Dataset, tasks: Sequence[TargetTask], predictions: Path) -> Path:
    """Writes `<split>.extxyz` beside the `<split>.npz` of predictions, in the same order.

    Energies and forces are results of a calculator, other scalars are in `info`. Forces of fixed atoms, which are not
    predicted, are zero.

    Args:
        dataset: the split.
        tasks: what was predicted.
        predictions: file of `prediction.predict_split`.

    Raises:
        ValueError: the data set has no plain samples (it is not one of this package).
    """
    if not hasattr(dataset, "plain"):
        raise ValueError("job.output_format: extxyz: the data set does not give its structures")
    plain, path = dataset.plain("none"), predictions.with_suffix(".extxyz")
    with np.load(predictions) as content:
        arrays = {name: content[name] for name in content.files}
    vectors = [task.name for task in tasks if task.level == "atom"]
    per_system = {name: np.split(arrays[name], arrays["chunk_idx"]) for name in vectors}
    partial = temporary_path(path)
    with partial.open("w", encoding="utf-8") as file:
        for index in tqdm(range(len(plain)), desc=path.name, unit="structure", delay=2.0, leave=False):
            atoms = data_to_atoms(plain[index])
            values: dict[str, Any] = {
                task.name: float(arrays[task.name][index]) for task in tasks if task.level != "atom"
            }
            for name in vectors:
                values[name] = np.zeros((len(atoms), 3))
                values[name][plain[index].fixed.numpy() == 0] = per_system[name][index]
            results = {name: value for name, value in values.items() if name in ("energy", "forces")}
            atoms.info |= {name: value for name, value in values.items() if name not in results}
            atoms.calc = SinglePointCalculator(atoms, **results)
            ase.io.write(file, atoms, format="extxyz")
    publish(partial, path)
    return path
