"""Batched relaxation: the path that ASE takes, independent of the batch, results that survive, OCP's metrics."""

import importlib.util
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import ase.io
import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.optimize import LBFGS

import small_data
import small_runs
from faenet_ocp import relax
from faenet_ocp.inference.predictor import Prediction
from faenet_ocp.inference.relaxation_run import (
    average_distance_within_threshold,
    mean_distance,
    open_structures,
    relaxation_metrics,
    run,
)

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"fmax": 0.05, "max_steps": 40, "max_step": 0.2}
slab = small_runs.slab


def _prediction(atoms: ase.Atoms, energy: float, forces: np.ndarray, seen: np.ndarray | None = None) -> Prediction:
    return Prediction({"energy": energy, "forces": forces}, np.ones(len(atoms), dtype=bool) if seen is None else seen)


class EmtForces:
    """An analytic potential in place of a model; keeps what it is asked for."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, structures: Sequence[ase.Atoms]) -> list[Prediction]:
        self.batches.append([str(atoms.info.get("sid")) for atoms in structures])
        return [self.one(atoms) for atoms in structures]

    def one(self, atoms: ase.Atoms) -> Prediction:
        copy = atoms.copy()
        copy.calc = EMT()
        return _prediction(atoms, copy.get_potential_energy(), copy.get_forces(apply_constraint=False))


def _structures(count: int) -> list[ase.Atoms]:
    """Slabs of two sizes whose relaxations differ in length."""
    structures = [slab(i, layers=2 + i % 2) for i in range(count)]
    for number, atoms in enumerate(structures):
        atoms.info["sid"] = str(100 + number)
        atoms.positions[-1, 2] += 0.1 * number
    return structures


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_the_path_is_that_of_ase_whatever_the_companions(batch_size: int) -> None:
    evaluate = EmtForces()
    results = {r.index: r for r in relax(enumerate(_structures(5)), evaluate, batch_size=batch_size, **SETTINGS)}
    assert sorted(results) == [0, 1, 2, 3, 4]
    steps = set()
    for index, atoms in enumerate(_structures(5)):
        start, result = atoms.positions.copy(), results[index]
        atoms.calc = EMT()
        optimizer = LBFGS(atoms, logfile=None, memory=50)
        optimizer.run(fmax=SETTINGS["fmax"], steps=SETTINGS["max_steps"])
        count = optimizer.nsteps
        assert (result.steps, result.status) == (count, "converged" if count < 40 else "max_steps")
        np.testing.assert_allclose(result.atoms.positions, atoms.positions, rtol=0, atol=1e-9)
        assert result.atoms.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        assert result.atoms.get_potential_energy() < result.initial_energy
        moved = np.linalg.norm((result.atoms.positions - start).mean(axis=0))
        assert 0 < result.common_displacement == pytest.approx(moved)
        assert np.linalg.norm(result.atoms.get_forces(), axis=1).max() == pytest.approx(result.fmax)
        fixed = atoms.get_tags() == 0
        assert (result.atoms.positions[fixed] == start[fixed]).all()
        steps.add(count)
    assert len(steps) > 1
    assert max(map(len, evaluate.batches)) == min(batch_size, 5)


def test_a_finished_structure_makes_room_for_the_next() -> None:
    evaluate = EmtForces()
    total = sum(r.steps + 1 for r in relax(enumerate(_structures(6)), evaluate, batch_size=2, **SETTINGS))
    assert sum(map(len, evaluate.batches)) == total
    order = list(dict.fromkeys(sid for batch in evaluate.batches for sid in batch))
    assert order == [str(100 + i) for i in range(6)]
    last_start = next(i for i, batch in enumerate(evaluate.batches) if "105" in batch)
    assert all(len(batch) == 2 for batch in evaluate.batches[:last_start])


def test_steps_are_limited(tmp_path: Path) -> None:
    atoms = slab()
    atoms.positions[-1, 2] += 1.5
    limits = {"fmax": 0.01, "max_steps": 7, "max_step": 0.05}
    (result,) = relax([(3, atoms)], EmtForces(), trajectories=tmp_path, **limits)
    assert (result.status, result.steps) == ("max_steps", 7)
    assert [path.name for path in tmp_path.iterdir()] == ["3.traj"]
    frames = ase.io.read(tmp_path / "3.traj", ":")
    assert len(frames) == 8
    jumps = [np.linalg.norm(b.positions - a.positions, axis=1).max() for a, b in itertools.pairwise(frames)]
    assert max(jumps) == pytest.approx(0.05)
    assert frames[-1].get_potential_energy() == pytest.approx(result.atoms.get_potential_energy())


def test_forces_that_do_not_change_are_followed() -> None:
    """A linear potential: LBFGS alone would divide by zero."""

    def constant(structures: Sequence[ase.Atoms]) -> list[Prediction]:
        return [_prediction(atoms, -float(atoms.positions[0, 2]), np.array([[0, 0, 1.0]])) for atoms in structures]

    (result,) = relax([(0, ase.Atoms("Cu", positions=[[0, 0, 0]]))], constant, fmax=0.01, max_steps=5)
    assert result.status == "max_steps"
    np.testing.assert_allclose(result.atoms.positions, [[0, 0, 5 / 70]], rtol=0, atol=1e-9)


def test_a_structure_that_fails_does_not_disturb_the_others() -> None:
    class Failing(EmtForces):
        def one(self, atoms: ase.Atoms) -> Prediction:
            good = super().one(atoms)
            if atoms.info["sid"] == "101" and sum("101" in batch for batch in self.batches) > 3:
                return _prediction(atoms, np.nan, good.forces)
            return good

    results = {r.index: r for r in relax(enumerate(_structures(3)), Failing(), **SETTINGS)}
    alone = {r.index: r for r in relax(enumerate(_structures(3)), EmtForces(), **SETTINGS)}
    assert (results[1].status, results[1].steps) == ("failed", 3)
    assert np.isfinite(results[1].atoms.get_potential_energy())
    for index in (0, 2):
        np.testing.assert_array_equal(results[index].atoms.positions, alone[index].atoms.positions)


def _energies_only(structures: Sequence[ase.Atoms]) -> list[Prediction]:
    return [Prediction({"energy": 0.0}, np.ones(len(atoms), dtype=bool)) for atoms in structures]


def test_mistakes() -> None:
    def broken(structures: Sequence[ase.Atoms]) -> list[Prediction]:
        return [_prediction(atoms, 0.0, np.full((len(atoms), 3), np.nan)) for atoms in structures]

    def blind(structures: Sequence[ase.Atoms]) -> list[Prediction]:
        return [_prediction(atoms, 0.0, np.ones((len(atoms), 3)), atoms.get_tags() != 0) for atoms in structures]

    loose = slab()
    loose.set_constraint()
    for atoms, evaluate, message in (
        (slab(), broken, "structure 4: energy or forces at its initial positions are not finite"),
        (slab(), _energies_only, "needs forces"),
        (loose, blind, r"structure 4: .*not fixed: \[0, 1, 2, 3, 4, 5, 6, 7\]; fix them"),
    ):
        with pytest.raises(ValueError, match=message):
            list(relax([(4, atoms)], evaluate))
    assert list(relax([(4, slab())], blind, max_steps=1))
    with pytest.raises(ValueError, match="batch_size: 0 is not positive"):
        list(relax([], blind, batch_size=0))


# ------------------------------------------------------------------------------------ a whole job
def _frames(folder: Path) -> dict[int, ase.Atoms]:
    return {atoms.info["input_index"]: atoms for atoms in ase.io.iread(folder / "relaxed.extxyz")}


def _assert_same(one: Path, other: Path) -> None:
    first, second = _frames(one), _frames(other)
    assert sorted(first) == sorted(second)
    for index, atoms in first.items():
        np.testing.assert_array_equal(atoms.positions, second[index].positions)
        assert atoms.info == second[index].info
    assert json.loads((one / "metrics.json").read_text()) == json.loads((other / "metrics.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job") / "uninterrupted"
    run(_structures(6), EmtForces(), folder, settings=SETTINGS, batch_size=2)
    return folder


def test_results_hold_what_was_found(uninterrupted: Path) -> None:
    frames = _frames(uninterrupted)
    by_hand = {r.index: r for r in relax(enumerate(_structures(6)), EmtForces(), **SETTINGS)}
    assert sorted(frames) == list(range(6))
    for index, atoms in frames.items():
        result = by_hand[index]
        np.testing.assert_allclose(atoms.positions, result.atoms.positions, rtol=0, atol=1e-7)
        np.testing.assert_allclose(atoms.get_forces(), result.atoms.get_forces(), rtol=0, atol=1e-7)
        assert atoms.get_potential_energy() == pytest.approx(result.atoms.get_potential_energy(), abs=1e-9)
        found = (atoms.info["steps"], atoms.info["status"], str(atoms.info["sid"]))
        assert found == (result.steps, result.status, str(100 + index))
        np.testing.assert_array_equal(atoms.get_tags(), result.atoms.get_tags())
        np.testing.assert_array_equal(atoms.constraints[0].index, result.atoms.constraints[0].index)
    metrics = json.loads((uninterrupted / "metrics.json").read_text())
    steps = [result.steps for result in by_hand.values()]
    assert (metrics["num_structures"], metrics["mean_steps"]) == (6, pytest.approx(np.mean(steps)))
    assert "energy" not in metrics


def test_a_finished_job_is_not_done_again(uninterrupted: Path) -> None:
    evaluate, before = EmtForces(), (uninterrupted / "relaxed.extxyz").read_bytes()
    run(_structures(6), evaluate, uninterrupted, settings=SETTINGS, batch_size=3)
    assert evaluate.batches == []
    assert (uninterrupted / "relaxed.extxyz").read_bytes() == before


def test_other_settings_need_another_folder(uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"other settings \(fmax: 0.05, now 0.1\); choose another folder"):
        run(_structures(6), EmtForces(), uninterrupted, settings={**SETTINGS, "fmax": 0.1})
    with pytest.raises(ValueError, match="num_structures: 6, now 5"):
        run(_structures(5), EmtForces(), uninterrupted, settings=SETTINGS)
    # A run that ended before it had any result leaves nothing in the way.
    with pytest.raises(ValueError, match="needs forces"):
        run(_structures(1), _energies_only, tmp_path, settings=SETTINGS)
    run(_structures(1), EmtForces(), tmp_path, settings={**SETTINGS, "fmax": 0.1})


@pytest.mark.parametrize("cut", [1, 40, 700])
def test_a_torn_last_frame_is_relaxed_again(uninterrupted: Path, tmp_path: Path, cut: int) -> None:
    (tmp_path / "settings.json").write_bytes((uninterrupted / "settings.json").read_bytes())
    whole = (uninterrupted / "relaxed.extxyz").read_bytes()
    (tmp_path / "relaxed.extxyz").write_bytes(whole[:-cut])
    evaluate = EmtForces()
    run(_structures(6), evaluate, tmp_path, settings=SETTINGS, batch_size=2)
    assert len({sid for batch in evaluate.batches for sid in batch}) == 1
    _assert_same(tmp_path, uninterrupted)


class _Killing(EmtForces):
    """Kills its process when the fifth structure begins."""

    def one(self, atoms: ase.Atoms) -> Prediction:
        if atoms.info["sid"] == "104":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().one(atoms)


def test_a_killed_job_goes_on(uninterrupted: Path, tmp_path: Path) -> None:
    options = {"settings": SETTINGS, "batch_size": 2, "keep_trajectories": True}
    job = (_structures(6), _Killing(), tmp_path)
    process = multiprocessing.get_context("fork").Process(target=run, args=job, kwargs=options)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "metrics.json").exists()
    finished = _frames(tmp_path)
    assert len(finished) == 3
    evaluate = EmtForces()
    run(_structures(6), evaluate, tmp_path, **options)
    redone = {sid for batch in evaluate.batches for sid in batch}
    assert redone == {str(100 + i) for i in range(6) if i not in finished}
    _assert_same(tmp_path, uninterrupted)
    assert sorted(path.name for path in (tmp_path / "trajectories").iterdir()) == [f"{i}.traj" for i in range(6)]


# ------------------------------------------------------------------------------------ metrics
def _adwt_of_ocp(distances: Sequence[float]) -> float:
    """OCP's definition, written out: thresholds 0.01, 0.011, ... below 0.5."""
    successes = sum(distance < 0.01 + 0.001 * step for step in range(490) for distance in distances)
    return 100 * successes / (490 * len(distances))


