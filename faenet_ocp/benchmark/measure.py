"""Time and memory of functions, measured in turn: A B A B ..., never all of A and then all of B.

On a CPU two times are taken. Ratios are of processor time, which other users of a shared machine disturb least (with
one thread it is close to the time that an idle machine takes); wall time is kept beside it. On CUDA, events are used.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

_SHORT = 1.0
"""Seconds."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(functions: Sequence[Callable[[], Any]], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Times of each function, in seconds, and the peak of its memory above what it started from, in bytes.

    Every function runs twice before (the second run gives the memory), then all run in turn, `rounds` times; short ones
    twice each time, of which the second counts: the others have emptied the caches.

    Returns:
        for each `seconds` and `wall_seconds` (one a round), `peak_bytes` (None where unknown), and `speed_up` and
        `speed_up_wall`: how many times as fast as the first function, by medians.
    """
    results: list[dict[str, Any]] = []
    for function in functions:
        function()
        results.append({"seconds": [], "wall_seconds": [], "peak_bytes": _peak(function, device)})
    for _ in range(rounds):
        for function, result in zip(functions, results, strict=True):
            seconds, wall = _time(function, device)
            if wall < _SHORT:
                seconds, wall = _time(function, device)
            result["seconds"].append(seconds)
            result["wall_seconds"].append(wall)
    for result in results:
        result["speed_up"] = median(results[0]["seconds"]) / median(result["seconds"])
        result["speed_up_wall"] = median(results[0]["wall_seconds"]) / median(result["wall_seconds"])
    return results


def _time(function: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        seconds = start.elapsed_time(end) / 1000
        return seconds, seconds
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.process_time() - processor, time.perf_counter() - wall


def _peak(function: Callable[[], Any], device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _give_back_free_memory()
        _CLEAR.write_text("5")  # Linux: the peak of resident memory starts anew
        before = _resident("VmRSS")
        function()
        return _resident("VmHWM") - before
    except OSError:
        function()
        return None


def _give_back_free_memory() -> None:
    """Memory that C's allocator holds back would be used again and not be counted."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
