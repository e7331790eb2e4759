"""Relaxing many structures into a folder: results that survive a crash, metrics.

`energy` metrics are IS2RE by relaxation, `positions` IS2RS: average distance within threshold (ADwT), as in OCP.

Energies in eV, forces in eV/Angstrom, positions in Angstrom; n atoms of one structure.
"""

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian
from ase.geometry import find_mic
from numpy.typing import NDArray
from tqdm import tqdm

from faenet_ocp.common.files import exclusive, publish, remove_leftovers, temporary_path, write_json
from faenet_ocp.data.atoms import fixed_atoms
from faenet_ocp.evaluation.metrics import energy_metrics
from faenet_ocp.inference.relaxation import Evaluate, Relaxed, relax

logger = logging.getLogger(__name__)

RESULTS = "relaxed.extxyz"
SETTINGS = "settings.json"
METRICS = "metrics.json"
LOCK = ".lock"
INPUT = "input_sha256"
DISTANCE_THRESHOLDS = np.arange(0.01, 0.5, 0.001)
"""Of ADwT, as in OCP's evaluator, Angstrom."""
_INDEX = re.compile(r"(?:^| )input_index=(\d+)(?: |$)")


# --------------------------------------------------------------------------------------------- a whole job
def run(
    structures: Sequence[Atoms],
    evaluate: Evaluate,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    batch_size: int = 32,
    keep_trajectories: bool = False,
    strict: bool = False,
) -> dict[str, Any]:
    """Relaxes all structures into a folder, going on where an earlier run of the same settings and input stopped.

    The folder gets `relaxed.extxyz` (a frame for each structure, synced to disk one by one as they finish, at the end
    in the order of the input), `metrics.json` when all are finished, `settings.json`, and `trajectories/` if asked for.
    A frame's `info` has `input_index`, `sid` (text), `status`, `steps`, `fmax`, `initial_energy`, the `reason` of one
    that failed, and `constraints` (as ASE's `dict2constraint` takes them) other than FixAtoms and FixCartesian.

    Args:
        structures: see `structures.open_structures`; one that cannot be read is a ValueError when it is asked for.
        evaluate: energies and forces.
        folder: created if absent.
        settings: what the results depend on, as JSON: `fmax`, `max_steps` and `max_step` of `relax`, and anything that
            identifies the checkpoint. The content of the structures is added.
        batch_size: structures in a model call; does not change results.
        keep_trajectories: whether to write trajectories.
        strict: an unusable structure is an error; otherwise the others are relaxed.

    Returns:
        the metrics, see `relaxation_metrics`, and `left_out`: index, sid (None: unknown) and reason of each structure
        that is unusable.

    Raises:
        ValueError: the folder holds results of other settings or structures, another process is writing there, no
            structure is usable, or as in `relax`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / LOCK, folder):
        remove_leftovers(folder)
        results = folder / RESULTS
        left_out: list[dict[str, Any]] = []
        done = _finished(results)
        source = {"num_structures": len(structures), INPUT: _digest(structures)}
        _check_settings(folder / SETTINGS, {**settings, **source}, begun=bool(done))
        progress = tqdm(total=len(structures), initial=len(done), desc="relax", unit="structure", disable=None)
        with results.open("a", encoding="utf-8") as file, progress as bar:
            for relaxed in relax(
                _waiting(structures, done, None if strict else left_out),
                evaluate,
                batch_size=batch_size,
                trajectories=folder / "trajectories" if keep_trajectories else None,
                strict=strict,
                **{name: settings[name] for name in ("fmax", "max_steps", "max_step")},
            ):
                bar.update()
                if relaxed.status == "unusable":
                    left_out.append({"index": relaxed.index, "sid": _sid(relaxed), "reason": relaxed.reason})
                    continue
                file.write(_frame(relaxed))
                file.flush()
                os.fsync(file.fileno())
        left_out.sort(key=lambda one: one["index"])
        _put_in_order(results)
        if not results.stat().st_size:
            raise ValueError(f"none of the {len(structures)} structures is usable; the first: {left_out[0]['reason']}")
        metrics = relaxation_metrics(ase.io.iread(results, format="extxyz")) | {"left_out": left_out}
        write_json(folder / METRICS, metrics)
        return metrics


def _waiting(
    structures: Sequence[Atoms], done: Container[int], left_out: list[dict[str, Any]] | None
) -> Iterator[tuple[int, Atoms]]:
    """Those that are not done; one that cannot be read is put on the list, or an error where there is none."""
    for index in range(len(structures)):
        if index in done:
            continue
        try:
            atoms = structures[index]
        except ValueError as error:
            if left_out is None:
                raise
            logger.warning("structure %d is unusable: %s", index, error)
            left_out.append({"index": index, "sid": None, "reason": str(error)})
        else:
            yield index, atoms


def _digest(structures: Sequence[Atoms]) -> str:
    """SHA-256 of all that results take from the structures."""
    digest = hashlib.sha256()
    for index in range(len(structures)):
        try:
            atoms = structures[index]
        except ValueError as error:
            digest.update(repr(error).encode())
            continue
        info = [str(atoms.info.get(name)) for name in ("sid", "y_relaxed")]
        digest.update(json.dumps([info, _constraints(atoms.constraints)], default=_plain).encode())
        arrays = ("numbers", "positions", "tags", "pos_relaxed")
        for array in (atoms.cell.array, atoms.pbc, *(atoms.arrays[name] for name in arrays if atoms.has(name))):
            digest.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _check_settings(path: Path, settings: Mapping[str, Any], *, begun: bool) -> None:
    if begun and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        if other:
            words = [f"{key}: {before.get(key)!r}, now {settings.get(key)!r}" for key in other if key != INPUT]
            words += ["the content of the structures has changed"] if INPUT in other else []
            raise ValueError(
                f"{path.parent} holds relaxations with other settings ({'; '.join(words)}); choose another folder"
            )
    else:
        write_json(path, settings)


# --------------------------------------------------------------------------------------------- the file of results
def _frame(relaxed: Relaxed) -> str:
    """The text of one result in extended XYZ."""
    given = relaxed.atoms
    tags = given.get_tags() if given.has("tags") else None  # zeros would be read as OC20's
    atoms = Atoms(given.numbers, given.positions, cell=given.cell, pbc=given.pbc, tags=tags)
    own = [one for one in given.constraints if isinstance(one, FixAtoms | FixCartesian)]  # what the format knows
    atoms.set_constraint([*own, FixAtoms(mask=fixed_atoms(given))])
    atoms.info = {
        "input_index": relaxed.index,
        "sid": _text(_sid(relaxed)),
        "status": relaxed.status,
        "steps": relaxed.steps,
        "fmax": relaxed.fmax,
        "initial_energy": relaxed.initial_energy,
        "common_displacement": relaxed.common_displacement,
    }
    if relaxed.reason is not None:
        atoms.info["reason"] = _text(relaxed.reason)
    others = [one for one in given.constraints if not isinstance(one, FixAtoms | FixCartesian)]
    if others:
        atoms.info["constraints"] = _text(_constraints(others))
    if "y_relaxed" in given.info:
        atoms.info["y_relaxed"] = given.info["y_relaxed"]
    if given.has("pos_relaxed"):
        atoms.set_array("pos_relaxed", given.get_array("pos_relaxed"))
    atoms.calc = SinglePointCalculator(atoms, **given.calc.results)
    text = io.StringIO()
    ase.io.write(text, atoms, format="extxyz")
    return text.getvalue()


def _sid(relaxed: Relaxed) -> str:
    return str(relaxed.atoms.info.get("sid", relaxed.index))


def _text(value: Any) -> str:
    """What ASE's reader gives back as it is, whatever a text looks like: "", "0012", "T", with quotes or two lines."""
    return "_JSON " + json.dumps(value, default=_plain).replace("\\", "\\\\")