@pytest.mark.parametrize("distances", [[0.0005, 0.0304, 0.2507, 0.4996, 0.7], [0.0], [0.5], [np.nan]])
def test_average_distance_within_threshold(distances: list[float]) -> None:
    assert average_distance_within_threshold(distances) == pytest.approx(_adwt_of_ocp(distances), abs=1e-9)


def test_distances_are_those_of_free_atoms_to_their_nearest_image() -> None:
    atoms = slab()
    free = atoms.get_tags() != 0
    other = atoms.positions.copy()
    other[~free] += 5.0
    assert mean_distance(atoms, other) == pytest.approx(0, abs=1e-12)
    other[free] += (0.3, 0, 0.4)
    other[-1] += atoms.cell[0] - 2 * atoms.cell[1]
    assert mean_distance(atoms, other) == pytest.approx(0.5)
    atoms.pbc = False
    assert mean_distance(atoms, other) > 1
    atoms.set_constraint()
    atoms.positions += 1
    assert mean_distance(atoms, atoms.positions - (0, 0, 2)) == pytest.approx(2)


def test_metrics_of_relaxed_structures() -> None:
    frames = []
    for index, (status, error, shift) in enumerate([("converged", 0.01, 0.02), ("failed", -0.5, 0.3)]):
        atoms = slab(index)
        atoms.set_array("pos_relaxed", atoms.positions + np.array([0, 0, shift]))
        atoms.info |= {"y_relaxed": 1.0, "steps": 2 + index, "status": status}
        atoms.calc = SinglePointCalculator(atoms, energy=1.0 + error)
        frames.append(atoms)
    metrics = relaxation_metrics(frames)
    assert (metrics["num_structures"], metrics["num_converged"], metrics["num_failed"]) == (2, 1, 1)
    assert metrics["mean_steps"] == 2.5
    assert metrics["energy"]["energy_mae"] == pytest.approx(0.255)
    assert metrics["energy"]["energy_within_threshold"] == 50
    assert metrics["positions"]["mean_distance"] == pytest.approx(0.16, abs=1e-6)
    expected = _adwt_of_ocp([0.02, 0.3])
    assert metrics["positions"]["average_distance_within_threshold"] == pytest.approx(expected, abs=0.11)


