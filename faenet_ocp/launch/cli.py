"""The command line: `python main.py --config ...` and `faenet-ocp --config ...`."""

import argparse
import contextlib
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from faenet_ocp.common import log_setup
from faenet_ocp.common.checks import nearest
from faenet_ocp.common.files import exclusive, expand_path, write_json, write_text
from faenet_ocp.config.messages import without_removed
from faenet_ocp.config.schema import Config, build_config
from faenet_ocp.config.yaml import find_config, load_yaml, merge, parse_overrides, parse_value
from faenet_ocp.launch import local_ranks, sweep

if TYPE_CHECKING:
    from faenet_ocp.training.trainer import FAENetTrainer

_JOB_FLAGS = "run_dir identifier seed num_gpus num_nodes cpu amp debug print_every output_format".split()
_COMMENT = "# "
_SLURM_FLAGS = ("partition", "account", "qos", "time", "mem_gb", "cpus_per_task")


class _Run(NamedTuple):
    """A checked run that can begin; `values` and `row` are those of a sweep, `changes` to a run that goes on."""

    config: Config
    trainer: "FAENetTrainer"
    folder: Path
    values: dict[str, Any]
    changes: list[str]
    row: str = ""


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
    add(
        "--mode",
        choices=("train", "validate", "predict", "symmetry", "check", "benchmark"),
        default="train",
        help="symmetry compares predictions of systems and moved copies; check reads all data and lists what cannot be "
        "used; benchmark takes the arguments of its own program",
    )
    add("--checkpoint", metavar="PT", help="weights to validate or predict with, or to begin training with")
    add(
        "--symmetry-dim",
        type=int,
        choices=(2, 3),
        help="of --mode symmetry: about z, or any axis (default: frames.dim)",
    )
    add("--max-systems", type=int, metavar="N", help="of --mode symmetry: a random subset of this size (default 256)")
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
    job.add_argument(
        "--output-format",
        choices=("npz", "extxyz"),
        help="of predictions; extxyz: structures with them, beside npz",
    )
    add(
        "--sweep-yml",
        metavar="YAML",
        help="grid of values, or named runs (docs/models.md): all of them, then one table",
    )
    slurm = parser.add_argument_group("SLURM", "--slurm-... are also keys of the section slurm:")
    add = slurm.add_argument
    add("--submit", action="store_true", help="hand the run to SLURM; a sweep becomes an array of jobs")
    add("--dry-run", action="store_true", help="with --submit: check all, print what would be submitted, and end")
    add("--slurm-partition", metavar="NAME")
    add("--slurm-account", metavar="NAME")
    add("--slurm-qos", metavar="NAME")
    add("--slurm-time", metavar="TIME", help="time limit of one start: M, H:M:S, D-H:M:S, ...")
    add("--slurm-timeout", metavar="HOURS", dest="slurm_time", type=lambda text: f"{int(text)}:00:00")
    add("--slurm-mem", metavar="GB", dest="slurm_mem_gb", type=float, help="memory of each node")
    add("--slurm-cpus", metavar="N", dest="slurm_cpus_per_task", type=int, help="CPUs of each rank")
    add("--slurm-extra", metavar="OPTION=VALUE", action="append", help="any other option of sbatch; repeatable")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        exit status: 0 done, 1 failed on the way, 2 wrong arguments, configuration or input (one message on stderr).

    Raises:
        SystemExit: stopped by a signal; 130 after Ctrl-C, 143 after SIGTERM.
    """
    flags, overrides = make_parser().parse_known_args(argv)
    log_setup.set_up_logging()
    try:
        if flags.mode == "benchmark":
            return _benchmark(flags, overrides)
        return _run(flags, overrides)
    except (ValueError, OSError, FloatingPointError, local_ranks.RunError) as error:
        if flags.debug:
            raise
        sys.stderr.write(f"error: {error}\n")
        return local_ranks.WRONG_INPUT if isinstance(error, ValueError) else 1


def _benchmark(flags: argparse.Namespace, arguments: Sequence[str]) -> int:
    defaults = vars(make_parser().parse_args([])) | {"mode": "benchmark"}
    given = [name for name, value in vars(flags).items() if value != defaults[name]]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')}: has no meaning with --mode benchmark")
    import_module("faenet_ocp.benchmark.__main__").main(arguments)  # by name: no part of a run
    return 0


def _run(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    if flags.dry_run and not flags.submit:
        raise ValueError("--dry-run: says what --submit would do; give both")
    for name in ("symmetry_dim", "max_systems"):
        if getattr(flags, name) is not None and flags.mode != "symmetry":
            raise ValueError(f"--{name.replace('_', '-')}: is for --mode symmetry")
    if flags.mode == "check" and (flags.submit or flags.sweep_yml):
        raise ValueError("--mode check: reads the data of one configuration, here; no --submit and no --sweep-yml")
    given = _given(flags, overrides)
    runs = [_prepare(_merge(flags, given), flags)] if flags.sweep_yml is None else _prepare_sweep(flags, given)
    if flags.mode == "check":
        return _check_data(runs[0])
    if flags.submit:
        return _submit(runs, flags)
    if flags.sweep_yml is None:
        return _run_here(runs[0], flags.mode)
    return _run_sweep(runs, flags)


def _prepare(
    raw: dict[str, Any], flags: argparse.Namespace, values: dict[str, Any] | None = None, row: str = ""
) -> _Run:
    """Validates a configuration and all that it names; nothing is written."""
    config = build_config(raw)  # before what takes seconds to import
    import torch
    from fairchem.core.common.registry import registry

    import_module("faenet_ocp.training.trainer")  # registers everything
    if not (config.job.cpu or flags.submit or torch.cuda.is_available()):
        if config.job.num_gpus > 1:
            raise ValueError(
                f"job.num_gpus: {config.job.num_gpus}, but no GPU is here; --cpu: as many ranks on the CPU"
            )
        logging.info("no GPU is available here: running on the CPU")
        config = config.model_copy(update={"job": config.job.model_copy(update={"cpu": True})})
    if not (config.job.cpu or flags.submit) and config.job.num_gpus > torch.cuda.device_count():
        raise ValueError(f"job.num_gpus: {config.job.num_gpus}, but {torch.cuda.device_count()} GPUs are here")
    try:
        trainer_class = registry.get_trainer_class(config.trainer)
    except (RuntimeError, KeyError, ValueError) as error:
        known = [str(name) for name in registry.mapping["trainer_name_mapping"]]
        raise ValueError(f"trainer: {config.trainer!r} is not registered{nearest(config.trainer, known)}") from error
    trainer = trainer_class(config, mode=flags.mode, checkpoint=flags.checkpoint)
    trainer.check()
    folder = _run_folder(config, flags.mode)
    return _Run(config, trainer, folder, values or {}, trainer.check_resumption(folder), row)


def _prepare_sweep(flags: argparse.Namespace, given: dict[str, Any]) -> list[_Run]:
    """A sweep that names its configuration is called by its file: the same command goes on with it."""
    read, runs = sweep.load_sweep(flags.sweep_yml), []
    if flags.config is None and read.config is not None:
        flags.config = str(read.config)
    own = all(isinstance(run, Path) for run in read.runs.values()) and bool(read.runs)
    common = None if own and flags.config is None else _merge(flags, given)
    named = read.path.stem if read.runs else datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    flags.paper = read.paper
    flags.identifier = (common or given).get("job", {}).get("identifier") or named
    for row, values, element in sweep.expand(read, common, given, flags.identifier):
        try:
            runs.append(_prepare(element, flags, values, row))
        except ValueError as error:
            raise ValueError(f"{element['job']['identifier']}, {values}: {error}") from error
    return runs


def _check_data(run: _Run) -> int:
    """Reads every record of every split, and lists those that cannot be used."""
    unusable = run.trainer.unusable_records()
    for split, reasons in unusable.items():
        for reason in reasons:
            sys.stdout.write(f"{split}: {reason}\n")
    count = sum(len(reasons) for reasons in unusable.values())
    sys.stdout.write(f"{', '.join(unusable)}: {count or 'no'} unusable record{'' if count == 1 else 's'}\n")
    return local_ranks.WRONG_INPUT if count else 0


def _run_here(run: _Run, mode: str) -> int:
    with _owned(run.folder):
        _write_configs(run, mode)
        local_ranks.launch(local_ranks.fairchem_config(run.trainer.build(run.folder)))
    return _show(run.folder, mode)


def _run_sweep(runs: Sequence[_Run], flags: argparse.Namespace) -> int:
    """One run after another; one that fails does not keep the others from running. Then one table of all."""
    failed = []
    for run in runs:
        logging.info("%s: %s", run.folder.name, run.values)
        try:
            _run_here(run, flags.mode)
        except Exception:
            if len(runs) == 1:
                raise
            logging.exception("%s failed", run.folder.name)
            failed.append(run.folder.name)
    if flags.mode in ("train", "validate"):
        _compare([run for run in runs if run.folder.name not in failed], flags.identifier, flags.paper)
    if failed:
        sys.stderr.write(f"error: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}\n")
    return 1 if failed else 0


def _compare(runs: Sequence[_Run], identifier: str, paper: str | None) -> None:
    """Writes the table of a sweep's results and its plot, and prints the table."""
    from faenet_ocp.evaluation.comparison import plot_comparison, render_comparison
    from faenet_ocp.evaluation.results import read_results

    by_row: dict[str, list[dict[str, Any]]] = {}
    varied = [
        key for key in (runs[0].values if runs else ()) if any(run.values[key] != runs[0].values[key] for run in runs)
    ]
    for run in runs:  # those that differ in their seed alone are one row
        row = " ".join([run.row, *(f"{key}={run.values[key]}" for key in varied if key != "job.seed")])
        by_row.setdefault(row, []).append(read_results(run.folder / "results" / "metrics.json"))
    if not by_row:
        return
    folder = runs[0].folder.with_name(f"{identifier}_sweep")
    table = render_comparison(by_row, ablations=paper is not None)
    write_json(folder / "results.json", by_row)
    write_text(folder / "table.md", table)
    plot_comparison(by_row, folder / "trade_off.png")
    sys.stdout.write(f"\n{table}\nresults: {folder}\n")


