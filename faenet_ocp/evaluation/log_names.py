"""Names of the values in a run's `logs/metrics.jsonl`: what training writes and plots read."""

LOSS = "train/loss"
LEARNING_RATE = "train/lr"
SAMPLES_PER_S = "train/samples_per_s"
DATA_WAIT_SHARE = "train/data_wait_share"
GRAD_NORM = "train/grad_norm"


def loss_of(term: str) -> str:
    """One term of several that the loss is the sum of."""
    return f"{LOSS}_{term}"


def metric_of(split: str, metric: str) -> str:
    """A metric of an evaluated split."""
    return f"{split}/{metric}"


def split_of(name: str, metric: str) -> str | None:
    """The split whose metric a name stands for; None for any other value."""
    split, slash, found = name.rpartition("/")
    return split if slash and found == metric else None
