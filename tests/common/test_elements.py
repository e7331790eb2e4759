"""The shipped element table, and what the network gets from it."""

import csv
import io
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from faenet_ocp.common.elements import (
    COLUMNS,
    LAST_STANDARDISED,
    MAX_ATOMIC_NUMBER,
    NUM_GROUPS,
    PROPERTIES,
    describe,
    element_table,
    standardised_properties,
)

ROOT = Path(__file__).resolve().parents[2]


def read_rows(file):
    return list(csv.DictReader(line for line in file if not line.startswith("#")))


@pytest.fixture(scope="module")
def rows():
    """The shipped file, read here on its own."""
    with (ROOT / "faenet_ocp" / "common" / "elements.csv").open(encoding="utf-8") as file:
        return read_rows(file)


def test_table_has_known_values():
    table = element_table()
    number = {symbol: z for z, symbol in enumerate(table.symbols)}

    def value(symbol, name):
        return table.properties[number[symbol], PROPERTIES.index(name)].item()

    assert len(table.symbols) == len(table.properties) == MAX_ATOMIC_NUMBER + 1
    assert (number["H"], number["Fe"], number["Pt"], number["Og"]) == (1, 26, 78, 118)
    assert [table.period[number[s]].item() for s in ("H", "O", "Cu", "Au", "Lr")] == [1, 2, 4, 6, 7]
    assert [table.group[number[s]].item() for s in ("H", "C", "Cu", "La", "Xe")] == [1, 14, 11, 3, 18]
    assert {table.group[number[s]].item() for s in ("Ce", "Yb", "Th", "No")} == {NUM_GROUPS}
    assert value("Cu", "en_allen") == 10.96
    assert value("Pt", "density") == pytest.approx(21.5, rel=0.01)
    assert value("H", "IE1") == pytest.approx(13.598, abs=1e-3)
    assert value("Fe", "atomic_volume") == pytest.approx(55.845 / 7.87, rel=1e-3)
    assert np.isnan(value("H", "IE2"))


def test_every_property_is_standardised_over_the_elements_1_to_85(rows):
    got = standardised_properties()
    assert got.shape == (MAX_ATOMIC_NUMBER + 1, len(PROPERTIES)) and got.dtype == torch.float32
    for column, name in enumerate(PROPERTIES):
        raw = np.array([float(row[name]) if row[name] else np.nan for row in rows])
        sample = raw[:LAST_STANDARDISED]
        expected = (raw - np.nanmean(sample)) / np.nanstd(sample, ddof=1)
        assert name != "IE2" or np.isnan(expected[0])
        expected[np.isnan(expected)] = 0.0  # an element without a value gets the mean
        np.testing.assert_allclose(got[1:, column].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert not got[0].any() and got.isfinite().all()


def test_messages_name_elements():
    names = ["element 26 (Fe)", "element 119", "element 0", "element -3"]
    assert [describe(number) for number in (26, 119, 0, -3)] == names


def test_the_script_regenerates_the_table(rows):
    pytest.importorskip("mendeleev", reason="extra `elements` is not installed")
    script = runpy.run_path(str(ROOT / "scripts" / "make_element_table.py"))

    file = io.StringIO()
    script["write_table"](file)
    assert file.getvalue().startswith("# mendeleev ")
    made = read_rows(io.StringIO(file.getvalue()))
    assert tuple(made[0]) == COLUMNS and made == rows
