"""docs/evidence.md shows what the committed results say, in its tables and in its claims."""

import json
import statistics
from pathlib import Path
from typing import Any

from faenet_ocp.evaluation.comparison import render_comparison
from faenet_ocp.evidence.expressivity_table import summary
from faenet_ocp.evidence.symmetry_runs import SymmetryOfRun, render_runs

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _json(name: str) -> dict[str, Any]:
    return json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())


def test_tables_are_those_of_the_results() -> None:
    text = (DOCS / "evidence.md").read_text()
    symmetry = ("symmetry_demo", "symmetry_s2ef_demo", "symmetry_qm9")
    tables = {
        **{n: render_runs([SymmetryOfRun(name, **run) for name, run in _json(n).items()]) for n in symmetry},
        "expressivity": summary(_json("expressivity")),
        "table6_demo": render_comparison(_json("table6_demo"), ablations=True),
    }
    for name, table in tables.items():
        assert text.split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0].strip() == table.strip(), name


def _symmetry(run: str, method: str, motion: str, *, file: str = "symmetry_demo", target: str = "energy") -> float:
    """Mean difference in meV."""
    return 1e3 * _json(file)[run]["symmetry"]["methods"][method][motion][target]["mean"]


def _on_qm9(run: str, method: str, motion: str) -> float:
    return _symmetry(f"models_faenet{run}", method, motion, file="symmetry_qm9", target="U0")


def _error(results: dict[str, Any]) -> float:
    """Mean over the splits, in meV."""
    return 1e3 * results["average"]["energy_mae"]


def _force_error_in(method: str) -> str:
    results = _json("symmetry_s2ef_demo")[f"symmetry_s2ef_{method}"]["results"]
    return f"{1e3 * results['average']['forces_mae']:.0f}"


def _error_in(method: str) -> str:
    return f"{_error(_json('symmetry_demo')[f'symmetry_{method}']['results']):.0f}"


def _speed(file: str, group: tuple[str, str, str], model: str) -> float:
    groups = {(g["name"], g["task"], g.get("mode")): g["rows"] for g in _json(file)["groups"]}
    return next(row["speed_up"] for row in groups[group] if row["model"] == model)


def _accuracy(network: str, pair: str) -> str:
    found = _json("expressivity")["accuracy"][f"{network} | {pair}"]
    return " / ".join(f"{sum(column) / len(column):.0f}" for column in zip(*found, strict=True))


def _ablation(row: str) -> str:
    errors = [_error(results) for results in _json("table6_demo")[row]]
    return f"{statistics.fmean(errors):.0f} +- {statistics.stdev(errors):.0f}"


def _forces_cost() -> tuple[str, str]:
    """How many times the time and the memory of predicted forces those of the gradient take."""
    (group,) = _json("cpu_forces")["groups"]
    predicted, gradient = group["rows"]
    return f"{1 / gradient['speed_up']:.1f}", f"{gradient['peak_bytes'] / predicted['peak_bytes']:.0f}"


def _turned_forces(run: str, method: str) -> str:
    """What EScAIP's forces change by, in meV/A."""
    return f"{_symmetry(f'escaip_frames_{run}', method, 'rotated', file='escaip_frames', target='forces'):.2g}"


def _claims() -> dict[int, list[str]]:
    """By number of the claim, the figures that its row has to show."""
    chain, star, four = "k-chains: k = 4, 1 layers", "rotational symmetry: 5 spokes", "body order: 4-body"
    return {
        1: [f"{_symmetry('symmetry_full_E', 'full', motion):.1g}" for motion in ("rotated", "reflected")],
        2: [f"{_symmetry('symmetry_stochastic_E', 'stochastic', motion):.1f}" for motion in ("rotated", "same")]
        + [
            f"{_symmetry('symmetry_none', 'none', 'rotated'):.1f}",
            f"{_symmetry('symmetry_augmented_E', 'none', 'rotated'):.1f}",
        ]
        + [f"{_on_qm9('', 'stochastic', motion):.1f}" for motion in ("rotated", "same")]
        + [f"{_on_qm9('_no_frames', 'none', 'rotated'):.1f}", f"{_on_qm9('_canonical', 'canonical', 'rotated'):.1g}"],
        3: [f"{1 / _speed('cpu_frames', ('frames', 'is2re', 'inference'), 'frames: full'):.1f}"],
        4: [_error_in(name) for name in ("stochastic_E", "full_E", "canonical_E", "augmented_E", "none")]
        + [_force_error_in(name) for name in ("stochastic_E", "full_E")],
        5: [_accuracy(f"FAENet, {kind}", chain) for kind in ("no frames", "stochastic, E(3)", "canonical, E(3)")],
        6: [_accuracy(f"FAENet, {kind}", star) for kind in ("no frames", "stochastic, E(3)", "canonical, E(3)")],
        7: [_accuracy(f"FAENet, {kind}", four) for kind in ("no frames", "stochastic, E(3)", "canonical, E(3)")],
        8: [_ablation(row) for row in ("baseline", "basic_mp", "attention", "simple_energy_head")],
        9: [f"{_error(_json('models_demo')[name][0]):.0f}" for name in ("faenet", "schnet", "painn")],
        10: [f"{_speed(name, ('peers', 'is2re', 'inference'), 'FAENet'):.2f}" for name in ("cpu_peers", "cpu_amd")],
        11: [f"{_speed('cpu_peers', ('peers', 's2ef', 'inference'), 'FAENet'):.2f}"],
        12: [f"{1e3 * _json('qm9_U0')['splits']['test']['U0_mae']:.1f}"],
        14: [_turned_forces("no_frames", "none"), _turned_forces("canonical", "canonical")],
        15: [*_forces_cost()],
    }


def test_claims_show_what_was_measured() -> None:
    rows = [line for line in (DOCS / "evidence.md").read_text().splitlines() if line.startswith("| ")]
    for number, figures in _claims().items():
        (row,) = [line for line in rows if line.startswith(f"| {number} |")]
        for figure in figures:
            assert f" {figure}" in row, (number, figure)
