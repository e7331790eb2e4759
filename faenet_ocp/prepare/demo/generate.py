"""Generated demo data in OC20's on-disk layout: IS2RE and S2EF, with honest validation splits.

A unit of work is one clean slab with up to four adsorbate placements. Everything random in it
comes from (seed, split, number of the unit), so neither the number of processes nor an interruption
has an influence. Finished units wait in a hidden folder inside the output folder until all are
there; then they are put together in order and the folder is removed.

No clean slab is in two splits: a strained one is drawn anew every time, and the unstrained ones of
one composition and facet belong to one split. Training never sees `OOD_ADSORBATES` (val_ood_ads,
val_ood_both) nor `OOD_COMPOSITIONS` (val_ood_cat, val_ood_both).
"""

import csv
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import lmdb
import numpy as np
import torch
from tqdm import tqdm

from faenet_ocp.prepare.demo.files import (
    ShardedWriter,
    is2re_record,
    pick_frames,
    raw_frame,
    s2ef_record,
    write_raw,
)
from faenet_ocp.prepare.demo.systems import (
    ADSORBATES,
    COMPOSITIONS,
    METALS,
    RATTLE,
    SlabSpec,
    System,
    draw_slab,
    make_system,
    rattled,
    relaxed_slab,
    rotated,
)
from faenet_ocp.prepare.lmdb_writer import (
    LmdbShardWriter,
    encode_record,
    remove_leftovers,
    write_metadata,
)
from faenet_ocp.tasks.references import NUM_ELEMENTS, CompositionRegression

logger = logging.getLogger(__name__)

SPLITS = ("train", "val_id", "val_ood_ads", "val_ood_cat", "val_ood_both")
OOD_ADSORBATES = ("CH3", "NH3", "COH", "NOH")
OOD_COMPOSITIONS = tuple(name for name in COMPOSITIONS if name not in METALS)[2::5]
SUMMARY_NAME = "summary.json"
WORK_NAME = ".unfinished"

