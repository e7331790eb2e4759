"""Downloads OC20 from its public home and unpacks it into OC20's usual layout below one folder.

A file comes down as `downloads/NAME.part`, with which a later call goes on, and becomes `downloads/NAME` once its MD5
sum is right. It is unpacked in a hidden folder, from which whole folders are moved to their places: a folder with its
final name is complete, and nothing that is already there is ever written over.
"""

import hashlib
import http.client
import logging
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from faenet_ocp.common.files import expand_path

logger = logging.getLogger(__name__)

HOME = "https://dl.fbaipublicfiles.com/opencatalystproject/data/"
_BLOCK = 1 << 20
_TIMEOUT = 60.0
_LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class Archive:
    """One file of the public data set.

    Attributes:
        url: where it is.
        md5: its published sum.
        places: each folder in it that is wanted, and where that goes below the root folder.
        prepared: for raw S2EF data, where its LMDB shards belong below the root folder.
    """

    url: str
    md5: str
    places: Mapping[str, str]
    prepared: str | None = None


def _raw_s2ef(name: str, md5: str, prepared: str) -> Archive:
    return Archive(f"{HOME}{name}.tar", md5, {name: f"s2ef_raw/{name}"}, prepared)


_TEST_SPLITS = ("test_id", "test_ood_ads", "test_ood_cat", "test_ood_both")
# Sums as published in OC20's DATASET.md and fairchem's docs/core/datasets/oc20.md. The older of these has the
# sums of 2M and 20M exchanged (fairchem issue 302).
S2EF: Mapping[str, Archive] = {
    "200k": _raw_s2ef("s2ef_train_200K", "f8d0909c2623a393148435dede7d3a46", "s2ef/200k/train"),
    "2M": _raw_s2ef("s2ef_train_2M", "953474cb93f0b08cdc523399f03f7c36", "s2ef/2M/train"),
    "20M": _raw_s2ef("s2ef_train_20M", "863bc983245ffc0285305a1850e19cf7", "s2ef/20M/train"),
    "all": _raw_s2ef("s2ef_train_all", "12a7087bfd189a06ccbec9bc7add2bcd", "s2ef/all/train"),
    "val_id": _raw_s2ef("s2ef_val_id", "f57f7f5c1302637940f2cc858e789410", "s2ef/all/val_id"),
    "val_ood_ads": _raw_s2ef("s2ef_val_ood_ads", "431ab0d7557a4639605ba8b67793f053", "s2ef/all/val_ood_ads"),
    "val_ood_cat": _raw_s2ef("s2ef_val_ood_cat", "532d6cd1fe541a0ddb0aa0f99962b7db", "s2ef/all/val_ood_cat"),
    "val_ood_both": _raw_s2ef("s2ef_val_ood_both", "5731862978d80502bbf7017d68c2c729", "s2ef/all/val_ood_both"),
    "test": Archive(
        url=f"{HOME}s2ef_test_lmdbs.tar.gz",
        md5="bcada432482f6e87b24e14b6b744992a",
        places={f"s2ef_test_lmdbs/test_data/s2ef/all/{split}": f"s2ef/all/{split}" for split in _TEST_SPLITS},
    ),
}
IS2RE = Archive(
    url=f"{HOME}is2res_train_val_test_lmdbs.tar.gz",
    md5="cfc04dd2f87b4102ab2f607240d25fb1",
    places={"is2res_train_val_test_lmdbs/data/is2re": "is2re"},
)


def find_archive(task: str, split: str | None) -> Archive:
    """Return the archive of a task and split; IS2RE is one archive for all splits.

    Raises:
        ValueError: there is no such task or split.
    """
    if task == "is2re" and split is None:
        return IS2RE
    if task == "s2ef" and split is not None and split in S2EF:
        return S2EF[split]
    raise ValueError(f"task {task!r}, split {split!r}: must be is2re without split, or s2ef with {', '.join(S2EF)}")


def download(archive: Archive, root: str | Path, *, keep: bool = False) -> list[Path]:
    """Download, verify and unpack an archive; go on where an earlier call stopped.

    Args:
        archive: what to get.
        root: folder of the data set; it holds `downloads/` meanwhile.
        keep: leave the archive in `downloads/` when it is unpacked.

    Returns:
        The folders that the archive's contents are in.

    Raises:
        ValueError: the MD5 sum is wrong (the file is deleted), or the archive's contents are not as expected.
        ConnectionError: the server refuses, or stays away for minutes.
        OSError: writing fails.
    """
    root = Path(expand_path(root))
    folders = [root / place for place in archive.places.values()]
    if all(folder.exists() for folder in folders):
        logger.info("nothing to download: %s exists", ", ".join(map(str, folders)))
        return folders
    file = root / "downloads" / archive.url.rpartition("/")[2]
    fetch(archive.url, file, md5=archive.md5)
    unpack(file, root, places=archive.places)
    if not keep:
        file.unlink()
    return folders


