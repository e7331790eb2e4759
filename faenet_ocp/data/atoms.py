"""Structures of ASE as records, and as samples as in a data set."""

import logging
from functools import cache
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian, FixScaled
from fairchem.core.datasets.atomic_data import AtomicData
from numpy.typing import NDArray

from faenet_ocp.common.checks import RecordError
from faenet_ocp.data.batch import make_batch
from faenet_ocp.data.fields import NOT_LABELS, Reading
from faenet_ocp.data.tags import Adsorbate, adsorbate_of, assign_tags
from faenet_ocp.graph.lists import NO_LIMIT

logger = logging.getLogger(__name__)


def atoms_to_data(
    atoms: Atoms,
    *,
    cutoff: float | None,
    max_neighbors: int | None,
    tags: str = "file",
    adsorbate: Adsorbate = None,
    dtype: torch.dtype = torch.float32,
    dataset: str = "oc20",
) -> AtomicData:
    """Atoms to a sample with the fields of ``oc20.OC20LmdbDataset``, before transforms.

    Args:
        atoms: any structure; positions are taken as they are. `fixed` are those of `fixed_atoms`.
        cutoff, max_neighbors: see ``graph.build_graph``. Without a cutoff there are no edges.
        tags, adsorbate: see ``tags.assign_tags``, ``tags.adsorbate_of``. Without tags they are 0.
        dtype: of positions; the graph is that of the positions in this precision.
        dataset: name of the data set.

    Returns:
        the sample; `atom_id` (n,) numbers its atoms.

    Raises:
        ValueError: the structure is none that a record could hold, or has no tags as they are asked for.
    """
    record = geometry_of(atoms)
    record |= tags_of(record, tags, adsorbate=adsorbate_of(atoms, adsorbate, record["fixed"]))
    limit = NO_LIMIT if max_neighbors is None else max_neighbors
    reading = Reading({}, "none" if cutoff is None else "recompute", dtype, cutoff or 0.0, limit)
    data = make_batch([record], [str(atoms.info.get("sid", ""))], reading)
    data.dataset = dataset
    data.atom_id = torch.arange(len(atoms))
    return data


def geometry_of(atoms: Atoms) -> dict[str, Any]:
    """What the structure is, as the fields of a record; `tags` only if it has any."""
    record = {
        "pos": atoms.positions,
        "cell": atoms.cell.array,
        "pbc": atoms.pbc,
        "atomic_numbers": atoms.numbers,
        "fixed": fixed_atoms(atoms),
    }
    given = {name: value for name in ("charge", "spin") if (value := _number(atoms.info.get(name))) is not None}
    return record | given | ({"tags": atoms.get_tags()} if atoms.has("tags") else {})


def tags_of(record: dict[str, Any], how: str, *, adsorbate: NDArray[np.int64] | None = None) -> dict[str, Any]:
    """The field `tags` of a record as ``tags.assign_tags`` makes it; zeros for "none"."""
    tags = assign_tags(record.get("tags"), record["fixed"].astype(bool), how, adsorbate=adsorbate)
    return {"tags": np.zeros(len(record["pos"]), dtype=np.int64) if tags is None else tags}


def record_of(atoms: Atoms) -> dict[str, Any]:
    """The structure and all numbers that come with it, as the fields of a record.

    These are the results of its calculator, `atoms.info` and `atoms.arrays`; of one name, the first counts. From info
    come also `sid` and `fid`.

    Raises:
        RecordError: one name has different values there.
    """
    record = geometry_of(atoms)
    results = {} if atoms.calc is None else atoms.calc.results
    for source in (results, atoms.info, atoms.arrays):
        for name, value in source.items():
            number = _number(value)
            if (
                number is None
                or name in ("numbers", "positions", "tags")
                or (name in NOT_LABELS and name not in ("sid", "fid"))
            ):
                if name == "sid" and isinstance(value, str):
                    record[name] = value
                continue
            if name in record and not np.array_equal(record[name], number, equal_nan=True):
                raise RecordError(f"has two different values for {name!r}, from its calculator and beside it")
            record[name] = number
    return record


def data_to_atoms(data: AtomicData) -> Atoms:
    """A sample as a structure, its fixed atoms in a FixAtoms constraint, its sid in `info`."""
    atoms = Atoms(
        numbers=data.atomic_numbers.numpy(),
        positions=data.pos.double().numpy(),
        cell=data.cell[0].double().numpy(),
        pbc=data.pbc[0].numpy(),
        tags=data.tags.numpy(),
        info={"sid": data.sid[0]},
    )
    if bool(data.fixed.any()):
        atoms.set_constraint(FixAtoms(mask=data.fixed.bool().numpy()))
    return atoms


def _number(value: Any) -> Any:
    """A number, or an array of numbers; None if it is neither."""
    array = np.asarray(value) if isinstance(value, int | float | np.ndarray | np.generic | list | tuple) else None
    if array is None or array.dtype.kind not in "iuf":
        return None
    return array if array.ndim else array.item()


def fixed_atoms(atoms: Atoms) -> NDArray[np.bool_]:
    """Which atoms FixAtoms, FixCartesian and FixScaled, alone or together, hold in all directions, (n,) bool.

    Atoms that other constraints act on are free; a warning names these once.
    """
    fixed = np.zeros((len(atoms), 3), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            fixed[constraint.index] = True
        elif isinstance(constraint, FixCartesian) or (isinstance(constraint, FixScaled) and constraint.mask.all()):
            fixed[constraint.index] |= constraint.mask
        else:
            _warn_of(type(constraint).__name__)
    if (fixed.any(axis=1) & ~fixed.all(axis=1)).any():
        _warn_of("FixCartesian or FixScaled of some directions")
    return np.all(fixed, axis=1)


@cache
def _warn_of(constraint: str) -> None:
    logger.warning(
        "atoms under the constraint %s count as free: only FixAtoms and its like make fixed ones", constraint
    )