_SYSTEMS_PER_SLAB = 4
_MAX_DISCARDS_ON_SLAB = 8  # about 3 % of the systems are discarded; a slab with more is unstable
_MAX_DISCARDS = 100
_LAYOUT = 2  # to be raised when the same settings begin to give other data
_TABLE_COLUMNS = (
    "sid",
    "split",
    "adsorbate",
    "composition",
    "facet",
    "layers",
    "repeat",
    "termination",
    "strain",
    "rotation",
    "natoms",
    "num_frames",
    "y_init",
    "y_relaxed",
    "reference",
)
_NOTE = (
    "Generated demonstration data in OC20's formats. Energies and forces are effective-medium "
    "theory (ASE's EMT) with springs on the adsorbates' bonds; not DFT, not OC20. Energies in eV. "
    f"S2EF frames are rattled (normal, {RATTLE} A along each axis)."
)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo data depends on.

    Attributes:
        num_train: training systems.
        num_val: systems in each of the four validation splits.
        frames_per_system: S2EF frames taken from each relaxation, at most; they are rattled.
        raw_frames: frames of each split also written in the format of the S2EF download.
        seed: of everything random.
    """

    num_train: int = 1500
    num_val: int = 200
    frames_per_system: int = 4
    raw_frames: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for item in fields(self):
            value, lowest = getattr(self, item.name), int(item.name not in ("raw_frames", "seed"))
            if not isinstance(value, int) or value < lowest:
                raise ValueError(f"{item.name} must be a whole number >= {lowest}, got {value!r}")


class _Unit(NamedTuple):
    """One clean slab: `num_systems` systems with consecutive sids."""

    split: str
    number: int
    first_sid: int
    num_systems: int


def make_demo_data(root: str | Path, settings: DemoSettings, *, num_workers: int = 1) -> dict[str, Any]:
    """Generate the demo data, or what is missing of it, below `root`.

    Writes `is2re/all/{split}/data.lmdb`, `s2ef/2M/train/data.NNNN.lmdb` (with edges),
    `s2ef/all/val_*/data.NNNN.lmdb` (without), a `metadata.npz` in each of these folders,
    `s2ef_raw/` if asked, `systems.csv` and, last, `summary.json`.

    Args:
        root: output folder. With finished data of the same settings nothing is done.
        settings: sizes and seed.
        num_workers: processes; 1 works in this one.

    Returns:
        The summary: per split the number of systems and frames, what was discarded and why, mean
        and standard deviation of `y_relaxed`, and the MAE (eV) of the training mean and of least
        squares on the training set's element counts.

    Raises:
        FileExistsError: `root` holds other data.
        ValueError: `num_workers` is not positive.
        RuntimeError: nearly everything had to be discarded.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
    root = Path(root)
    identity = {"layout": _LAYOUT, **asdict(settings)}
    finished = _finished_summary(root, identity)
    if finished is not None:
        logger.info("%s is complete already", root)
        return finished
    work = root / WORK_NAME
    _open_work_folder(root, work, identity)
    units = _plan(settings)
    _run_units(units, settings, work, num_workers)
    rows, discarded = _assemble(root, work, units, settings)
    summary = {"note": _NOTE, "settings": identity, "splits": _statistics(rows, discarded)}
    _write_table(root / "systems.csv", rows)
    _write_atomically(root / SUMMARY_NAME, json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(work)
    return summary


def _finished_summary(root: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    path = root / SUMMARY_NAME
    if not path.exists():
        return None
    summary: dict[str, Any] = json.loads(path.read_text())
    if summary.get("settings") != identity:
        raise FileExistsError(
            f"{root} holds demo data of other settings, {summary.get('settings')}, not {identity}: "
            "choose another folder or delete it"
        )
    return summary


def _open_work_folder(root: Path, work: Path, identity: dict[str, Any]) -> None:
    """Create the folder of finished units, or check that the one there has these settings."""
    plan = work / "settings.json"
    if plan.exists():
        if json.loads(plan.read_text()) != identity:
            raise FileExistsError(
                f"{work} holds the beginning of demo data of other settings: choose another folder or delete it"
            )
        return
    taken = [name for name in ("is2re", "s2ef", "s2ef_raw") if (root / name).exists()]
    if taken:
        raise FileExistsError(f"{root} holds {', '.join(taken)} already: choose another folder")
    work.mkdir(parents=True, exist_ok=True)
    _write_atomically(plan, json.dumps(identity))


def _plan(settings: DemoSettings) -> list[_Unit]:
    """All units, split after split; sids count up within a split from its own million."""
    units = []
    for position, split in enumerate(SPLITS):
        total = settings.num_train if split == "train" else settings.num_val
        for number, start in enumerate(range(0, total, _SYSTEMS_PER_SLAB)):
            first_sid = (position + 1) * 1_000_000 + start
            units.append(_Unit(split, number, first_sid, min(_SYSTEMS_PER_SLAB, total - start)))
    return units


def _unit_path(work: Path, unit: _Unit) -> Path:
    return work / f"{unit.split}-{unit.number:06d}.lmdb"


def _run_units(units: Sequence[_Unit], settings: DemoSettings, work: Path, num_workers: int) -> None:
    """Compute the units that are not there yet."""
    missing = [unit for unit in units if not _unit_path(work, unit).exists()]
    run = partial(_run_unit, settings=settings, work=work)
    done = len(units) - len(missing)
    logger.info("demo data: relaxing adsorbates on %d slabs, %d are there", len(missing), done)
    with ExitStack() as stack:
        # disable=None: a bar on terminals only.
        bar = tqdm(total=len(units), initial=done, unit="slab", desc="demo data", disable=None)
        stack.enter_context(bar)
        if num_workers == 1:
            for unit in missing:
                run(unit)
                bar.update()
            return
        pool = stack.enter_context(ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=_start_worker))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        for future in as_completed([pool.submit(run, unit) for unit in missing]):
            future.result()
            bar.update()


def _start_worker() -> None:
    torch.set_num_threads(1)
    # A worker whose parent was killed would wait for work for ever.
    Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_unit(unit: _Unit, *, settings: DemoSettings, work: Path) -> None:
    """Compute one unit: a shard with a JSON header, IS2RE records, S2EF records, raw frames."""
    rng = np.random.default_rng([settings.seed, SPLITS.index(unit.split), unit.number])
    systems, discarded = _draw_systems(unit, rng)
    rows, records, frames, raws = [], [], [], []
    for sid, system in enumerate(systems, start=unit.first_sid):
        record = is2re_record(system, sid)
        records.append(encode_record(record))
        fids = pick_frames(system.trajectory, settings.frames_per_system, rng)
        rows.append(_describe(system, unit.split, record, len(fids)))
        system = rattled(system, fids, rng)
        for fid in fids:
            frame = s2ef_record(system, sid, fid, edges=unit.split == "train")
            frames.append(encode_record(frame))
            if settings.raw_frames:
                raws.append(json.dumps(raw_frame(system, sid, fid)).encode())
    header = {"systems": rows, "discarded": discarded}
    with LmdbShardWriter(_unit_path(work, unit), overwrite=True) as writer:
        for value in (json.dumps(header).encode(), *records, *frames, *raws):
            writer.append(value)


def _draw_systems(unit: _Unit, rng: np.random.Generator) -> tuple[list[System], Counter[str]]:
    """Draw a slab and usable systems on it; whatever fails is counted and drawn again."""
    ood_adsorbates = unit.split in ("val_ood_ads", "val_ood_both")
    ood_compositions = unit.split in ("val_ood_cat", "val_ood_both")
    adsorbates = [name for name in ADSORBATES if (name in OOD_ADSORBATES) == ood_adsorbates]
    compositions = [name for name in COMPOSITIONS if (name in OOD_COMPOSITIONS) == ood_compositions]
    systems: list[System] = []
    discarded: Counter[str] = Counter()
    slab, discarded_before = None, 0
    while len(systems) < unit.num_systems:
        if discarded.total() >= _MAX_DISCARDS:
            raise RuntimeError(f"{unit}: too many systems had to be discarded, {dict(discarded)}")
        if slab is None or discarded.total() - discarded_before >= _MAX_DISCARDS_ON_SLAB:
            spec = draw_slab(rng, compositions, partial(_belongs_to, split=unit.split))
            slab, discarded_before = relaxed_slab(spec), discarded.total()
            if slab is None:
                discarded["slab not converged"] += 1
                continue
        system = make_system(spec, *slab, str(rng.choice(adsorbates)), rng)
        if isinstance(system, str):
            discarded[system] += 1
            continue
        turned = rng.random() < 0.5
        systems.append(rotated(system, rng.uniform(0.0, 2 * np.pi)) if turned else system)
    return systems, discarded


def _belongs_to(spec: SlabSpec, *, split: str) -> bool:
    """Whether a split may use a slab: one of ten owners by composition and facet if unstrained."""
    if any(spec.strain):
        return True
    digest = hashlib.sha256(f"{spec.composition} {spec.facet}".encode()).digest()
    owner = digest[0] % 10
    if spec.composition in OOD_COMPOSITIONS:
        return split == ("val_ood_cat" if owner < 5 else "val_ood_both")
    return split == ("train" if owner < 8 else "val_id" if owner == 8 else "val_ood_ads")


def _describe(system: System, split: str, record: Any, num_frames: int) -> dict[str, Any]:
    """What is known of a system, for systems.csv and the statistics."""
    numbers, counts = np.unique(system.atoms.numbers, return_counts=True)
    return {
        **system.spec._asdict(),
        "sid": record.sid,
        "split": split,
        "adsorbate": system.adsorbate,
        "rotation": system.rotation,
        "natoms": record.natoms,
        "num_frames": num_frames,
        "num_edges": record.edge_index.shape[1],
        "y_init": record.y_init,
        "y_relaxed": record.y_relaxed,
        "reference": system.reference,
        "counts": dict(zip(numbers.tolist(), counts.tolist(), strict=True)),
    }


def _read_unit(path: Path) -> list[bytes]:
    with (
        lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        return [transaction.get(b"%d" % i) for i in range(environment.stat()["entries"] - 1)]


def _assemble(
    root: Path, work: Path, units: Sequence[_Unit], settings: DemoSettings
) -> tuple[list[dict[str, Any]], dict[str, Counter[str]]]:
    """Put the units together in order; returns the rows of systems.csv and what was discarded."""
    rows: list[dict[str, Any]] = []
    discarded: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for split in SPLITS:
        train = split == "train"
        is2re = root / "is2re" / "all" / split
        s2ef = root / "s2ef" / ("2M" if train else "all") / split
        split_rows: list[dict[str, Any]] = []
        raw: list[tuple[str, str]] = []
        for folder in (is2re, s2ef):
            remove_leftovers(folder)
        with (
            LmdbShardWriter(is2re / "data.lmdb", overwrite=True) as systems,
            ShardedWriter(s2ef) as frames,
        ):
            for unit in (unit for unit in units if unit.split == split):
                values = iter(_read_unit(_unit_path(work, unit)))
                header = json.loads(next(values))
                discarded[split].update(header["discarded"])
                split_rows += header["systems"]
                for _ in header["systems"]:
                    systems.append(next(values))
                for _ in range(sum(row["num_frames"] for row in header["systems"])):
                    frames.append(next(values))
                if len(raw) < settings.raw_frames:
                    raw += [json.loads(value) for value in values]
        natoms = [row["natoms"] for row in split_rows]
        write_metadata(is2re, natoms=natoms, neighbors=[row["num_edges"] for row in split_rows])
        write_metadata(s2ef, natoms=np.repeat(natoms, [row["num_frames"] for row in split_rows]))
        if raw:
            name = "s2ef_train_200K" if train else f"s2ef_{split}"
            write_raw(root / "s2ef_raw" / name / name, raw[: settings.raw_frames])
        rows += split_rows
    return rows, discarded


def _statistics(rows: Sequence[dict[str, Any]], discarded: dict[str, Counter[str]]) -> dict[str, dict[str, Any]]:
    """Per split: sizes, discards, label statistics and the MAE of the two baselines of training."""
    compositions, energies = {}, {}
    for split in SPLITS:
        chosen = [row for row in rows if row["split"] == split]
        compositions[split] = torch.zeros(len(chosen), NUM_ELEMENTS)
        for i, row in enumerate(chosen):
            for number, atoms in row["counts"].items():
                compositions[split][i, int(number)] = atoms
        energies[split] = torch.tensor([row["y_relaxed"] for row in chosen], dtype=torch.float64)
    regression = CompositionRegression()
    regression.update(compositions["train"], energies["train"])
    fit = regression.solve()

    def mae(predicted: torch.Tensor | float, energy: torch.Tensor) -> float:
        return float((predicted - energy).abs().mean())

    return {
        split: {
            "num_systems": len(energy),
            "num_frames": sum(row["num_frames"] for row in rows if row["split"] == split),
            "discarded": dict(discarded[split]),
            "mean": float(energy.mean()),
            "stdev": float(energy.std(correction=0)),
            "mean_predictor_mae": mae(fit.mean, energy),
            "linear_mae": mae(fit.predict(compositions[split]), energy),
        }
        for split, energy in energies.items()
    }


def _write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _TABLE_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
