"""Configurations of OCP 1.x: recognised, and said in words that are valid here."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from faenet_ocp.config.schema import build_config
from faenet_ocp.launch.cli import main

IS2RE = """
trainer: energy
dataset:
  - src: data/is2re/100k/train/data.lmdb
    normalize_labels: True
    target_mean: -1.525913953781128
    target_std: 2.279365062713623
  - src: data/is2re/all/val_id/data.lmdb
logger: wandb
task:
  dataset: single_point_lmdb
  description: Relaxed state energy prediction from initial structure.
  type: regression
  metric: mae
  labels: [relaxed energy]
model: {name: faenet, hidden_channels: 384, num_filters: 128, num_interactions: 4, cutoff: 6.0, use_pbc: True}
optim:
  batch_size: 64
  eval_batch_size: 64
  num_workers: 16
  lr_initial: 0.001
  lr_gamma: 0.1
  lr_milestones: [17981, 26972, 35963]
  warmup_steps: 5394
  warmup_factor: 0.2
  max_epochs: 30
"""
S2EF = """
trainer: forces
dataset:
  - {src: data/s2ef/2M/train/, normalize_labels: True, target_mean: -0.75, target_std: 2.88, grad_target_mean: 0.0,
     grad_target_std: 2.89}
  - src: data/s2ef/all/val_id/
task: {dataset: trajectory_lmdb, grad_input: atomic forces, train_on_free_atoms: True, eval_on_free_atoms: True}
model: {name: faenet, hidden_channels: 256, otf_graph: False, regress_forces: True, max_num_neighbors: 30}
optim:
  batch_size: 12
  loss_force: l2mae
  energy_coefficient: 1
  force_coefficient: 100
  optimizer: AdamW
  optimizer_params: {amsgrad: True}
  lr_initial: 0.0005
  scheduler: ReduceLROnPlateau
  mode: min
  factor: 0.8
  patience: 3
  max_epochs: 80
  ema_decay: 0.999
  clip_grad_norm: 10
amp: True
"""


def _ours(text: str) -> tuple[Any, str]:
    """The configuration that the message about another shows, and the message."""
    with pytest.raises(ValueError, match=r"this is a configuration of OCP 1\.x") as caught:
        build_config(yaml.safe_load(text))
    return build_config(yaml.safe_load(str(caught.value).split("\n\n", 1)[1])), str(caught.value)


def test_is2re() -> None:
    config, message = _ours(IS2RE)
    assert config.task == "is2re" and config.logger.name == "wandb"
    assert config.dataset.train.src == "data/is2re/100k/train/data.lmdb"
    assert config.dataset.val["val_id"].src == "data/is2re/all/val_id/data.lmdb"
    assert config.outputs["energy"].normalizer.stdev == 2.279365062713623
    assert config.optim.multistep.milestones == [17981, 26972, 35963] and config.optim.warmup_steps == 5394
    assert "no place here: model.use_pbc: True" in message and "all GPUs together" in message


def test_s2ef() -> None:
    config, message = _ours(S2EF)
    assert config.task == "s2ef" and config.model["max_neighbors"] == 30
    assert config.outputs["forces"].normalizer.stdev == 2.89
    assert config.losses["forces"].fn == "l2mae" and config.losses["forces"].coefficient == 100
    assert config.optim.plateau.factor == 0.8 and config.optim.plateau.patience == 3
    assert config.optim.optimizer_params == {"amsgrad": True} and config.optim.ema_decay == 0.999
    assert "no place here: amp: True" in message


def test_the_command_line_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.yml").write_text(IS2RE)
    assert main(["--config", str(tmp_path / "old.yml")]) == 2
    assert "ready to paste:" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(Path(__file__).resolve().parents[2].glob("configs/*/*.yml")), ids=str)
def test_ours_are_not_taken_for_it(path: Path) -> None:
    from faenet_ocp.config.ocp1 import is_ocp1

    assert not is_ocp1(yaml.safe_load(path.read_text()))
