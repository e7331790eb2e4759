"""Mutated configurations, LMDB values and checkpoints: a clean error or a right result, and nothing ever runs.

Each case is decided by its number alone. LMDB values and checkpoints are read in processes of their own, so that one
that dies is noticed, with an audit hook that notices programs, connections and shell commands.
"""

import copy
import faulthandler
import multiprocessing
import os
import pickle
import random
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import processes
import small_data
from faenet_ocp.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from faenet_ocp.config.schema import build_config
from faenet_ocp.config.yaml import load_yaml, parse_overrides
from faenet_ocp.data import lmdb_files
from faenet_ocp.data.oc20 import OC20LmdbDataset

_PROCESSES = 2
_MEMORY = 4 << 30
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "subprocess.Popen",
    "socket.connect",
    "pty.spawn",
)


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


# ------------------------------------------------------------------------------------------ cases in processes


def _work(case: Callable[[random.Random], str], numbers: list[int], at: Any, queue: Any, folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    forbidden: list[str] = []
    sys.addaudithook(lambda event, _: forbidden.append(event) if event in _FORBIDDEN else None)
    outcomes: dict[str, int] = {}
    wrong = []
    for number in numbers:
        at.value = number
        try:
            outcome = case(random.Random(number))
        except ValueError:
            outcome = "error"
        except BaseException:
            outcome = "wrong"
            wrong.append(f"case {number}: {traceback.format_exc(limit=-4)}")
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    queue.put((outcomes, wrong[:5], forbidden))


def _fuzz(case: Callable[[random.Random], str], count: int, folder: Path) -> dict[str, int]:
    """How many cases had which outcome; fails if one was wrong, killed its process, or ran something."""
    context = multiprocessing.get_context("fork")
    queue, total = context.Queue(), {}
    workers = []
    for part in range(_PROCESSES):
        at = context.Value("q", -1)
        numbers = list(range(part, count, _PROCESSES))
        workers.append((context.Process(target=_work, args=(case, numbers, at, queue, folder)), at))
        workers[-1][0].start()
    for process, at in workers:
        while process.is_alive() and queue.empty():
            process.join(0.2)
        assert not queue.empty() or process.exitcode == 0, f"case {at.value} ended its process: {process.exitcode}"
        outcomes, wrong, forbidden = queue.get(timeout=5)
        assert not wrong, "\n".join(wrong)
        assert not forbidden, forbidden
        for name, number in outcomes.items():
            total[name] = total.get(name, 0) + number
    for process, at in workers:
        process.join(30)
        assert process.exitcode == 0, f"case {at.value} ended its process: {process.exitcode}"
    assert not (folder / "executed").exists()
    assert sum(total.values()) == count
    return total


def _mutate_bytes(value: bytes, rng: random.Random) -> bytes:
    """Flipped bits and bytes, pieces cut out, doubled, overwritten or exchanged; the end cut off."""
    data = bytearray(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        kind, at = rng.randrange(7), rng.randrange(len(data) or 1)
        length = min(rng.choice((1, 2, 4, 8, 64, 512)), len(data) - at)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 5:
            data[at : at + length] = rng.choice((b"\x00", b"\xff")) * length
        else:
            other = rng.randrange(len(data) or 1)
            data[at : at + length] = data[other : other + length]
    return bytes(data[: rng.randrange(len(data) + 1)]) if rng.random() < 0.05 else bytes(data)


# ------------------------------------------------------------------------------------------ configurations

_JUNK: list[Any] = [
    None, True, -1, 2**70, 1e308, float("nan"), "", "faenet", "\x00", "../..", "!!python/object/apply:os.system", [[]],
    [1, "a"], {"a": {"b": None}}, {1: 2}, "x" * 2000, [{}] * 5, {"energy": {"fn": "mae"}}, "12:00:00",
]  # fmt: skip


def _paths(content: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = content.keys() if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    return [path for key in keys for path in [(*prefix, key), *_paths(content[key], (*prefix, key))]]


def test_configurations(tmp_path: Path) -> None:
    """Values replaced by junk and keys left out, and bytes of the file damaged: an error, or what is read back."""
    path = processes.write_config(tmp_path / "base.yml", tmp_path)
    text, errors, count = path.read_text(), 0, 300
    base = build_config(load_yaml(path)).model_dump(mode="json")
    for number in range(count):
        rng, content = random.Random(number), copy.deepcopy(base)
        *parents, key = rng.choice(_paths(base))
        section = content
        for parent in parents:
            section = section[parent]
        if number % 3 == 0:
            section.pop(key)
        else:
            section[key] = copy.deepcopy(rng.choice(_JUNK))
        path.write_bytes(_mutate_bytes(text.encode(), rng) if number % 3 == 2 else yaml.safe_dump(content).encode())
        try:
            resolved = build_config(load_yaml(path)).model_dump(mode="json")
            assert build_config(resolved).model_dump(mode="json") == resolved
        except ValueError:
            errors += 1
    assert count // 20 < errors < count


def test_yaml_that_is_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "deep.yml").write_text("a: " + "[" * 3_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        load_yaml(tmp_path / "deep.yml")
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_overrides(["--optim.lr_initial=" + "[" * 3_000])


# ------------------------------------------------------------------------------------------ LMDB values


class _OneValue(OC20LmdbDataset):
    """The data set with a value of our choice under its first key."""

    def use(self, value: bytes) -> None:
        self.files[0].read = lambda position: value  # type: ignore[method-assign]


def _value_case(folder: Path) -> Callable[[random.Random], str]:
    fields = [
        small_data.make_fields(0, task="s2ef", layers=1),
        small_data.make_fields(1, task="s2ef_new", edges=False, layers=2),
        small_data.make_fields(2, task="is2re", layers=2) | {"forces": torch.zeros(10, 3)},
    ]
    del fields[2]["force"]
    values = [small_data.dump_record(f, layout=layout) for f in fields for layout in small_data.LAYOUTS]
    small_data.write_lmdb(folder / "data.lmdb", values)
    settings = {"src": str(folder / "data.lmdb"), "labels": ["energy", "forces"], "cutoff": 4.0, "max_neighbors": 10}
    payloads = [pickle.dumps(_Runs(), protocol=protocol) for protocol in range(6)]
    datasets: list[_OneValue] = []

    def case(rng: random.Random) -> str:
        if not datasets:
            datasets.append(_OneValue(settings))
        kind, value = rng.randrange(8), rng.choice(values)
        if kind == 0:  # a payload in the middle, whole
            at = rng.randrange(len(value))
            value = value[:at] + rng.choice(payloads)[:-1] + value[at:]
        elif kind == 1:  # another class or function by name
            names = (b"torch_geometric.data.data", b"_rebuild_tensor_v2", b"torch._utils", b"_load_from_bytes", b"Data")
            old = rng.choice(names)
            value = value.replace(old, rng.choice((b"os", b"posix", b"builtins", b"system", b"eval", b"subprocess")))
        else:
            value = _mutate_bytes(value, rng)
        datasets[0].use(value)
        sample = datasets[0][0]
        n = int(sample.natoms)
        assert sample.pos.shape == sample.forces.shape == (n, 3)
        assert sample.energy.shape == (1,)
        assert all(bool(torch.isfinite(t).all()) for t in (sample.pos, sample.cell, sample.forces, sample.energy))
        assert sample.edge_index.numel() == 0 or 0 <= int(sample.edge_index.min()) <= int(sample.edge_index.max()) < n
        assert len(sample.cell_offsets) == sample.edge_index.shape[1]
        return "right"

    return case


def test_length_keys(tmp_path: Path) -> None:
    """The other value that is read: a damaged one is an error, or means the right number."""
    good = pickle.dumps(3)
    for number in range(60):
        rng = random.Random(number)
        path = tmp_path / f"{number}.lmdb"
        small_data.write_items(path, {b"0": b"a", b"1": b"b", b"2": b"c", b"length": _mutate_bytes(good, rng) or b"?"})
        try:
            assert len(lmdb_files.LmdbFile(path)) in range(4)
        except ValueError:
            continue


# ------------------------------------------------------------------------------------------ checkpoints


def _checkpoint_case(folder: Path) -> Callable[[random.Random], str]:
    torch.manual_seed(0)
    state = {"config": {"list": [1, 2.5, None, "text"]}, "model": {f"w{i}": torch.randn(4, 5) for i in range(6)}}
    save_checkpoint(folder / "good.pt", state)
    torch.save({"format": FORMAT, "model": _Runs()}, folder / "evil.pt")
    values = [*[(folder / "good.pt").read_bytes()] * 8, (folder / "evil.pt").read_bytes(), pickle.dumps(_Runs())]

    def case(rng: random.Random) -> str:
        path, value = folder / f"{os.getpid()}.pt", rng.choice(values)
        path.write_bytes(_mutate_bytes(value, rng) if rng.random() < 0.95 else value)
        loaded = load_checkpoint(path)  # the file has a check sum: what can be read is what was written
        assert processes.differences(state, {key: loaded[key] for key in state}) == []
        return "right"

    return case


# ------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize("kind", [_value_case, _checkpoint_case])
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files(kind: Callable[[Path], Callable[[random.Random], str]], count: int, tmp_path: Path) -> None:
    outcomes = _fuzz(kind(tmp_path), count, tmp_path)
    assert min(outcomes["error"], outcomes["right"]) > count // 50, outcomes


def test_the_hook_and_the_processes_notice(tmp_path: Path) -> None:
    """Negative control: a case that runs something, one with another error, and one that dies."""

    def runs(rng: random.Random) -> str:
        return str(os.system("true"))

    def fails(rng: random.Random) -> str:
        return str(np.zeros(3)[5])

    def dies(rng: random.Random) -> str:
        faulthandler.disable()
        os.abort()

    with pytest.raises(AssertionError, match=r"os\.system"):
        _fuzz(runs, 4, tmp_path)
    with pytest.raises(AssertionError, match="IndexError"):
        _fuzz(fails, 4, tmp_path)
    with pytest.raises(AssertionError, match="ended its process: -6"):
        _fuzz(dies, 4, tmp_path)
