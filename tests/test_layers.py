"""The structure: who may import whom, what the library may not contain, what an installed wheel brings."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "faenet_ocp"
# Lower layers first; a file may import only from files listed before it.
LAYERS = [
    "versions options elements references graph frames restricted_pickle lmdb_writer extxyz machine_code".split(),
    "download edge_kernels edge_lists".split(),
    "edge_sums rank_norm bad_samples local_ranks log_setup slurm_config slurm_start demo_emt".split(),
    "record_objects record_templates record_tracing".split(),
    "checkpoint config demo_systems evaluation force_head lmdb_records loader message_passing transforms".split(),
    "compilation demo_files embedding lmdb_files loggers plots record_batch record_edges report sweep tasks".split(),
    "demo faenet lmdb_dataset packed_records prediction prepare_s2ef unit validation worker_pool".split(),
    "backbone packed_dataset reference_weights submission".split(),
    "build pack".split(),
    "calculator training".split(),
    "fairchem_export relaxation trainer".split(),
    "relaxation_run slurm_job".split(),
    ["slurm", "benchmark"],
    ["cli"],
]
TORCH_ONLY = set("frames elements edge_sums embedding message_passing faenet force_head rank_norm options".split())


def _imports(path: Path) -> set[str]:
    """Names of all modules that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _own(path: Path) -> set[str]:
    return {name.split(".")[1] for name in _imports(path) if name.startswith("faenet_ocp.")}


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", _modules(), ids=lambda path: path.stem)
def test_lower_files_never_import_higher_ones(path: Path) -> None:
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    assert path.stem in level, f"{path.name} is in no layer of this test"
    type_only = {"trainer"} if path.stem == "training" else set()  # for a type checker only
    too_high = {name for name in _own(path) - type_only if level[name] > level[path.stem]}
    assert not too_high


@pytest.mark.parametrize("name", sorted(TORCH_ONLY))
def test_the_network_and_frames_need_torch_only(name: str) -> None:
    allowed = {"torch", "torch_geometric", "numpy", "faenet_ocp"} | set(sys.stdlib_module_names)
    imported = {module.split(".")[0] for module in _imports(PACKAGE / f"{name}.py")}
    assert imported <= allowed
    assert _own(PACKAGE / f"{name}.py") <= TORCH_ONLY | {"edge_kernels"}  # which may be missing


_WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import torch
from faenet_ocp.models.faenet import FAENet
model = FAENet(hidden_channels=32, num_filters=8, num_gaussians=4, tag_hidden_channels=4, pg_hidden_channels=4)
edges = torch.tensor([[1, 0], [0, 1]])
vectors = torch.tensor([[1.0, 0.5, 0.0], [-1.0, -0.5, 0.0]])
inputs = dict(atomic_numbers=torch.tensor([1, 8]), edge_index=edges, edge_vec=vectors, batch=torch.zeros(2).long())
model(**inputs, num_systems=1, tags=torch.tensor([1, 2])).node_embedding.sum().backward()
assert not {"fairchem", "lmdb"} & set(sys.modules)
"""


def test_the_network_works_with_torch_alone() -> None:
    subprocess.run([sys.executable, "-c", _WITHOUT_NUMBA], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", _modules(), ids=lambda path: path.stem)
def test_the_library_has_no_print_eval_or_assert(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "eval", "exec"), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno}: bare except"


@pytest.mark.slow
def test_the_wheel_brings_configs_and_element_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    for path in (ROOT / "configs").rglob("*.yml"):
        assert f"faenet_ocp/{path.relative_to(ROOT)}" in names
    for path in (PACKAGE / "data").iterdir():
        assert f"faenet_ocp/data/{path.name}" in names
    assert any(name.endswith("entry_points.txt") for name in names)
