"""What a run that goes on may change: one table for all keys of the configuration.

A key that may change is applied from the step on from which the run goes on. Any other change is refused: what the run
has done so far would not be what its configuration says, or would not fit to what follows.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

MAY_CHANGE = {
    # Where the data lie and how they are stored; that they are the same data is checked by their content.
    "dataset": "root format train.src train.index val.*.src val.*.index test.*",
    # The learning rate is a function of the step, of these, and of what the metrics were.
    "optim": "lr_initial weight_decay scheduler warmup_steps warmup_factor lr_min_factor max_epochs max_steps "
    "multistep.* plateau.* early_stopping.* clip_grad_norm skip_nonfinite "
    # When and how things happen.
    "grad_accumulation balance eval_batch_size eval_every eval_every_epochs checkpoint_every keep_checkpoints "
    "num_workers worker_context on_write_error",
    "evaluation_metrics": "metrics.* symmetry.*",
    "logger": "name project entity mode",
    "job": "run_dir identifier num_gpus num_nodes cpu amp debug print_every output_format",
    "slurm": "partition account qos time mem_gb cpus_per_task additional_parameters.* max_timeouts rendezvous",
}
MAY_NOT_CHANGE = {
    "": "trainer task model.* frames.* outputs.* loss_functions",
    "dataset": "name key_mapping.* edges tags adsorbate target transforms.* train.from_train val.*.from_train",
    # State of the optimiser and averages of the weights belong to these, and epochs and steps to the batch size.
    "optim": "optimizer optimizer_params.* batch_size ema_decay",
    # The best checkpoint is the best in these.
    "evaluation_metrics": "primary_metric.* max_systems",
    "job": "seed precision",
}
OTHERWISE = "start another --identifier, with --checkpoint to begin from this one's weights"


def allowed(key: str, table: Mapping[str, str] = MAY_CHANGE) -> bool:
    """Whether a dotted key is in the table."""
    patterns = [f"{section}.{name}".lstrip(".") for section, names in table.items() for name in names.split()]
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in (key, f"{key}."))  # an empty mapping


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys that differ between two configurations, with both values (None: not there)."""
    old, new = dict(flat(before)), dict(flat(now))
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    return {key: (old.get(key), new.get(key)) for key in keys}


def check_changes(found: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuses what may not change.

    Raises:
        ValueError: the keys, both values, and what to do instead.
    """
    split = [key for key, values in found.items() if key.startswith("dataset.val.") and None in values]
    refused = [key for key in found if key in split or not allowed(key)]
    if refused:
        lines = "".join(f"\n  {key}: {found[key][0]!r}, now {found[key][1]!r}" for key in refused)
        raise ValueError(
            f"a run that goes on cannot change these:{lines}\n{OTHERWISE} (--mode validate "
            "evaluates it with other data or frames)"
        )


def flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping; a key that is given nested and dotted is there twice."""
    found = []
    for name, value in content.items():
        key = f"{prefix}{name}"
        found += flat(value, f"{key}.") if isinstance(value, Mapping) and value else [(key, value)]
    return found