def _constraints(constraints: Sequence[Any]) -> list[dict[str, Any]]:
    """As dictionaries; of one that ASE cannot turn into one, the name."""
    found = []
    for one in constraints:
        try:
            found.append(one.todict())
        except (AttributeError, NotImplementedError):
            found.append({"name": type(one).__name__})
    return found


def _plain(value: Any) -> Any:
    """For JSON."""
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


def _finished(path: Path) -> dict[int, slice]:
    """The whole frames in a results file, by index: their bytes. What a crash left of a last one is cut off."""
    if not path.exists():
        return {}
    frames: dict[int, slice] = {}
    end = 0
    with path.open("rb+") as file:
        while head := file.readline():
            lines = [file.readline() for _ in range(1 + (int(head) if head.strip().isdigit() else 0))]
            match = _INDEX.search(lines[0].decode("utf-8", errors="replace"))
            if not lines[-1].endswith(b"\n") or len(lines) < 2 or match is None:
                break
            start, end = end, file.tell()
            frames[int(match[1])] = slice(start, end)
        file.truncate(end)
    return frames


def _put_in_order(path: Path) -> None:
    """Sorts the frames of a results file by index."""
    frames = _finished(path)
    if list(frames) == sorted(frames):
        return
    temporary = temporary_path(path)
    with path.open("rb") as file, temporary.open("wb") as ordered:
        for _, frame in sorted(frames.items()):
            file.seek(frame.start)
            ordered.write(file.read(frame.stop - frame.start))
    publish(temporary, path)


