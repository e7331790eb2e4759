"""How well a model's energy is conserved: molecular dynamics of O on Cu(111) at constant energy, with -dE/dX as forces.

    python scripts/energy_drift.py [--steps 1000] [--output docs/benchmarks/energy_drift.json]

Networks with random weights, with the cutoff and the number of neighbours of the paper and with a smooth envelope,
without frames and with canonical and full ones. Random weights say nothing of real forces: what is shown is whether the
surface is smooth.
"""

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

TIME_STEPS = (0.5, 1.0, 2.0)
TEMPERATURE = 500  # K, of the initial velocities
MODELS: dict[str, dict[str, Any]] = {
    "cut at 6 A and 40 neighbours": {"cutoff": 6.0, "max_neighbors": 40},
    "envelope": {"cutoff": 6.0, "max_neighbors": None, "envelope": "polynomial"},
}


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of each run (default: 1000)")
    parser.add_argument("--output", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    from faenet_ocp.common.files import software_versions, write_json

    rows = [
        {"model": name, "frames": frames, "time_step_fs": step, **drift(model, frames, step, args.steps)}
        for frames in ("none", "canonical", "full")
        for name, model in MODELS.items()
        for step in TIME_STEPS
    ]
    if args.output is not None:
        facts = {"steps": args.steps, "device": platform.processor() or platform.machine(), **software_versions()}
        write_json(args.output, {"facts": facts, "rows": rows})
    sys.stdout.write(table(rows) + "\n")


def drift(model: dict[str, Any], frames: str, time_step: float, steps: int) -> dict[str, float]:
    """Largest change of the total energy in one step, and from first to last, in meV."""
    from ase import units
    from ase.md.verlet import VelocityVerlet
    from tqdm import tqdm

    atoms = slab()
    atoms.calc = calculator(model, frames)
    widths = np.sqrt(atoms.get_masses() * TEMPERATURE * units.kB)[:, None]
    atoms.set_momenta(np.random.default_rng(0).normal(size=(len(atoms), 3)) * widths)
    dynamics, energies = VelocityVerlet(atoms, time_step * units.fs), [atoms.get_total_energy()]
    for _ in tqdm(range(steps), desc=f"{frames}, {time_step} fs", leave=False):
        dynamics.run(1)
        energies.append(atoms.get_total_energy())
    changes = 1e3 * np.diff(energies)
    return {"largest_step_meV": float(np.abs(changes).max()), "drift_meV": float(changes.sum())}


def slab() -> Any:
    """O on Cu(111), two layers fixed, OC20's tags."""
    from ase.build import add_adsorbate, fcc111
    from ase.constraints import FixAtoms

    atoms = fcc111("Cu", size=(2, 2, 3), vacuum=8.0, periodic=True)
    atoms.set_constraint(FixAtoms([atom.index for atom in atoms if atom.tag > 1]))
    atoms.set_tags([int(tag == 1) for tag in atoms.get_tags()])
    add_adsorbate(atoms, "O", height=1.5, position="fcc")
    atoms[-1].tag = 2
    return atoms


def calculator(model: dict[str, Any], frames: str) -> Any:
    """A calculator in float64 of a small network with seeded random weights; forces are -dE/dX."""
    from faenet_ocp import FAENetCalculator, build
    from faenet_ocp.config.schema import build_config
    from faenet_ocp.tasks.tasks import make_tasks, tasks_state

    small: dict[str, Any] = {"hidden_channels": 64, "num_filters": 64, "num_interactions": 3, "num_gaussians": 50}
    small |= {"tag_hidden_channels": 8, "pg_hidden_channels": 8, "phys_embeds": False}
    small |= {"skip_co": "none", "mp_type": "updownscale_base"}
    config = build_config(
        {
            "trainer": "faenet",
            "task": "s2ef",
            "dataset": {"edges": "recompute"},
            "model": {"name": "faenet", **small, **model},
            "frames": {"method": frames, "dim": 3, "group": "E"},
            "optim": {"lr_initial": 0.1, "batch_size": 1, "max_epochs": 1},
            "job": {"precision": "float64", "seed": 1},
        }
    )
    weights, tasks = build.make_model(config).state_dict(), tasks_state(make_tasks(config, {}))
    state = {"config": config.model_dump(mode="json"), "model": weights, "ema": None, "tasks": tasks}
    return FAENetCalculator(state, forces="energy_gradient", device="cpu")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | frames | time step [fs] | largest step [meV] | drift [meV] |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for row in rows:
        numbers = f"{row['largest_step_meV']:.4f} | {row['drift_meV']:.4f}"
        lines.append(f"| {row['model']} | {row['frames']} | {row['time_step_fs']} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
