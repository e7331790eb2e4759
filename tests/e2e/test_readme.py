"""The README is executed: its commands in their order on small data, its Python, and its table of keys."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import ase.io
import pytest
import torch
import yaml
from pydantic import BaseModel

import processes
from e2e.test_own_structures import structures
from faenet_ocp.config.schema import Config
from faenet_ocp.launch.cli import main
from faenet_ocp.prepare import download
from s2ef_raw import write_raw

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("python ")]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))

HERE = {
    "<folder of *.extxyz.xz>": "raw",
    "/path/to/oc20": "data",
    "--num-workers 16": "--num-workers 1",
    "--num-gpus 4": "",
}
SMALL = shlex.split(
    "--model.hidden_channels=32 --model.num_filters=16 --model.num_interactions=1 --model.num_gaussians=8 "
    "--model.tag_hidden_channels=4 --model.pg_hidden_channels=4 --optim.batch_size=4 --optim.eval_batch_size=4 "
    "--optim.max_steps=2 --optim.warmup_steps=1 --optim.num_workers=0 --logger=none --cpu"
)


def _has(command: str, option: str) -> bool:
    """Own structures have no tags."""
    return not ("configs/own" in command and "tag_hidden" in option)


def test_commands_run(
    small_is2re: Path,
    small_s2ef: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On one core and a small network; only the download itself is not made."""
    shutil.copytree(small_is2re / "is2re", tmp_path / "data/is2re")
    shutil.copytree(tmp_path / "data/is2re/all/val_id", tmp_path / "data/is2re/all/test_id")
    shutil.copytree(small_s2ef / "s2ef/all", tmp_path / "data/s2ef/all")
    write_raw(tmp_path / "raw", 2, fixed="subsurface")
    for name in ("mine.extxyz", "other.extxyz"):
        ase.io.write(tmp_path / name, structures(30))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "download", lambda *_, **__: [Path("data")])
    caplog.set_level("INFO")
    for command in COMMANDS:
        for there, here in HERE.items():
            command = command.replace(there, here)
        program, *arguments = shlex.split(command, comments=True)[1:]
        if program == "main.py":
            small = [] if "--checkpoint" in arguments else [option for option in SMALL if _has(command, option)]
            assert main([*arguments, *small]) == 0, command
        else:
            limits = ["--max-steps", "2"] if program.endswith("relax.py") else []
            processes.run_script(Path(program).name, *arguments, *limits)
    assert len(COMMANDS) > 8
    assert "next: python scripts/prepare_s2ef.py --data-path data" in caplog.text
    for result in ("runs/is2re-all/results/table.md", "runs/s2ef/checkpoints/best.pt", "relaxed/val_id/metrics.json"):
        assert Path(result).is_file()
    assert list(Path("runs").glob("*/results/predictions/test_id.npz"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_answer(name: str, capsys: pytest.CaptureFixture) -> None:
    processes.run_script(name, "--help")
    assert "usage" in capsys.readouterr().out


def test_links_and_make_targets_exist() -> None:
    for path in re.findall(r"(?:\]\(|`)((?:docs|configs)/[\w/.]+|[A-Z]+\.md)[)`]", TEXT):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_the_model_example_trains(small_s2ef: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for kind, block in BLOCKS if kind == "python" and "register_network" in block]
    (example,) = [block for kind, block in BLOCKS if kind == "yaml"]
    assert code.count("\n") <= 30
    (tmp_path / "my_model.py").write_text(code)
    (tmp_path / "mine.yml").write_text(f"includes: [{ROOT / 'configs/s2ef/base.yml'}]\n{example}")
    monkeypatch.syspath_prepend(tmp_path)
    options = [option for option in SMALL if not option.startswith("--model.")] + ["--optim.lr_initial=0.001"]
    command = ["--config", str(tmp_path / "mine.yml"), f"--dataset.root={small_s2ef}", *options]
    assert main([*command, "--run-dir", str(tmp_path), "--identifier", "mine", "--optim.max_epochs=1"]) == 0
    results = json.loads((tmp_path / "mine/results/metrics.json").read_text())
    assert results["run"]["parameters"] == 119 * 64 + 4 * 64 + 2 * 65 * 64 + 65 + 65 * 3
    assert results["run"]["frames"]["method"] == "canonical"


def _keys(section: type[BaseModel]) -> Iterator[str]:
    """Dotted names of all keys; * for a name that is free."""
    for name, field in section.model_fields.items():
        yield name
        for inner, free in _sections(field.annotation):
            yield from (f"{name}.*.{key}" if free else f"{name}.{key}" for key in _keys(inner))


def _sections(annotation: Any, free: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, free
    for part in get_args(annotation):
        yield from _sections(part, free or getattr(annotation, "__origin__", None) is dict)


def test_keys_of_the_table_exist() -> None:
    known = set(_keys(Config)) | {"includes"}
    table = TEXT.split("## Configuration keys")[1].split("##")[0]
    rows = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    for names in rows:
        section = names[0].rpartition(".")[0]  # that ".key" in the same row belongs to
        for name in names:
            name = re.sub("<.*?>", "any", section + name if name.startswith(".") else name).removesuffix(".*")
            exists = any(re.fullmatch(key.replace("*", r"\w+"), name) for key in known)
            assert exists or name.startswith("model."), name  # options of a model are its own
    assert len(rows) > 20


def test_the_example_relaxes(s2ef_checkpoint: Path) -> None:
    """With the weights of a small model, and a loose force limit."""
    (code,) = [block for kind, block in BLOCKS if kind == "python" and "FAENetCalculator" in block]
    code = code.replace("runs/s2ef/checkpoints/best.pt", str(s2ef_checkpoint)).replace("fmax=0.05", "fmax=100.0")
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert torch.isfinite(torch.tensor(scope["slab"].get_potential_energy()))


def test_the_transform_example_is_found_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for kind, block in BLOCKS if kind == "python" and "import Transform" in block]
    (named,) = re.findall(r"transforms: (\{\S+: \{.*?\}\})", code)
    from faenet_ocp.data.transforms import Compose

    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "jitter.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert len(Compose(yaml.safe_load(named))) == 1
