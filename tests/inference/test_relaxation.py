"""Batched relaxation: the path that ASE takes, independent of the batch, results that survive, OCP's metrics."""

import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import ase.io
import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLength, FixCartesian, FixScaled, dict2constraint
from ase.optimize import LBFGS

import small_data
import small_runs
from faenet_ocp import FAENetCalculator, relax
from faenet_ocp.data.atoms import fixed_atoms
from faenet_ocp.inference.predictor import Prediction
from faenet_ocp.inference.relaxation_run import (
    average_distance_within_threshold,
    mean_distance,
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


def test_constraints_that_cannot_be_kept_do_not_disturb_the_others() -> None:
    structures = _structures(2)
    structures[0].set_constraint(FixBondLength(0, 1))
    structures[0].constraints[0].maxiter = 0
    failed, other = sorted(relax(enumerate(structures), EmtForces(), **SETTINGS), key=lambda result: result.index)
    assert (failed.status, failed.steps, failed.reason) == (
        "failed",
        0,
        "its constraints cannot be kept (Did not converge)",
    )
    np.testing.assert_array_equal(failed.atoms.positions, _structures(2)[0].positions)
    assert other.steps > 0


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
    for limit, message in (("batch_size", "batch_size: 0 is not positive"), ("max_steps", "max_steps: -1 is negative")):
        with pytest.raises(ValueError, match=message):
            list(relax([], blind, **{limit: int(message.split()[1])}))


@pytest.mark.parametrize("energies_only", [False, True])
def test_no_steps_evaluate_structures_as_they_are(energies_only: bool) -> None:
    evaluate = _energies_only if energies_only else EmtForces()
    for result in relax(enumerate(_structures(2)), evaluate, max_steps=0):
        atoms, emt = _structures(2)[result.index], EmtForces().one(result.atoms)
        assert (result.steps, result.status) == (0, "max_steps")
        np.testing.assert_array_equal(result.atoms.positions, atoms.positions)
        assert result.initial_energy == result.atoms.get_potential_energy() == (0 if energies_only else emt.energy)
        if not energies_only:
            np.testing.assert_array_equal(result.atoms.get_forces(apply_constraint=False), emt.forces)


@pytest.mark.parametrize(
    "constraints",
    [
        [FixAtoms(range(8))],
        [FixScaled(range(8))],
        [FixCartesian(range(8), (True, False, True)), FixCartesian(range(8), (False, True, False))],
        [FixCartesian([i], (True, True, True)) for i in range(8)],
    ],
)
def test_atoms_that_cannot_move_are_fixed(constraints: list) -> None:
    atoms = slab()
    atoms.set_constraint(constraints)
    np.testing.assert_array_equal(fixed_atoms(atoms), np.arange(len(atoms)) < 8)
    atoms.set_constraint([FixCartesian(range(8), (True, True, False)), FixScaled([0, 1], (True, False, True))])
    assert not fixed_atoms(atoms).any()


def test_more_trajectories_than_open_files(tmp_path: Path) -> None:
    def relax_all() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10,) * 2)
        options = {"max_steps": 3, "batch_size": 40, "trajectories": tmp_path}
        assert len(list(relax(((i, slab(0, layers=1)) for i in range(40)), EmtForces(), **options))) == 40

    process = multiprocessing.get_context("fork").Process(target=relax_all)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert {len(ase.io.read(path, ":")) for path in tmp_path.glob("*.traj")} == {4}
    assert len(list(tmp_path.iterdir())) == 40


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
    assert list(frames) == list(range(6)) != list(by_hand), "in the order of the input, which is not that of finishing"
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
    moved, tagged, freed, named = (_structures(6) for _ in range(4))
    moved[3].positions[-1, 0] += 1e-6
    tagged[3].set_tags(2)
    freed[3].set_constraint()
    named[3].info["sid"] = "other"
    for structures in (moved, tagged, freed, named):
        with pytest.raises(ValueError, match=r"other settings \(the content of the structures has changed\)"):
            run(structures, EmtForces(), uninterrupted, settings=SETTINGS)
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


