"""The configuration: every section and key with its type, default and bounds, validated as a whole before any work.

An unknown key is a ValueError that names its dotted path and the nearest valid one, a wrong type or value names what is
allowed. `model` and transforms are checked against the constructors of the registered classes in `build.py`, which
knows the registry.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from faenet_ocp.common.checks import choice, nearest
from faenet_ocp.common.files import expand_path
from faenet_ocp.config.messages import explain
from faenet_ocp.config.ocp1 import in_our_words, is_ocp1
from faenet_ocp.config.optim import OptimConfig, Section
from faenet_ocp.targets import ROWS, TARGETS, TASKS, Target, metrics_of, resolve

PathText = Annotated[str, AfterValidator(expand_path)]
"""A path in which `~` and environment variables mean what they mean to a shell."""


class FramesConfig(Section):
    """`frames:` how symmetry is imposed on the data (paper, section 3).

    `eval_method` (default: the same as `method`, or none for data augmentation) is used in evaluation and prediction.
    """

    dim: Literal[2, 3] = 3
    group: Literal["E", "SE"] = "E"
    method: Literal["full", "stochastic", "det", "canonical", "data_augmentation", "none"] = "stochastic"
    eval_method: Literal["full", "stochastic", "det", "canonical", "none"] | None = None
    tolerance: float = Field(default=1e-3, gt=0, lt=1)

    @property
    def evaluation_method(self) -> str:
        if self.eval_method is not None:
            return self.eval_method
        return "none" if self.method == "data_augmentation" else self.method


class SourceConfig(Section):
    """Where one split lies: a file, a folder of shards, a glob, or a list of these, below `dataset.root`.

    `index` is a file of NumPy's with the numbers of the samples that belong to the split, in its order. A validation
    split can be `from_train` instead: this share of the training set's systems, chosen by `job.seed` and held out.
    """

    src: PathText | list[PathText] | None = None
    index: PathText | None = None
    from_train: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_of_them(self) -> "SourceConfig":
        if (self.src is None) == (self.from_train is None):
            raise ValueError("give either src, where the data lie, or from_train, the share of the training set")
        if self.index is not None and self.src is None:
            raise ValueError("index: chooses samples of src; from_train has none")
        return self


class DatasetConfig(Section):
    """`dataset:` the data, one entry for each split; `null` in place of an entry drops that of an included file.

    A sample that cannot be read or used ends the run; `--mode check` lists all of them. `edges: none` is for models
    that find neighbours themselves. `tags` (format ase): what a model that needs OC20's tags takes for them, see
    `data.tags`; by default the file's, or none if it needs none.
    """

    name: str = "OC20"
    root: PathText = "data"
    format: str = "oc20_lmdb"
    key_mapping: dict[str, str] = Field(default={})
    edges: Literal["stored", "recompute", "none"] = "stored"
    tags: Literal["file", "fixed", "none"] | None = None
    adsorbate: Literal["metal"] | None = None
    target: str | None = None
    transforms: dict[str, dict[str, Any] | Literal[False] | None] = Field(default={})
    train: SourceConfig | None = None
    val: dict[str, SourceConfig] = Field(default={})
    test: dict[str, SourceConfig] = Field(default={})

    @property
    def active_transforms(self) -> dict[str, dict[str, Any]]:
        """The transforms with their arguments, less those that are switched off (`false`)."""
        return {name: given or {} for name, given in self.transforms.items() if given is not False}

    @field_validator("val", "test", mode="before")
    @classmethod
    def _without_dropped(cls, value: Any) -> Any:
        return {name: split for name, split in value.items() if split is not None} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _shares_have_a_whole(self) -> "DatasetConfig":
        shares = [name for name, split in self.val.items() if split.from_train is not None]
        if shares and self.train is None:
            raise ValueError(f"val.{shares[0]}.from_train: there is no dataset.train to take it from")
        others = {"train": self.train} | {f"test.{name}": split for name, split in self.test.items()}
        for name, split in others.items():
            if split is not None and split.from_train is not None:
                raise ValueError(f"{name}.from_train: only validation splits are taken from the training set")
        return self


class NormalizerConfig(Section):
    """Targets are trained as (target - mean) / stdev."""

    mean: float = 0.0
    stdev: float = Field(default=1.0, gt=0)


class OutputConfig(Section):
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


class LossConfig(Section):
    """One term of the loss, eq. (9), from `start_epoch` on."""

    fn: Literal["mae", "mse", "l2mae"] = "mae"
    coefficient: float = Field(default=1.0, ge=0)
    start_epoch: int = Field(default=0, ge=0)


class PrimaryMetricConfig(Section):
    """What `best` means: the checkpoint with the lowest (or, for within-threshold metrics, highest) value.

    Default: the first metric of the first target, on val_id or, where there is none, on the first split.
    """

    split: str = ""
    metric: str = ""


class SymmetryConfig(Section):
    """`evaluation_metrics.symmetry:` what `--mode symmetry` looks at.

    Args:
        dim: 2: turns about z and mirrors that contain it; 3: any. Default: that of `frames`.
        max_systems: a random subset of the split.
        split: of validation; default: that of the primary metric.
    """

    dim: Literal[2, 3] | None = None
    max_systems: int = Field(default=256, ge=1)
    split: str = ""


class EvaluationConfig(Section):
    """`evaluation_metrics:` which metrics are reported, and which one chooses the best checkpoint.

    Evaluations during training use `max_systems` systems of each split, a fixed random subset; the final one uses all.
    """

    metrics: dict[str, list[str]] = Field(default={})
    primary_metric: PrimaryMetricConfig = PrimaryMetricConfig()
    symmetry: SymmetryConfig = SymmetryConfig()
    max_systems: int | None = Field(default=None, ge=1)

    @property
    def names(self) -> list[str]:
        """All metrics that are named, as in results (`energy: [mae]` is `energy_mae`)."""
        listed = [(target, name) for target, names in self.metrics.items() for name in names]
        full = [name if "within_threshold" in name else f"{target}_{name}" for target, name in listed]
        return [*([self.primary_metric.metric] if self.primary_metric.metric else []), *full]


class LoggerConfig(Section):
    """`logger:` a name or a mapping with the logger's own settings; the default needs no account."""

    name: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    project: str = "faenet-ocp"
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"


