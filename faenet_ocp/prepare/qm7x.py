"""QM7-X (Hoja et al. 2021) to packed files: energies and forces of 4.2 million structures, in the splits of SpookyNet.

The eight files hold `f[idmol][idconf]` with, among others, the data sets of `_DATASETS`; an idconf is
`Geom-m<molecule>-i<isomer>-c<conformer>-opt`, or ends in `-d1` to `-d100` (or the number alone) for the displaced ones.

- `val_unknown`: all structures of the molecules `UNKNOWN`, which the paper calls unknown molecules;
- `val_known` and `train`: of the others, 2.5 % and the rest. A structure's side comes from (seed, idmol, idconf) alone.

A record is: atomic_numbers (n,), pos (n, 3) float32 in Angstrom, energy (float64, eV), forces (n, 3) float32 in eV/A,
sid, the idmol, and fid, the idconf as a number: m12-i3-c4-d56 is 12003004056, and `opt` ends in 000. So structures of
one molecule have one sid. A shard holds the records of `MOLECULES_PER_TASK` molecules and gets its name when it is
whole and on disk; the folder `.prepare_qm7x` keeps the settings and what is finished.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from faenet_ocp.common.files import exclusive, expand_path, remove_leftovers, write_json
from faenet_ocp.data.lmdb_files import natural_order
from faenet_ocp.data.packed import encode_packed
from faenet_ocp.prepare.lmdb_writer import write_arrays, write_metadata
from faenet_ocp.prepare.pack import PackedShardWriter
from faenet_ocp.prepare.shards import write_shards

FILES = tuple(f"{number}.hdf5" for number in range(1000, 9000, 1000))
UNKNOWN = frozenset(
    "1771 1805 1824 2020 2085 2117 3019 3108 3190 3217 3257 3329 3531 4010 4181 4319 4713 5174 5370 5580 5891 6315 6583"
    " 6809 7020".split()
)
SPLITS = ("train", "val_known", "val_unknown")
SHARE_KNOWN = 0.025
"""Of the structures of all other molecules, for validation."""
ELEMENTS = (1, 6, 7, 8, 16, 17)
MOLECULES_PER_TASK = 100
STATE_FOLDER = ".prepare_qm7x"
_DATASETS = {"atNUM": "(n,)", "atXYZ": "(n, 3)", "ePBE0+MBD": "(1,)", "totFOR": "(n, 3)"}
_IDCONF = re.compile(r"(Geom-m(\d+)-i(\d{1,3})-c(\d{1,3}))-(opt|d?\d{1,3})")


class _Task(NamedTuple):
    """Some molecules of one file: a shard in each split that has any of their structures."""

    source: Path
    molecules: list[str]
    number: int
    out_path: Path
    seed: int
    left_out: frozenset[str]  # geometries: idconf without its end

    @property
    def sizes(self) -> Path:
        """What is written last: natoms of the records of each split, and what they were made from."""
        return self.out_path / STATE_FOLDER / f"{self.number:04d}.npz"

    def shard(self, split: str) -> Path:
        return self.out_path / split / f"data.{self.number:04d}.lmdb"

    def made_from(self) -> dict[str, Any]:
        stat = self.source.stat()
        return {"name": self.source.name, "state": [stat.st_size, stat.st_mtime_ns], "molecules": self.molecules}


def prepare(
    data_path: str | Path, out_path: str | Path, *, duplicates: Path | None = None, seed: int = 0, num_workers: int = 1
) -> dict[str, int]:
    """Prepare QM7-X, or finish what an earlier call with the same settings began.

    What is wrong in one place costs that shard only; all others are finished before the error is raised.

    Args:
        data_path: folder of the eight HDF5 files.
        out_path: folder of `train`, `val_known` and `val_unknown`, each with shards and `metadata.npz`.
        duplicates: `DupMols.dat` as published: an idconf on each line, whose geometry is left out with all that were
            displaced from it.
        seed: of the split.
        num_workers: processes; what is written does not depend on it.

    Returns:
        The number of structures in each split.

    Raises:
        ValueError: wrong arguments, missing, damaged or foreign files; names file, idmol and idconf, a line for each.
        OSError: reading or writing fails.
    """
    data_path, out_path = Path(expand_path(data_path)), Path(expand_path(out_path))
    if num_workers < 1 or seed < 0:
        raise ValueError(f"num_workers {num_workers} must be at least 1 and seed {seed} at least 0")
    sources = _find_files(data_path)
    left_out = frozenset() if duplicates is None else _read_duplicates(duplicates)
    tasks = _make_tasks(sources, out_path, seed, left_out)
    (out_path / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
    with exclusive(out_path / STATE_FOLDER / "lock", out_path):
        _keep_settings(out_path, {"seed": seed, "left_out": sorted(left_out)})
        _check_no_others(out_path, tasks)
        write_shards(
            _write_shards,
            [task for task in tasks if not _is_done(task)],
            num_workers=num_workers,
            inputs=lambda task: len(task.molecules),
            unit="molecule",
            records="structures",
        )
        return _write_all_metadata(out_path, tasks)


def _find_files(folder: Path) -> list[Path]:
    """The eight files; what else ends like them would be left out without a word, so it is refused."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        packed = " (unpack the .xz files first: xz -dk *.xz)" if list(folder.glob("*.xz")) else ""
        raise ValueError(f"{folder}: {', '.join(missing)} missing; expected {FILES[0]} to {FILES[-1]} of QM7-X{packed}")
    foreign = sorted(path.name for path in folder.glob("*.hdf5") if path.name not in FILES)
    if foreign:
        raise ValueError(f"{folder}: {', '.join(foreign)} is no file of QM7-X; expected {FILES[0]} to {FILES[-1]} only")
    return [folder / name for name in FILES]


