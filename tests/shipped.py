"""The shipped configurations: those of runs, and sweeps of several."""

from pathlib import Path

from faenet_ocp.config.yaml import load_yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
_ALL = [path for path in sorted(CONFIGS.rglob("*.yml")) if path.name != "base.yml"]
SWEEPS = [path for path in _ALL if "runs" in load_yaml(path)]
RUNS = [path for path in _ALL if path not in SWEEPS]


def name_of(path: Path) -> str:
    """In the names of tests."""
    return f"{path.parent.name}-{path.stem}"