SIDS = ("", "two\nlines", "0012", "1e5", "T", "a b", "q\"u\\o'te =[x] {y}", "_JSON 1", " input_index=7 ", "\u00e9", "7")


def test_sids_come_back_as_they_went_in(tmp_path: Path) -> None:
    structures = [slab(0, layers=1) for _ in SIDS]
    for atoms, sid in zip(structures, SIDS, strict=True):
        atoms.info["sid"] = sid
    run(structures, EmtForces(), tmp_path, settings=SETTINGS | {"max_steps": 0})
    assert [atoms.info["sid"] for atoms in _frames(tmp_path).values()] == list(SIDS)
    assert list(_frames(tmp_path)) == list(range(len(SIDS)))


def test_constraints_are_kept(tmp_path: Path) -> None:
    given = [
        [FixAtoms([0, 1, 2]), FixCartesian([3, 4], (True, True, False))],
        [FixScaled([0, 1]), FixBondLength(12, 13)],
        [FixScaled([0, 1], (True, False, True))],
    ]
    structures = [slab(2) for _ in given]
    for atoms, constraints in zip(structures, given, strict=True):
        atoms.set_constraint(constraints)
    run(structures, EmtForces(), tmp_path, settings=SETTINGS | {"max_steps": 2})
    moves = np.random.default_rng(0).normal(scale=0.1, size=(len(slab(2)), 3))
    for atoms, constraints in zip(_frames(tmp_path).values(), given, strict=True):
        kept = atoms.constraints + [dict2constraint(one) for one in atoms.info.get("constraints", ())]
        after = []
        for some in (constraints, kept):
            probe = slab(2)
            probe.set_constraint(some)
            probe.set_positions(probe.positions + moves)
            after.append(probe.positions)
        np.testing.assert_allclose(*after, rtol=0, atol=1e-9)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    refused = []

    class Twice(EmtForces):
        def one(self, atoms: ase.Atoms) -> Prediction:
            if len(self.batches) == 3:
                try:
                    run(_structures(3), EmtForces(), tmp_path, settings=SETTINGS)
                except ValueError as error:
                    refused.append(str(error))
            return super().one(atoms)

    run(_structures(3), Twice(), tmp_path, settings=SETTINGS)
    assert refused
    assert all(message.startswith(f"{tmp_path}: another process is writing there") for message in refused)
    assert list(_frames(tmp_path)) == [0, 1, 2]
    run(_structures(3), _energies_only, tmp_path, settings=SETTINGS)  # the lock is free again