# ------------------------------------------------------------------------------------ with a checkpoint
@pytest.fixture(scope="module")
def checkpoint(small_s2ef: Path) -> Path:
    return small_runs.train("s2ef", small_s2ef)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("relax_script", ROOT / "scripts" / "relax.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_structures_of_an_lmdb(small_is2re: Path, small_s2ef: Path) -> None:
    structures = open_structures(small_is2re / "is2re" / "all" / "val_id")
    assert len(structures) == 4
    for index, atoms in enumerate(structures):
        expected = small_data.make_fields(index, seed=1)
        np.testing.assert_array_equal(atoms.positions, expected["pos"].double().numpy())
        np.testing.assert_array_equal(atoms.arrays["pos_relaxed"], expected["pos_relaxed"].double().numpy())
        np.testing.assert_array_equal(atoms.constraints[0].index, np.flatnonzero(expected["fixed"]))
        assert atoms.info == {"sid": str(expected["sid"]), "y_relaxed": pytest.approx(expected["y_relaxed"])}
        assert atoms.pbc.all()
    (frame,) = open_structures(small_s2ef / "s2ef" / "all" / "val_id" / "data.0000.lmdb")[:1]
    assert set(frame.info) == {"sid"}
    assert not frame.has("pos_relaxed")
    with pytest.raises(FileNotFoundError):
        open_structures(small_is2re / "nothing.xyz")
    with pytest.raises(ValueError, match="ASE cannot read it"):
        open_structures(Path(__file__))


def test_relaxed_positions_of_another_shape_are_an_error(tmp_path: Path) -> None:
    fields = small_data.make_fields(0) | {"pos_relaxed": small_data.make_fields(0)["pos"][:-1]}
    path = small_data.write_lmdb(tmp_path / "data.lmdb", [small_data.dump_record(fields)])
    with pytest.raises(ValueError, match=r"data\.lmdb: record 0 .*pos_relaxed"):
        open_structures(path)[0]


def test_the_command(
    checkpoint: Path, small_is2re: Path, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """IS2RE structures with their labels; the numbers recomputed from the results file."""
    source, output = small_is2re / "is2re" / "all" / "val_id" / "data.lmdb", tmp_path / "out"
    arguments = ["--checkpoint", str(checkpoint), "--input", str(source), "--output", str(output), "--max-steps", "5"]
    script.main([*arguments, "--batch-size", "3", "--trajectories", "--device", "cpu"])
    assert str(output / "metrics.json") in capsys.readouterr().out
    metrics, frames = json.loads((output / "metrics.json").read_text()), _frames(output)
    errors, distances = [], []
    for index, atoms in frames.items():
        label = small_data.make_fields(index, seed=1)
        errors.append(abs(atoms.get_potential_energy() - label["y_relaxed"]))
        free = label["fixed"].numpy() == 0
        shift = (atoms.positions - label["pos_relaxed"].numpy())[free]
        distances.append(np.linalg.norm(shift, axis=1).mean())
        assert len(ase.io.read(output / "trajectories" / f"{index}.traj", ":")) == atoms.info["steps"] + 1
    assert metrics["num_structures"] == len(frames) == 4
    assert metrics["energy"]["energy_mae"] == pytest.approx(np.mean(errors), abs=1e-5)
    assert metrics["positions"]["mean_distance"] == pytest.approx(np.mean(distances), abs=1e-5)
    adwt = metrics["positions"]["average_distance_within_threshold"]
    assert adwt == pytest.approx(_adwt_of_ocp(distances), abs=0.11)
    script.main([*arguments, "--batch-size", "1"])
    with pytest.raises(SystemExit, match="other settings"):
        script.main([*arguments, "--frames", "full"])


def test_the_command_on_a_file_of_ase(checkpoint: Path, script: ModuleType, tmp_path: Path) -> None:
    structures = [slab(0), slab(1)]
    for atoms in structures:
        atoms.info = {}  # ASE's builders leave there what it cannot write
    ase.io.write(tmp_path / "slabs.extxyz", structures)
    arguments = ["--input", str(tmp_path / "slabs.extxyz"), "--output", str(tmp_path / "out"), "--max-steps", "2"]
    script.main(["--checkpoint", str(checkpoint), *arguments])
    frames = _frames(tmp_path / "out")
    assert sorted(frames) == [0, 1]
    for index, atoms in frames.items():
        fixed = slab(index).get_tags() == 0
        np.testing.assert_allclose(atoms.positions[fixed], slab(index).positions[fixed], rtol=0, atol=1e-7)
        assert np.abs(atoms.positions - slab(index).positions).max() > 1e-3
    with pytest.raises(SystemExit, match="there is no such file"):
        script.main(["--checkpoint", str(tmp_path / "none.pt"), *arguments])