def _read_duplicates(path: Path) -> frozenset[str]:
    geometries = set()
    for number, line in enumerate(Path(expand_path(path)).read_text().splitlines(), start=1):
        match = _IDCONF.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"{path}:{number}: expected an idconf such as Geom-m1-i1-c1-opt, got {line[:60]!r}")
        geometries.add(match[1])
    return frozenset(geometries)


def _keep_settings(out_path: Path, settings: dict[str, Any]) -> None:
    file = out_path / STATE_FOLDER / "settings.json"
    if not file.exists():
        if any((out_path / split).exists() for split in SPLITS):
            raise ValueError(f"{out_path}: has folders of the same names from something else; choose another one")
        write_json(file, settings)
    if json.loads(file.read_text()) != settings:
        raise ValueError(f"{out_path}: was begun with another seed or list of duplicates; choose another folder")
    for split in SPLITS:
        remove_leftovers(out_path / split)


def _check_no_others(out_path: Path, tasks: Sequence[_Task]) -> None:
    """Shards of molecules that are not there any more would be read with the rest."""
    for split in SPLITS:
        others = sorted(set((out_path / split).glob("*.lmdb")) - {task.shard(split) for task in tasks})
        if others:
            raise ValueError(f"{others[0]}: is made from more molecules than there are now; choose another folder")


def _make_tasks(sources: list[Path], out_path: Path, seed: int, left_out: frozenset[str]) -> list[_Task]:
    tasks: list[_Task] = []
    for source in sources:
        with _open(source) as file:
            molecules = sorted(file, key=natural_order)
        if not molecules or not all(name.isdecimal() for name in molecules):
            found = next((name for name in molecules if not name.isdecimal()), "nothing")
            raise ValueError(f"{source}: is no file of QM7-X: expected groups named by idmol (numbers), found {found}")
        for start in range(0, len(molecules), MOLECULES_PER_TASK):
            part = molecules[start : start + MOLECULES_PER_TASK]
            tasks.append(_Task(source, part, len(tasks), out_path, seed, left_out))
    return tasks


