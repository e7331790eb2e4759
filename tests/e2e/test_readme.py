"""The README is executed: its commands parse and resolve, its scripts answer, its Python runs, its keys exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairchem.core.common.utils import recursive_dict_merge
from pydantic import BaseModel

import small_runs
from faenet_ocp.config.messages import section_in
from faenet_ocp.config.schema import Config, build_config
from faenet_ocp.config.yaml import find_config, load_yaml, parse_overrides
from faenet_ocp.launch.cli import make_parser

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("python main.py")]
MENTIONED = sorted(set(re.findall(r"scripts/\w+\.py", TEXT)))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse_and_resolve(command: str) -> None:
    flags, overrides = make_parser().parse_known_args(shlex.split(command)[2:])
    raw = load_yaml(find_config(flags.config or "configs/is2re/faenet.yml"))
    build_config(recursive_dict_merge(raw, parse_overrides(overrides)))


def test_commands_were_found() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("script", MENTIONED)
def test_scripts_answer(script: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:docs|configs)/[\w/.]+\.(?:md|yml)", TEXT))))
def test_files_that_are_named_exist(path: str) -> None:
    assert (ROOT / path).is_file()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def _exists(key: str) -> bool:
    section: object = Config
    for part in key.split("."):
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return True  # below a mapping whose keys are free: model options, splits, outputs
        if part not in section.model_fields:
            return False
        annotation = section.model_fields[part].annotation
        section = section_in(annotation) or annotation
    return True


def test_keys_of_the_table_exist() -> None:
    table = TEXT.split("## Configuration keys")[1].split("##")[0]
    checked = 0
    for row in table.splitlines():
        if not row.startswith("| `"):
            continue
        names = re.findall(r"`([^`]+)`", row.split("|")[1])
        section = names[0].rpartition(".")[0]  # that ".key" in the same row belongs to
        for name in names:
            name = section + name if name.startswith(".") else name
            if name == "includes" or "*" in name:
                continue
            assert _exists(name), name
            checked += 1
    assert checked > 30


def test_the_example_relaxes(small_s2ef: Path) -> None:
    """With the weights of a small model, and a loose force limit."""
    (code,) = [block for kind, block in BLOCKS if kind == "python" and "from_checkpoint" in block]
    checkpoint = small_runs.train("s2ef", small_s2ef)
    code = code.replace("runs/s2ef/checkpoints/best.pt", str(checkpoint)).replace("fmax=0.05", "fmax=100.0")
    scope: dict = {"torch": torch}
    exec(compile(code, "README.md", "exec"), scope)
    assert torch.isfinite(torch.tensor(scope["slab"].get_potential_energy()))


def test_the_transform_example_registers() -> None:
    (code,) = [block for kind, block in BLOCKS if kind == "python" and "register_transform" in block]
    from faenet_ocp.data.transforms import TRANSFORMS, Compose

    exec(compile(code, "README.md", "exec"), {"torch": torch})
    try:
        assert len(Compose({"jitter": {"stdev": 0.01}})) == 1
    finally:
        del TRANSFORMS["jitter"]
