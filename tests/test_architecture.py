"""The structure: who may import whom, how large files get, what the library may not contain, what a wheel brings.

`docs/architecture.md` shows it, and is held to it here, as is every name of a file or function on the other pages.
"""

import ast
import re
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
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# What a package (or a file beside them) may import of the others; a dotted name is one file of a package. The picture
# in docs/architecture.md is drawn from it.
ALLOWED = {
    "common": "",
    "targets": "common",
    "frames": "common",
    "graph": "common",
    "config": "common targets",
    "models": "common targets frames graph data.fields",
    "kernels": "common models",
    "data": "common targets frames graph",
    "data.fields": "common targets",
    "prepare": "common graph data",
    "tasks": "common targets config data.fields",
    "checkpoint": "common",
    "build": "common config models kernels data",
    "evaluation": "common targets config data tasks checkpoint build",
    "training": "common targets config data tasks checkpoint build evaluation",
    "inference": "common targets config frames graph models data tasks checkpoint build evaluation",
    "evidence": "common targets config frames models data tasks build evaluation",
    "launch": "common config checkpoint tasks evaluation evidence training",  # tasks: the statistics in a checkpoint
    "benchmark": "*",
}
FAIRCHEM = (
    "models.fairchem models.frame_averaging data tasks training evaluation evidence launch build config inference"
)
FAIRCHEM += " benchmark"
TORCH_ONLY = "frames graph.vectors models"
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
    room = name if name in ALLOWED else name.split(".")[0]
    if room == "benchmark":
        assert "launch.cli" not in _own(path)
    else:
        assert not {other for other in _own(path) if not _is_in(other, f"{room} {ALLOWED[room]}")}


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
    lines = len(text.splitlines())
    assert lines <= LONGEST, "has it one subject?"
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


@pytest.mark.parametrize("init", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_every_package_says_in_three_lines_what_it_is_for(init: Path) -> None:
    text = ast.get_docstring(ast.parse(init.read_text())) or ""
    assert len(text.splitlines()) >= 3
    assert init.parent == PACKAGE or len(init.read_text().splitlines()) <= 40


def test_the_picture_shows_the_table() -> None:
    """Every arrow that does not follow from others, and no other."""
    needs = {name: set(allowed.split()) for name, allowed in ALLOWED.items() if name != "benchmark"}
    needs["data"].add("data.fields")

    def below(name: str) -> set[str]:
        return needs[name].union(*map(below, needs[name]))

    arrows = {
        (name, other)
        for name, others in needs.items()
        for other in others
        if not any(other in below(third) for third in others)
    }
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert set(re.findall(r"^  (\S+) --> (\S+)$", page, flags=re.MULTILINE)) == arrows
    assert needs.keys() <= set(re.findall(r"`([\w.]+)`", page.split("## The way")[0]))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_and_functions_that_a_page_names_exist(page: Path) -> None:
    """As `path.py` or `path.py: Class.method` in the package, `path.py::test_name` in the tests."""
    for path, name in re.findall(r"`([\w/]+\.py)(?:::? ?([\w.]+))?`", page.read_text()):
        found = [folder / path for folder in (ROOT, PACKAGE, ROOT / "tests") if (folder / path).is_file()]
        assert found, path
        assert not name or name in _defined(found[0]), f"{path}: {name}"


def _defined(path: Path) -> set[str]:
    """Names that a file defines: functions, classes, constants, and `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


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
