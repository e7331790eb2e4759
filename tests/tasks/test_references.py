"""Least squares on element counts against numpy on the full matrix."""

import json

import numpy as np
import pytest
import torch

from faenet_ocp.tasks.references import (
    NUM_ELEMENTS,
    CompositionFit,
    CompositionRegression,
    fit_labels,
    fits_from_dict,
    fits_to_dict,
    statistics_sample,
)

ELEMENTS = (1, 6, 8, 13, 29, 47, 78)


def random_set(num_systems=400, seed=0, noise=0.3, elements=ELEMENTS):
    """Counts (B, 119) float32 and energies (B,) float64 of a noisy linear law."""
    rng = np.random.default_rng(seed)
    composition = np.zeros((num_systems, NUM_ELEMENTS), dtype=np.float32)
    composition[:, elements] = rng.integers(0, 30, (num_systems, len(elements)))
    law = np.linspace(-0.4, 0.3, len(elements))
    energy = composition[:, elements] @ law - 1.0 + noise * rng.normal(size=num_systems)
    return torch.from_numpy(composition), torch.from_numpy(energy)


def fitted(composition, energy, batch_size=64):
    regression = CompositionRegression()
    for start in range(0, len(energy), batch_size):
        stop = start + batch_size
        regression.update(composition[start:stop], energy[start:stop])
    return regression


def by_numpy(composition, energy):
    """Coefficients of the full least-squares problem, and its residuals."""
    matrix = composition.double().numpy()
    solution = np.linalg.lstsq(matrix, energy.numpy(), rcond=None)[0]
    return solution, energy.numpy() - matrix @ solution


def assert_same_fit(left, right):
    torch.testing.assert_close(left.element_references(), right.element_references())
    for name in ("mean", "stdev", "residual_mean", "residual_stdev", "num_systems", "rank"):
        assert getattr(left, name) == pytest.approx(getattr(right, name), rel=1e-9), name


