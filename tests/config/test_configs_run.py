"""Every shipped YAML at its real size: it validates, builds, and takes an optimiser step on small data."""

from pathlib import Path

import pytest
import torch

import shipped
from faenet_ocp import build
from faenet_ocp.config.schema import build_config
from faenet_ocp.config.yaml import load_yaml, merge
from faenet_ocp.data.loader import collate
from faenet_ocp.tasks.losses import task_loss
from faenet_ocp.tasks.references import fit_labels
from faenet_ocp.tasks.tasks import make_tasks, needs_fit, training_outputs
from faenet_ocp.training.optim import make_optimizer
from faenet_ocp.training.start import freeze_unused

LARGE = ("dimenetpp", "escaip", "painn", "spherenet", "gns")
SHIPPED = [
    pytest.param(path, marks=pytest.mark.slow if path.stem in LARGE else (), id=shipped.name_of(path))
    for path in shipped.RUNS
]


@pytest.mark.parametrize("path", SHIPPED)
def test_a_step_at_real_size(path: Path, small_is2re: Path, small_s2ef: Path) -> None:
    raw = load_yaml(path)
    is2re = raw["task"] == "is2re"
    source = "is2re/all/train/data.lmdb" if is2re else "s2ef/2M/train"
    data = {"root": str(small_is2re if is2re else small_s2ef), "train": {"src": source}}
    if raw["task"] == "qm9":  # with energies in place of its targets
        raw["task"], source = "is2re", "is2re/all/train/data.lmdb"
        data |= {"root": str(small_is2re), "train": {"src": source, "index": None}, "target": None}
        data |= {"format": "oc20_lmdb", "val": {"val": {"src": source, "index": None}, "test": None}}
    if raw["task"] == "qm7x":
        data["format"] = "oc20_lmdb"
    if raw["dataset"]["format"] == "ase":
        data |= {"format": "oc20_lmdb", "tags": None, "adsorbate": None}
    if "from_train" in raw["dataset"]["val"].get("val", {}):
        data["val"] = {"val": {"src": source}}
    config = build_config(merge(raw, {"dataset": data}))
    dataset = build.make_dataset(config, config.dataset.train, training=True)
    (batch,), (whole,) = (collate([dataset[0, index] for index in range(size)]) for size in (4, 12))
    fits = fit_labels([(whole.composition, {"energy": whole.energy})], ["energy"]) if needs_fit(config) else {}
    tasks = make_tasks(config, fits)
    model = build.make_model(config)
    freeze_unused(model, tasks, batch)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make_optimizer(config.optim)(model.parameters())
    outputs = training_outputs(model, tasks, batch)
    sum(task_loss(task, outputs, batch) for task in tasks).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    assert len(trained) > 0.8 * len(before)
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
