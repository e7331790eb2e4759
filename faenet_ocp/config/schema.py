"""YAML to a validated, typed configuration.

A configuration is OCP-style YAML: `includes:` are merged first (paths relative to the file that names them), then the
file's own keys, then `--section.key=value` overrides, then the command line's flags. The result is validated here as a
whole, before anything is built: an unknown key is a ValueError that names its dotted path and the nearest valid one, a
wrong type or value names what is allowed. `model` and transforms are checked against the constructors of the registered
classes in `build.py`, which knows the registry.
"""

import re
import types
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from fairchem.core.common.utils import UniqueKeyLoader, recursive_dict_merge
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from faenet_ocp.common.checks import nearest
from faenet_ocp.config.slurm import SlurmConfig
from faenet_ocp.targets import TASKS, Target, resolve

FRAME_METHODS = Literal["full", "stochastic", "det", "canonical", "data_augmentation", "none"]
LOGGERS = Literal["tensorboard", "wandb", "none"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FramesConfig(_Section):
    """`frames:` how symmetry is imposed on the data (paper, section 3).

    `eval_method` (default: the same as `method`, or none for data augmentation) is used in evaluation and prediction.
    """

    dim: Literal[2, 3] = 3
    group: Literal["E", "SE"] = "E"
    method: FRAME_METHODS = "stochastic"
    eval_method: Literal["full", "stochastic", "det", "canonical", "none"] | None = None
    tolerance: float = Field(default=1e-3, gt=0, lt=1)

    @property
    def evaluation_method(self) -> str:
        if self.eval_method is not None:
            return self.eval_method
        return "none" if self.method == "data_augmentation" else self.method


class SourceConfig(_Section):
    """Where one split lies: a file, a folder of shards, a glob, or a list of these, below `dataset.root`."""

    src: str | list[str]


class DatasetConfig(_Section):
    """`dataset:` the data, one entry for each split.

    A sample that cannot be read or used ends the run; `--mode check` lists all of them.
    """

    name: str = "OC20"
    root: str = "data"
    format: str = "oc20_lmdb"
    key_mapping: dict[str, str] = {}
    edges: Literal["stored", "recompute"] = "stored"
    transforms: dict[str, dict[str, Any] | Literal[False] | None] = {}
    train: SourceConfig | None = None
    val: dict[str, SourceConfig] = {}
    test: dict[str, SourceConfig] = {}


class NormalizerConfig(_Section):
    """Targets are trained as (target - mean) / stdev."""

    mean: float = 0.0
    stdev: float = Field(default=1.0, gt=0)


class OutputConfig(_Section):
    """`outputs.<name>:` one predicted property.

    A scalar of systems that is not in `targets.TARGETS` is predicted beside those of the task once its `unit` is given.
    `eval_from: energy_gradient` (forces) evaluates -dE/dX instead of the predicted forces: conservative, and slower.
    `normalizer: fit` takes mean and standard deviation from the training set (after the element references);
    `element_references: fit` subtracts the least-squares energy of the composition, fitted on the training set.
    """

    level: Literal["system", "atom"] | None = None
    unit: str | None = None
    normalizer: NormalizerConfig | Literal["fit"] = NormalizerConfig()
    element_references: Literal["fit"] | None = None
    train_on_free_atoms: bool = True
    eval_on_free_atoms: bool = True
    eval_from: Literal["prediction", "energy_gradient"] = "prediction"


class LossConfig(_Section):
    """One term of the loss, eq. (9), from `start_epoch` on."""

    fn: Literal["mae", "mse", "l2mae"] = "mae"
    coefficient: float = Field(default=1.0, ge=0)
    start_epoch: int = Field(default=0, ge=0)


class PrimaryMetricConfig(_Section):
    """What `best` means: the checkpoint with the lowest (or, for within-threshold metrics, highest) value."""

    split: str = "val_id"
    metric: str = "energy_mae"


class EvaluationConfig(_Section):
    """`evaluation_metrics:` which metrics are reported, and which one chooses the best checkpoint.

    Evaluations during training use `max_systems` systems of each split, a fixed random subset; the final one uses all.
    """

    metrics: dict[str, list[str]] = {}
    primary_metric: PrimaryMetricConfig = PrimaryMetricConfig()
    max_systems: int | None = Field(default=None, ge=1)


class OptimConfig(_Section):
    """`optim:` optimiser, schedule, batches and how often things happen.

    `batch_size` counts systems over all ranks and accumulation steps. Up to `skip_nonfinite` steps whose gradient is
    not finite are left out (and kept in `failures/`) before the run stops. A checkpoint is saved at every evaluation
    and after every `checkpoint_every` steps. A checkpoint or metric that cannot be written (disk full, folder gone)
    ends the run, or with `on_write_error: warn` is left out.

    Every training sample is used once an epoch: nothing is dropped or repeated, batch sizes differ by at most one.
    Ranks get equally many systems of a batch; with `balance: atoms` those of about equally many atoms. `worker_context:
    spawn` starts loader workers afresh instead of by forking (slower; where forking is not safe).
    """

    optimizer: str = "AdamW"
    optimizer_params: dict[str, Any] = {}
    lr_initial: float = Field(gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    scheduler: Literal["linear_warmup_cosine", "constant"] = "linear_warmup_cosine"
    warmup_steps: int = Field(default=0, ge=0)
    warmup_factor: float = Field(default=0.2, ge=0, le=1)
    lr_min_factor: float = Field(default=0.0, ge=0, le=1)
    batch_size: int = Field(ge=1)
    eval_batch_size: int | None = Field(default=None, ge=1)
    grad_accumulation: int = Field(default=1, ge=1)
    max_epochs: int = Field(ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    clip_grad_norm: float | None = Field(default=None, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    eval_every: int | None = Field(default=None, ge=1)
    eval_every_epochs: int | None = Field(default=1, ge=1)
    checkpoint_every: int | None = Field(default=None, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    skip_nonfinite: int = Field(default=0, ge=0)
    balance: Literal["systems", "atoms"] = "systems"
    num_workers: int = Field(default=2, ge=0)
    worker_context: Literal["fork", "spawn"] = "fork"
    on_write_error: Literal["stop", "warn"] = "stop"


class LoggerConfig(_Section):
    """`logger:` a name or a mapping with the logger's own settings; the default needs no account."""

    name: LOGGERS = "tensorboard"
    project: str = "faenet-ocp"
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"


class JobConfig(_Section):
    """`job:` the run itself; each key has a command line flag of the same name."""

    run_dir: str = "runs"
    identifier: str | None = None
    seed: int = Field(default=0, ge=0)
    num_gpus: int = Field(default=1, ge=1)
    num_nodes: int = Field(default=1, ge=1)
    cpu: bool = False
    amp: bool = False
    precision: Literal["float32", "float64"] = "float32"
    debug: bool = False
    print_every: int = Field(default=10, ge=1)

    @field_validator("identifier")
    @classmethod
    def _folder_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.+-]+", value):
            raise ValueError(f"{value!r} is used as a folder name: letters, digits and _ . + - are allowed")
        return value


class Config(_Section):
    """The whole configuration of a run; `model` is checked against the registered model's constructor."""

    trainer: str
    task: Literal["is2re", "s2ef"]
    dataset: DatasetConfig
    model: dict[str, Any]
    frames: FramesConfig = FramesConfig(method="none")
    outputs: dict[str, OutputConfig] = {}
    loss_functions: list[dict[str, LossConfig]] = []
    evaluation_metrics: EvaluationConfig = EvaluationConfig()
    optim: OptimConfig
    logger: LoggerConfig = LoggerConfig()
    job: JobConfig = JobConfig()
    slurm: SlurmConfig = SlurmConfig()

    @field_validator("logger", mode="before")
    @classmethod
    def _logger_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if not isinstance(self.model.get("name"), str):
            raise ValueError("model.name: missing; it names a registered model, e.g. faenet")
        for name, output in self.outputs.items():
            target = resolve(name, level=output.level, unit=output.unit)
            if name not in TASKS[self.task] and target.level != "system":
                raise ValueError(f"outputs.{name}: task {self.task} predicts only {', '.join(TASKS[self.task])}")
        properties = self.properties
        for section, names in (
            ("loss_functions", [name for name in self.losses if name != "gradient"]),
            ("evaluation_metrics.metrics", self.evaluation_metrics.metrics),
        ):
            for name in names:
                if name not in properties:
                    raise ValueError(f"{section}.{name}: task {self.task} predicts only {', '.join(properties)}")
        if "gradient" in self.losses and "forces" not in properties:
            raise ValueError("loss_functions.gradient: compares forces with -dE/dX, and the task predicts no forces")
        for name, output in self.outputs.items():
            if name != "forces" and output.eval_from != "prediction":
                raise ValueError(f"outputs.{name}.eval_from: only forces can be taken from the energy's gradient")
        split = self.evaluation_metrics.primary_metric.split
        if self.dataset.val and split not in self.dataset.val:
            raise ValueError(
                f"evaluation_metrics.primary_metric.split: {split!r} is not among the splits of dataset.val: "
                f"{', '.join(self.dataset.val)}"
            )
        if self.job.amp and self.job.precision == "float64":
            raise ValueError("job.amp: bfloat16 autocast and job.precision: float64 exclude each other")
        return self

    @property
    def targets(self) -> tuple[Target, ...]:
        """What is predicted: that of the task, energies first, then what else `outputs` names."""
        names = dict.fromkeys([*TASKS[self.task], *self.outputs])
        return tuple(resolve(name, unit=self.output(name).unit) for name in names)

    @property
    def properties(self) -> tuple[str, ...]:
        """Names of the `targets`."""
        return tuple(target.name for target in self.targets)

    @property
    def losses(self) -> dict[str, LossConfig]:
        """Loss terms by property (default: mae with coefficient 1)."""
        given: dict[str, LossConfig] = {name: term for entry in self.loss_functions for name, term in entry.items()}
        return given or {name: LossConfig() for name in self.properties}

    def output(self, name: str) -> OutputConfig:
        """Settings of one predicted property."""
        return self.outputs.get(name, OutputConfig())


class _Loader(UniqueKeyLoader):
    """SafeLoader that refuses repeated keys and reads 1e-3 as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def find_config(path: str | Path) -> Path:
    """Resolves a config path: as given, else among the shipped configs (`configs/is2re/faenet.yml`)."""
    given = Path(path)
    if given.is_file():
        return given
    relative = Path(*given.parts[1:]) if given.parts[:1] == ("configs",) else given
    for base in (
        Path(str(resources.files("faenet_ocp"))) / "configs",
        Path(__file__).resolve().parents[2] / "configs",
    ):
        if not given.is_absolute() and (base / relative).is_file():
            return base / relative
    raise ValueError(f"--config {path}: there is no such file, here or among the shipped configs")


def load_yaml(path: Path, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file with its `includes:` merged below it.

    Raises:
        ValueError: unreadable YAML, repeated key, missing or circular include; names file and line.
    """
    path = path.resolve()
    if path in _chain:
        raise ValueError(f"{path}: includes itself through {' -> '.join(p.name for p in _chain)}")
    try:
        content = yaml.load(path.read_text(), Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError) as error:  # TypeError: a mapping or list as a key
        raise ValueError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: the top level has to be a mapping, not {type(content).__name__}")
    includes = content.pop("includes", [])
    if not isinstance(includes, list):
        raise ValueError(f"{path}: includes: expected a list of files, got {includes!r}")
    merged: dict[str, Any] = {}
    for include in includes:
        target = path.parent / str(include)
        if not target.is_file():
            raise ValueError(f"{path}: includes: {include}: there is no such file")
        merged = recursive_dict_merge(merged, load_yaml(target, (*_chain, path)))
    return recursive_dict_merge(merged, content)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--section.key=value` (or `--section.key value`) to a nested mapping; values are read as YAML."""
    result: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name[2:].split(".")[0] not in Config.model_fields:
            raise ValueError(
                f"{argument}: unknown argument; overrides are written --section.key=value (--help lists the flags)"
            )
        if not equals:
            if not rest:
                raise ValueError(f"{argument}: a value is missing: {argument}=value")
            value = rest.pop(0)
        nested: Any = parse_value(value)
        for part in reversed(name[2:].split(".")):
            nested = {part: nested}
        result = recursive_dict_merge(result, nested)
    return result


def parse_value(text: str) -> Any:
    """A value from the command line, read as YAML.

    Raises:
        ValueError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError) as error:  # TypeError: a mapping or list as a key
        raise ValueError(f"{text!r} is not a YAML value: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{text[:100]!r}...: nested too deeply") from error


_USE_CHECK = "a sample that cannot be used ends the run; --mode check lists all of them before"
REMOVED = {
    "dataset.on_bad_sample": _USE_CHECK,
    "dataset.max_bad_share": _USE_CHECK,
    "job.compile": "torch.compile gained nothing where it was measured; leave the key out",
}
"""Keys of earlier versions, and what to do instead."""


def without_removed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that an earlier version wrote (into a checkpoint or a run's folder), without `REMOVED` keys."""
    return {
        section: {key: value for key, value in content.items() if f"{section}.{key}" not in REMOVED}
        if isinstance(content, Mapping)
        else content
        for section, content in raw.items()
    }


def build_config(raw: Mapping[str, Any]) -> Config:
    """Validates a merged mapping.

    Raises:
        ValueError: every wrong key and value, one a line, each with its dotted path.
    """
    try:
        return Config.model_validate(dict(raw))
    except ValidationError as error:
        lines = sorted({_explain(dict(problem)) for problem in error.errors()})
        raise ValueError("the configuration is not valid:\n  " + "\n  ".join(lines)) from None


def _explain(problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    # pydantic adds the tried branch of a union to the path; users know only the keys.
    keys = [part for part in location if not re.search(r"[\[\](]|Config$|^(str|int|float|bool|dict|list)$", part)]
    if problem["type"] == "extra_forbidden":
        keys = [*keys[: -1 if keys[-1:] == location[-1:] else None], location[-1]]  # whatever the user has called it
    path = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        if path in REMOVED:
            return f"{path}: is no key any more: {REMOVED[path]}"
        allowed = _allowed_keys(keys[:-1])
        return f"{path}: unknown key{nearest(keys[-1], allowed) if allowed else ''}"
    if problem["type"] == "missing":
        return f"{path}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and not keys:
        return message
    return f"{path}: {message} (got {problem['input']!r})"


def _allowed_keys(parents: Sequence[str]) -> list[str]:
    """The valid keys of the section that a dotted path leads to."""
    section: Any = Config
    for part in parents:
        if isinstance(section, type) and issubclass(section, BaseModel):
            field = section.model_fields.get(part)
            section = field.annotation if field else None
        else:  # a mapping or list: go on with the type of its values
            section = _value_type(section)
        section = _section_in(section) or section
    section = _section_in(section)
    return sorted(section.model_fields) if section else []


def _value_type(annotation: Any) -> Any:
    arguments = get_args(annotation)
    return arguments[-1] if get_origin(annotation) in (dict, list) and arguments else annotation


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        for branch in get_args(annotation):
            if found := _section_in(branch):
                return found
    return None
