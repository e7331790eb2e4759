"""The ASE calculator: the numbers of validation, any Atoms, no stale state, clear errors."""

import copy
import json
import logging
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch
from ase.build import fcc111, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.constraints import FixAtoms

import small_runs
from faenet_ocp import FAENetCalculator, OC20LmdbDataset, Predictor, build, load_checkpoint
from faenet_ocp.config.schema import build_config
from faenet_ocp.launch.cli import main

VAL = {"is2re": "is2re/all/val_id", "s2ef": "s2ef/all/val_id"}
slab = small_runs.slab
State = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoints(small_is2re: Path, small_s2ef: Path) -> dict[str, Path]:
    return {task: small_runs.train(task, root) for task, root in (("is2re", small_is2re), ("s2ef", small_s2ef))}


@pytest.fixture
def is2re(checkpoints: dict[str, Path]) -> State:
    return load_checkpoint(checkpoints["is2re"])


@pytest.fixture
def s2ef(checkpoints: dict[str, Path]) -> State:
    return load_checkpoint(checkpoints["s2ef"])


def _samples(source: Path, labels: list[str]) -> tuple[list[ase.Atoms], OC20LmdbDataset]:
    """The records of an LMDB as Atoms, without the code under test, and as samples."""
    samples = OC20LmdbDataset({"src": str(source), "edges": "none", "labels": labels})
    structures = [
        ase.Atoms(
            numbers=sample.atomic_numbers.numpy(),
            positions=sample.pos.numpy(),
            cell=sample.cell[0].numpy(),
            pbc=True,
            tags=sample.tags.numpy(),
            constraint=FixAtoms(np.flatnonzero(sample.fixed.numpy())),
        )
        for sample in samples
    ]
    return structures, samples


def _results(folder: Path, mode: str, checkpoint: Path, *overrides: str) -> Path:
    """The results folder of the command line."""
    flags = ["--mode", mode, "--checkpoint", str(checkpoint), "--run-dir", str(folder), "--identifier", "check"]
    assert main([*flags, *overrides]) == 0
    return folder / "check" / "results"


# ------------------------------------------------------------------------------------ same numbers
@pytest.mark.parametrize("frames", ["canonical", "full", "det"])
def test_energies_of_predict(checkpoints: dict[str, Path], small_is2re: Path, tmp_path: Path, frames: str) -> None:
    results = _results(tmp_path, "predict", checkpoints["is2re"], f"--frames.eval_method={frames}")
    calculator = FAENetCalculator.from_checkpoint(checkpoints["is2re"], device="cpu", frames=frames)
    structures, _ = _samples(small_is2re / VAL["is2re"], [])
    energies = [calculator.get_potential_energy(atoms) for atoms in structures]
    np.testing.assert_allclose(energies, np.load(results / "predictions" / "val_id.npz")["energy"], rtol=0, atol=1e-5)
    assert np.std(energies) > 1e-3


@pytest.mark.parametrize("frames", ["canonical", "full"])
def test_errors_of_validate(checkpoints: dict[str, Path], small_s2ef: Path, tmp_path: Path, frames: str) -> None:
    results = _results(tmp_path, "validate", checkpoints["s2ef"], f"--frames.eval_method={frames}")
    reported = json.loads((results / "metrics.json").read_text())["splits"]["val_id"]
    calculator = FAENetCalculator.from_checkpoint(checkpoints["s2ef"], frames=frames)
    energy_errors, force_errors = [], []
    for atoms, label in zip(*_samples(small_s2ef / VAL["s2ef"], ["energy", "forces"]), strict=True):
        atoms.calc = calculator
        energy_errors.append(abs(atoms.get_potential_energy() - float(label.energy)))
        free = label.fixed.numpy() == 0
        force_errors.append(np.abs(atoms.get_forces(apply_constraint=False) - label.forces.numpy())[free])
    assert np.mean(energy_errors) == pytest.approx(reported["energy_mae"], abs=1e-5)
    assert np.concatenate(force_errors).mean() == pytest.approx(reported["forces_mae"], abs=1e-5)