def _open(path: Path) -> Any:
    """An HDF5 file to read."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError("reading HDF5 needs h5py: pip install 'faenet-ocp[qm7x]'") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: is no whole HDF5 file; load it down again ({error})") from error


# Shards


def _is_done(task: _Task) -> bool:
    if not task.sizes.exists():
        return False
    with np.load(task.sizes, allow_pickle=False) as archive:
        is_same = json.loads(str(archive["made_from"])) == task.made_from()
        return is_same and all(task.shard(split).exists() for split in SPLITS if len(archive[split]))


def _write_shards(task: _Task) -> int | ValueError:
    """Write the shards of one task: how many structures, or what is wrong with one."""
    natoms: dict[str, list[int]] = {split: [] for split in SPLITS}
    writers: dict[str, PackedShardWriter] = {}
    made_from = task.made_from()
    for split in SPLITS:
        task.shard(split).unlink(missing_ok=True)  # of a source that has changed since
    try:
        with ExitStack() as stack:
            for split, record in _read_structures(task):
                if split not in writers:
                    writers[split] = stack.enter_context(PackedShardWriter(task.shard(split), source=made_from))
                writers[split].append(encode_packed(record))
                natoms[split].append(len(record["pos"]))
    except ValueError as error:
        return error
    sizes = {split: np.array(counts, np.int64) for split, counts in natoms.items()}
    write_arrays(task.sizes, sizes | {"made_from": np.array(json.dumps(made_from))})
    return sum(map(len, natoms.values()))


def _read_structures(task: _Task) -> Iterator[tuple[str, dict[str, Any]]]:
    """Split and record of each structure; ValueError at the first that is not as QM7-X's are."""
    with _open(task.source) as file:
        for idmol in task.molecules:
            where = f"{task.source}: {idmol}"
            try:
                for idconf in sorted(file[idmol], key=natural_order):
                    where = f"{task.source}: {idmol}/{idconf}"
                    match = _IDCONF.fullmatch(idconf)
                    if match is None:
                        raise ValueError(f"{where}: expected an idconf such as Geom-m1-i1-c1-opt or Geom-m1-i1-c1-d1")
                    if match[1] not in task.left_out:
                        record = _read(file[idmol][idconf], where) | {"sid": int(idmol), "fid": _number(match)}
                        yield split_of(idmol, idconf, task.seed), record
            except (OSError, KeyError, RuntimeError, AttributeError, TypeError) as error:  # of h5py
                raise ValueError(f"{where}: is damaged, or no group of QM7-X: {error}") from error


def split_of(idmol: str, idconf: str, seed: int) -> str:
    """Where a structure goes."""
    if idmol in UNKNOWN:
        return "val_unknown"
    digest = hashlib.blake2b(f"{seed} {idmol} {idconf}".encode(), digest_size=8).digest()
    return "val_known" if int.from_bytes(digest) < SHARE_KNOWN * 2**64 else "train"


def _number(idconf: re.Match[str]) -> int:
    end = 0 if idconf[5] == "opt" else int(idconf[5].removeprefix("d"))
    return ((int(idconf[2]) * 1000 + int(idconf[3])) * 1000 + int(idconf[4])) * 1000 + end


def _read(group: Any, where: str) -> dict[str, Any]:
    """One structure; ValueError if something is missing, not finite or of another shape or element."""
    missing = [name for name in _DATASETS if name not in group]
    if missing:
        raise ValueError(f"{where}: has no {', '.join(missing)}")
    numbers, pos, energy, forces = (np.asarray(group[name]) for name in _DATASETS)
    n = numbers.shape[0] if numbers.ndim == 1 else 0
    expected = ((n,), (n, 3), (1,), (n, 3))
    for (name, shape), array, right in zip(_DATASETS.items(), (numbers, pos, energy, forces), expected, strict=True):
        if not n or array.shape != right:
            raise ValueError(f"{where}: {name} has shape {array.shape}, expected {shape} with n = {n or 'atoms'}")
        if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise ValueError(f"{where}: {name} holds what is no finite number")
    unknown = sorted(set(numbers.tolist()) - set(ELEMENTS))
    if unknown:
        raise ValueError(f"{where}: atNUM holds {unknown}; the elements of QM7-X are H, C, N, O, S, Cl: {ELEMENTS}")
    return {
        "atomic_numbers": numbers.astype(np.uint8),
        "pos": pos.astype(np.float32),
        "energy": float(energy[0]),
        "forces": forces.astype(np.float32),
    }


def _write_all_metadata(out_path: Path, tasks: list[_Task]) -> dict[str, int]:
    natoms: dict[str, list[Any]] = {split: [] for split in SPLITS}
    for task in tasks:
        with np.load(task.sizes, allow_pickle=False) as archive:
            for split in SPLITS:
                natoms[split].append(archive[split])
    sizes = {split: np.concatenate(parts) for split, parts in natoms.items()}
    for split, counts in sizes.items():
        if len(counts):
            write_metadata(out_path / split, natoms=counts)
    return {split: len(counts) for split, counts in sizes.items()}
