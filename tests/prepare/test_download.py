"""Downloading and unpacking, against an HTTP server on this machine that misbehaves on demand."""

import hashlib
import io
import logging
import re
import runpy
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import processes
from faenet_ocp.prepare import download as module
from faenet_ocp.prepare.download import IS2RE, S2EF, Archive, download, fetch, find_archive, unpack

CONTENT = np.random.default_rng(0).bytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves `content` under any path, as badly as told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.breaks: list[int] = []  # of each coming answer: how many bytes of it are sent
        self.statuses: list[int] = []  # of each coming answer: an error status instead
        self.knows_ranges = True
        self.stall = threading.Event()  # set: after a break the connection stays open
        self.ranges: list[str | None] = []  # asked for so far
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.tar"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers["Range"]
        server.ranges.append(wanted)
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        size, start = len(server.content), 0
        if wanted and server.knows_ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            if start >= size:
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        body = server.content[start:]
        if server.breaks:
            body = body[: server.breaks.pop(0)]
        server.sent += len(body)  # before the client can have all of it
        self.wfile.write(body)
        if len(body) < size - start:
            self.wfile.flush()
            while server.stall.is_set():
                time.sleep(0.01)
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.stall.clear()
        server.shutdown()
        thread.join()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def get(server: Server, file: Path, *, patience: int = 4) -> None:
    fetch(server.url, file, md5=md5(CONTENT), patience=patience, first_wait=0.001)


def assert_complete(file: Path) -> None:
    assert file.read_bytes() == CONTENT
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no partial file


# Downloading


