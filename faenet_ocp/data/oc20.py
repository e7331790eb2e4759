"""OC20's LMDB files as a fairchem data set: pickled PyG records to ``AtomicData``, with edges, labels and transforms.

Registered with fairchem as ``oc20_lmdb`` and, for OCP configs, ``lmdb``, ``single_point_lmdb`` and ``trajectory_lmdb``.
Shapes: n atoms and e edges of one sample. Energies in eV, forces in eV/A, lengths in A.
"""

import copy
import hashlib
import itertools
import logging
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.datasets.base_dataset import BaseDataset
from numpy.typing import NDArray
from tqdm import tqdm

from faenet_ocp.common.checks import RecordError, choice, nearest, positive, whole_number
from faenet_ocp.common.files import write_array
from faenet_ocp.data.batch import assign_batch_stats, make_batch
from faenet_ocp.data.fields import Fields, Reading, array_of, declare_labels, number_of
from faenet_ocp.data.lmdb_files import LmdbFile, natural_order, resolve_files
from faenet_ocp.data.records import decode_record
from faenet_ocp.data.transforms import Compose
from faenet_ocp.graph.lists import NO_LIMIT
from faenet_ocp.targets import TARGETS

logger = logging.getLogger(__name__)

NAMES = ("oc20_lmdb", "lmdb", "single_point_lmdb", "trajectory_lmdb")
EDGES = ("stored", "recompute", "none")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
_LOOKED_AT = 256
_OWN_KEYS = ("src", "labels", "key_mapping", "edges", "cutoff", "max_neighbors", "transforms", "seed", "dtype")
# Read by fairchem's create_dataset from the same mapping.
_HOST_KEYS = ("format", "first_n", "sample_n", "no_shuffle", "max_atoms", "subset_to")


