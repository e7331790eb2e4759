"""The section `optim:`: optimiser, learning rate, batches, and how often things happen."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not converted, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class MultistepConfig(Section):
    """`optim.multistep:` the learning rate is multiplied by `gamma` at each of these steps."""

    milestones: list[Annotated[int, Field(ge=1)]]
    gamma: float = Field(default=0.1, gt=0, lt=1)


class PlateauConfig(Section):
    """`optim.plateau:` the learning rate is multiplied by `factor` after more than `patience` evaluations that did not
    improve a metric of the primary split (by 1e-4 of it; default: the primary metric), but not below `min_lr`."""

    factor: float = Field(default=0.9, gt=0, lt=1)
    patience: int = Field(default=10, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    metric: str | None = None


class EarlyStoppingConfig(Section):
    """`optim.early_stopping:` training ends after so many evaluations without a better primary metric."""

    patience: int = Field(ge=1)
    min_epochs: int = Field(default=0, ge=0)


class OptimConfig(Section):
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
    scheduler: Literal["linear_warmup_cosine", "multistep", "reduce_on_plateau", "constant"] = "linear_warmup_cosine"
    multistep: MultistepConfig | None = None
    plateau: PlateauConfig | None = None
    early_stopping: EarlyStoppingConfig | None = None
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

    @model_validator(mode="after")
    def _of_the_scheduler(self) -> "OptimConfig":
        """Settings of other schedulers would be ignored."""
        if self.scheduler == "multistep" and self.multistep is None:
            raise ValueError("optim.multistep: missing; scheduler multistep needs its milestones (steps) and gamma")
        if self.multistep is not None and self.scheduler != "multistep":
            raise ValueError(f"optim.multistep: has no effect with scheduler {self.scheduler}")
        if self.plateau is not None and self.scheduler != "reduce_on_plateau":
            raise ValueError(f"optim.plateau: has no effect with scheduler {self.scheduler}")
        if self.lr_min_factor and self.scheduler != "linear_warmup_cosine":
            raise ValueError(f"optim.lr_min_factor: has no effect with scheduler {self.scheduler}")
        return self
