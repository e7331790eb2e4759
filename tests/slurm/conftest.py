"""A private SLURM cluster for the session."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "slurm_single_node.sh"

sys.path.insert(0, str(HERE))

from slurm_cluster import Cluster  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slurm: needs a SLURM cluster of its own (Debian, root)")


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _script(command: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SCRIPT), command], env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="session")
def slurm_folder() -> Iterator[Path]:
    """Folder of a running cluster; SLURM_CONF points at it as long as the session lasts."""
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-test-", dir="/tmp"))  # short: there is a socket in it
    folder.chmod(0o755)
    settings = {
        "SLURM_TEST_DIR": str(folder),
        "SLURM_TEST_CONTROLLER_PORT": _free_port(),
        "SLURM_TEST_NODE_PORT": _free_port(),
    }
    patch = pytest.MonkeyPatch()
    for name, value in settings.items():
        patch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith(("SLURM_JOB", "SBATCH_"))]:
        patch.delenv(name)
    try:
        try:
            started = _script("start", os.environ)
        except subprocess.TimeoutExpired:
            pytest.skip("SLURM cannot be installed or started here: it takes too long")
        if started.returncode != 0:
            pytest.skip(f"SLURM cannot be installed or started here: {started.stderr[-500:]}")
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(HERE))
        yield folder
    finally:
        _script("stop", os.environ)
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(slurm_folder: Path, small_is2re: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(tmp_path_factory.mktemp("jobs"), small_is2re)


@pytest.fixture(autouse=True)
def _cancel_on_failure(request: pytest.FixtureRequest) -> Iterator[None]:
    """No job of a test outlives it."""
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        subprocess.run(["scancel", *[job.id for job in cluster.jobs]], capture_output=True, check=False)
        cluster.jobs.clear()
