"""Compiled functions: kept between processes, and there also where nothing can be kept."""

import subprocess
import sys
from pathlib import Path

import numba
import pytest
from numba.core import caching

from faenet_ocp.common.numba import compiled

_MODULE = """
from faenet_ocp.common.numba import compiled

@compiled()
def twice(x):
    return 2 * x

twice(3)
print(sum(twice.stats.cache_hits.values()), sum(twice.stats.cache_misses.values()))
"""


def test_code_is_kept_for_the_next_process(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(_MODULE)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", f"import sys; sys.path += [{str(root)!r}, {str(tmp_path)!r}]; import module"]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() for _ in range(2)]
    assert runs == ["0 1", "1 0"]


def test_without_a_folder_it_is_compiled_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def increased(number: int) -> int:
        return number + 1

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(increased)
    assert compiled(numba.int64(numba.int64))(increased)(2) == 3


def test_division_by_zero_is_as_in_numpy() -> None:
    @compiled()
    def inverse(x):
        return 1.0 / x

    assert inverse(0.0) == float("inf")
