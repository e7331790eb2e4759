"""Make the table of element properties that the package ships, from mendeleev (extra `elements`).

    python scripts/make_element_table.py [--output faenet_ocp/common/elements.csv]

One row per element, 1 to 118, with the raw values and units of mendeleev; a value that mendeleev
lacks is left empty. Standardisation is done where the table is read, in `faenet_ocp.common.elements`.
"""

import argparse
import csv
import math
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from faenet_ocp.common.elements import COLUMNS, MAX_ATOMIC_NUMBER

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "faenet_ocp" / "common" / "elements.csv"


def collect_rows() -> list[dict[str, str]]:
    """Values of every element as text, in the order of the atomic number.

    mendeleev 1.x no longer has the columns that the FAENet authors read. The atomic volume is
    what its `Element.atomic_volume` computes, atomic weight over density (so the volume of the
    gas for the elements that are gases at 295 K); ionisation energies are those of the neutral
    and of the singly charged atom.
    """
    from mendeleev.fetch import fetch_table

    elements = fetch_table("elements").set_index("atomic_number")
    elements["atomic_volume"] = elements["atomic_weight"] / elements["density"]
    elements["group"] = elements["group_id"]
    ions = fetch_table("ionizationenergies").set_index(["atomic_number", "ion_charge"])
    for charge, column in enumerate(("IE1", "IE2")):
        elements[column] = ions.xs(charge, level="ion_charge")["ionization_energy"]

    rows = []
    for number in range(1, MAX_ATOMIC_NUMBER + 1):
        element = elements.loc[number]
        rows.append({"atomic_number": str(number)} | {c: _text(element[c]) for c in COLUMNS[1:]})
    return rows


def _text(value: str | float | None) -> str:
    """Ten significant digits at most, whole numbers without a decimal point."""
    if isinstance(value, str):
        return value
    if value is None or math.isnan(value):
        return ""
    number = float(f"{value:.10g}")
    return str(int(number)) if number.is_integer() else repr(number)


def write_table(file: TextIO) -> None:
    """Write the table as CSV, the version of mendeleev in a comment on the first line."""
    file.write(f"# mendeleev {version('mendeleev')}, by scripts/make_element_table.py\n")
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(collect_rows())


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Make the element table from mendeleev.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="CSV file to write")
    output = parser.parse_args().output
    with output.open("w", encoding="utf-8", newline="") as file:
        write_table(file)


if __name__ == "__main__":
    main()