def test_energies_on_the_sample(checkpoints: dict[str, Path], oc20_sample: Path, tmp_path: Path) -> None:
    overrides = [f"--dataset.root={oc20_sample}", "--dataset.edges=recompute", "--frames.eval_method=full"]
    results = _results(tmp_path, "predict", checkpoints["is2re"], *overrides)
    predictor = Predictor(load_checkpoint(checkpoints["is2re"]), frames="full")
    energies = [prediction.energy for prediction in predictor(_samples(oc20_sample / VAL["is2re"], [])[0])]
    np.testing.assert_allclose(energies, np.load(results / "predictions" / "val_id.npz")["energy"], rtol=0, atol=1e-5)


def test_structures_do_not_depend_on_each_other(s2ef: State) -> None:
    predictor = Predictor(s2ef, precision="float64")
    structures = [slab(0), molecule("H2O", tags=2), slab(1), slab(2, layers=4), ase.Atoms("O", tags=[2])]
    for together, atoms in zip(predictor(structures), structures, strict=True):
        (alone,) = predictor([atoms])
        assert together.energy == pytest.approx(alone.energy, abs=1e-10)
        np.testing.assert_allclose(together.forces, alone.forces, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------ any Atoms
def test_a_slab_in_vacuum_needs_no_third_periodic_direction(s2ef: State) -> None:
    predictor = Predictor(s2ef)
    whole, partly, flat, wire = slab(), slab(), slab(), slab()
    partly.pbc = flat.pbc = (True, True, False)
    flat.cell[2] = 0
    wire.pbc = (True, False, False)
    *energies, other = [prediction.energy for prediction in predictor([whole, partly, flat, wire])]
    np.testing.assert_allclose(energies, energies[0], rtol=0, atol=1e-6)
    assert abs(other - energies[0]) > 1e-4


def test_molecules_need_no_cell(s2ef: State) -> None:
    free, boxed = molecule("CH3OH", tags=2), molecule("CH3OH", tags=2, cell=[40, 40, 40], pbc=True)
    one, other = Predictor(s2ef)([free, boxed])
    assert one.energy == pytest.approx(other.energy, abs=1e-6)
    np.testing.assert_allclose(one.forces, other.forces, rtol=0, atol=1e-6)
    assert one.forces.shape == (6, 3)


@pytest.mark.parametrize("task", ["is2re", "s2ef"])
@pytest.mark.parametrize("cell", [None, [3.0, 3.0, 3.0]])
def test_one_atom(checkpoints: dict[str, Path], task: str, cell: list[float] | None) -> None:
    atoms = ase.Atoms("Cu", cell=cell, pbc=cell is not None, tags=[2])
    atoms.calc = FAENetCalculator.from_checkpoint(checkpoints[task])
    assert np.isfinite(atoms.get_potential_energy())
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    if task == "s2ef":
        assert np.isfinite(atoms.get_forces()).all()


def test_positions_are_not_wrapped(s2ef: State) -> None:
    """Frames follow the positions: the sample is what the data set would make of them."""
    atoms = slab()
    atoms.positions[-1] += atoms.cell[0]
    data = Predictor(s2ef).sample(atoms)
    np.testing.assert_allclose(data.pos.numpy(), atoms.positions, rtol=0, atol=1e-5)
    vectors = data.pos[data.edge_index[0]] - data.pos[data.edge_index[1]] + data.cell_offsets @ data.cell[0]
    assert vectors.norm(dim=1).max() < 6.001


def test_energy_is_invariant_in_double_precision(s2ef: State) -> None:
    sine, cosine = np.sin(0.7), np.cos(0.7)
    rotation = np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
    atoms, turned = slab(3), slab(3)
    turned.set_cell(atoms.cell.array @ rotation)
    turned.positions = atoms.positions @ rotation
    errors = {}
    for frames in ("canonical", "full", "none"):
        before, after = Predictor(s2ef, frames=frames, precision="float64")([atoms, turned])
        difference = np.abs(after.forces - before.forces @ rotation).max()
        errors[frames] = max(abs(before.energy - after.energy), difference)
    assert max(errors["canonical"], errors["full"]) < 1e-9
    assert errors["none"] > 1e-4


def test_precision(s2ef: State) -> None:
    single, double = (Predictor(s2ef, precision=name)([slab()])[0] for name in ("float32", "float64"))
    assert 0 < abs(single.energy - double.energy) < 1e-4
    np.testing.assert_allclose(single.forces, double.forces, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------ forces
def test_energy_checkpoints_say_why_they_have_no_forces(checkpoints: dict[str, Path]) -> None:
    atoms = slab()
    atoms.calc = FAENetCalculator.from_checkpoint(checkpoints["is2re"])
    assert np.isfinite(atoms.get_potential_energy())
    assert atoms.calc.predictor([atoms])[0].forces is None
    with pytest.raises(PropertyNotImplementedError, match="task is2re\) predicts energy only"):
        atoms.get_forces()
    with pytest.raises(ValueError, match="predicts no forces"):
        FAENetCalculator.from_checkpoint(checkpoints["is2re"], forces="energy_gradient")


@pytest.mark.parametrize("transforms", [{}, {"remove_subsurface": {}}])
@pytest.mark.parametrize("frames", ["canonical", "full"])
def test_gradient_forces_are_the_slope_of_the_energy(s2ef: State, transforms: dict, frames: str) -> None:
    s2ef["config"]["dataset"]["transforms"] = transforms
    predictor = Predictor(s2ef, frames=frames, forces="energy_gradient", precision="float64")
    atoms, step = slab(1), 1e-4
    forces = predictor([atoms])[0].forces
    for atom, axis in ((len(atoms) - 1, 0), (len(atoms) - 1, 2), (9, 1)):
        moved = [atoms.copy(), atoms.copy()]
        moved[0].positions[atom, axis] += step
        moved[1].positions[atom, axis] -= step
        above, below = predictor(moved)
        assert forces[atom, axis] == pytest.approx((below.energy - above.energy) / (2 * step), abs=1e-6)
    direct = Predictor(s2ef, frames=frames, precision="float64")([atoms])[0].forces
    assert np.abs(direct - forces).max() > 1e-3


def test_atoms_that_the_model_does_not_see(s2ef: State, caplog: pytest.LogCaptureFixture) -> None:
    s2ef["config"]["dataset"]["transforms"] = {"remove_subsurface": {}}
    atoms = slab(1)
    removed = atoms.get_tags() == 0
    atoms.calc = FAENetCalculator(Predictor(s2ef))
    forces = atoms.get_forces(apply_constraint=False)
    assert (forces[removed] == 0).all()
    assert (np.abs(forces[~removed]).max(axis=1) > 0).all()
    assert "not all of these atoms are fixed" not in caplog.text
    atoms.set_constraint()
    for shift in (0.01, 0.02):
        atoms.positions[-1, 2] += shift
        atoms.get_forces()
    assert caplog.text.count("not all of these atoms are fixed") == 1


def test_scalars_that_the_configuration_declares(s2ef: State) -> None:
    """A model of three targets, with weights as they are drawn: `gap` comes in its own units, as a property of ASE."""
    s2ef["config"]["outputs"]["gap"] = {"unit": "eV"}
    s2ef["model"], s2ef["ema"] = build.make_model(build_config(s2ef["config"])).state_dict(), None
    gaps = []
    for mean, stdev in ((0.0, 1.0), (3.0, 2.0)):
        s2ef["tasks"]["gap"] = {"mean": mean, "stdev": stdev, "element_references": None}
        calculator = FAENetCalculator(Predictor(s2ef))
        gaps.append(calculator.get_property("gap", slab()))
    assert calculator.predictor.properties == ("energy", "forces", "gap")
    assert set(calculator.results) == {"energy", "forces", "gap", "free_energy"}
    assert gaps[1] == pytest.approx(3 + 2 * gaps[0]) != gaps[0]


def test_the_net_force_is_taken_out_where_no_fixed_atom_is_seen(s2ef: State) -> None:
    s2ef["config"]["dataset"]["transforms"] = {"remove_subsurface": {}}
    held, free = slab(1), slab(2)
    held.set_constraint(FixAtoms(np.flatnonzero(held.get_tags() < 2)))
    kept, removed = (
        Predictor(s2ef, precision="float64", keep_net_force=keep)([held, free, slab(3)]) for keep in (True, False)
    )
    np.testing.assert_array_equal(removed[0].forces, kept[0].forces)
    for before, after in zip(kept[1:], removed[1:], strict=True):
        mean = before.forces[before.seen].mean(axis=0)
        assert np.abs(mean).max() > 1e-3
        np.testing.assert_allclose(after.forces[after.seen], before.forces[before.seen] - mean, rtol=0, atol=1e-12)
        assert not after.forces[~after.seen].any()


# ------------------------------------------------------------------------------------ state
def test_nothing_is_stale_along_a_path(s2ef: State) -> None:
    """One calculator through every kind of change gives what a new one gives."""

    def move(atoms: ase.Atoms) -> None:
        atoms.positions[-1] += (0.3, -0.2, 0.9)

    def strain(atoms: ase.Atoms) -> None:
        atoms.set_cell(atoms.cell.array * 1.05, scale_atoms=True)

    def open_boundary(atoms: ase.Atoms) -> None:
        atoms.pbc = (True, True, False)

    def exchange(atoms: ase.Atoms) -> None:
        atoms.numbers[0] = 46

    def retag(atoms: ase.Atoms) -> None:
        atoms.set_tags([2] * len(atoms))

    calculator, atoms = FAENetCalculator(Predictor(s2ef)), slab(2)
    before = calculator.get_potential_energy(atoms)
    changes: list[Callable[[ase.Atoms], None]] = [move, move, strain, open_boundary, exchange, retag, move]
    for change in changes:
        change(atoms)
        (expected,) = Predictor(s2ef)([atoms])
        energy = calculator.get_potential_energy(atoms)
        assert energy == pytest.approx(expected.energy, abs=1e-6)
        assert change is open_boundary or abs(energy - before) > 1e-6
        before = energy
    assert calculator.check_state(atoms) == []
    atoms.info["charge"] = 1  # this model does not read it, others do
    assert calculator.check_state(atoms) == ["info"]


@pytest.mark.parametrize("forces", ["prediction", "energy_gradient"])
def test_threads_share_a_calculator(s2ef: State, forces: str) -> None:
    structures = [slab(i, layers=2 + i % 3) for i in range(10)]
    calculator = FAENetCalculator(s2ef, forces=forces)
    expected = [Predictor(s2ef, forces=forces)([atoms])[0] for atoms in structures]

    def calculate(number: int) -> bool:
        atoms, answer = structures[number].copy(), expected[number]
        atoms.calc = calculator
        same = atoms.get_potential_energy() == answer.energy
        return same and np.array_equal(atoms.get_forces(apply_constraint=False), answer.forces)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(calculate, [*range(10)] * 4))


def test_copies_and_pickles_calculate_anew(s2ef: State) -> None:
    calculator, atoms = FAENetCalculator(s2ef), slab(2)
    energy = calculator.get_potential_energy(atoms)
    for other in (copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
        assert other.results == {}
        assert other.get_potential_energy(atoms) == energy
    assert calculator.results["energy"] == energy


def test_stochastic_frames_have_their_own_generator(s2ef: State) -> None:
    structures = [slab(i) for i in range(3)]

    def path(seed: int) -> list[float]:
        predictor = Predictor(s2ef, frames="stochastic", seed=seed)
        return [prediction.energy for _ in range(4) for prediction in predictor(structures)]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = path(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert path(1) == first != path(2)
    assert len(set(first)) > len(structures)


def test_stochastic_checkpoints_are_used_with_canonical_frames(s2ef: State) -> None:
    assert s2ef["config"]["frames"]["method"] == "stochastic"
    assert Predictor(s2ef).config.frames.evaluation_method == "canonical"
    s2ef["config"]["frames"]["eval_method"] = "full"
    assert Predictor(s2ef).config.frames.evaluation_method == "full"


# ------------------------------------------------------------------------------------ errors
def _nan() -> ase.Atoms:
    atoms = slab()
    atoms.positions[4, 1] = np.nan
    return atoms


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (ase.Atoms(), "no atoms"),
        (_nan(), r"positions of atoms \[4\] are not finite"),
        (ase.Atoms("XH", positions=[[0, 0, 0], [1, 0, 0]], tags=[2, 2]), "does not know element 0"),
        (ase.Atoms(numbers=[8, 121], positions=[[0, 0, 0], [1, 0, 0]], tags=[2, 2]), "does not know element 121"),
        (fcc111("Cu", (1, 1, 4), vacuum=5), r"has tags that are not OC20's 0, 1 and 2, but 1, 2, 3, 4; tags: file"),
        (ase.Atoms("Cu", cell=[3] * 3, pbc=True), "has no tags, which the model needs; tags: file takes OC20's"),
        (ase.Atoms("Cu", cell=[3, 3, 0], pbc=True, tags=[1]), "span no cell"),
        (ase.Atoms("HCO", positions=[[2, 0, 0], [0, 0, 0], [0, 0, 0]], tags=2), "atoms 1 and 2 on one point"),
        (
            ase.Atoms("Cu2", positions=np.diag([0, 3.6, 0])[:2], cell=[3.6] * 3, pbc=True, tags=1),
            "atoms 0 and 1 on one",
        ),
    ],
)
def test_structures_that_no_model_can_take(s2ef: State, atoms: ase.Atoms, message: str) -> None:
    atoms.info["sid"] = "17"
    with pytest.raises(ValueError, match=rf"^structure of {len(atoms)} atoms \(sid 17\): .*{message}"):
        Predictor(s2ef)([slab(), atoms])


def test_elements_that_the_model_does_not_know(s2ef: State) -> None:
    (name,) = (name for name in s2ef["model"] if name.endswith("known_elements"))
    s2ef["model"][name][[29, 78]] = False
    with pytest.raises(ValueError, match=r"does not know element 29 \(Cu\), element 78 \(Pt\)"):
        Predictor(s2ef)([ase.Atoms("OPtCu", positions=np.eye(3) * 2, tags=[2, 1, 1])])


def test_tags_and_adsorbate_of_other_programs(s2ef: State, is2re: State, caplog: pytest.LogCaptureFixture) -> None:
    """As CatBench drives calculators: fixed atoms in FixAtoms, no tags, or the same for all, the adsorbate anywhere."""
    order = np.random.default_rng(0).permutation(len(slab()))
    right = slab()[order]
    for state in (s2ef, is2re):
        expected = Predictor(state)([right])[0].energy
        for tags in (None, 1):
            given = right.copy()
            del given.arrays["tags"]
            if tags is not None:
                given.set_tags(tags)
            for adsorbate in ("metal", np.flatnonzero(right.get_tags() == 2), lambda atoms: atoms.numbers == 8):
                calculator = FAENetCalculator(state, tags="fixed", adsorbate=adsorbate)
                found = calculator.get_potential_energy(given)
                assert found == pytest.approx(expected, abs=1e-5)
        caplog.clear()
        (wrong,) = Predictor(state)([given])  # all are of tag 1
        assert abs(wrong.energy - expected) > 1e-4 and "no atom has tag 2" in caplog.text
        given.set_constraint()  # and here none of tag 0
        assert abs(calculator.get_potential_energy(given) - expected) > 1e-4 and "no atom has tag 0" in caplog.text
    with pytest.raises(ValueError, match="tags: none, but the checkpoint's model embeds tags"):
        Predictor(s2ef, tags="none")
    with pytest.raises(ValueError, match="adsorbate: 'metals' is not one of metal"):
        Predictor(s2ef, adsorbate="metals")


def test_tags_are_those_of_the_training_set(s2ef: State, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint of `dataset.tags: fixed` has seen no tag 2, also where structures have it."""
    s2ef["config"]["dataset"] |= {"format": "ase", "tags": "fixed"}
    atoms, seen = slab(), slab()
    seen.set_tags(np.minimum(seen.get_tags(), 1))
    (found,) = Predictor(s2ef)([atoms])
    assert not caplog.text
    (expected,), (other,) = Predictor(s2ef, tags="file")([seen]), Predictor(s2ef, tags="file")([atoms])
    assert found.energy == expected.energy and abs(other.energy - expected.energy) > 1e-4


def test_an_adsorbate_is_refused_where_there_are_no_tags(s2ef: State) -> None:
    s2ef["config"]["model"]["tag_hidden_channels"] = 0
    s2ef |= {"model": build.make_model(build_config(s2ef["config"])).state_dict(), "ema": None}
    for tags in (None, "none"):
        with pytest.raises(ValueError, match="adsorbate: 'metal' has no meaning with tags: none"):
            Predictor(s2ef, tags=tags, adsorbate="metal")


def test_a_slab_without_tags(s2ef: State, is2re: State, caplog: pytest.LogCaptureFixture) -> None:
    atoms = slab()
    atoms.set_tags(0)
    with pytest.raises(ValueError, match=r"all tags are 0, .*remove_subsurface.*atoms\.set_tags"):
        Predictor(is2re)([atoms])
    Predictor(s2ef)([atoms, atoms])
    assert caplog.text.count("all tags are 0, so the model takes every atom for one below the surface") == 1


@pytest.mark.parametrize("upside_down", [False, True])
def test_tags_that_are_unlikely_are_said_once(s2ef: State, caplog: pytest.LogCaptureFixture, upside_down: bool) -> None:
    """The surface's atoms lie above the adsorbate's, or there are none of these; wherever up is."""
    predictor, clean, swapped = Predictor(s2ef), slab(1), slab(2)
    del clean[clean.get_tags() == 2]
    clean.info["sid"] = "clean"
    swapped.set_tags(2 - swapped.get_tags())
    structures = [slab(0), swapped, clean, swapped, clean, molecule("H2O", tags=2)]
    if upside_down:
        for atoms in structures:
            atoms.rotate(180, "x", rotate_cell=True)
    predictor(structures[:1])
    assert not caplog.text
    predictor(structures)
    assert caplog.text.count("no atom of tag 2, the adsorbate, lies above those of tag 1") == 1
    assert caplog.text.count("(sid clean): no atom has tag 2, which is right for a clean slab only; set OC20's") == 1


def test_elements_outside_the_training_set_are_said(s2ef: State, caplog: pytest.LogCaptureFixture) -> None:
    predictor = Predictor(s2ef)
    with caplog.at_level(logging.WARNING):
        predictor([slab()])
        assert "training set" not in caplog.text
        predictor([molecule("N2", tags=2)])
        predictor([molecule("N2", tags=2)])
    assert caplog.text.count("N2: has elements that the training set did not have: element 7 (N);") == 1


def test_transforms_that_move_atoms_are_refused(s2ef: State) -> None:
    s2ef["config"]["dataset"]["transforms"] = {"data_augmentation": {"dim": 3}}
    with pytest.raises(ValueError, match="moves atoms"):
        Predictor(s2ef)([slab()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": "canonicle"}, "frames: 'canonicle' is not one of .*; did you mean 'canonical'"),
        ({"precision": "float16"}, "precision: 'float16' is not one of float32, float64"),
        ({"forces": "gradient"}, "forces: 'gradient' is not one of .*; did you mean 'energy_gradient'"),
        ({"forces": "energy_gradient", "frames": "stochastic"}, "change from call to call"),
    ],
)
def test_options(s2ef: State, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(s2ef, **options)


@pytest.mark.parametrize("given", [[], slab(), (slab() for _ in range(2)), None, 3])
def test_what_is_no_checkpoint(given: Any) -> None:
    with pytest.raises(ValueError, match="checkpoint: its file, its run's folder or its content is wanted, not"):
        Predictor(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "nothing in it"), (slab(), "not Atoms"), (None, "not NoneType"), (["a.xyz"], "str is in it")],
)
def test_what_is_no_list_of_structures(s2ef: State, given: Any, message: str) -> None:
    predictor = Predictor(s2ef)
    with pytest.raises(ValueError, match=rf"a list of ase\.Atoms is wanted, as in predictor\(\[atoms\]\).*{message}"):
        predictor(given)
    assert predictor(slab(i) for i in range(2))[1].energy == pytest.approx(predictor([slab(1)])[0].energy, abs=1e-6)


def test_checkpoints_by_their_file_or_the_folder_of_their_run(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoints["s2ef"]
    run = path.parents[1]
    monkeypatch.setenv("HOME", str(run.parent))
    energy = FAENetCalculator.from_checkpoint(path).get_potential_energy(slab())
    for given in (path, str(path), run, f"~/{run.name}", f"$HOME/{run.name}/checkpoints/best.pt"):
        assert FAENetCalculator(given).get_potential_energy(slab()) == energy
    with pytest.raises(ValueError, match=r"checkpoint .*runs/nothing"):
        FAENetCalculator(run.parent / "nothing")
    with pytest.raises(ValueError, match="frames: give them to the Predictor"):
        FAENetCalculator(Predictor(path), frames="full")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(s2ef: State, device: str) -> None:
    with pytest.raises(ValueError, match=f"device: '{device}' cannot be used here, with .* GPUs: "):
        Predictor(s2ef, device=device)
