"""Element properties for the atom embedding (FAENet, section 4 and appendix B.1).

`data/elements.csv` holds raw values from mendeleev for the elements 1 to 118 (made by
`scripts/make_element_table.py`); an empty field is a value that mendeleev does not have.

    column                          unit        meaning
    period, group                   -           group is empty in the f block
    atomic_radius                   pm
    atomic_volume                   cm^3/mol    atomic weight / density
    density                         g/cm^3      at 295 K, so that of the gas for gases
    dipole_polarizability           a.u.
    electron_affinity               eV
    en_allen                        eV          Allen's electronegativity
    vdw_radius                      pm
    metallic_radius                 pm
    metallic_radius_c12             pm          for coordination number 12
    covalent_radius_pyykko_double   pm          Pyykko, double bond
    covalent_radius_pyykko_triple   pm          Pyykko, triple bond
    covalent_radius_pyykko          pm          Pyykko, single bond
    IE1, IE2                        eV          first and second ionisation energy

Tensors made here have 119 rows: row Z belongs to element Z, row 0 is unused.
"""

import csv
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor

MAX_ATOMIC_NUMBER = 118
NUM_PERIODS = 7
NUM_GROUPS = 19
"""The 18 groups, and 19 for the f-block elements, which have none."""

PROPERTIES = (
    "atomic_radius",
    "atomic_volume",
    "density",
    "dipole_polarizability",
    "electron_affinity",
    "en_allen",
    "vdw_radius",
    "metallic_radius",
    "metallic_radius_c12",
    "covalent_radius_pyykko_double",
    "covalent_radius_pyykko_triple",
    "covalent_radius_pyykko",
    "IE1",
    "IE2",
)
"""Physical properties of appendix B.1, in the order in which the published weights expect them."""

COLUMNS = ("atomic_number", "symbol", "period", "group", *PROPERTIES)

LAST_STANDARDISED = 85
"""Mean and deviation are those of the elements 1 to 85, as in the published code."""


class ElementTable(NamedTuple):
    """The shipped table.

    Attributes:
        symbols: chemical symbols, 119 of them; the first is empty.
        period: (119,) int64, 1 to 7; 0 in the unused row 0.
        group: (119,) int64, 1 to 19; 0 in the unused row 0.
        properties: (119, 14) float64, raw values in the units above, nan where missing.
    """

    symbols: tuple[str, ...]
    period: Tensor
    group: Tensor
    properties: Tensor


@cache
def element_table() -> ElementTable:
    """Read the shipped table."""
    resource = files("faenet_ocp.common") / "elements.csv"
    with resource.open("r", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    if [row["atomic_number"] for row in rows] != [str(z + 1) for z in range(MAX_ATOMIC_NUMBER)]:
        raise ValueError(f"{resource}: expected one row for each element 1 to {MAX_ATOMIC_NUMBER}")
    values = [[float(row[name] or "nan") for name in PROPERTIES] for row in rows]
    unused = torch.full((1, len(PROPERTIES)), torch.nan, dtype=torch.float64)
    return ElementTable(
        symbols=("", *(row["symbol"] for row in rows)),
        period=torch.tensor([0, *(int(row["period"]) for row in rows)]),
        group=torch.tensor([0, *(int(row["group"] or NUM_GROUPS) for row in rows)]),
        properties=torch.cat([unused, torch.tensor(values, dtype=torch.float64)]),
    )


def standardised_properties() -> Tensor:
    """Physical properties as the network gets them.

    Each is standardised with the mean and the (unbiased) standard deviation of the known values
    of the elements 1 to 85. Missing values become 0, which is the mean.

    Returns:
        (119, 14) float32, columns as in `PROPERTIES`; row 0 is zero.
    """
    raw = element_table().properties
    sample = raw[1 : LAST_STANDARDISED + 1]
    known = ~sample.isnan()
    count = known.sum(dim=0)
    mean = sample.nansum(dim=0) / count
    variance = (sample - mean).square().nansum(dim=0) / (count - 1)
    return ((raw - mean) / variance.sqrt()).nan_to_num(nan=0.0).float()


def describe(atomic_number: int) -> str:
    """Name an element in a message: `element 26 (Fe)`, `element 119` when there is none."""
    symbols = element_table().symbols
    known = 0 < atomic_number < len(symbols)
    return f"element {atomic_number}" + (f" ({symbols[atomic_number]})" if known else "")