def _submit(runs: Sequence[_Run], flags: argparse.Namespace) -> int:
    """Hands the runs to SLURM and says where their logs will be; with --dry-run, what would be handed over."""
    from faenet_ocp.launch.slurm import submit as slurm

    is_sweep, first = flags.sweep_yml is not None, runs[0]
    folder = first.folder.with_name(f"{flags.identifier}_sweep") if is_sweep else first.folder
    for run in runs:
        slurm.check_same_request(first.config, run.config)
        if active := slurm.active_jobs(run.folder):
            raise ValueError(f"{run.folder} is in the queue already, as job {', '.join(active)}; scancel it first")
    submission = slurm.Submission(first.config, name=folder.name, folder=folder / "slurm")
    if flags.dry_run:
        values = "".join(f"run folder: {run.folder} {run.values or ''}".rstrip() + "\n" for run in runs)
        answer = submission.test(len(runs))
        says = f"SLURM says: {answer}\n" if answer else ""
        sys.stdout.write(f"{submission.script(len(runs))}\n{values}{says}nothing was submitted\n")
        return 0
    for run in runs:
        with _owned(run.folder):
            _write_configs(run, flags.mode)
    prepared = {run.folder: slurm.for_slurm(run.trainer.build(run.folder), run.config) for run in runs}
    jobs = submission.submit({path: local_ranks.fairchem_config(job) for path, job in prepared.items()})
    for run, job in zip(runs, jobs, strict=True):
        log = shlex.quote(str(submission.log(job)))
        sys.stdout.write(f"job {job}\n  run folder: {run.folder}\n  follow: tail -F {log}\n")
    return 0