class _Unusable(Sequence):
    """Five structures: 0 cannot be read, 1 cannot be taken, 2 gives no number, 4 fails in its third step."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> ase.Atoms:
        if index == 0:
            raise ValueError("a.vasp: ASE cannot read it")
        return _structures(5)[index]

    @staticmethod
    def forces(structures: Sequence[ase.Atoms]) -> list[Prediction]:
        predictions = EmtForces()(structures)
        for atoms, prediction in zip(structures, predictions, strict=True):
            if atoms.info["sid"] == "101":
                raise ValueError("has atoms 0 and 1 on one point")
            if atoms.info["sid"] == "102":
                prediction.values["energy"] = np.nan
            if atoms.info["sid"] == "104" and abs(atoms.positions[-1, 2] - _structures(5)[4].positions[-1, 2]) > 0.1:
                raise ValueError("too far")
        return predictions


def test_unusable_structures_are_left_out_and_listed(tmp_path: Path) -> None:
    for _ in range(2):  # the second time nothing is left to do, and the list is the same
        metrics = run(_Unusable(), _Unusable.forces, tmp_path, settings=SETTINGS)
        assert metrics["left_out"] == [
            {"index": 0, "sid": None, "reason": "a.vasp: ASE cannot read it"},
            {"index": 1, "sid": "101", "reason": "has atoms 0 and 1 on one point"},
            {"index": 2, "sid": "102", "reason": "energy or forces at its initial positions are not finite"},
        ]
        assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    frames = _frames(tmp_path)
    assert list(frames) == [3, 4]
    assert (frames[4].info["status"], frames[4].info["steps"] > 0) == ("failed", True)
    assert frames[4].info["reason"] == "too far"
    (alone,) = relax([(3, _structures(5)[3])], EmtForces(), **SETTINGS)
    np.testing.assert_allclose(frames[3].positions, alone.atoms.positions, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="ASE cannot read it"):
        run(_Unusable(), _Unusable.forces, tmp_path / "strict", settings=SETTINGS, strict=True)
    with pytest.raises(ValueError, match="structure 1: has atoms 0 and 1 on one point"):
        list(relax([(1, _structures(2)[1])], _Unusable.forces))
    with pytest.raises(ValueError, match="none of the 1 structures is usable; the first: has atoms"):
        run(_structures(2)[1:], _Unusable.forces, tmp_path / "none", settings=SETTINGS)


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
        atoms.info |= {"y_relaxed": 1.0, "steps": 2 + index, "status": status, "common_displacement": shift}
        atoms.calc = SinglePointCalculator(atoms, energy=1.0 + error)
        frames.append(atoms)
    metrics = relaxation_metrics(frames)
    assert (metrics["num_structures"], metrics["num_converged"], metrics["num_failed"]) == (2, 1, 1)
    assert metrics["mean_steps"] == 2.5
    assert (metrics["mean_common_displacement"], metrics["max_common_displacement"]) == (pytest.approx(0.16), 0.3)
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


def test_the_command_leaves_out_what_it_cannot_use(
    checkpoint: Path, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of POSCARs, energies and forces as they are, by the folder of a run; compared with the calculator."""
    (tmp_path / "in").mkdir()
    structures = [slab(number) for number in range(3)]
    structures[2].positions[3] = structures[2].positions[5] + structures[2].cell[0]
    for number, atoms in enumerate(structures):
        ase.io.write(tmp_path / "in" / f"{number}.vasp", atoms, format="vasp")
    arguments = ["--checkpoint", str(checkpoint.parents[1]), "--input", str(tmp_path / "in"), "--max-steps", "0"]
    with pytest.raises(SystemExit, match=r"none .* usable; the first: .*has no tags, .* tags: file"):
        script.main([*arguments, "--output", str(tmp_path / "untagged")])
    arguments += ["--tags", "fixed", "--adsorbate", "metal"]
    with pytest.raises(SystemExit) as ending:
        script.main([*arguments, "--output", str(tmp_path / "out")])
    assert ending.value.code == 3
    assert "1 structures could not be used" in capsys.readouterr().err
    (left_out,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["left_out"]
    assert (left_out["index"], left_out["sid"]) == (2, "2.vasp")
    assert "atoms 3 and 5 on one point" in left_out["reason"]
    for name, atoms in zip(("0.vasp", "1.vasp"), _frames(tmp_path / "out").values(), strict=True):
        given = ase.io.read(tmp_path / "in" / name)
        given.calc = FAENetCalculator(checkpoint, tags="fixed", adsorbate="metal")
        assert atoms.info["sid"] == name and not atoms.has("tags")  # as it was given
        assert atoms.get_potential_energy() == pytest.approx(given.get_potential_energy(), abs=1e-5)
        np.testing.assert_allclose(atoms.get_forces(), given.get_forces(), rtol=0, atol=1e-5)
    with pytest.raises(SystemExit, match=r"error: structure 2: .*atoms 3 and 5 on one point"):
        script.main([*arguments, "--output", str(tmp_path / "strict"), "--strict"])
    with pytest.raises(SystemExit, match="error: device: 'cuda:99' cannot be used here"):
        script.main([*arguments, "--output", str(tmp_path / "device"), "--device", "cuda:99"])
