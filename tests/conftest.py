"""Shared fixtures: small data and checkpoints made once a session, and the OC20 sample where there is one.

What takes seconds to import is imported in them: the process that hands out tests to others needs none of it.
"""

import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parent))
# Before torch is imported, here and in the processes that tests start: several of these share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Forked processes leave alone what they inherit: to collect a process group of gloo that a test has left would wait for
# ever, for threads that are not there.
os.register_at_fork(after_in_child=gc.freeze)


def pytest_report_header() -> str:
    """How large the project is."""
    sizes = {
        name: sum(len(path.read_bytes().splitlines()) for path in (ROOT / name).rglob("*.py"))
        for name in ("faenet_ocp", "faenet_ocp/benchmark", "tests")
    }
    return "lines: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items())


@pytest.fixture(scope="session")
def oc20_sample() -> Path:
    """Folder with a sample in OC20's formats: $FAENET_OCP_SAMPLE, else ../shared/oc20_sample."""
    folder = Path(os.environ.get("FAENET_OCP_SAMPLE", ROOT.parent / "shared" / "oc20_sample"))
    if not folder.is_dir():
        pytest.skip(f"no OC20 sample at {folder} (FAENET_OCP_SAMPLE points elsewhere)")
    return folder


@pytest.fixture(scope="session")
def small_is2re(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root folder with is2re/all/{train,val_*}/data.lmdb: 12 training systems, 4 per val split."""
    import small_data

    return small_data.write_is2re(tmp_path_factory.mktemp("small_is2re"))


@pytest.fixture(scope="session")
def small_s2ef(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root folder with s2ef/2M/train (two shards) and s2ef/all/val_*: energies and forces."""
    import small_data

    return small_data.write_s2ef(tmp_path_factory.mktemp("small_s2ef"))


@pytest.fixture(scope="session")
def is2re_checkpoint(small_is2re: Path) -> Path:
    """A small FAENet after two steps on `small_is2re`."""
    import small_runs

    return small_runs.train("is2re", small_is2re)


@pytest.fixture(scope="session")
def s2ef_checkpoint(small_s2ef: Path) -> Path:
    """A small FAENet after two steps on `small_s2ef`."""
    import small_runs

    return small_runs.train("s2ef", small_s2ef)


@pytest.fixture(scope="session", autouse=True)
def _runs_begin_and_end_at_once() -> Iterator[None]:
    """fairchem runs pip and others at the start of every run, and sleeps at its end: not for runs in this process.

    Some sleep there must be, and all of it in several ranks (`processes.sleep_as_long_as_fairchem`): a thread of gloo
    that still waits for the interpreter when its process group is taken apart would never end.
    """
    from fairchem.core.common import distutils
    from fairchem.core.launchers import slurm_launch

    shorter = mock.Mock(sleep=lambda seconds: time.sleep(seconds / 20))
    with mock.patch.object(slurm_launch, "write_environment_report"), mock.patch.object(distutils, "time", shorter):
        yield