@pytest.mark.parametrize("offset", [0.0, -2.0e4])
def test_matches_numpy_least_squares(offset):
    """Also for total energies: thousands of eV with a spread of one."""
    composition, energy = random_set()
    energy = energy + offset
    fit = fitted(composition, energy).solve()
    solution, residual = by_numpy(composition, energy)
    np.testing.assert_allclose(fit.element_references().numpy(), solution, rtol=1e-8, atol=1e-8)
    assert fit.mean == pytest.approx(energy.numpy().mean(), rel=1e-12)
    assert fit.stdev == pytest.approx(energy.numpy().std(), rel=1e-6)
    assert abs(residual.mean()) > 1e-3  # no intercept: a residual mean that must not be dropped
    assert fit.residual_mean == pytest.approx(residual.mean(), rel=1e-6)
    assert fit.residual_stdev == pytest.approx(residual.std(), rel=1e-6)
    assert (fit.num_systems, fit.rank) == (400, len(ELEMENTS))
    expected = composition.double().numpy() @ solution
    np.testing.assert_allclose(fit.predict(composition).numpy(), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("per_atom", [False, True])
def test_no_statistics_but_the_mean_change_with_an_offset(per_atom):
    """A million eV a system: sums of squares alone would know the deviations to 1e-2 eV."""
    composition, energy = random_set()
    law = -1e4 * torch.arange(1.0, 8.0).double()
    offset = composition[:, ELEMENTS].double() @ law if per_atom else torch.full_like(energy, -1e6)
    halves = [(composition[i::2], {"energy": energy[i::2]}) for i in range(2)]
    large = [(composition[i::2], {"energy": (energy + offset)[i::2]}) for i in range(2)]
    fit, other = (fit_labels(parts, ["energy"])["energy"] for parts in (halves, large))
    solution, residual = by_numpy(composition, energy + offset)
    np.testing.assert_allclose(other.element_references().numpy(), solution, rtol=1e-10, atol=1e-9)
    assert other.residual_stdev == pytest.approx(residual.std(), rel=1e-7)
    assert other.mean == pytest.approx(float((energy + offset).mean()), rel=1e-14)
    kept = "residual_stdev" if per_atom else "stdev"
    assert getattr(other, kept) == pytest.approx(getattr(fit, kept), rel=1e-7)


def test_a_linear_law_is_recovered_and_a_rare_element_with_it():
    composition, _ = random_set(num_systems=3000)
    composition[17, 92] = 1  # one atom of it in the whole set
    law = torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
    law[list(ELEMENTS)] = torch.linspace(-0.5, 0.5, len(ELEMENTS), dtype=torch.float64)
    law[92] = 3.25
    energy = composition.double() @ law
    fit = fitted(composition, energy).solve()
    torch.testing.assert_close(fit.element_references(), law, rtol=0, atol=1e-8)
    assert fit.residual_stdev < 1e-6 * fit.stdev


def test_dependent_elements_get_the_minimum_norm_solution():
    composition, energy = random_set()
    composition[:, 7] = 2 * composition[:, 6]  # N only ever comes with C, two to one
    fit = fitted(composition, energy).solve()
    solution, residual = by_numpy(composition, energy)
    np.testing.assert_allclose(fit.element_references().numpy(), solution, atol=1e-9)
    assert fit.coefficients[7] == pytest.approx(2 * fit.coefficients[6])
    assert fit.rank == len(ELEMENTS)
    assert fit.residual_stdev == pytest.approx(residual.std(), rel=1e-6)


def test_fewer_systems_than_elements():
    composition, energy = random_set(num_systems=3)
    fit = fitted(composition, energy).solve()
    assert fit.rank == 3
    np.testing.assert_allclose(fit.predict(composition).numpy(), energy.numpy(), atol=1e-8)
    np.testing.assert_allclose(fit.element_references().numpy(), by_numpy(composition, energy)[0], atol=1e-9)


def test_batch_size_and_dtype_do_not_matter():
    composition, energy = random_set()
    whole = fitted(composition, energy, batch_size=400).solve()
    assert_same_fit(fitted(composition, energy, batch_size=1).solve(), whole)
    assert fitted(composition[::2], energy[::2]).solve().mean != pytest.approx(whole.mean, rel=1e-9)
    assert_same_fit(fitted(composition.long(), energy).solve(), whole)


def test_unseen_elements():
    composition, energy = random_set()
    fit = fitted(composition, energy).solve()
    assert fit.coefficients[79] is None and fit.coefficients[29] is not None
    assert sum(c is not None for c in fit.coefficients) == len(ELEMENTS)
    other = composition[:3].clone()
    other[1, 79] = 4
    assert fit.unseen(other).tolist() == [False, True, False]
    torch.testing.assert_close(fit.predict(other), fit.predict(composition[:3]))
    assert not fit.unseen(composition).any()


def test_fits_survive_json_in_the_form_of_runs_without_declared_scalars():
    composition, energy = random_set()
    fits = fit_labels([(composition, {"energy": energy, "gap": 2 * energy})], ["energy", "gap"])
    stored = json.loads(json.dumps(fits_to_dict(fits), allow_nan=False))
    assert fits_from_dict(stored) == fits
    assert CompositionFit.from_dict({key: value for key, value in stored.items() if key != "others"}) == fits["energy"]
    alone = fits_to_dict({"energy": fits["energy"]})
    assert CompositionFit.from_dict(json.loads(json.dumps(alone))) == fits["energy"]
    assert fits_to_dict({}) is None and fits_from_dict(None) == {}


def test_a_sample_of_a_large_set_is_spread_evenly(caplog):
    assert statistics_sample(1000).tolist() == list(range(1000))
    sample = statistics_sample(2_500_000)
    assert (len(sample), sample[0], set(np.diff(sample))) == (1_000_000, 0, {2, 3})
    assert "1000000 of 2500000 training systems" in caplog.text


def test_one_system_systems_without_atoms_and_none():
    composition, energy = random_set(num_systems=1)
    fit = fitted(composition, energy).solve()
    assert (fit.stdev, fit.mean) == (0.0, float(energy[0]))
    assert fit.predict(composition).item() == pytest.approx(fit.mean)
    fit = fitted(torch.zeros(4, NUM_ELEMENTS), torch.arange(4.0)).solve()
    assert (fit.rank, fit.mean, set(fit.coefficients)) == (0, 1.5, {None})
    with pytest.raises(ValueError, match="no system"):
        CompositionRegression().solve()


@pytest.mark.parametrize(
    ("composition", "energy", "message"),
    [
        (torch.zeros(2, 100), torch.zeros(2), r"\(systems, 119\), got \(2, 100\)"),
        (torch.zeros(119), torch.zeros(1), "shape"),
        (torch.zeros(2, 119), torch.zeros(2, 1), r"labels must have shape \(2,\)"),
        (torch.zeros(2, 119), torch.tensor([0.0, float("nan")]), "1 of 2 labels"),
        (torch.full((2, 119), -1.0), torch.zeros(2), "not negative"),
        (torch.full((2, 119), float("inf")), torch.zeros(2), "finite"),
    ],
)
def test_bad_input_is_refused_and_leaves_no_trace(composition, energy, message):
    regression = CompositionRegression()
    with pytest.raises(ValueError, match=message):
        regression.update(composition, energy)
    assert not regression.sums.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None, "extra": 1}, r"missing \['mean'\], unknown \['extra'\]"),
        ({"coefficients": [0.0]}, "119 entries"),
        ({"stdev": float("nan")}, "finite"),
    ],
)
def test_bad_stored_data_is_refused(change, message):
    stored = fitted(*random_set(num_systems=5)).solve().to_dict() | change
    with pytest.raises(ValueError, match=message):
        CompositionFit.from_dict({key: value for key, value in stored.items() if value is not None})