# --------------------------------------------------------------------------------------------- metrics
def relaxation_metrics(results: Iterable[Atoms]) -> dict[str, Any]:
    """Metrics of finished relaxations, the frames of `relaxed.extxyz`.

    Returns:
        num_structures, num_converged, num_failed, mean_steps, mean and max of the common displacement (see
        `relaxation.Relaxed`); where relaxed energies are known (IS2RE by relaxation)
        `energy` with `evaluation.energy_metrics`; where relaxed positions are known (IS2RS) `positions` with
        average_distance_within_threshold (ADwT, %), mean_distance (Angstrom) and num_systems.
    """
    status: list[str] = []
    steps: list[int] = []
    displacements: list[float] = []
    energies: list[tuple[float, float]] = []
    distances: list[float] = []
    for atoms in results:
        status.append(atoms.info["status"])
        steps.append(int(atoms.info["steps"]))
        displacements.append(float(atoms.info["common_displacement"]))
        if "y_relaxed" in atoms.info and atoms.calc is not None and "energy" in atoms.calc.results:
            energies.append((atoms.get_potential_energy(), float(atoms.info["y_relaxed"])))
        if atoms.has("pos_relaxed"):
            distances.append(mean_distance(atoms, atoms.get_array("pos_relaxed")))
    metrics: dict[str, Any] = {
        "num_structures": len(status),
        "num_converged": status.count("converged"),
        "num_failed": status.count("failed"),
        "mean_steps": float(np.mean(steps)) if steps else None,
        "mean_common_displacement": float(np.mean(displacements)) if steps else None,
        "max_common_displacement": max(displacements, default=None),
    }
    if energies:
        pred, target = np.array(energies).T
        metrics["energy"] = energy_metrics(pred, target, split="relaxed structures")
    if distances:
        metrics["positions"] = {
            "average_distance_within_threshold": average_distance_within_threshold(distances),
            "mean_distance": float(np.mean(distances)),
            "num_systems": len(distances),
        }
    return metrics


def mean_distance(atoms: Atoms, positions: NDArray[np.float64]) -> float:
    """Mean distance of the free atoms (all, if none is free) to other positions (n, 3), minimum image, Angstrom."""
    free = ~fixed_atoms(atoms)
    chosen = free if free.any() else ~free
    _, lengths = find_mic((atoms.positions - positions)[chosen], atoms.cell, atoms.pbc)
    return float(np.mean(lengths))


def average_distance_within_threshold(distances: Sequence[float]) -> float:
    """ADwT, %: share of systems whose mean distance is below a threshold, averaged over `DISTANCE_THRESHOLDS`."""
    return float(100 * np.mean(np.array(distances)[:, None] < DISTANCE_THRESHOLDS))
