"""S2EF from the download to the leaderboard's file and to relaxed structures, by real commands on small data.

Training runs in a process of its own, as a user starts it; all else in this one.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import processes
from faenet_ocp.launch.cli import main
from faenet_ocp.prepare.s2ef import Options, prepare
from s2ef_raw import by_ase, write_raw

PARTS = ("id", "ood_ads", "ood_cat", "ood_both")
SMALL = [
    *("--model.hidden_channels=32", "--model.num_filters=32", "--model.num_interactions=2", "--model.num_gaussians=20"),
    *("--model.force_hidden_channels=32", "--model.tag_hidden_channels=8", "--model.pg_hidden_channels=8"),
    *("--optim.batch_size=4", "--optim.eval_batch_size=4", "--optim.num_workers=0", "--optim.max_steps=3"),
    *("--optim.warmup_steps=1", "--logger=none", "--cpu"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw downloads of training, validation and test splits, prepared by the script."""
    root = tmp_path_factory.mktemp("data")
    raw = write_raw(root / "raw" / "train", 2, fixed="subsurface")
    processes.run_script("prepare_s2ef.py", "--data-path", raw, "--out-path", root / "s2ef/2M/train", "--get-edges")
    for number, part in enumerate(PARTS):
        raw = write_raw(root / "raw" / part, 1, frames=3 + number, fixed="subsurface")
        prepare(raw, root / f"s2ef/all/val_{part}", options=Options())
        prepare(raw, root / f"s2ef/all/test_{part}", options=Options(labels=False))
    return root


def test_from_the_download_to_the_leaderboard(data: Path, tmp_path: Path) -> None:
    common = [f"--dataset.root={data}", "--run-dir", str(tmp_path)]
    processes.run(["--config", "configs/s2ef/faenet.yml", "--identifier", "run", *common, *SMALL])
    checkpoint = tmp_path / "run" / "checkpoints" / "best.pt"
    evaluate = ["--checkpoint", str(checkpoint), "--frames.eval_method=canonical", "--run-dir", str(tmp_path)]
    tests = ", ".join(f"test_{part}: {{src: s2ef/all/test_{part}}}" for part in PARTS)
    predict = ["--mode", "predict", *evaluate, "--identifier", "sent", f"--dataset.test={{{tests}}}"]
    for command in (predict, ["--mode", "validate", *evaluate, "--identifier", "scored"]):
        assert main(command) == 0
    folder, out = tmp_path / "sent" / "results" / "predictions", tmp_path / "submission.npz"
    sources = ",".join(str(data / f"s2ef/all/test_{part}") for part in PARTS)
    processes.run_script(
        "make_submission.py", "--task", "s2ef", "--predictions", folder, "--sources", sources, "--out", out
    )

    scored = json.loads((tmp_path / "scored" / "results" / "metrics.json").read_text())["splits"]
    with np.load(out) as sent:
        for number, part in enumerate(PARTS):
            _same_errors(data / "raw" / part, sent, part, scored[f"val_{part}"], tmp_path)
            assert len(sent[f"{part}_ids"]) == 3 + number


def test_relaxing(s2ef_checkpoint: Path, small_is2re: Path, tmp_path: Path) -> None:
    structures = small_is2re / "is2re/all/val_id/data.lmdb"
    arguments = ["--checkpoint", s2ef_checkpoint, "--input", structures, "--output", tmp_path, "--max-steps", 2]
    processes.run_script("relax.py", *arguments)
    assert json.loads((tmp_path / "metrics.json").read_text())["num_structures"] == 4


def _same_errors(raw: Path, sent: np.lib.npyio.NpzFile, part: str, scored: dict[str, float], tmp_path: Path) -> None:
    """The errors of what is sent, against the labels of the download read by ASE, are those that `validate` tells."""
    energies = dict(zip(sent[f"{part}_ids"], sent[f"{part}_energy"], strict=True))
    forces = dict(zip(sent[f"{part}_ids"], np.split(sent[f"{part}_forces"], sent[f"{part}_chunk_idx"]), strict=True))
    energy_errors, force_errors = [], []
    for atoms, (sid, fid, reference) in by_ase(raw, tmp_path):
        name = f"{sid.removeprefix('random')}_{fid.removeprefix('frame')}"
        free = np.setdiff1d(np.arange(len(atoms)), atoms.constraints[0].index)
        energy_errors.append(energies[name] - (atoms.get_potential_energy() - float(reference)))
        force_errors.append((forces[name] - atoms.get_forces(apply_constraint=False)[free]).ravel())
    # The leaderboard's files hold half precision.
    assert np.abs(energy_errors).mean() == pytest.approx(scored["energy_mae"], rel=2e-3)
    assert np.abs(np.concatenate(force_errors)).mean() == pytest.approx(scored["forces_mae"], rel=2e-3)