class OC20LmdbDataset(BaseDataset[AtomicData]):
    """Samples of one or more LMDB files, in their order.

    ``dataset[index]`` and ``dataset[epoch, index]`` (plain index: epoch 0) give an ``AtomicData`` with the fields of
    ``fields.FIELDS``: the labels asked for, sid, fid (-1 where a record has none), tags, fixed, edges, `dataset`, and
    composition, the atoms of each element before transforms. Random transforms depend on (seed, epoch, index) only: not
    on worker, rank or batch. A record without cell is a molecule; one with a cell and no `pbc` is periodic.

    Edges: `edges: stored` (the default) takes the record's own and builds them where a record has none; `recompute`
    always builds them; `none` leaves them to the model. Either way they are cut to `cutoff` and `max_neighbors`
    (``graph.lists``) **before** transforms, so removing sub-surface atoms does not bring in other neighbours. OC20
    stores the 50 nearest neighbours within 6 A, cut strictly. Where the stored list of an atom ends inside the shell of
    its last neighbour, that list is built anew, so that the graph is always the one that `recompute` gives. That holds
    as long as `cutoff` is at most that of the file and the file has more neighbours than asked for, where there are
    more; use `recompute` for larger limits. (A run looks at some records of each split: ``check.compare_edges``.)

    Labels: `key_mapping` ({record's name: label}) says where a label is. Several names may map to one label if each
    record has one of them. Where these are names of OC20's eras (``targets``), the label's own name serves, too. A
    label without mapping is looked for under the names of all eras. Several candidates in a record are an error, never
    a guess. A label that is no row of ``targets`` is a scalar of the system.

    Args:
        config: a mapping with
            src: file, folder of shards, glob, or a list of these (required).
            labels: labels every record must have, [] for none; default: those of `key_mapping`, else [energy].
            key_mapping, edges, cutoff, max_neighbors: see above; the last two are required unless `edges: none`.
            transforms: mapping of ``transforms.Compose``.
            seed: of random transforms (default 0).
            dtype: float32 (default) or float64.
            dataset_name: `dataset` of every sample (default oc20).
            cache_dir: folder in which collected sizes are kept (default: not kept). Never the data folder.

    Raises:
        ValueError, FileNotFoundError: wrong config, or files that are missing or damaged.
        RecordError: (when reading) a record that cannot be read or used; names file, record and reason.
    """

    _file: type[LmdbFile] = LmdbFile
    _keys: tuple[str, ...] = _OWN_KEYS

    def __init__(self, config: Mapping[str, Any]):
        config = dict(config)
        _check_config(config, self._keys)
        super().__init__({key: value for key, value in config.items() if key != "src"})
        self.config = config
        self.files = self._open_files()
        self.paths = [file.path for file in self.files]
        self._ends = np.cumsum([len(file) for file in self.files]).tolist()
        self._chosen: NDArray[np.int64] | None = None
        self.num_samples = self._ends[-1]
        if self.num_samples == 0:
            raise ValueError(f"no {self._file.item}s in {', '.join(map(str, self.paths))}")
        self._reading = Reading(
            labels=_label_sources(config.get("labels"), config.get("key_mapping") or {}),
            edges=config.get("edges", "stored"),
            dtype=DTYPES[config.get("dtype", "float32")],
            cutoff=config.get("cutoff", 0.0),
            max_neighbors=NO_LIMIT if (most := config.get("max_neighbors", 0)) is None else most,
        )
        declare_labels(self._reading.labels)
        self.transforms = Compose(config.get("transforms") or {})
        self.seed = config.get("seed", 0)
        self.name = config.get("dataset_name", "oc20")

    def _open_files(self) -> list[LmdbFile]:
        return [self._file(path) for path in resolve_files(self.config["src"])]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        declare_labels(self._reading.labels)  # this may be another process

    def __getitem__(self, key: int | tuple[int, int]) -> AtomicData:
        data = self._load([key])
        data.dataset = self.name  # the constructor would make a list of it, which fairchem's collater cannot use
        return data

    def load_batch(self, keys: Sequence[int | tuple[int, int]]) -> AtomicData:
        """The batch of ``dataset[key]`` for all keys, to the last bit, in a fraction of the time.

        That is so with transforms that work on batches (``transforms.BatchTransform``). Otherwise, and in a subclass
        with a ``__getitem__`` of its own, samples are made one by one.

        Raises:
            RecordError: one of the records cannot be used; ``dataset[key]`` says which.
        """
        if not self.transforms.takes_batches or type(self).__getitem__ is not OC20LmdbDataset.__getitem__:
            return atomicdata_list_to_batch([self[key] for key in keys])
        data = self._load(keys).contiguous()
        data.dataset = [self.name] * len(keys)
        assign_batch_stats(data)
        return data

    def _load(self, keys: Sequence[int | tuple[int, int]]) -> AtomicData:
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        places = [self.locate(int(index)) for _, index in pairs]
        values = [file.read(position) for file, position in places]
        file, position = places[0]
        item, number = file.item, file.numbers[position]
        name = f"{file.path}: {item} {number}" if len(keys) == 1 else f"one of {len(keys)} {item}s"
        try:
            records = [self._decode(value) for value in values]
            sids = [_identifier(fields, str(index)) for fields, (_, index) in zip(records, pairs, strict=True)]
            if len(keys) == 1:
                name += f" (sid {sids[0]})"
            data = self._make(records, sids)
            if len(self.transforms):
                data = self.transforms.apply(data, [self._generator(epoch, int(index)) for epoch, index in pairs])
        except RecordError as error:
            raise RecordError(f"{name} {error}") from error
        except ValueError as error:
            raise RecordError(f"{name}: {error}") from error
        return data

    def _decode(self, value: bytes) -> Fields:
        return decode_record(value)

    def _make(self, records: Sequence[Fields], sids: list[str]) -> AtomicData:
        return make_batch(records, sids, self._reading, surface=self.transforms.removes_subsurface_first)

    def locate(self, index: int) -> tuple[LmdbFile, int]:
        """The file of a sample and its position there."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        if self._chosen is not None:
            index = int(self._chosen[index])
        number = bisect_right(self._ends, index)
        return self.files[number], index - (self._ends[number - 1] if number else 0)

    def _generator(self, epoch: int, index: int) -> torch.Generator:
        (seed,) = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(seed))

    def plain(self, edges: str) -> Self:
        """The same samples without transforms, with edges as the key `edges` says."""
        other = copy.copy(self)
        other._reading, other.transforms = self._reading._replace(edges=edges), Compose({})
        return other

    def select(self, indices: NDArray[np.int64]) -> Self:
        """The data set of these samples, in this order."""
        other = copy.copy(self)
        other._chosen = indices if self._chosen is None else self._chosen[indices]
        other.num_samples = len(indices)
        return other

    def fingerprint(self) -> dict[str, Any]:
        """What tells these data from others, in a second for any number of systems; transforms and edges do not matter.

        - num_systems: how many there are.
        - content: digest of sids, elements, positions and labels of up to 256 samples, spread evenly. It stays the same
          when files are moved, copied or packed.
        - files: digest of the files' `LmdbFile.state` and of where labels are looked for. It changes with every write
          to a file, whatever was written.

        Raises:
            RecordError: one of the samples cannot be used; names file, record and reason.
        """
        plain = self.plain("none")
        files = [str(sorted(self._reading.labels.items())), *(file.state() for file in self.files)]
        content = hashlib.sha256()
        used = min(self.num_samples, _LOOKED_AT)
        for number in range(used):
            sample = plain._load([number * self.num_samples // used])
            arrays = [sample[name] for name in ("atomic_numbers", "pos", *self._reading.labels)]
            content.update(b"".join([sample.sid[0].encode(), *(array.numpy().tobytes() for array in arrays)]))
        return {
            "num_systems": self.num_samples,
            "content": content.hexdigest()[:16],
            "files": hashlib.sha256("\n".join(files).encode()).hexdigest()[:16],
        }

    # Facts of all samples

    @cached_property
    def _metadata(self) -> dict[str, NDArray[Any]]:
        """What is known of all samples without reading them, from metadata.npz."""
        return _read_metadata(self.files)

    def natoms(self) -> NDArray[np.int64]:
        """Return the number of atoms of each sample before transforms (len(self),).

        From metadata.npz beside the files if there is one; else all records are read once, with a progress bar, and the
        result is kept in `cache_dir`.

        Raises:
            RecordError: a record cannot be read.
        """
        if "natoms" not in self._metadata:
            self._metadata["natoms"] = self._of_all("natoms", lambda f, _: len(array_of(f, "pos", (None, 3))))
        natoms = self._metadata["natoms"]
        return natoms if self._chosen is None else natoms[self._chosen]

    def groups(self) -> NDArray[np.int64]:
        """Return which samples belong together, (len(self),): a number for each sid.

        All records are read once, with a progress bar, and the result is kept in `cache_dir`. A record that cannot be
        read is alone: an error where it is used, a line of `--mode check`.
        """
        seen: dict[str, int] = {}
        found = self._of_all("groups", lambda f, i: seen.setdefault(self._group_of(f, i), len(seen)), unreadable=-1)
        groups = np.where(found < 0, len(found) + np.arange(len(found)), found)
        return groups if self._chosen is None else groups[self._chosen]

    def _group_of(self, fields: Fields, index: int) -> str:
        return _identifier(fields, str(index))

    def _of_all(
        self, name: str, number_of: Callable[[Fields, int], int], unreadable: int | None = None
    ) -> NDArray[np.int64]:
        """A number of each record, from `cache_dir` if it is there for these very files, else of all that are read."""
        folder, states = self.config.get("cache_dir"), "\n".join(file.state() for file in self.files)
        key = hashlib.sha256(states.encode()).hexdigest()[:16]
        cache = None if folder is None else Path(folder) / f"{name}-{key}.npy"
        if cache is not None and cache.is_file():
            return np.load(cache, allow_pickle=False)
        values, index, whole = np.empty(self._ends[-1], dtype=np.int64), 0, True
        bar = tqdm(total=self._ends[-1], desc=f"{name} of all systems", unit="system", delay=2.0)
        for file in self.files:
            for position in range(len(file)):
                try:
                    values[index] = number_of(self._decode(file.read(position)), index)
                except RecordError as error:
                    if unreadable is None:
                        raise RecordError(f"{file.path}: {file.item} {file.numbers[position]} {error}") from error
                    values[index], whole = unreadable, False
                index += 1
                bar.update()
        bar.close()
        if cache is not None and whole:  # what cannot be read with these settings may be readable with others
            write_array(cache, values)
        return values


def _check_config(config: Mapping[str, Any], keys: Sequence[str]) -> None:
    allowed = (*keys, "dataset_name", "cache_dir", *_HOST_KEYS)
    for key in config:
        if key not in allowed:
            raise ValueError(f"dataset: unknown key {key!r}{nearest(str(key), allowed)}")
    if "src" not in config:
        raise ValueError("dataset: no src: a file, a folder, a glob or a list of these")
    choice("dataset.edges", config.get("edges", "stored"), EDGES)
    choice("dataset.dtype", config.get("dtype", "float32"), tuple(DTYPES))
    if config.get("edges") != "none":
        positive("dataset.cutoff", config.get("cutoff"))
        if config.get("max_neighbors", 0) is not None:
            whole_number("dataset.max_neighbors", config.get("max_neighbors"), minimum=1)
        elif config.get("edges", "stored") == "stored":
            raise ValueError("dataset.edges: stored edges are cut by number, max_neighbors: null is not; use recompute")


def _label_sources(labels: Sequence[str] | None, key_mapping: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Each label asked for, and the names under which records may have it."""
    if labels is None:
        labels = list(dict.fromkeys(key_mapping.values())) or ["energy"]
    for name, label in key_mapping.items():
        if labels and label not in labels and label not in TARGETS:
            raise ValueError(f"dataset.key_mapping.{name}: {label!r} is no label{nearest(label, {*labels, *TARGETS})}")
    sources = {}
    for label in labels:
        known = TARGETS[label].aliases if label in TARGETS else (label,)
        sources[label] = tuple(name for name, target in key_mapping.items() if target == label) or known
    return sources


