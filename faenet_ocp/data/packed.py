"""Packed OC20 files (``scripts/pack_lmdb.py``) as a data set, registered as ``oc20_packed``."""

import json
import zlib
from collections.abc import Sequence
from typing import Any

import lmdb
from fairchem.core.common.registry import registry

from faenet_ocp.data.batch import Fields
from faenet_ocp.data.lmdb_files import PACKED_KEY, LmdbFile
from faenet_ocp.data.oc20 import OC20LmdbDataset
from faenet_ocp.data.packed_records import decode_packed

NAME = "oc20_packed"
VERSION = 1


class PackedFile(LmdbFile):
    """The packed records of one file; ``header`` says what it was made from."""

    header: dict[str, Any]

    def _find_numbers(self, txn: lmdb.Transaction) -> Sequence[int]:
        value = txn.get(PACKED_KEY)
        if value is None:
            raise ValueError(f"{self.path}: is no file of scripts/pack_lmdb.py; try dataset.format: oc20_lmdb")
        self.header = read_header(value, str(self.path))
        count = self.header["count"]
        if count > 0 and txn.get(b"%d" % (count - 1)) is None:
            raise ValueError(f"{self.path}: its header says {count} records, but some are missing")
        return range(count)


class OC20PackedDataset(OC20LmdbDataset):
    """Like ``OC20LmdbDataset``, with the same config and the same samples to the last bit, from packed files.

    Raises:
        RecordError: (when reading) also for a record that has changed since it was packed.
    """

    _file = PackedFile

    def _decode(self, value: bytes) -> Fields:
        return decode_packed(value)


def write_header(*, count: int, source: dict[str, Any]) -> bytes:
    """The value of the header's key: a checksum and JSON."""
    text = json.dumps({"version": VERSION, "count": count, "source": source}).encode()
    return zlib.crc32(text).to_bytes(4, "little") + text


def read_header(value: bytes, path: str) -> dict[str, Any]:
    """ValueError if the header is damaged or of another version."""
    if zlib.crc32(value[4:]) != int.from_bytes(value[:4], "little"):
        raise ValueError(f"{path}: its header is damaged")
    header = json.loads(value[4:])
    if header["version"] != VERSION:
        raise ValueError(f"{path}: was packed in version {header['version']} of the format, not {VERSION}")
    return header


registry.register_dataset(NAME)(OC20PackedDataset)
