"""Whether two checkouts train alike: the same seeded steps on one thread, compared to the last bit.

    git worktree add ../before main
    python scripts/compare_losses.py ../before . --config configs/demo/s2ef.yml --dataset.root=data/demo

Further arguments go to both runs. Losses, norms of gradients, learning rates and the final metrics are compared; exits
with 1 where anything differs, and says by how much.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_TIMED = ("train/samples_per_s", "train/data_wait_share")


def _numbers(checkout: Path, arguments: list[str]) -> dict[str, float]:
    """What a run of this checkout logs and reports, by step and name."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(checkout / "main.py"), *arguments, "--run-dir", folder, "--identifier", "run"]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        log = (Path(folder) / "run" / "logs" / "metrics.jsonl").read_text().splitlines()
        splits = json.loads((Path(folder) / "run" / "results" / "metrics.json").read_text())["splits"]
    rows: dict[str, dict[str, float]] = {}
    for row in map(json.loads, log):  # an evaluated step has two lines
        rows[f"step {row['step']}"] = rows.get(f"step {row['step']}", {}) | row
    rows |= {f"at the end, {split}": values for split, values in splits.items()}
    return {f"{place}: {name}": row[name] for place, row in rows.items() for name in row if name not in _TIMED}


def main() -> int:
    """Runs the command line; 1 where the checkouts differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    flags, arguments = parser.parse_known_args()
    arguments += ["--cpu", "--print-every", "1", f"--optim.max_steps={flags.steps}", "--logger=none"]
    old, new = (_numbers(checkout, arguments) for checkout in (flags.old, flags.new))
    if old.keys() != new.keys():
        sys.exit(f"only one of them has {', '.join(sorted(old.keys() ^ new.keys()))}")
    differing = {
        name: abs(old[name] - new[name]) / max(abs(old[name]), 1e-12) for name in old if old[name] != new[name]
    }
    if not differing:
        sys.stdout.write(f"{len(old)} numbers are equal to the last bit\n")
        return 0
    first, worst = next(iter(differing)), max(differing, key=differing.__getitem__)
    sys.stdout.write(f"{len(differing)} of {len(old)} numbers differ\nfirst: {first}: {old[first]}, {new[first]}\n")
    sys.stdout.write(f"most, by {differing[worst]:.3g}: {worst}: {old[worst]}, {new[worst]}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