def test_goes_on_where_the_connection_broke_and_downloads_once(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "down" / "file.tar"
    server.breaks = [100_000, 1, 50_000]
    for _ in range(2):
        get(server, file)
        assert_complete(file)
    assert server.ranges == [None, "bytes=100000-", "bytes=100001-", "bytes=150001-"]
    assert server.sent == len(CONTENT)  # nothing was sent twice


def test_a_killed_process_leaves_what_a_later_call_goes_on_with(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT * 12
    server.breaks = [3_000_000]
    server.stall.set()
    file, part = tmp_path / "file.tar", tmp_path / "file.tar.part"
    code = (
        "import sys; from pathlib import Path; from faenet_ocp.prepare.download import fetch; "
        "fetch(sys.argv[1], Path(sys.argv[2]), md5=sys.argv[3])"
    )
    arguments = [server.url, str(file), md5(server.content)]
    process = processes.start(arguments, program=[sys.executable, "-c", code], cwd=processes.ROOT)
    processes.wait_for(lambda: part.exists() and part.stat().st_size > 1_000_000)
    process.kill()
    assert process.wait() < 0
    server.stall.clear()
    have = part.stat().st_size
    assert 1_000_000 < have < 3_600_000 and not file.exists()
    fetch(server.url, file, md5=md5(server.content))
    assert file.read_bytes() == server.content
    assert server.ranges == [None, f"bytes={have}-"]


def test_a_server_without_ranges_starts_afresh(server: Server, tmp_path: Path) -> None:
    server.breaks = [100_000, 200_000]
    server.knows_ranges = False
    get(server, tmp_path / "file.tar")
    assert_complete(tmp_path / "file.tar")
    assert server.sent == 600_000


def test_wrong_bytes_are_refused_and_deleted(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(ValueError, match=f"MD5 sum is {md5(server.content)}, not {md5(CONTENT)}"):
        get(server, tmp_path / "file.tar")
    assert list(tmp_path.iterdir()) == []
    server.content = CONTENT
    get(server, tmp_path / "file.tar")
    assert_complete(tmp_path / "file.tar")


def test_a_complete_partial_file_is_only_verified(server: Server, tmp_path: Path) -> None:
    """The process was killed after the last byte."""
    file, part = tmp_path / "file.tar", tmp_path / "file.tar.part"
    part.write_bytes(CONTENT)
    get(server, file)
    assert_complete(file)
    assert server.sent == 0
    file.unlink()
    part.write_bytes(CONTENT + b"too much")
    with pytest.raises(ValueError, match=r"MD5 sum is .* start again"):
        get(server, file)
    assert not part.exists()


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429, 500]
    get(server, tmp_path / "file.tar")
    assert_complete(tmp_path / "file.tar")
    server.statuses = [404]
    with pytest.raises(ConnectionError, match="404"):
        get(server, tmp_path / "other.tar")
    assert len(server.ranges) == 5


def test_gives_up_without_progress_and_waits_longer_each_time(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    server.breaks = [1000] + [0] * 100
    with pytest.raises(ConnectionError, match="ended after 1000 of 300000 bytes; given up after 7 attempts"):
        fetch(server.url, tmp_path / "file.tar", md5=md5(CONTENT), patience=7, first_wait=4.0)
    assert waits == [4, 8, 16, 32, 60, 60, 60]
    server.breaks.clear()
    get(server, tmp_path / "file.tar")  # a later call goes on
    assert_complete(tmp_path / "file.tar")
    assert server.ranges[-1] == "bytes=1000-"


# Unpacking


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w:gz" if file.suffix == ".gz" else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_unpacks_into_the_usual_layout(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    test, top = "s2ef_test_lmdbs", "is2res_train_val_test_lmdbs"
    splits = ("test_id", "test_ood_ads", "test_ood_cat", "test_ood_both")
    for archive, name, members in (
        (S2EF["200k"], "raw.tar", {"s2ef_train_200K/README": b"a", "s2ef_train_200K/s2ef_train_200K/0.txt.xz": b"b"}),
        (S2EF["test"], "test.tar.gz", {f"{test}/test_data/s2ef/all/{split}/data.0000.lmdb": b"c" for split in splits}),
        (IS2RE, "is2re.tar.gz", {f"{top}/README": b"d", f"{top}/data/is2re/all/train/data.lmdb": b"e"}),
    ):
        unpack(write_tar(tmp_path / name, members), root, places=archive.places)
    assert tree(root) == {
        "s2ef_raw/s2ef_train_200K/README": b"a",
        "s2ef_raw/s2ef_train_200K/s2ef_train_200K/0.txt.xz": b"b",
        **{f"s2ef/all/{split}/data.0000.lmdb": b"c" for split in splits},
        "is2re/all/train/data.lmdb": b"e",
    }
    assert {path.name for path in root.iterdir()} == {"is2re", "s2ef", "s2ef_raw"}


def test_interrupted_unpacking_is_redone_and_never_overwrites(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {f"a/{folder}/{number}": b"new" for folder in "xy" for number in range(5)})
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "0").write_bytes(b"old")
    left = tmp_path / ".unpacking-a.tar" / "a" / "y"
    left.mkdir(parents=True)
    (left / "0").write_bytes(b"ne")
    (left / "stray").write_bytes(b"?")
    unpack(file, tmp_path, places={"a/x": "x", "a/y": "y"})
    assert tree(tmp_path / "x") == {"0": b"old"}
    assert tree(tmp_path / "y") == {str(number): b"new" for number in range(5)}
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y", "a.tar"}


@pytest.mark.parametrize(("name", "link"), [("a/../../evil", None), ("../evil", None), ("a/evil", "/etc")])
def test_members_and_links_outside_are_refused(tmp_path: Path, name: str, link: str | None) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
        tar.addfile(info)
    with pytest.raises(ValueError, match="evil"):
        unpack(tmp_path / "a.tar", root, places={"a": "a"})
    assert list(root.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "root"}


def test_a_damaged_or_unexpected_archive_is_refused(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar.gz", {"a/x": CONTENT})
    with pytest.raises(ValueError, match=r"has no folder b \(at its top: a\)"):
        unpack(file, tmp_path, places={"a": "a", "b": "b"})
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unpack(file, tmp_path, places={"a": "a"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


# All of it


def test_published_archives() -> None:
    archives = [*S2EF.values(), IS2RE]
    assert len({archive.md5 for archive in archives}) == len({archive.url for archive in archives}) == 10
    assert all(re.fullmatch("[0-9a-f]{32}", archive.md5) for archive in archives)
    assert find_archive("s2ef", "val_ood_both").url.endswith("/s2ef_val_ood_both.tar")
    assert find_archive("s2ef", "2M").prepared == "s2ef/2M/train"
    assert find_archive("is2re", None) is IS2RE
    for task, split in (("s2ef", None), ("s2ef", "3M"), ("is2re", "all"), ("is2rs", None)):
        with pytest.raises(ValueError, match="200k, 2M"):
            find_archive(task, split)


def make_archive(server: Server, folder: Path) -> Archive:
    name = "s2ef_train_2M"
    file = write_tar(folder / f"{name}.tar", {f"{name}/{name}/0.txt.xz": CONTENT})
    server.content = file.read_bytes()
    file.unlink()
    url = server.url.replace("file.tar", f"{name}.tar")
    return Archive(url, md5(server.content), S2EF["2M"].places, S2EF["2M"].prepared)


@pytest.mark.parametrize("keep", [True, False])
def test_downloads_verifies_and_unpacks(server: Server, tmp_path: Path, keep: bool) -> None:
    archive = make_archive(server, tmp_path)
    server.breaks = [10_000]
    root = tmp_path / "data"
    (folder,) = download(archive, root, keep=keep)
    assert tree(folder) == {"s2ef_train_2M/0.txt.xz": CONTENT}
    assert folder == root / "s2ef_raw" / "s2ef_train_2M"
    assert [path.name for path in (root / "downloads").iterdir()] == (["s2ef_train_2M.tar"] if keep else [])
    requests = len(server.ranges)
    assert download(archive, root) == [folder]
    assert len(server.ranges) == requests


def test_command_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    script = runpy.run_path(str(processes.ROOT / "scripts" / "download_oc20.py"))["main"]
    monkeypatch.setitem(module.S2EF, "2M", make_archive(server, tmp_path))
    arguments = ["--task", "s2ef", "--split", "2M", "--data-path", str(tmp_path / "data")]
    server.statuses = [403]
    with pytest.raises(SystemExit, match="403"):
        script(arguments)
    script(arguments)
    source = tmp_path / "data" / "s2ef_raw" / "s2ef_train_2M" / "s2ef_train_2M"
    assert f"--data-path {source} --out-path {tmp_path}/data/s2ef/2M/train" in caplog.text
    assert tree(source) == {"0.txt.xz": CONTENT}
    with pytest.raises(SystemExit, match="200k, 2M"):
        script(["--task", "s2ef"])
    with pytest.raises(SystemExit):
        script(["--task", "s2ef", "--split", "5M"])