def _merge(flags: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """File (or the checkpoint's configuration) and what the command line gives, which wins."""
    if flags.config is not None:
        raw = load_yaml(find_config(flags.config))
    elif flags.checkpoint is not None and flags.mode != "train":
        from faenet_ocp.checkpoint import load_checkpoint

        raw = without_removed(load_checkpoint(flags.checkpoint)["config"])
        raw["job"].pop("identifier", None)
        raw["evaluation_metrics"]["primary_metric"].pop("split", None)  # of training; splits may be others now
    else:
        raise ValueError("--config: missing; e.g. --config configs/is2re/faenet.yml (--help lists the flags)")
    if flags.checkpoint is not None:
        flags.checkpoint = str(Path(expand_path(flags.checkpoint)).resolve())
    return merge(raw, given)


def _given(flags: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides and flags as keys of the configuration, flags winning."""
    job = {name: getattr(flags, name) for name in _JOB_FLAGS if getattr(flags, name) is not None}
    given = {name: getattr(flags, f"slurm_{name}") for name in _SLURM_FLAGS}
    slurm: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for option in flags.slurm_extra or ():
        name, equals, value = option.removeprefix("--").partition("=")
        slurm.setdefault("additional_parameters", {})[name] = parse_value(value) if equals else True
    symmetry = {"dim": flags.symmetry_dim, "max_systems": flags.max_systems}
    symmetry = {name: value for name, value in symmetry.items() if value is not None}
    above = {"job": job, "slurm": slurm} | ({"evaluation_metrics": {"symmetry": symmetry}} if symmetry else {})
    return merge(parse_overrides(overrides), above)


def _run_folder(config: Any, mode: str) -> Path:
    name = config.job.identifier or datetime.now().strftime(f"%Y-%m-%d-%H-%M-%S-{mode}")
    folder = (Path(config.job.run_dir) / name).resolve()
    written = {"validate": "metrics.json", "symmetry": "symmetry.json"}.get(mode)
    if mode == "train" and not (folder / "checkpoints").exists():  # not those of this run
        written = "metrics.json"
    if written is not None and (folder / "results" / written).exists():
        raise ValueError(f"{folder} has results already; choose another --identifier")
    return folder


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """The folder of a run is this command's alone, and no ranks of a killed one, or of a job, are at work in it.

    Raises:
        ValueError: another process is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / ".lock", folder):
        with exclusive(folder / local_ranks.LOCK, folder):
            pass
        yield


def _write_configs(run: _Run, mode: str) -> None:
    name = "config.yml" if mode == "train" else f"config_{mode}.yml"
    _write_config(run.folder / name, run.config.model_dump(mode="json"), run.changes)
    if run.values:
        _write_config(run.folder / "sweep_values.yml", run.values)


def _write_config(path: Path, content: dict[str, Any], comments: Sequence[str] = ()) -> None:
    """Writes a configuration; what the run began with and has changed since stands below it, as comments."""
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines = [line for line in before if line.startswith(_COMMENT)] + [_COMMENT + comment for comment in comments]
    write_text(path, yaml.safe_dump(content, sort_keys=False) + "".join(f"{line}\n" for line in lines))


def _show(folder: Path, mode: str) -> int:
    """Prints the table and, as the last line, where everything lies."""
    table = folder / "results" / ("symmetry.md" if mode == "symmetry" else "table.md")
    if mode != "predict" and table.is_file():
        sys.stdout.write(f"\n{table.read_text(encoding='utf-8')}\n")
    sys.stdout.write(f"results: {folder}\n")
    return 0