def _identifier(fields: Fields, default: str) -> str:
    """The sid as text: a number in OC20, free text elsewhere, the sample's index if there is none."""
    sid = fields.get("sid", default)
    return sid if isinstance(sid, str) else str(number_of(fields, "sid", default=0))


def _read_metadata(files: Sequence[LmdbFile]) -> dict[str, NDArray[Any]]:
    """The arrays of the metadata.npz in each file's folder; nothing unless all folders have a fitting one."""
    parts = []
    for folder, members in itertools.groupby(files, key=lambda file: file.path.parent):
        group = list(members)
        path, count = folder / "metadata.npz", sum(map(len, group))
        if not path.is_file():
            return {}
        try:
            with np.load(path, allow_pickle=False) as archive:
                part = {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
        if group != sorted(group, key=lambda file: natural_order(file.path)):
            return {}  # its arrays are in the order of the folder
        natoms = part.get("natoms")
        if natoms is None or natoms.shape != (count,) or natoms.dtype.kind not in "iu":
            logger.warning("%s is not used: it has no natoms for exactly the %d records of its folder", path, count)
            return {}
        parts.append({name: array for name, array in part.items() if array.shape[:1] == (count,)})
    common = set.intersection(*(set(part) for part in parts))
    return {name: np.concatenate([part[name] for part in parts]) for name in sorted(common)}


def _register() -> None:
    """Make the data set known to fairchem; a name that another class has taken stays with it."""
    known = registry.mapping["dataset_name_mapping"]
    for name in NAMES:
        taken = known.get(name)
        if taken is None or taken.__module__ == __name__:
            registry.register_dataset(name)(OC20LmdbDataset)
        else:
            logger.warning("dataset format %r is %s.%s already", name, taken.__module__, taken.__qualname__)


_register()