class JobConfig(Section):
    """`job:` the run itself; each key has a command line flag of the same name."""

    run_dir: PathText = "runs"
    identifier: str | None = None
    seed: int = Field(default=0, ge=0)
    num_gpus: int = Field(default=1, ge=1)
    num_nodes: int = Field(default=1, ge=1)
    cpu: bool = False
    amp: bool = False
    precision: Literal["float32", "float64"] = "float32"
    debug: bool = False
    print_every: int = Field(default=10, ge=1)
    output_format: Literal["npz", "extxyz"] = "npz"

    @field_validator("identifier")
    @classmethod
    def _folder_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.+-]+", value):
            raise ValueError(f"{value!r} is used as a folder name: letters, digits and _ . + - are allowed")
        return value


class SlurmConfig(Section):
    """`slurm:` what `--submit` asks SLURM for; nodes and GPUs (= ranks) on each come from `job:`.

    `time` is in SLURM's own format (`"12:00:00"`, `"2-00"`, `"90"`: minutes); a run that reaches it saves and goes back
    to the queue, at most `max_timeouts` times. `additional_parameters` are any other options of sbatch (`constraint:
    h100`); false leaves one out (`requeue: false`). Ranks find each other through a file in the run's folder, which
    every node has to see, or with `rendezvous: tcp` through a port that two jobs on one node would both use.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "24:00:00"
    mem_gb: float = Field(default=80, gt=0)
    cpus_per_task: int = Field(default=8, ge=1)
    additional_parameters: dict[str, str | int | float | bool] = Field(default={})
    max_timeouts: int = Field(default=100, ge=0)
    rendezvous: Literal["file", "tcp"] = "file"

    @field_validator("time", mode="before")
    @classmethod
    def _time(cls, value: Any) -> Any:
        if not isinstance(value, str):  # YAML reads 12:00:00 as a number, sixty to the place
            raise ValueError('write SLURM\'s format in quotes, e.g. "12:00:00"')
        return value


class Config(Section):
    """The whole configuration of a run; `model` is checked against the registered model's constructor.

    A task predicts its own properties (`targets.TASKS`) and what else `outputs` names; `null` there drops one.
    """

    trainer: str
    task: str
    dataset: DatasetConfig
    model: dict[str, Any]
    frames: FramesConfig = FramesConfig(method="none")
    outputs: dict[str, OutputConfig | None] = Field(default={})
    loss_functions: list[dict[str, LossConfig]] = Field(default=[])
    evaluation_metrics: EvaluationConfig = EvaluationConfig()
    optim: OptimConfig
    logger: LoggerConfig = LoggerConfig()
    job: JobConfig = JobConfig()
    slurm: SlurmConfig = SlurmConfig()

    @field_validator("logger", mode="before")
    @classmethod
    def _logger_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        return choice("task", value, list(TASKS))

    @model_validator(mode="before")
    @classmethod
    def _with_target(cls, raw: Any) -> Any:
        """`dataset.target` is short for a name in `outputs`, normalised; less its elements if it grows with them."""
        dataset = raw.get("dataset") if isinstance(raw, dict) else None
        target = dataset.get("target") if isinstance(dataset, dict) else None
        if not isinstance(target, str) or not isinstance(raw.get("outputs", {}), dict):
            return raw
        row = (TARGETS | ROWS.get(str(raw.get("task")), {})).get(target)
        fitted = {"normalizer": "fit"} | ({"element_references": "fit"} if row is not None and row.extensive else {})
        return raw | {"outputs": {target: fitted} | raw.get("outputs", {})}

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if not isinstance(self.model.get("name"), str):
            raise ValueError("model.name: missing; it names a registered model, e.g. faenet")
        task, properties = self.task, self.properties
        if not properties:
            raise ValueError(f"outputs: nothing to predict; task {task} needs a name here, e.g. energy: {{}}")
        self._set_primary_metric()
        for name, output in self.outputs.items():
            if output is None:
                continue
            target = resolve(name, task=task, level=output.level, unit=output.unit)
            if TASKS[task] and name not in TASKS[task] and target.level != "system":
                raise ValueError(f"outputs.{name}: task {task} predicts only {', '.join(TASKS[task])}")
            if name != "forces" and output.eval_from != "prediction":
                raise ValueError(f"outputs.{name}.eval_from: only forces can be taken from the energy's gradient")
        named = [("loss_functions", name) for name in self.losses if name != "gradient"]
        named += [("evaluation_metrics.metrics", name) for name in self.evaluation_metrics.metrics]
        for section, name in named:
            if name not in properties:
                raise ValueError(f"{section}.{name}: not predicted here, only {', '.join(properties)}; leave it out")
        if "gradient" in self.losses and not {"energy", "forces"} <= set(properties):
            raise ValueError("loss_functions.gradient: compares forces with -dE/dX, and both have to be predicted")
        if "forces" in properties and self.output("forces").eval_from != "prediction" and "energy" not in properties:
            raise ValueError("outputs.forces.eval_from: energy_gradient: no energy is predicted")
        metrics = metrics_of(self.targets)
        for name in self.evaluation_metrics.names:
            if name not in metrics:
                raise ValueError(f"evaluation_metrics: unknown metric {name!r}{nearest(name, list(metrics))}")
        self._check_what_follows_metrics(list(metrics))
        known = ", ".join(self.dataset.val)
        for key in ("primary_metric", "symmetry"):
            split = getattr(self.evaluation_metrics, key).split
            if self.dataset.val and split and split not in self.dataset.val:
                key = f"evaluation_metrics.{key}.split"
                raise ValueError(f"{key}: {split!r} is not among the splits of dataset.val: {known}")
        if self.job.amp and self.job.precision == "float64":
            raise ValueError("job.amp: bfloat16 autocast and job.precision: float64 exclude each other")
        return self

    def _check_what_follows_metrics(self, metrics: list[str]) -> None:
        """Schedules and stopping by a metric need evaluations."""
        optim = self.optim
        metric = optim.plateau.metric if optim.plateau else None
        if metric is not None and metric not in metrics:
            raise ValueError(f"optim.plateau.metric: unknown metric {metric!r}{nearest(metric, metrics)}")
        needing = ["optim.early_stopping"] if optim.early_stopping else []
        needing += ["optim.scheduler: reduce_on_plateau"] if optim.scheduler == "reduce_on_plateau" else []
        if needing and not self.dataset.val:
            raise ValueError(f"{needing[0]}: follows a metric of a validation split, but dataset.val has none")

    def _set_primary_metric(self) -> None:
        """Fills in the defaults, so that config.yml says what they are."""
        primary, splits = self.evaluation_metrics.primary_metric, list(self.dataset.val)
        split = primary.split or ("val_id" if "val_id" in splits or not splits else splits[0])
        metric = primary.metric or self.targets[0].metrics[0].name
        resolved = PrimaryMetricConfig(split=split, metric=metric)
        object.__setattr__(
            self, "evaluation_metrics", self.evaluation_metrics.model_copy(update={"primary_metric": resolved})
        )

    @property
    def targets(self) -> tuple[Target, ...]:
        """What is predicted: that of the task, energies first, then what else `outputs` names."""
        names = dict.fromkeys([*TASKS[self.task], *self.outputs])
        names = {name: None for name in names if self.outputs.get(name, OutputConfig()) is not None}
        return tuple(resolve(name, task=self.task, unit=self.output(name).unit) for name in names)

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
        return self.outputs.get(name) or OutputConfig()


def build_config(raw: Mapping[str, Any]) -> Config:
    """Validates a merged mapping.

    Raises:
        ValueError: every wrong key and value, one a line, each with its dotted path; or the same settings in this
            package's words, where they are in OCP 1.x's.
    """
    if is_ocp1(raw):
        raise ValueError(
            f"this is a configuration of OCP 1.x; the same settings here, ready to paste:\n\n{in_our_words(raw)}"
        )
    try:
        return Config.model_validate(dict(raw))
    except ValidationError as error:
        lines = sorted({explain(dict(problem), Config) for problem in error.errors()})
        raise ValueError("the configuration is not valid:\n  " + "\n  ".join(lines)) from None
