"""Download OC20 and unpack it into its usual layout.

    python scripts/download_oc20.py --task is2re --data-path data
    python scripts/download_oc20.py --task s2ef --split 2M --data-path data

The same command goes on with an interrupted download. S2EF training and validation splits come as text files for
`scripts/prepare_s2ef.py`, the others as LMDBs that are ready for use.
"""

import argparse
import logging
import sys
from pathlib import Path

from faenet_ocp.prepare.download import S2EF, download, find_archive


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Download OC20 and unpack it into its usual layout.")
    parser.add_argument("--task", choices=("is2re", "s2ef"), required=True)
    parser.add_argument("--split", choices=tuple(S2EF), help="of s2ef; is2re is one archive for all splits")
    parser.add_argument("--data-path", type=Path, default=Path("data"), help="root folder of the data (default: data)")
    parser.add_argument("--keep", action="store_true", help="keep the archive in DATA_PATH/downloads")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        archive = find_archive(args.task, args.split)
        folders = download(archive, args.data_path, keep=args.keep)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for folder in folders:
        logging.info("%s", folder)
    if archive.prepared is not None:
        source, target = folders[0] / folders[0].name, args.data_path / archive.prepared
        command = f"python scripts/prepare_s2ef.py --data-path {source} --out-path {target} --num-workers N"
        logging.info("next: %s", command)


if __name__ == "__main__":
    main()
