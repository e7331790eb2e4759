"""Pairs of graphs: which are the same, what exact frames tell apart, and the command, which goes on."""

import json
import math
from pathlib import Path

import pytest
import torch

from faenet_ocp.evidence import expressivity, expressivity_table
from faenet_ocp.evidence.expressivity import Accuracy, congruence, pairs, rows, train

PAIRS = {f"{pair.test}: {pair.name}": pair for pair in pairs()}
ROWS = {row.name: row for row in rows()}


def test_congruence_of_the_paper_s_pairs() -> None:
    """The 4-body pair is one graph turned by 180 degrees; the 5- and 7-fold stars as well."""
    found = {name: congruence(pair.first, pair.second) for name, pair in PAIRS.items()}
    assert {name for name, same in found.items() if same == "rotated"} == {
        "body order: 4-body",
        *(f"rotational symmetry: {spokes} spokes" for spokes in (2, 3, 5, 7, 10)),
    }
    assert [name for name, same in found.items() if same == "mirrored"] == ["scalene triangle: mirror images"]
    cos, sin = math.cos(math.pi), math.sin(math.pi)
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])  # about z
    four = PAIRS["body order: 4-body"]
    assert torch.cdist(four.first @ turn, four.second).min(dim=1).values.max() < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_congruence_of_moved_clouds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cloud = torch.randn(5, 3, generator=generator)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    turn = q * torch.det(q).sign()
    assert congruence(cloud, (cloud @ turn + 3)[torch.randperm(5, generator=generator)]) == "rotated"
    assert congruence(cloud, -cloud @ turn) == "mirrored"
    other = cloud.clone()
    other[0, 0] += 0.2
    assert congruence(cloud, other) == "no"


def test_exact_frames_tell_apart_what_differs_and_nothing_else() -> None:
    """Also on moved copies."""
    trained = {
        name: train(PAIRS[name], ROWS["FAENet, canonical, E(3)"], 0, epochs=30)
        for name in ("body order: 3-body", "body order: 4-body", "scalene triangle: mirror images")
    }
    assert trained.pop("body order: 3-body") == Accuracy(100, 100, 100)
    for name, accuracy in trained.items():
        assert accuracy.final == accuracy.moved == 50, name


@pytest.mark.slow
def test_frames_that_are_no_mirrors_tell_mirror_images_apart() -> None:
    """It takes longer than the protocol has."""
    pair = PAIRS["scalene triangle: mirror images"]
    assert train(pair, ROWS["FAENet, canonical, SE(3)"], 0, epochs=600) == Accuracy(100, 100, 100)


def test_the_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [PAIRS["body order: 2-body"]]
    for module in (expressivity, expressivity_table):
        monkeypatch.setattr(module, "pairs", lambda: iter(chosen))
        monkeypatch.setattr(module, "rows", lambda: [ROWS["SchNet"], ROWS["FAENet, full, E(3)"]])
    out = tmp_path / "out.json"
    for seeds in (1, 2):
        table = expressivity_table.run(out, seeds=seeds, epochs=2, num_workers=1)
        found = json.loads(out.read_text())["accuracy"]
        assert [len(values) for values in found.values()] == [seeds, seeds]
    assert table == out.with_suffix(".md").read_text()
    assert "| SchNet             | body order: 2-body |        no |" in table
    with pytest.raises(ValueError, match="was made with --epochs 2, not 3"):
        expressivity_table.run(out, seeds=1, epochs=3, num_workers=1)
    out.write_text("{}")
    with pytest.raises(ValueError, match="holds something else"):
        expressivity_table.run(out, seeds=1, epochs=2, num_workers=1)
