"""The command line: `python main.py --config ...` and `faenet-ocp --config ...`."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

_JOB_FLAGS = ("run_dir", "identifier", "seed", "num_gpus", "num_nodes", "cpu", "amp", "debug", "print_every")


def make_parser() -> argparse.ArgumentParser:
    """The flags; everything else is `--section.key=value`."""
    parser = argparse.ArgumentParser(
        prog="faenet-ocp",
        description="Train FAENet (or another registered model) on OC20, evaluate it, predict with it.",
        epilog="Any key of the configuration: --section.key=value, e.g. --optim.batch_size=64 --dataset.root=DIR",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", "--config-yml", metavar="YAML", help="configuration file; needed except with --checkpoint")
    add("--mode", choices=("train", "validate", "predict"), default="train")
    add("--checkpoint", metavar="PT", help="weights to validate or predict with, or to begin training with")
    job = parser.add_argument_group("run", "each of these is also a key of the section job:")
    job.add_argument("--run-dir", metavar="DIR", help="folder that holds the runs (default: runs)")
    job.add_argument(
        "--identifier", metavar="NAME", help="name of the run's folder; the same name goes on with that run"
    )
    job.add_argument("--seed", type=int)
    job.add_argument("--num-gpus", type=int, metavar="N", help="ranks on each node, with --cpu too")
    job.add_argument("--num-nodes", type=int, metavar="N")
    job.add_argument("--cpu", action="store_true", default=None, help="do not use a GPU")
    job.add_argument("--amp", action="store_true", default=None, help="bfloat16 autocast")
    job.add_argument("--debug", action="store_true", default=None)
    job.add_argument("--print-every", type=int, metavar="N", help="steps between reports")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        exit status: 0 done, 2 wrong arguments, configuration or input (one message on stderr).
    """
    flags, overrides = make_parser().parse_known_args(argv)
    _set_up_logging()
    try:
        return _run(flags, overrides)
    except ValueError as error:
        if flags.debug:
            raise
        sys.stderr.write(f"error: {error}\n")
        return 2


def _run(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    from fairchem.core.common.registry import registry  # these imports take seconds: not for --help

    from faenet_ocp import trainer as _registers  # noqa: F401
    from faenet_ocp.config import build_config, nearest

    raw = _merge(flags, overrides)
    config = build_config(raw)
    try:
        trainer_class = registry.get_trainer_class(config.trainer)
    except (RuntimeError, KeyError, ValueError) as error:
        known = [str(name) for name in registry.mapping["trainer_name_mapping"]]
        raise ValueError(f"trainer: {config.trainer!r} is not registered{nearest(config.trainer, known)}") from error
    trainer = trainer_class(config, mode=flags.mode, checkpoint=flags.checkpoint)
    trainer.check()
    folder = _run_folder(config, flags.mode)
    name = "config.yml" if flags.mode == "train" else f"config_{flags.mode}.yml"
    _write_config(folder / name, config.model_dump(mode="json", exclude_none=True))
    _launch(trainer.build(folder), folder)
    return _show(folder, flags.mode)


def _merge(flags: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """File (or the checkpoint's configuration), overrides and flags, the later ones winning."""
    import torch
    from fairchem.core.common.utils import recursive_dict_merge

    from faenet_ocp.checkpoint import load_checkpoint
    from faenet_ocp.config import find_config, load_yaml, parse_overrides

    if flags.config is not None:
        raw = load_yaml(find_config(flags.config))
    elif flags.checkpoint is not None and flags.mode != "train":
        raw = load_checkpoint(flags.checkpoint)["config"]
        raw["job"].pop("identifier", None)
    else:
        raise ValueError("--config: missing; e.g. --config configs/is2re/faenet.yml (--help lists the flags)")
    if flags.checkpoint is not None:
        flags.checkpoint = str(Path(flags.checkpoint).resolve())
    raw = recursive_dict_merge(raw, parse_overrides(overrides))
    job = {name: getattr(flags, name) for name in _JOB_FLAGS if getattr(flags, name) is not None}
    raw = recursive_dict_merge(raw, {"job": job})
    if not raw["job"].get("cpu") and not torch.cuda.is_available():
        logging.info("no GPU is available here: running on the CPU")
        raw["job"]["cpu"] = True
    return raw


def _run_folder(config: Any, mode: str) -> Path:
    name = config.job.identifier or datetime.now().strftime(f"%Y-%m-%d-%H-%M-%S-{mode}")
    folder = (Path(config.job.run_dir) / name).resolve()
    if mode == "validate" and (folder / "results" / "metrics.json").exists():
        raise ValueError(f"{folder} has results already; choose another --identifier")
    return folder


def _write_config(path: Path, content: dict[str, Any]) -> None:
    """Writes the resolved configuration; where a run goes on, says which keys changed."""
    if path.is_file():
        before, now = _flat(yaml.safe_load(path.read_text())), _flat(content)
        for key in sorted(set(before) | set(now)):
            if before.get(key) != now.get(key):
                logging.warning("%s: the run began with %r, goes on with %r", key, before.get(key), now.get(key))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    return {
        key: value
        for name, part in content.items()
        for key, value in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _launch(job_and_runner: dict[str, Any], folder: Path) -> None:
    """Hands over to fairchem: in this process for one rank, through torch elastic for more."""
    from fairchem.core._cli import get_canonical_config
    from fairchem.core.common import distutils
    from fairchem.core.launchers.api import JobConfig
    from fairchem.core.launchers.slurm_launch import local_launch
    from omegaconf import OmegaConf

    merged = OmegaConf.merge({"job": OmegaConf.structured(JobConfig)}, job_and_runner)
    config = get_canonical_config(merged)
    os.makedirs(config.job.metadata.log_dir, exist_ok=True)
    OmegaConf.save(config, config.job.metadata.config_path)
    try:
        local_launch(config, config.job.metadata.log_dir)
    finally:
        distutils.cleanup()


def _show(folder: Path, mode: str) -> int:
    """Prints the table and, as the last line, where everything lies."""
    table = folder / "results" / "table.md"
    if mode != "predict" and table.is_file():
        sys.stdout.write(f"\n{table.read_text(encoding='utf-8')}\n")
    sys.stdout.write(f"results: {folder}\n")
    return 0


def _set_up_logging() -> None:
    """Plain lines of ours; of the host's only warnings, whose start-up would bury them."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(
        lambda record: record.levelno >= logging.WARNING or os.sep + "faenet_ocp" + os.sep in record.pathname
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)  # fairchem's own call
