"""The structure: who may import whom, how large files get, what the library may not contain, what a wheel brings.

`docs/architecture.md` says what each package is for.
"""

import ast
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "faenet_ocp"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
NAMES = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in FILES]

# What a package (or a file beside them) may import of the others; a dotted name is one file of a package.
ALLOWED = {
    "common": "",
    "targets": "common",
    "frame_rings": "",
    "frames": "common frame_rings",
    "graph": "common",
    "config": "common targets",
    "models": "common targets frames graph data.fields",
    "kernels": "common models",
    "data": "common targets frames graph",
    "prepare": "common graph data",
    "tasks": "common targets config data.fields",
    "checkpoint": "common",
    "build": "common config models kernels data",
    "evaluation": "common targets config data tasks checkpoint build",
    "training": "common targets config data tasks checkpoint build evaluation",
    "inference": "common targets config frames graph models data tasks checkpoint build evaluation",
    "launch": "common config checkpoint evaluation training",
    "benchmark": "*",
}
FAIRCHEM = (
    "models.fairchem models.frame_averaging data tasks training evaluation launch build config inference benchmark"
)
TORCH_ONLY = "frame_rings frames graph.vectors models"
LONGEST = 400


def _imports(path: Path) -> set[str]:
    """Names of all modules, and of what is taken from them, that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _own(path: Path) -> set[str]:
    """The files of this package that a file imports, as dotted names."""
    names = {name.removeprefix("faenet_ocp.") for name in _imports(path) if name.startswith("faenet_ocp.")}
    return {file for file in NAMES if any(name == file or name.startswith(f"{file}.") for name in names)}


def _is_in(file: str, places: str) -> bool:
    return any(file == place or file.startswith(f"{place}.") for place in places.split())


@pytest.mark.parametrize("path, name", zip(FILES, NAMES, strict=True), ids=NAMES)
def test_a_file_imports_only_what_its_package_may(path: Path, name: str) -> None:
    package = name.split(".")[0]
    allowed = ALLOWED[package]
    wrong = {other for other in _own(path) if not _is_in(other, f"{package} {allowed}")}
    if package == "benchmark":
        wrong = {other for other in _own(path) if other == "launch.cli"}
    assert not wrong


def test_no_file_imports_itself_through_others() -> None:
    graph = {name: _own(path) - {name} for path, name in zip(FILES, NAMES, strict=True)}
    tuple(TopologicalSorter(graph).static_order())  # CycleError names the circle


@pytest.mark.parametrize("path, name", zip(FILES, NAMES, strict=True), ids=NAMES)
def test_fairchem_is_where_it_is_needed_and_the_network_needs_torch_only(path: Path, name: str) -> None:
    imported = {module.split(".")[0] for module in _imports(path)}
    assert "fairchem" not in imported or _is_in(name, FAIRCHEM)
    adapters = ("models.fairchem", "models.frame_averaging")
    if _is_in(name, TORCH_ONLY) and name not in adapters:
        assert imported <= {"torch", "torch_geometric", "numpy", "faenet_ocp"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_are_short_and_have_no_print_eval_or_assert(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST, "has it one subject?"
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.Assert), node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "eval", "exec"), node.lineno
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{node.lineno}: bare except"


def test_speed_machinery_stays_in_kernels() -> None:
    words = ("knot", "shared_vectors", "opaque", "Remembered")
    for path, name in zip(FILES, NAMES, strict=True):
        if not _is_in(name, "kernels"):
            assert not [word for word in words if word in path.read_text()], name


def test_every_package_says_what_it_is_for() -> None:
    for init in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(init.read_text())), init


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


@pytest.mark.slow
def test_the_wheel_brings_configs_and_element_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    for path in (ROOT / "configs").rglob("*.yml"):
        assert f"faenet_ocp/{path.relative_to(ROOT)}" in names
    assert "faenet_ocp/common/elements.csv" in names
    assert any(name.endswith("entry_points.txt") for name in names)