# Downloading


class _BrokenError(Exception):
    """The transfer ended before its time; another attempt may help."""


def fetch(url: str, file: Path, *, md5: str, patience: int = 8, first_wait: float = 1.0) -> None:
    """Download `url` to `file`, going on with what is there of it; does nothing if the file exists.

    Args:
        url: what to download.
        file: gets this name once it is complete and verified.
        md5: the sum that it must have.
        patience: give up after so many failures without progress.
        first_wait: seconds to wait after a failure; twice as long after each further one.

    Raises:
        ValueError: the sum is wrong; what was downloaded is deleted.
        ConnectionError: the server refuses, or patience is at its end. A later call goes on from there.
        OSError: writing fails.
    """
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    failures, reached = 0, 0
    while True:
        try:
            _receive(url, part)
            break
        except _BrokenError as error:
            size = part.stat().st_size if part.exists() else 0
            failures = 0 if size > reached else failures + 1
            reached = max(reached, size)
            if failures >= patience:
                raise ConnectionError(f"{url}: {error}; given up after {failures} attempts without progress") from error
            delay = min(first_wait * 2**failures, _LONGEST_WAIT)
            logger.warning("%s: %s; next attempt in %.0f s", url, error, delay)
        time.sleep(delay)
    found = _md5(part)
    if found != md5:
        part.unlink()
        raise ValueError(f"{part}: MD5 sum is {found}, not {md5}; deleted: start again for a fresh download")
    part.replace(file)


def _receive(url: str, part: Path) -> None:
    """One attempt to get all that is missing of a file."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with _open(urllib.request.Request(url, headers=headers)) as response:
        if response.status == 416:  # there is nothing behind what we have
            return
        if response.status == 200:  # from the beginning, whatever we asked for
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, smoothing=0.05)
        with part.open("ab" if have else "wb") as file, bar:
            while block := _read(response):
                file.write(block)
                bar.update(len(block))
                have += len(block)
    if total is not None and have < total:
        raise _BrokenError(f"the connection ended after {have} of {total} bytes")


def _open(request: urllib.request.Request) -> http.client.HTTPResponse | urllib.error.HTTPError:
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and request.has_header("Range"):
            return error
        error.close()
        message = f"the server answers {error.code} {error.reason}"
        if error.code not in (408, 429) and error.code < 500:
            raise ConnectionError(f"{request.full_url}: {message}") from error
        raise _BrokenError(message) from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(str(error) or type(error).__name__) from error


def _read(response: http.client.HTTPResponse | urllib.error.HTTPError) -> bytes:
    try:
        return response.read(_BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(str(error) or type(error).__name__) from error


def _md5(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)  # against broken transfers; OC20 publishes no other sums
    with file.open("rb") as stream, tqdm(total=file.stat().st_size, unit="B", unit_scale=True, desc="MD5") as bar:
        while block := stream.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


# Unpacking


def unpack(file: Path, root: Path, *, places: Mapping[str, str]) -> None:
    """Unpack the wanted folders of a tar file that are not in their places yet; what is there stays as it is.

    Args:
        file: tar file, compressed or not.
        root: folder below which things go.
        places: folder in the archive to folder below `root`.

    Raises:
        ValueError: the archive is damaged, lacks a folder, or has members that would land outside of it.
        OSError: writing fails.
    """
    wanted = {source: root / place for source, place in places.items() if not (root / place).exists()}
    temporary = root / f".unpacking-{file.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted call has left
    temporary.mkdir()
    try:
        with (
            file.open("rb") as stream,
            tqdm.wrapattr(stream, "read", total=file.stat().st_size, desc="unpacking") as counted,
            tarfile.open(fileobj=counted, mode="r|*") as tar,
        ):
            for member in tar:
                tar.extract(member, temporary, filter="data")
        for source in wanted:
            if not (temporary / source).is_dir():
                there = ", ".join(sorted(path.name for path in temporary.iterdir()))
                raise ValueError(f"{file}: has no folder {source} (at its top: {there})")
        os.sync()  # a folder must not get its name before its contents are on disk
        for source, target in wanted.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            (temporary / source).rename(target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
