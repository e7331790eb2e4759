"""The files of QM7-X as tests write them, from a few molecules with labels of GFN2-xTB (not QM7-X).

`data_files/qm7x.npz` was made by `prepare.demo.molecules.make_molecules` (24 molecules tried, 4 structures each), which
needs tblite: python tests/qm7x_files.py
"""

import tempfile
from pathlib import Path

import h5py
import numpy as np

from faenet_ocp.prepare.qm7x import FILES

STORE = Path(__file__).parent / "data_files" / "qm7x.npz"
NAMES = ("atNUM", "atXYZ", "ePBE0+MBD", "totFOR")


def read_store() -> dict[tuple[str, str], list[np.ndarray]]:
    """The four arrays of each structure, by idmol and idconf."""
    with np.load(STORE) as store:
        arrays = {name: store[name] for name in ("ids", "natoms", *NAMES)}
    ends = np.cumsum(arrays["natoms"])[:-1]
    parts = [np.split(arrays[name], range(1, len(arrays["ids"])) if "MBD" in name else ends) for name in NAMES]
    return {tuple(key): list(found) for key, *found in zip(arrays["ids"].tolist(), *parts, strict=True)}


def write_files(folder: Path) -> Path:
    """`1000.hdf5` to `8000.hdf5` in a new folder, each with some of the molecules."""
    folder.mkdir()
    for name in FILES:
        h5py.File(folder / name, "w").close()
    store = read_store()
    molecules = list(dict.fromkeys(idmol for idmol, _ in store))
    for (idmol, idconf), arrays in store.items():
        with h5py.File(folder / FILES[molecules.index(idmol) % len(FILES)], "a") as file:
            for name, array in zip(NAMES, arrays, strict=True):
                file[f"{idmol}/{idconf}/{name}"] = array
    return folder


def main() -> None:
    """Generates molecules, and keeps them."""
    from faenet_ocp.prepare.demo.molecules import MoleculeSettings, make_molecules

    ids, arrays = [], []
    with tempfile.TemporaryDirectory() as folder:
        make_molecules(Path(folder) / "hdf5", MoleculeSettings(num_molecules=24, num_frames=4))
        for name in FILES:
            with h5py.File(Path(folder) / "hdf5" / name) as file:
                for idmol in file:
                    for idconf in file[idmol]:
                        ids.append((idmol, idconf))
                        arrays.append([np.asarray(file[idmol][idconf][key]) for key in NAMES])
    columns = {key: np.concatenate(column) for key, column in zip(NAMES, zip(*arrays, strict=True), strict=True)}
    columns["atNUM"] = columns["atNUM"].astype(np.uint8)
    np.savez_compressed(STORE, ids=np.array(ids), natoms=[len(one[0]) for one in arrays], **columns)


if __name__ == "__main__":
    main()
