"""The result of `suite.run` as Markdown tables."""

from collections.abc import Iterable
from statistics import median
from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """One table a group, with the columns that it has values for. Speed-ups are against the first row, from medians."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{result['device']}, {result['threads']} thread(s), {versions}, {result['date'][:10]}"]
    for group in result["groups"]:
        lines += ["", f"### {group['name']}: {group['task'].upper()}, {group.get('mode', '')}".rstrip(", "), ""]
        if "unavailable" in group:
            lines.append(f"not available: {group['unavailable']}")
            continue
        rows = [_cells(row) for row in group["rows"]]
        heads = [head for head in rows[0] if any(row[head] for row in rows)]
        lines += [_line(heads), _line(["---"] + ["---:"] * (len(heads) - 1))]
        lines += [_line(row[head] for head in heads) for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> dict[str, str]:
    sizes = {
        "model": row["model"],
        "parameters": f"{row['parameters'] / 1e6:.2f} M" if "parameters" in row else "",
        "systems": str(row["systems"]),
        "atoms": str(row["atoms"]),
        "edges": str(row["edges"]),
    }
    if "launches" in row:
        (forward, backward), moved = row["launches"], row["moved_bytes"]
        cells = {"launches forward": str(forward), "backward": str(backward)}
        return sizes | cells | {"GB forward": f"{moved[0] / 1e9:.2f}", "GB backward": f"{moved[1] / 1e9:.2f}"}
    seconds, peak = median(row["seconds"]), row["peak_bytes"]
    return sizes | {
        "speed-up": f"{row['speed_up']:.2f}",
        "(wall)": f"{row['speed_up_wall']:.2f}",
        "systems/s": f"{row['systems'] / seconds:.0f}",
        "us/atom": f"{1e6 * seconds / row['atoms']:.0f}",
        "peak MB": "" if peak is None else f"{peak / 1e6:.0f}",
        "start ms": f"{1000 * row['start_seconds']:.0f}" if "start_seconds" in row else "",
        **{f"processes for {rate}/s": str(count) for rate, count in row.get("processes", {}).items()},
        "kB/system": f"{row['bytes'] / row['systems'] / 1000:.1f}" if "bytes" in row else "",
        "difference": f"{max(row['difference'].values()):.0e}" if "difference" in row else "",
    }


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
