"""The `slurm:` section of a configuration."""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class SlurmConfig(BaseModel):
    """`slurm:` what `--submit` asks SLURM for; nodes and GPUs (= ranks) on each come from `job:`.

    `time` is in SLURM's own format (`"12:00:00"`, `"2-00"`, `"90"`: minutes). A run that reaches it saves and goes back
    to the queue, at most `max_timeouts` times. `additional_parameters` are any other options of sbatch (`constraint:
    h100`, `exclusive: true`); false leaves out what is asked for otherwise (`requeue: false`). Ranks find each other
    through a file in the run's folder, which every node has to see, or with `rendezvous: tcp` through a port that two
    jobs on one node would both use.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "24:00:00"
    mem_gb: float = Field(default=80, gt=0)
    cpus_per_task: int = Field(default=8, ge=1)
    additional_parameters: dict[str, str | int | float | bool] = {}
    max_timeouts: int = Field(default=100, ge=0)
    rendezvous: Literal["file", "tcp"] = "file"

    @field_validator("time", mode="before")
    @classmethod
    def _time(cls, value: Any) -> Any:
        if not isinstance(value, str):  # YAML reads 12:00:00 as a number, sixty to the place
            raise ValueError('write SLURM\'s format in quotes, e.g. "12:00:00"')
        time_minutes(value)
        return value

    @property
    def minutes(self) -> int:
        """The time limit."""
        return time_minutes(self.time)


def time_minutes(text: str) -> int:
    """Minutes, rounded up, of a time limit in one of SLURM's formats: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        ValueError: another format, or no time at all.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"{text!r} is not a time limit; SLURM's formats are M, M:S, H:M:S, D-H, D-H:M and D-H:M:S")
    days, *rest = (None if part is None else int(part) for part in match.groups())
    parts = [part for part in rest if part is not None]
    if days is None and len(parts) < 3:
        parts = [0, *parts]  # without days, one or two numbers begin with the minutes
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    total = -(-(((days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds) // 60)
    if total == 0:
        raise ValueError(f"{text!r} is no time at all")
    return total
