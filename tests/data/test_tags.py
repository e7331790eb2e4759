"""Tags for structures of other programs: what is taken, what is made, what is refused."""

import ase
import numpy as np
import pytest
from ase.build import add_adsorbate, fcc111

from faenet_ocp.data.tags import adsorbate_of, assign_tags

FIXED = np.array([True, True, False, False, False])


def test_choices() -> None:
    own = np.array([0, 0, 1, 1, 2])
    np.testing.assert_array_equal(assign_tags(own, FIXED, "file"), own)
    np.testing.assert_array_equal(assign_tags(None, FIXED, "fixed"), [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(
        assign_tags(np.full(5, 7), FIXED, "fixed", adsorbate=np.array([4, 2])), [0, 0, 2, 1, 2]
    )
    assert assign_tags(own, FIXED, "none") is None


@pytest.mark.parametrize("tags", [None, np.array([3, 3, 2, 1, 0]), np.array([-1, 0, 0, 0, 0])])
def test_what_oc20_does_not_mean_is_refused_with_the_choices(tags: np.ndarray | None) -> None:
    with pytest.raises(ValueError, match=r"has (no )?tags.*tags: file takes OC20's .*, fixed makes 0 of fixed.*, none"):
        assign_tags(tags, FIXED, "file")
    with pytest.raises(ValueError, match=r"tags: 'files' is not one of file, fixed, none; did you mean 'file'"):
        assign_tags(tags, FIXED, "files")


def test_the_adsorbate() -> None:
    atoms = fcc111("Cu", size=(2, 2, 2), vacuum=8.0)
    for position in ("fcc", "ontop"):
        add_adsorbate(atoms, ase.Atoms("CO", [(0, 0, 0), (0, 0, 1.15)]), 1.6, position)
    order = np.random.default_rng(0).permutation(len(atoms))
    atoms, fixed = atoms[order], np.zeros(len(atoms), dtype=bool)
    expected = np.flatnonzero(np.isin(atoms.numbers, [6, 8]))
    np.testing.assert_array_equal(adsorbate_of(atoms, "metal", fixed), expected)
    np.testing.assert_array_equal(adsorbate_of(atoms, lambda a: a.numbers != 29, fixed), expected)
    np.testing.assert_array_equal(adsorbate_of(atoms, expected.tolist(), fixed), expected)
    fixed[expected[0]] = True  # an atom of the slab that is no metal
    np.testing.assert_array_equal(adsorbate_of(atoms, "metal", fixed), expected[1:])
    assert adsorbate_of(atoms, None, fixed) is None
    for wrong in ([99], [-1], [0.5]):
        with pytest.raises(ValueError, match="adsorbate: expected indices of the 12 atoms"):
            adsorbate_of(atoms, wrong, fixed)
    with pytest.raises(ValueError, match="adsorbate: 'metals' is not one of metal"):
        adsorbate_of(atoms, "metals", fixed)
