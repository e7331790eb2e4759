"""docs/performance.md shows what the committed measurements say."""

import json
from pathlib import Path
from statistics import median
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _groups(name: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found = json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())
    return {(group["name"], group["mode"]): group["rows"] for group in found["groups"]}


def _per_atom(row: dict[str, Any]) -> str:
    return f"{1e6 * median(row['seconds']) / row['atoms']:,.0f}"


def _megabytes(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / 1e6:,.0f}"


def test_cost_as_work_grows() -> None:
    text, groups = (DOCS / "performance.md").read_text(), _groups("cpu_growth")
    for name in ("batch sizes", "system sizes"):
        pairs = zip(groups[name, "inference"], groups[name, "training step"], strict=True)
        for inference, training in pairs:
            size = training["systems"] if name == "batch sizes" else int(training["model"].split()[0])
            sizes = [f"{size:,}", f"{training['atoms']:,}", _per_atom(inference), _per_atom(training)]
            assert f"| {' | '.join([*sizes, _megabytes(training)])} |" in text
    for row in groups["records", "loading"]:
        rate = f"{row['systems'] / median(row['seconds']):,.0f}"
        assert f" | {1000 * row['start_seconds']:.0f} | {rate} | {_megabytes(row)} |\n" in text
    assert f"{_megabytes(groups['evaluation', 'all but the model'][-1])} MB for the last" in text


def test_against_the_published_package() -> None:
    text, columns = (DOCS / "performance.md").read_text(), {}
    for name in ("cpu_published_avx2", "cpu_published"):
        for group in json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())["groups"]:
            reference, plain, narrow = group["rows"]
            shown = columns.setdefault(group["task"], {})
            for precision, row in {"float32": plain, "bf16": narrow}.items():
                shown.setdefault(f"{group['mode']}, {precision}", []).append(f"{row['speed_up']:.1f}x")
            ratio = f"{plain['peak_bytes'] / reference['peak_bytes']:.2f}x"
            shown.setdefault(f"peak memory of a {group['mode']}, float32", []).append(ratio)
    for label in columns["is2re"]:
        if label != "peak memory of a inference, float32":
            (row,) = [line for line in text.splitlines() if line.startswith(f"| {label} ")]
            assert row.endswith(f" | {' | '.join(columns['is2re'][label] + columns['s2ef'][label])} |")


def test_launches() -> None:
    text = (DOCS / "performance.md").read_text()
    rows = json.loads((DOCS / "benchmarks" / "gpu_on_cpu.json").read_text())["speed"]
    for mode in ("inference", "training step"):
        found = {row["model"]: row["launches"] for row in rows if row["mode"] == mode and row["precision"] == "fp32"}
        shown = [found[name] for name in ("FAENet", "published faenet 0.1.3", "FAENet, torch.compile, dynamic shapes")]
        assert f"| {mode} | {' | '.join(map(str, shown))} |\n" in text
        assert found["FAENet, torch.compile, static shapes"] == shown[-1]


def test_records_to_batches() -> None:
    text = (DOCS / "performance.md").read_text()
    for row in _groups("cpu_data")["data", "loading"]:
        rate, size = f"{row['systems'] / median(row['seconds']):,.0f}", f"{row['bytes'] / row['systems'] / 1000:.1f}"
        ratio = f"{row['speed_up']:.2g}"
        assert f" | {rate} | {ratio} | {size} | {' / '.join(map(str, row['processes'].values()))} |\n" in text


def _peers() -> str:
    """Each model's speed, as a multiple of the first one's in float32, and its memory in a training step."""
    found = json.loads((DOCS / "benchmarks" / "cpu_peers.json").read_text())["groups"]
    groups = {(group["task"], group["mode"]): {row["model"]: row for row in group["rows"]} for group in found}
    tasks = ("is2re", "s2ef")
    lines = []
    for name, row in groups["is2re", "inference"].items():
        if name.endswith(", bf16"):
            continue
        speeds = [
            f"{groups[task, mode][model]['speed_up']:.2f}"
            for task in tasks
            for mode in ("inference", "training step")
            for model in (name, f"{name}, bf16")
        ]
        sizes = [f"{groups[task, 'inference'][name]['parameters'] / 1e6:.1f}" for task in tasks]
        memory = [_megabytes(groups[task, "training step"][name]) for task in tasks]
        cells = [name, sizes[0], *speeds[:4], memory[0], sizes[1], *speeds[4:], memory[1]]
        lines.append(f"| {' | '.join(cells)} |\n")
        assert row["precision"] == "fp32"
    return "".join(lines)


def test_other_models() -> None:
    assert _peers() in (DOCS / "performance.md").read_text()
